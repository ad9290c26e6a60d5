"""``predict``: a drop-in for the function of that name in the PyTorch implementation that most others start from.

Plain modules go in and maps come out; in between, the weights are packed once per set of modules.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from efficientad_fast.errors import InputError
from efficientad_fast.plan import DTYPES, Plan, PlanInput, build_plan
from efficientad_fast.reference import maps
from efficientad_fast.reference.networks import (
    Autoencoder,
    Decoder,
    Encoder,
    ModelSize,
    PatchDescriptionNetwork,
    feature_size,
)

CAPACITY = 8
"""Sets of modules whose packed weights are kept; the one that was used longest ago goes first."""


class NotPackedWarning(UserWarning):
    """:func:`predict` ran modules through their own forward; the message says why and what to do."""


def predict(
    image: Tensor,
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    teacher_mean: Tensor,
    teacher_std: Tensor,
    q_st_start: float | Tensor | None = None,
    q_st_end: float | Tensor | None = None,
    q_ae_start: float | Tensor | None = None,
    q_ae_end: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Anomaly maps of a batch of images, from the three networks as plain modules. SPEC "Maps and score".

    Networks are recognised, and their weights packed, where all three are in eval mode and are either ``nn.Sequential``
    of the layers of PDN-S, PDN-M (padded or not) and the autoencoder, or :class:`PatchDescriptionNetwork` and
    :class:`Autoencoder` of this package. The hidden widths are those of the paper; C is free. All others, in train
    mode, with forward hooks or under autocast, go through their own forward, with one :class:`NotPackedWarning`
    per set of modules and reason. So does an autoencoder whose ``nn.Upsample`` sizes are not those of the image.

    Weights are packed again when they have changed: in-place updates, optimizer steps, ``load_state_dict``, ``.to()``,
    ``.half()``, replaced parameters or layers, edited layer settings. Not noticed are changes that PyTorch does not
    record: in-place edits through ``.data``, through numpy or DLPack, from another process, of parameters that
    were created in inference mode, by a replayed CUDA graph, or by calling ``torch._fused_*`` directly.
    Call :func:`forget` after those.

    Packed weights take as much memory as the networks, are kept for the last :data:`CAPACITY` sets of modules, and
    are freed with the modules. Safe to call from several threads.

    Args:
        image: ``(N, 3, H, W)``, preprocessed, in the dtype and on the device of the networks.
        teacher: to ``(N, C, h, w)``.
        student: to ``(N, 2C, h, w)``; the first C channels predict the teacher, the others the autoencoder.
        autoencoder: to ``(N, C, h, w)``.
        teacher_mean, teacher_std: ``(1, C, 1, 1)``, the teacher's channel statistics. Like the quantiles, they may
            differ from call to call at no cost.
        q_st_start, q_st_end, q_ae_start, q_ae_end: quantiles. A map is normalised where its start is given, without
            regard to division by zero: where start and end are equal, it holds infinities and NaN.

    Returns:
        ``(map_combined, map_st, map_ae)``, each ``(N, 1, h, w)``, without gradient:
        ``0.5 map_st + 0.5 map_ae``, and both maps, normalised where quantiles are given. Dtypes are those of the
        plain PyTorch expressions; half-precision features are subtracted and squared in float32.

    Raises:
        InputError: an argument has the wrong type, shape, dtype or device, the networks' channels or sizes do not
            fit, or a quantile is missing.
    """
    networks = {"teacher": teacher, "student": student, "autoencoder": autoencoder}
    _check_arguments(image, networks, {"teacher_mean": teacher_mean, "teacher_std": teacher_std})
    for start, end, kind in ((q_st_start, q_st_end, "st"), (q_ae_start, q_ae_end, "ae")):
        if start is not None and end is None:
            raise InputError(f"q_{kind}_end must be given together with q_{kind}_start, got None.")
    entry, packed = _look_up(networks, (image.shape[-2], image.shape[-1]))
    refusal = packed if isinstance(packed, str) else _refusal_of_call(image, packed)
    if refusal is None and isinstance(packed, _Packed) and packed.plan is not None:
        _check_placed(image, packed)
        _check_statistics(teacher_mean, teacher_std, packed.channels)
        with torch.no_grad():
            map_st, map_ae = packed.plan.raw_maps(image, statistics=(teacher_mean, teacher_std))
            promoted = torch.promote_types(teacher_mean.dtype, teacher_std.dtype)
            map_st, map_ae = map_st.to(torch.promote_types(packed.dtype, promoted)), map_ae.to(packed.dtype)
    else:
        map_st, map_ae = _own_forward(image, networks, teacher_mean, teacher_std)
        if refusal is not None and entry.warns_first_time(refusal):
            warnings.warn(
                f"efficientad_fast.predict ran these modules through their own forward: {refusal}",
                NotPackedWarning,
                stacklevel=2,
            )
    with torch.no_grad():
        if q_st_start is not None and q_st_end is not None:
            map_st = maps.normalise_map(map_st, q_st_start, q_st_end)
        if q_ae_start is not None and q_ae_end is not None:
            map_ae = maps.normalise_map(map_ae, q_ae_start, q_ae_end)
        return 0.5 * map_st + 0.5 * map_ae, map_st, map_ae


def forget() -> None:
    """Drop all packed weights, and which warnings were given: the next :func:`predict` packs anew."""
    with _lock:
        _entries.clear()
