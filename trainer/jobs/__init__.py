"""Stages that follow each other, sweeps, and the commands that they start and watch."""
