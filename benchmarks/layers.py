"""``python -m benchmarks.layers``: where the time of a prediction on the CPU goes, layer by layer.

For each step of the plan: its median time, the GFLOP of the convolutions done directly and those of the products that
are done in their place, how many a second, and what share that is of the rate at which PyTorch multiplies in float32
here: the faster of a matrix product and a convolution, measured in the same run. Transforms, pooling and resizing
count as time and not as GFLOP, so that a share below 1 is what they cost, and what is lost.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.peers.__main__ import image_size, positive
from benchmarks.peers.networks import preprocessed_images, random_detector
from benchmarks.peers.report import machine, write
from efficientad_fast.errors import BackendError
from efficientad_fast.ops import packing
from efficientad_fast.ops.autoencoder import CHANNELS, layers
from efficientad_fast.plan import OperatorPlan, Step, build_plan
from efficientad_fast.reference.networks import ModelSize

MATRIX = 2048
LEAST_SECONDS = 0.5
"""That each layer is measured for."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two) of one convolution or several.

    Attributes:
        direct: as the networks are written.
        done: in the products that the algorithm leaves.
    """

    direct: float
    done: float

    def __add__(self, other: Work) -> Work:
        return Work(self.direct + other.direct, self.done + other.done)


@dataclass(frozen=True)
class Row:
    """A layer's figures; seconds, operations, operations a second."""

    layer: str
    algorithm: str
    seconds: float
    direct: float
    done: float
    rate: float
    share: float


def convolution(planes: int, kernels: dict[int, int], outputs: int, height: int, width: int) -> Work:
    """Of an image.

    Args:
        kernels: input channels by the side of the kernel that reads them.
        outputs: channels.
        height, width: of the result, before pooling.
    """
    direct = 2.0 * height * width * outputs * sum(kernel**2 * channels for kernel, channels in kernels.items())
    if planes == 1:
        return Work(direct, direct)
    largest = max(kernels)
    tile = math.isqrt(planes) - largest + 1
    tiles = math.ceil(height / tile) * math.ceil(width / tile)
    return Work(direct, 2.0 * tiles * planes * outputs * sum(kernels.values()))


def work_of(step: Step) -> Work:
    """Of a batch."""
    images, _, height, width = step.out.shape
    settings, planes = step.settings, step.weights[0].shape[2]
    if step.layer == "autoencoder":
        found = layers(step.inputs[0].shape[2:], (height, width))
        read, total = step.inputs[0].shape[1], Work(0, 0)
        for layer, packed, outputs in zip(found, step.weights, CHANNELS, strict=True):
            total += convolution(packed.shape[2], {layer.kernel: read}, outputs, *layer.out_size)
            read = outputs
        return Work(images * total.direct, images * total.done)
    if "channels" in settings:
        names = ("kernel_first", "kernel_second")
        kernels: dict[int, int] = {}
        for name, tensor in zip(names, step.inputs, strict=True):
            kernels[settings[name]] = kernels.get(settings[name], 0) + tensor.shape[1]
        work = convolution(planes, kernels, settings["channels"], height, width)
    else:
        if settings["pool"]:
            height, width = 2 * (height - settings["pool_padding"]), 2 * (width - settings["pool_padding"])
        channels = step.inputs[0].shape[1] // settings["groups"]
        work = convolution(planes, {settings["kernel_size"]: channels}, step.out.shape[1], height, width)
    return Work(images * work.direct, images * work.done)


def algorithm_of(step: Step) -> str:
    if step.layer == "autoencoder":
        return "several"
    kernel = max(value for name, value in step.settings.items() if name.startswith("kernel"))
    by_planes = {planes: name for name, planes in packing.planes_by_algorithm(kernel).items()}
    return by_planes[step.weights[0].shape[2]]


def median_seconds(run: Callable[[], object]) -> float:
    times: list[float] = []
    run()
    while sum(times) < LEAST_SECONDS or len(times) < 5:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matrix_rate() -> float:
    """The higher of two: libraries differ in which of them they do well on a processor."""
    a, b, product = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX), torch.empty(MATRIX, MATRIX)
    of_matrices = 2 * MATRIX**3 / median_seconds(lambda: torch.mm(a, b, out=product))
    channels, side = 256, 128
    images = torch.rand(1, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    operations = convolution(1, {3: channels}, channels, side, side).done
    return max(of_matrices, operations / median_seconds(lambda: F.conv2d(images, weight, padding=1)))


def measure(plan: OperatorPlan, batch: torch.Tensor, rate: float) -> list[Row]:
    rows = []
    with plan.steps(batch) as steps:
        for step in steps:
            seconds, work = median_seconds(step.run), work_of(step)
            done = work.done / seconds
            rows.append(Row(step.layer, algorithm_of(step), seconds, work.direct, work.done, done, done / rate))
    return rows


def table(rows: list[Row], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("layer")
    made.add_column("algorithm")
    for heading in ("ms", "GFLOP direct", "GFLOP done", "GFLOP/s", "share of rate"):
        made.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{1e3 * row.seconds:.2f}", f"{row.direct / 1e9:.2f}", f"{row.done / 1e9:.2f}")
        made.add_row(row.layer, row.algorithm, *figures, f"{row.rate / 1e9:.0f}", f"{row.share:.2f}")
    return made


def with_total(rows: list[Row], whole: float, rate: float) -> list[Row]:
    """And the prediction as a whole, measured by itself."""
    direct, done = sum(row.direct for row in rows), sum(row.done for row in rows)
    return [*rows, Row("all", "", whole, direct, done, done / whole, done / whole / rate)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--size", choices=["s", "m"], default="s", help="of the model (default: s)")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--image-size", type=image_size, default=(256, 256), metavar="HxW")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)

    detector = random_detector(cast("ModelSize", chosen.size), seed=0)
    try:
        plan = build_plan(
            detector.plan_input(chosen.image_size), torch.device("cpu"), torch.float32, backend="operators"
        )
    except BackendError as error:
        parser.exit(2, f"error: {error}\n")
    assert isinstance(plan, OperatorPlan)
    batch = preprocessed_images(detector, chosen.image_size, chosen.batch, seed=0)
    rate = matrix_rate()
    rows = with_total(measure(plan, batch, rate), median_seconds(lambda: plan.raw_maps(batch)), rate)
    height, width = chosen.image_size
    title = f"{chosen.size.upper()}, batch {chosen.batch}, {height} x {width}, {chosen.threads} threads"
    console, about, memory = Console(highlight=False, width=120), machine(), plan.memory(batch)
    console.print(table(rows, title))
    console.print(
        f"PyTorch multiplies at {rate / 1e9:.0f} GFLOP/s; packed weights {memory['packed'] / 1e6:.0f} MB, "
        f"workspace and activations {memory['workspace'] / 1e6:.0f} MB"
    )
    console.print(f"{about['cpu']}, {about['cores']} cores; torch {torch.__version__}; {about['date']}", soft_wrap=True)
    if chosen.out is not None:
        write(
            chosen.out,
            {"machine": about, "title": title, "pytorch_rate": rate, "memory": memory}
            | {"layers": [asdict(row) for row in rows]},
        )


if __name__ == "__main__":
    main()
