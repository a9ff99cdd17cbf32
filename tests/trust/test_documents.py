"""What the documents name is there: functions, modules, files and folders."""

import importlib.util
import re
from pathlib import Path

import pytest

import peftfast

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "tests/WHAT_WAS_RUN.md", "peftfast/interop/DIFFERENCES.md"]


def is_there(name: str) -> bool:
    """Whether `peftfast.<name>` is a module, or can be reached by attributes; `as_peft` is not to be imported here."""
    found = peftfast
    for part in name.split("."):
        if not hasattr(found, part):
            return importlib.util.find_spec(f"peftfast.{name}") is not None
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document):
    text = (ROOT / document).read_text()
    names = set(re.findall(r"\bpeftfast\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", text))
    assert not [name for name in names if not is_there(name)]
    paths = set(re.findall(r"`((?:tests|bench|tools|kernels|peftfast)/[\w./-]+)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert names or paths
