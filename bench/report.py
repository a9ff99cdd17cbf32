"""One page with plots from the CSV of bench/gpu.py.

python bench/report.py bench/results/sm_90-....csv [--out page.html]
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Target(NamedTuple):
    """What a claim needs: of which rows, over whom (the first of them that is there), at least how much, and what is
    aimed at."""

    text: str
    suite: str
    peers: tuple[str, ...]
    least: float
    aim: float | None = None
    n: int | None = None
    format: str = "dense"
    rows: tuple[float, float] = (2048, math.inf)
    method: str = "LoRA"
    model: str | None = None

    def covers(self, row: Row) -> bool:
        """bf16, r = 16, no dropout, and what else it says."""
        plain = row["dtype"] == "bfloat16" and not row["dropout"] and row["r"] == 16
        fits = row["suite"] == self.suite and row["format"] == self.format and self.rows[0] <= row["m"] <= self.rows[1]
        fits &= self.model in (None, row["model"])
        square = self.n is None or (row["n"], row["k"]) == (self.n, 4096)
        return plain and fits and square and ("DoRA" in row["case"]) == (self.method == "DoRA")


PEFT, UNSLOTH = ("peft",), ("unsloth", "unsloth's formula")
TARGETS = (
    Target("bf16, M >= 2048, r = 16, 4096 -> 4096, against PEFT", "linear", PEFT, 1.35, 1.57, 4096),
    Target("bf16, M >= 2048, r = 16, 4096 -> 1024, against PEFT", "linear", PEFT, 1.8, 2.4, 1024),
    Target("the same against Unsloth's function", "linear", UNSLOTH, 1.05, 1.2, 4096),
    Target("Llama-3-8B's layer, forward and backward, against PEFT", "layer", PEFT, 1.33, 1.55, model="llama-3-8b"),
    Target("NF4, M <= 128, against PEFT over bitsandbytes", "linear", PEFT, 2.5, None, None, "nf4", (1, 128)),
    Target("DoRA linear, against PEFT", "linear", PEFT, 2.0, method="DoRA"),
    Target("mixed adapters, against PEFT", "mixed", PEFT, 5.0, rows=(1, math.inf)),
)
OVER_FROZEN = Target("over the frozen base, 4096 -> 4096", "linear", ("frozen",), 1.16, n=4096)
#: suites of paths that a user's calls need not take
UNCLAIMED = ("ops", "questions")
NUMBERS = (
    "m", "n", "k", "r", "adapters", "us", "q1", "q3", "rounds", "dropout", "ratio_to_limit", "speedup", "peak_mib",
    "error", "flops", "bytes",
)  # fmt: skip
CASE = ("suite", "case", "model", "op", "format", "dtype", "m", "n", "k", "r", "dropout", "adapters")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4ea }
td:first-child, th:first-child { text-align: left } .red { color: #b3261e; font-weight: 600 } .green { color: #146c2e }
img { max-width: 100% } .note { color: #5c5c66 }
"""


def read(path: Path) -> list[Row]:
    """The rows of a CSV, numbers as numbers and empty cells as None; without one that was cut off in its middle."""
    with path.open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if None not in row.values()]
    for row in rows:
        for name in NUMBERS:
            row[name] = float(row[name]) if row.get(name) not in ("", None) else None
    return rows


def red_file(path: Path) -> Path:
    """Where what failed stands beside a CSV, a line each: what has crashed has no row in it."""
    return path.with_suffix(".red.txt")


def cases(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """The contestants of every comparison, together."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return found


def speedup(sides: list[Row], *peers: str) -> float | None:
    """Best of ours over the first peer that is there; None where either is missing or its gate is red."""
    ours = [r["us"] for r in sides if r["role"] == "ours" and r["gate"] == "green"]
    theirs = next((r for peer in peers for r in sides if r["contestant"] == peer), None)
    return theirs["us"] / min(ours) if ours and theirs and theirs["gate"] == "green" else None


def verdicts(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(claim, figure, "met", "missed" or "not measured")."""
    found = cases(rows)
    lines = []
    for target in TARGETS:
        covered = [s for s in found.values() if target.covers(s[0]) and any(r["contestant"] in target.peers for r in s)]
        ratios = [ratio for ratio in (speedup(sides, *target.peers) for sides in covered) if ratio]
        wrong = len(covered) - len(ratios)
        needed = f"needed {target.least}" + (f", aim {target.aim}" if target.aim else "")
        figure = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} compared ({needed})" if ratios else needed
        figure += _wrong(wrong, covered)
        state = "not measured" if not covered else "met" if not wrong and min(ratios) >= target.least else "missed"
        lines.append((target.text, figure, state))
    covered = [s for s in found.values() if OVER_FROZEN.covers(s[0]) and any(r["contestant"] == "frozen" for r in s)]
    over = [row["ratio_to_limit"] for s in covered for row in s if row["role"] == "ours" and row["ratio_to_limit"]]
    wrong = sum(not any(r["role"] == "ours" and r["ratio_to_limit"] for r in s) for s in covered)
    needed = f"at most {OVER_FROZEN.least}"
    state = "not measured" if not covered else "met" if not wrong and max(over) <= OVER_FROZEN.least else "missed"
    figure = (f"{max(over):.3f}, {len(over)} compared ({needed})" if over else needed) + _wrong(wrong, covered)
    lines.append((OVER_FROZEN.text, figure, state))
    claimed = [s for s in found.values() if s[0]["suite"] not in UNCLAIMED]
    swept = [s for s in claimed if any(r["role"] == "peer" and r["gate"] == "green" for r in s)]
    mine = [[r["gate"] for r in s if r["role"] == "ours"] for s in swept]
    wrong = sum(not gates or "red" in gates for gates in mine)
    compared, slow = _compared(rows), slow_rows(rows)
    state = "not measured" if not swept else "missed" if slow or wrong else "met"
    figure = f"{len(slow)} of {len(compared)} rows below" + _wrong(wrong, swept)
    lines.append(("no row below 0.98 of the best alternative", figure, state))
    return lines


def _wrong(count: int, of: list) -> str:
    """Comparisons in which a side is red, or ours is not there because it was not finite: they have no ratio, and no
    claim holds with one of them."""
    return f"; wrong: {count} of {len(of)}" if count else ""


def _compared(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["role"] == "ours" and row["speedup"] and row["suite"] not in UNCLAIMED]


def slow_rows(rows: list[Row]) -> list[str]:
    """Rows of ours below 0.98 of the best alternative, the slowest first."""
    slow = sorted((row for row in _compared(rows) if row["speedup"] < 0.98), key=lambda row: row["speedup"])
    return [f"{row['speedup']:.2f} {row['suite']} {_label(row)} {row['contestant']}" for row in slow]


def plots(rows: list[Row]) -> list[tuple[str, bytes]]:
    """(caption, PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for suite, title in (
        ("linear", "LoRA linear, forward and backward"), ("layer", "decoder layer, forward and backward"),
        ("step", "training step, two layers, AdamW"), ("decode", "decoding"), ("mixed", "many adapters in one batch"),
        ("compiled", "against PEFT under torch.compile"),
    ):  # fmt: skip
        groups = [sides for key, sides in cases(rows).items() if key[0] == suite]
        if not groups:
            continue
        names = list(dict.fromkeys(r["contestant"] for sides in groups for r in sides))
        figure, axes = plt.subplots(figsize=(11, 0.9 + 0.28 * len(groups) * max(len(names), 2) ** 0.6))
        height = 0.8 / len(names)
        for j, name in enumerate(names):
            color = {"frozen": "#9aa0a6", "peftfast": "#1a73e8", "peftfast + blocks": "#0b3d91"}.get(name)
            for i, sides in enumerate(groups):
                row = next((r for r in sides if r["contestant"] == name), None)
                base = next((r["us"] for r in sides if r["role"] == "limit"), min(r["us"] for r in sides))
                if row is None:
                    continue
                red = row["gate"] == "red"
                axes.barh(
                    i + (j - len(names) / 2) * height, row["us"] / base, height, color=color or f"C{j}",
                    xerr=[[(row["us"] - row["q1"]) / base], [(row["q3"] - row["us"]) / base]],
                    hatch="xx" if red else None, label=name if i == 0 else None,
                    error_kw={"lw": 0.7},
                )  # fmt: skip
        axes.set_yticks(range(len(groups)), [_label(sides[0]) for sides in groups], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="#555", lw=0.8)
        axes.set_xlabel("time over the frozen base (where there is none: over the fastest); shorter is better")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, fontsize=7, loc="lower right")
        axes.set_title(title, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        made.append((title, _png(figure)))
        plt.close(figure)
    made += _roofline(rows, plt)
    return made


def _roofline(rows: list[Row], plt: Any) -> list[tuple[str, bytes]]:
    """Ops as a scatter: intensity against rate, with what this chip itself reached as the roof."""
    points = [r for r in rows if r["suite"] in ("ops", "questions") and r["us"] and (r["flops"] or r["bytes"])]
    drawn = [r for r in points if r["flops"] and r["bytes"]]
    if not drawn:
        return []
    rate = {id(r): (r["flops"] or 0) / r["us"] / 1e6 for r in points}
    flow = {id(r): (r["bytes"] or 0) / r["us"] / 1e3 for r in points}
    figure, axes = plt.subplots(figsize=(11, 4.5))
    for role, mark, color in (("peer", "o", "#9aa0a6"), ("ours", "^", "#1a73e8")):
        mine = [r for r in drawn if r["role"] == role]
        label = {"peer": "plain torch", "ours": "Triton"}[role]
        axes.scatter([r["flops"] / r["bytes"] for r in mine], [rate[id(r)] for r in mine], 16, color, mark, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flop per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7)
    best = f"highest seen: {max(rate.values()):.3g} TFLOP/s, {max(flow.values()):.4g} GB/s"
    axes.set_title(f"ops on the roofline ({best})", loc="left")
    return [("roofline", _png(figure))]


def _label(row: Row) -> str:
    parts = [row["model"] or "", row["case"], f"M={row['m']:.0f}", f"r={row['r']:.0f}", row["format"], row["dtype"]]
    return " ".join([*filter(None, parts), *([f"p={row['dropout']}"] if row["dropout"] else [])])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def page(rows: list[Row], source: str, failed: Sequence[str] = ()) -> str:
    """The whole page as one HTML text without outside files."""
    if not rows:
        return f"<!doctype html><meta charset=utf-8><p class=red>{html.escape(source)} has no rows."
    first = rows[0]
    dry = first["device"].startswith("CPU")
    found = json.loads(first["versions"])
    parts = [
        f"<!doctype html><meta charset=utf-8><title>peftfast on {html.escape(first['device'])}</title>",
        f"<style>{STYLE}</style><h1>peftfast on {html.escape(first['device'])}</h1>",
        f"<p class=note>{html.escape(source)}: {len(rows)} rows; "
        + html.escape(", ".join(f"{n} {v}" for n, v in found.items())) + "</p>",
    ]  # fmt: skip
    parts.append(
        "<p class=note>One linear, ops and questions: the GPU's own time. Models: what a program sees that waits for "
        "its host."
    )
    if dry:
        parts.append("<p class=red>A dry run on a CPU at tiny sizes: the figures mean nothing.</p>")
    red = [r for r in rows if r["role"] == "ours" and r["gate"] == "red"]
    parts.append(f"<p class={'red' if red else 'green'}>{len(red)} rows of ours failed the correctness gate.</p>")
    parts += [f"<p class=red>Failed: {html.escape(text)}</p>" for text in failed]
    parts.append("<h2>Claims</h2>" + _table(("claim", "figure", ""), verdicts(rows)))
    try:
        for caption, png in plots(rows):
            data = base64.b64encode(png).decode()
            parts.append(f'<h2>{html.escape(caption)}</h2><img alt="{caption}" src="data:image/png;base64,{data}">')
    except ImportError:
        parts.append("<p class=red>No plots: matplotlib is not installed (pip install 'peftfast[bench]').</p>")
    parts.append("<h2>Answers to the design's questions</h2>" + _questions(rows))
    listing = [
        (
            _label(r), r["contestant"], f"{r['us']:.1f}", f"{r['q1']:.1f} to {r['q3']:.1f}",
            f"{r['ratio_to_limit']:.3f}" if r["ratio_to_limit"] else "", f"{r['speedup']:.2f}" if r["speedup"] else "",
            f"{r['peak_mib']:.0f}" if r["peak_mib"] == r["peak_mib"] else "", r["gate"],
        )
        for r in rows if r["suite"] not in ("ops", "questions")
    ]  # fmt: skip
    names = ("case", "contestant", "us", "quartiles", "over frozen", "speedup", "peak MiB", "gate")
    parts.append("<h2>Every row</h2>" + _table(names, listing))
    return "\n".join(parts)


def _questions(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["suite"] == "questions":
            shape = f"M={row['m']:.0f} N={row['n']:.0f} K={row['k']:.0f}"
            rate = f"{row['flops'] / row['us'] / 1e6:.1f}" if row["flops"] else ""
            flow = f"{row['bytes'] / row['us'] / 1e3:.0f}" if row["bytes"] else ""
            lines.append((row["case"], shape, row["contestant"], f"{row['us']:.1f}", rate, flow))
    return _table(("question", "size", "path", "us", "TFLOP/s", "GB/s"), lines)


def _table(names: tuple[str, ...], lines: list[tuple]) -> str:
    head = "".join(f"<th>{html.escape(n)}" for n in names)
    mark = {"met": "green", "missed": "red", "red": "red"}
    body = "".join(
        "<tr>" + "".join(f"<td class={mark.get(c, 'plain')}>{html.escape(str(c))}" for c in line) for line in lines
    )
    return f"<table><tr>{head}{body}</table>"


def write_page(path: Path, out: Path | None = None) -> Path:
    """The page beside the CSV; returns where."""
    out = out or path.with_suffix(".html")
    red = red_file(path)
    out.write_text(page(read(path), path.name, red.read_text().splitlines() if red.exists() else ()))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    print(write_page(args.csv, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
