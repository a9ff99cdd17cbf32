"""Quantising a dense model, with a report of the error, and going back to the original weights."""
