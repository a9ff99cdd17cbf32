"""PEFT's own tests, run against peftfast under PEFT's name.

    pip install -e '.[test,peft-suite]'           # Python 3.11 or newer
    python tools/peft_suite                       # all files of FILES; minutes
    python tools/peft_suite config initialization # these; whatever follows -- goes to pytest (-- -n 2)

Fetches PEFT's source distribution (pip, version and checksum as below), unpacks its tests under --folder and runs them
twice where needed: everything under peftfast, and under PEFT itself what peftfast failed, because a test that fails
there too says nothing (models that are not on this machine, mostly). Tests of methods and variants that peftfast does
not have are skipped; tests whose expectation peftfast deliberately does not share are listed with the reason in
differences.toml. Ends with 1 if a test passes under PEFT, fails under peftfast and is not listed.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
#: Left out: files that are about other methods only, need a GPU, or download what no stand-in replaces.
FILES = (
    "arrow", "auto", "bdlora", "config", "custom_models", "decoder_models", "encoder_decoder_models",
    "feature_extraction_models", "helpers", "initialization", "integrations", "lora_ga", "lora_variants", "lorafa",
    "loraplus", "lora_conversion", "lora_intruders", "low_level_api", "mapping", "mixed", "other", "riemannian_lora",
    "seq_classifier", "target_parameters", "token_classification_qa", "trainable_tokens", "tuners_utils", "velora",
)  # fmt: skip
HERE = Path(__file__).resolve().parent


def fetch(folder: Path) -> Path:
    """The unpacked tests; PEFT's package beside them is not used."""
    root = folder / f"peft-{VERSION}"
    if (root / "tests" / "__init__.py").exists():
        return root
    command = ["download", f"peft=={VERSION}", "--no-binary", "peft", "--no-deps", "--no-build-isolation", "-d", folder]
    subprocess.run([sys.executable, "-m", "pip", *map(str, command)], check=True)
    archive = folder / f"peft-{VERSION}.tar.gz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{archive} has the checksum {digest}, expected {SHA256}")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(f"peft-{VERSION}/tests/")]
        tar.extractall(folder, members, filter="data")
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / "tests" / "__init__.py").touch()
    return root


def run(root: Path, hub: Path, side: str, arguments: list[str]) -> dict[str, str]:
    """Test id -> passed, failed, skipped or xfailed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        environment = os.environ | {
            "PEFT_SUITE_SIDE": side, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_CACHE": str(hub),
            "HF_TOKEN": "none", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        options = ["-p", "plugin", "-p", "no:cacheprovider", "-q", "--tb=short", f"--junit-xml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *arguments], cwd=root, env=environment, check=False)
        if not report.exists():
            raise SystemExit(f"pytest wrote no report under {side}")
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kind = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if kind is None else "skipped" if kind.tag == "skipped" else "failed"
            if outcome == "skipped" and kind.get("type") == "pytest.xfail":
                outcome = "listed"
            outcomes[node(case)] = outcome
        return outcomes


def node(case: ElementTree.Element) -> str:
    """The id by which pytest selects this test."""
    parts = case.get("classname").split(".")
    file = next(i for i, part in enumerate(parts) if part.startswith("test_"))
    return "::".join(["/".join(parts[: file + 1]) + ".py", *parts[file + 1 :], case.get("name")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help="of PEFT's tests, without test_ and .py")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peft-suite")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    known, extra = parser.parse_args(given[:end]), given[end + 1 :]
    known.folder.mkdir(parents=True, exist_ok=True)
    root, hub = fetch(known.folder), known.folder / "hub"
    sys.path.insert(0, str(HERE))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from models import fill

    fill(hub)
    counts: dict[str, collections.Counter] = {}
    ours_only = []
    for file in known.files:
        outcomes = run(root, hub, "peftfast", [f"tests/test_{file}.py", *extra])
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        theirs = {}
        if failed:
            selection = known.folder / "failed.txt"
            selection.write_text("\n".join(failed))
            theirs = run(root, hub, "peft", [f"@{selection}"])
        fails = [test for test in failed if theirs.get(test) == "passed"]
        ours_only += fails
        counts[file] = collections.Counter(outcomes.values())
        counts[file]["failed"] = len(fails)
        counts[file]["without a word"] = len(failed) - len(fails)
    print(f"\nPEFT {VERSION}'s tests under peftfast\n")
    print(
        "| file | passed | listed differences | only peftfast fails | PEFT fails here too | not in peftfast, skipped |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    total: collections.Counter = collections.Counter()
    for file, count in [*counts.items(), ("all", total)]:
        columns = ("passed", "listed", "failed", "without a word", "skipped")
        print(f"| {file} | " + " | ".join(str(count[column]) for column in columns) + " |")
        total.update(count)
    print("\n" + "\n".join(ours_only))
    return 1 if ours_only else 0


if __name__ == "__main__":
    raise SystemExit(main())
