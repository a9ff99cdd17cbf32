"""Prompt, P- and prefix tuning: the model that prepends, and the cache that holds a prefix."""
