"""How far two computations of the same quantity may differ: the one table, by quantity and dtype.

A tolerance belongs to the less precise side; the other side is float64, or the same arithmetic. "eps" below is the
distance from 1 to the next number of the dtype: 2.2e-16, 1.2e-7, 9.8e-4 (float16), 7.8e-3 (bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Limits on ``|a - b|``.

    Attributes:
        rtol, atol: every element: ``|a - b| <= atol + rtol * |b|``.
        norm: all together: ``||a - b|| <= norm * ||b||``, with what ``atol`` allows each element on top.
        reason: why these and not ten times smaller ones.
    """

    rtol: float
    atol: float
    norm: float
    reason: str


EXACT = Tolerance(0.0, 0.0, 0.0, "both sides do the same arithmetic, or none rounds")

_SUMS = "sums of up to 8192 products, each layer's in another order, up to 14 layers deep"
_ROUNDED = "activations are rounded to eps once a layer"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FOLDED = "offset and scale are folded into one multiplication and addition, which cancel in part"
_FLOAT8_SUMS = "tensor cores add a few products of e4m3 in fewer bits than float32 has: on an H200 to 6e-5 in norm"
_SQUARES = "a mean of squares: the relative error of the features doubles, then averages out"

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # Features of size one can cancel to nearly zero, hence an atol as large as rtol.
    ("features", torch.float64): Tolerance(1e-13, 1e-13, 2e-14, _SUMS),
    ("features", torch.float32): Tolerance(1e-5, 1e-5, 2e-6, _SUMS),
    ("features", torch.float16): Tolerance(5e-3, 5e-3, 2e-3, _ROUNDED),
    ("features", torch.bfloat16): Tolerance(5e-2, 5e-2, 1.5e-2, _ROUNDED),
    ("map", torch.float64): Tolerance(1e-12, 1e-14, 1e-13, _SQUARES),
    ("map", torch.float32): Tolerance(1e-5, 1e-6, 2e-6, _SQUARES),
    ("winograd map", torch.float32): Tolerance(
        1e-3, 1e-5, 1e-4, "what is promised: F(6x6, 4x4) rounds to 2e-5 of a layer's norm, and T' - S cancels"
    ),
    ("map of another implementation", torch.float64): Tolerance(
        1e-5, 1e-7, 1e-5, "what is promised; images in float32"
    ),
    ("map of another implementation", torch.float32): Tolerance(1e-3, 1e-5, 1e-4, "what is promised, as of Winograd's"),
    ("map", torch.float16): Tolerance(5e-2, 1e-3, 1e-2, f"features in float16; {_SQUARES}"),
    ("map", torch.bfloat16): Tolerance(2e-1, 1e-2, 6e-2, f"features in bfloat16; {_SQUARES}"),
    # What is promised of plans in float16 and bfloat16; in float8 a fifth more than was found.
    ("mixed map", torch.float16): Tolerance(5e-2, 0.0, 2e-3, f"{_ROUNDED}; {_SQUARES}"),
    ("mixed map", torch.bfloat16): Tolerance(2e-1, 0.0, 1.5e-2, f"{_ROUNDED}; {_SQUARES}"),
    ("mixed map", torch.float8_e4m3fn): Tolerance(1.0, 0.0, 1.1e-1, f"{_ROUNDED}, 0.0625; {_SQUARES}"),
    ("mixed map of a near student", torch.float16): Tolerance(5e-2, 0.0, 2.5e-3, "T' - S cancels, errors do not"),
    ("mixed map of a near student", torch.bfloat16): Tolerance(5e-1, 0.0, 2.5e-2, "T' - S cancels, errors do not"),
    ("mixed map of a near student", torch.float8_e4m3fn): Tolerance(5.0, 0.0, 0.8, "T' - S is of the errors' size"),
    ("resize", torch.float64): Tolerance(1e-13, 1e-14, 1e-14, "four products a pixel"),
    ("resize", torch.float32): Tolerance(1e-5, 1e-5, 2e-6, "positions are computed in float32: eps times the side"),
    # Operators, by the dtype of the result; the other side is float64.
    **{("identity", dtype): EXACT for dtype in (*_FLOATS, torch.uint8, torch.int64, torch.bool)},
    ("anomaly_map", torch.float64): Tolerance(1e-12, 1e-12, 1e-13, _FOLDED),
    ("anomaly_map", torch.float32): Tolerance(1e-5, 5e-6, 2e-6, f"{_FOLDED}; positions are computed in float32"),
    ("anomaly_map", torch.float16): Tolerance(1e-3, 1e-4, 5e-4, "float32 arithmetic, rounded once to eps"),
    ("anomaly_map", torch.bfloat16): Tolerance(8e-3, 1e-4, 4e-3, "float32 arithmetic, rounded once to eps"),
    ("preprocess", torch.float32): Tolerance(1e-5, 1e-5, 2e-6, _FOLDED),
    ("preprocess", torch.float16): Tolerance(1e-3, 1e-4, 5e-4, "float32 arithmetic, rounded once to eps"),
    ("preprocess", torch.bfloat16): Tolerance(8e-3, 1e-4, 4e-3, "float32 arithmetic, rounded once to eps"),
    # Winograd adds numbers larger than its results, F(6x6, 4x4) the largest.
    **{
        (f"F({m}x{m}, {r}x{r})", torch.float32): Tolerance(1e-5, 1e-3, norm, "256 channels; a tenth more than measured")
        for m, r, norm in [(4, 3, 3e-6), (4, 4, 4e-6), (6, 3, 6e-6), (6, 4, 2.5e-5)]
    },
    ("conv_pool", torch.float32): Tolerance(5e-6, 3e-5, 8e-6, "up to F(6x6, 3x3)"),
    ("conv_pool, direct", torch.float32): Tolerance(1e-6, 3e-6, 1e-6, "sums of up to 1280 products"),
    ("conv_pool, F(6x6, 4x4)", torch.float32): Tolerance(3e-5, 2e-4, 3e-5, "1e-5 in norm, in the worst 10 times that"),
    ("conv_pool, mixed", torch.float32): Tolerance(2e-6, 5e-6, 1e-6, "sums of up to 1280 products, in float32"),
    ("conv_pool, mixed", torch.float16): Tolerance(1e-3, 1e-4, 5e-4, "sums in float32, rounded once to eps"),
    ("conv_pool, mixed", torch.bfloat16): Tolerance(8e-3, 1e-4, 4e-3, "sums in float32, rounded once to eps"),
    ("conv_pool, mixed", torch.float8_e4m3fn): Tolerance(
        6.3e-2, 1e-3, 4e-2, "sums in float32, rounded once to half of 1/8; below 1/64 to 1/1024"
    ),
    ("conv_pool, products of float8", torch.float32): Tolerance(3e-4, 3e-4, 1.5e-4, _FLOAT8_SUMS),
    ("conv_pool, products of float8", torch.float16): Tolerance(1.3e-3, 4e-4, 6e-4, f"{_FLOAT8_SUMS}; rounded once"),
    ("conv_pool, products of float8", torch.bfloat16): Tolerance(8e-3, 4e-4, 4e-3, "as in mixed, rounded once to eps"),
    ("conv_pool, products of float8", torch.float8_e4m3fn): Tolerance(6.3e-2, 1e-3, 4e-2, "as in mixed, rounded once"),
    ("feature_distance, mixed", torch.float32): Tolerance(5e-6, 5e-6, 2e-6, f"sums in float32; {_SQUARES}"),
    ("feature_distance, products of float8", torch.float32): Tolerance(3e-4, 3e-4, 1.5e-4, _FLOAT8_SUMS),
    # Features of size y, wrong by d, have squares wrong by 2 y d, which is at most d + d y^2.
    ("feature_distance", torch.float32): Tolerance(3e-5, 3e-5, 1e-5, f"up to F(6x6, 3x3); {_SQUARES}"),
    ("feature_distance, direct", torch.float32): Tolerance(5e-6, 5e-6, 2e-6, _SQUARES),
    ("feature_distance, F(6x6, 4x4)", torch.float32): Tolerance(3e-4, 3e-4, 6e-5, _SQUARES),
    ("autoencoder", torch.float32): Tolerance(1e-5, 1e-5, 5e-6, f"{_SUMS}, some by F(4x4, 4x4)"),
    ("autoencoder, F(6x6, 4x4)", torch.float32): Tolerance(5e-5, 5e-5, 2e-5, f"{_SUMS}, some by F(6x6, 4x4)"),
    ("autoencoder, mixed", torch.float32): Tolerance(3e-6, 3e-6, 1e-6, _SUMS),
    # The expected activations are rounded too; a few sums fall to the other side, and lead more of the next layer's to,
    # until in 13 layers of all channels it is as much as if they were not.
    ("autoencoder, mixed", torch.float16): Tolerance(2e-3, 5e-3, 1e-3, _ROUNDED),
    ("autoencoder, mixed", torch.bfloat16): Tolerance(1.6e-2, 4e-2, 8e-3, _ROUNDED),
    ("autoencoder, mixed", torch.float8_e4m3fn): Tolerance(
        6.5e-2, 2e-2, 4e-2, "rounded once to half of 1/8, activations before in float16 or bfloat16"
    ),
    ("packed weights", torch.float32): Tolerance(1.2e-7, 1e-12, 6e-8, "float64, rounded once"),
    ("unpacked weights", torch.float64): Tolerance(1e-6, 3e-7, 3e-7, "packed weights were rounded once"),
    ("filtered by packed weights", torch.float64): Tolerance(1e-5, 3e-5, 5e-6, "packed weights were rounded once"),
    # Rounded once, as the expected results are; histograms are whole numbers.
    **{("quantile", dtype): EXACT for dtype in (torch.float32, torch.int64)},
    ("hard_feature_loss", torch.float32): Tolerance(1e-6, 1e-45, 1e-6, "sums of a thousand squares; the least number"),
    ("hard_feature_loss", torch.float16): Tolerance(1e-3, 6e-8, 5e-4, "float32 arithmetic, rounded once to eps"),
    ("hard_feature_loss", torch.bfloat16): Tolerance(8e-3, 0.0, 4e-3, "float32 arithmetic, rounded once to eps"),
    ("hard_feature_loss", torch.int64): EXACT,
    ("loss", torch.float64): Tolerance(1e-12, 0.0, 1e-12, "one mean in another order"),
    ("loss", torch.float32): Tolerance(2e-6, 0.0, 2e-6, "one mean in another order, rounded to eps"),
    ("embedding", torch.float64): Tolerance(1e-11, 1e-13, 1e-12, "three averages, one after the other"),
    ("embedding", torch.float32): Tolerance(1e-4, 1e-5, 2e-6, "three averages, one after the other"),
}


def tolerance(quantity: str, dtype: torch.dtype) -> Tolerance:
    """The entry of :data:`TOLERANCES`; a KeyError names what has none yet."""
    return TOLERANCES[quantity, dtype]
