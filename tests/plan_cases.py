"""Networks of few outputs and images that plans are tried with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficientad_fast.plan import PlanInput
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

CPU = torch.device("cpu")
CHANNELS = 48


def source(model_size: str = "s", *, padding: bool = False, size: tuple[int, int] = (256, 256)) -> PlanInput:
    """Networks with few outputs, whose activations keep their size from layer to layer."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        teacher = PatchDescriptionNetwork(model_size, CHANNELS, padding=padding)
        student = PatchDescriptionNetwork(model_size, 2 * CHANNELS, padding=padding)
        autoencoder = Autoencoder(CHANNELS, padding=padding)
        for layer in (*teacher.modules(), *student.modules(), *autoencoder.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.uniform_(layer.bias, -0.1, 0.1)
        features = teacher.eval()(torch.randn(1, 3, 256, 256))
    mean, std = features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True)
    return PlanInput(teacher, student.eval(), autoencoder.eval(), mean, std, None, "resized", False, size)


def images(count: int = 1, size: tuple[int, int] = (256, 256), seed: int = 9) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def near_student(plain: PlanInput, noise: float) -> PatchDescriptionNetwork:
    """Both halves of its outputs nearly the teacher's normalised ones, by hidden channels in another order and scale.

    As after training, what is left of T' - S is small beside T' and S, and their rounding errors do not cancel.
    """
    teacher = plain.teacher
    assert isinstance(teacher, PatchDescriptionNetwork) and plain.teacher_std is not None
    student = PatchDescriptionNetwork(teacher.model_size, 2 * CHANNELS).eval()
    generator = torch.Generator().manual_seed(4)
    *hidden, last = (name for name, layer in teacher.named_children() if isinstance(layer, nn.Conv2d))
    order, scale = torch.arange(3), torch.ones(3)
    for name in hidden:
        given, made = teacher.get_submodule(name), student.get_submodule(name)
        # conv5 of PDN-M has twice the teacher's outputs: both halves alike.
        outputs = torch.randperm(len(given.bias), generator=generator).repeat(len(made.bias) // len(given.bias))
        factor = 0.5 + 1.5 * torch.rand(len(outputs), generator=generator)
        weight = given.weight[outputs][:, order] / scale[:, None, None]
        made.weight.copy_(weight * factor[:, None, None, None])
        made.bias.copy_(given.bias[outputs] * factor)
        order, scale = outputs, factor
    given, made = teacher.get_submodule(last), student.get_submodule(last)
    std = plain.teacher_std.flatten()
    repeats = len(order) // given.weight.shape[1]
    weight = given.weight[:, order] / scale[:, None, None] / std[:, None, None, None] / repeats
    bias = (given.bias - plain.teacher_mean.flatten()) / std
    noisy = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
    made.weight.copy_(torch.cat([noisy, weight]))
    made.bias.copy_(torch.cat([bias, bias]))
    return student
