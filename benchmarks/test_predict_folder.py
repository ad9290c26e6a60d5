"""A folder of real images, S, 256x256, float32, CPU: all of ``predict``, beside the kernels' own time for its batches.

The kernels' own time is that of the plan over the same batches, preprocessed and in memory before the clock starts:
what `predict` takes more is reading, decoding, preprocessing, and handing predictions over.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientad_fast import Detector
from efficientad_fast.data.folders import list_images
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork
from tests.conftest import data_root  # noqa: F401 (a fixture)

IMAGES, ROUNDS = 32, 9


@pytest.fixture(scope="module")
def folder(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """IMAGES photographs of magnetic tiles, about 250 x 300 JPEG, of every kind in turn."""
    source = data_root / "magnetic_tile" / "test"
    if not source.is_dir():
        pytest.skip(f"no real images: {source} is no folder; set EFFICIENTAD_FAST_DATA to one that has magnetic_tile")
    found = list_images(source)
    folder = tmp_path_factory.mktemp("tiles")
    for index in range(IMAGES):
        path = found[index * len(found) // IMAGES]
        shutil.copy(path, folder / f"{index:03d}{path.suffix}")
    return folder


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    networks = PatchDescriptionNetwork("s", 384), PatchDescriptionNetwork("s", 768), Autoencoder(384)
    return Detector(*networks, torch.zeros(384), torch.ones(384), quantiles=Quantiles(0.0, 1.0, 0.0, 1.0))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("batch_size", [8, 1])
def test_folder(
    benchmark: Any, detector: Detector, folder: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, preprocessing = detector.plan(), detector.preprocessing
    images = [preprocessing.decode(path) for path in list_images(folder)]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    starts = range(0, IMAGES, batch_size)
    batches = [
        (preprocessing.batch(images[start : start + batch_size]), sizes[start : start + batch_size]) for start in starts
    ]

    def kernels() -> list[Tensor]:
        return [plan.run(*batch)[0] for batch in batches]

    def predict() -> Any:
        return detector.predict(folder, batch_size=batch_size)

    scores = [prediction.score for prediction in predict()]
    assert scores == pytest.approx(torch.cat(kernels()).tolist(), rel=1e-6)

    own: list[float] = []
    benchmark.group = f"predict, a folder of {IMAGES} real images, S, 256x256, batch {batch_size}, float32, cpu"
    # Before each round, so that both see the same machine; the first, in which the heap grows, is left out.
    benchmark.pedantic(predict, setup=lambda: own.append(seconds(kernels)), rounds=ROUNDS, warmup_rounds=1)
    own, whole = own[-ROUNDS:], benchmark.stats.stats.data
    figures = {
        "kernels_ms_an_image": 1e3 * statistics.median(own) / IMAGES,
        "predict_ms_an_image": 1e3 * statistics.median(whole) / IMAGES,
        "ratio": statistics.median(whole) / statistics.median(own),
        "ratio_of_fastest": min(whole) / min(own),
    }
    benchmark.extra_info.update(images=IMAGES, batch=batch_size, **figures)
    with capsys.disabled():
        print(f"\n  {benchmark.group}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
