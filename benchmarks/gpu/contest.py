"""Rows of a comparison: each in a process of its own, with a limit of time, and none measured twice.

A row is a contestant with a model size and a dtype, for some batches. Its process is given a `Task` in a file, and what
it found comes back in another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.peers.networks import Reference, preprocessed_images, random_detector
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.detector import Detector, Precision
from efficientad_fast.files import atomic_path
from efficientad_fast.plan import MixedPlan
from efficientad_fast.reference.networks import ModelSize

ROOT = Path(__file__).resolve().parents[2]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}

LARGEST_ERROR = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.5e-2, "float8": 0.3}
"""Of raw maps: norm of the difference to float64 over norm, of the worst image. In float8 more means broken kernels."""

CHECKED_IMAGES, CALIBRATION_IMAGES = 2, 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a row's process is given.

    Attributes:
        detector: file.
        images: ``.npy``, uint8 ``(N, H, W, 3)``, repeated for larger batches.
        reference: ``.npz`` with ``map_st``, ``map_ae``, ``anomaly_map`` and ``scores`` of them in float64.
        results: JSON that the process writes.
        batches: in the order in which they are measured.
        seconds: of each measurement; with 0 results are checked and nothing is timed.
        steps: batches at which the plan's steps are timed one by one.
        limit: seconds after which no further batch is begun.
    """

    contestant: str
    model_size: str
    dtype: str
    detector: str
    images: str
    reference: str
    results: str
    batches: tuple[int, ...]
    seconds: float
    steps: tuple[int, ...] = ()
    limit: float = float("inf")

    @property
    def key(self) -> dict[str, Any]:
        return {"contestant": self.contestant, "model_size": self.model_size, "dtype": self.dtype}

    @property
    def title(self) -> str:
        return f"{self.contestant}, EfficientAD-{self.model_size.upper()}, {self.dtype}"


@dataclass(frozen=True)
class Entrants:
    """Detectors of random weights with images and references, in files of a folder.

    Attributes:
        files: paths by model size and what is in them.
    """

    files: Mapping[str, Mapping[str, str]]

    @classmethod
    def written(cls, folder: Path, sizes: Sequence[str], *, seed: int = 0) -> Entrants:
        files = {}
        for size in sizes:
            detector = random_detector(cast("ModelSize", size), seed)
            side = detector.size[0]
            images = np.stack([synthetic_image(index, seed=seed + 2, size=side) for index in range(CHECKED_IMAGES)])
            batch = detector.preprocessing.batch([torch.from_numpy(one).permute(2, 0, 1) for one in images])
            right = Reference.of(detector, batch)
            made = right.plan.anomaly_map(right.map_st, right.map_ae, detector.quantiles, detector.size)
            paths = {name: str(folder / f"{size}.{name}") for name in ("safetensors", "npy", "npz")}
            calibrated_for_float8(detector, seed).save(paths["safetensors"])
            np.save(paths["npy"], images)
            maps = {"map_st": right.map_st, "map_ae": right.map_ae, "anomaly_map": made[0], "scores": made[1]}
            np.savez(paths["npz"], **{name: one.numpy() for name, one in maps.items()})
            files[size] = paths
        return cls(files)

    def task(self, contestant: str, model_size: str, dtype: str, folder: Path, **settings: Any) -> Task:
        paths = self.files[model_size]
        name = f"{contestant}-{model_size}-{dtype}.json"
        return Task(
            contestant,
            model_size,
            dtype,
            paths["safetensors"],
            paths["npy"],
            paths["npz"],
            str(folder / name),
            **settings,
        )


def calibrated_for_float8(detector: Detector, seed: int) -> Detector:
    """With activations of generated images; quantiles and threshold stay, so that results can be compared."""
    batch = preprocessed_images(detector, detector.size, CALIBRATION_IMAGES, seed + 1)
    plan = MixedPlan(detector.plan_input(detector.size), torch.device("cpu"), torch.float16)
    largest: dict[str, torch.Tensor] = {}
    for image in batch.split(1):
        for layer, found in plan.observe(image).items():
            largest[layer] = torch.maximum(found, largest.get(layer, found))
    return detector.replaced(precisions={"float8": Precision(detector.quantiles, detector.threshold, largest)})


def run_task(task: Task, limit: float) -> Row:
    """What its process found; where it ended or took longer, with a ``reason``."""
    row: Row = dict(task.key)
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(dataclasses.asdict(task), file)
    try:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", file.name]
        code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=limit, check=False).returncode
        reason = None if code == 0 else f"its process ended with status {code}"
    except subprocess.TimeoutExpired:
        reason = f"it was stopped after {limit:.0f} s, when its time was up"
    finally:
        Path(file.name).unlink()
    results = Path(task.results)
    if results.is_file():
        row |= json.loads(results.read_text(encoding="utf-8"))
    if reason is not None and "reason" not in row:
        row["reason"] = reason
    return row


def compete(
    tasks: Sequence[Task],
    kept: Path | None,
    *,
    about: Mapping[str, Any] | None = None,
    end: float = float("inf"),
    run: Callable[[Task, float], Row] = run_task,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Rows in the order of the tasks.

    Args:
        kept: file of finished rows, to which every new one is added; those that are there are not measured again.
        about: what the rows hold for, such as GPU and versions; rows that were kept for anything else are forgotten.
        end: on `time.monotonic`'s clock; no task is begun after it. What is left until then is shared among the tasks.
        run: gives a task's row, in so many seconds.
        tell: is given a line for each task.
    """
    known = read_kept(kept, about)
    rows = []
    for index, task in enumerate(tasks):
        wanted = json.loads(json.dumps(task.key | {"batches": task.batches}))
        found = next((row for row in known if wanted.items() <= row.items() and "reason" not in row), None)
        left = end - time.monotonic()
        if found is not None:
            tell(f"{task.title}: kept from before")
        elif left <= 0:
            found = wanted | {"reason": "not begun, as the time was up"}
            tell(f"{task.title}: {found['reason']}")
        else:
            tell(f"{task.title}: measuring")
            # Its share of what is left: better fewer batches of all tasks than none of the last.
            share = min(task.limit, left / (len(tasks) - index))
            found = run(dataclasses.replace(task, limit=share), min(left, LONGEST)) | {"batches": wanted["batches"]}
            if "reason" in found:
                tell(f"{task.title}: {found['reason']}")
            known = [row for row in known if not wanted.items() <= row.items()] + [found]
            if kept is not None:
                with atomic_path(kept) as temporary:
                    temporary.write_text(json.dumps({"about": about, "rows": known}, indent=1) + "\n", encoding="utf-8")
        rows.append(found)
    return rows


LONGEST = 3600.0
"""Seconds that a row's process may take where there is no other limit."""


def read_kept(kept: Path | None, about: Mapping[str, Any] | None = None) -> list[Row]:
    """Those for ``about``."""
    if kept is None or not kept.is_file():
        return []
    content = json.loads(kept.read_text(encoding="utf-8"))
    rows: list[Row] = content["rows"] if content["about"] == about else []
    return rows


def source_digest() -> str:
    """Of the package's and the kernels' source, by which results are told apart from those of before a change."""
    digest = hashlib.sha256()
    for folder in ("efficientad_fast", "triton_kernels", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".inc", ".h", ".cpp", ".cu") and path.name != "build_info.json":
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def counts(row: Row) -> bool:
    """Whether its figures were measured on right results."""
    return "reason" not in row
