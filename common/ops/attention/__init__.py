"""The attention seam: the contract in `base`, one file per backend."""
