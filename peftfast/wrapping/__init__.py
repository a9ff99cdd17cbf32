"""From a config to adapted modules: which modules match, what is decided before anything changes, and the list of what
was adapted."""
