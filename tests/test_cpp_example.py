"""examples/cpp: what it makes of a detector's file is what Python does, and what it says of files that are none."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_detector import CHANNELS, small_detector

from efficientad_fast import Detector, native
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import FEATURE_CHANNELS, Autoencoder, PatchDescriptionNetwork

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
TOLERANCE = 1e-5  # of the largest number of a map

pytestmark = pytest.mark.skipif(not native.is_built("cpu"), reason=f"no CPU library: {native.why_not_built('cpu')}")


def find_cmake() -> str | None:
    """The environment's, which need not be on PATH, else the system's."""
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else shutil.which("cmake")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program was built, by its CMakeLists.txt."""
    cmake = find_cmake()
    if cmake is None:
        pytest.skip("there is no cmake; pip install cmake")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler!r}; set CXX to one")
    folder = tmp_path_factory.mktemp("cpp")
    settings = {"TORCH_DIR": torch.__path__[0], "EFFICIENTAD_FAST_LIBRARY": native.library_path("cpu")}
    # Less optimised than what users build: the program's own work is small, and it is built for each run of the tests.
    given = [f"-D{name}={value}" for name, value in settings.items()] + ["-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    for command in ([cmake, "-S", EXAMPLE, "-B", folder, *given], [cmake, "--build", folder, "--parallel", "2"]):
        answer = run(*command)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "warning" not in answer.stdout + answer.stderr
    return folder


@pytest.fixture(scope="module")
def program(build_folder: Path) -> Path:
    return build_folder / "detect"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same image, smooth as photographs are, in colour and in grey."""
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
    folder = tmp_path_factory.mktemp("images")
    paths = {"colour": folder / "image.ppm", "grey": folder / "image.pgm"}
    image.save(paths["colour"])
    image.convert("L").save(paths["grey"])
    return paths


def detector_of(size: str, channels: int, *, padding: bool, **fields: Any) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        teacher = PatchDescriptionNetwork(size, channels, padding=padding)  # type: ignore[arg-type]
        student = PatchDescriptionNetwork(size, 2 * channels, padding=padding)  # type: ignore[arg-type]
        autoencoder = Autoencoder(channels, padding=padding)
        return Detector(
            teacher, student, autoencoder, torch.randn(channels) * 0.1, torch.rand(channels) + 0.5, **fields
        )


def other_settings() -> Detector:
    """Whatever the file says that is otherwise in :func:`small_detector`."""
    preprocessing = Preprocessing(size=(320, 264), resize="pillow", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    return small_detector(
        padding=True,
        map_convention="native",
        pad_maps=False,
        threshold=-1.0,
        preprocessing=preprocessing,
        provenance={"words": 'of "any" kind: \u00e4\n', "numbers": [1, -2.5e-7, [], {}]},
    )


DETECTORS: dict[str, Callable[[], Detector]] = {
    "small": small_detector,
    "other settings": other_settings,
    "S": lambda: detector_of("s", FEATURE_CHANNELS, padding=False),  # without quantiles, its threshold infinite
    "M": lambda: detector_of("m", CHANNELS, padding=True, quantiles=Quantiles(0.1, 0.3, 0.05, 0.15), threshold=-1.0),
}


@pytest.mark.parametrize(("name", "kind"), [*((name, "colour") for name in DETECTORS), ("small", "grey")])
def test_the_program_predicts_as_python_does(
    name: str, kind: str, program: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    detector = DETECTORS[name]()
    file = detector.save(tmp_path / "detector.safetensors")
    expected = detector.predict(images[kind])

    answer = run(program, file, images[kind], "--raw", tmp_path / "map.f32", "--map", tmp_path / "map.pgm")

    assert (answer.returncode, answer.stderr) == (0, "")
    found = re.fullmatch(r"score (\S+), (above|not above) the threshold (\S+): (good|anomalous)\n", answer.stdout)
    assert found is not None, answer.stdout
    score, above, threshold, verdict = found.groups()
    assert float(score) == pytest.approx(expected.score, rel=TOLERANCE)
    assert float(threshold) == detector.threshold
    assert (above, verdict) == (("above", "anomalous") if expected.label else ("not above", "good"))
    assert expected.anomaly_map is not None
    raw = np.fromfile(tmp_path / "map.f32", np.float32).reshape(expected.anomaly_map.shape)
    largest = float(np.abs(expected.anomaly_map).max())
    np.testing.assert_allclose(raw, expected.anomaly_map, rtol=0, atol=TOLERANCE * largest)
    with Image.open(tmp_path / "map.pgm") as picture:
        grey = np.asarray(picture)
    assert grey.shape == raw.shape
    assert (np.diff(grey.flat[np.argsort(raw, axis=None)].astype(int)) >= 0).all()
    if not 0 < detector.threshold < np.inf:
        assert grey.max() == (255 if raw.max() > min(0.0, float(raw.min())) else 0)


def test_the_threshold_lies_in_the_middle_third_of_the_greys(
    program: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    detector = detector_of("s", CHANNELS, padding=False)
    highest = detector.predict(images["colour"]).score
    for threshold, brightest in ((2 * highest, 255 / 3), (0.6 * highest, 255)):
        file = detector.replaced(threshold=threshold).save(tmp_path / "detector.safetensors")
        assert run(program, file, images["colour"], "--map", tmp_path / "map.pgm").returncode == 0
        with Image.open(tmp_path / "map.pgm") as picture:
            assert int(np.asarray(picture).max()) == pytest.approx(brightest, abs=1)


def test_what_is_installed_needs_nothing_of_this_environment(
    build_folder: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    file = small_detector().save(tmp_path / "detector.safetensors")
    machine = tmp_path / "machine"
    try:
        answer = run(str(find_cmake()), "--install", build_folder, "--prefix", machine)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        loaded = run(machine / "detect", LD_TRACE_LOADED_OBJECTS="1").stdout
        assert "libtorch_cpu.so" in loaded
        outside = [line for line in loaded.splitlines() if "site-packages" in line or "not found" in line]
        assert not outside, loaded
        answer = run(machine / "detect", file, images["colour"], "--runs", "2")
        assert answer.returncode == 0, answer.stderr
        assert re.search(r"^median of 2 predictions: \d+\.\d\d ms$", answer.stdout, re.MULTILINE)
    finally:
        shutil.rmtree(machine, ignore_errors=True)  # PyTorch is large


# What is said of files that are none


def said(program: Path, detector: Path, image: Path, *options: str | Path) -> str:
    answer = run(program, detector, image, *options)
    assert (answer.returncode, answer.stdout) == (1, ""), answer.stderr
    assert answer.stderr.endswith(".\n")
    assert answer.stderr.count("\n") == 1, answer.stderr
    return answer.stderr


@pytest.fixture(scope="module")
def detector_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_detector().save(tmp_path_factory.mktemp("detector") / "detector.safetensors").read_bytes()


def with_header(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its header changed; ``detector`` of its metadata is decoded for that."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["detector"] = json.loads(header["__metadata__"]["detector"])
    change(header)
    header["__metadata__"]["detector"] = json.dumps(header["__metadata__"]["detector"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def tensor(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: with_header(content, lambda header: header["teacher.conv2.weight"].update(changes))


def facts(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: with_header(content, lambda header: header["__metadata__"]["detector"].update(changes))


def preprocessing(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: with_header(
        content, lambda header: header["__metadata__"]["detector"]["preprocessing"].update(changes)
    )


def raw_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BAD_DETECTORS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "no safetensors file"),
    "cut in its length": (lambda content: content[:5], "no safetensors file"),
    "cut in its header": (lambda content: content[:100], "cut off"),
    "cut in its tensors": (lambda content: content[:-1], "are not where the header says"),
    "longest header": (lambda content: b"\xff" * 8 + content[8:], "no safetensors file"),
    "another kind of file": (lambda _: b"P6 1 1 255 abc" * 100, "no safetensors file"),
    "no JSON": (lambda _: raw_header(b"{'single': 1}"), "it is no JSON, at byte 1"),
    "JSON without an end": (lambda _: raw_header(b'{"a": "b'), "a closing quote"),
    "deep JSON": (lambda _: raw_header(b"[" * 1_000_000), "less than 64 levels"),
    "a list": (lambda _: raw_header(b"[]"), "an object is expected"),
    "no metadata": (lambda _: raw_header(b"{}"), 'its format is ""'),
    "format": (
        lambda content: with_header(content, lambda header: header["__metadata__"].update(format="other")),
        'its format is "other", expected "efficientad_fast detector 1"',
    ),
    "tensor": (
        lambda content: with_header(content, lambda header: header.pop("teacher_std")),
        "the tensor teacher_std is missing",
    ),
    "dtype": (tensor(dtype="F16"), "teacher.conv2.weight is F16, and only F32 is supported"),
    "shape": (tensor(shape=[256, 128, 4, 5]), r"has shape (256, 128, 4, 5), expected (256, 128, 4, 4)"),
    "fractional shape": (tensor(shape=[256, 128, 4, 4.5]), "a whole number"),
    "offsets beyond the end": (tensor(data_offsets=[10**15, 10**15 + 256 * 128 * 64]), "are not where"),
    "negative offsets": (tensor(data_offsets=[-8, 256 * 128 * 64 - 8]), "are not where"),
    "offsets of another size": (tensor(data_offsets=[0, 4]), "are not where"),
    "one offset": (tensor(data_offsets=[0]), "are not where"),
    "model size": (facts(model_size="l"), "its model size is l, and only s and m are supported"),
    "map convention": (facts(map_convention="new"), "only resized and native are supported"),
    "channels": (facts(out_channels=-1), "-1 output channels, expected 1 to 4096"),
    "more channels": (facts(out_channels=384), "expected (384, 256, 4, 4)"),
    "padding": (facts(padding="yes"), "true or false is expected"),
    "threshold": (facts(threshold=float("nan")), "its threshold is not a number"),
    "quantiles": (facts(quantiles=dict.fromkeys(("st_start", "st_end", "ae_start", "ae_end"), 1)), "its quantiles"),
    "small size": (preprocessing(size=[255, 256]), "255 pixels, expected 256 to 4096 a side"),
    "large size": (preprocessing(size=[256, 10**12]), "1000000000000 pixels, expected"),
    "one side": (preprocessing(size=[256]), "a height and a width"),
    "resize": (preprocessing(resize="nearest"), "only antialias and pillow are supported"),
    "std": (preprocessing(std=[1, 0, 1]), "a mean or a std that cannot be"),
    "mean": (preprocessing(mean=[0, 0]), "for each of three channels"),
}


@pytest.mark.parametrize("name", BAD_DETECTORS)
def test_a_bad_detector_is_refused_in_a_sentence(
    name: str, program: Path, images: dict[str, Path], detector_bytes: bytes, tmp_path: Path
) -> None:
    change, expected = BAD_DETECTORS[name]
    file = tmp_path / "detector.safetensors"
    file.write_bytes(change(detector_bytes))
    answer = said(program, file, images["colour"])
    assert answer.startswith(f"{file} is no detector that can be loaded: ")
    assert expected in answer


def test_weights_of_nan_are_said_to_be_damaged(program: Path, images: dict[str, Path], tmp_path: Path) -> None:
    detector = small_detector()
    detector.teacher.conv4.bias.fill_(torch.nan)
    file = detector.save(tmp_path / "detector.safetensors")
    assert "made NaN of the image" in said(program, file, images["colour"])


BAD_IMAGES = {
    "empty": (b"", "cannot be read, or is empty"),
    "text": (b"P3 1 1 255 1 2 3", "is no binary PPM or PGM file"),
    "no size": (b"P6\n# only a comment", "no width, height and white"),
    "no pixels": (b"P6 0 10 255 ", "no width, height and white"),
    "16 bits": (b"P5 1 1 65535 ab", "has 65535 for white, and only 8 bits"),
    "cut off": (b"P6\n2 2\n255\n" + bytes(11), "ends before its last pixel"),
    "enormous": (b"P6 99999999999999999999 99999999999999999999 255 abc", "ends before its last pixel"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_in_a_sentence(name: str, program: Path, detector_bytes: bytes, tmp_path: Path) -> None:
    content, expected = BAD_IMAGES[name]
    image, file = tmp_path / "image.ppm", tmp_path / "detector.safetensors"
    image.write_bytes(content)
    file.write_bytes(detector_bytes)
    answer = said(program, file, image)
    assert answer.startswith(str(image))
    assert expected in answer


def test_comments_in_a_header_are_skipped(program: Path, detector_bytes: bytes, tmp_path: Path) -> None:
    file = tmp_path / "detector.safetensors"
    file.write_bytes(detector_bytes)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 2, 3), dtype=np.uint8)
    scores = []
    for header in (b"P6 2 3 255\n", b"P6# one\n2\n#two\n  3 # three\n255\n"):
        (tmp_path / "image.ppm").write_bytes(header + pixels.tobytes())
        answer = run(program, file, tmp_path / "image.ppm")
        assert answer.returncode == 0, answer.stderr
        scores.append(answer.stdout)
    assert scores[0] == scores[1]


def test_what_cannot_be_found_or_written_is_said(
    program: Path, images: dict[str, Path], detector_bytes: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "detector.safetensors"
    assert "there is no such file" in said(program, file, images["colour"])
    assert "there is no such file" in said(program, tmp_path, images["colour"])
    file.write_bytes(detector_bytes)
    assert "cannot be read" in said(program, file, tmp_path / "none.ppm")
    assert "cannot be read" in said(program, file, tmp_path)
    answer = run(program, file, images["colour"], "--map", tmp_path / "none" / "map.pgm")
    assert answer.returncode == 1
    assert answer.stderr == f"{tmp_path / 'none' / 'map.pgm'} cannot be written.\n"


@pytest.mark.parametrize("options", [[], ["a"], ["a", "b", "c"], ["a", "b", "--map"], ["a", "b", "--runs", "none"]])
def test_other_arguments_are_answered_with_the_usage(options: list[str], program: Path) -> None:
    answer = run(program, *options)
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: detect DETECTOR.safetensors IMAGE.ppm")


def test_cmake_says_what_it_needs(tmp_path: Path) -> None:
    cmake = find_cmake()
    if cmake is None:
        pytest.skip("there is no cmake; pip install cmake")
    answer = run(cmake, "-S", EXAMPLE, "-B", tmp_path, "-DTORCH_DIR=/nowhere")
    assert answer.returncode != 0
    assert 'TORCH_DIR is "/nowhere"' in answer.stderr
