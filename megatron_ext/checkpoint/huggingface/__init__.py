"""From Hugging Face directories and back: one table per family, read in both directions, and the stream between."""
