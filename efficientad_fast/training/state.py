"""Training that can be interrupted: what a later process needs to continue to the same result.

Everything random in a step is drawn from a generator seeded by (seed, step), so the state is the step number, the
networks and the optimiser, and no generator's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.files import read_tensors, write_tensors


def step_seed(seed: int, step: int, purpose: str = "") -> int:
    """A seed for one step, unrelated to those of its neighbours; in [0, 2^63)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fingerprint(paths: Sequence[Path]) -> str:
    """What identifies a set of files without reading them: a hash over names and sizes, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def save_state(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, step: int, run: Mapping[str, Any]
) -> None:
    """Write networks, optimiser and step number atomically. ``run``: what a resumed run must share (settings, data)."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = value
    for index, entries in optimiser.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"optimiser.{index}.{key}"] = torch.as_tensor(value)
    write_tensors(path, tensors, {"step": str(step), "run": json.dumps(dict(run), sort_keys=True)})


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, run: Mapping[str, Any]
) -> int:
    """Fill networks and optimiser from :func:`save_state`'s file and return the step to continue with.

    Raises:
        DetectorFileError: the file is damaged.
        InputError: it belongs to a run with other settings or data; the message names what differs.
    """
    tensors, metadata = read_tensors(path)
    try:
        stored, step = json.loads(metadata["run"]), int(metadata["step"])
    except (KeyError, ValueError) as error:
        raise DetectorFileError(f"{path} is not a training state ({error}). Remove it to start anew.") from error
    wanted = json.loads(json.dumps(dict(run)))
    for key in sorted(wanted.keys() | stored.keys()):
        if wanted.get(key) != stored.get(key):
            raise InputError(
                f"{path} was made with {key} = {stored.get(key)!r}, but this run has {wanted.get(key)!r}. "
                "Give the same settings and images to resume, or leave out --resume to start anew."
            )
    try:
        for name, module in modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            )
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, field = key.split(".", 2)
                entries.setdefault(int(index), {})[field] = value
        optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise DetectorFileError(
            f"{path} does not hold the networks and the optimiser of this run ({error}). Remove it to start anew."
        ) from error
    _lay_out_like_parameters(optimiser)
    return step


def _lay_out_like_parameters(optimiser: torch.optim.Optimizer) -> None:
    """Give each moment the strides of its parameter, which the file does not keep: mixed ones halve the speed."""
    for parameter, entries in optimiser.state.items():
        for field, value in entries.items():
            if value.shape == parameter.shape:
                entries[field] = torch.empty_like(parameter, requires_grad=False).copy_(value)


class Interruption:
    """Whether the user asked to stop. Set by the first Ctrl-C inside :func:`interruptible`; a second one raises."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn the first Ctrl-C into a request that a training loop looks at between two steps.

    Outside the main thread, where no handler can be set, the request never comes and Ctrl-C acts as ever.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def request(signum: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
