"""``python -m benchmarks.kernel_report``: what the compilers made of every CUDA C++ and Triton kernel, without a GPU.

For each kernel and architecture: registers, spills, shared memory, theoretical occupancy, and counts of the SASS
instructions that matter. Spills, local memory and too much shared memory are faults, with which ``--check`` exits 1.

Dynamic shared memory is known at a launch only. Triton says how much it will ask for; of a CUDA C++ kernel the most is
stated in its file or header, as ``constexpr int k...SharedBytes = 46 * 1024;``, to which its launch must keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.reports import compiling
from benchmarks.reports.architectures import capability
from benchmarks.reports.compiling import CudaCompiler, Kernel, TritonCompiler, Unavailable

DEFAULT_ARCHITECTURES = ("sm_80", "sm_90")


def rows(kernel: Kernel) -> dict[str, str]:
    """What the table says of a kernel for one architecture, by label."""
    used = kernel.resources
    threads = str(kernel.threads) if kernel.threads else f"{compiling.ASSUMED_THREADS}?"
    dynamic = "?" if kernel.dynamic_shared is None else str(kernel.dynamic_shared)
    found = {
        "threads of a block": threads,
        "registers": str(used.registers),
        "spill bytes, stores / loads": f"{used.spill_stores} / {used.spill_loads}",
        "stack bytes": str(used.stack),
        "shared bytes, static + dynamic": f"{used.shared} + {dynamic}",
        "theoretical occupancy": f"{kernel.occupancy:.0%}",
    }
    for name, count in kernel.counts.items():
        if name.endswith("of 128 bits"):
            continue
        wide = kernel.counts.get(f"{name} of 128 bits", 0)
        share = f" ({wide / count:.0%} of 128 bits)" if name in ("LDG", "STG") else ""
        found["instructions" if name == "all" else name] = f"{count}{share}"
    return found


def table(name: str, kernels: Sequence[Kernel]) -> Table:
    """One kernel, an architecture a column."""
    result = Table(title=Text(f"{name} ({kernels[0].kind})"), title_justify="left", title_style="bold")
    result.add_column("")
    for kernel in kernels:
        result.add_column(kernel.architecture, justify="right")
    columns = [rows(kernel) for kernel in kernels]
    # Every label, where the first column that has it puts it.
    labels = list(dict.fromkeys(label for column in columns for label in column if label != "instructions"))
    for label in [*labels, "instructions"]:
        result.add_row(label, *(column.get(label, "0") for column in columns))
    return result


def compile_all(cuda: CudaCompiler | None, triton: TritonCompiler | None, architectures: Sequence[str]) -> list[Kernel]:
    """All kernels, by file and architecture; nvcc runs beside Triton, so that two processes are busy."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = []
        if cuda is not None:
            sources = compiling.cuda_sources()
            waiting = [pool.submit(cuda.compile, source, name) for source in sources for name in architectures]
        found = []
        if triton is not None:
            for module in compiling.triton_modules():
                for name in architectures:
                    found += triton.compile(module, name)
        return [kernel for future in waiting for kernel in future.result()] + found


def as_json(kernels: Sequence[Kernel], versions: dict[str, str]) -> dict[str, Any]:
    """Everything that was found, for a file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "kernels": [
            dataclasses.asdict(kernel) | {"occupancy": kernel.occupancy, "faults": kernel.faults()}
            for kernel in kernels
        ],
    }


def architecture(name: str) -> str:
    try:
        capability(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. Returns the exit status: 1 where nothing can be compiled, or ``--check`` found a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 for spills, local memory, too much shared memory")
    parser.add_argument("--arch", action="append", type=architecture, help="such as sm_90; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    options = parser.parse_args(arguments)
    architectures = options.arch or list(DEFAULT_ARCHITECTURES)
    console = Console(highlight=False)

    compilers: dict[str, Any] = {}
    for kind, title, compiler in (("cuda", "CUDA C++", CudaCompiler), ("triton", "Triton", TritonCompiler)):
        try:
            compilers[kind] = compiler()
        except Unavailable as reason:
            console.print(f"{title} kernels are left out: {reason}.", markup=False, soft_wrap=True)
    if not compilers:
        console.print("There is nothing to report.")
        return 1

    kernels = compile_all(compilers.get("cuda"), compilers.get("triton"), architectures)
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        console.print(table(name, [kernel for kernel in kernels if kernel.name == name]))
    faults = [f"{one.name}, {one.architecture}: {fault}" for one in kernels for fault in one.faults()]
    for fault in faults:
        console.print(fault, markup=False, soft_wrap=True)
    versions = {compiler.NAME: compiler.version() for compiler in compilers.values()}
    by = " and ".join(f"{name} {version}" for name, version in versions.items())
    console.print(
        f"{len(kernels)} kernels, counted by architecture, compiled by {by}: {len(faults) or 'no'} "
        f"fault{'' if len(faults) == 1 else 's'}.",
        markup=False,
        soft_wrap=True,
    )
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(kernels, versions), indent=2) + "\n", encoding="utf-8")
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
