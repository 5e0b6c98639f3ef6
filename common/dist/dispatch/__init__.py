"""The expert dispatch seam: the contract in `base`, one file per backend."""
