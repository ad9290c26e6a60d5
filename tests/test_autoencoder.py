"""What the operator ``autoencoder`` is in the network, and the room that it needs."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close
from convolution_cases import channels_last, signed, workspace, written
from tolerances import tolerance
from torch import Tensor, nn

from efficientad_fast import ops
from efficientad_fast.ops import autoencoder, conv_pool
from efficientad_fast.reference.networks import Autoencoder, feature_size


def parameters(network: Autoencoder) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of all convolutions but the last, in order."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][:-1]
    return [one.weight.detach() for one in convolutions], [one.bias.detach() for one in convolutions]


@pytest.mark.parametrize(("image_size", "padding"), [((256, 256), False), ((271, 300), True)])
def test_it_is_the_network_but_for_the_last_convolution(image_size: tuple[int, int], padding: bool) -> None:
    torch.manual_seed(0)
    network = Autoencoder(7, padding=padding).eval()
    weights, biases = parameters(network)
    assert tuple(len(one) for one in biases) == autoencoder.CHANNELS
    image = signed((1, 3, *image_size), 0)
    size = feature_size(image_size, padding=padding)
    ops.load()
    hidden = torch.ops.efficientad_fast.autoencoder(channels_last(image), weights, biases, list(size))

    numbers = autoencoder.mixed_workspace_size(1, image_size, size)
    mixed, narrow_room = written(tuple(hidden.shape)), torch.full((numbers,), math.nan)
    torch.ops.efficientad_fast.autoencoder.mixed(image, weights, biases, out=mixed, workspace=narrow_room)

    packed = [
        torch.ops.efficientad_fast.conv_pool.pack(weight, algorithm="direct" if index < 6 else "auto")
        for index, weight in enumerate(weights)
    ]
    out, room = written(tuple(hidden.shape)), workspace(2, autoencoder.workspace_size(image_size, size))
    torch.ops.efficientad_fast.autoencoder.out(image, packed, biases, out=out, workspace=room)

    last = network.double().decoder.deconv8
    expected = network(image.double())
    for result in (hidden, out, mixed):
        assert_close(last(result.double()), expected, tolerance("autoencoder", torch.float32))


def test_a_fourth_channel_of_zeros_changes_nothing() -> None:
    weights, biases = parameters(Autoencoder(7).eval())
    image, size = signed((2, 3, 256, 259), 0).half(), (9, 7)
    room = torch.empty(autoencoder.mixed_workspace_size(2, (256, 259), size), dtype=torch.float16)
    three, four = (written((2, autoencoder.CHANNELS[-1], *size), torch.float16) for _ in range(2))
    weights = [one.half() for one in weights]
    ops.load()
    torch.ops.efficientad_fast.autoencoder.mixed(image, weights, biases, out=three, workspace=room)
    image, weights[0] = (nn.functional.pad(one, (0, 0, 0, 0, 0, 1)) for one in (image, weights[0]))
    torch.ops.efficientad_fast.autoencoder.mixed(image, weights, biases, out=four, workspace=room)
    assert_close(four, three, tolerance("autoencoder, mixed", torch.float16))


@pytest.mark.parametrize(
    ("images", "image_size", "size", "parts"),
    [
        # What enconv1 and deconv6 write, which is the most in turn, and what deconv6 reads.
        (1, (256, 256), (56, 56), (128 * 128 * 32, 128 * 128 * 64, 127 * 127 * 64)),
        (3, (256, 256), (56, 56), (3 * 128 * 128 * 32, 3 * 128 * 128 * 64, 3 * 127 * 127 * 64)),
        # Not what deconv7 writes, the result, but what it reads.
        (1, (257, 259), (300, 300), (128 * 129 * 32, 128 * 129 * 64, 300 * 300 * 64)),
        (0, (256, 256), (56, 56), (0, 0, 0)),
    ],
)
def test_workspace_of_mixed(
    images: int, image_size: tuple[int, int], size: tuple[int, int], parts: tuple[int, int, int]
) -> None:
    assert autoencoder.mixed_parts(images, image_size, size) == parts
    assert autoencoder.mixed_workspace_size(images, image_size, size) == sum(parts)
    assert all(part % 16 == 0 for part in autoencoder.mixed_parts(1, (257, 331), size, (1,) * 13))


@pytest.mark.parametrize(
    ("image_size", "size", "channels", "largest"),
    [
        ((256, 256), (56, 56), autoencoder.CHANNELS, 128 * 128 * 64),  # deconv6 writes it
        ((256, 256), (56, 56), (1,) * 13, 256 * 256 * 3),  # the image
        ((257, 259), (56, 57), (1,) * 13, 199_696),  # 199,689, rounded up
        ((256, 256), (300, 200), (*(1,) * 11, 5, 9), 300 * 200 * 9),  # the result
        ((256, 256), (300, 200), (*(1,) * 11, 9, 5), 300 * 200 * 9),  # what the last layer reads, resized
        ((512, 256), (8, 8), (100, *(1,) * 12), 256 * 128 * 100),  # enconv1 writes it
    ],
)
def test_workspace(image_size: tuple[int, int], size: tuple[int, int], channels: tuple[int, ...], largest: int) -> None:
    needed = autoencoder.workspace_size(image_size, size, channels)
    assert needed == conv_pool.WORKSPACE + 2 * largest
