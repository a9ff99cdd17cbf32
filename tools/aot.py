"""Compiles every kernel for every supported chip without a GPU and checks what the compiler made of it.

    python tools/aot.py [--quick] [--chips sm_90,gfx942] [--match lora_gemm] [--jobs 2]

Prints registers, spills, shared memory against the chip's limit, how many of the main loop's accesses to global memory
are 16 bytes wide, matrix instructions and, for kernels that decode 4-bit weights, machine instructions per decoded
weight. Exits with 1 on a spill in a loop, a limit exceeded, a table that is read from global memory weight by weight, a
missing matrix instruction or matrix instructions one by one, a compiler failure or a kernel that was silently compiled
into a trap.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
os.environ.pop("TRITON_INTERPRET", None)  # decided when Triton is imported, which happens below and in the workers

CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")

# Instructions per decoded 4-bit weight on sm_90: above this a decode that is bound by memory becomes bound by the ALUs.
# Tiles of many rows are bound by their products.
MAX_PER_WEIGHT = 10.0

# Accesses to global memory of less than 16 bytes per decoded weight: each takes a cycle for every line that a warp's
# threads touch. Packed codes and scales take 0.2 at most; a table of the values of every byte would take 0.5 more, each
# of 14 lines on average.
MAX_NARROW = 0.4

# Spills outside every loop cost nanoseconds once per program; more than these few mean that the tile is too large.
MAX_COLD_SPILLS = 8

SPILL = r"\b(?:LDL|STL)\b"
GLOBAL = r"\b(?:LDG|LDGSTS|STG)\b"
WIDE = r"\b(?:LDG|LDGSTS|STG)\S*\.128\b"
MATRIX = {"HGMMA": r"\bHGMMA", "UTCMMA": r"\bUTC\w*MMA", "HMMA": r"\b[HI]MMA", "MFMA": r"\bv_mfma_"}
BIG = {"sm_90": "HGMMA", "sm_100": "UTCMMA"}  # elsewhere the chip has one kind only


class Row(NamedTuple):
    """One line of the table."""

    name: str
    chip: str
    registers: int
    spills: int
    shared: int
    limit: int
    accesses: str
    matrix: str
    instructions: int
    per_weight: float
    seconds: float
    problems: tuple[str, ...]


def variants_of(chip):
    from peftfast_kernels.variants import MODULES

    for module in MODULES:
        yield from importlib.import_module(f"peftfast_kernels.{module}").variants(chip)


def compile_variant(variant, chip):
    return compile_source(variant.launch.kernel, variant.source, variant.options, chip)


def compile_source(kernel, source, options, chip):
    """What Triton compiles of a kernel for a chip. source: types, constants and hints of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    described = ASTSource(kernel, signature=source.signature, constexprs=source.constants, attrs=source.hints)
    hip = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if hip else GPUTarget("cuda", int(chip[3:]), 32)
    return triton.compile(described, target=target, options=options)


def disassemble(cubin):
    """(SASS text, resource usage text) of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return sass, usage.stdout + usage.stderr


def complaints(ptx):
    """What the assembler says of lost performance, which Triton does not show: as of wgmma that wait for each other."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(int(target[2])).path,
            "-v",
            f"--gpu-name={target[1]}",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(
        r"Potential Performance Loss: (.*?)(?: in the function|$)", said.stdout + said.stderr, re.MULTILINE
    )


def parse_sass(sass):
    """(instructions, branches): which of them goes to which other, by their indices."""
    labels, instructions = {}, []
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x?\w*):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    found = {index: re.search(r"\bBRA\b.*?`\((\.L_x?\w*)\)", text) for index, text in enumerate(instructions)}
    return instructions, {index: labels[one[1]] for index, one in found.items() if one and one[1] in labels}


def repeated(instructions, branches):
    """Indices of instructions that a thread may run again. Not all before a branch backwards: what goes on waiting for
    an mbarrier stands behind the kernel's end, and goes back from there."""
    ends = r"(?:BRA(?:\.\w+)* `|EXIT|RET)"  # without a condition
    after, before = ([[] for _ in instructions] for _ in range(2))
    for index, text in enumerate(instructions):
        ended = re.match(ends, text) or index + 1 == len(instructions)
        for target in {branches.get(index), None if ended else index + 1} - {None}:
            after[index].append(target)
            before[target].append(index)

    def reached(start, steps):
        found, left = set(), [start]
        while left:
            if (one := left.pop()) not in found:
                found.add(one)
                left += steps[one]
        return found

    backwards = [(first, last) for last, first in branches.items() if first < last]
    return set().union(*(reached(first, after) & reached(last, before) for first, last in backwards))


def main_loop(instructions, branches):
    """The longest innermost loop; the whole kernel where there is none."""
    loops = [(first, last) for last, first in branches.items() if first < last]  # one to itself is padding after EXIT
    inner = [
        one for one in loops if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in loops)
    ]
    if not inner:
        return instructions
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return instructions[first : last + 1]


def inspect_nvidia(compiled, variant, chip):
    sass, usage = disassemble(compiled.asm["cubin"])
    instructions, branches = parse_sass(sass)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = (int(group) for group in found.groups())
    # Frame bytes that nothing touches (a 16-byte ABI frame on some chips) are no spill; loads and stores to it are.
    spilling = [index for index, text in enumerate(instructions) if re.search(SPILL, text)]
    hot, spills = len(repeated(instructions, branches).intersection(spilling)) if spilling else 0, len(spilling)
    problems = []
    if hot or spills > MAX_COLD_SPILLS:
        problems.append(f"{spills} spill instructions, {hot} of them in a loop; stack {stack}, local {local}")
    if len(instructions) < 32 and any("BPT.TRAP" in text for text in instructions):
        problems.append("compiled into a trap")
    problems += complaints(compiled.asm["ptx"])
    loop, per_weight = main_loop(instructions, branches), 0.0
    counts = [sum(bool(re.search(pattern, text)) for text in loop) for pattern in (WIDE, GLOBAL)]
    if variant.weights:
        each = variant.weights / (32 * variant.options["num_warps"])  # weights of one thread
        per_weight = len(loop) / each
        if (narrow := (counts[1] - counts[0]) / each) > MAX_NARROW:
            problems.append(f"{narrow:.2f} narrow accesses to global memory per weight > {MAX_NARROW}")
    return registers, spills, instructions, "{}/{}".format(*counts), per_weight, problems


def inspect_amd(compiled, variant, chip):
    text = compiled.asm["amdgcn"]

    def value(key):
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    problems = [f"{spills} registers spilled"] if value("vgpr_spill_count") else []
    body = [line.strip() for line in text.splitlines() if re.match(r"\t[a-z]+_", line)]
    return value("vgpr_count") + value("agpr_count"), value("vgpr_spill_count"), body, "", 0.0, problems


def check(chip, index):
    """Compiles variant number `index` of a chip and judges the result."""
    from peftfast_kernels.configs import SHARED_MEMORY
    from peftfast_kernels.variants import BIG_MATRIX, NO_MATRIX

    variant = list(variants_of(chip))[index]
    limit, start = SHARED_MEMORY[chip], time.perf_counter()
    try:
        compiled = compile_variant(variant, chip)
    except Exception as error:  # any compiler failure is a finding, reported with its first line
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"{type(error).__name__}: {message[:120]}"
        return Row(variant.name, chip, 0, 0, 0, limit, "", "", 0, 0.0, 0.0, (problem,))
    inspect = inspect_amd if chip.startswith("gfx") else inspect_nvidia
    registers, spills, instructions, accesses, per_weight, problems = inspect(compiled, variant, chip)
    counts = {kind: sum(bool(re.search(pattern, text)) for text in instructions) for kind, pattern in MATRIX.items()}
    counts = {kind: count for kind, count in counts.items() if count}
    if variant.matrix != NO_MATRIX and not counts:
        problems.append("no matrix instruction")
    elif variant.matrix == BIG_MATRIX and chip in BIG and BIG[chip] not in counts:
        problems.append(f"no {BIG[chip]}")
    if compiled.metadata.shared > limit:
        problems.append(f"shared memory {compiled.metadata.shared} > {limit}")
    if chip == "sm_90" and variant.matrix != BIG_MATRIX and per_weight > MAX_PER_WEIGHT:
        problems.append(f"{per_weight:.1f} instructions per weight > {MAX_PER_WEIGHT:.0f}")
    return Row(
        variant.name,
        chip,
        registers,
        spills,
        compiled.metadata.shared,
        limit,
        accesses,
        " ".join(f"{kind}:{count}" for kind, count in counts.items()),
        len(instructions),
        per_weight,
        time.perf_counter() - start,
        tuple(problems),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the variants marked quick only")
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated, of " + ", ".join(CHIPS))
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    chips = options.chips.split(",")
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"unknown chips {', '.join(sorted(unknown))}; of {', '.join(CHIPS)}")
    work = [
        (chip, index)
        for chip in chips
        for index, variant in enumerate(variants_of(chip))
        if options.match in variant.name and (variant.quick or not options.quick)
    ]
    if not work:
        parser.error(f"no variant matches {options.match!r}")
    shared = f"{'shared':>7}/{'limit':<7}"
    print(f"{'kernel':40} {'chip':7} {'regs':>4} {'spill':>5} {shared} {'16 B':>7} {'instr':>6} {'/weight':>7}  matrix")
    failed, start = 0, time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(check, *zip(*work, strict=True)):
            failed += bool(row.problems)
            weight = f"{row.per_weight:7.1f}" if row.per_weight else f"{'':7}"
            print(
                f"{row.name:40} {row.chip:7} {row.registers:4} {row.spills:5} {row.shared:7}/{row.limit:<7} "
                f"{row.accesses:>7} {row.instructions:6} {weight}  {row.matrix}"
                + "".join(f"  !! {text}" for text in row.problems),
                flush=True,
            )
    print(f"{len(work)} compilations, {failed} with problems, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
