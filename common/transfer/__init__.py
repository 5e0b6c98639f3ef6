"""Moves pages from one worker's pool into another's."""
