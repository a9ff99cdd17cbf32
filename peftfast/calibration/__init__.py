"""Ranks and first factors chosen from a few batches of data, and prefixes that start as a text."""
