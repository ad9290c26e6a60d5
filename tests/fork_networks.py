"""The networks as the widely used PyTorch implementation builds them, flat ``nn.Sequential``s, and its ``predict``.

Written for the tests and benchmarks from SPEC's tables, apart from ``reference/``, so that each checks the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OUT_CHANNELS = 384


def _convolution(before: int, after: int, kernel: int, padding: int = 0, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel_size=kernel, stride=stride, padding=padding)


def pdn_small(out_channels: int = OUT_CHANNELS, *, padding: bool = False) -> nn.Sequential:
    pad = int(padding)
    return nn.Sequential(
        _convolution(3, 128, 4, 3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=pad),
        _convolution(128, 256, 4, 3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=pad),
        _convolution(256, 256, 3, pad),
        nn.ReLU(inplace=True),
        _convolution(256, out_channels, 4),
    )


def pdn_medium(out_channels: int = OUT_CHANNELS, *, padding: bool = False) -> nn.Sequential:
    pad = int(padding)
    return nn.Sequential(
        _convolution(3, 256, 4, 3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=pad),
        _convolution(256, 512, 4, 3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(kernel_size=2, stride=2, padding=pad),
        _convolution(512, 512, 1),
        nn.ReLU(inplace=True),
        _convolution(512, 512, 3, pad),
        nn.ReLU(inplace=True),
        _convolution(512, out_channels, 4),
        nn.ReLU(inplace=True),
        _convolution(out_channels, out_channels, 1),
    )


def autoencoder(
    out_channels: int = OUT_CHANNELS, *, sizes: tuple[Any, ...] = (3, 8, 15, 32, 63, 127, 56)
) -> nn.Sequential:
    """``sizes``: of the seven upsampling layers; for 256x256 and PDNs without padding unless told otherwise."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 64)):
        layers += [_convolution(before, after, 4, padding=1, stride=2), nn.ReLU(inplace=True)]
    layers.append(_convolution(64, 64, 8))
    for size in sizes[:-1]:
        layers += [
            nn.Upsample(size=size, mode="bilinear"),
            _convolution(64, 64, 4, padding=2),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
        ]
    layers += [
        nn.Upsample(size=sizes[-1], mode="bilinear"),
        _convolution(64, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        _convolution(64, out_channels, 3, padding=1),
    ]
    return nn.Sequential(*layers)


@torch.no_grad()
def plain_predict(
    image: Tensor,
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    mean: Tensor,
    std: Tensor,
    q_st_start: Any = None,
    q_st_end: Any = None,
    q_ae_start: Any = None,
    q_ae_end: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(map_combined, map_st, map_ae)``, eagerly, as SPEC "Maps and score" writes it down."""
    expected, predicted, reconstructed = (teacher(image) - mean) / std, student(image), autoencoder(image)
    channels = expected.shape[1]
    map_st = torch.mean((expected - predicted[:, :channels]) ** 2, dim=1, keepdim=True)
    map_ae = torch.mean((reconstructed - predicted[:, channels:]) ** 2, dim=1, keepdim=True)
    if q_st_start is not None:
        map_st = 0.1 * (map_st - q_st_start) / (q_st_end - q_st_start)
    if q_ae_start is not None:
        map_ae = 0.1 * (map_ae - q_ae_start) / (q_ae_end - q_ae_start)
    return 0.5 * map_st + 0.5 * map_ae, map_st, map_ae
