"""Weights on disk: from Hugging Face and back, and the Orbax checkpoint that everything else reads."""
