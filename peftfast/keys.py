"""How files, and a PeftModel's state dict, call what is inside the base model."""

#: In front of a module's name in the base model.
PREFIX = "base_model.model."


def in_base(key: str) -> str:
    """The name inside the base model, which a bare base model's own state dict has."""
    return key.removeprefix(PREFIX)
