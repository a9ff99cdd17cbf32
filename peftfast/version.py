__version__ = "0.1.0"

#: The PEFT release whose files and API this version reproduces; written to `adapter_config.json` as `peft_version`.
COMPATIBLE_PEFT_VERSION = "0.21.2"

#: What libraries hear that ask for the release of the package `peft`, where peftfast answers to its name: transformers
#: 5.24 takes no earlier one, and uses nothing that came with it.
ANSWERED_PEFT_VERSION = "0.22.0"
