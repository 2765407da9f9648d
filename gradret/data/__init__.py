"""Ranking lists and collections: reading, merging, writing."""
