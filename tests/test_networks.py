"""The three networks against other formulations of their layers, SPEC's sizes and counts, and hand-computed values."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from assertions import assert_close
from formulations import average_pool, bilinear, convolution
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, tolerance
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efficientad_fast.errors import InputError
from efficientad_fast.reference.networks import (
    Autoencoder,
    Decoder,
    ModelSize,
    PatchDescriptionNetwork,
    count_parameters,
    feature_size,
    normalise_features,
    split_student,
)

SIZES: tuple[ModelSize, ...] = ("s", "m")
FEATURES = tolerance("features", torch.float64)


def random_network(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, weights and biases drawn with a fixed seed so that activations stay of size one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = drawn * math.sqrt(2 / parameter[0].numel()) if parameter.ndim == 4 else drawn * 0.1
    return network.to(dtype).eval()


def random_image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_outputs(network: nn.Module, image: Tensor) -> list[Tensor]:
    """What each convolution and pool puts out, in the order in which they run; copies, for a ReLU overwrites them."""
    outputs: list[Tensor] = []
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.AvgPool2d)]
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output.clone())) for layer in layers]
    with torch.inference_mode():
        network(image)
    for hook in hooks:
        hook.remove()
    return outputs


def pdn_by_formula(network: PatchDescriptionNetwork, image: Tensor) -> Iterator[tuple[str, Tensor]]:
    """SPEC's table of the PDN, row by row, before each ReLU."""
    weights = dict(network.named_parameters())
    p = 1 if network.padding else 0
    rows = {
        "s": [("conv1", 3 * p), ("pool", p), ("conv2", 3 * p), ("pool", p), ("conv3", p), ("conv4", 0)],
        "m": [
            *[("conv1", 3 * p), ("pool", p), ("conv2", 3 * p), ("pool", p), ("conv3", 0), ("conv4", p)],
            *[("conv5", 0), ("conv6", 0)],
        ],
    }[network.model_size]
    x = image
    for name, padding in rows:
        if name == "pool":
            x = average_pool(x, padding=padding)
            yield name, x
        else:
            x = convolution(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)
            yield name, x
            x = x.clamp(min=0)


def autoencoder_by_formula(network: Autoencoder, image: Tensor) -> Iterator[tuple[str, Tensor]]:
    """SPEC's "Autoencoder", layer by layer, before each ReLU."""
    weights = dict(network.named_parameters())
    x = image
    for layer, kernel in enumerate((4, 4, 4, 4, 4, 8), start=1):
        stride, padding = (2, 1) if kernel == 4 else (1, 0)
        name = f"encoder.enconv{layer}"
        x = convolution(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=padding)
        yield name, x
        if layer < 6:
            x = x.clamp(min=0)
    height, width = image.shape[-2:]
    to_sizes = [
        lambda side: side // 64 - 1,
        lambda side: side // 32,
        lambda side: side // 16 - 1,
        lambda side: side // 8,
        lambda side: side // 4 - 1,
        lambda side: side // 2 - 1,
        lambda side: math.ceil(side / 4) - (0 if network.decoder.padding else 8),
    ]
    for layer, to_size in enumerate(to_sizes, start=1):
        name = f"decoder.deconv{layer}"
        x = bilinear(x, (to_size(height), to_size(width)))
        padding = 2 if layer <= 6 else 1
        x = convolution(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)
        yield name, x
        x = x.clamp(min=0)
    weight, bias = weights["decoder.deconv8.weight"], weights["decoder.deconv8.bias"]
    yield "decoder.deconv8", convolution(x, weight, bias, padding=1)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("model_size", SIZES)
def test_every_pdn_layer_matches_unfold_and_matmul_in_float64(model_size: ModelSize, padding: bool) -> None:
    network = random_network(PatchDescriptionNetwork(model_size, 24, padding=padding))
    image = random_image(2, 3, 34, 41)
    outputs = layer_outputs(network, image)
    expected = list(pdn_by_formula(network, image))
    assert len(outputs) == len(expected)
    for output, (name, value) in zip(outputs, expected, strict=True):
        assert_close(output, value, FEATURES, name)
    assert_close(network(image), expected[-1][1], FEATURES, "output")


@pytest.mark.parametrize(("padding", "size"), [(False, (256, 256)), (True, (257, 321))])
def test_every_autoencoder_layer_matches_unfold_and_weight_matrices_in_float64(
    padding: bool, size: tuple[int, int]
) -> None:
    network = random_network(Autoencoder(16, padding=padding))
    image = random_image(1, 3, *size)
    outputs = layer_outputs(network, image)
    expected = list(autoencoder_by_formula(network, image))
    assert len(outputs) == len(expected)
    for output, (name, value) in zip(outputs, expected, strict=True):
        assert_close(output, value, FEATURES, name)
    assert_close(network(image), expected[-1][1], FEATURES, "output")


@pytest.mark.parametrize(
    ("dtype", "model_size"),
    [(torch.float32, "s"), (torch.float32, "m"), (torch.bfloat16, "s"), (torch.float16, "s")],
)
def test_pdn_in_lower_precision_matches_float64(dtype: torch.dtype, model_size: ModelSize) -> None:
    network = random_network(PatchDescriptionNetwork(model_size, 24, padding=True), dtype)
    image = random_image(1, 3, 36, 40, dtype=dtype)
    output = network(image)
    assert output.dtype == dtype
    assert_close(output, copy.deepcopy(network).double()(image.double()), tolerance("features", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autoencoder_in_lower_precision_matches_float64(dtype: torch.dtype) -> None:
    network = random_network(Autoencoder(8), dtype)
    image = random_image(1, 3, 256, 256, dtype=dtype)
    output = network(image)
    assert output.dtype == dtype
    assert_close(output, copy.deepcopy(network).double()(image.double()), tolerance("features", dtype))


with torch.device("meta"):
    META_PDNS = {
        (model_size, padding): PatchDescriptionNetwork(model_size, padding=padding)
        for model_size in SIZES
        for padding in (False, True)
    }
    META_AUTOENCODERS = {padding: Autoencoder(padding=padding).eval() for padding in (False, True)}


@settings(deadline=None, max_examples=40)
@given(
    model_size=st.sampled_from(SIZES),
    padding=st.booleans(),
    height=st.integers(33, 1200),
    width=st.integers(33, 1200),
)
def test_pdn_output_size_is_ceil_of_a_quarter_less_eight_without_padding(
    model_size: ModelSize, padding: bool, height: int, width: int
) -> None:
    output = META_PDNS[model_size, padding](torch.empty(2, 3, height, width, device="meta"))
    less = 0 if padding else 8
    assert output.shape == (2, 384, math.ceil(height / 4) - less, math.ceil(width / 4) - less)
    assert feature_size((height, width), padding=padding) == tuple(output.shape[-2:])


@settings(deadline=None, max_examples=12)
@given(padding=st.booleans(), height=st.integers(256, 1200), width=st.integers(256, 1200))
def test_autoencoder_output_has_the_size_of_the_pdns_for_any_admissible_image(
    padding: bool, height: int, width: int
) -> None:
    network = META_AUTOENCODERS[padding]
    image = torch.empty(1, 3, height, width, device="meta")
    assert network.encoder(image).shape == (1, 64, height // 32 - 7, width // 32 - 7)
    assert network(image).shape == META_PDNS["s", padding](image).shape


def test_a_256_image_has_56_features_a_side_without_padding_and_64_with_it() -> None:
    assert feature_size((256, 256)) == (56, 56)
    assert feature_size((256, 256), padding=True) == (64, 64)
    assert feature_size((257, 512)) == (57, 120)


def test_decoder_upsamples_to_the_sizes_of_the_specification() -> None:
    assert Decoder.step_sizes((256, 256)) == [(side, side) for side in (3, 8, 15, 32, 63, 127)]
    assert Decoder.step_sizes((300, 512)) == [(3, 7), (9, 16), (17, 31), (37, 64), (74, 127), (149, 255)]


def test_each_padded_decoder_convolution_adds_one_to_the_upsampled_size() -> None:
    outputs = layer_outputs(random_network(Autoencoder(8), torch.float32), torch.zeros(1, 3, 256, 256))
    assert [output.shape[-1] for output in outputs] == [128, 64, 32, 16, 8, 1, 4, 9, 16, 33, 64, 128, 56, 56]


@pytest.mark.parametrize(
    ("model_size", "role", "gflop", "millions"),
    [
        ("s", "teacher", "30.6", "2.69"),
        ("s", "student", "40.5", "4.27"),
        ("s", "autoencoder", "4.79", "1.10"),
        ("m", "teacher", "104.1", "8.03"),
        ("m", "student", "126.6", "11.6"),
    ],
)
def test_operations_and_parameters_are_those_of_the_specifications_table(
    model_size: ModelSize, role: str, gflop: str, millions: str
) -> None:
    with torch.device("meta"):
        network = (
            Autoencoder().eval()
            if role == "autoencoder"
            else PatchDescriptionNetwork(model_size, 768 if role == "student" else 384)
        )
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.empty(1, 3, 256, 256, device="meta"))
    assert f"{counter.get_total_flops() / 1e9:.{len(gflop.partition('.')[2])}f}" == gflop
    assert f"{count_parameters(network) / 1e6:.{len(millions.partition('.')[2])}f}" == millions


def test_layer_names_are_those_of_the_checkpoints_in_use() -> None:
    assert set(PatchDescriptionNetwork("m", 8).state_dict()) == {
        f"conv{layer}.{kind}" for layer in range(1, 7) for kind in ("weight", "bias")
    }
    layers = [f"encoder.enconv{layer}" for layer in range(1, 7)] + [f"decoder.deconv{layer}" for layer in range(1, 9)]
    assert set(Autoencoder(8).state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def averaging(network: nn.Module, biases: dict[str, float]) -> nn.Module:
    """Every convolution becomes the mean over its window and channels plus a constant."""
    for name, layer in network.double().named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            nn.init.constant_(layer.bias, biases[name])
    return network


def test_pdn_s_on_a_constant_image_by_hand() -> None:
    network = averaging(PatchDescriptionNetwork("s", 2), {"conv1": 1.0, "conv2": -1.5, "conv3": 2.0, "conv4": -10.0})
    # 0.75 + 1 = 1.75; 1.75 - 1.5 = 0.25; 0.25 + 2 = 2.25; 2.25 - 10 = -7.75, which no ReLU follows.
    expected = torch.full((1, 2, 2, 1), -7.75)
    assert_close(network(torch.full((1, 3, 40, 34), 0.75, dtype=torch.float64)), expected, FEATURES)
    # 0.25 + 1 = 1.25; 1.25 - 1.5 < 0 becomes 0; 0 + 2 = 2; 2 - 10 = -8.
    assert_close(network(torch.full((1, 3, 40, 34), 0.25, dtype=torch.float64)), expected - 0.25, FEATURES)


def test_pdn_m_on_a_constant_image_by_hand() -> None:
    biases = {"conv1": 1.0, "conv2": -1.5, "conv3": 2.0, "conv4": -1.0, "conv5": -1.0, "conv6": -3.0}
    network = averaging(PatchDescriptionNetwork("m", 2), biases)
    # 1.75; 0.25; 2.25; 1.25; 0.25; -2.75, which no ReLU follows.
    image = torch.full((1, 3, 33, 33), 0.75, dtype=torch.float64)
    assert_close(network(image), torch.full((1, 2, 1, 1), -2.75), FEATURES)
    # 1.25; 0; 2; 1; 0; -3: conv5 is followed by one.
    assert_close(network(image - 0.5), torch.full((1, 2, 1, 1), -3.0), FEATURES)
    assert_close(network(image - 0.75), torch.full((1, 2, 1, 1), -3.0), FEATURES)


def test_padded_pools_count_zeros_that_are_not_relu_of_the_bias() -> None:
    biases = {"conv1": 3.0, "conv2": 0.0, "conv3": 0.0, "conv4": 0.0}
    network = averaging(PatchDescriptionNetwork("s", 1, padding=True), biases)
    convolved, pooled = layer_outputs(network, torch.full((1, 3, 40, 40), 16.0, dtype=torch.float64))[:2]
    # The corner's window holds one of 16 pixels: 16 / 16 + 3; its pool holds it and three zeros.
    assert convolved.shape[-2:] == (43, 43)
    assert_close(convolved[0, 0, 0, 0], 4.0, FEATURES)
    assert_close(pooled[0, 0, 0, 0], 1.0, FEATURES)
    # Along the edge: pixels 1 and 2 see 2 and 3 of 16 pixels in the first row: (5 + 6) / 4.
    assert_close(pooled[0, 0, 0, 1], 2.75, FEATURES)


def test_autoencoder_with_one_tap_a_kernel_follows_one_pixel_by_hand() -> None:
    network = Autoencoder(1)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            kernel = layer.kernel_size[0]
            # Stride 2 then takes pixels 0, 2, 4, ...; the 8x8 its first; a decoder layer copies and adds a zero.
            tap = {4: 1 if "encoder" in name else 2, 8: 0, 3: 1}[kernel]
            layer.weight.data[0, 0, tap, tap] = 1.0
    network = network.double().eval()
    image = random_image(1, 3, 320, 256).abs()
    bottleneck = network.encoder(image)
    assert_close(bottleneck[0, 0], image[0, 0, 0:96:32, 0:32:32], EXACT)

    rows, columns = image[0, 0, 0:96:32, 0], torch.ones(1, dtype=torch.float64)
    for height, width in [(4, 3), (10, 8), (19, 15), (40, 32), (79, 63), (159, 127), (72, 56)]:
        rows = bilinear(rows.view(1, -1), (1, height)).view(-1)
        columns = bilinear(columns.view(1, -1), (1, width)).view(-1)
        if (height, width) != (72, 56):
            zero = torch.zeros(1, dtype=torch.float64)
            rows, columns = torch.cat([rows, zero]), torch.cat([columns, zero])
    assert_close(network(image)[0, 0], torch.outer(rows, columns), FEATURES)


@settings(deadline=None, max_examples=12)
@given(
    model_size=st.sampled_from(SIZES),
    top=st.integers(0, 5),
    left=st.integers(0, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
)
def test_pdn_without_padding_on_an_aligned_crop_is_the_crop_of_the_pdn(
    model_size: ModelSize, top: int, left: int, rows: int, columns: int
) -> None:
    network, image, whole = CROPPED[model_size]
    top, left = min(top, whole.shape[-2] - rows), min(left, whole.shape[-1] - columns)
    crop = image[..., 4 * top : 4 * (top + rows + 8), 4 * left : 4 * (left + columns + 8)]
    with torch.inference_mode():
        output = network(crop)
    assert_close(output, whole[..., top : top + rows, left : left + columns], FEATURES)


def _cropped(model_size: ModelSize) -> tuple[nn.Module, Tensor, Tensor]:
    network = random_network(PatchDescriptionNetwork(model_size, 16))
    image = random_image(1, 3, 52, 60)
    with torch.inference_mode():
        return network, image, network(image)


CROPPED = {model_size: _cropped(model_size) for model_size in SIZES}


def test_pdn_on_a_crop_that_is_not_aligned_is_something_else() -> None:
    network, image, whole = CROPPED["s"]
    with torch.inference_mode():
        shifted = network(image[..., 2:38, 0:36])
    assert shifted.shape[-2:] == (1, 1)
    nearest = min(float((shifted - whole[..., row : row + 1, :1]).abs().max()) for row in range(2))
    assert nearest > 0.1


@pytest.mark.parametrize("model_size", SIZES)
def test_inside_the_border_feature_i_without_padding_is_feature_i_plus_4_with_it(model_size: ModelSize) -> None:
    network, image, unpadded = CROPPED[model_size]
    padded_network = PatchDescriptionNetwork(model_size, 16, padding=True).double()
    padded_network.load_state_dict(network.state_dict())
    padded = padded_network(image)
    height, width = unpadded.shape[-2:]
    assert padded.shape[-2:] == (height + 8, width + 8)
    assert_close(padded[..., 4 : 4 + height, 4 : 4 + width], unpadded, FEATURES)


def test_dropout_acts_in_train_mode_alone() -> None:
    network = random_network(Autoencoder(8), torch.float32)
    image = random_image(1, 3, 256, 256, dtype=torch.float32)
    with torch.inference_mode():
        first, second = network(image), network(image)
        torch.manual_seed(0)
        trained = network.train()(image)
    assert torch.equal(first, second)
    assert float((trained - first).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("size", "smallest"), [((255, 300), (256, 300)), ((512, 64), (512, 256)), ((1, 1), (256, 256))]
)
def test_autoencoder_refuses_a_small_image_and_names_the_smallest_size(
    size: tuple[int, int], smallest: tuple[int, int]
) -> None:
    with pytest.raises(InputError) as refusal:
        Autoencoder(8)(torch.zeros(1, 3, *size))
    assert f"{size[0]}x{size[1]}" in str(refusal.value)
    assert str(smallest) in str(refusal.value)


def test_an_unknown_model_size_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'s' or 'm', got 'xl'"):
        PatchDescriptionNetwork("xl")  # type: ignore[arg-type]


def test_the_students_first_half_predicts_the_teacher_and_its_last_the_autoencoder() -> None:
    features = torch.arange(12.0).view(1, 6, 1, 2)
    first, last = split_student(features)
    assert first.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert last.flatten().tolist() == [6, 7, 8, 9, 10, 11]


def test_teacher_features_are_normalised_channel_by_channel() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[10.0, 30.0]]]])
    mean, std = torch.tensor([1.0, 20.0]).view(1, 2, 1, 1), torch.tensor([2.0, 10.0]).view(1, 2, 1, 1)
    assert normalise_features(features, mean, std).flatten().tolist() == [0.0, 0.5, -1.0, 1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_pixel_poisons_the_features_that_see_it_and_no_others(value: float) -> None:
    network, image, whole = CROPPED["s"]
    image = image.clone()
    image[0, 1, 0, 0] = value
    with torch.inference_mode():
        output = network(image)
    assert not bool(torch.isfinite(output[..., 0, 0]).any())
    assert torch.equal(output[..., 1:, 1:], whole[..., 1:, 1:])
