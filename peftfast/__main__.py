"""`python -m peftfast` is the command `peftfast`."""

import sys

from peftfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
