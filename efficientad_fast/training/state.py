"""Training that can be interrupted: what a later process needs to continue to the same result.

Everything random in a step is drawn from a generator seeded by (seed, step), so the state is the step number, the
networks and the optimiser, and no generator's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        digest.update(os.fsencode(path.name) + f"\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """A hash over a network's parameters and buffers, whatever their device and layout."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FileSizes = Sequence[Sequence[Any]]
"""Names and sizes in bytes of a set of files, in order: pairs, which JSON gives back as lists."""


def file_sizes(paths: Sequence[Path]) -> FileSizes:
    """What a later run compares a set of files by, so that it can name those that differ."""
    return [(path.name, path.stat().st_size) for path in paths]


def _differing_files(stored: FileSizes, wanted: FileSizes, shown: int = 5) -> str:
    before, now = (Counter((str(name), int(size)) for name, size in files) for files in (stored, wanted))
    gone, added = ([name for name, _ in (left - right).elements()] for left, right in ((before, now), (now, before)))
    changed = [name for name in gone if name in added]
    groups = {
        "missing": [name for name in gone if name not in changed],
        "new": [name for name in added if name not in changed],
        "of another size": changed,
    }
    parts = []
    for what, names in groups.items():
        if names:
            more = f" and {len(names) - shown} more" if len(names) > shown else ""
            parts.append(f"{what}: {', '.join(names[:shown])}{more}")
    return "; ".join(parts) or "the same files in another order"


def check_same_run(
    path: Path,
    stored: tuple[Mapping[str, Any], Mapping[str, FileSizes]],
    wanted: tuple[Mapping[str, Any], Mapping[str, FileSizes]],
) -> None:
    """Refuse what ``path`` keeps of another run.

    Args:
        stored, wanted: settings by name, and sets of files by what they are (such as ``"training images"``).

    Raises:
        InputError: they differ; the message names the setting, or the files.
    """
    settings, others = json.loads(json.dumps([stored[0], wanted[0]]))
    advice = "Give the same settings and images to resume, or --restart to drop it and start anew."
    for key in sorted(settings.keys() | others.keys()):
        if settings.get(key) != others.get(key):
            raise InputError(
                f"{path} was made with {key} = {settings.get(key)!r}, but this run has {others.get(key)!r}. {advice}"
            )
    files, other_files = json.loads(json.dumps([stored[1], wanted[1]]))
    for key in sorted(files.keys() | other_files.keys()):
        if files.get(key, []) != other_files.get(key, []):
            difference = _differing_files(files.get(key, []), other_files.get(key, []))
            raise InputError(f"{path} was made with other {key} ({difference}). {advice}")


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    step: int,
    run: Mapping[str, Any],
    files: Mapping[str, FileSizes] | None = None,
) -> None:
    """Write networks, optimiser and step number atomically.

    Args:
        run: settings that a resumed run must share.
        files: the same of sets of files, see :func:`file_sizes`.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = value
    for index, entries in optimiser.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"optimiser.{index}.{key}"] = torch.as_tensor(value)
    metadata = {
        "step": str(step),
        "run": json.dumps(dict(run), sort_keys=True),
        "files": json.dumps(dict(files or {}), sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


@dataclass(frozen=True)
class KeptState:
    """What :func:`save_state` wrote: the run can be looked at before any network is touched."""

    path: Path
    step: int
    run: Mapping[str, Any]
    files: Mapping[str, FileSizes] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)

    def check(self, run: Mapping[str, Any], files: Mapping[str, FileSizes] | None = None) -> None:
        """Refuse, with an :class:`InputError` that names the difference, to continue another run."""
        check_same_run(self.path, (self.run, self.files), (run, files or {}))

    def restore(self, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> int:
        """Fill networks and optimiser, and return the step to continue with.

        Raises:
            DetectorFileError: they are not those that were saved.
        """
        try:
            for name, module in modules.items():
                prefix = f"{name}."
                module.load_state_dict(
                    {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
                )
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in self.tensors.items():
                if key.startswith("optimiser."):
                    _, index, name = key.split(".", 2)
                    entries.setdefault(int(index), {})[name] = value
            optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
        except (KeyError, ValueError, RuntimeError) as error:
            raise DetectorFileError(
                f"{self.path} does not hold the networks and the optimiser of this run ({error}). "
                "Give --restart to drop it and start anew."
            ) from error
        _lay_out_like_parameters(optimiser)
        return self.step


def read_state(path: Path) -> KeptState:
    """Read :func:`save_state`'s file.

    Raises:
        DetectorFileError: it is missing, damaged or something else.
    """
    tensors, metadata = read_tensors(path)
    try:
        run, files, step = json.loads(metadata["run"]), json.loads(metadata.get("files", "{}")), int(metadata["step"])
        if not isinstance(run, dict) or not isinstance(files, dict):
            raise ValueError("its run is no table")
    except (KeyError, ValueError) as error:
        raise DetectorFileError(
            f"{path} is not a training state ({error}). Give --restart to drop it and start anew."
        ) from error
    return KeptState(path, step, run, files, tensors)


def load_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    run: Mapping[str, Any],
    files: Mapping[str, FileSizes] | None = None,
) -> int:
    """Fill networks and optimiser from :func:`save_state`'s file and return the step to continue with.

    Raises:
        DetectorFileError: the file is damaged.
        InputError: it belongs to a run with other settings or files; the message names what differs.
    """
    state = read_state(path)
    state.check(run, files)
    return state.restore(modules, optimiser)


def count_steps(path: Path) -> int:
    """The steps that the state at ``path`` holds; 0 where there is none.

    Raises:
        DetectorFileError: it is damaged.
    """
    return read_state(path).step if path.exists() else 0


def find_state(
    path: Path, run: Mapping[str, Any], files: Mapping[str, FileSizes], *, resume: bool, restart: bool
) -> KeptState | None:
    """The state of an interrupted run that is to be continued; ``None`` where there is none, or it is to be dropped.

    Raises:
        DetectorFileError: it is damaged.
        InputError: there is one, but neither ``resume`` nor ``restart`` is true, or it belongs to another run.
    """
    if resume and restart:
        raise InputError("--resume and --restart exclude each other: give one of them.")
    if restart or not path.exists():
        return None
    state = read_state(path)
    if not resume:
        raise InputError(
            f"{path} holds {state.step} of {state.run.get('steps')} steps of an interrupted run. "
            "Give --resume to continue it, or --restart to drop it and start anew."
        )
    state.check(run, files)
    return state


def _lay_out_like_parameters(optimiser: torch.optim.Optimizer) -> None:
    """Give each moment the strides of its parameter, which the file does not keep: mixed ones halve the speed."""
    for parameter, entries in optimiser.state.items():
        for name, value in entries.items():
            if value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


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
