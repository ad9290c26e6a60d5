"""A stand-in for anomalib's ``EfficientAd``, for the tests of machines without it: its names, its order of computing.

Written from SPEC's tables. ``tests/interop/parity.py`` compares it, and this package, with anomalib itself.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad_fast.reference.networks import Decoder as OurDecoder
from efficientad_fast.reference.networks import Encoder

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalised(x: Tensor) -> Tensor:
    """Of the default dtype or a wider one, as the numbers are made in that."""
    mean, std = (one.to(x.device, torch.get_default_dtype()) for one in (MEAN, STD))
    return (x - mean) / std


class InferenceBatch(NamedTuple):
    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None


class PatchDescriptionNetwork(nn.Module):
    def __init__(self, size: str, out_channels: int, padding: bool) -> None:
        super().__init__()
        pad = int(padding)
        width = 128 if size == "small" else 256
        self.conv1 = nn.Conv2d(3, width, 4, padding=3 * pad)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, padding=3 * pad)
        if size == "small":
            self.conv3 = nn.Conv2d(256, 256, 3, padding=pad)
            self.conv4 = nn.Conv2d(256, out_channels, 4)
        else:
            self.conv3 = nn.Conv2d(512, 512, 1)
            self.conv4 = nn.Conv2d(512, 512, 3, padding=pad)
            self.conv5 = nn.Conv2d(512, out_channels, 4)
            self.conv6 = nn.Conv2d(out_channels, out_channels, 1)
        self.avgpool1 = nn.AvgPool2d(2, 2, padding=pad)
        self.avgpool2 = nn.AvgPool2d(2, 2, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool1(F.relu(self.conv1(normalised(x))))
        x = self.avgpool2(F.relu(self.conv2(x)))
        *hidden, last = [layer for layer in self.children() if isinstance(layer, nn.Conv2d)][2:]
        for layer in hidden:
            x = F.relu(layer(x))
        result: Tensor = last(x)
        return result


class Decoder(OurDecoder):
    def __init__(self, out_channels: int, padding: bool) -> None:
        super().__init__(out_channels, padding=padding)
        del self.dropout
        for step in range(1, 7):
            self.add_module(f"dropout{step}", nn.Dropout(0.2))
        self.dropout = nn.Identity().forward


class AutoEncoder(nn.Module):
    def __init__(self, out_channels: int, padding: bool) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(out_channels, padding)

    def forward(self, x: Tensor, size: Any) -> Tensor:
        result: Tensor = self.decoder(self.encoder(normalised(x)), size)
        return result


class EfficientAdModel(nn.Module):
    def __init__(
        self, channels: int = 384, model_size: str = "small", padding: bool = False, pad_maps: bool = True
    ) -> None:
        super().__init__()
        self.pad_maps = pad_maps
        self.teacher_out_channels = channels
        self.teacher = PatchDescriptionNetwork(model_size, channels, padding).eval()
        self.student = PatchDescriptionNetwork(model_size, 2 * channels, padding)
        self.ae = AutoEncoder(channels, padding)
        zeros = torch.zeros(1, channels, 1, 1)
        self.mean_std = nn.ParameterDict({"mean": zeros, "std": zeros.clone()})
        self.quantiles = nn.ParameterDict({name: torch.tensor(0.0) for name in ("qa_st", "qb_st", "qa_ae", "qb_ae")})

    def forward(self, batch: Tensor, batch_imagenet: Tensor | None = None, normalize: bool = True) -> Any:
        expected, predicted = self.teacher(batch), self.student(batch)
        if any(one.sum() != 0 for one in self.mean_std.values()):
            expected = (expected - self.mean_std["mean"]) / self.mean_std["std"]
        halves = predicted.split(self.teacher_out_channels, dim=1)
        if self.training:
            assert batch_imagenet is not None
            return ((expected - halves[0]) ** 2).mean(), (halves[1] ** 2).mean(), (self.student(batch_imagenet)).mean()
        size = batch.shape[-2:]
        maps = []
        for first, second, name in ((expected, halves[0], "st"), (self.ae(batch, size), halves[1], "ae")):
            one = ((first - second) ** 2).mean(dim=1, keepdim=True)
            one = F.interpolate(F.pad(one, (4, 4, 4, 4)) if self.pad_maps else one, size, mode="bilinear")
            start, end = self.quantiles[f"qa_{name}"], self.quantiles[f"qb_{name}"]
            if normalize and any(q.sum() != 0 for q in self.quantiles.values()):
                one = 0.1 * (one - start) / (end - start)
            maps.append(one)
        anomaly_map = 0.5 * maps[0] + 0.5 * maps[1]
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)


QUANTILES = {"qa_st": 1.9, "qb_st": 4.25, "qa_ae": 1.2, "qb_ae": 2.125}
"""Of the maps of networks that :func:`fill` made, roughly."""


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0, *, statistics: bool = True) -> None:
    """Seeded weights and statistics, the same whatever the order of the model's entries, and for every PyTorch.

    Args:
        model: anomalib's torch model, or one that has its names.
        statistics: whether to set the teacher's statistics and the quantiles, which stay zeros otherwise.
    """
    for name, value in model.state_dict().items():
        uniform = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(tuple(value.shape)) * 2 - 1
        if name.startswith("mean_std."):
            found = np.zeros_like(uniform) if not statistics else uniform / 4 + (1.0 if name.endswith("std") else 0.0)
        elif name.startswith("quantiles."):
            found = np.float64(QUANTILES[name.removeprefix("quantiles.")] if statistics else 0.0)
        elif name.endswith(".weight"):
            found = uniform * np.sqrt(6 / np.prod(value.shape[1:]))
        else:
            found = uniform / 10
        value.copy_(torch.from_numpy(np.asarray(found)))


def seeded_images(count: int, size: tuple[int, int] = (256, 256), seed: int = 0) -> np.ndarray:
    """``(count, *size, 3)`` uint8: blocks of colour with noise over them."""
    rng = np.random.default_rng(seed)
    height, width = size
    blocks = rng.integers(0, 200, (count, 8, 8, 3)).repeat(-(-height // 8), axis=1).repeat(-(-width // 8), axis=2)
    noise = rng.integers(0, 56, (count, *size, 3))
    return (blocks[:, :height, :width] + noise).astype(np.uint8)


def checkpoint(model: EfficientAdModel, model_size: str = "small", **changes: Any) -> dict[str, Any]:
    """What ``Trainer.save_checkpoint`` of Lightning and anomalib 2.7 writes of it, as far as it is read."""
    nan = torch.tensor(float("nan"))
    names = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")
    resize = {"size": [256, 256], "interpolation": "bilinear", "max_size": None, "antialias": True}
    spec = {"class_path": "torchvision.transforms.v2.Resize", "init_args": resize}
    transforms = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [spec]}}
    return {
        "epoch": 0,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"post_processor.{name}": nan for name in names}
        | {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {
            "teacher_out_channels": model.teacher_out_channels,
            "model_size": model_size,
            "padding": model.ae.decoder.padding,
            "pad_maps": model.pad_maps,
        },
        "anomalib_components_enabled": {"pre_processor": True, "post_processor": True},
        "anomalib_pre_processor_config": {"transform": transforms},
        "anomalib_post_processor_config": {
            "enable_normalization": True,
            "enable_thresholding": True,
            "enable_threshold_matching": True,
            "image_sensitivity": 0.5,
            "pixel_sensitivity": 0.5,
        },
    } | changes


class InterpolationMode(enum.Enum):
    """As torchvision's, which pickles by its value."""

    BILINEAR = "bilinear"


class Resize(nn.Module):
    """What torchvision's has that anomalib before 2.7 pickles."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size, self.interpolation, self.max_size, self.antialias = size, InterpolationMode.BILINEAR, None, True


class Normalize(nn.Module):
    """What torchvision's has that anomalib before 2.7 pickles."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std, self.inplace = mean, std, False


class Compose(nn.Module):
    """What torchvision's has that anomalib before 2.7 pickles."""

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.transforms = transforms


def with_numbers(checkpoint: dict[str, Any], **numbers: float) -> dict[str, Any]:
    """With numbers of the post-processor, such as ``_image_threshold``."""
    state = checkpoint["state_dict"] | {f"post_processor.{name}": torch.tensor(one) for name, one in numbers.items()}
    return checkpoint | {"state_dict": state}


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path
