"""The decoder, its Hugging Face form, and generation."""
