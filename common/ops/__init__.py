"""The kernels' front: what a backend may do better than plain torch."""
