"""What all contestants compute: a detector of random weights or of a file, its inputs, and its float64 reference."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import INPUT, OUTPUTS
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.detector import Detector
from efficientad_fast.plan import Plan, build_plan
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import (
    FEATURE_CHANNELS,
    Autoencoder,
    ModelSize,
    PatchDescriptionNetwork,
)

STATISTICS_IMAGES = 2


class RawMaps(nn.Module):
    """Preprocessed ``(N, 3, H, W)`` to ``(map_st, map_ae)``, in plain PyTorch: what frameworks export and compile."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.teacher, self.student, self.autoencoder = detector.teacher, detector.student, detector.autoencoder
        self.register_buffer("mean", detector.teacher_mean.view(1, -1, 1, 1))
        self.register_buffer("std", detector.teacher_std.view(1, -1, 1, 1))
        self.eval()

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        features = self.teacher(batch), self.student(batch), self.autoencoder(batch)
        return maps.raw_maps(*features, self.mean, self.std)


def random_detector(model_size: ModelSize, seed: int) -> Detector:
    """Networks whose activations neither die nor explode, with statistics and quantiles of their own features.

    Weights are PyTorch's default times the square root of 6: He's uniform ones, which keep the variance through a ReLU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = PatchDescriptionNetwork(model_size, FEATURE_CHANNELS)
        student = PatchDescriptionNetwork(model_size, 2 * FEATURE_CHANNELS)
        autoencoder = Autoencoder(FEATURE_CHANNELS)
        for network in (teacher, student, autoencoder):
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    unknown = torch.zeros(FEATURE_CHANNELS), torch.ones(FEATURE_CHANNELS)
    detector = Detector(teacher, student, autoencoder, *unknown, pad_maps=False)
    images = preprocessed_images(detector, detector.size, STATISTICS_IMAGES, seed + 1)
    with torch.inference_mode():
        features = teacher(images).double()
    std, mean = torch.std_mean(features, dim=(0, 2, 3))
    detector = detector.replaced(teacher_mean=mean.float(), teacher_std=std.float())
    source = detector.plan_input(detector.size)
    raw = build_plan(source, torch.device("cpu"), torch.float32, backend="reference").raw_maps(images)
    ends = torch.tensor([0.9, 0.995])
    st, ae = (one.flatten().quantile(ends).tolist() for one in raw)
    return detector.replaced(quantiles=Quantiles(*st, *ae))


def preprocessed_images(detector: Detector, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """Generated images as the detector's networks get them: float32 ``(count, 3, *size)``."""
    preprocessing = dataclasses.replace(detector.preprocessing, size=size)
    images = [synthetic_image(index, seed=seed, size=max(size)) for index in range(count)]
    return torch.stack([preprocessing(torch.from_numpy(image).permute(2, 0, 1)) for image in images])


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is right: float64 raw maps ``(N, 1, h, w)`` and image scores ``(N,)`` by plain PyTorch.

    ``plan`` takes the scores of contestants' maps too.
    """

    plan: Plan
    map_st: Tensor
    map_ae: Tensor
    scores: Tensor

    @classmethod
    def of(cls, detector: Detector, images: Tensor) -> Reference:
        """Image by image: the features of a batch in float64 are large."""
        size = (images.shape[2], images.shape[3])
        plan = build_plan(detector.plan_input(size), torch.device("cpu"), torch.float64, backend="reference")
        map_st, map_ae = (torch.cat(one) for one in zip(*map(plan.raw_maps, images.split(1)), strict=True))
        return cls(plan, map_st, map_ae, _scores(plan, map_st, map_ae))

    def first(self, count: int) -> Reference:
        return Reference(self.plan, self.map_st[:count], self.map_ae[:count], self.scores[:count])

    def score(self, map_st: Tensor, map_ae: Tensor) -> Tensor:
        return _scores(self.plan, map_st, map_ae)


def _scores(plan: Plan, map_st: Tensor, map_ae: Tensor) -> Tensor:
    return plan.anomaly_map(map_st, map_ae, plan.quantiles, plan.size)[1]


def export(detector: Detector, batch: Tensor, path: Path) -> None:
    """The ONNX file that `Task.onnx` speaks of."""
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(
            RawMaps(detector),
            (batch,),
            str(path),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
        )
    finally:
        logging.disable(logging.NOTSET)
