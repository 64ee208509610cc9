"""What leaves a run: Hugging Face folders and their lineage."""
