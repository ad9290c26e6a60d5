"""What the operator ``autoencoder`` is in the network, and the room that it needs."""

from __future__ import annotations

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

    packed = [
        torch.ops.efficientad_fast.conv_pool.pack(weight, algorithm="direct" if index < 6 else "auto")
        for index, weight in enumerate(weights)
    ]
    out, room = written(tuple(hidden.shape)), workspace(2, autoencoder.workspace_size(image_size, size))
    torch.ops.efficientad_fast.autoencoder.out(image, packed, biases, out=out, workspace=room)

    last = network.double().decoder.deconv8
    expected = network(image.double())
    for result in (hidden, out):
        assert_close(last(result.double()), expected, tolerance("autoencoder", torch.float32))


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
