"""Writes `peftfast/__init__.pyi`: for editors and type checkers, what the package imports when it is first used.

python tools/stub.py
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUB = ROOT / "peftfast" / "__init__.pyi"
HEAD = '''"""The public names, as editors and type checkers see them. Written by `tools/stub.py` from `__init__.py`."""

'''


def stub() -> str:
    """What is to be in the file."""
    import peftfast

    places = [("peftfast", name) for name in peftfast._MODULES]
    places += [(f"peftfast.{module}", name) for module, names in peftfast._PUBLIC.items() for name in names]
    places.append(("peftfast.version", "__version__"))
    return HEAD + "".join(f"from {module} import {name} as {name}\n" for module, name in sorted(places))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    STUB.write_text(stub())
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", STUB], check=True)
