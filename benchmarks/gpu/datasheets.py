"""What GPUs can do, by NVIDIA's own documents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

TERA, GIGA, MEBIBYTE = 1e12, 1e9, 2**20


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        capability: compute capability, such as 9.0.
        multiprocessors: each computes a tile by itself.
        float16: operations a second of dense products of float16 or bfloat16 with sums in float32.
        float8: likewise of float8_e4m3fn; None where there are none.
        bandwidth: bytes a second, of its memory.
        l2: bytes of its L2 cache.
        source: of these figures.
    """

    name: str
    capability: float
    multiprocessors: int
    float16: float
    float8: float | None
    bandwidth: float
    l2: int
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of dense products of that dtype.

        Raises:
            ValueError: it has none.
        """
        found = {torch.float16: self.float16, torch.bfloat16: self.float16, torch.float8_e4m3fn: self.float8}.get(dtype)
        if found is None:
            raise ValueError(f"{self.name} has no rate for products of {dtype}")
        return found


# Dense rates are half of those that a document gives for sparse products.
GPUS = (
    Gpu(
        "H200 SXM",
        capability=9.0,
        multiprocessors=132,
        float16=989 * TERA,
        float8=1979 * TERA,
        bandwidth=4800 * GIGA,
        l2=50 * MEBIBYTE,
        source="NVIDIA H200 Tensor Core GPU Datasheet; multiprocessors and L2: H100 Tensor Core GPU Architecture",
    ),
    Gpu(
        "H100 SXM",
        capability=9.0,
        multiprocessors=132,
        float16=989 * TERA,
        float8=1979 * TERA,
        bandwidth=3350 * GIGA,
        l2=50 * MEBIBYTE,
        source="NVIDIA H100 Tensor Core GPU Datasheet; H100 Tensor Core GPU Architecture",
    ),
    Gpu(
        "A100 SXM 80 GB",
        capability=8.0,
        multiprocessors=108,
        float16=312 * TERA,
        float8=None,
        bandwidth=2039 * GIGA,
        l2=40 * MEBIBYTE,
        source="NVIDIA A100 Tensor Core GPU Datasheet; A100 Tensor Core GPU Architecture",
    ),
    Gpu(
        "L4",
        capability=8.9,
        multiprocessors=58,
        float16=121 * TERA,
        float8=242 * TERA,
        bandwidth=300 * GIGA,
        l2=48 * MEBIBYTE,
        source="NVIDIA L4 Tensor Core GPU Datasheet; NVIDIA Ada GPU Architecture",
    ),
    Gpu(
        "RTX A6000",
        capability=8.6,
        multiprocessors=84,
        float16=154.8 * TERA,
        float8=None,
        bandwidth=768 * GIGA,
        l2=6 * MEBIBYTE,
        source="NVIDIA RTX A6000 Datasheet; NVIDIA Ampere GA102 GPU Architecture",
    ),
    # Half of its rates with sums in float16.
    Gpu(
        "RTX 4090",
        capability=8.9,
        multiprocessors=128,
        float16=165.2 * TERA,
        float8=330.3 * TERA,
        bandwidth=1008 * GIGA,
        l2=72 * MEBIBYTE,
        source="NVIDIA Ada GPU Architecture, appendix A",
    ),
    # The document gives 170 sparse INT8 TOPS of the GPU; float16 is half of INT8, and dense half of sparse.
    Gpu(
        "Jetson AGX Orin 64 GB",
        capability=8.7,
        multiprocessors=16,
        float16=42.5 * TERA,
        float8=None,
        bandwidth=204.8 * GIGA,
        l2=4 * MEBIBYTE,
        source="NVIDIA Jetson AGX Orin Series Technical Brief",
    ),
)

MEASURED_FLOAT16, MEASURED_BANDWIDTH = 790 * TERA, 4300 * GIGA
"""On an H200: large products of half precision, and copies, bytes read and written."""


def used() -> tuple[Gpu, ...]:
    """The GPUs with the rates that predictions use: those measured on H200, and of the others as large a share."""
    h200 = GPUS[0]
    products, copies = MEASURED_FLOAT16 / h200.float16, MEASURED_BANDWIDTH / h200.bandwidth
    return tuple(
        replace(
            one,
            float16=products * one.float16,
            float8=None if one.float8 is None else products * one.float8,
            bandwidth=copies * one.bandwidth,
        )
        for one in GPUS
    )
