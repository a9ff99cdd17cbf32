"""Ranks and first factors chosen from a few batches of data."""
