__version__ = "0.1.0"

#: The PEFT release whose files and API this version reproduces; written to `adapter_config.json` as `peft_version`.
COMPATIBLE_PEFT_VERSION = "0.21.2"
