"""The three networks of EfficientAD in plain PyTorch.

Source: Batzner, Heckler, König, "EfficientAD", WACV 2024 (arXiv 2303.14535), tables 6 to 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from efficientad_fast.errors import InputError

ModelSize = Literal["s", "m"]

FEATURE_CHANNELS = 384
"""Channels of the teacher's and the autoencoder's output, and of each half of the student's."""

FEATURE_STRIDE = 4
"""Input pixels from one feature to the next, in the PDN."""

FEATURE_BORDER = 4
"""Features that padding adds on each side: feature ``i`` without padding is feature ``i + 4`` with it, inside."""

SMALLEST_SIDE = 256
"""The encoder's last kernel is 8x8 behind a stride of 32."""


def feature_size(size: Sequence[int], *, padding: bool = False) -> tuple[int, int]:
    """Height and width of the PDN's output for an input of ``size`` (height, width): ceil(side / 4) [- 8]."""
    height, width = (-(-side // FEATURE_STRIDE) - (0 if padding else 2 * FEATURE_BORDER) for side in size)
    return height, width


def require_admitted_size(height: int, width: int) -> None:
    """Raises an :class:`InputError` for an image that is too small for the autoencoder."""
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(
            f"The autoencoder got an image of {height}x{width} pixels, but each side must be at least "
            f"{SMALLEST_SIDE}: resize it to ({max(height, SMALLEST_SIDE)}, {max(width, SMALLEST_SIDE)}) or more."
        )


def _relu(x: Tensor) -> Tensor:
    """In place: a convolution's gradient needs no output, and the copy costs a tenth of a prediction on a CPU."""
    return F.relu(x, inplace=True)


class PatchDescriptionNetwork(nn.Module):
    """Patch description network: ``(N, 3, H, W)`` to ``(N, out_channels, h, w)``, see :func:`feature_size`.

    Each output vector describes a patch of 33x33 pixels; neighbours are 4 pixels apart. Sub-modules are named
    ``conv1`` ... as in the checkpoints in use.

    Args:
        model_size: ``"s"`` (4 convolutions) or ``"m"`` (6).
        out_channels: 384 for a teacher, 768 for a student.
        padding: pad the convolutions before the last spatial one and the pools with zeros. The pools count those.

    Raises:
        InputError: unknown ``model_size``.
    """

    def __init__(
        self, model_size: ModelSize = "s", out_channels: int = FEATURE_CHANNELS, *, padding: bool = False
    ) -> None:
        super().__init__()
        if model_size not in get_args(ModelSize):
            raise InputError(f"model_size must be 's' or 'm', got {model_size!r}.")
        self.model_size: ModelSize = model_size
        self.out_channels = out_channels
        self.padding = padding
        pad = 1 if padding else 0
        self.pool = nn.AvgPool2d(2, stride=2, padding=pad, count_include_pad=True)
        if model_size == "s":
            self.conv1 = nn.Conv2d(3, 128, 4, padding=3 * pad)
            self.conv2 = nn.Conv2d(128, 256, 4, padding=3 * pad)
            self.conv3 = nn.Conv2d(256, 256, 3, padding=pad)
            self.conv4 = nn.Conv2d(256, out_channels, 4)
        else:
            self.conv1 = nn.Conv2d(3, 256, 4, padding=3 * pad)
            self.conv2 = nn.Conv2d(256, 512, 4, padding=3 * pad)
            self.conv3 = nn.Conv2d(512, 512, 1)
            self.conv4 = nn.Conv2d(512, 512, 3, padding=pad)
            self.conv5 = nn.Conv2d(512, out_channels, 4)
            self.conv6 = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(_relu(self.conv1(image)))
        x = self.pool(_relu(self.conv2(x)))
        x = _relu(self.conv3(x))
        if self.model_size == "s":
            return self.conv4(x)  # type: ignore[no-any-return]
        x = _relu(self.conv4(x))
        x = _relu(self.conv5(x))
        return self.conv6(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """``(N, 3, H, W)`` to a bottleneck ``(N, 64, H // 32 - 7, W // 32 - 7)``: 1x1 for 256x256."""

    def __init__(self) -> None:
        super().__init__()
        self.enconv1 = nn.Conv2d(3, 32, 4, stride=2, padding=1)
        self.enconv2 = nn.Conv2d(32, 32, 4, stride=2, padding=1)
        self.enconv3 = nn.Conv2d(32, 64, 4, stride=2, padding=1)
        self.enconv4 = nn.Conv2d(64, 64, 4, stride=2, padding=1)
        self.enconv5 = nn.Conv2d(64, 64, 4, stride=2, padding=1)
        self.enconv6 = nn.Conv2d(64, 64, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for convolution in (self.enconv1, self.enconv2, self.enconv3, self.enconv4, self.enconv5):
            x = _relu(convolution(x))
        return self.enconv6(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Bottleneck to ``(N, out_channels, h, w)``: upsample, convolve, ReLU, dropout; the last two keep the size."""

    def __init__(self, out_channels: int = FEATURE_CHANNELS, *, padding: bool = False) -> None:
        super().__init__()
        self.padding = padding
        for step in range(1, 7):
            self.add_module(f"deconv{step}", nn.Conv2d(64, 64, 4, padding=2))
        self.deconv7 = nn.Conv2d(64, 64, 3, padding=1)
        self.deconv8 = nn.Conv2d(64, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(0.2)

    @staticmethod
    def step_sizes(size: Sequence[int]) -> list[tuple[int, int]]:
        """Sizes of the six upsampling steps for an image of ``size``: 3, 8, 15, 32, 63, 127 for 256."""
        height, width = size
        return [
            (height // divisor - odd, width // divisor - odd)
            for divisor, odd in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
        ]

    def forward(self, bottleneck: Tensor, size: Sequence[int]) -> Tensor:
        x = bottleneck
        for step, step_size in enumerate(self.step_sizes(size), start=1):
            x = F.interpolate(x, step_size, mode="bilinear", align_corners=False)
            x = self.dropout(_relu(self.get_submodule(f"deconv{step}")(x)))
        x = F.interpolate(x, feature_size(size, padding=self.padding), mode="bilinear", align_corners=False)
        x = _relu(self.deconv7(x))
        return self.deconv8(x)  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Autoencoder: ``(N, 3, H, W)`` to ``(N, out_channels, h, w)``, the size of the PDN's output.

    Dropout acts in train mode alone. Sides must be at least 256.

    Args:
        out_channels: 384, the teacher's.
        padding: whether the PDNs beside it pad, which sets the output size.
    """

    def __init__(self, out_channels: int = FEATURE_CHANNELS, *, padding: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(out_channels, padding=padding)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        require_admitted_size(height, width)
        return self.decoder(self.encoder(image), (height, width))  # type: ignore[no-any-return]


def count_parameters(module: nn.Module) -> int:
    """Number of weights and biases."""
    return sum(parameter.numel() for parameter in module.parameters())


def split_student(features: Tensor) -> tuple[Tensor, Tensor]:
    """The student's halves, ``(N, 384, h, w)`` each: what predicts the teacher, what predicts the autoencoder."""
    half = features.shape[1] // 2
    return features[:, :half], features[:, half:]


def normalise_features(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Teacher features per channel: ``(features - mean) / std``; mean and std broadcast from ``(1, C, 1, 1)``."""
    return (features - mean) / std


__all__ = [
    "FEATURE_BORDER",
    "FEATURE_CHANNELS",
    "FEATURE_STRIDE",
    "SMALLEST_SIDE",
    "Autoencoder",
    "Decoder",
    "Encoder",
    "ModelSize",
    "PatchDescriptionNetwork",
    "count_parameters",
    "feature_size",
    "normalise_features",
    "require_admitted_size",
    "split_student",
]
