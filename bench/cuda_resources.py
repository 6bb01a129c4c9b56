"""What the CUDA kernels take of a GPU, from the library as built; no GPU needed.

    python -m bench.cuda_resources [library] [--out FILE]

For each kernel and architecture, over all its instances: registers, shared and stack bytes, instructions
on local memory (a spill, or an array that the compiler could not keep in registers), and how often the
instructions appear that a kernel may be about. Writes bench/results/cuda_resources.md.
"""

import argparse
import collections
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "recsparse_kernels" / "_native_cuda.so"
TABLE = ROOT / "bench" / "results" / "cuda_resources.md"

# SASS mnemonics worth naming: tensor cores (dense, 2:4, warpgroup, warpgroup 2:4), waits for a warpgroup's
# products, their loads, copies
INSTRUCTIONS = {
    "HMMA": re.compile(r"\bHMMA\.(?!SP)"),
    "HMMA.SP": re.compile(r"\bHMMA\.SP"),
    "HGMMA": re.compile(r"\bHGMMA\.(?!.*\bSP\b)"),
    "HGMMA.SP": re.compile(r"\bHGMMA\..*SP"),
    "WARPGROUP.DEPBAR": re.compile(r"\bWARPGROUP\.DEPBAR"),
    "LDSM": re.compile(r"\bLDSM"),
    "LDGSTS": re.compile(r"\bLDGSTS"),
    "UBLKCP": re.compile(r"\bUBLKCP|\bUTMALDG"),
}
_LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclasses.dataclass
class Kernel:
    """One instance of a kernel on one architecture."""

    name: str  # without namespace and template arguments
    instance: str  # demangled, without parameters
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    local: int = 0
    instructions: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def find_cuobjdump() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), None)


def _lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with status {process.returncode}")


def _demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return dict(zip(names, names, strict=True))
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, run.stdout.splitlines(), strict=True))


def _instance(demangled: str) -> str:
    """ "void recsparse::bag_kernel<float, 8>(...)" -> "bag_kernel<float, 8>"."""
    text = re.sub(r"recsparse::(?:[a-z]\w*::)*|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled)
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            text = text[:i]
            break
    return text.removeprefix("void ").removeprefix("static ").strip()


def collect(library: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of ours (not CUB's) in the library, on every architecture it has machine code for."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = name = ""
    for line in _lines(cuobjdump, "-res-usage", str(library)):
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+?):", line):
            name = match[1]
        elif "REG:" in line and "recsparse" in name and "3cub" not in name:
            usage[name, arch] = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    readable = _demangle(sorted({name for name, _ in usage}))
    kernels = {}
    for (name, arch), used in usage.items():
        instance = _instance(readable[name])
        kernels[name, arch] = Kernel(
            instance.split("<")[0], instance, arch, used["REG"], used["SHARED"], used["STACK"]
        )
    current = None
    for line in _lines(cuobjdump, "-sass", str(library)):
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = kernels.get((match[1], arch))
        elif current is not None and ";" in line:
            current.local += bool(_LOCAL.search(line))
            for mnemonic, pattern in INSTRUCTIONS.items():
                if pattern.search(line):
                    current.instructions[mnemonic] += 1
    return sorted(kernels.values(), key=lambda k: (k.name, k.arch, k.instance))


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def table(kernels: list[Kernel]) -> str:
    """One line for each kernel and architecture, its instances together."""
    rows = [
        "| kernel | arch | instances | registers | shared bytes | stack bytes | local accesses | instructions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.name, kernel.arch].append(kernel)
    for (name, arch), same in groups.items():
        found = sorted({m for k in same for m in k.instructions})
        cells = [name, arch, str(len(same))]
        cells += [_range([getattr(k, f) for k in same]) for f in ("registers", "shared", "stack", "local")]
        rows.append("| " + " | ".join([*cells, ", ".join(found)]) + " |")
    return "\n".join(rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args(argv)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("cuobjdump is not found: neither the CUDA toolkit's nor Triton's", file=sys.stderr)
        return 2
    if not args.library.exists():
        print(f"{args.library.name} is not built: no nvcc was found", file=sys.stderr)
        return 2
    kernels = collect(args.library, cuobjdump)
    text = (
        "# CUDA kernels: what they take of a GPU\n\n"
        "From `_native_cuda.so` by `python -m bench.cuda_resources`. Shared bytes are the static ones; what a\n"
        "launch adds is in the code. Local accesses are instructions: 0 means no spill.\n\n"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + table(kernels), encoding="utf-8")
    print(f"{args.out}: {len(kernels)} instances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
