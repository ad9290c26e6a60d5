"""What the Triton kernels do beyond the cases of `test_operators.py`: bounds, blocks, special values, exact levels.

Runs in Triton's interpreter, which test_triton.py starts, else on a GPU.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from assertions import assert_close
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import anomaly_map as maps_contract
from efficientad_fast.ops import autoencoder as autoencoder_contract
from efficientad_fast.ops import conv_pool as conv_contract
from efficientad_fast.ops import feature_distance as distance_contract
from efficientad_fast.ops import hard_feature_loss as loss_contract
from efficientad_fast.ops import quantile as quantile_contract
from efficientad_fast.reference.preprocess import preprocess as preprocess_one

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
pytest.importorskip("triton", reason="Triton is not installed")

GENERATOR = torch.Generator().manual_seed(3)
CHANNELS_LAST = torch.channels_last
FENCE = 97.0  # stands around what a kernel may write


def kernel(name: str, overload: str = "default") -> torch._ops.OpOverload:
    ops.load_implementation("triton")
    return getattr(getattr(torch.ops.efficientad_fast_triton, name), overload)


def random_maps(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(shape, generator=GENERATOR, dtype=torch.float64).to(dtype).to(DEVICE) for _ in range(2))


def random_image(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=GENERATOR, dtype=torch.uint8).to(DEVICE)
    image = torch.rand(shape, generator=GENERATOR, dtype=dtype)
    image.view(-1)[::5] = 0.5  # between two levels
    return image.to(DEVICE)


def random_features(*shape: int) -> Tensor:
    """Channels-last, float16, in [-1, 1)."""
    features = 2 * torch.rand(shape, generator=GENERATOR) - 1
    return features.half().contiguous(memory_format=CHANNELS_LAST).to(DEVICE)


def fenced(tensor: Tensor, fence: float, by: int = 4096) -> tuple[Tensor, Tensor]:
    """The tensor with its strides in the middle of memory full of ``fence``, and that memory."""
    memory = torch.full((tensor.numel() + 2 * by,), fence, dtype=tensor.dtype, device=tensor.device)
    inside = memory.as_strided(tensor.shape, tensor.stride(), by)
    inside.copy_(tensor)
    return inside, memory


def assert_fence_stands(memory: Tensor, fence: float, by: int = 4096) -> None:
    assert bool((memory[:by] == fence).all()) and bool((memory[-by:] == fence).all()), "written out of bounds"


@pytest.mark.parametrize(
    "shape, size, border",
    [((5, 4), (9, 300), 0), ((5, 4), (300, 9), 2), ((40, 3), (41, 130), 1), ((3, 200), (2, 7), 0), ((6, 6), (6, 6), 0)],
)
def test_anomaly_map_over_many_tiles(shape: tuple[int, int], size: tuple[int, int], border: int) -> None:
    """Several tiles a side, more outputs between two rows than a tile has, and fewer rows out than in."""
    quantiles = [0.2, 0.7, 0.1, 0.9]
    map_st, map_ae = (fenced(one, math.nan)[0] for one in random_maps(3, 1, *shape))
    memories = []
    outputs = []
    for one in (torch.empty(3, 1, *size), torch.empty(3)):
        inside, memory = fenced(one.to(DEVICE), FENCE)
        outputs.append(inside)
        memories.append(memory)
    kernel("anomaly_map", "out")(map_st, map_ae, quantiles, border=border, anomaly_map=outputs[0], score=outputs[1])
    expected = maps_contract.reference(map_st.double(), map_ae.double(), size, quantiles, border=border)
    for actual, trusted in zip(outputs, expected, strict=True):
        assert_close(actual, trusted, tolerance("anomaly_map", torch.float32))
    assert_close(outputs[1], outputs[0].amax((1, 2, 3)), EXACT, "score, which is the map's maximum")
    for memory in memories:
        assert_fence_stands(memory, FENCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_either_sign(dtype: torch.dtype) -> None:
    """The programs' maxima are compared as bits, which a sign turns round."""
    values = torch.tensor([-3.0, -0.0, 0.0, 2.0, -1e30, math.nan, -math.nan], dtype=dtype)
    map_st = torch.full((len(values), 1, 12, 5), -2e30, dtype=dtype)  # rows for several programs
    for place in (0, 6, 11):
        map_st[:, 0, place, 3] = values
        _, score = kernel("anomaly_map")(map_st.to(DEVICE), map_st.to(DEVICE), [12, 5])
        assert_close(score, values, EXACT)


def test_every_place_of_a_nan_reaches_the_score() -> None:
    height, width = 9, 4
    map_st = torch.rand((height * width, 1, height, width), generator=GENERATOR)
    map_st.view(height * width, -1).fill_diagonal_(math.nan)
    map_ae = torch.zeros_like(map_st)
    anomaly_map, score = kernel("anomaly_map")(map_st.to(DEVICE), map_ae.to(DEVICE), [20, 8])
    assert bool(torch.isnan(score).all())
    assert not bool(torch.isnan(anomaly_map).flatten(1).all(1).any())


@pytest.mark.parametrize("convention", maps_contract.CONVENTIONS)
def test_float64_coefficients_are_not_rounded_to_float32(convention: str) -> None:
    map_st, map_ae = random_maps(1, 1, 4, 4, dtype=torch.float64)
    quantiles = [0.1, 1 / 3, 0.3, 0.7]
    actual = kernel("anomaly_map")(map_st, map_ae, [9, 9], quantiles, border=1, convention=convention)
    expected = maps_contract.reference(map_st, map_ae, [9, 9], quantiles, border=1, convention=convention)
    for one, trusted in zip(actual, expected, strict=True):
        assert_close(one, trusted, tolerance("anomaly_map", torch.float64))


def test_drop_in_quantiles_near_each_other() -> None:
    """Their difference would be nothing in float32."""
    map_st, map_ae = random_maps(1, 1, 5, 3)
    pair = torch.tensor([0.3, 0.3 + 1e-10], dtype=torch.float64, device=DEVICE)
    actual = kernel("anomaly_map", "drop_in")(map_st, map_ae, pair, pair)
    expected = maps_contract.reference_drop_in(map_st, map_ae, pair, pair)
    for one, trusted in zip(actual, expected, strict=True):
        assert_close(one, trusted, tolerance("anomaly_map", torch.float32))


def test_drop_in_over_several_blocks_with_strided_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    map_st, map_ae = random_maps(3, 1, 23, 31)  # 2139 elements
    quantiles = torch.tensor([0.2, 9.0, 0.7, 9.0, 0.1, 9.0, 0.8], device=DEVICE)
    pairs = (quantiles[0:4:2], quantiles[4::2])
    from efficientad_fast.triton_kernels import anomaly_map

    results, memories = zip(*(fenced(torch.empty_like(map_st), FENCE) for _ in range(3)), strict=True)
    monkeypatch.setattr(maps_contract, "fake_drop_in", lambda *given: results)  # what it allocates
    expected = maps_contract.reference_drop_in(map_st.double(), map_ae.double(), *pairs)
    anomaly_map.anomaly_map_drop_in(map_st, map_ae, *pairs)
    for one, trusted in zip(results, expected, strict=True):
        assert_close(one, trusted, tolerance("anomaly_map", torch.float32))
    for memory in memories:
        assert_fence_stands(memory, FENCE)


# More taps than a block has on one side or both; fewer outputs than a block, and more.
SIZES = [((61, 47), (5, 4)), ((40, 9), (3, 11)), ((3, 33), (7, 2)), ((5, 5), (2, 300)), ((16, 64), (4, 16))]


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
@pytest.mark.parametrize("given, size", SIZES)
def test_pillow_is_exact(given: tuple[int, int], size: tuple[int, int], source: torch.dtype) -> None:
    """Not only the levels: the normalised result has the bits of the reference's float32."""
    image = random_image(1, *given, 3, dtype=source)
    actual = kernel("preprocess")(image, list(size), resize="pillow")
    expected = [preprocess_one(one, size, resize="pillow") for one in image.movedim(3, 1)]
    assert_close(actual, torch.stack(expected), EXACT)


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
@pytest.mark.parametrize("given, size, channels_last", [(*SIZES[0], True), (*SIZES[1], False), (*SIZES[3], True)])
def test_preprocess_stays_within_its_memory(
    given: tuple[int, int], size: tuple[int, int], channels_last: bool, resize: str
) -> None:
    image, _ = fenced(random_image(2, *given, 3, dtype=torch.float32), math.nan)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out, memory = fenced(torch.empty((2, 3, *size), device=DEVICE).contiguous(memory_format=layout), FENCE)
    kernel("preprocess", "out")(image, resize=resize, out=out)
    expected = [preprocess_one(one.double(), size, resize=resize, dtype=torch.float64) for one in image.movedim(3, 1)]
    assert_close(out, torch.stack(expected), tolerance("preprocess", torch.float32))
    assert_fence_stands(memory, FENCE)


def test_quantile_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """More numbers than all programs read at a time, and fewer fractions than are taken at a time."""
    from efficientad_fast.triton_kernels import quantile as module

    monkeypatch.setattr(module, "MOST_PROGRAMS", 2)
    values, _ = fenced(torch.randn(5 * module.BLOCK + 3, generator=GENERATOR).to(DEVICE), math.nan)
    fractions = [0.0, 0.1, 0.5, 0.9, 1.0]
    out, memory = fenced(torch.empty(len(fractions), device=DEVICE), FENCE)
    workspace, room = fenced(torch.empty(quantile_contract.WORKSPACE, dtype=torch.int64, device=DEVICE), FENCE)
    kernel("quantile", "out")(values, fractions, out=out, workspace=workspace)
    assert_close(out, quantile_contract.reference(values, fractions), EXACT)
    for fence in (memory, room):
        assert_fence_stands(fence, FENCE)


@pytest.mark.parametrize("shape", [(1, 130, 9, 11), (1, 3, 41, 43), (3, 2, 73, 59)], ids=["wide", "narrow", "plain"])
def test_hard_feature_loss_in_several_rounds(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, whichever of the three widths tiles have; what is around the features is NaN."""
    monkeypatch.setattr(loss_contract, "MOST_PARTS", 2)
    images, channels, *size = shape
    layout = torch.contiguous_format if images > 1 else CHANNELS_LAST
    teacher = fenced(random_features(*shape).float().contiguous(memory_format=layout), math.nan)[0]
    both = random_features(images, 2 * channels, *size).float().contiguous(memory_format=layout)
    both[:, channels:] = math.nan
    student = both[:, :channels]
    results, memories = zip(
        *(
            fenced(torch.zeros((), dtype=one, device=DEVICE), FENCE)
            for one in (torch.float32, torch.float32, torch.int64)
        ),
        strict=True,
    )
    workspace, room = fenced(torch.empty(loss_contract.WORKSPACE, dtype=torch.int64, device=DEVICE), FENCE)
    names = ("loss", "threshold", "count")
    kernel("hard_feature_loss", "out")(
        teacher, student, 0.9, workspace=workspace, **dict(zip(names, results, strict=True))
    )
    expected = loss_contract.reference(teacher, student, 0.9)
    for actual, trusted, allowed in zip(
        results, expected, (tolerance("loss", torch.float32), EXACT, EXACT), strict=True
    ):
        assert_close(actual, trusted, allowed)
    gradient, memory = fenced(torch.empty(shape, device=DEVICE).contiguous(memory_format=layout), FENCE)
    expected_gradient = loss_contract.reference_gradient(teacher, student, *expected[1:], expected[0])
    monkeypatch.setattr(loss_contract, "fake_gradient", lambda *given: gradient)  # what it allocates
    kernel("hard_feature_loss", "gradient")(teacher, student, *expected[1:], expected[0])
    assert_close(gradient, expected_gradient, tolerance("hard_feature_loss", torch.float32))
    for fence in (*memories, room, memory):
        assert_fence_stands(fence, FENCE)


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_a_workspace_serves_maps_of_all_sizes(capability: float) -> None:
    """Counts are zeros again, and no sums of another call are taken for counts."""
    from efficientad_fast.triton_kernels import launching

    sizes = [(9, 10, 150), (3, 17, 384), (16, 1, 70), (9, 10, 33)]
    least = max(distance_contract.mixed_workspace_size(2, *size) for size in sizes)
    workspace = torch.zeros(least + 5, device=DEVICE)
    for height, width, outputs in [*sizes, *sizes]:
        first = random_features(2, 32, height + 3, width + 3)
        weight = random_features(outputs, 32, 4, 4)
        out, memory = fenced(torch.empty(2, 1, height, width, device=DEVICE), FENCE)
        with launching.as_if_on(capability):
            kernel("feature_distance", "mixed")(first, weight, out=out, workspace=workspace)
        expected = distance_contract.compute(first.double(), weight.double())
        assert_close(out, expected, tolerance("feature_distance, mixed", torch.float32))
        assert_fence_stands(memory, FENCE)
        assert not bool(workspace[-2 * height * width :].any()), "counts are left over"


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_a_workspace_serves_maps_in_the_smallest_tiles(capability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a user's table may hold: sums of the first call would fill all but a number of the workspace, and the
    second, whose every pixel is a tile, would count up from some of them.
    """
    from efficientad_fast.triton_kernels import launching, tiles

    smallest = {"rows": 1, "columns": 16, "outputs": 16, "depth": 32, "warps": 4, "stages": 2}
    monkeypatch.setattr(tiles, "choose", lambda kernel, facts: dict(smallest))
    sizes = [(1, 1, 160), (3, 1, 17), (3, 1, 40), (1, 1, 160)]
    workspace = torch.zeros(max(distance_contract.mixed_workspace_size(1, *size) for size in sizes), device=DEVICE)
    for height, width, outputs in sizes:
        # Padding keeps tiles from standing over rows.
        first, weight = random_features(1, 32, height, width), random_features(outputs, 32, 3, 3)
        out = torch.full((1, 1, height, width), math.nan, device=DEVICE)
        with launching.as_if_on(capability):
            kernel("feature_distance", "mixed")(first, weight, padding_first=1, out=out, workspace=workspace)
        expected = distance_contract.compute(first.double(), weight.double(), padding_first=1)
        assert_close(out, expected, tolerance("feature_distance, mixed", torch.float32))


@pytest.mark.parametrize("capability", [8.0, 9.0])
@pytest.mark.parametrize("options", [{}, {"pool": True}, {"pool": True, "padding": 2, "pool_padding": 1}])
def test_conv_pool_writes_its_outputs_alone(options: dict[str, Any], capability: float) -> None:
    """Tiles reach over the last row, column and output; what is around the image is NaN."""
    from efficientad_fast.triton_kernels import launching

    features = random_features(2, 32, 11, 13)
    padded = torch.nn.functional.pad(features, (1, 1, 1, 1), value=math.nan).contiguous(memory_format=CHANNELS_LAST)
    weight = random_features(40, 32, 3, 3)
    expected = conv_contract.compute(features.double(), weight.double(), **options)
    out, memory = fenced(torch.empty(expected.shape).half().contiguous(memory_format=CHANNELS_LAST).to(DEVICE), FENCE)
    with launching.as_if_on(capability):
        kernel("conv_pool", "mixed")(padded[:, :, 1:-1, 1:-1], weight, out=out, **options)
    assert_close(out, expected, tolerance("conv_pool, mixed", torch.float16))
    assert_fence_stands(memory, FENCE)


@pytest.mark.parametrize(
    "tile", [rule["tile"] for rule in ops.tiles()["autoencoder"]], ids=lambda tile: "-".join(map(str, tile.values()))
)
def test_every_tile_that_ships_makes_layers_of_the_autoencoder(tile: dict[str, int]) -> None:
    """Tiles reach over the last pixel, output and product, and from one image into the next."""
    from efficientad_fast.triton_kernels import autoencoder as module
    from efficientad_fast.triton_kernels import tiles

    single = tile["pixels"] == 1
    encoded, decoded, outputs = ((5, 3), (3, 2), 5) if single else ((13, 11), (11, 6), 40)
    encoding = autoencoder_contract.Layer(4, 2, 1, False, True, encoded)
    # Larger in one direction and smaller in the other.
    size = (2, 3) if single else (5, 8)
    decoding = autoencoder_contract.Layer(3, 1, 1, True, False, decoded)
    for layer, given, channels in ((encoding, encoded, 32), (decoding, size, 64), (decoding, size, 24)):
        read, _ = fenced(random_features(3, channels, *given), math.nan)
        weight = random_features(outputs, channels, layer.kernel, layer.kernel) / channels
        bias = torch.rand(outputs, generator=GENERATOR).to(DEVICE)
        out, memory = fenced(random_features(3, outputs, *layer.out_size), FENCE)
        stated = module.facts(layer, read, weight)
        with (
            tiles.forced("autoencoder", stated, tile),
            tiles.forced("autoencoder.resize", stated, {"apart": 0}),
        ):
            module._launch(layer, read, weight, bias, out, out.new_empty(0))
        resized = read.double()
        if layer.resized:
            resized = torch.nn.functional.interpolate(resized, layer.size, mode="bilinear").half().double()
        options = {"stride": layer.stride, "padding": layer.padding}
        expected = torch.nn.functional.conv2d(resized, weight.double(), bias.double(), **options)
        expected = expected.relu() if layer.relu else expected
        assert_close(out, expected, tolerance("conv_pool, mixed", torch.float16))
        assert_fence_stands(memory, FENCE)


def test_autoencoder_of_all_channels_in_a_workspace_of_just_the_size() -> None:
    image_size, size = (256, 256), (56, 56)
    image = random_features(1, 4, *image_size)
    read = (4, *autoencoder_contract.CHANNELS[:-1])
    weights, biases = [], []
    layers = autoencoder_contract.layers(image_size, size)
    for layer, channels, outputs in zip(layers, read, autoencoder_contract.CHANNELS, strict=True):
        # With which outputs are about as large as inputs.
        weights.append(random_features(outputs, channels, layer.kernel, layer.kernel))
        weights[-1] *= math.sqrt(6 / (channels * layer.kernel**2))
        biases.append(0.1 * torch.rand(outputs, generator=GENERATOR).to(DEVICE))
    numbers = autoencoder_contract.mixed_workspace_size(1, image_size, size)
    workspace, room = fenced(torch.full((numbers,), math.nan, dtype=torch.float16, device=DEVICE), FENCE)
    out, memory = fenced(random_features(1, 64, *size), FENCE)
    kernel("autoencoder", "mixed")(image, weights, biases, out=out, workspace=workspace)
    exact, exact_biases = ([one.double() for one in given] for given in (weights, biases))
    expected = autoencoder_contract.compute_mixed(image.double(), exact, exact_biases, size, torch.float16)
    assert_close(out, expected, tolerance("autoencoder, mixed", torch.float16))
    for fence in (room, memory):
        assert_fence_stands(fence, FENCE)
