"""``python -m benchmarks.roofline``: how fast predictions could be on seven GPUs, on paper.

Every step of the plan in mixed precision has so many operations and bytes. Over the GPU's rates that is the time below
which it cannot be done; all of them together are the floor of a prediction. Products come in tiles, and a
multiprocessor computes whole ones, which is the floor with tiles. To that a prediction adds what launches cost. Nothing
here was measured but the rates of the H200; docs/performance.md says what is assumed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import datasheets
from benchmarks.gpu.datasheets import GIGA, MEBIBYTE, TERA, Gpu
from benchmarks.gpu.work import Work, meta_steps, work_of
from efficientad_fast.files import atomic_path
from efficientad_fast.plan.graphs import BESIDE, JOINED
from efficientad_fast.reference.networks import ModelSize

LAUNCH_SECONDS = 2e-6
"""Assumed, between the end of a kernel and the first products of the next one in the same chain of a CUDA graph."""

LATENCY_BATCH, THROUGHPUT_BATCH = 1, 32

DTYPES = {"float16": torch.float16, "float8": torch.float8_e4m3fn}

PAPER = {"s": (2.2e-3, 614), "m": (4.5e-3, 269)}
"""Seconds of one image, and images a second, on an RTX A6000: EfficientAD's paper, table 1."""

BEGIN = "<!-- made by `python -m benchmarks.roofline --into docs/performance.md`; do not edit -->"
END = "<!-- until here -->"


@dataclass(frozen=True)
class Prediction:
    """Of one batch.

    Attributes:
        works: of its steps.
    """

    gpu: Gpu
    model_size: ModelSize
    dtype: str
    batch: int
    works: Sequence[Work]

    @property
    def launches(self) -> int:
        return sum(len(one.launches) for one in self.works)

    @property
    def floor(self) -> float:
        """Seconds below which it cannot be done, if steps follow each other and nothing stays in the cache."""
        return sum(one.floor(self.gpu) for one in self.works)

    @property
    def floor_with_tiles(self) -> float:
        return sum(one.floor_with_tiles(self.gpu) for one in self.works)

    @property
    def seconds(self) -> float:
        """What is predicted: floors with tiles and launches, the autoencoder beside what does not wait for it.

        Both share the multiprocessors, so that no overlap is shorter than the operations of both.
        """
        side = [one for one in self.works if one.side]
        begin = next((index for index, one in enumerate(self.works) if one.layer in JOINED), len(self.works))
        before = [one for one in self.works[:begin] if not one.side]
        after = [one for one in self.works[begin:] if not one.side]
        shared = sum(one.floor(self.gpu) for one in (*before, *side))
        return max(self._chain(before), self._chain(side), shared) + self._chain(after)

    def _chain(self, works: Sequence[Work]) -> float:
        return sum(one.floor_with_tiles(self.gpu) + LAUNCH_SECONDS * len(one.launches) for one in works)


@contextlib.contextmanager
def shipped_tiles() -> Iterator[None]:
    """Without the table of whoever runs this."""
    from efficientad_fast.triton_kernels import tiles

    given = os.environ.get(tiles.TABLE_VARIABLE)
    os.environ[tiles.TABLE_VARIABLE] = ""
    tiles.rules.cache_clear()
    try:
        yield
    finally:
        if given is None:
            del os.environ[tiles.TABLE_VARIABLE]
        else:
            os.environ[tiles.TABLE_VARIABLE] = given
        tiles.rules.cache_clear()


def predictions(gpus: Sequence[Gpu], sizes: Sequence[ModelSize] = get_args(ModelSize)) -> list[Prediction]:
    """By size, GPU and dtype that it has products of: latency's batch, then throughput's."""
    found = []
    with shipped_tiles():
        for size in sizes:
            for name, dtype in DTYPES.items():
                able = [gpu for gpu in gpus if name != "float8" or gpu.float8 is not None]
                for batch in (LATENCY_BATCH, THROUGHPUT_BATCH):
                    steps = meta_steps(size, dtype, batch, images=True) if able else []
                    for gpu in able:
                        works = [work_of(step, gpu, side=step.layer in BESIDE) for step in steps]
                        found.append(Prediction(gpu, size, name, batch, works))
    order = {gpu.name: index for index, gpu in enumerate(gpus)}
    return sorted(
        found,
        key=lambda one: (sizes.index(one.model_size), order[one.gpu.name], list(DTYPES).index(one.dtype), one.batch),
    )


@dataclass(frozen=True)
class Sheet:
    """A table, for a terminal or a document."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # columns that are aligned as such, before those of figures

    def markdown(self) -> str:
        align = ["---"] * self.words + ["---:"] * (len(self.heads) - self.words)
        lines = [" | ".join(row) for row in (self.heads, align, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in lines)])

    def table(self) -> Table:
        made = Table(title=self.title, title_justify="left")
        for index, head in enumerate(self.heads):
            made.add_column(head, justify="left" if index < self.words else "right")
        for row in self.rows:
            made.add_row(*row)
        return made


def sheets(found: Sequence[Prediction]) -> list[Sheet]:
    """All tables."""
    made = [rates()]
    for size in dict.fromkeys(one.model_size for one in found):
        of_size = [one for one in found if one.model_size == size]
        made += [summary(of_size), steps_of(of_size)]
    return made


def rates() -> Sheet:
    rows = []
    for sheet, used in zip(datasheets.GPUS, datasheets.used(), strict=True):

        def both(attribute: str, unit: float, digits: int, sheet: Gpu = sheet, used: Gpu = used) -> str:
            stated, taken = getattr(sheet, attribute), getattr(used, attribute)
            if stated is None:
                return "none"
            shown = f"{stated / unit:.{digits}f}"
            return shown if stated == taken else f"{shown}, used {taken / unit:.{digits}f}"

        rows.append(
            [
                sheet.name,
                sheet.source,
                both("float16", TERA, 0),
                both("float8", TERA, 0),
                both("bandwidth", TERA, 2),
                str(sheet.multiprocessors),
                str(sheet.l2 // MEBIBYTE),
            ]
        )
    heads = ["", "source", "float16, TFLOP/s", "float8, TFLOP/s", "memory, TB/s", "multiprocessors", "L2, MB"]
    return Sheet("GPUs: dense products with sums in float32", heads, rows, words=2)


def summary(found: Sequence[Prediction]) -> Sheet:
    size = found[0].model_size
    paper_seconds, paper_rate = PAPER[size]
    rows = [["paper, RTX A6000", "", "", "", f"{1e3 * paper_seconds:.1f}", "", "", f"{paper_rate:.0f}"]]
    for one, many in zip(found[::2], found[1::2], strict=True):
        rows.append(
            [
                one.gpu.name,
                one.dtype,
                f"{1e3 * one.floor:.3f}",
                f"{1e3 * one.floor_with_tiles:.3f}",
                f"{1e3 * one.seconds:.3f}",
                f"{many.batch / many.floor:.0f}",
                f"{many.batch / many.floor_with_tiles:.0f}",
                f"{many.batch / many.seconds:.0f}",
            ]
        )
    heads = ["GPU", "dtype", "floor, ms", "with tiles, ms", "predicted, ms"]
    heads += ["floor, images/s", "with tiles, images/s", "predicted, images/s"]
    title = f"EfficientAD-{size.upper()}, 256 x 256: latency at batch {LATENCY_BATCH}, throughput at {THROUGHPUT_BATCH}"
    return Sheet(title, heads, rows, words=2)


def steps_of(found: Sequence[Prediction]) -> Sheet:
    """Where it goes, on the first GPU."""
    gpu = found[0].gpu
    columns = [one for one in found if one.gpu == gpu]
    first = columns[0]
    rows = []
    for index, work in enumerate(first.works):
        row = [work.layer, f"{work.operations / GIGA:.2f}", f"{work.bytes / 1e6:.1f}", str(len(work.launches))]
        for column in columns:
            there = column.works[index]
            row.append(f"{1e6 * there.floor(gpu):.1f} / {1e6 * there.floor_with_tiles(gpu):.1f}")
        rows.append(row)
    total = ["all", f"{sum(one.operations for one in first.works) / GIGA:.2f}"]
    total += [f"{sum(one.bytes for one in first.works) / 1e6:.1f}", str(first.launches)]
    total += [f"{1e6 * one.floor:.1f} / {1e6 * one.floor_with_tiles:.1f}" for one in columns]
    heads = ["step", "GFLOP", "MB", "launches", *(f"{one.dtype}, batch {one.batch}: us" for one in columns)]
    title = (
        f"EfficientAD-{first.model_size.upper()}, step by step: work of one image in {first.dtype}; floor / with tiles "
        f"on {gpu.name}"
    )
    return Sheet(title, heads, [*rows, total])


def as_json(found: Sequence[Prediction]) -> dict[str, Any]:
    """Everything, for a file. Seconds, operations, bytes."""
    return {
        "format": "efficientad_fast roofline 1",
        "launch_seconds": LAUNCH_SECONDS,
        "datasheets": [dataclasses.asdict(one) for one in datasheets.GPUS],
        "used": [dataclasses.asdict(one) for one in datasheets.used()],
        "paper": {size: {"seconds": one[0], "images_per_second": one[1]} for size, one in PAPER.items()},
        "predictions": [
            {
                "gpu": one.gpu.name,
                "model_size": one.model_size,
                "dtype": one.dtype,
                "batch": one.batch,
                "launches": one.launches,
                "floor": one.floor,
                "floor_with_tiles": one.floor_with_tiles,
                "predicted": one.seconds,
                "steps": [
                    {
                        "layer": work.layer,
                        "operator": work.operator,
                        "dtype": str(work.dtype).removeprefix("torch."),
                        "operations": work.operations,
                        "bytes": work.bytes,
                        "arithmetic": work.arithmetic_seconds(one.gpu),
                        "memory": work.memory_seconds(one.gpu),
                        "floor": work.floor(one.gpu),
                        "floor_with_tiles": work.floor_with_tiles(one.gpu),
                        "launches": [dataclasses.asdict(launch) for launch in work.launches],
                    }
                    for work in one.works
                ],
            }
            for one in found
        ],
    }


def document(found: Sequence[Prediction]) -> str:
    return "\n\n".join(one.markdown() for one in sheets(found)) + "\n"


def replaced(text: str, tables: str) -> str:
    """A document with these tables between its marks.

    Raises:
        ValueError: it does not have them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must have a line {BEGIN!r}, and {END!r} after it")
    return f"{before}{begin}\n\n{tables}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="put them between the marks of that document")
    chosen = parser.parse_args(arguments)
    found = predictions(datasheets.used())
    if chosen.markdown:
        sys.stdout.write(document(found))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for sheet in sheets(found):
            console.print(sheet.table())
    for path, content in (
        (chosen.json, lambda: json.dumps(as_json(found), indent=2, allow_nan=False) + "\n"),
        (chosen.into, lambda: replaced(chosen.into.read_text(encoding="utf-8"), document(found))),
    ):
        if path is not None:
            text = content()
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
