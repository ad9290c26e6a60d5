"""Training, calibration and augmentation, on tiny data with a teacher of few channels."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from efficientad_fast import Detector, Preprocessing, cli
from efficientad_fast.data.folders import Dataset, open_dataset
from efficientad_fast.errors import DatasetError, ImageError, InputError
from efficientad_fast.reference.losses import hard_feature_loss
from efficientad_fast.reference.maps import resized_raw_map
from efficientad_fast.reference.networks import PatchDescriptionNetwork, normalise_features
from efficientad_fast.training import student
from efficientad_fast.training.augment import adjust_brightness, adjust_contrast, adjust_saturation, augment
from efficientad_fast.training.calibrate import calibrate, images_for, threshold_from_scores
from efficientad_fast.training.state import save_state
from efficientad_fast.training.student import PenaltyImages, TrainSettings, quick_training, train
from tests.small_detector import CHANNELS, small_detector

SETTINGS = TrainSettings(
    steps=4, batch_size=2, crop=40, learning_rate=1e-3, cache_teacher=True, validation_fraction=0.3, save_every=2
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return open_dataset(folder)


def _teacher(*, padding: bool = False) -> PatchDescriptionNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PatchDescriptionNetwork("s", CHANNELS, padding=padding).eval().requires_grad_(False)


def _train(dataset: Dataset, out: Path, settings: TrainSettings = SETTINGS, **options: object) -> Detector:
    return train(dataset, out, settings, teacher=_teacher(), teacher_provenance={"made_by": "test"}, **options)  # type: ignore[arg-type]


def _same_weights(first: Detector, second: Detector) -> bool:
    pairs = ((first.student, second.student), (first.autoencoder, second.autoencoder))
    return all(torch.equal(value, b.state_dict()[key]) for a, b in pairs for key, value in a.state_dict().items())


class _StopAfter:
    """Sends the Ctrl-C signal to this process once a number of steps is done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage == "steps" and done == self.steps:
            signal.raise_signal(signal.SIGINT)

    def losses(self, step: int, losses: Mapping[str, float]) -> None: ...


def test_training_saves_a_detector_that_predicts(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    detector = _train(dataset, out)
    loaded = Detector.load(out)
    assert _same_weights(detector, loaded) and loaded.threshold == detector.threshold
    assert loaded.provenance["penalty"] == "none" and loaded.provenance["steps"] == 4
    assert loaded.provenance["training_images"] == 4 and loaded.provenance["validation_images"] == 2
    predictions = loaded.predict(dataset.root)
    assert isinstance(predictions, list) and all(np.isfinite(one.score) for one in predictions)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_step_changes_the_weights_and_the_loss_falls(dataset: Dataset, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Losses:
        def progress(self, stage: str, done: int, total: int) -> None: ...

        def losses(self, step: int, losses: Mapping[str, float]) -> None:
            seen.append(dict(losses))

    settings = dataclasses.replace(SETTINGS, steps=12, learning_rate=3e-3)
    observer = Losses()
    original = student.time.monotonic
    ticks = iter(range(0, 10_000))
    try:
        student.time.monotonic = lambda: float(next(ticks))  # type: ignore[assignment]
        _train(dataset, tmp_path / "m.safetensors", settings, observer=observer)
    finally:
        student.time.monotonic = original
    assert len(seen) == 12 and seen[0].keys() == {"hard", "ae", "stae"}
    first, last = (statistics.fmean(sum(step.values()) for step in part) for part in (seen[:3], seen[-3:]))
    assert last < first


def test_the_same_seed_gives_the_same_detector_and_another_seed_another(dataset: Dataset, tmp_path: Path) -> None:
    first = _train(dataset, tmp_path / "a.safetensors")
    assert _same_weights(first, _train(dataset, tmp_path / "b.safetensors"))
    assert not _same_weights(first, _train(dataset, tmp_path / "c.safetensors", dataclasses.replace(SETTINGS, seed=1)))


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_training_resumes_to_the_same_result(dataset: Dataset, tmp_path: Path, stop: int) -> None:
    penalty = PenaltyImages()
    whole = _train(dataset, tmp_path / "whole.safetensors", penalty=penalty)
    out = tmp_path / "broken.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _train(dataset, out, penalty=penalty, observer=_StopAfter(stop))
    assert not out.exists()
    resumed = _train(dataset, out, penalty=penalty, resume=True)
    assert _same_weights(whole, resumed)
    assert (resumed.quantiles, resumed.threshold) == (whole.quantiles, whole.threshold)


# What is kept of an interrupted training, and what happens to it


@pytest.fixture(scope="module")
def interrupted(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of ``dataset``, and a training of them that was stopped after one step."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(dataset.root, folder / "good")
    with pytest.raises(KeyboardInterrupt):
        _train(open_dataset(folder / "good"), folder / "m.safetensors", observer=_StopAfter(1))
    return folder


@pytest.fixture
def kept(interrupted: Path, tmp_path: Path) -> Path:
    shutil.copytree(interrupted, tmp_path / "kept")
    return tmp_path / "kept"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _refused(kept: Path, message: str, settings: TrainSettings = SETTINGS, **options: object) -> None:
    """Training in ``kept`` must fail with ``message`` and leave every file as it was."""
    before = _contents(kept)
    with pytest.raises(InputError, match=message):
        _train(open_dataset(kept / "good"), kept / "m.safetensors", settings, **options)
    assert _contents(kept) == before


def test_resuming_with_other_settings_says_which(kept: Path) -> None:
    _refused(kept, "learning_rate", dataclasses.replace(SETTINGS, learning_rate=2e-3), resume=True)
    _refused(
        kept, "max_value = None, but this run has 4095", dataclasses.replace(SETTINGS, max_value=4095), resume=True
    )
    _refused(kept, "apply_exif = False", dataclasses.replace(SETTINGS, apply_exif=True), resume=True)
    _refused(kept, "penalty = None, but this run has 'generated images'", penalty=PenaltyImages(), resume=True)


def test_resuming_with_other_images_names_them(kept: Path) -> None:
    split = student._split(open_dataset(kept / "good"), SETTINGS)
    names = [path.name for path in split[0]]
    (kept / "good" / names[0]).write_bytes((kept / "good" / names[1]).read_bytes() + bytes(7))
    _refused(kept, rf"other training images \(of another size: {names[0]}\)", resume=True)
    (kept / "good" / names[1]).rename(kept / "good" / f"{names[1][:-4]}b.png")
    _refused(kept, rf"missing: {names[1]}; new: {names[1][:-4]}b.png; of another size: {names[0]}", resume=True)


def test_resuming_with_another_teacher_of_the_same_provenance_is_refused(kept: Path) -> None:
    teacher = _teacher()
    teacher.conv4.bias[0] += 1
    with pytest.raises(InputError, match="teacher weights"):
        train(
            open_dataset(kept / "good"), kept / "m.safetensors", SETTINGS,
            teacher=teacher, teacher_provenance={"made_by": "test"}, resume=True,
        )  # fmt: skip


def test_an_interrupted_training_is_neither_dropped_nor_continued_unasked(kept: Path) -> None:
    assert student.kept_steps(kept / "m.safetensors") == 1
    _refused(kept, "1 of 4 steps .* Give --resume to continue it, or --restart to drop it")
    _refused(kept, "exclude each other", resume=True, restart=True)
    state = kept / "m.safetensors.training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    _refused(kept, "damaged")


def test_restarting_drops_what_is_kept_and_checks_the_images(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int]] = []

    class Stages:
        def progress(self, stage: str, done: int, total: int) -> None:
            stages.append((stage, done))

        def losses(self, step: int, losses: Mapping[str, float]) -> None: ...

    def take_steps(*arguments: object) -> None:
        assert arguments[6] == 0
        assert "state.safetensors" not in _contents(kept / "m.safetensors.training")
        raise KeyboardInterrupt

    monkeypatch.setattr(student, "_take_steps", take_steps)
    settings = dataclasses.replace(SETTINGS, learning_rate=2e-3)
    with pytest.raises(KeyboardInterrupt):
        _train(open_dataset(kept / "good"), kept / "m.safetensors", settings, restart=True, observer=Stages())
    assert stages[:6] == [("checking images", index + 1) for index in range(6)]
    assert [done for stage, done in stages[6:] if stage == "teacher statistics"] == [1, 2, 3, 4]


def test_resuming_what_is_not_there_leaves_the_finished_detector(kept: Path) -> None:
    shutil.rmtree(kept / "m.safetensors.training")
    _refused(kept, "no training of .*m.safetensors to resume. Leave out --resume", resume=True)
    (kept / "m.safetensors").write_bytes(b"a detector")
    _refused(kept, "is there, so it may be finished. Leave out --resume", resume=True)


def test_what_cannot_end_well_is_refused_before_the_first_step(dataset: Dataset, kept: Path) -> None:
    with pytest.raises(InputError, match="padding is True, but the teacher's is False"):
        _train(dataset, kept / "n.safetensors", dataclasses.replace(SETTINGS, padding=True, crop=None))
    (kept / "n.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        _train(dataset, kept / "n.safetensors")


def test_a_disk_that_is_too_small_for_the_cached_features_is_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4 * 56 * 56 * CHANNELS * 2 - 1))
    with pytest.raises(InputError, match="Make room"):
        _train(dataset, tmp_path / "m.safetensors")


def test_all_bad_images_are_named_before_anything_is_changed(kept: Path) -> None:
    train_files, validation = student._split(open_dataset(kept / "good"), SETTINGS)
    shutil.copytree(kept / "good", kept / "penalty")
    penalty = PenaltyImages(tuple(sorted((kept / "penalty").iterdir())), "penalty")
    penalty.files[2].write_bytes(b"no image")
    validation[1].write_bytes(validation[1].read_bytes()[:300])
    train_files[0].write_bytes(b"")
    before = _contents(kept)
    with pytest.raises(ImageError, match="3 of 12 images cannot be used") as caught:
        _train(open_dataset(kept / "good"), kept / "m.safetensors", penalty=penalty, restart=True)
    assert _contents(kept) == before
    lines = str(caught.value).splitlines()[1:]
    for line, path, why in zip(
        lines, (train_files[0], validation[1], penalty.files[2]), ("empty", "truncated", "not an image"), strict=True
    ):
        assert line.startswith(str(path)) and why in line


def test_a_bad_validation_image_is_reported_on_resuming_too(kept: Path) -> None:
    _, validation = student._split(open_dataset(kept / "good"), SETTINGS)
    validation[0].write_bytes(b"no image")
    _refused(kept, f"1 of 6 images cannot be used:\n{validation[0]}", resume=True)


def test_an_image_that_vanishes_in_the_middle_does_not_take_the_steps_with_it(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(kept / "m.safetensors.training")
    load = student._Batches.load

    def failing(self: student._Batches, step: int) -> student._StepData:
        if step == 3:
            raise ImageError("gone.png: no such file")
        return load(self, step)

    monkeypatch.setattr(student._Batches, "load", failing)
    with pytest.raises(ImageError, match="gone"):
        _train(open_dataset(kept / "good"), kept / "m.safetensors")
    assert student.kept_steps(kept / "m.safetensors") == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [(7, "7 of 9 steps are kept. Give the same command with --resume"), (0, "nothing is kept")],
)
def test_ctrl_c_says_what_is_kept(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, message: str
) -> None:
    def interrupted(dataset: Dataset, out: Path, settings: TrainSettings, **options: object) -> Detector:
        assert options["resume"] and not options["restart"]
        if steps:
            save_state(student._state_file(out), {}, torch.optim.SGD([torch.zeros(1)]), steps, {"steps": 9})
        raise KeyboardInterrupt

    monkeypatch.setattr(student, "train", interrupted)
    arguments = ["train", dataset.root, "--out", tmp_path / "m.safetensors", "--teacher", "random", "--steps", 9]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in [*arguments, "--resume"]])
    assert result.exit_code == 130
    assert message in result.stderr.replace("\n", " ")


def test_caching_the_teacher_changes_its_features_by_half_precision_only(dataset: Dataset, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, augment=False)
    paths = dataset.train
    plain = student._Batches(paths, settings, None, None)
    teacher = _teacher()
    mean, std, features = student.teacher_statistics(
        teacher, paths, settings, torch.device("cpu"), tmp_path / "f.npy", student._Silent()
    )
    cached = student._Batches(paths, settings, None, features)
    for step in range(3):
        one, other = plain.load(step), cached.load(step)
        assert torch.equal(one.crops, other.crops) and one.places == other.places
        assert one.crop_features is None and other.crop_features is not None and other.whole_features is not None
        torch.testing.assert_close(other.crop_features.float(), teacher(one.crops), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(other.whole_features.float(), teacher(one.whole), rtol=2e-3, atol=2e-3)
    assert mean.shape == std.shape == (CHANNELS,)


def test_teacher_statistics_are_those_of_all_features(dataset: Dataset) -> None:
    teacher = _teacher()
    mean, std, _ = student.teacher_statistics(
        teacher, dataset.train, SETTINGS, torch.device("cpu"), None, student._Silent()
    )
    detector = small_detector()
    images = [np.array(Image.open(path).convert("RGB")) for path in dataset.train]
    batch = torch.stack([detector.preprocessing(torch.from_numpy(image).permute(2, 0, 1)) for image in images])
    with torch.inference_mode():
        values = teacher.double()(batch.double()).movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(mean.numpy(), values.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std(1), rtol=1e-4)


@pytest.mark.parametrize("augmented", [True, False])
def test_a_step_computes_the_losses_of_the_paper(dataset: Dataset, augmented: bool) -> None:
    """With the crop as large as the image, the crop path must give what plain code on whole images gives."""
    settings = dataclasses.replace(SETTINGS, crop=256, cache_teacher=False, augment=augmented, hard_fraction=0.9)
    data = student._Batches(dataset.train, settings, None, None).load(0)
    assert torch.equal(data.crops, data.whole) is not augmented
    detector = small_detector()
    mean, std = torch.full((1, CHANNELS, 1, 1), 0.1), torch.full((1, CHANNELS, 1, 1), 0.5)
    losses = student.step_losses(detector.teacher, detector.student, detector.autoencoder, data, mean, std, settings)
    assert data.places[0] == (slice(0, 56), slice(0, 56))
    image, whole = (normalise_features(detector.teacher(one), mean, std) for one in (data.crops, data.whole))
    expected = hard_feature_loss(image, detector.student(data.crops)[:, :CHANNELS], 0.9)
    torch.testing.assert_close(losses["hard"], expected)
    decoded = detector.autoencoder(data.whole)
    torch.testing.assert_close(losses["ae"], ((whole - decoded) ** 2).mean())
    stae = ((decoded - detector.student(data.whole)[:, CHANNELS:]) ** 2).mean()
    torch.testing.assert_close(losses["stae"], stae)


def test_a_small_crop_gives_the_part_of_the_whole_images_features(dataset: Dataset) -> None:
    settings = dataclasses.replace(SETTINGS, cache_teacher=False, autoencoder_images=1)
    data = student._Batches(dataset.train, settings, None, None).load(1)
    assert len(data.crops) == 2 and len(data.whole) == len(data.whole_crops) == 1
    teacher = _teacher()
    rows, columns = data.places[0]
    torch.testing.assert_close(
        teacher(data.whole_crops)[0], teacher(data.whole)[0][:, rows, columns], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [(257, 301), (256, 259)])
def test_crops_lie_inside_images_whose_sides_are_no_multiples_of_4(dataset: Dataset, size: tuple[int, int]) -> None:
    settings = dataclasses.replace(SETTINGS, size=size, crop=96, cache_teacher=False)
    batches = student._Batches(dataset.train, settings, None, None)
    rows, columns = batches._starts(96)
    assert rows == range((size[0] - 96) // 4 + 1) and columns == range((size[1] - 96) // 4 + 1)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    teacher = _teacher()
    features = teacher(image)
    for top, left in itertools.product(rows, columns):
        place = (slice(top, top + 16), slice(left, left + 16))
        crop = batches._crop(image, place)
        assert crop.shape == (1, 3, 96, 96) and features[:, :, *place].shape == (1, CHANNELS, 16, 16)
        if top in (0, rows[-1]) and left in (0, columns[-1]):
            torch.testing.assert_close(teacher(crop), features[:, :, *place], rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    drawn = [[place.start for place in batches._place(generator)] for _ in range(1000)]
    assert {top for top, _ in drawn} == set(rows) and {left for _, left in drawn} == set(columns)


def test_the_quick_preset_takes_a_step_at_a_size_that_is_no_multiple_of_4(dataset: Dataset) -> None:
    settings = dataclasses.replace(quick_training(), size=(257, 259))
    data = student._Batches(dataset.train, settings, None, None).load(0)
    detector = small_detector()
    mean, std = torch.zeros(1, CHANNELS, 1, 1), torch.ones(1, CHANNELS, 1, 1)
    losses = student.step_losses(detector.teacher, detector.student, detector.autoencoder, data, mean, std, settings)
    assert all(torch.isfinite(value) for value in losses.values())


def test_every_image_is_seen_once_an_epoch(dataset: Dataset) -> None:
    batches = student._Batches(dataset.train, dataclasses.replace(SETTINGS, batch_size=4), None, None)
    drawn = [index for step in range(6) for index in batches._indices(step)]
    assert [sorted(drawn[start : start + 6]) for start in (0, 6, 12, 18)] == [list(range(6))] * 4
    assert drawn[:6] != drawn[6:12]


def test_the_paper_settings_lower_the_rate_after_95_percent() -> None:
    settings = TrainSettings()
    rates = [student._learning_rate(settings, step) for step in (0, 66_499, 66_500, 69_999)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    "change",
    [{"autoencoder_images": 3}, {"crop": 34}, {"crop": 32}, {"crop": 260}, {"crop": 64, "padding": True}, {"steps": 0}],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]


def test_whole_images_with_padding_train(dataset: Dataset, tmp_path: Path) -> None:
    settings = TrainSettings(steps=1, padding=True, validation_fraction=0.3)
    teacher = _teacher(padding=True)
    out = tmp_path / "m.safetensors"
    detector = train(dataset, out, settings, teacher=teacher, teacher_provenance={}, penalty=PenaltyImages())
    assert detector.student.padding and detector.provenance["penalty"] == "generated images"


# How images are decoded


def _inputs(settings: TrainSettings, dataset: Dataset) -> dict[str, torch.Tensor]:
    """All that a training takes from its images: teacher statistics, a step's data, quantiles."""
    paths = dataset.train[:2]
    teacher, observer = _teacher(), student._Silent()
    mean, std, _ = student.teacher_statistics(teacher, paths, settings, torch.device("cpu"), None, observer)
    step = student._Batches(paths, settings, PenaltyImages(paths, "files"), None).load(0)
    assert step.penalty is not None
    quantiles, _ = calibrate(small_detector(preprocessing=settings.preprocessing), paths[:1])
    values = torch.tensor(dataclasses.astuple(quantiles))
    return {"mean": mean, "std": std, "crops": step.crops, "whole": step.whole, "penalty": step.penalty, "q": values}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Dataset]:
    """The same grey images in files of 12, 16 and 8 bits. Fifteenths of white are whole numbers in all three."""
    folder = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(3)
    for index in range(4):
        fifteenths = rng.integers(0, 16, (40, 30), dtype=np.uint16)
        for bits, white, dtype in ((12, 4095, np.uint16), (16, 65535, np.uint16), (8, 255, np.uint8)):
            (folder / str(bits)).mkdir(exist_ok=True)
            pixels = (fifteenths * np.uint16(white // 15)).astype(dtype)
            Image.fromarray(pixels).save(folder / str(bits) / f"{index}.png")
    return {bits: open_dataset(folder / str(bits)) for bits in (12, 16, 8)}


def test_12_bit_images_give_what_the_same_images_give_in_other_depths(deep: dict[int, Dataset]) -> None:
    inputs = _inputs(dataclasses.replace(SETTINGS, max_value=4095), deep[12])
    for bits in (16, 8):
        torch.testing.assert_close(_inputs(SETTINGS, deep[bits]), inputs, rtol=1e-5, atol=1e-6)


def test_a_detector_of_12_bit_images_keeps_their_white_and_needs_it(deep: dict[int, Dataset], tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=1, max_value=4095, apply_exif=True)
    _train(deep[12], tmp_path / "m.safetensors", settings)
    detector = Detector.load(tmp_path / "m.safetensors")
    assert (detector.preprocessing.max_value, detector.preprocessing.apply_exif) == (4095, True)
    assert detector.provenance["settings"]["max_value"] == 4095
    paths, validation = student._split(deep[8], SETTINGS)
    mean, std, _ = student.teacher_statistics(_teacher(), paths, SETTINGS, torch.device("cpu"), None, student._Silent())
    torch.testing.assert_close(detector.teacher_mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(detector.teacher_std, std, rtol=1e-6, atol=1e-7)
    quantiles, _ = calibrate(detector, validation)
    assert detector.quantiles is not None
    assert dataclasses.astuple(detector.quantiles) == pytest.approx(dataclasses.astuple(quantiles), rel=1e-4)
    with pytest.raises(ImageError, match=r"4 of 4 images cannot be used:\n.*0.png: .*1023"):
        _train(deep[12], tmp_path / "n.safetensors", dataclasses.replace(SETTINGS, max_value=1023))
    with pytest.raises(InputError, match="max_value"):
        dataclasses.replace(SETTINGS, max_value=0)


def test_photographs_are_turned_upright_where_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for index in range(2):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        for name, content, tag in (("turned", np.rot90(pixels), exif), ("upright", pixels, None)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(content).save(tmp_path / name / f"{index}.png", exif=tag)
    turned, upright = (open_dataset(tmp_path / name) for name in ("turned", "upright"))
    expected = _inputs(SETTINGS, upright)
    torch.testing.assert_close(_inputs(dataclasses.replace(SETTINGS, apply_exif=True), turned), expected)
    lying = student._Batches(turned.train, SETTINGS, None, None).load(0)
    assert not torch.allclose(lying.whole, expected["whole"], atol=0.1)


def test_the_command_passes_on_how_images_are_decoded(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainSettings] = []

    def stopped(dataset: Dataset, out: Path, settings: TrainSettings, **options: object) -> Detector:
        seen.append(settings)
        raise InputError("stopped")

    monkeypatch.setattr(student, "train", stopped)
    arguments = ["train", dataset.root, "--out", tmp_path / "m.safetensors", "--teacher", "random"]
    for options in ([], ["--max-value", 4095, "--apply-exif"]):
        CliRunner().invoke(cli.app, [str(argument) for argument in [*arguments, *options]])
    assert [(one.max_value, one.apply_exif) for one in seen] == [(None, False), (4095, True)]


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "only.png")
    with pytest.raises(DatasetError, match="at least 2"):
        _train(open_dataset(tmp_path), tmp_path / "m.safetensors")


def test_blank_images_are_refused_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "blank"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    with pytest.raises(InputError, match="blank"):
        _train(open_dataset(folder), tmp_path / "m.safetensors")


# Calibration


def test_quantiles_are_those_of_all_pixels_of_all_maps(dataset: Dataset) -> None:
    for convention in ("resized", "native"):
        detector = small_detector(map_convention=convention)
        found, scores = calibrate(detector, dataset.train)
        predictions = detector.replaced(quantiles=found).predict(dataset.train)
        assert isinstance(predictions, list)
        assert scores == pytest.approx([one.score for one in predictions], rel=1e-5)
        pixels: list[list[np.ndarray]] = [[], []]
        for path in dataset.train:
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            for which, raw in enumerate(detector.plan().raw_maps(detector.preprocessing(image)[None])):
                sized = resized_raw_map(raw, (256, 256), pad_maps=True) if convention == "resized" else raw
                pixels[which].append(sized.numpy().ravel())
        expected = [
            float(np.quantile(np.concatenate(values).astype(np.float64), fraction))
            for values in pixels
            for fraction in (0.9, 0.995)
        ]
        assert dataclasses.astuple(found) == pytest.approx(expected, rel=1e-6)


def test_the_images_to_calibrate_on_are_those_that_training_did_not_see(dataset: Dataset, tmp_path: Path) -> None:
    detector = _train(dataset, tmp_path / "m.safetensors")
    held_back = student._split(dataset, SETTINGS)[1]
    chosen, which = images_for(detector, dataset.root)
    assert chosen == held_back and f"{len(held_back)} images" in which and "held back" in which
    assert images_for(small_detector(), dataset.root)[0] == dataset.train

    layout = tmp_path / "layout"
    for part in ("train/good", "validation/good", "test/good"):
        shutil.copytree(dataset.root, layout / part)
    chosen, which = images_for(detector, layout)
    assert [path.parent for path in chosen] == [layout / "validation" / "good"] * 6 and "validation" in which
    (layout / "train/good/0.png").unlink()
    shutil.rmtree(layout / "validation")
    # Not the images that it was trained on: there is one less.
    assert len(images_for(detector, layout)[0]) == 5
    assert len(images_for(detector, layout / "test" / "good")[0]) == 6


def test_quantiles_of_identical_blank_maps_are_refused() -> None:
    detector = small_detector()
    for network in (detector.teacher, detector.student, detector.autoencoder):
        for parameter in network.parameters():
            parameter.zero_()
    image = np.zeros((8, 8, 3), np.uint8)
    detector = detector.replaced(teacher_mean=torch.zeros(CHANNELS))
    with pytest.raises(InputError, match="differ"):
        calibrate(detector, [image])  # type: ignore[list-item]


def test_the_threshold_rule() -> None:
    assert threshold_from_scores([1.0]) == 1.0
    assert threshold_from_scores([0.0, 2.0]) == pytest.approx(1 + 3 * 2**0.5)
    scores = [0.0] * 99 + [10.0]
    assert threshold_from_scores(scores) == 10.0
    for bad in ([], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(InputError):
            threshold_from_scores(bad)


# Augmentation


def test_adjustments_against_hand_computed_values() -> None:
    image = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)
    luma = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    assert adjust_brightness(image, 1.2).flatten().tolist() == pytest.approx([0.24, 0.48, 0.72])
    expected = [1.2 * value - 0.2 * luma for value in (0.2, 0.4, 0.6)]
    assert adjust_contrast(image, 1.2).flatten().tolist() == pytest.approx(expected)
    assert adjust_saturation(image, 1.2).flatten().tolist() == pytest.approx(expected)
    two = torch.stack([image, image + 0.2], dim=-1)[:, :, 0]
    mean = luma + 0.1
    assert adjust_contrast(two, 0.8)[0, 0].tolist() == pytest.approx([0.8 * 0.2 + 0.2 * mean, 0.8 * 0.4 + 0.2 * mean])


def test_augmenting_uses_all_three_adjustments_within_their_range() -> None:
    image = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1).repeat(1, 2, 2)
    generator = torch.Generator().manual_seed(0)
    results = [augment(image, generator)[:, 0, 0] for _ in range(100)]
    brightened = [one for one in results if float(one[2] / one[0]) == pytest.approx(3.0, rel=1e-4)]
    assert 10 < len(brightened) < 60
    assert all(0.16 - 1e-6 <= float(one[0]) <= 0.24 + 1e-6 for one in brightened)
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in results)


# The pretraining penalty


def test_penalty_images_are_drawn_from_the_seed(dataset: Dataset) -> None:
    for source in (PenaltyImages(), PenaltyImages(dataset.train, "files")):
        first, again, other = (
            source.draw(torch.Generator().manual_seed(seed), SETTINGS.preprocessing) for seed in (0, 0, 5)
        )
        assert first.shape == (3, 256, 256)
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> tuple[PenaltyImages, np.ndarray, np.ndarray]:
    """An image for the penalty, and by Pillow and numpy what the student is to see of it: in colour and in grey."""
    path = tmp_path_factory.mktemp("penalty") / "photograph.png"
    pixels = np.random.default_rng(2).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    planes = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(3)]
    large = np.stack([np.asarray(plane.resize((512, 512), Image.Resampling.BILINEAR)) for plane in planes]) / 255
    red, green, blue = large[:, 128:384, 128:384]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    mean, std = (np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    views = [(np.stack(planes) - mean) / std for planes in ((red, green, blue), (grey, grey, grey))]
    return PenaltyImages((path,), "photograph"), views[0], views[1]


def test_penalty_images_are_the_centre_of_the_image_at_512_in_colour_or_grey(
    dataset: Dataset, photograph: tuple[PenaltyImages, np.ndarray, np.ndarray]
) -> None:
    source, *views = photograph
    batches = student._Batches(dataset.train, TrainSettings(), source, None)
    matched = set()
    for step in range(8):
        penalty = batches.load(step).penalty
        assert penalty is not None and penalty.shape == (1, 3, 256, 256)
        errors = [np.abs(penalty[0].numpy() - view).max() for view in views]
        assert min(errors) < 1e-4
        matched.add(int(np.argmin(errors)))
    assert matched == {0, 1}


def test_with_crops_the_penalty_is_taken_inside_that_centre(
    dataset: Dataset, photograph: tuple[PenaltyImages, np.ndarray, np.ndarray]
) -> None:
    source, *views = photograph
    settings = dataclasses.replace(SETTINGS, batch_size=4, crop=96)
    penalty = student._Batches(dataset.train, settings, source, None).load(0).penalty
    assert penalty is not None and penalty.shape == (4, 3, 96, 96)
    places = set()
    for crop in penalty.numpy():
        corners = [np.abs(view[:, :161, :161] - crop[:, :1, :1]).max(0) for view in views]
        which = int(np.argmin([corner.min() for corner in corners]))
        top, left = np.unravel_index(np.argmin(corners[which]), (161, 161))
        np.testing.assert_allclose(crop, views[which][:, top : top + 96, left : left + 96], atol=1e-4)
        places.add((int(top), int(left)))
    assert len(places) == 4


def test_three_in_ten_penalty_images_are_grey(
    photograph: tuple[PenaltyImages, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "PENALTY_LOAD_SIDE", 4)
    monkeypatch.setattr(student, "PENALTY_SIDE", 2)
    pixels = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(student.Preprocessing, "decode", lambda self, path: pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    draws = 2000
    grey = 0
    for seed in range(draws):
        image = photograph[0].draw(torch.Generator().manual_seed(seed), SETTINGS.preprocessing) * std + mean
        grey += int(torch.allclose(image[0], image[1], atol=1e-5))
    assert grey / draws == pytest.approx(0.3, abs=0.03)


def _one_by_one(weights: list[list[float]]) -> torch.nn.Conv2d:
    convolution = torch.nn.Conv2d(3, len(weights), 1, bias=False)
    convolution.weight.data = torch.tensor(weights, dtype=torch.float32)[:, :, None, None]
    return convolution


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("penalised", [True, False])
def test_a_step_descends_the_sum_of_the_terms_computed_by_hand(augmented: bool, penalised: bool) -> None:
    """Networks of one 1x1 convolution, images of four pixels, and plain gradient descent with rate 1.

    T = r, A = g, S_st = r + 2 g, S_ae = 3 b. The penalty must see the half S_st alone: S_ae is 27 on its image.
    """
    teacher, autoencoder = _one_by_one([[1, 0, 0]]), _one_by_one([[0, 1, 0]])
    pupil = _one_by_one([[1, 2, 0], [0, 0, 3]])
    image = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 1], [1, 1, 2, 2]]).view(1, 3, 2, 2)
    outside = torch.tensor([[1.0, -1, 1, 2], [0, 1, 1, -1], [9, 9, 9, 9]]).view(1, 3, 2, 2)
    places = [(slice(0, 2), slice(0, 2))]
    data = student._StepData(places, image, None, image, image, None, outside if penalised else None)
    settings = TrainSettings(steps=1, learning_rate=1.0, hard_fraction=0.0, augment=augmented)
    zero, one = torch.zeros(1), torch.ones(1)

    losses = student.step_losses(
        teacher, pupil, autoencoder, data, zero.view(1, 1, 1, 1), one.view(1, 1, 1, 1), settings
    )
    # T - S_st = 0 -2 0 -2; T - A = 1 1 3 3; A - S_ae = -3 -2 -6 -5; S_st outside = 1 1 3 0.
    expected = {"hard": 2.0, "ae": 5.0, "stae": 18.5} | ({"penalty": 2.75} if penalised else {})
    assert {name: value.item() for name, value in losses.items()} == expected

    class Batches:
        def ahead(self, first: int, last: int) -> list[tuple[int, student._StepData]]:
            return [(0, data)]

    optimiser = torch.optim.SGD([*pupil.parameters(), *autoencoder.parameters()], lr=0.1)
    student._take_steps(
        teacher, pupil, autoencoder, optimiser, Batches(), settings, 0, (zero, one), lambda step: None,
        student._Silent(),
    )  # fmt: skip
    # By hand, d hard / d st = 6 2 3, d penalty / d st = 1.5 2 22.5, d stae / d ae = 22.5 3.5 13.5, and for the
    # autoencoder d ae = -12 -2 -7, d stae = -22.5 -3.5 -13.5.
    st = [1 - 6 - 1.5, 2 - 2 - 2, 0 - 3 - 22.5] if penalised else [1 - 6, 2 - 2, 0 - 3]
    assert pupil.weight.flatten(1).tolist() == [st, [-22.5, -3.5, 3 - 13.5]]
    assert autoencoder.weight.flatten().tolist() == [12 + 22.5, 1 + 2 + 3.5, 7 + 13.5]


def test_the_quick_preset_is_valid() -> None:
    assert quick_training().crop is not None and quick_training(steps=7).steps == 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
def test_calibration_holds_no_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 images, whose maps take 525 MB when resized."""
    detector = small_detector()
    generator = torch.Generator().manual_seed(0)

    class RandomMaps:
        device = torch.device("cpu")
        scored_maps = detector.plan().scored_maps

        def raw_maps(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pair = torch.rand(2, 1, 1, 56, 56, generator=generator)
            return pair[0], pair[1]

    monkeypatch.setattr(Detector, "plan", lambda *_: plan)
    monkeypatch.setattr(Preprocessing, "decode", lambda *_: torch.zeros(3, 256, 256, dtype=torch.uint8))
    plan = RandomMaps()
    calibrate(detector, [Path("image")] * 3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _peak_kib()
    calibrate(detector, [Path("image")] * 1000)
    assert _peak_kib() - before < 20 * 1024, "more than for 3 images"


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
