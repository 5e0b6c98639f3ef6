"""A worker's processes: the front, its ranks, and what they tell each other."""
