"""One file per model family, and the checkpoint loader."""
