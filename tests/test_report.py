"""The report is taken apart: what it shows, in which order, that it stands alone, and what it does with odd input."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficientad_fast.errors import InputError
from efficientad_fast.evaluation import Evaluation, ImageResult, summarize
from efficientad_fast.report import html, overlay, plots, save_overlay, write_report
from efficientad_fast.report.overlays import colour_range

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's elements and text; fails where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def make_evaluation(
    root: Path,
    scores: dict[str, list[float]],
    *,
    threshold: float = 0.4,
    masks: bool = True,
    size: tuple[int, int] = (30, 20),
    name: str = "parts",
) -> Evaluation:
    """Images on disk with flat maps of their scores; a NaN score is an image that failed."""
    results = []
    for kind, values in scores.items():
        folder = root / "test" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for index, score in enumerate(values):
            path = folder / f"{index:03}.png"
            Image.new("RGB", size, (90, 120, 150)).save(path)
            truth: tuple[Path, ...] = ()
            if masks and kind != "good":
                truth = (folder / f"{index:03}.mask",)
                Image.new("L", size, 255).save(truth[0], "PNG")
            failed = math.isnan(score)
            results.append(
                ImageResult(
                    path=path,
                    defect=kind,
                    masks=truth,
                    score=score,
                    label=None if failed else score > threshold,
                    anomaly_map=None if failed else np.full((8, 8), score, np.float32),
                    error=f"{path}: cannot be read" if failed else None,
                )
            )
    return summarize(
        results,
        dataset=name,
        root=root,
        threshold=threshold,
        seconds=2.0,
        settings={"batch_size": 1, "device": "cpu", "dtype": "float32"},
    )


SCORES: dict[str, list[float]] = {
    "good": [0.1, 0.2, 0.15, 0.6, 0.5],
    "logical_screw": [0.3, 0.7],
    "structural_dent": [0.9, 0.8, 0.2, 1.5, math.nan],
}


def write(evaluation: Evaluation, tmp_path: Path, **settings: Any) -> Page:
    summary = settings.pop("detector_summary", {"model": "EfficientAD-S"})
    return Page(write_report(evaluation, tmp_path / "report.html", detector_summary=summary, **settings))


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them is most of a report's time."""
    monkeypatch.setattr(html, "score_histogram", lambda evaluation: "")
    monkeypatch.setattr(html, "roc_plot", lambda evaluation: "")


def cards(page: Page) -> list[str]:
    """File names of the cards, in order."""
    return re.findall(r"(test/\S+\.png)", page.text.split("Images", 1)[1].split("Not scored")[0])


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = write(make_evaluation(tmp_path, SCORES), tmp_path)
    assert len(page.images()) == 1 + 5 * 2 + 6 * 3  # the colour scale; good images have no mask
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    addresses = re.findall(r"https?://[^\"'\s<)]+", page.source)
    assert {address.split("/")[2] for address in addresses} <= {"www.w3.org"}  # names of XML namespaces
    assert "@import" not in page.source
    policies = [attributes for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes]
    assert "default-src 'none'" in policies[0]["content"]
    names = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert all(count == 1 for count in names.values())


@pytest.mark.usefixtures("without_plots")
def test_what_the_head_says(tmp_path: Path) -> None:
    summary = {"model": "EfficientAD-S", "data": {"name": "parts", "images": 70}, "sizes": [256, 320]}
    page = write(make_evaluation(tmp_path, SCORES), tmp_path, detector_summary=summary)
    assert "4 of 6 defective images found (66.7 %), with 2 false alarms in 5 good images (40.0 %)." in page.text
    assert "Missed 2 of 6 defective" in page.text
    assert "False alarms 2 of 5 good" in page.text
    assert "Threshold 0.4 precision 66.7 %" in page.text
    assert "model EfficientAD-S" in page.text
    assert "data name parts images 70" in page.text
    assert "sizes 256, 320" in page.text
    assert "1 of 12 images could not be scored" in page.text
    assert "all structural" in page.text
    assert "all logical" in page.text


@pytest.mark.usefixtures("without_plots")
def test_mistakes_come_first_and_the_worst_of_them_before_the_others(tmp_path: Path) -> None:
    page = write(make_evaluation(tmp_path, SCORES), tmp_path)
    assert cards(page) == [
        "test/structural_dent/002.png",
        "test/logical_screw/000.png",
        "test/good/003.png",
        "test/good/004.png",
        "test/good/001.png",
        "test/good/002.png",
        "test/good/000.png",
        "test/logical_screw/001.png",
        "test/structural_dent/003.png",
        "test/structural_dent/000.png",
        "test/structural_dent/001.png",
    ]
    verdicts = re.findall(r"(✕ missed|! false alarm|✓ correct)", page.text)
    assert verdicts == ["✕ missed"] * 2 + ["! false alarm"] * 2 + ["✓ correct"] * 7
    assert "Not scored 1 images" in page.text
    assert "test/structural_dent/004.png" in page.text.split("Not scored")[1]


@pytest.mark.usefixtures("without_plots")
def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    scores = {"good": [0.01 * n for n in range(20)], "dent": [0.9] * 3}
    evaluation = make_evaluation(tmp_path, scores)
    page = write(evaluation, tmp_path, max_per_kind=4)
    assert "Correct: good 4 of 20, evenly spaced from the highest score to the lowest; 16 left out" in page.text
    assert "Correct: dent 3 of 3" in page.text
    assert cards(page)[:4] == [f"test/good/{n:03}.png" for n in (19, 13, 6, 0)]
    assert "Missed defects none" in page.text
    assert "False alarms none" in page.text
    none = write(evaluation, tmp_path, max_per_kind=0)
    assert cards(none) == []
    assert "Correct: good 0 of 20" in none.text


@pytest.mark.usefixtures("without_plots")
def test_beyond_a_limit_only_the_worst_mistakes_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_MISTAKES", 6)
    scores = {"good": [0.5, 0.6], "dent": [0.1 + 0.01 * n for n in range(9)]}
    page = write(make_evaluation(tmp_path, scores), tmp_path)
    assert "Missed defects the worst 4 of 9; 5 left out" in page.text
    assert "False alarms all 2, the worst first" in page.text
    assert cards(page) == [f"test/dent/{n:03}.png" for n in range(4)] + ["test/good/001.png", "test/good/000.png"]


@pytest.mark.usefixtures("without_plots")
def test_thumbnails_shrink_where_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = make_evaluation(tmp_path, {"good": [0.1], "dent": [0.9]}, size=(600, 300))
    sizes = {picture.size for picture in write(evaluation, tmp_path).images()[1:]}
    assert sizes == {(256, 128)}
    monkeypatch.setattr(html, "_PIXEL_BUDGET", 2 * 2 * 100**2)
    assert {picture.size for picture in write(evaluation, tmp_path).images()[1:]} == {(100, 50)}
    monkeypatch.setattr(html, "_PIXEL_BUDGET", 1)
    assert {picture.size for picture in write(evaluation, tmp_path).images()[1:]} == {(96, 48)}


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = '<img src=x onerror="alert(1)">&'
    evaluation = make_evaluation(
        tmp_path, {"good": [0.1, math.nan], hostile: [0.2, 0.9], "$x^2$": [0.5]}, name="<script>alert(2)</script>"
    )
    page = write(evaluation, tmp_path, detector_summary={"<b>": {"x": "</dd><script>"}})
    assert "<script" not in page.source
    assert "<b>" not in page.source.replace('<b style="left', "")
    assert all(attributes.get("src") != "x" for tag, attributes in page.elements if tag == "img")
    assert hostile in page.text
    # In the plots too, where a pair of dollar signs would be a formula.
    plot = page.source.split("<svg", 1)[1].split("</svg>", 1)[0]
    assert "&lt;img src=x onerror" in plot
    assert "$x^2$" in plot


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"good": [0.1, 0.5]}, "No defective image was scored. There was 1 false alarm in 2 good images"),
        ({"dent": [0.1, 0.5]}, "1 of 2 defective images found (50.0 %). No good image was scored."),
        ({"good": [math.nan], "dent": [math.nan]}, "No defective image was scored. No good image was scored."),
        ({"good": [0.3, 0.3], "dent": [0.3]}, "0 of 1 defective images found"),
        ({"good": [-0.3, -0.1], "dent": [-0.05, math.inf]}, "1 of 2 defective images found"),
        ({f"kind {n}": [n / 10] for n in range(12)} | {"good": [0.2]}, "7 of 12 defective images found"),
    ],
)
def test_odd_sets(tmp_path: Path, scores: dict[str, list[float]], expected: str) -> None:
    page = write(make_evaluation(tmp_path, scores, masks=False), tmp_path)
    assert expected in page.text


@pytest.mark.parametrize("threshold", [math.inf, 0.0, -1.0])
def test_odd_thresholds(tmp_path: Path, threshold: float) -> None:
    page = write(make_evaluation(tmp_path, SCORES, threshold=threshold), tmp_path)
    assert f"Threshold {threshold:.4g}" in page.text
    assert "x threshold" not in page.text


@pytest.mark.usefixtures("without_plots")
def test_images_that_are_gone_are_said_to_be(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, SCORES)
    (tmp_path / "test/good/000.png").unlink()
    (tmp_path / "test/structural_dent/000.mask").write_bytes(b"")
    page = write(evaluation, tmp_path)
    assert page.text.count("The image can no longer be read") == 1
    assert page.text.count("The mask can no longer be read") == 1


@pytest.mark.usefixtures("without_plots")
def test_16_bit_images_are_shown(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, {"good": [0.1], "dent": [0.9]})
    Image.fromarray(np.full((20, 30), 32768, np.uint16)).save(tmp_path / "test/good/000.png")
    picture = write(evaluation, tmp_path).images()[1]
    assert picture.size == (30, 20)
    assert np.asarray(picture).mean() == pytest.approx(128, abs=1)


@pytest.mark.usefixtures("without_plots")
def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = make_evaluation(tmp_path / "set", SCORES)
    target = tmp_path / "out" / "report.html"
    write_report(evaluation, target, detector_summary={})
    before = target.read_bytes()

    def full_disk(self: Path, *_: object, **__: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(evaluation, target, detector_summary={})
    assert target.read_bytes() == before
    assert [entry.name for entry in target.parent.iterdir()] == ["report.html"]


def test_arguments_are_checked(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, SCORES)
    with pytest.raises(InputError, match="is a folder"):
        write_report(evaluation, tmp_path, detector_summary={})
    with pytest.raises(InputError, match="max_per_kind"):
        write_report(evaluation, tmp_path / "report.html", detector_summary={}, max_per_kind=-1)


def test_plots_are_xml_in_the_colours_of_the_page(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, SCORES)
    for svg in (plots.score_histogram(evaluation), plots.roc_plot(evaluation)):
        ElementTree.fromstring(svg)
        assert "var(--kind-1)" in svg
        assert "var(--ink)" in svg
        assert not re.search(r"#0[1-5]0[1-5]0[1-8]", svg)
    histogram = plots.score_histogram(evaluation)
    assert "threshold 0.4" in histogram
    assert "logarithmic" not in histogram
    assert "structural_dent" in histogram
    assert "all defects" in plots.roc_plot(evaluation)


def test_a_wide_spread_of_scores_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    scores = {"good": [0.01, 0.02, 0.03], "dent": [0.5, 5.0, 50.0]}
    assert "logarithmic" in plots.score_histogram(make_evaluation(tmp_path, scores, threshold=0.1))
    scores["good"][0] = -0.01
    assert "logarithmic" not in plots.score_histogram(make_evaluation(tmp_path, scores, threshold=0.1))


def test_plots_of_nothing_are_empty(tmp_path: Path) -> None:
    nothing = make_evaluation(tmp_path, {"good": [math.nan], "dent": [math.nan]})
    assert plots.score_histogram(nothing) == ""
    assert plots.roc_plot(nothing) == ""


GREY = np.full((12, 16, 3), 100, dtype=np.uint8)


def test_overlay_leaves_cold_pixels_and_colours_hot_ones() -> None:
    heat = np.zeros((12, 16), dtype=np.float32)
    heat[3, 4], heat[5, 6] = 2.0, 7.0
    result = overlay(GREY, heat, 0.0, 2.0, alpha=1.0)
    assert result.dtype == np.uint8
    assert result[3, 4].tolist() == [252, 224, 72]
    assert result[5, 6].tolist() == [252, 224, 72]
    result[3, 4] = result[5, 6] = 100
    assert np.array_equal(result, GREY)
    half = overlay(GREY, heat, 0.0, 2.0, alpha=0.5)
    assert half[3, 4].tolist() == [176, 162, 86]


def test_overlay_grows_lighter_all_the_way_over_black() -> None:
    ramp = np.linspace(0.0, 1.0, 64)[np.newaxis]
    lightness = overlay(np.zeros((1, 64, 3), np.uint8), ramp, 0.0, 1.0).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness[0]) > -1.0).all()
    assert lightness[0, -1] > 120


def test_overlay_resizes_the_map_to_the_image() -> None:
    heat = np.array([[0.0, 1.0]])
    result = overlay(np.zeros((10, 40, 3), np.uint8), heat, 0.0, 1.0, alpha=1.0)
    assert (result[:, :10] == 0).all()
    assert (result[:, 30:] == [252, 224, 72]).all()


def test_overlay_shows_what_is_not_finite() -> None:
    result = overlay(GREY[:1, :3], np.array([[np.nan, np.inf, -np.inf]]), 0.0, 1.0, alpha=1.0)
    assert result[0].tolist() == [[252, 224, 72], [252, 224, 72], [100, 100, 100]]


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_overlay_of_any_sizes(image: tuple[int, int], heat: tuple[int, int], alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*image, 3), dtype=np.uint8)
    before = pixels.copy()
    result = overlay(pixels, rng.normal(size=heat), -1.0, 1.0, alpha)
    assert result.shape == pixels.shape
    assert np.array_equal(pixels, before)
    assert np.array_equal(overlay(pixels, np.full(heat, -1.0), -1.0, 1.0, alpha), pixels)
    assert np.array_equal(overlay(pixels, rng.normal(size=heat), -1.0, 1.0, 0.0), pixels)


@pytest.mark.parametrize(
    ("image", "heat", "vmin", "vmax", "alpha", "message"),
    [
        (GREY[..., 0], np.zeros((2, 2)), 0, 1, 0.5, "image must be"),
        (GREY.astype(np.float32), np.zeros((2, 2)), 0, 1, 0.5, "float32"),
        (GREY, np.zeros((1, 2, 2)), 0, 1, 0.5, r"\(1, 2, 2\)"),
        (GREY, np.zeros((0, 2)), 0, 1, 0.5, "anomaly_map"),
        (GREY, np.zeros((2, 2)), 1, 1, 0.5, "vmin"),
        (GREY, np.zeros((2, 2)), 0, math.inf, 0.5, "finite"),
        (GREY, np.zeros((2, 2)), 0, 1, 1.5, "alpha"),
    ],
)
def test_overlay_refuses_what_it_cannot_draw(image, heat, vmin, vmax, alpha, message: str) -> None:
    with pytest.raises(InputError, match=message):
        overlay(image, heat, vmin, vmax, alpha)


def test_save_overlay(tmp_path: Path) -> None:
    heat = np.eye(12, 16)
    path = save_overlay(tmp_path / "new" / "map.png", GREY, heat, 0.0, 1.0)
    assert np.array_equal(np.asarray(Image.open(path)), overlay(GREY, heat, 0.0, 1.0))
    before = path.read_bytes()
    with pytest.raises(InputError, match="vmin"):
        save_overlay(path, GREY, heat, 1.0, 0.0)
    assert path.read_bytes() == before
    for name in ("map.txt", "map"):
        with pytest.raises(InputError, match="suffix"):
            save_overlay(tmp_path / name, GREY, heat, 0.0, 1.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_colour_range() -> None:
    scores = np.array([0.1, 0.2, 2.1, 2.3, 2.5, np.nan, np.inf])
    assert colour_range(scores, 1.0) == (0.0, 2.3)
    assert colour_range(scores, 0.5) == (0.0, 1.5)  # held at three times the threshold
    assert colour_range(scores, 2.2) == (0.0, pytest.approx(3.3))  # held at one and a half
    assert colour_range(scores, 9.0) == (0.0, 13.5)
    assert colour_range(scores, math.inf) == (0.0, 2.5)
    assert colour_range(scores - 1.0, 0.0) == (-0.9, 1.5)
    assert colour_range(np.array([]), math.inf) == (0.0, 1.0)
    assert colour_range(np.array([-3.0, -2.0]), math.nan) == (-3.0, -2.0)
