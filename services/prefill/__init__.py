"""Prefill workers."""
