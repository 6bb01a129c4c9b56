"""Ahead-of-time compilation, without a GPU, of every launch that the launchers make.

    python -m recsparse_kernels.triton.compile                     all families, all targets; a summary
    python -m recsparse_kernels.triton.compile --table FILE        and the table, in Markdown
    python -m recsparse_kernels.triton.compile --families low_rank --targets sm_90 --brief

Each family file has ``compile_cases()``, which yields (name, callable). The callables run launchers on
shapes of real size, on tensors that hold nothing (``device="meta"``, or CPU memory never touched); what
they would launch is recorded (`_launch.recording`), and each different launch is compiled once for each
target: types from the tensors, and the attributes that Triton's own JIT gives to pointers and integers
divisible by 16 and to integers equal to 1.

The exit status is 1 when a launch does not compile, wants more shared memory than a block of the target
may have, spills registers or forms addresses in too few bits (_addresses.py), and when a kernel is launched
by no case.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Sequence

import torch

from ._addresses import narrow_products
from ._launch import hip_options

TARGETS = {  # name: (backend, architecture, threads of a warp)
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes that a block may have: CUDA programming guide, "maximum shared memory per thread block";
# CDNA 3 instruction set, local data share of a compute unit.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_MEMORY_COLUMNS = 512  # of sm_100

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "u1",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclasses.dataclass
class Launch:
    """What Triton compiles: a kernel, its arguments' types, the values it knows, how many warps run it."""

    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]  # arguments divisible by 16
    options: dict[str, int]
    cases: list[str] = dataclasses.field(default_factory=list)  # which cases make it

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> tuple:
        constants = tuple((name, str(value)) for name, value in self.constants.items())
        options = tuple(sorted(self.options.items()))
        return self.kernel, tuple(self.signature.items()), constants, self.aligned, options

    def described(self) -> str:
        """Types of the tensors, then the chosen constants."""
        pointers = " ".join(kind[1:] for kind in self.signature.values() if kind.startswith("*"))
        by_choice = [p.name for p in self.kernel.params if p.is_constexpr]
        chosen = " ".join(f"{name}={self.constants[name]}" for name in by_choice)
        return f"{pointers}; {chosen}" if chosen else pointers


@dataclasses.dataclass
class Resources:
    """Of a compiled launch: registers a thread, bytes of shared memory a block, bytes spilled a thread."""

    registers: int = 0
    shared: int = 0
    spilled: int = 0
    error: str = ""  # why it did not compile, or what it has too much of


def describe(kernel, args: Sequence, options: dict) -> Launch:
    """The `Launch` that Triton's JIT would make of ``kernel[grid](*args, **options)``."""
    names = [param.name for param in kernel.params]
    given = dict(zip(names, args, strict=False))
    launch_options = {}
    for name, value in options.items():
        (given if name in names else launch_options)[name] = value
    signature, constants, aligned = {}, {}, []
    for param in kernel.params:
        value = given[param.name] if param.name in given else param.default
        kind, divisible = "constexpr", False
        if param.is_constexpr or value is None:
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            kind = "*" + _TYPE_NAMES[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, int):
            if value == 1 and not param.do_not_specialize and not param.annotation_type:
                constants[param.name] = 1
            else:
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0 and not param.do_not_specialize
        elif isinstance(value, float):
            kind = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: {param.name} is a {type(value).__name__}")
        if kind != "constexpr" and param.annotation_type:
            kind = param.annotation_type
        signature[param.name] = kind
        if divisible and not param.do_not_specialize_on_alignment:
            aligned.append(param.name)
    return Launch(kernel, signature, constants, tuple(aligned), launch_options)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for the target and read what the binary takes; the fault, if any, in ``error``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, hip = list(launch.signature), TARGETS[target][0] == "hip"
    source = ASTSource(
        launch.kernel,
        launch.signature,
        {(names.index(name),): value for name, value in launch.constants.items()},
        {(names.index(name),): _ALIGNED for name in launch.aligned},
    )
    options = hip_options(launch.options) if hip else launch.options
    try:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        text = " ".join(str(error).split())
        return Resources(error=f"does not compile: {type(error).__name__}: ... {text[-400:]}")
    resources = _amdgcn_resources(compiled.asm["amdgcn"]) if hip else _cubin_resources(compiled.asm["cubin"])
    resources.shared = compiled.metadata.shared
    faults = []
    if resources.shared > SHARED_LIMIT[target]:
        faults.append(f"shared memory above {SHARED_LIMIT[target] >> 10} KiB")
    if (getattr(compiled.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY_COLUMNS:
        faults.append(f"tensor memory above {TENSOR_MEMORY_COLUMNS} columns")
    if resources.spilled:
        faults.append(f"spills {resources.spilled} B")
    if narrow := narrow_products(compiled.asm["ttir"]):
        faults.append(f"multiplies sizes in 32 bits: {', '.join(narrow)}")
    resources.error = ", ".join(faults)
    return resources


def _cubin_resources(cubin: bytes) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    # Triton has no arrays in local memory: what is on the stack are spilled registers.
    return Resources(registers=numbers["REG"], spilled=numbers["STACK"] + numbers["LOCAL"])


def _amdgcn_resources(assembly: str) -> Resources:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    # A scalar register may be spilled into a lane of a vector register: no memory is touched then.
    return Resources(registers=number("vgpr_count"), spilled=number("private_segment_fixed_size"))


def collect(module: types.ModuleType) -> list[Launch]:
    """The different launches of a family's ``compile_cases()``, in the order they are made, with every
    configuration that launchers may choose."""
    from . import _configs, _launch

    found: dict[tuple, Launch] = {}
    with _launch.recording():  # what the generator itself launches to make its cases is dropped
        for name, run in module.compile_cases():
            with _launch.recording() as recorded:
                for choices in _configs.every():
                    with _configs.using(choices):
                        run()
            for kernel, args, options in recorded:
                launch = describe(kernel, args, options)
                launch = found.setdefault(launch.key, launch)
                if name not in launch.cases:
                    launch.cases.append(name)
    return list(found.values())


def brief(launches: Iterable[Launch]) -> list[Launch]:
    """Of each kernel, enough launches that each kind of argument, each warp count and each value of each
    chosen constant but block sizes (``BLOCK_...``) is in one."""
    seen, out = set(), []
    for launch in launches:
        chosen = [p.name for p in launch.kernel.params if p.is_constexpr and not p.name.startswith("BLOCK_")]
        facts = {(launch.kernel, name, str(launch.constants[name])) for name in chosen}
        facts |= {(launch.kernel, name, value) for name, value in launch.options.items()}
        facts |= {(launch.kernel, kind) for kind in launch.signature.values()}
        if not facts <= seen:
            seen |= facts
            out.append(launch)
    return out


def never_launched(modules: Iterable[types.ModuleType], launches: Iterable[Launch]) -> list[str]:
    """Kernels (``_..._kernel``) of these files that are in none of the launches."""
    kernels = {
        value.__name__
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "params")
    }
    return sorted(kernels - {launch.name for launch in launches})


def family_files() -> dict[str, types.ModuleType]:
    """The files of recsparse_kernels/triton that it has loaded, by name."""
    from .. import triton as package

    modules = {name: value for name, value in vars(package).items() if isinstance(value, types.ModuleType)}
    return {
        name: modules[name] for name in sorted(modules) if modules[name].__name__.startswith(package.__name__)
    }


_work: list[tuple[Launch, str]] = []  # filled before the workers fork: kernels do not pickle


def _compile_nth(position: int) -> Resources:
    return compile_launch(*_work[position])


def compile_all(launches: Sequence[Launch], targets: Sequence[str], jobs: int) -> list[dict[str, Resources]]:
    """For each launch, what it takes on each target; in ``jobs`` processes."""
    _work[:] = [(launch, target) for launch in launches for target in targets]
    if jobs > 1:
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            results = pool.map(_compile_nth, range(len(_work)), chunksize=4)
    else:
        results = [_compile_nth(position) for position in range(len(_work))]
    return [dict(zip(targets, results[i * len(targets) :], strict=False)) for i in range(len(launches))]


def table(
    results: dict[str, list[tuple[Launch, dict[str, Resources]]]], targets: Sequence[str], what: str
) -> str:
    """Markdown, one row for each kernel of a family: the worst of its launches.

    Args:
        what: which launches these are, in words.
    """
    import triton

    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `python -m recsparse_kernels.triton.compile --table`, triton {triton.__version__}: {what}. "
        "For each target the most registers a thread and shared memory a block that a launch of the kernel takes; "
        "in bold the launches with a fault: a spill, too much shared memory, addresses in too few bits.",
    ]
    head = ["kernel", "launches", "warps", *targets]
    for family, rows in results.items():
        lines += ["", f"## {family}", "", _row(head), _row(["---"] * len(head))]
        kernels: dict[str, list[tuple[Launch, dict[str, Resources]]]] = {}
        for launch, resources in rows:
            kernels.setdefault(launch.name, []).append((launch, resources))
        for name, found in kernels.items():
            warps = sorted({launch.options.get("num_warps", 4) for launch, _ in found})
            cells = [_worst([resources[target] for _, resources in found]) for target in targets]
            lines.append(_row([f"`{name}`", str(len(found)), ", ".join(map(str, warps)), *cells]))
    return "\n".join(lines) + "\n"


def _worst(found: list[Resources]) -> str:
    shared = max(one.shared for one in found)
    size = f"{shared / 1024:.3g} KiB" if shared else "-"
    faults: dict[str, int] = {}
    for one in found:
        if one.error:
            faults[one.error] = faults.get(one.error, 0) + 1
    bold = "".join(f", **{count}: {error}**" for error, count in faults.items())
    return f"{max(one.registers for one in found)}, {size}{bold}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recsparse_kernels.triton.compile", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--families", help="comma-separated; default: all")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="each kernel, type and constant (block sizes aside) once, not each combination",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--table", metavar="FILE", help="write the table there")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    options = parser.parse_args(arguments)
    files = family_files()
    modules = {name: module for name, module in files.items() if hasattr(module, "compile_cases")}
    wanted = options.families.split(",") if options.families else list(modules)
    targets = options.targets.split(",")
    for kind, names, known in (("family", wanted, modules), ("target", targets, TARGETS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"unknown {kind} {unknown[0]!r}; known are {', '.join(known)}")

    results, faults, every = {}, [], []
    for family in wanted:
        launches = collect(modules[family])
        every += launches
        launches = brief(launches) if options.brief else launches
        found = compile_all(launches, targets, options.jobs)
        results[family] = list(zip(launches, found, strict=True))
        for launch, resources in results[family]:
            for target, taken in resources.items():
                if taken.error:
                    where = f"{launch.name} ({launch.described()}; {launch.options}) for {target}"
                    faults.append(f"{family}: {where}, case {launch.cases[0]}: {taken.error}")
        print(f"{family}: {len(launches)} launches compiled for {', '.join(targets)}", flush=True)
    if set(wanted) == set(modules):
        faults += [f"{name} is launched by no case" for name in never_launched(files.values(), every)]
    if options.table:
        with open(options.table, "w") as file:
            some = "each kernel, type and constant (block sizes aside) once (`--brief`)"
            file.write(
                table(results, targets, some if options.brief else "every configuration of every kernel")
            )
    if options.json:
        rows = [
            {
                "family": family,
                "kernel": launch.name,
                "described": launch.described(),
                "options": launch.options,
                "cases": launch.cases,
                "resources": {target: dataclasses.asdict(taken) for target, taken in resources.items()},
            }
            for family, found in results.items()
            for launch, resources in found
        ]
        with open(options.json, "w") as file:
            json.dump({"launches": rows, "faults": faults}, file, indent=1)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    from . import COMPILING

    if COMPILING:
        sys.exit(main())
    # The package decides on import whether launchers are loaded, and Triton whether kernels are
    # interpreted: only a new process can have both as they must be here.
    environment = {**os.environ, "RECSPARSE_TRITON_COMPILE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "recsparse_kernels.triton.compile", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment).returncode)
