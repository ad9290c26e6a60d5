"""The detector: its file, and every form of input and output of ``predict``."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from efficientad_fast import Detector, Prediction, Preprocessing
from efficientad_fast import detector as detector_module
from efficientad_fast.detector import Precision
from efficientad_fast.errors import BackendError, DatasetError, DetectorFileError, ImageError, InputError
from efficientad_fast.files import read_tensors, write_tensors
from efficientad_fast.plan import Pending, Plan, PlanInput
from efficientad_fast.reference.maps import Quantiles, image_score, resize_map, resized_raw_map
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork
from efficientad_fast.reference.preprocess import Resize
from efficientad_fast.training.calibrate import largest_activations, threshold_from_scores
from tests.small_detector import small_detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return small_detector()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index, size in enumerate([(40, 30), (300, 280), (256, 256)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def _one(result: object) -> Prediction:
    assert isinstance(result, Prediction)
    return result


def _several(result: object) -> list[Prediction]:
    assert isinstance(result, list)
    return result


# The file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_detector_loads_bit_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    original = small_detector(
        padding=True,
        threshold=0.1 + 0.2,
        preprocessing=Preprocessing(size=(256, 300), resize="pillow"),
        map_convention="native",
        pad_maps=False,
        provenance={"data": "unit test", "steps": 3, "nested": {"a": [1, 2.5]}},
    )
    for network in (original.teacher, original.student, original.autoencoder):
        network.to(dtype)
    loaded = Detector.load(original.save(tmp_path / "deep" / "model.safetensors"))
    for name in ("teacher", "student", "autoencoder"):
        before, after = getattr(original, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    for name in ("quantiles", "threshold", "preprocessing", "map_convention", "pad_maps", "provenance"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert torch.equal(loaded.teacher_mean, original.teacher_mean)
    assert torch.equal(loaded.teacher_std, original.teacher_std)
    assert loaded.teacher.padding and loaded.student.padding and loaded.autoencoder.decoder.padding


def test_an_infinite_threshold_and_missing_quantiles_survive_saving(tmp_path: Path) -> None:
    original = small_detector(threshold=math.inf).replaced(quantiles=None)
    loaded = Detector.load(original.save(tmp_path / "m.safetensors"))
    assert loaded.threshold == math.inf and loaded.quantiles is None


def test_loading_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(DetectorFileError, match="No detector file"):
        Detector.load(tmp_path / "absent.safetensors")
    path = small_detector().save(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for kept in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(DetectorFileError, match="damaged"):
            Detector.load(path)
    write_tensors(path, {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(DetectorFileError, match="not a detector"):
        Detector.load(path)


def test_loading_refuses_a_file_with_a_missing_tensor_or_field(tmp_path: Path) -> None:
    path = small_detector().save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(path)
    write_tensors(path, {key: value for key, value in tensors.items() if key != "student.conv2.bias"}, metadata)
    with pytest.raises(DetectorFileError, match=r"conv2\.bias"):
        Detector.load(path)
    fields = json.loads(metadata["detector"])
    del fields["threshold"]
    write_tensors(path, tensors, {**metadata, "detector": json.dumps(fields)})
    with pytest.raises(DetectorFileError, match="threshold"):
        Detector.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"padding": None},
        {"padding": -1},
        {"padding": [1]},
        {"provenance": []},
        {"provenance": "x"},
        {"threshold": 10**400},
        {"quantiles": {"st_start": 10**400, "st_end": 1, "ae_start": 0, "ae_end": 1}},
        {"precisions": []},
        {"precisions": {"float16": {"quantiles": None, "threshold": 1, "activations": None, "provenance": []}}},
        {"preprocessing": []},
        {"model_size": {}},
        {"out_channels": 10**30},
        {"out_channels": 2**31},
    ],
    ids=str,
)
def test_loading_refuses_a_description_that_makes_no_sense(tmp_path: Path, change: dict[str, object]) -> None:
    path = small_detector().save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(path)
    facts = {**json.loads(metadata["detector"]), **change}
    write_tensors(path, tensors, {**metadata, "detector": json.dumps(facts)})
    with pytest.raises(DetectorFileError, match=r"m\.safetensors says it is a detector"):
        Detector.load(path)


def test_a_process_killed_while_saving_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = small_detector(threshold=1.0).save(tmp_path / "m.safetensors")
    code = (
        "import sys\n"
        "from tests.small_detector import small_detector\n"
        "detector = small_detector(threshold=2.0)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    detector.save(sys.argv[1])\n"
    )
    for delay in (0.0, 0.013, 0.04):
        root = Path(__file__).parent.parent
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=root) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        assert Detector.load(path).threshold in (1.0, 2.0)


# What is refused


def test_a_network_size_too_small_is_refused_with_the_smallest() -> None:
    with pytest.raises(InputError, match="256"):
        Preprocessing(size=(255, 300))


def test_fields_that_do_not_fit_are_refused(detector: Detector) -> None:
    with pytest.raises(InputError, match="map_convention"):
        detector.replaced(map_convention="other")
    with pytest.raises(InputError, match="teacher_mean"):
        detector.replaced(teacher_mean=torch.zeros(3))
    with pytest.raises(InputError, match="student must have 16 output channels"):
        detector.replaced(student=detector.teacher)
    with pytest.raises(InputError, match="autoencoder must have 8 output channels"):
        detector.replaced(autoencoder=Autoencoder(9))
    with pytest.raises(InputError, match="student must be of the teacher's model size 's', got 'm'"):
        detector.replaced(student=PatchDescriptionNetwork("m", 16))
    with pytest.raises(InputError, match="autoencoder must have the teacher's padding=False"):
        detector.replaced(autoencoder=Autoencoder(8, padding=True))
    with pytest.raises(InputError, match="threshold must be a number"):
        detector.replaced(threshold=math.nan)
    for quantiles in (Quantiles(0.1, 0.1, 0.2, 0.3), Quantiles(0.1, 0.2, 0.3, 0.2)):
        with pytest.raises(InputError, match="quantiles must have ends above their starts"):
            detector.replaced(quantiles=quantiles)
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="teacher_std must be finite and above 0"):
            detector.replaced(teacher_std=torch.full_like(detector.teacher_std, value))
    with pytest.raises(InputError, match="teacher_mean must be finite"):
        detector.replaced(teacher_mean=torch.full_like(detector.teacher_mean, math.nan))
    with pytest.raises(InputError, match="quantiles must be finite"):
        detector.replaced(quantiles=Quantiles(0.1, math.inf, 0.2, 0.3))


def test_statistics_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.ones(8)
    path = small_detector().replaced(teacher_mean=shared, teacher_std=shared).save(tmp_path / "model.safetensors")
    assert torch.equal(Detector.load(path).teacher_std, shared)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean", (0.1, 0.2)), ("mean", (0.1, math.nan, 0.3)), ("std", (1.0, 0.0, 1.0)), ("max_value", 0)],
)
def test_preprocessing_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        Preprocessing(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"map_size": "huge"}, "map_size"),
        ({"channel_order": "gbr"}, "channel_order"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    detector: Detector, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        detector.predict(iter(["absent.png"]), **arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_says_what_to_do(detector: Detector) -> None:
    with pytest.raises(BackendError, match="device='cpu'"):
        detector.predict(np.zeros((8, 8, 3), np.uint8), device="cuda")


def test_something_that_is_no_image_is_refused(detector: Detector) -> None:
    with pytest.raises(InputError, match="int"):
        detector.predict(3)  # type: ignore[arg-type]


# Forms of input and output


def test_what_comes_out_has_the_form_of_what_goes_in(detector: Detector, folder: Path) -> None:
    array = np.zeros((20, 30, 3), np.uint8)
    for single in (folder / "0.png", str(folder / "0.png"), Image.fromarray(array), array, torch.zeros(3, 20, 30)):
        assert isinstance(detector.predict(single), Prediction)
    for several in (folder, [array], (array,), np.zeros((1, 20, 30, 3), np.uint8), torch.zeros(1, 3, 20, 30)):
        assert isinstance(detector.predict(several), list)
    assert detector.predict([]) == []
    stream = detector.predict(iter([array]))
    assert isinstance(stream, Iterator)
    assert [prediction.source for prediction in stream] == ["image 0"]


def test_a_folder_is_predicted_in_order_with_its_paths(detector: Detector, folder: Path) -> None:
    predictions = _several(detector.predict(folder))
    assert [prediction.source for prediction in predictions] == [str(folder / f"{index}.png") for index in range(3)]


def test_an_empty_folder_is_an_error(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        detector.predict(tmp_path)


def test_the_same_image_scores_the_same_in_every_form(detector: Detector, folder: Path) -> None:
    path = folder / "1.png"
    array = np.asarray(Image.open(path))
    reference = _one(detector.predict(path))
    forms = (
        Image.open(path),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        array.astype(np.float64) / 255,
    )
    for form in forms:
        assert _one(detector.predict(form)).score == pytest.approx(reference.score, rel=1e-6)
    assert _one(detector.predict(array[..., ::-1], channel_order="bgr")).score == reference.score


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_batch_size_does_not_change_the_result(detector: Detector, folder: Path, batch_size: int) -> None:
    alone = [_one(detector.predict(folder / f"{index}.png")) for index in range(3)]
    together = _several(detector.predict(folder, batch_size=batch_size))
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], rel=1e-5)
    for one, other in zip(together, alone, strict=True):
        assert one.anomaly_map is not None and other.anomaly_map is not None
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-4, atol=1e-5)


def test_a_map_that_is_kept_does_not_keep_its_batch(detector: Detector, folder: Path) -> None:
    maps = [one.anomaly_map for one in _several(detector.predict(folder, batch_size=3))]
    for one, following in itertools.pairwise(maps):
        assert one is not None and following is not None
        # Allocated by itself, memory does not begin exactly where other memory ends.
        assert one.ctypes.data + one.nbytes != following.ctypes.data


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
def test_a_batch_holds_what_each_image_becomes_by_itself(folder: Path, resize: Resize) -> None:
    preprocessing = Preprocessing(size=(256, 300), resize=resize)
    images = [preprocessing.decode(folder / f"{index}.png", channels_last=index == 1) for index in range(3)]
    images.append(images[0].double() / 255)
    batch = preprocessing.batch(images)
    assert batch.shape == (4, 3, 256, 300) and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack([preprocessing(image) for image in images]))


def test_maps_and_scores_of_the_resized_convention(detector: Detector, folder: Path) -> None:
    network = _one(detector.predict(folder / "0.png"))
    original = _one(detector.predict(folder / "0.png", map_size="original"))
    assert network.anomaly_map is not None and original.anomaly_map is not None
    assert network.anomaly_map.shape == (256, 256) and network.anomaly_map.dtype == np.float32
    assert original.anomaly_map.shape == (40, 30)
    assert network.score == original.score == pytest.approx(float(network.anomaly_map.max()))
    resized = resize_map(torch.from_numpy(network.anomaly_map)[None, None], (40, 30))[0, 0]
    np.testing.assert_allclose(original.anomaly_map, resized.numpy(), rtol=1e-6)


def test_maps_and_scores_of_the_native_convention(folder: Path) -> None:
    native = small_detector(map_convention="native")
    network = _one(native.predict(folder / "1.png"))
    original = _one(native.predict(folder / "1.png", map_size="original"))
    assert original.anomaly_map is not None and network.anomaly_map is not None
    assert original.anomaly_map.shape == (300, 280) and network.anomaly_map.shape == (256, 256)
    assert network.score == original.score
    assert original.score == pytest.approx(float(image_score(torch.from_numpy(original.anomaly_map)[None, None])[0]))


def test_a_score_that_is_nan_is_an_error_and_no_verdict(folder: Path) -> None:
    broken = small_detector()
    with torch.no_grad():
        broken.student.conv4.bias[0] = math.nan
    for prediction in _several(broken.predict(folder)):
        assert math.isnan(prediction.score)
        assert prediction.label is None
        assert prediction.error is not None and prediction.source in prediction.error and "NaN" in prediction.error
    with pytest.raises(ImageError, match="NaN"):
        broken.predict(folder / "0.png")


def test_the_detectors_own_decoding_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "camera.png"
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path)
    plain, twelve_bits = (small_detector(preprocessing=Preprocessing(max_value=white)) for white in (None, 4095))
    assert _one(twelve_bits.predict(path)).score == _one(plain.predict(path, max_value=4095)).score
    assert _one(plain.predict(path)).score == _one(twelve_bits.predict(path, max_value=65535)).score
    assert _one(plain.predict(path)).score != _one(twelve_bits.predict(path)).score

    turned = Image.fromarray(np.arange(3000, dtype=np.uint8).reshape(20, 50, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = small_detector(preprocessing=Preprocessing(apply_exif=True)).predict(
        tmp_path / "turned.png", map_size="original"
    )
    assert _one(upright).anomaly_map.shape == (50, 20)
    lying = small_detector(preprocessing=Preprocessing(apply_exif=True)).predict(
        tmp_path / "turned.png", map_size="original", apply_exif=False
    )
    assert _one(lying).anomaly_map.shape == (20, 50)


def test_a_copied_or_pickled_detector_predicts_the_same(detector: Detector, folder: Path) -> None:
    expected = _one(detector.predict(folder / "0.png")).score
    # Our own bytes: worker processes send detectors so.
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert other._plans == {}
        assert _one(other.predict(folder / "0.png")).score == expected


def test_the_label_says_whether_the_score_is_above_the_threshold(detector: Detector, folder: Path) -> None:
    score = _one(detector.predict(folder / "0.png")).score
    assert _one(detector.replaced(threshold=score).predict(folder / "0.png")).label is False
    assert _one(detector.replaced(threshold=math.nextafter(score, -math.inf)).predict(folder / "0.png")).label is True


@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-4), ("bfloat16", 0.2)])
def test_other_dtypes_give_about_the_same_score(detector: Detector, folder: Path, dtype: str, relative: float) -> None:
    expected = _one(detector.predict(folder / "2.png")).score
    prediction = _one(detector.predict(folder / "2.png", dtype=dtype))
    assert prediction.score == pytest.approx(expected, rel=relative)
    assert prediction.anomaly_map is not None and prediction.anomaly_map.dtype == np.float32


def test_replacing_the_threshold_does_not_share_plans_with_other_quantiles(detector: Detector, folder: Path) -> None:
    before = _one(detector.predict(folder / "0.png")).score
    assert detector.quantiles is not None
    changed = detector.replaced(quantiles=dataclasses.replace(detector.quantiles, st_end=0.9))
    assert _one(changed.predict(folder / "0.png")).score != before


# Bad images


@pytest.fixture
def bad_files(tmp_path: Path, folder: Path) -> list[Path]:
    good = (folder / "1.png").read_bytes()
    files = {"empty.png": b"", "truncated.png": good[: len(good) // 2], "text.jpg": b"not an image at all"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in files]


def test_a_single_bad_image_raises_with_its_name(detector: Detector, bad_files: list[Path]) -> None:
    for path in bad_files:
        with pytest.raises(ImageError, match=path.name):
            detector.predict(path)
    with pytest.raises(ImageError, match=r"absent\.png"):
        detector.predict("absent.png")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_bad_images_among_good_ones_are_reported_and_the_others_predicted(
    detector: Detector, folder: Path, bad_files: list[Path], batch_size: int
) -> None:
    mixed = [bad_files[0], folder / "0.png", bad_files[1], bad_files[2], folder / "1.png", "absent.png"]
    predictions = _several(detector.predict(mixed, batch_size=batch_size))
    assert [prediction.source for prediction in predictions] == [str(path) for path in mixed]
    for prediction, path in zip(predictions, mixed, strict=True):
        if str(path).endswith(("0.png", "1.png")):
            assert prediction.error is None and math.isfinite(prediction.score)
        else:
            assert prediction.error is not None and str(path) in prediction.error
            assert math.isnan(prediction.score) and prediction.label is None and prediction.anomaly_map is None


def test_nan_and_inf_in_an_array_are_reported(detector: Detector) -> None:
    array = np.full((20, 20, 3), 0.5, np.float32)
    for bad in (np.nan, np.inf):
        array[3, 4, 1] = bad
        with pytest.raises(ImageError, match="image 0"):
            detector.predict(array)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
def test_every_kind_of_image_file_is_predicted(detector: Detector, tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(0, 60000, 100, dtype=np.uint16).reshape(20, 30))
    else:
        image = Image.fromarray(np.arange(0, 1800, 3).astype(np.uint8).reshape(20, 30)).convert("RGB").convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    assert math.isfinite(_one(detector.predict(path)).score)


def test_a_file_of_several_frames_is_predicted_by_its_first_and_said_so(detector: Detector, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    for suffix in ("tif", "gif"):
        one, several = tmp_path / f"one.{suffix}", tmp_path / f"several.{suffix}"
        frames[0].save(one)
        frames[0].save(several, save_all=True, append_images=frames[1:])
        alone, first = (_one(detector.predict(path)) for path in (one, several))
        assert alone.note is None
        assert first.note == f"{several}: holds several frames or pages, of which the first was taken"
        if suffix == "tif":  # a GIF of several frames may have another palette
            assert first.score == alone.score
        notes = [prediction.note for prediction in _several(detector.predict([one, several]))]
        assert notes == [None, first.note]


@pytest.mark.parametrize("shape", [(1, 10_000, 3), (10_000, 1, 3), (1, 10_000), (10_000, 1)])
def test_one_row_or_column_is_predicted(detector: Detector, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    prediction = _one(detector.predict(image, map_size="original"))
    assert math.isfinite(prediction.score)
    assert prediction.anomaly_map is not None and prediction.anomaly_map.shape == shape[:2]


def test_a_single_pixel_is_predicted(detector: Detector) -> None:
    prediction = _one(detector.predict(np.full((1, 1, 3), 77, np.uint8), map_size="original"))
    assert prediction.anomaly_map is not None and prediction.anomaly_map.shape == (1, 1)


# Streams


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are decoded by two threads, on any machine."""
    monkeypatch.setattr(detector_module, "_decoding_threads", lambda: 2)


def decoding_has_ended() -> bool:
    """Whether all threads that decode are gone, or go within seconds."""
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("efficientad_fast-decode") for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.usefixtures("two_threads")
def test_a_stream_is_read_no_further_ahead_than_a_batch_and_its_threads(detector: Detector) -> None:
    drawn = itertools.count()
    image = np.zeros((8, 8, 3), np.uint8)

    def endless() -> Iterator[np.ndarray]:
        while True:
            next(drawn)
            yield image

    stream = detector.stream(endless(), batch_size=2)
    for _ in range(4):
        next(stream)
    time.sleep(0.3)
    # 4 predicted, a batch and one for each thread queued, one image waiting for room and one being drawn.
    assert next(drawn) <= 4 + (2 + 2) + 2
    stream.close()  # type: ignore[attr-defined]


def test_the_next_image_is_decoded_while_the_networks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_detector()
    images, read = 4, [threading.Event() for _ in range(5)]
    running = iter(range(images))
    plan = detector.plan()
    run = type(plan).run

    def source() -> Iterator[np.ndarray]:
        for index in range(images):
            yield np.zeros((9, 9, 3), np.uint8)
            read[index + 1].set()  # asked for the next: this one is decoded

    def run_late(self: object, *args: object, **kwargs: object) -> object:
        waited.append(read[min(next(running) + 2, images)].wait(timeout=20))
        return run(plan, *args, **kwargs)

    waited: list[bool] = []
    monkeypatch.setattr(type(plan), "run", run_late)
    assert len(list(detector.predict(source()))) == images
    assert waited == [True] * images


@pytest.mark.usefixtures("two_threads")
def test_files_are_decoded_ahead_by_several_threads_and_come_in_order(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for index, path in enumerate(paths):
        Image.new("RGB", (10 + index, 8), (20 * index, 0, 0)).save(path)
    alone = [_one(detector.predict(path, map_size="original")) for path in paths]
    both, ahead, decode = threading.Barrier(2), threading.Semaphore(0), Preprocessing.decode

    def decode_beside_another(self: Preprocessing, source: Path, *args: object, **kwargs: object) -> torch.Tensor:
        both.wait(timeout=20)  # broken, where one thread decodes all of them
        if source in paths[::2]:
            time.sleep(0.01)  # the one after it is ready before it is
        ahead.release()
        return decode(self, source, *args, **kwargs)

    plan = detector.plan()
    run = type(plan).run

    def run_beside_decoding(self: object, *args: object, **kwargs: object) -> object:
        if not waited:  # for its own four images and the next four
            waited.extend(ahead.acquire(timeout=20) for _ in range(8))
        return run(plan, *args, **kwargs)

    waited: list[bool] = []
    monkeypatch.setattr(Preprocessing, "decode", decode_beside_another)
    monkeypatch.setattr(type(plan), "run", run_beside_decoding)
    predictions = _several(detector.predict(paths, batch_size=4, map_size="original"))
    assert waited == [True] * 8, "the second batch was not decoded while the first was in the networks"
    assert [one.source for one in predictions] == [str(path) for path in paths]
    assert [one.score for one in predictions] == pytest.approx([one.score for one in alone], rel=1e-5)
    assert [one.anomaly_map.shape for one in predictions] == [(8, 10 + index) for index in range(12)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("kind", ["files", "arrays", "both", "camera"])
def test_large_images_are_not_decoded_far_ahead(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    image = np.zeros((40, 50, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    kinds = {"files": [tmp_path / "image.png"], "arrays": [image], "camera": [image]}
    images = 12 * kinds.get(kind, [image, tmp_path / "image.png"])
    decoded: list[weakref.ref[torch.Tensor]] = []
    decode, plan = Preprocessing.decode, detector.plan()
    run = type(plan).run

    def decode_and_note(*args: object, **kwargs: object) -> torch.Tensor:
        decoded.append(weakref.ref(result := decode(*args, **kwargs)))
        return result

    def run_late(self: object, *args: object, **kwargs: object) -> object:
        if not waiting:
            time.sleep(0.3)
            deadline = time.monotonic() + 20
            # A thread that is not running now may still hold what it has handed over.
            while still() > most_waiting and time.monotonic() < deadline:
                time.sleep(0.05)
            waiting.append(still())
        return run(plan, *args, **kwargs)

    def still() -> int:
        return sum(one() is not None for one in decoded)

    # When a thread begins, less than the most waits, and each of the others may have begun as well: two that decode
    # files, and the one that asks for images, which decodes arrays. None of the batch that is in the networks waits.
    most_waiting = max(most - 1, 0) + (3 if kind == "both" else 2)
    waiting: list[int] = []
    monkeypatch.setattr(detector_module, "_MOST_WAITING_BYTES", most * image.nbytes)
    monkeypatch.setattr(Preprocessing, "decode", decode_and_note)
    monkeypatch.setattr(type(plan), "run", run_late)
    predictions = list(detector.predict(iter(images) if kind == "camera" else images, batch_size=6))
    assert [one.error for one in predictions] == [None] * len(images)
    assert 1 <= waiting[0] <= most_waiting


def test_memory_that_a_camera_reuses_is_copied_before_its_next_image(detector: Detector) -> None:
    def camera() -> Iterator[np.ndarray]:
        memory = np.zeros((20, 30, 3), np.uint8)
        for level in levels:
            memory[...] = level
            yield memory

    levels = range(0, 250, 25)
    expected = [_one(detector.predict(np.full((20, 30, 3), level, np.uint8))).score for level in levels]
    assert len(set(expected)) == len(expected)
    assert [one.score for one in detector.predict(camera(), batch_size=3)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_file_that_a_camera_reuses_is_read_before_its_next_image(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    decode = Preprocessing.decode

    def decode_late(*args: object, **kwargs: object) -> torch.Tensor:
        time.sleep(0.005)
        return decode(*args, **kwargs)

    def one_file() -> Iterator[Path]:
        for frame in frames:
            frame.save(tmp_path / "frame.png")
            yield tmp_path / "frame.png"

    def temporary_files() -> Iterator[str]:
        for frame in frames:
            with tempfile.NamedTemporaryFile(suffix=".png", dir=tmp_path) as file:
                frame.save(file.name)
                yield file.name

    frames = [Image.new("RGB", (30, 20), (level, 0, 90)) for level in range(0, 250, 25)]
    expected = [_one(detector.predict(frame)).score for frame in frames]
    monkeypatch.setattr(Preprocessing, "decode", decode_late)
    for camera in (one_file, temporary_files):
        predictions = list(detector.predict(camera(), batch_size=batch_size))
        assert [one.error for one in predictions] == [None] * len(frames)
        assert [one.score for one in predictions] == pytest.approx(expected, rel=1e-5)


def test_frames_of_one_file_are_decoded_before_it_moves_on(detector: Detector, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), (level, 0, 90)) for level in range(0, 250, 25)]
    frames[0].save(tmp_path / "frames.tiff", save_all=True, append_images=frames[1:])
    expected = [_one(detector.predict(frame)).score for frame in frames]
    with Image.open(tmp_path / "frames.tiff") as film:
        predictions = list(detector.predict(ImageSequence.Iterator(film), batch_size=3))
    assert [one.score for one in predictions] == pytest.approx(expected, rel=1e-5)


def test_an_image_alone_takes_no_thread(detector: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert math.isfinite(_one(detector.predict(folder / "0.png")).score)


@pytest.mark.usefixtures("two_threads")
def test_an_interruption_ends_decoding(detector: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(detector.plan()), "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detector.predict([folder / "1.png"] * 50, batch_size=2)
    assert decoding_has_ended()


def test_closing_a_stream_ends_its_threads(detector: Detector, folder: Path) -> None:
    endless = (itertools.repeat(image) for image in (np.zeros((8, 8, 3), np.uint8), folder / "1.png"))
    for images in (*endless, [folder / "1.png"] * 50):
        stream = detector.stream(images)
        next(stream)
        stream.close()
        assert decoding_has_ended()


def test_an_error_of_the_iterator_itself_reaches_the_caller(detector: Detector) -> None:
    def breaking() -> Iterator[np.ndarray]:
        yield np.zeros((8, 8, 3), np.uint8)
        raise ConnectionError("camera unplugged")

    stream = detector.stream(breaking())
    assert next(stream).error is None
    with pytest.raises(ConnectionError, match="camera unplugged"):
        next(stream)


def test_a_slow_source_gets_each_prediction_before_its_next_image(detector: Detector) -> None:
    answered = threading.Event()

    def camera() -> Iterator[np.ndarray]:
        yield np.zeros((8, 8, 3), np.uint8)
        assert answered.wait(20), "the first prediction was held back until the second image came"
        yield np.zeros((8, 8, 3), np.uint8)

    stream = detector.stream(camera())
    next(stream)
    answered.set()
    assert len(list(stream)) == 1


def test_predicting_from_8_threads_gives_the_same_numbers(folder: Path) -> None:
    shared = small_detector(seed=3)
    images = [folder / f"{index}.png" for index in range(3)]
    arrays = [np.asarray(Image.open(path)) for path in images]
    expected = [_figures(small_detector(seed=3).predict(path)) for path in images]
    results: list[list[tuple[float, bytes]]] = []

    def work(number: int) -> None:
        for _ in range(3):
            if number % 3 == 0:
                found = [_figures(one) for one in _several(shared.predict(folder))]
            elif number % 3 == 1:
                found = [_figures(shared.predict(array)) for array in arrays]
            else:
                found = [_figures(one) for one in shared.stream(iter(images))]
            results.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    assert all(result == expected for result in results)


def _figures(result: object) -> tuple[float, bytes]:
    prediction = _one(result)
    assert prediction.anomaly_map is not None
    return prediction.score, prediction.anomaly_map.tobytes()


FORKED = """
import os, signal, sys, threading, time
import numpy as np, torch
from tests.small_detector import small_detector

torch.set_num_threads(2)
backend = sys.argv[1]
detector = small_detector()
rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (300 + index, 280, 3), dtype=np.uint8) for index in range(2)]

def predicted():
    if not detector._plans:  # of the device and dtype that predict asks for, the plan of this backend
        detector.__dict__["_plans"] = {(torch.device("cpu"), torch.float32, "auto"): detector.plan(backend=backend)}
    return np.stack([np.append(one.anomaly_map, one.score) for one in detector.predict(images)])

def same(found):
    # Other numbers of threads may add in another order in PyTorch's own convolutions.
    return np.array_equal(found, before) if backend == "auto" else np.allclose(found, before, rtol=1e-4, atol=1e-6)

before = predicted()
stop = threading.Event()
def always():
    while not stop.is_set():
        predicted()

# Forked while another thread predicts, and holds locks.
thread = threading.Thread(target=always)
thread.start()
good = 0
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        os._exit(0 if same(predicted()) else 1)
    good += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
print(good, same(predicted()), torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forked_processes_predict_the_same_numbers(backend: str) -> None:
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", FORKED, backend], cwd=root, capture_output=True, text=True, timeout=500, check=True
    )
    assert run.stdout == "3 True 2\n", run.stderr


def test_warmup_builds_the_plan_that_predict_uses() -> None:
    detector = small_detector()
    detector.warmup(runs=1)
    (plan,) = detector._plans.values()
    detector.predict(np.zeros((9, 9, 3), np.uint8))
    assert list(detector._plans.values()) == [plan]


def test_the_summary_describes_the_teacher_in_a_line_and_leaves_out_the_settings() -> None:
    provenance = {"training_images": 7, "settings": {"steps": 1}, "teacher": {"made_by": "hand"}}
    summary = small_detector(provenance=provenance).summary()
    assert summary["teacher"] == "hand" and summary["training images"] == 7 and "settings" not in summary


# Precisions


def _precision(name: str, threshold: float = 0.3) -> Precision:
    activations = {"conv1": torch.rand(6), "map_st": torch.zeros(2)} if name == "float8" else None
    return Precision(Quantiles(0.2, 0.4, 0.1, 0.3), threshold, activations, {"images": 3})


def test_precisions_survive_saving_bit_for_bit(tmp_path: Path) -> None:
    original = small_detector().replaced(precisions={name: _precision(name) for name in ("float8", "float16")})
    loaded = Detector.load(original.save(tmp_path / "m.safetensors"))
    assert list(loaded.precisions) == ["float8", "float16"]
    for name, one in original.precisions.items():
        other = loaded.precisions[name]
        for attribute in ("quantiles", "threshold", "provenance"):
            assert getattr(other, attribute) == getattr(one, attribute)
    before, after = original.precisions["float8"].activations, loaded.precisions["float8"].activations
    assert before is not None and after is not None
    assert before.keys() == after.keys() and all(torch.equal(before[layer], after[layer]) for layer in before)
    assert loaded.precisions["float16"].activations is None
    assert "float8 (threshold 0.3, 3 images)" in str(original.summary()["calibrated in"])


def test_a_file_of_before_there_were_precisions_loads(tmp_path: Path) -> None:
    path = small_detector().save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(path)
    fields = json.loads(metadata["detector"])
    del fields["precisions"]
    write_tensors(path, tensors, {**metadata, "detector": json.dumps(fields)})
    assert Detector.load(path).precisions == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored, tensors: tensors.pop("precisions.float8.conv1"), "conv1"),
        (lambda stored, tensors: tensors["precisions.float8.conv1"].fill_(math.nan), "conv1"),
        (lambda stored, tensors: tensors["precisions.float8.conv1"].fill_(-1), "conv1"),
        (lambda stored, tensors: tensors.update({"precisions.float8.conv1": torch.ones(2, 3)}), "conv1"),
        (lambda stored, tensors: stored["float8"].pop("threshold"), "threshold"),
        (lambda stored, tensors: stored["float8"].update(quantiles={"st_start": 1}), "st_end"),
        (lambda stored, tensors: stored["float8"].update(activations=None), "activations"),
        (lambda stored, tensors: stored["float8"].update(threshold=math.nan), "threshold"),
        (lambda stored, tensors: stored.update(float4=stored["float8"]), "float4"),
        (lambda stored, tensors: stored.update(float8=[1]), "damaged|content is not"),
    ],
)
def test_damaged_precisions_are_refused(tmp_path: Path, damage: Callable[..., object], message: str) -> None:
    path = small_detector().replaced(precisions={"float8": _precision("float8")}).save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(path)
    fields = json.loads(metadata["detector"])
    damage(fields["precisions"], tensors)
    write_tensors(path, tensors, {**metadata, "detector": json.dumps(fields)})
    with pytest.raises(DetectorFileError, match=message):
        Detector.load(path)


def test_precisions_that_do_not_fit_are_refused() -> None:
    for name, precision in (("float8", _precision("float16")), ("float16", _precision("float8"))):
        with pytest.raises(InputError, match="activations"):
            small_detector().replaced(precisions={name: precision})
    for name in ("float32", "int8"):
        with pytest.raises(InputError, match="float16, bfloat16, float8"):
            small_detector().replaced(precisions={name: _precision("float16")})


def test_a_new_threshold_holds_in_every_dtype_and_a_new_network_drops_what_was_estimated_with_the_old() -> None:
    detector = small_detector().replaced(precisions={"float16": _precision("float16")})
    changed = detector.replaced(threshold=0.7)
    assert changed.threshold == changed.precisions["float16"].threshold == 0.7
    assert changed.precisions["float16"].quantiles == detector.precisions["float16"].quantiles
    assert detector.precisions["float16"].threshold == 0.3
    assert detector.replaced(provenance={"data": "x"}).precisions == detector.precisions
    assert detector.replaced(pad_maps=False).precisions == {}
    assert detector.replaced(quantiles=None).precisions == {}


def test_a_dtype_of_its_own_quantiles_and_threshold_uses_them(folder: Path) -> None:
    path = folder / "1.png"
    detector = small_detector()
    plain = _one(detector.predict(path, dtype="bfloat16")).score
    threshold = math.nextafter(plain, -math.inf)
    assert detector.quantiles is not None
    calibrated = detector.replaced(
        threshold=math.inf, precisions={"bfloat16": Precision(detector.quantiles, threshold)}
    )
    assert _one(calibrated.predict(path)).label is False
    same = _one(calibrated.predict(path, dtype="bfloat16"))
    assert same.score == plain and same.label is True
    other = dataclasses.replace(calibrated.precisions["bfloat16"], quantiles=Quantiles(0.1, 0.9, 0.05, 0.9))
    rescaled = calibrated.replaced(precisions={"bfloat16": other})
    assert _one(rescaled.predict(path, dtype="bfloat16")).score != plain
    assert _one(rescaled.predict(path)).score == _one(detector.predict(path)).score


def test_calibrating_in_another_precision_estimates_what_predicting_in_it_uses(folder: Path) -> None:
    detector = small_detector()
    images = sorted(folder.iterdir())
    told: list[tuple[str, int, int]] = []
    calibrated = detector.calibrated(folder, "bfloat16", batch_size=2, progress=lambda *one: told.append(one))
    assert told == [("calibration", 2, 3), ("calibration", 3, 3)]
    assert detector.precisions == {} and calibrated.quantiles == detector.quantiles
    found = calibrated.precisions["bfloat16"]
    assert found.provenance["images"] == 3 and found.activations is None
    plan = detector.plan(dtype="bfloat16")
    raw = [plan.raw_maps(detector.preprocessing(detector.preprocessing.decode(path))[None]) for path in images]
    pixels = [torch.cat([resized_raw_map(pair[which], (256, 256), pad_maps=True) for pair in raw]) for which in (0, 1)]
    expected = [np.quantile(one.double().numpy(), fraction) for one in pixels for fraction in (0.9, 0.995)]
    assert found.quantiles is not None
    assert dataclasses.astuple(found.quantiles) == pytest.approx(expected, rel=1e-4)
    predictions = _several(calibrated.predict(images, dtype="bfloat16"))
    assert found.threshold == pytest.approx(threshold_from_scores([one.score for one in predictions]), rel=1e-4)
    assert not any(one.label for one in predictions)


def test_float8_is_predicted_once_calibrated(folder: Path, tmp_path: Path) -> None:
    image = folder / "1.png"
    with pytest.raises(InputError, match=r"detector\.calibrated\(.*efficientad-fast calibrate"):
        small_detector().predict(image, dtype="float8")
    told: list[tuple[str, int, int]] = []
    calibrated = small_detector().calibrated([image], "float8", progress=lambda *one: told.append(one))
    assert told == [("activations", 1, 1), ("calibration", 1, 1)]
    loaded = Detector.load(calibrated.save(tmp_path / "m.safetensors"))
    prediction = _one(loaded.predict(image, dtype=torch.float8_e4m3fn))
    # The one image's score is the threshold, and the maps were those of the calibration.
    assert prediction.score == loaded.precisions["float8"].threshold and prediction.label is False


def test_activations_are_the_largest_of_all_images(detector: Detector, folder: Path) -> None:
    device, images = torch.device("cpu"), [folder / "2.png", folder / "0.png"]
    one, other = (largest_activations(detector, [image], device, 1, None) for image in images)
    together = largest_activations(detector, images, device, 1, None)
    assert one.keys() == other.keys() == together.keys()
    for layer, found in together.items():
        assert torch.equal(found, torch.maximum(one[layer], other[layer])), layer
    assert any(bool((one[layer] > other[layer]).any()) for layer in one)


def test_a_detector_without_quantiles_stays_so_in_every_precision(folder: Path) -> None:
    calibrated = small_detector().replaced(quantiles=None).calibrated(folder / "0.png", "bfloat16")
    found = calibrated.precisions["bfloat16"]
    score = _one(calibrated.predict(folder / "0.png", dtype="bfloat16")).score
    assert found.quantiles is None and found.threshold == pytest.approx(score)


@pytest.mark.parametrize(
    ("images", "dtype", "message"),
    [
        ([], "float16", "at least one"),
        (iter([]), "float16", "list, not an iterator"),
        ([np.zeros((8, 8, 3), np.uint8)], "float32", "float16, bfloat16, float8, got float32"),
        ([np.zeros((8, 8, 3), np.uint8)], "int8", "dtype"),
        (["absent.png"], "bfloat16", "absent"),
    ],
)
def test_what_cannot_be_calibrated_is_told(detector: Detector, images: object, dtype: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detector.calibrated(images, dtype)  # type: ignore[arg-type]


def test_without_a_dtype_the_device_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def default(device: torch.device, source: PlanInput) -> torch.dtype:
        asked.append(device)
        return torch.float64

    detector = small_detector()
    assert detector.dtype_on("cpu") == torch.float32 and detector.plan().dtype == torch.float32
    monkeypatch.setattr(detector_module, "default_dtype", default)
    other = small_detector()
    assert [other.dtype_on("cpu"), other.plan().dtype, other.dtype_on("cpu", "float16")] == [
        torch.float64,
        torch.float64,
        torch.float16,
    ]
    assert asked == [torch.device("cpu")]


# Batches that overlap, on a GPU


class GpuPlan:
    """Says that it is on a GPU, and writes down what is asked of it."""

    device, dtype = torch.device("cuda", 0), torch.float16

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.log: list[str] = []

    def submit(self, images: list[Tensor], preprocessing: Preprocessing, *, original_maps: bool = False) -> Pending:
        number = sum(one.startswith("submit") for one in self.log)
        self.log.append(f"submit {number}")
        made = self.plan.submit(images, preprocessing, original_maps=original_maps)

        def finish() -> tuple[Tensor, list[Tensor]]:
            self.log.append(f"result {number}")
            return made.result()

        return Pending(finish)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, detector: Detector) -> GpuPlan:
    plan = GpuPlan(detector.plan())
    monkeypatch.setattr(Detector, "plan", lambda *_: plan)
    return plan


def test_a_batch_is_submitted_before_the_result_of_the_one_before_is_taken(
    detector: Detector, folder: Path, gpu: GpuPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [folder / "0.png", folder / "absent.png", folder / "1.png", folder / "2.png", folder / "0.png"]
    paths += [folder / "absent.png"] * 2
    monkeypatch.setattr(detector_module._Ahead, "has_next", lambda self: True)
    predictions = _several(detector.predict(paths, batch_size=2, map_size="original"))
    assert gpu.log == ["submit 0", "submit 1", "result 0", "submit 2", "result 1", "result 2"]
    assert [one.source for one in predictions] == [str(path) for path in paths]
    assert [one.error is not None for one in predictions] == [path.name == "absent.png" for path in paths]
    for path, one in zip(paths, predictions, strict=True):
        if one.error is None:
            expected = gpu.plan.submit(
                [detector.preprocessing.decode(path)], detector.preprocessing, original_maps=True
            )
            scores, maps = expected.result()
            assert one.score == pytest.approx(float(scores[0]), rel=1e-5)
            assert one.anomaly_map is not None
            np.testing.assert_allclose(one.anomaly_map, maps[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("gpu")
def test_an_image_alone_and_a_stream_on_a_gpu(detector: Detector, folder: Path) -> None:
    alone = [_one(detector.predict(folder / f"{index}.png")).score for index in range(3)]
    for images in (folder, iter(sorted(folder.iterdir()))):
        scores = [one.score for one in detector.predict(images, batch_size=2)]  # type: ignore[union-attr]
        assert scores == pytest.approx(alone, rel=1e-5)
    with pytest.raises(ImageError, match="absent"):
        detector.predict(folder / "absent.png")


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_too_a_slow_source_gets_each_prediction_before_its_next_image(detector: Detector) -> None:
    test_a_slow_source_gets_each_prediction_before_its_next_image(detector)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_too_an_error_of_the_iterator_itself_comes_behind_what_was_predicted(detector: Detector) -> None:
    test_an_error_of_the_iterator_itself_reaches_the_caller(detector)


def test_what_was_decoded_ahead_can_be_asked_for() -> None:
    given = threading.Event()

    def source() -> Iterator[np.ndarray]:
        yield np.zeros((8, 8, 3), np.uint8)
        assert given.wait(20)

    with detector_module._decoding_ahead(source(), Preprocessing(), detector_module.DecodeOptions(), 1) as decoded:
        deadline = time.monotonic() + 20
        while not decoded.has_next():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert next(decoded).source == "image 0"
        assert not decoded.has_next()
        given.set()
        # Asked again after its end, it has ended.
        assert list(decoded) == list(decoded) == [] and not decoded.has_next()
