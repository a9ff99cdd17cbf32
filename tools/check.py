"""The whole gate that needs no test run: format, lint, layers. `python tools/check.py [--fix]`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ["peftfast", "kernels", "tests", "bench", "tools"]


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    commands = [
        [sys.executable, "-m", "ruff", "format", *([] if fix else ["--check"]), *SOURCES],
        [sys.executable, "-m", "ruff", "check", *(["--fix"] if fix else []), *SOURCES],
        ["lint-imports"],
    ]
    failed = [" ".join(command) for command in commands if subprocess.run(command, cwd=ROOT).returncode]
    for command in failed:
        print(f"failed: {command}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
