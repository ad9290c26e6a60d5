"""The Triton kernels in Triton's interpreter, and what is said of them without it.

The interpreter is chosen when a kernel is decorated, hence the processes of its own.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import Case, cases, cases_module

from efficientad_fast import ops
from efficientad_fast.errors import InputError
from efficientad_fast.reference.networks import feature_size

pytest.importorskip("triton", reason="Triton is not installed")

# Every case's numbers and refusals. The interpreter is slow: how an operator treats its arguments, and what opcheck
# looks at, is tried on a few cases, and the one with hundreds of taps only where there is a GPU.
EVERY_CASE = "(test_results or test_drawn_shapes or test_refusals) and not memory"
A_FEW_CASES = "pixel or empty or equal or (into and native)"
CHOSEN = f"triton and not (preprocess and smaller) and ({EVERY_CASE} or {A_FEW_CASES})"
RUNS = (["tests/test_operators.py", "-k", CHOSEN], ["tests/test_triton_kernels.py"])


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_in_the_interpreter() -> None:
    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
        )

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(run, RUNS))
    for result in results:
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed is not None and int(passed[1]) > 0, output


def test_triton_is_imported_only_where_it_is_needed() -> None:
    code = (
        "import sys; from efficientad_fast import ops; ops.load(); ops.implementations(); "
        "print([name for name in sys.modules if name.partition('.')[0] == 'triton'])"
    )
    result = python("-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    ops.load_implementation("triton")
    maps = [torch.zeros(1, 1, 4, 4) for _ in range(2)]
    with pytest.raises(InputError, match=r"^anomaly_map: map_st must be on a CUDA device, got cpu\.$"):
        torch.ops.efficientad_fast_triton.anomaly_map(*maps, [8, 8])
    with pytest.raises(InputError, match=r"^anomaly_map: map_st must be on a CUDA device, got cpu\.$"):
        torch.ops.efficientad_fast_triton.anomaly_map.drop_in(*maps)
    with pytest.raises(InputError, match=r"^preprocess: image must be on a CUDA device, got cpu\.$"):
        torch.ops.efficientad_fast_triton.preprocess(torch.zeros(1, 4, 4, 3), [8, 8])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel has no types")
def test_numbers_for_float64_arithmetic_are_passed_in_float64() -> None:
    """Triton makes them float32 where nothing says otherwise, which its interpreter does not show."""
    from efficientad_fast.triton_kernels import anomaly_map, preprocess

    kernels = {
        anomaly_map._resize_and_score: ("st", "ae", "inside", "outside"),
        preprocess._pillow: [
            f"{side}_{name}" for side in ("row", "column") for name in ("scale", "stretch", "inverse_stretch")
        ],
    }
    for kernel, names in kernels.items():
        types = {parameter.name: parameter.annotation_type for parameter in kernel.params}
        assert {types[name] for name in names} == {"fp64"}


# By kernel: a few for a mixture of dtypes and layouts, of which there are up to 16, for each shape of block or digit.
MOST_COMPILATIONS = {
    "anomaly_map": {"_resize_and_score": 18, "_normalise_and_combine": 18},
    "preprocess": {"_antialias": 24, "_pillow": 24},
    "quantile": {"_count_digits": 9, "_select_digit": 3, "_interpolate": 1, "_count": 6},
    # For four pairs of dtypes, three widths of tiles, and vectors or none.
    "hard_feature_loss": {
        "_count_digits_of_squares": 72,
        "_select_digit": 3,
        "_interpolate": 1,
        "_add_selected": 24,
        "_mean_of_parts": 1,
        "_gradient_of_squares": 24,
    },
}


class Compilations:
    """What Triton would compile for launches that were written down."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Any] = {}
        self._keys: dict[str, set[str]] = {}

    def add(self, launches: list[Any]) -> None:
        from triton.runtime.jit import create_function_from_signature

        for one in launches:
            kernel = one.kernel
            if kernel not in self._binders:
                self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
            _, specialisation, options = self._binders[kernel](**one.arguments, **one.options)
            self._keys.setdefault(kernel.__name__, set()).add(f"{specialisation} {options}")

    def counts(self) -> dict[str, int]:
        return {name: len(keys) for name, keys in self._keys.items()}


compiled_kernels = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
)


@compiled_kernels
@pytest.mark.parametrize("operator", MOST_COMPILATIONS)
def test_few_compilations_serve_all_sizes(operator: str) -> None:
    """Triton compiles a kernel again for an argument that is 1 or a multiple of 16, and the last one was not."""
    from efficientad_fast.triton_kernels import launching

    ops.load()
    overloads = importlib.import_module(f"efficientad_fast.triton_kernels.{operator}").overloads
    compilations = Compilations()

    def record(case: Case) -> None:
        args, kwargs = case.arguments()
        with launching.recorded() as launches:
            overloads[case.overload.partition(".")[2] or "default"](*args, **kwargs)
        compilations.add(launches)

    for case in cases(operator):
        record(case)
    drawn = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    drawn(given(cases_module(operator).strategy())(record))()

    counts = compilations.counts()
    most = MOST_COMPILATIONS[operator]
    assert counts.keys() == most.keys()
    assert all(count <= most[name] for name, count in counts.items()), counts


@compiled_kernels
@pytest.mark.parametrize("capability", [8.0, 9.0])
@pytest.mark.parametrize("channels, most", [(4, 3), (64, 1)], ids=["stem", "deep"])
def test_few_compilations_serve_all_sizes_of_a_convolution(channels: int, most: int, capability: float) -> None:
    """Channels and kernels are constants of the compiled code; sizes and batches are not, but for strides of the
    stem's images, which are multiples of 16 or not.
    """
    from efficientad_fast.triton_kernels import launching
    from efficientad_fast.triton_kernels.conv_pool import conv_pool_mixed

    from efficientad_fast.ops import conv_pool

    compilations = Compilations()
    weight = torch.empty(128, channels, 4, 4, dtype=torch.float16, device="meta")
    weight = weight.contiguous(memory_format=torch.channels_last)
    for images, height, width in itertools.product((1, 2, 5, 16, 32), (16, 33, 129), (16, 20, 65, 257)):
        shape = (images, channels, height, width)
        image = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        size = conv_pool.fake(image.float(), weight.float(), pool=True).shape
        out = torch.empty(size, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        with launching.recorded() as launches, launching.as_if_on(capability):
            conv_pool_mixed(image, weight, pool=True, out=out)
        compilations.add(launches)
    assert compilations.counts()["_conv_pool"] <= most, compilations.counts()


@compiled_kernels
@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_few_compilations_serve_all_images_of_the_autoencoder(capability: float) -> None:
    """Of 13 layers there are 7 kinds, each in a tile or more for small and large batches, and no more for sizes."""
    from efficientad_fast.triton_kernels import launching
    from efficientad_fast.triton_kernels.autoencoder import autoencoder_mixed

    from efficientad_fast.ops import autoencoder

    def on_meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)

    compilations = Compilations()
    read = (4, *autoencoder.CHANNELS[:-1])
    for images, height, width in itertools.product((1, 2, 5, 16, 32), (256, 291), (256, 320, 517)):
        size = feature_size((height, width))
        layers = autoencoder.layers((height, width), size)
        weights = [
            on_meta(outputs, channels, layer.kernel, layer.kernel)
            for layer, channels, outputs in zip(layers, read, autoencoder.CHANNELS, strict=True)
        ]
        numbers = autoencoder.mixed_workspace_size(images, (height, width), size)
        with launching.recorded() as launches, launching.as_if_on(capability):
            autoencoder_mixed(
                on_meta(images, 4, height, width),
                weights,
                [torch.empty(outputs, device="meta") for outputs in autoencoder.CHANNELS],
                out=on_meta(images, autoencoder.CHANNELS[-1], *size),
                workspace=torch.empty(numbers, dtype=torch.float16, device="meta"),
            )
        apart = sum(one.kernel.__name__ == "_resize" for one in launches)
        assert apart > 0 and len(launches) == autoencoder.LAYERS + apart
        compilations.add(launches)
    counts = compilations.counts()
    assert counts["_convolve"] <= 20 and counts["_resize"] == 1 and counts["_conv_pool"] <= 4, counts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    capability=st.sampled_from((8.0, 8.6, 9.0, 10.0)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    images=st.integers(1, 5),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    outputs=st.integers(1, 700),
    kernel=st.integers(1, 16),
    channels=st.sampled_from((3, 64)),
)
def test_counts_of_feature_distance_lie_where_no_call_writes_sums(
    capability: float,
    dtype: torch.dtype,
    images: int,
    size: tuple[int, int],
    outputs: int,
    kernel: int,
    channels: int,
) -> None:
    """Whatever sizes share a workspace: sums in its first half, counts in its last quarter."""
    from efficientad_fast.triton_kernels import launching
    from efficientad_fast.triton_kernels.feature_distance import feature_distance_mixed

    from efficientad_fast.ops import feature_distance

    def on_meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)

    first = on_meta(images, channels, *(side + kernel - 1 for side in size))
    numbers = feature_distance.mixed_workspace_size(images, *size, outputs)
    out, workspace = (torch.empty(shape, device="meta") for shape in ((images, 1, *size), (numbers,)))
    with launching.recorded() as launches, launching.as_if_on(capability):
        feature_distance_mixed(first, on_meta(outputs, channels, kernel, kernel), out=out, workspace=workspace)
    [launch] = launches
    if launch.arguments["PARTS"] > 1:
        counts = launch.arguments["counts_ptr"]
        assert launch.arguments["PARTS"] * out.numel() <= numbers / 2
        assert launch.programs // launch.arguments["PARTS"] <= len(counts) <= numbers / 4
        assert counts.storage_offset() + len(counts) == numbers


def test_launches_are_made_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientad_fast.triton_kernels import launching

    events: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(f"to {self.device}")

        def __exit__(self, *error: object) -> None:
            events.append("back")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: events.append((grid, arguments, options))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    launching.launch(Kernel(), 5, torch.device("cuda", 3), ["x", 1], BLOCK=2)
    assert events == ["to cuda:3", ((5,), ("x", 1), {"BLOCK": 2}), "back"]
    launching.launch(Kernel(), 0, torch.device("cuda", 3), ["x", 1], BLOCK=2)
    assert len(events) == 3, "nothing to do, and still launched"


def test_launches_can_be_written_down_instead() -> None:
    from efficientad_fast.triton_kernels import launching

    kernel = SimpleNamespace(arg_names=["x_ptr", "count", "BLOCK"])
    with launching.recorded() as launches:
        launching.launch(kernel, 5, torch.device("meta"), ["x", 7], BLOCK=2, num_warps=4)
    assert launches == [launching.Launch(kernel, {"x_ptr": "x", "count": 7, "BLOCK": 2}, {"num_warps": 4}, 5)]
    with launching.recorded() as launches:
        pass
    assert launches == []
