"""A plain LoRA in place of changed weights."""
