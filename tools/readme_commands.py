"""Prints a shell command of README's section "Quick start": `python tools/readme_commands.py 1` or `2`.

Fails if the section does not hold exactly two commands, so that what CI runs is what a reader is told to run.
"""

import re
import sys
from pathlib import Path


def quick_start_commands(readme: str) -> list[str]:
    """The shell lines of the section, in order."""
    section = re.search(r"^## Quick start\n(.*?)^## ", readme, flags=re.M | re.S)
    if section is None:
        raise ValueError("README.md has no section 'Quick start' followed by another section")
    blocks = re.findall(r"```(?:sh|shell|bash)\n(.*?)```", section.group(1), flags=re.S)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    if len(blocks) != 2 or len(commands) != 2:
        raise ValueError(f"'Quick start' must hold two code blocks of one line each, found {commands}")
    return commands


if __name__ == "__main__":
    print(quick_start_commands((Path(__file__).parent.parent / "README.md").read_text())[int(sys.argv[1]) - 1])
