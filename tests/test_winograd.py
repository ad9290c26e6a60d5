"""Winograd's matrices, exactly; and how far float32 is from float64 with them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_close
from convolution_cases import channels_last, signed, weights, workspace, written
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import conv_pool, packing, winograd
from efficientad_fast.ops.packing import Source

EVERY = pytest.mark.parametrize(("m", "r"), winograd.POSITIVE_POINTS)


@EVERY
def test_the_matrices_filter_exactly(m: int, r: int) -> None:
    """y[i] = sum over k of d[i + k] g[k] for every d and g: d[n] g[k] has the factor 1 where n = i + k, else 0."""
    a, g, b = winograd.matrices(m, r)
    n = m + r - 1
    assert (len(a), len(g), len(b)) == (m, n, n)
    for i, k, at in np.ndindex(m, r, n):
        assert sum(a[i][j] * g[j][k] * b[j][at] for j in range(n)) == (at == i + k)


@EVERY
def test_the_transforms_of_activations_are_exact_in_float32(m: int, r: int) -> None:
    a, _, b = winograd.matrices(m, r)
    for number in (number for row in (*a, *b) for number in row):
        assert Fraction(float(np.float32(float(number)))) == number


@EVERY
def test_pairs_of_points_share_their_terms(m: int, r: int) -> None:
    """Of both rows of B^T, and of both columns of A^T, even terms are equal and odd ones opposite."""
    a, _, b = winograd.matrices(m, r)
    for pair in range(len(winograd.POSITIVE_POINTS[m, r])):
        for power in range(m + r - 1):
            sign = (-1) ** power
            assert b[2 * pair + 1][power] == sign * b[2 * pair][power]
            if power < m:
                assert a[power][2 * pair + 1] == sign * a[power][2 * pair]


@EVERY
def test_the_pseudo_inverse_recovers_weights(m: int, r: int) -> None:
    taps = signed((5, 3, r, r), 0).double()
    recovered = winograd.recover_weights(winograd.transform_weights(taps, m, r), m, r)
    assert_close(recovered, taps, tolerance("features", torch.float64))


@EVERY
def test_smaller_kernels_lie_top_left(m: int, r: int) -> None:
    for kernel in range(1, r):
        taps = signed((2, 3, kernel, kernel), 0)
        filled = torch.zeros(2, 3, r, r)
        filled[..., :kernel, :kernel] = taps
        assert_close(winograd.transform_weights(taps, m, r), winograd.transform_weights(filled, m, r), EXACT)


@EVERY
def test_packed_weights_filter_as_the_convolution_does(m: int, r: int) -> None:
    """Over one tile, by the definition: no code is shared but the layout that the contract states."""
    n, groups, outputs, channels = m + r - 1, 2, 35, 18
    weight = weights((groups * outputs, channels, r, r), 0)
    images = signed((1, groups * channels, n, n), 1).double()
    packed = conv_pool.reference_pack(weight, groups=groups, algorithm=f"winograd{m}")
    assert packed.shape == (groups, 2, n * n, 32, 32)
    a, _, b = (winograd.in_float64(one, torch.device("cpu")) for one in winograd.matrices(m, r))
    results = torch.zeros(groups, outputs, m, m, dtype=torch.float64)
    for group, output in np.ndindex(groups, outputs):
        products = torch.zeros(n, n, dtype=torch.float64)
        for channel in range(channels):
            transformed = packed[group, output // 32, :, channel, output % 32].view(n, n)
            products += transformed * (b @ images[0, group * channels + channel] @ b.T)
        results[group, output] = a @ products @ a.T
    expected = F.conv2d(images, weight.double(), groups=groups)
    assert_close(results.view(expected.shape), expected, tolerance("filtered by packed weights", torch.float64))
    filler = packed.movedim(4, 2).flatten(1, 2)
    assert filler[:, outputs:].eq(0).all()
    assert filler[..., channels:].eq(0).all()


@pytest.mark.parametrize("planes", [1, 49, 81])
def test_unpacked_weights_are_those_that_were_packed(planes: int) -> None:
    given = [weights((33, 5, 4, 4), 0), weights((33, 17, 3, 3), 1)]
    packed = packing.pack(given, 1, planes)
    sources = [Source(5, 4), Source(17, 3)]
    assert packed.shape == packing.packed_shape(1, 33, planes, sources)
    allowed = EXACT if planes == 1 else tolerance("unpacked weights", torch.float64)
    for one, other in zip(packing.unpack(packed, 33, sources), given, strict=True):
        assert_close(one, other, allowed)


def _by_tiles(images: Tensor, weight: Tensor, m: int) -> Tensor:
    """The algorithm in float32, on images of whole tiles."""
    r = weight.shape[3]
    a, _, b = (winograd.in_float64(one, torch.device("cpu")).float() for one in winograd.matrices(m, r))
    tiles = images.unfold(2, m + r - 1, m).unfold(3, m + r - 1, m)
    transformed = winograd.transform_weights(weight, m, r).float()
    products = torch.einsum("ncyxij,ocij->noyxij", b @ tiles @ b.T, transformed)
    return (a @ products @ a.T).transpose(3, 4).flatten(4, 5).flatten(2, 3)


@EVERY
def test_errors_in_float32_are_as_documented(m: int, r: int) -> None:
    """Relative, in norm, at 256 channels, for inputs as ReLU leaves them: of the algorithm, and of the operator."""
    side = 12 + r - 1
    images = torch.randn(2, 256, side, side, generator=torch.Generator().manual_seed(0)).relu()
    weight = weights((32, 256, r, r), 1)
    exact = F.conv2d(images.double(), weight.double())
    results = {"the algorithm": _by_tiles(images, weight, m)}
    ops.load()
    packed = torch.ops.efficientad_fast.conv_pool.pack(weight, algorithm=f"winograd{m}")
    room = workspace(1, conv_pool.WORKSPACE)
    results["conv_pool"] = written(tuple(exact.shape))
    torch.ops.efficientad_fast.conv_pool.out(
        channels_last(images), packed, kernel_size=r, relu=False, out=results["conv_pool"], workspace=room
    )
    most = tolerance(f"F({m}x{m}, {r}x{r})", torch.float32).norm
    for name, result in results.items():
        relative = float((result.double() - exact).norm() / exact.norm())
        print(name, m, r, relative)
        assert relative < most, f"{name} of F({m}x{m}, {r}x{r}): {relative:.2g}, documented {most:.2g}"
    plain = float((F.conv2d(images, weight).double() - exact).norm() / exact.norm())
    assert plain < most / 4, "a convolution without tiles has errors as large, and these could be smaller"
