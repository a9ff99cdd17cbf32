"""`import peftfast.as_peft` before anything else: from then on `import peft` gives peftfast, in the whole process.

For scripts and libraries written for PEFT, unchanged, with or without PEFT installed. `python -m peftfast run
script.py` does the same without touching the script.
"""

from peftfast.interop.alias import install

install()
