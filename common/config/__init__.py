"""Frozen dataclasses from flags, environment and file."""
