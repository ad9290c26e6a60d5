"""Files that are written whole or not at all, and tensors in them."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from efficientad_fast.errors import DetectorFileError


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success sync it and rename it to ``target``.

    The suffix of the temporary path is that of ``target``, since some writers choose the format by it. Where the
    block raises, the temporary file is removed and ``target`` is left as it was. A process killed in between
    leaves ``target`` whole and at most a hidden ``.NAME.*.partial*`` file beside it.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial{target.suffix}")
    # Made here, so that its mode is what the umask of the process and the folder give to a new file.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        yield temporary
        # A writer may have put a file of its own in the place of this one.
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are brought to the CPU, their dtype is kept."""
    # Copies, since the format refuses tensors that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; no pickle is involved.

    Raises:
        DetectorFileError: the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise DetectorFileError(f"There is no file {path}. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DetectorFileError(
            f"{path} is not a safetensors file, or it is damaged ({error}). Copy it again, or make it again."
        ) from error
