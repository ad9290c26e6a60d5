"""What the steps of a plan need at least: operations, bytes, launches, and the tiles that these come in."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.datasheets import Gpu
from efficientad_fast import ops
from efficientad_fast.ops import autoencoder
from efficientad_fast.plan import MixedPlan, PlanInput, Step
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import FEATURE_CHANNELS, Autoencoder, ModelSize, PatchDescriptionNetwork

META = torch.device("meta")

CUDA_LAUNCHES = {"anomaly_map": 2}
"""Of operators in CUDA C++ that launch more than one kernel: scores are reset, then maps resized."""

NOT_COUNTED = ("workspace",)
"""Arguments whose bytes are not among those that a step must move."""


def meta_steps(
    model_size: ModelSize, dtype: torch.dtype, batch: int, size: tuple[int, int] = (256, 256), *, images: bool = False
) -> list[Step]:
    """The steps of a plan in mixed precision, of tensors without memory.

    Args:
        size: height and width of the images.
        images: from uint8 images on: with their preprocessing, as the graph of `MixedPlan.run_images` has it.
    """
    with META:
        networks = (
            PatchDescriptionNetwork(model_size, FEATURE_CHANNELS),
            PatchDescriptionNetwork(model_size, 2 * FEATURE_CHANNELS),
            Autoencoder(FEATURE_CHANNELS),
        )
        statistics = torch.empty(1, FEATURE_CHANNELS, 1, 1), torch.empty(1, FEATURE_CHANNELS, 1, 1)
    source = PlanInput(*networks, *statistics, Quantiles(0.0, 1.0, 0.0, 1.0), "resized", True, size)
    plan = MixedPlan(source, META, dtype)
    rgb = torch.empty(batch, 3, *size, device=META)
    with plan.steps(rgb) as steps:
        if not images:
            return list(steps)
        image, options = steps[0].inputs[0], Preprocessing(size)
        pixels = torch.empty(batch, *size, 3, dtype=torch.uint8, device=META)
        normalising = {"resize": options.resize, "mean": options.mean, "std": options.std}
        # Into the three first of the four channels that the networks read.
        rgb = image[:, :3]
        preprocess = functools.partial(torch.ops.efficientad_fast.preprocess.out, pixels, **normalising, out=rgb)
        before = [Step("preprocess", (pixels,), [], {}, rgb, preprocess)]
        return [*before, *steps]


@dataclass(frozen=True)
class Call:
    """An operator's overload, and what it is called with.

    Attributes:
        name: such as ``conv_pool.mixed``.
        arguments: by name, those left out with their defaults.
    """

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, step: Step) -> Call:
        """What a step runs, which must be a ``functools.partial`` of an operator.

        Raises:
            TypeError: it is something else.
        """
        run = step.run
        if not isinstance(run, functools.partial) or not isinstance(run.func, torch._ops.OpOverload):
            raise TypeError(f"step {step.layer} must be a partial of an operator of the catalogue, got {run!r}")
        schema = run.func._schema
        given = dict(zip((one.name for one in schema.arguments), run.args, strict=False)) | run.keywords
        arguments = {one.name: given.get(one.name, one.default_value) for one in schema.arguments}
        name = schema.name.partition("::")[2]
        return cls(f"{name}.{schema.overload_name}" if schema.overload_name else name, arguments)

    @property
    def operator(self) -> str:
        return self.name.partition(".")[0]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, (list, tuple)):
                for one in value:
                    if isinstance(one, Tensor):
                        yield name, one

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor: of a convolution's products."""
        return next(value.dtype for _, value in self.tensors())


@dataclass(frozen=True)
class Launch:
    """A kernel's programs.

    Attributes:
        operations: of one program's products, with all that the tile computes for nothing.
    """

    kernel: str
    programs: int
    operations: float

    def rounds(self, multiprocessors: int) -> int:
        """Programs that one multiprocessor has to run one after the other, where it has the most."""
        return -(-self.programs // multiprocessors)


@dataclass(frozen=True)
class Work:
    """Of one step, for a batch.

    Attributes:
        dtype: of the products.
        operations: of its products as the formula has them; a multiplication and an addition are two.
        bytes: of all that it reads and writes, once each.
        launches: as this GPU's kernels make them.
        side: whether it may run beside those before it.
    """

    layer: str
    operator: str
    dtype: torch.dtype
    operations: float
    bytes: float
    launches: Sequence[Launch]
    side: bool = False

    def arithmetic_seconds(self, gpu: Gpu) -> float:
        return self.operations / gpu.rate(self.dtype) if self.operations else 0.0

    def memory_seconds(self, gpu: Gpu) -> float:
        return self.bytes / gpu.bandwidth

    def floor(self, gpu: Gpu) -> float:
        """Seconds below which it cannot be done: the longer of arithmetic and memory."""
        return max(self.arithmetic_seconds(gpu), self.memory_seconds(gpu))

    def tiled_seconds(self, gpu: Gpu) -> float:
        """Of its arithmetic, where a multiprocessor has as its share whole tiles."""
        if not self.operations:
            return 0.0
        share = gpu.rate(self.dtype) / gpu.multiprocessors
        return sum(one.rounds(gpu.multiprocessors) * one.operations / share for one in self.launches)

    def floor_with_tiles(self, gpu: Gpu) -> float:
        return max(self.floor(gpu), self.tiled_seconds(gpu))


def work_of(step: Step, gpu: Gpu, *, side: bool = False) -> Work:
    """Of a step that was made of meta tensors."""
    call = Call.of(step)
    operations = operations_of(call)
    return Work(
        step.layer, call.operator, call.dtype, operations, bytes_of(call), launches_of(call, gpu, operations), side
    )


def operations_of(call: Call) -> float:
    """Of its products; resizing, normalising and what follows a product are not counted."""
    given = call.arguments
    if call.operator == "conv_pool":
        weight, out = given["weight"], given["out"]
        height, width = out.shape[2:]
        if given["pool"]:
            # Zeros that are pooled are not computed; at most a row and a column of them lie at the end.
            height, width = (2 * (side - given["pool_padding"]) for side in (height, width))
        return 2.0 * out.shape[0] * height * width * weight.numel()
    if call.operator == "feature_distance":
        outputs = sum(given[name].numel() for name in ("weight_first", "weight_second") if given[name] is not None)
        return 2.0 * given["out"].numel() * outputs
    if call.operator == "autoencoder":
        return sum(one.operations for one in _autoencoder_layers(call))
    return 0.0


def bytes_of(call: Call) -> float:
    """Inputs, weights and results, once each; of the autoencoder also what its layers hand to the next, in and out."""
    found = float(sum(one.numel() * one.element_size() for name, one in call.tensors() if name not in NOT_COUNTED))
    if call.operator == "autoencoder":
        found += sum(2.0 * one.out_bytes for one in _autoencoder_layers(call)[:-1])
    return found


@dataclass(frozen=True)
class _Layer:
    operations: float
    out_bytes: float


def _autoencoder_layers(call: Call) -> list[_Layer]:
    image, out, weights = call.arguments["image"], call.arguments["out"], call.arguments["weights"]
    found = []
    for layer, weight in zip(autoencoder.layers(image.shape[2:], out.shape[2:]), weights, strict=True):
        height, width = layer.out_size
        pixels = float(image.shape[0] * height * width)
        found.append(_Layer(2.0 * pixels * weight.numel(), pixels * weight.shape[0] * weight.element_size()))
    return found


def launches_of(call: Call, gpu: Gpu, operations: float) -> list[Launch]:
    """The kernels that the first implementation of the table of choices launches for it on such a GPU.

    Those in CUDA C++ and of PyTorch count without products, for they write down no launches.
    """
    if call.operator not in ops.choices():
        return [Launch(call.operator, 1, 0.0)]
    case = ops.case_of(call.name, **call.arguments)
    for implementation in ops.best_first(call.operator, f"{gpu.capability:.1f}", case):
        if implementation == "cuda":
            return [Launch(call.operator, 1, 0.0)] * CUDA_LAUNCHES.get(call.operator, 1)
        if implementation == "triton":
            return _triton_launches(call, gpu, operations)
    raise LookupError(f"{call.name} has no GPU kernel in the table of choices")


def _triton_launches(call: Call, gpu: Gpu, operations: float) -> list[Launch]:
    from efficientad_fast.triton_kernels import launching

    module = importlib.import_module(f"efficientad_fast.triton_kernels.{call.operator}")
    function = module.overloads[call.name.partition(".")[2] or "default"]
    with launching.recorded() as launches, launching.as_if_on(gpu.capability):
        function(**call.arguments)
    programs = sum(one.programs for one in launches)
    found = []
    for one in launches:
        of_program = _operations_of_program(one.arguments)
        if of_program is None:
            # As many as if nothing were computed for nothing.
            of_program = operations / max(programs, 1)
        found.append(Launch(one.kernel.__name__.lstrip("_"), one.programs, of_program))
    return found


def _operations_of_program(constants: Mapping[str, Any]) -> float | None:
    """Of a convolution's tile, of which a launch's constants say all; 0 of resizing; None of what is not known here."""
    from efficientad_fast.triton_kernels import implicit_gemm

    if "PIXELS" in constants and "OUTPUTS" not in constants:
        return 0.0
    if "PIXELS" in constants:
        depth = _round_up(constants["KERNEL"] ** 2 * constants["CHANNELS"], constants["DEPTH"])
        return 2.0 * constants["PIXELS"] * constants["OUTPUTS"] * depth
    depth = 0
    for prefix in ("", "FIRST_", "SECOND_"):
        if f"{prefix}LOADS" not in constants or (prefix == "SECOND_" and constants["second"] is None):
            continue
        channels, kernel, block = (constants[prefix + name] for name in ("CHANNELS", "KERNEL", "DEPTH"))
        flat = constants[f"{prefix}LOADS"] == implicit_gemm.FLAT
        depth += _round_up(kernel**2 * channels, block) if flat else kernel**2 * _round_up(channels, block)
    if not depth:
        return None
    return 2.0 * constants["ROWS"] * constants["COLUMNS"] * constants["OUTPUTS"] * depth


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
