"""What the tests share: the folder of real images, and skipping what this machine cannot run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# What a script starts in the background ignores Ctrl-C, and so would all that is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.mend()
    # It takes as long for a small tile as for a large one. Tiles that ship are tried in test_triton_kernels.py.
    os.environ["EFFICIENTAD_FAST_TILES"] = str(ROOT / "tests" / "interpreter_tiles.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or torch.cuda.is_available():
        return
    build = "a CPU build" if torch.version.cuda is None else "a CUDA build, but finds no GPU"
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU; PyTorch {torch.__version__} is {build}"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real images: EFFICIENTAD_FAST_DATA, or shared/data beside the checkout."""
    given = os.environ.get("EFFICIENTAD_FAST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is no folder; set EFFICIENTAD_FAST_DATA to one")
    return folder
