"""Decode and unified workers."""
