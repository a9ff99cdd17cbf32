"""Serving peftfast under the name `peft`, and what other libraries look for there."""
