"""`import peftfast.as_peft`: from then on `import peft` gives peftfast, in the whole process.

For scripts and libraries written for PEFT, unchanged, with or without PEFT installed; before anything that imports
`peft`. `python -m peftfast run script.py` does the same without touching the script.

A script written for peftfast does not need it: where PEFT is not installed, the name is taken with the first config or
model (`peftfast.interop.alias.take_if_vacant`).
"""

from peftfast.interop.alias import install

install()
