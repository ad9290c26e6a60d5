"""``python -m benchmarks.kernel_report``: what the compilers made of every CUDA C++ and Triton kernel, without a GPU.

For each kernel and architecture: registers, spills, shared memory, theoretical occupancy, and counts of the SASS
instructions that matter. Faults, with which ``--check`` exits 1, are spills, local memory, too much shared memory, and
heavy convolutions without the instructions of their architecture's tensor cores.

Triton's kernels are compiled as the representative calls of their modules launch them, in float16 where there is a
choice; with ``--all`` as EfficientAD-S and -M launch them at 256 x 256, in batches of 1 and 32 and all dtypes, for all
architectures that the compilers know. Launches that lead to the same kernel are compiled once.

Dynamic shared memory is known at a launch only. Triton says how much it will ask for; of a CUDA C++ kernel the most is
stated in its file or header, as ``constexpr int k...SharedBytes = 46 * 1024;``, to which its launch must keep. What is
named ``k...OptinSharedBytes`` a launch takes only where a block may have as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.reports import compiling, listings
from benchmarks.reports.architectures import ARCHITECTURES, capability
from benchmarks.reports.compiling import CudaCompiler, Kernel, TritonCompiler, Unavailable

DEFAULT_ARCHITECTURES = ("sm_80", "sm_90")
ALL_ARCHITECTURES = tuple(f"sm_{number}" for number in ARCHITECTURES)

# Of a log, which has no edge; narrower, numbers of the summary would be cut off.
WIDTH_OF_FILES = 240

TITLES = {"cuda": "CUDA C++", "triton": "Triton"}


@dataclasses.dataclass(frozen=True)
class Failure:
    """What was not compiled.

    Attributes:
        name: as in `Kernel`; of CUDA C++ a file's.
        kind, architecture: likewise.
        reason: what the compiler said.
    """

    name: str
    kind: str
    architecture: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a compiler; the attributes are those of a `Failure`, and what does it."""

    name: str
    kind: str
    architecture: str
    compile: Callable[[], list[Kernel]]

    def __call__(self) -> list[Kernel] | Failure:
        try:
            return self.compile()
        except Exception as error:  # compilers' own classes, of Triton's many; nothing here is to stop the others
            return Failure(self.name, self.kind, self.architecture, _reason(error))


def _reason(error: Exception) -> str:
    """The line of a compiler's error that says what is wrong: nvcc's and ptxas' are marked, Triton's is the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line) and not line.startswith("PTXAS error")]
    return [*marked[:1], *lines[-1:], type(error).__name__][0]


# One kernel, an architecture a column


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
    if kernel.operations_a_byte is not None:
        found["tensor operations a byte loaded, as listed"] = f"{kernel.operations_a_byte:.0f}"
    if kernel.tensor_memory:
        found["tensor memory columns"] = str(kernel.tensor_memory)
    for name, count in kernel.counts.items():
        if name.endswith(" bits"):
            continue
        wide = kernel.counts.get(f"{name} of 128 bits", 0)
        share = f" ({wide / count:.0%} of 128 bits)" if name in listings.WIDE else ""
        found["instructions" if name == "all" else name] = f"{count}{share}"
    return found


def table(names: Sequence[str], kernels: Sequence[Kernel]) -> Table:
    """One kernel, an architecture a column, under all its names."""
    title = Text(f"{'; '.join(names)} ({kernels[0].kind})")
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("")
    for kernel in kernels:
        result.add_column(kernel.architecture, justify="right")
    columns = [rows(kernel) for kernel in kernels]
    # Every label, where the first column that has it puts it.
    labels = list(dict.fromkeys(label for column in columns for label in column if label != "instructions"))
    for label in [*labels, "instructions"]:
        result.add_row(label, *(column.get(label, "0") for column in columns))
    return result


def by_names(kernels: Iterable[Kernel]) -> list[tuple[list[str], list[Kernel]]]:
    """Kernels of all architectures, with the names for which they are the same on each."""
    columns: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in (kernel.name, *kernel.alike):
            columns.setdefault(name, []).append(kernel)
    found: dict[tuple[int, ...], tuple[list[str], list[Kernel]]] = {}
    for name, column in columns.items():
        found.setdefault(tuple(map(id, column)), ([], column))[0].append(name)
    return list(found.values())


# Many kernels, a function in one dtype for one architecture a line


def span(numbers: Iterable[float], digits: str = ".0f") -> str:
    """The least and the largest, or the one that they are."""
    numbers = list(numbers)
    least, most = f"{min(numbers):{digits}}", f"{max(numbers):{digits}}"
    return least if least == most else f"{least}-{most}"


def spans(kernels: Sequence[Kernel], names: Iterable[str]) -> str:
    """How many of these instructions there are, of those that occur."""
    found = [(name, [kernel.counts.get(name, 0) for kernel in kernels]) for name in names]
    return ", ".join(f"{name} {span(counts)}" for name, counts in found if any(counts))


def summary(kernels: Iterable[Kernel]) -> Table:
    """A line for each function, dtype and architecture: from the least to the largest of all its kernels."""
    lines: dict[tuple[str, str, int], list[Kernel]] = {}
    for kernel in kernels:
        line = (kernel.function or kernel.name, kernel.made_for, capability(kernel.architecture))
        lines.setdefault(line, []).append(kernel)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for label in ("kernel", "made for", "architecture"):
        result.add_column(label, no_wrap=True)
    for label in ("kernels", "registers", "spill bytes", "shared KiB", "occupancy %"):
        result.add_column(label, justify="right")
    for label in ("tensor cores", "copies"):
        result.add_column(label)
    for function, made_for, number in sorted(lines):
        group = lines[function, made_for, number]
        result.add_row(
            Text(function),
            Text(made_for),
            f"sm_{number}",
            str(len(group)),
            span(one.resources.registers for one in group),
            span(one.resources.spill_stores + one.resources.spill_loads for one in group),
            span(one.shared / 1024 for one in group),
            span(one.occupancy * 100 for one in group),
            spans(group, listings.PRODUCTS),
            spans(group, listings.COPIES),
        )
    return result


# All of them


def jobs(
    cuda: CudaCompiler | None, triton: TritonCompiler | None, architectures: Sequence[str], *, models: bool
) -> list[Job]:
    """Everything there is to compile, the same but once.

    Args:
        models: launches as the models have them, not the representative ones.
    """
    found = []
    if cuda is not None:
        found = [
            Job(source.name, "cuda", architecture, partial(cuda.compile, source, architecture))
            for source in compiling.cuda_sources()
            for architecture in architectures
        ]
    if triton is not None:
        launches = triton.of_models if models else triton.representative
        asked = [
            one
            for module in compiling.triton_modules()
            for architecture in architectures
            for one in launches(module, architecture)
        ]
        found += [
            Job(one.name, "triton", one.architecture, partial(_one, triton, one)) for one in compiling.distinct(asked)
        ]
    return found


def _one(triton: TritonCompiler, asked: compiling.Compilation) -> list[Kernel]:
    return [triton.compiled(asked)]


def compile_all(waiting: Sequence[Job]) -> tuple[list[Kernel], list[Failure]]:
    """All kernels, in order; nvcc runs beside Triton, so that two processes are busy."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
        console=console,
        transient=True,
        # Triton's log of ptxas is caught from there.
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    kernels: list[Kernel] = []
    failures: list[Failure] = []
    with bar, ThreadPoolExecutor(max_workers=1) as pool:
        task = bar.add_task("compiling", total=len(waiting), name="")

        def done(job: Job) -> list[Kernel] | Failure:
            bar.update(task, name=f"{job.name} {job.architecture}")
            result = job()
            bar.advance(task)
            return result

        beside = [pool.submit(done, job) for job in waiting if job.kind == "cuda"]
        here = [done(job) for job in waiting if job.kind != "cuda"]
        for result in [*(future.result() for future in beside), *here]:
            if isinstance(result, Failure):
                failures.append(result)
            else:
                kernels += result
    return kernels, failures


def left_out(failures: Sequence[Failure], kernels: Sequence[Kernel], required: Iterable[str]) -> dict[str, Failure]:
    """By kind and architecture, why a compiler makes nothing for one that need not be."""
    compiled = {(kernel.kind, kernel.architecture) for kernel in kernels}
    return {
        f"{TITLES[one.kind]} kernels for {one.architecture}": one
        for one in reversed(failures)
        if (one.kind, one.architecture) not in compiled and one.architecture not in required
    }


def as_json(kernels: Sequence[Kernel], versions: Mapping[str, str], failures: Sequence[Failure] = ()) -> dict[str, Any]:
    """Everything that was found, for a file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": dict(versions),
        "kernels": [
            dataclasses.asdict(kernel) | {"occupancy": kernel.occupancy, "faults": kernel.faults()}
            for kernel in kernels
        ],
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }


def sentences(kernel: Kernel) -> list[str]:
    """Its faults, with its name."""
    others = f" and {len(kernel.alike)} alike" if kernel.alike else ""
    return [f"{kernel.name}{others}, {kernel.architecture}: {fault}" for fault in kernel.faults()]


def architecture(name: str) -> str:
    try:
        capability(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. Returns the exit status: 1 where nothing can be compiled, or ``--check`` found a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 1 for spills, local memory, too much shared memory, heavy convolutions past the tensor cores",
    )
    parser.add_argument("--all", action="store_true", help="every launch of the models, all dtypes and architectures")
    parser.add_argument("--arch", action="append", type=architecture, help="such as sm_90; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    options = parser.parse_args(arguments)
    architectures = options.arch or list(ALL_ARCHITECTURES if options.all else DEFAULT_ARCHITECTURES)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_FILES)

    compilers: dict[str, Any] = {}
    for kind, compiler in (("cuda", CudaCompiler), ("triton", TritonCompiler)):
        try:
            compilers[kind] = compiler()
        except Unavailable as reason:
            console.print(f"{TITLES[kind]} kernels are left out: {reason}.", markup=False, soft_wrap=True)
    if not compilers:
        console.print("There is nothing to report.")
        return 1

    waiting = jobs(compilers.get("cuda"), compilers.get("triton"), architectures, models=options.all)
    kernels, failures = compile_all(waiting)
    if options.all:
        console.print(summary(kernels))
    else:
        for names, columns in by_names(kernels):
            console.print(table(names, columns))
    missing = left_out(failures, kernels, options.arch or DEFAULT_ARCHITECTURES)
    for what, failure in missing.items():
        console.print(f"{what} are left out: {failure.reason}", markup=False, soft_wrap=True)
    unmade = {(one.kind, one.architecture) for one in missing.values()}
    faults = [
        f"{one.name}, {one.architecture}: is not compiled: {one.reason}"
        for one in failures
        if (one.kind, one.architecture) not in unmade
    ]
    faults += [sentence for kernel in kernels for sentence in sentences(kernel)]
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
        text = json.dumps(as_json(kernels, versions, failures), indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
