"""Reinforcement learning: from a prompt to a batch that is learnt from."""
