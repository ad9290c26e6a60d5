"""Teachers in files, and the one that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from efficientad_fast.errors import DetectorFileError
from efficientad_fast.files import read_tensors, write_tensors
from efficientad_fast.reference.networks import FEATURE_CHANNELS, PatchDescriptionNetwork

TEACHER_FORMAT = "efficientad_fast teacher 1"
DEFAULT_TEACHER = Path(__file__).with_name("teacher_s.safetensors")


def save_teacher(teacher: PatchDescriptionNetwork, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write ``teacher`` as float16 with its provenance, atomically."""
    tensors = {name: value.half() for name, value in teacher.state_dict().items()}
    metadata = {
        "format": TEACHER_FORMAT,
        "model_size": teacher.model_size,
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def load_teacher(path: Path | None = None, *, padding: bool = False) -> tuple[PatchDescriptionNetwork, dict[str, Any]]:
    """A frozen float32 teacher and its provenance; the package's own where ``path`` is ``None``.

    Args:
        path: of :func:`save_teacher`; or made elsewhere: a teacher's state dict or ``nn.Sequential`` that
            ``torch.save`` wrote, or anomalib's checkpoint. No pickle is executed.

    Raises:
        DetectorFileError: the file is missing, damaged or holds no teacher.
    """
    path = DEFAULT_TEACHER if path is None else Path(path)
    if not path.is_file():
        raise DetectorFileError(f"No teacher at {path}. Give a file made by `efficientad-fast distill`.")
    # interop is above this room, and needed for such files alone.
    from efficientad_fast.interop.reading import is_torch_file

    if is_torch_file(path):
        from efficientad_fast.interop.loading import read_teacher

        return read_teacher(path, padding=padding)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != TEACHER_FORMAT:
        raise DetectorFileError(
            f"{path} is not a teacher file (format {metadata.get('format')!r}, expected {TEACHER_FORMAT!r}). "
            "Make one with `efficientad-fast distill`."
        )
    model_size = "m" if metadata["model_size"] == "m" else "s"
    last_bias = tensors.get("conv6.bias" if model_size == "m" else "conv4.bias")
    channels = FEATURE_CHANNELS if last_bias is None else len(last_bias)
    teacher = PatchDescriptionNetwork(model_size, channels, padding=padding)  # type: ignore[arg-type]
    try:
        teacher.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise DetectorFileError(f"{path} does not hold the weights of a teacher: {error}") from error
    return teacher.eval().requires_grad_(False), json.loads(metadata["provenance"])


def random_teacher(seed: int = 0, *, padding: bool = False) -> tuple[PatchDescriptionNetwork, dict[str, Any]]:
    """An untrained teacher, to measure what a trained one is worth. Statistics normalise its scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = PatchDescriptionNetwork("s", padding=padding)
    return teacher.eval().requires_grad_(False), {"made_by": f"random initialisation, seed {seed}"}


def describe_teacher(provenance: Mapping[str, Any]) -> str:
    """One line: what a teacher was made from, how good it is, and under which terms it may be used."""
    settings = provenance.get("settings")
    if settings is None:
        return str(provenance.get("made_by", "unknown origin"))
    explained = provenance.get("explained_variance")
    quality = "" if explained is None else f", explains {explained:.0%} of the variance of held-out targets"
    return (
        f"PDN-{settings['model_size'].upper()} distilled from {settings['backbone']} on {provenance['images']} images "
        f"({provenance['data']}) in {settings['steps']} steps{quality}; terms: {provenance['terms']}"
    )


def default_teacher_info() -> str:
    """:func:`describe_teacher` of the package's own."""
    return describe_teacher(load_teacher()[1])
