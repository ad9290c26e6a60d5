"""Models that were trained elsewhere: the numbers they give there, and what is said of what their files lack."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anomalib_networks import (
    QUANTILES,
    Compose,
    EfficientAdModel,
    Normalize,
    Resize,
    checkpoint,
    fill,
    saved,
    seeded_images,
    with_numbers,
)
from assertions import assert_close
from fork_networks import autoencoder, pdn_medium, pdn_small, plain_predict
from PIL import Image
from small_detector import small_detector
from tolerances import EXACT, tolerance
from torch import Tensor, nn
from torch.nn import Sequential
from typer.testing import CliRunner, Result

from efficientad_fast import Detector, Preprocessing, cli
from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.interop import fork
from efficientad_fast.interop.loading import Supplied, load_elsewhere
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.preprocess import normalise
from efficientad_fast.weights import load_teacher

CHANNELS = 6
IMAGE = (60, 90)
EXPECTED = json.loads((Path(__file__).parent / "interop" / "expected.json").read_text())

ROLES = ("teacher", "student", "autoencoder")
NUMBERS = {"q_st_start": 0.5, "q_st_end": 3.0, "q_ae_start": 0.25, "q_ae_end": 2.0}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def fork_networks(size: str = "s", *, padding: bool = False) -> dict[str, Sequential]:
    pdn = pdn_small if size == "s" else pdn_medium
    sizes = (3, 8, 15, 32, 63, 127, 64 if padding else 56)
    torch.manual_seed(0)
    made = pdn(CHANNELS, padding=padding), pdn(2 * CHANNELS, padding=padding), autoencoder(CHANNELS, sizes=sizes)
    for network in made:
        network.eval()
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return dict(zip(ROLES, made, strict=True))


def fork_folder(folder: Path, networks: dict[str, Sequential], *, whole: bool = True, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for role, network in networks.items():
        saved(network if whole else network.state_dict(), folder / f"{role}_final.pth", **options)
    return folder


def good_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index, pixels in enumerate(seeded_images(count, IMAGE)):
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def fork_input(path: Path) -> Tensor:
    """As the fork reads an image: Pillow's resize of 8-bit values."""
    resized = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(resized)).movedim(-1, 0).float() / 255).unsqueeze(0)


STATISTICS = {
    "teacher_mean": torch.linspace(-0.5, 0.5, CHANNELS).view(1, -1, 1, 1),
    "teacher_std": torch.linspace(0.5, 1.5, CHANNELS).view(1, -1, 1, 1),
}
Q = Quantiles(0.5, 3.0, 0.25, 2.0)


# The fork's three files


@pytest.mark.parametrize(
    ("size", "padding", "whole", "zipped", "dtype"),
    [
        ("s", False, True, True, torch.float64),
        ("s", True, True, False, torch.float32),
        ("s", True, False, True, torch.float32),
        ("m", False, False, False, torch.float32),
    ],
)
def test_three_files_give_the_fork_s_maps_and_scores(
    tmp_path: Path, size: str, padding: bool, whole: bool, zipped: bool, dtype: torch.dtype
) -> None:
    networks = fork_networks(size, padding=padding)
    folder = fork_folder(tmp_path / "out", networks, whole=whole, _use_new_zipfile_serialization=zipped)
    image = good_images(tmp_path / "images", 1) / "000.png"
    # Whole modules say themselves whether they pad; state dicts do not.
    given = {} if whole else {"padding": padding}
    detector = Detector.load(folder, quantiles=Q, threshold=1.0, **STATISTICS, **given)
    found = detector.predict(image, dtype=dtype, map_size="original")
    both = {role: network.to(dtype) for role, network in networks.items()}
    mean, std = (one.to(dtype) for one in STATISTICS.values())
    quantiles = (Q.st_start, Q.st_end, Q.ae_start, Q.ae_end)
    combined, _, _ = plain_predict(fork_input(image).to(dtype), *both.values(), mean, std, *quantiles)
    expected = F.interpolate(F.pad(combined, (4, 4, 4, 4)), IMAGE, mode="bilinear")[0, 0]
    assert_close(found.anomaly_map, expected, tolerance("map of another implementation", dtype))
    assert found.score == pytest.approx(float(expected.max()), rel=1e-4)
    assert (detector.map_convention, detector.preprocessing.resize, detector.threshold) == ("native", "pillow", 1.0)


def test_three_files_in_any_order_are_told_apart(tmp_path: Path) -> None:
    networks = fork_networks()
    folder = fork_folder(tmp_path / "out", networks)
    paths = [folder / f"{role}_final.pth" for role in ("autoencoder", "student", "teacher")]
    detector = Detector.load(paths, quantiles=Q, threshold=1.0, **STATISTICS)
    assert_close(detector.teacher.conv4.weight, networks["teacher"][8].weight, EXACT)
    assert_close(detector.student.conv4.weight, networks["student"][8].weight, EXACT)
    with pytest.raises(DetectorFileError, match="one file of each"):
        Detector.load([paths[1], paths[1], paths[2]])


def test_statistics_and_quantiles_of_a_folder_are_the_fork_s(tmp_path: Path) -> None:
    networks = fork_networks()
    folder = fork_folder(tmp_path / "out", networks)
    images = good_images(tmp_path / "good", 11)
    detector = Detector.load(folder, images=images)
    # Written anew: nine tenths of the sorted files, drawn by this seed, are for training.
    order = torch.randperm(11, generator=torch.Generator().manual_seed(42)).tolist()
    inputs = [fork_input(images / f"{index:03}.png") for index in order]
    with torch.no_grad():
        features = torch.cat([networks["teacher"](one) for one in inputs[:9]]).double()
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    std = ((features - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True).sqrt()
    assert_close(detector.teacher_mean, mean.flatten(), tolerance("features", torch.float32))
    assert_close(detector.teacher_std, std.flatten(), tolerance("features", torch.float32))
    maps = [plain_predict(one, *networks.values(), mean.float(), std.float()) for one in inputs[9:]]
    for start, end, which in (
        (detector.quantiles.st_start, detector.quantiles.st_end, 1),
        (detector.quantiles.ae_start, detector.quantiles.ae_end, 2),
    ):
        both = torch.cat([one[which].flatten() for one in maps])
        assert start == pytest.approx(float(both.quantile(0.9)), rel=1e-4)
        assert end == pytest.approx(float(both.quantile(0.995)), rel=1e-4)
    scores = [detector.predict(images / f"{index:03}.png").score for index in order[9:]]
    assert max(scores) <= detector.threshold < math.inf
    assert "9 images of good" in str(detector.provenance["statistics"])


@pytest.mark.parametrize("count", [1, 2, 9, 10, 219])
def test_every_image_is_in_one_half_of_the_fork_s_split(count: int) -> None:
    trained, validation = fork.split(range(count))
    assert trained and validation
    assert len(trained) == max(int(0.9 * count), 1)
    assert sorted({*trained, *validation}) == list(range(count))
    assert count == 1 or not {*trained} & {*validation}


def test_of_several_sets_the_final_one_is_taken(tmp_path: Path) -> None:
    networks = fork_networks()
    folder = fork_folder(tmp_path / "out", networks)
    for role in ROLES:
        (folder / f"{role}_tmp.pth").write_bytes(b"of an interrupted training")
    detector = Detector.load(folder, quantiles=Q, threshold=1.0, **STATISTICS)
    assert_close(detector.teacher.conv4.weight, networks["teacher"][8].weight, EXACT)
    (folder / "student_final.pth").unlink()
    with pytest.raises(DetectorFileError, match="one network"):
        Detector.load(folder / "teacher_final.pth")
    for role in ROLES:
        (folder / f"{role}_old.pth").write_bytes(b"")
    with pytest.raises(DetectorFileError, match="with the same ending"):
        Detector.load(folder)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "the teacher's mean and std, quantiles"),
        ({"quantiles": Q}, "the teacher's mean and std"),
        ({"quantiles": Q, "teacher_mean": STATISTICS["teacher_mean"]}, "the teacher's mean and std"),
        (STATISTICS, "quantiles"),
    ],
)
def test_what_three_files_lack_is_named_with_how_to_give_it(
    tmp_path: Path, given: dict[str, Any], missing: str
) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks(), whole=False)
    with pytest.raises(DetectorFileError, match=f"does not say: {missing}. .*images= .*--statistics FILE"):
        Detector.load(folder, **given)


def test_a_missing_threshold_is_told_and_calls_nothing_anomalous(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks(), whole=False)
    with pytest.warns(UserWarning, match="no threshold.*--threshold"):
        detector = Detector.load(folder, quantiles=Q, **STATISTICS)
    assert detector.threshold == math.inf


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    networks = fork_networks()
    folder = fork_folder(tmp_path / "out", networks | {"student": pdn_medium(2 * CHANNELS)})
    with pytest.raises(DetectorFileError, match="differ in size or padding"):
        Detector.load(folder)
    fork_folder(folder, {"student": pdn_small(3 * CHANNELS)})
    with pytest.raises(DetectorFileError, match="student must have 12 output channels"):
        Detector.load(folder)
    fork_folder(folder, {"student": Sequential(*networks["student"], nn.Sigmoid())})
    with pytest.raises(DetectorFileError, match="Sigmoid"):
        Detector.load(folder)
    fork_folder(folder, {"student": Sequential(nn.Conv2d(3, 9, 4))}, whole=False)
    with pytest.raises(DetectorFileError, match="no network of EfficientAD"):
        Detector.load(folder)
    narrow = pdn_small(2 * CHANNELS)
    narrow[0] = nn.Conv2d(3, 64, 4)
    fork_folder(folder, {"student": narrow}, whole=False)
    with pytest.raises(DetectorFileError, match=r"conv1.*published widths"):
        Detector.load(folder)


def test_a_network_size_that_whole_modules_are_not_made_for_is_refused(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    with pytest.raises(DetectorFileError, match="not of \\(256, 320\\)"):
        Detector.load(folder, quantiles=Q, threshold=1.0, size=(256, 320), **STATISTICS)
    fork_folder(folder, fork_networks(), whole=False)
    detector = Detector.load(folder, quantiles=Q, threshold=1.0, size=(256, 320), **STATISTICS)
    assert detector.size == (256, 320)


# anomalib's checkpoints

CALIBRATED = {"_image_threshold": 1.5, "image_min": 1.0, "image_max": 2.0}


def filled(
    size: str = "small", *, padding: bool = False, channels: int = CHANNELS, **settings: Any
) -> EfficientAdModel:
    statistics = settings.pop("statistics", True)
    model = EfficientAdModel(channels, size, padding, **settings).eval()
    fill(model, statistics=statistics)
    return model


@pytest.mark.parametrize(("size", "padding"), [("small", False), ("small", True), ("medium", False), ("medium", True)])
def test_a_checkpoint_gives_the_numbers_that_anomalib_gave(tmp_path: Path, size: str, padding: bool) -> None:
    model = filled(size, padding=padding, channels=EXPECTED["channels"])
    path = saved(with_numbers(checkpoint(model, size), **CALIBRATED), tmp_path / "model.ckpt")
    detector = Detector.load(path)
    image = seeded_images(1)[0]
    expected = EXPECTED["expected"][f"{size}, padding {padding}"]
    pixels = torch.tensor(expected["pixels"], dtype=torch.float64)
    places = torch.linspace(0, 256 * 256 - 1, len(pixels)).long()
    # In float64 medium networks take long.
    for dtype in (torch.float32,) if size == "medium" else (torch.float64, torch.float32):
        found = detector.predict(image, dtype=dtype)
        assert found.score == pytest.approx(expected["score"], rel=1e-5 if dtype == torch.float64 else 1e-4)
        flat = torch.from_numpy(found.anomaly_map).flatten().double()
        assert_close(flat[places], pixels, tolerance("map of another implementation", dtype))
        assert float(flat.norm()) == pytest.approx(expected["norm"], rel=1e-5)
    assert detector.threshold == 1.5 and found.label == (expected["score"] > 1.5)


def test_what_a_checkpoint_says_comes_along(tmp_path: Path) -> None:
    model = filled(padding=True, pad_maps=False)
    path = saved(with_numbers(checkpoint(model), **CALIBRATED), tmp_path / "model.ckpt")
    for source in (path, tmp_path):
        detector = Detector.load(source)
        assert (detector.map_convention, detector.pad_maps, detector.teacher.padding) == ("resized", False, True)
        assert detector.preprocessing == Preprocessing((256, 256), "antialias")
        assert detector.quantiles is not None
        assert astuple(detector.quantiles) == pytest.approx(tuple(QUANTILES.values()))
        assert_close(detector.teacher_std, model.mean_std["std"].flatten(), EXACT)
        assert detector.provenance["made_by"] == "anomalib"


def test_zeros_mean_not_set(tmp_path: Path) -> None:
    model = filled(statistics=False)
    path = saved(with_numbers(checkpoint(model), **CALIBRATED), tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="no quantiles"):
        detector = Detector.load(path)
    assert detector.quantiles is None
    image = seeded_images(1)[0]
    with torch.no_grad():
        expected = model(torch.from_numpy(image).movedim(-1, 0).unsqueeze(0) / 255).anomaly_map[0, 0]
    assert_close(
        detector.predict(image).anomaly_map, expected, tolerance("map of another implementation", torch.float32)
    )


@pytest.mark.parametrize(
    ("config", "numbers", "expected"),
    [
        ({}, (1.5, 1.0, 2.0), 1.5),
        ({"image_sensitivity": 0.3}, (1.5, 1.0, 2.0), 1.7),
        ({"image_sensitivity": 0.0}, (1.5, 1.0, 2.0), math.inf),
        ({}, (math.nan, 1.0, 2.0), 1.5),
        ({}, (1.75, math.nan, math.nan), 0.5),
        ({"enable_normalization": False, "image_sensitivity": 0.2}, (1.75, 1.0, 2.0), 0.8),
        ({"enable_thresholding": False}, (1.5, 1.0, 2.0), None),
        ({}, (math.nan, math.nan, math.nan), None),
    ],
)
def test_the_threshold_is_where_anomalib_s_decision_turns(
    tmp_path: Path, config: dict[str, Any], numbers: tuple[float, ...], expected: float | None
) -> None:
    content = checkpoint(filled(), anomalib_post_processor_config=config)
    content = with_numbers(content, **dict(zip(("_image_threshold", "image_min", "image_max"), numbers, strict=True)))
    path = saved(content, tmp_path / "model.ckpt")
    if expected is None:
        with pytest.warns(UserWarning, match="no threshold"):
            assert Detector.load(path).threshold == math.inf
        assert Detector.load(path, threshold=3.0).threshold == 3.0
    else:
        assert Detector.load(path).threshold == pytest.approx(expected)
        assert Detector.load(path, threshold=3.0).threshold == 3.0


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        ({"class_path": "torchvision.transforms.v2.CenterCrop", "init_args": {"size": [256, 256]}}, "CenterCrop"),
        ({"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [256]}}, r"size=\[256\]"),
        (
            {
                "class_path": "torchvision.transforms.v2.Resize",
                "init_args": {"size": [256, 256], "interpolation": "bicubic"},
            },
            "bicubic",
        ),
        ({"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [128, 128]}}, "too small"),
        (None, "nothing"),
    ],
)
def test_preprocessing_that_is_not_one_resize_is_named_and_can_be_replaced(
    tmp_path: Path, transform: Any, named: str
) -> None:
    content = checkpoint(filled(), anomalib_pre_processor_config={"transform": transform})
    path = saved(with_numbers(content, **CALIBRATED), tmp_path / "model.ckpt")
    with pytest.raises(DetectorFileError, match=f"the network size.*{named}.*size= .*--size"):
        Detector.load(path)
    assert Detector.load(path, size=(256, 320)).size == (256, 320)


def test_a_size_other_than_the_default_comes_along(tmp_path: Path) -> None:
    content = checkpoint(filled())
    spec = content["anomalib_pre_processor_config"]["transform"]["init_args"]["transforms"][0]
    spec["init_args"]["size"] = (320, 288)
    path = saved(with_numbers(content, **CALIBRATED), tmp_path / "model.ckpt")
    assert Detector.load(path).size == (320, 288)


def of_anomalib_1(model: EfficientAdModel, transform: Any, threshold: float = 1.5) -> dict[str, Any]:
    content = checkpoint(model, transform=transform)
    for name in [name for name in content if name.startswith("anomalib_")]:
        del content[name]
    state = {name: value for name, value in content["state_dict"].items() if not name.startswith("post_processor.")}
    name = "anomalib.metrics.threshold.f1_adaptive_threshold.F1AdaptiveThreshold"
    state |= {"image_threshold_class": name, "image_threshold.value": torch.tensor(threshold)}
    return content | {"state_dict": state}


def test_checkpoints_of_anomalib_1(tmp_path: Path) -> None:
    """Held to anomalib itself in tests/interop/parity_1.py."""
    path = saved(of_anomalib_1(filled(), Compose([Resize([320, 288])])), tmp_path / "model.ckpt")
    detector = Detector.load(path)
    assert detector.size == (320, 288) and detector.threshold == pytest.approx(1.5)
    score = detector.predict(seeded_images(1)[0]).score
    saved(of_anomalib_1(filled(), Resize([320, 288]), score), path)
    # An image is anomalous whose score is the threshold.
    assert Detector.load(path).predict(seeded_images(1)[0]).label
    others = (None, "nothing"), (Compose([Resize([320, 288]), nn.ReLU()]), "Resize, ReLU")
    for transform, named in (*others, (Compose([Resize([320, 288]), Normalize([0.5], [0.5])]), r"mean=\[0\.5\]")):
        saved(of_anomalib_1(filled(), transform), path)
        with pytest.raises(DetectorFileError, match=f"the network size.*{named}"):
            Detector.load(path)


def test_images_that_are_normalised_before_the_network_does_it(tmp_path: Path) -> None:
    transform = Compose([Resize([256, 256]), Normalize([0.4, 0.5, 0.6], [0.3, 0.2, 0.1])])
    detector = Detector.load(saved(of_anomalib_1(filled(), transform), tmp_path / "model.ckpt"))
    image = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    first = (image - torch.tensor(transform.transforms[1].mean).view(3, 1, 1)) / torch.tensor(
        transform.transforms[1].std
    ).view(3, 1, 1)
    assert_close(detector.preprocessing(image), normalise(first), tolerance("preprocess", torch.float32))


def test_checkpoints_that_do_not_say_how_images_are_resized_need_to_be_told(tmp_path: Path) -> None:
    content = of_anomalib_1(filled(), None)
    del content["transform"]
    path = saved(content, tmp_path / "model.ckpt")
    with pytest.raises(DetectorFileError, match=r"the network size.*does not say.*size= .*--size"):
        Detector.load(path)
    assert Detector.load(path, size=(256, 320)).size == (256, 320)


def test_a_bare_state_dict_of_anomalib_s_torch_model_needs_to_be_told_the_padding(tmp_path: Path) -> None:
    path = saved(filled(padding=True).state_dict(), tmp_path / "model.pt")
    with pytest.raises(DetectorFileError, match=r"whether the networks pad.*padding= .*--no-padding"):
        Detector.load(path)
    assert Detector.load(path, padding=True, threshold=1.0).teacher.padding


def test_other_checkpoints_are_named(tmp_path: Path) -> None:
    path = saved({"state_dict": {"model.layer.weight": torch.ones(3)}, "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(DetectorFileError, match="a dictionary of state_dict, epoch, and no network of EfficientAD"):
        Detector.load(path)
    saved({"model": filled()}, path)
    with pytest.raises(DetectorFileError, match="exported"):
        Detector.load(path)
    with pytest.raises(DetectorFileError, match="holds no detector"):
        Detector.load(Path(__file__).parent / "interop")


def test_what_is_none_is_named(tmp_path: Path) -> None:
    for path in ("", None, 3, b"model.pth"):
        with pytest.raises(InputError, match="path must be"):
            Detector.load(path)  # type: ignore[arg-type]  # which is what is tried
    for name in ("model.onnx", "model.xml"):
        (tmp_path / name).write_bytes(b"<?xml version='1.0'?>")
        with pytest.raises(DetectorFileError, match="exported model"):
            Detector.load(tmp_path / name)
    small_detector().save(tmp_path / "own.safetensors")
    with pytest.raises(DetectorFileError, match=r"Give the file itself: .*own\.safetensors"):
        Detector.load(tmp_path)


def test_statistics_of_other_types_are_refused(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    for name in ("teacher_mean", "teacher_std"):
        given: dict[str, Any] = STATISTICS | {name: [0.0] * CHANNELS}
        with pytest.raises(InputError, match=f"{name} must be a tensor.*got list"):
            Detector.load(folder, quantiles=Q, threshold=1.0, **given)
    with pytest.raises(InputError, match=r"quantiles must be an efficientad_fast\.Quantiles, got a tuple"):
        Detector.load(folder, quantiles=(0, 1, 0, 1), threshold=1.0, **STATISTICS)  # type: ignore[arg-type]  # as above


def test_images_that_nothing_is_missing_for_are_said_to_be_unused(tmp_path: Path) -> None:
    path = saved(with_numbers(checkpoint(filled()), **CALIBRATED), tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="were not used"):
        assert Detector.load(path, images=good_images(tmp_path / "images", 2)).threshold == 1.5


def test_what_images_gave_is_not_said_to_be_missing(tmp_path: Path) -> None:
    path = saved(checkpoint(filled(statistics=False)), tmp_path / "model.ckpt")
    detector = Detector.load(path, images=good_images(tmp_path / "images", 2))
    assert detector.quantiles is not None and detector.threshold < math.inf


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    path = saved(pdn_small(768).state_dict(), tmp_path / "student.pth")
    with pytest.raises(DetectorFileError, match="holds a student: 768 channels"):
        load_teacher(path)


def test_a_folder_of_two_detectors_is_refused(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    saved(checkpoint(filled()), folder / "model.ckpt")
    with pytest.raises(DetectorFileError, match=r"several detectors: .*teacher_final\.pth.*model\.ckpt"):
        Detector.load(folder, quantiles=Q, threshold=1.0, **STATISTICS)


def test_a_detector_of_this_package_needs_nothing_else(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt", "model.pth", "model.ckpt"):
        path = small_detector().save(tmp_path / name)
        assert Detector.load(path).threshold == 0.25
    with pytest.raises(DetectorFileError, match=r"safetensors file.*no converting"):
        load_elsewhere(path, Supplied())
    with pytest.raises(InputError, match="leave out threshold"):
        Detector.load(path, threshold=1.0)


# Teachers


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["s", "m"])
def test_teachers_of_both_are_read(tmp_path: Path, size: str, padding: bool) -> None:
    theirs = fork_networks(size)["teacher"]
    paths = [saved(theirs.state_dict(), tmp_path / "teacher_small.pth"), saved(theirs, tmp_path / "teacher_final.pth")]
    model = filled("small" if size == "s" else "medium")
    paths.append(saved(model.teacher.state_dict(), tmp_path / "pretrained_teacher.pth"))
    paths.append(saved(checkpoint(model), tmp_path / "model.ckpt"))
    weights = [theirs[0].weight] * 2 + [model.teacher.conv1.weight] * 2
    for path, expected in zip(paths, weights, strict=True):
        teacher, provenance = load_teacher(path, padding=padding)
        assert (teacher.model_size, teacher.padding, teacher.training) == (size, padding, False)
        assert_close(teacher.conv1.weight, expected, EXACT)
        assert path.name in provenance["made_by"]
    path = saved(model.ae.state_dict(), tmp_path / "autoencoder.pth")
    with pytest.raises(DetectorFileError, match="holds an autoencoder"):
        load_teacher(path)


# The command line


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_convert_writes_a_detector_of_this_package(tmp_path: Path) -> None:
    path = saved(with_numbers(checkpoint(filled()), **CALIBRATED), tmp_path / "model.ckpt")
    out = tmp_path / "model.safetensors"
    result = _run("convert", path, "--out", out)
    assert result.exit_code == 0, result.output
    assert "EfficientAD-S, 256 x 256, threshold 1.5000" in result.stdout
    image = seeded_images(1)[0]
    assert Detector.load(out).predict(image).score == Detector.load(path).predict(image).score


def test_convert_says_what_is_missing_and_takes_it_from_a_file(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    out = tmp_path / "model.safetensors"
    result = _run("convert", folder, "--out", out)
    assert result.exit_code == 2 and "the teacher's mean and std, quantiles" in result.stderr and not out.exists()
    lists = {name: one.flatten().tolist() for name, one in STATISTICS.items()}
    (tmp_path / "statistics.json").write_text(json.dumps(NUMBERS | lists))
    saved({name: torch.tensor(one) for name, one in NUMBERS.items()} | STATISTICS, tmp_path / "statistics.pth")
    for name in ("statistics.json", "statistics.pth"):
        result = _run("convert", folder, "--statistics", tmp_path / name, "--out", out)
        assert result.exit_code == 0, result.output
        assert "no threshold" in result.stdout
        detector = Detector.load(out)
        assert detector.quantiles == Q
        assert_close(detector.teacher_mean, STATISTICS["teacher_mean"].flatten(), EXACT)
    result = _run("convert", folder, "--statistics", tmp_path / "statistics.json", "--threshold", 2, "--out", out)
    assert result.exit_code == 0 and "threshold 2.0000" in result.stdout


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "neither JSON"),
        ("[1]", "must hold some of"),
        ('{"mean": [1]}', "must hold some of"),
        ('{"teacher_mean": "far"}', "numbers"),
        ('{"q_st_start": 1}', "all of q_st_start"),
        ('{"threshold": [1, 2]}', "one number"),
        (json.dumps(NUMBERS | {"teacher_mean": [0] * CHANNELS, "teacher_std": [0] * CHANNELS}), "above 0"),
        (
            json.dumps(NUMBERS | {"q_st_end": 0, "teacher_mean": [0] * CHANNELS, "teacher_std": [1] * CHANNELS}),
            "ends above their starts",
        ),
        (None, "cannot be read"),
    ],
)
def test_convert_refuses_statistics_that_are_none(tmp_path: Path, content: str | None, why: str) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    if content is not None:
        (tmp_path / "statistics.json").write_text(content)
    result = _run("convert", folder, "--statistics", tmp_path / "statistics.json", "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 2 and why in result.stderr


def test_lists_of_statistics_that_hold_each_other_are_refused(tmp_path: Path) -> None:
    folder = fork_folder(tmp_path / "out", fork_networks())
    doubled: list[Any] = [1.0]
    for _ in range(60):
        doubled = [doubled, doubled]
    endless: list[Any] = []
    endless += [endless] * 1000
    for value in (doubled, endless, [1.0] * 2**17):
        path = saved({"teacher_mean": value}, tmp_path / "statistics.pth")
        result = _run("convert", folder, "--statistics", path, "--out", tmp_path / "m.safetensors")
        assert result.exit_code == 2 and "more than 65536" in result.stderr


def test_the_command_line_predicts_with_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    path = saved(checkpoint(filled()), tmp_path / "model.ckpt")
    warnings.simplefilter("default")
    result = _run("predict", path, good_images(tmp_path / "images", 1))
    assert result.exit_code == 0, result.output
    assert "no threshold" in result.stderr and "warn" not in result.stderr
    assert result.stdout.split("\t")[1] == "good"
