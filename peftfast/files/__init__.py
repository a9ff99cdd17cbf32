"""Adapters on disk: atomic writes, keys, the report of what does not fit, records of the base, older layouts."""
