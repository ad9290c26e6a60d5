"""The widely used PyTorch implementation ("the fork"): three files, without statistics, quantiles and preprocessing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from efficientad_fast.dropin import recognise, recognise_teacher, upsample_sizes_for
from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.interop.networks import QUANTILES, STATISTICS, Parts, network
from efficientad_fast.interop.reading import open_torch_file
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.networks import PatchDescriptionNetwork

ROLES = ("teacher", "student", "autoencoder")

_One = TypeVar("_One")


def find_files(folder: Path) -> list[Path]:
    """The three files of a folder: ``teacher_final.pth``, ``student_final.pth``, ``autoencoder_final.pth``, or others
    with one ending; none where there is none of them.

    Raises:
        DetectorFileError: one of the three is missing, or there are several sets and none is final.
    """
    sets: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(rf"({'|'.join(ROLES)})((?:_.*)?\.pth?)", path.name)
        if match and path.is_file():
            sets.setdefault(match[2], {})[match[1]] = path
    complete = [ending for ending, found in sets.items() if len(found) == len(ROLES)]
    chosen = [ending for ending in complete if ending.startswith("_final.")] or complete
    if not sets:
        return []
    if len(chosen) != 1:
        held = ", ".join(path.name for found in sets.values() for path in found.values())
        raise DetectorFileError(
            f"{folder} holds {held}, but one file of each network with the same ending is needed, such as "
            f"{', '.join(f'{role}_final.pth' for role in ROLES)}. Give the three files instead of the folder."
        )
    return [sets[chosen[0]][role] for role in ROLES]


def read_parts(paths: Sequence[Path], size: tuple[int, int] | None, *, padding: bool | None) -> Parts:
    """A detector's networks from three files, in any order: which is which is seen from their channels.

    Args:
        size: of the networks' images, in place of what the autoencoder is made for, or else 256 x 256.
        padding: of networks whose files do not say it, as state dicts; ``None`` is the fork's default, no.

    Raises:
        DetectorFileError: a file cannot be read, or they are not the three networks of one detector.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_torch_file(path)) for path in paths]
        found = [network(file, file.value, padding=bool(padding)) for file in files]
    by_depth = sorted(found, key=lambda one: (_depth(one), _channels(one)))
    if [_depth(one) > 6 for one in by_depth] != [False, False, True]:
        raise DetectorFileError(
            f"{', '.join(map(str, paths))}: expected a teacher, a student and an autoencoder, one file of each."
        )
    try:
        recognised = recognise(*by_depth)
    except InputError as error:
        raise DetectorFileError(f"{', '.join(map(str, paths))}: {error}") from error
    if isinstance(recognised, str):
        raise DetectorFileError(f"{', '.join(map(str, paths))} do not belong together: {recognised}")
    preprocessing = Preprocessing(size or recognised.image_size or (256, 256), resize="pillow")
    sizes = recognised.upsample_sizes
    if sizes is not None and sizes != upsample_sizes_for(preprocessing.size, padding=recognised.teacher.padding):
        raise DetectorFileError(
            f"The autoencoder's nn.Upsample sizes are made for images of {recognised.image_size}, not of "
            f"{preprocessing.size}. Leave the size out, or give that one."
        )
    return Parts(
        recognised.teacher,
        recognised.student,
        recognised.autoencoder,
        "native",
        True,
        preprocessing=preprocessing,
        required=frozenset({STATISTICS, QUANTILES}),
        provenance={"made_by": "the widely used PyTorch implementation"},
    )


def recognised_teacher(source: object, pickled: nn.Sequential, *, padding: bool) -> PatchDescriptionNetwork:
    """A teacher that was pickled whole, as one that pads or not, which the weights do not depend on.

    Raises:
        DetectorFileError: its layers are not a teacher's.
    """
    recognised = recognise_teacher(pickled)
    if isinstance(recognised, str):
        raise DetectorFileError(f"{source}: {recognised}")
    teacher = PatchDescriptionNetwork(recognised.model_size, recognised.out_channels, padding=padding)
    teacher.load_state_dict(recognised.state_dict())
    return teacher.eval().requires_grad_(False)


def split(images: Sequence[_One]) -> tuple[list[_One], list[_One]]:
    """Training and validation images as the fork draws them, of a data set that has no validation images of its own.

    Args:
        images: sorted by name. All are in both halves where a half would be empty.
    """
    trained = int(0.9 * len(images))
    if trained == 0:
        return list(images), list(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(42)).tolist()
    return [images[index] for index in order[:trained]], [images[index] for index in order[trained:]]


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def _depth(module: nn.Module) -> int:
    return len(_convolutions(module))


def _channels(module: nn.Module) -> int:
    found = _convolutions(module)
    return len(found[-1].weight) if found else 0
