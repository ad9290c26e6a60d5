"""`benchmarks.roofline`: work of steps that are counted by hand, floors, tiles, overlap, and the document's tables."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT))

pytest.importorskip("triton")

from benchmarks import roofline
from benchmarks.gpu import datasheets, work
from benchmarks.gpu.datasheets import Gpu
from benchmarks.gpu.work import Call, Launch, Work, meta_steps, work_of
from benchmarks.roofline import LAUNCH_SECONDS, Prediction
from efficientad_fast import ops
from efficientad_fast.plan import Step

DOCUMENT = ROOT / "docs" / "performance.md"

GPU = Gpu("made up", 9.0, multiprocessors=10, float16=1e12, float8=2e12, bandwidth=1e9, l2=0, source="")
"""100 GFLOP/s a multiprocessor."""


def test_operations_are_those_of_the_specification() -> None:
    # SPEC, "Patch description network": 75.9 and 235.4 GFLOP. Here the stem reads a fourth channel, a last row and
    # column that pooling leaves out are not computed, and the autoencoder ends before its last convolution, which
    # map_ae does.
    for size, all_of_it in (("s", 75.9e9), ("m", 235.4e9)):
        works = [work_of(step, GPU) for step in meta_steps(size, torch.float16, 1)]  # type: ignore[arg-type]
        done = sum(one.operations for one in works)
        assert done == pytest.approx(all_of_it, rel=0.01)
        eight = [work_of(step, GPU) for step in meta_steps(size, torch.float16, 8)]  # type: ignore[arg-type]
        assert sum(one.operations for one in eight) == pytest.approx(8 * done)


def test_a_convolution_is_counted_as_by_hand() -> None:
    steps = {step.layer: step for step in meta_steps("s", torch.float16, 2)}
    found = work_of(steps["conv2"], GPU)
    # 126 x 126 to 123 x 123, of which pooling reads 122 x 122; two groups of 128 to 256 channels.
    assert found.operations == 2 * 2 * 122 * 122 * 512 * 128 * 16
    weights, scales = 512 * 128 * 16 * 2, 512 * 4
    assert found.bytes == 2 * (126 * 126 * 256 + 61 * 61 * 512) * 2 + weights + scales
    (launch,) = found.launches
    assert launch.kernel == "conv_pool" and launch.programs * launch.operations >= found.operations
    distance = work_of(steps["map_st"], GPU)
    assert distance.operations == 2 * 2 * 56 * 56 * 384 * (256 + 256) * 16


def test_float8_halves_bytes_and_leaves_the_stem_and_the_autoencoder_in_float16() -> None:
    half, narrow = (
        {step.layer: work_of(step, GPU) for step in meta_steps("s", dtype, 1)}
        for dtype in (torch.float16, torch.float8_e4m3fn)
    )
    assert narrow["conv2"].bytes == pytest.approx(half["conv2"].bytes / 2, rel=1e-3)
    assert narrow["conv2"].arithmetic_seconds(GPU) == half["conv2"].arithmetic_seconds(GPU) / 2
    assert narrow["conv1"].dtype == narrow["autoencoder"].dtype == torch.float16
    with pytest.raises(ValueError, match=r"A100 SXM 80 GB has no rate for products of torch\.float8_e4m3fn"):
        datasheets.GPUS[2].rate(torch.float8_e4m3fn)


def test_launches_are_counted_by_writing_them_down() -> None:
    steps = meta_steps("s", torch.float16, 1, images=True)
    launches = {step.layer: [one.kernel for one in work_of(step, GPU).launches] for step in steps}
    assert launches["conv1"] == ["conv_pool"] and launches["map_ae"] == ["feature_distance"]
    # Of the 13 layers, resizing in front of the last six is apart.
    assert Counter(launches["autoencoder"]) == {"convolve": 7, "resize": 6, "conv_pool": 6}
    assert launches["preprocess"] == ["preprocess"]
    assert len(launches["anomaly_map"]) == 2


def test_tiles_of_all_kernels_cover_their_products() -> None:
    """A kernel whose constants are not understood would seem to compute nothing for nothing."""
    for size in ("s", "m"):
        # No layer's sides are multiples of a tile's.
        for step in meta_steps(size, torch.float16, 1, (264, 264)):  # type: ignore[arg-type]
            found = work_of(step, GPU)
            if found.operations:
                assert sum(one.programs * one.operations for one in found.launches) > found.operations, step.layer


def test_tiles_that_ship_compute_little_for_nothing() -> None:
    """A kernel whose constants are misunderstood would seem to compute a lot."""
    for step in meta_steps("s", torch.float16, 1):
        if step.layer not in ("autoencoder", "anomaly_map"):
            found = work_of(step, GPU)
            assert sum(one.programs * one.operations for one in found.launches) < 1.5 * found.operations, step.layer


def made_up(layer: str, *, operations: float, moved: float = 0.0, programs: int = 10, side: bool = False) -> Work:
    """In one launch, whose tiles compute nothing for nothing."""
    launches = [Launch(layer, programs, operations / programs)]
    return Work(layer, "conv_pool", torch.float16, operations, moved, launches, side)


def test_floors_are_the_longer_of_both_and_tiles_are_whole() -> None:
    by_products, by_memory = made_up("a", operations=2e9, moved=1e6), made_up("b", operations=2e9, moved=3e6)
    assert by_products.floor(GPU) == pytest.approx(2e-3) and by_memory.floor(GPU) == pytest.approx(3e-3)
    assert by_products.floor_with_tiles(GPU) == pytest.approx(2e-3)
    # The eleventh program waits for one of the ten before.
    more = made_up("c", operations=2.2e9, programs=11)
    assert more.floor_with_tiles(GPU) == pytest.approx(4e-3)
    # One program has one multiprocessor.
    assert made_up("d", operations=1e9, programs=1).floor_with_tiles(GPU) == pytest.approx(1e-2)


def predicted(*works: Work) -> float:
    return Prediction(GPU, "s", "float16", 1, works).seconds


def test_the_side_stream_costs_what_is_longer_than_the_rest_and_what_it_computes() -> None:
    main, after = made_up("conv1", operations=4e9, programs=5), made_up("map_ae", operations=1e9)
    # 4e9 in 5 of 10 multiprocessors: 8 ms, in the other half of which there is room for as much.
    beside = made_up("autoencoder", operations=1e9, side=True)
    assert predicted(main, beside, after) == pytest.approx(8e-3 + 1e-3 + 2 * LAUNCH_SECONDS)
    # No overlap is shorter than the products of both.
    large = made_up("autoencoder", operations=6e9, side=True)
    assert predicted(main, large, after) == pytest.approx(10e-3 + 1e-3 + LAUNCH_SECONDS)
    # A chain of launches that take nothing.
    chain = Work("autoencoder", "autoencoder", torch.float16, 0.0, 0.0, [Launch("a", 1, 0.0)] * 5000, side=True)
    assert predicted(main, chain, after) == pytest.approx(5000 * LAUNCH_SECONDS + 1e-3 + LAUNCH_SECONDS)


def test_what_is_not_an_operator_is_refused() -> None:
    step = Step("conv1", (), [], {}, torch.empty(0), functools.partial(print))
    with pytest.raises(TypeError, match="step conv1 must be a partial of an operator of the catalogue"):
        Call.of(step)


def test_defaults_of_a_call_are_those_of_the_schema() -> None:
    ops.load()
    run = functools.partial(torch.ops.efficientad_fast.identity.default, torch.empty(2, device="meta"))
    assert Call.of(Step("x", (), [], {}, torch.empty(0), run)).name == "identity"
    operator = torch.ops.efficientad_fast.conv_pool.mixed
    call = Call.of(Step("x", (), [], {}, torch.empty(0), functools.partial(operator, 1, 2, groups=3)))
    assert call.name == "conv_pool.mixed" and call.arguments["groups"] == 3 and call.arguments["padding"] == 0
    assert call.arguments["relu"] is True and call.arguments["scale"] is None


def test_used_rates_are_measured_on_h200_and_as_large_a_share_elsewhere() -> None:
    h200, h100, *_ = datasheets.used()
    assert h200.float16 == 790e12 and h200.bandwidth == 4.3e12
    assert h100.float16 == pytest.approx(790e12) and h100.bandwidth < datasheets.GPUS[1].bandwidth
    assert h200.float8 == pytest.approx(1979e12 * 790 / 989)


@pytest.fixture(scope="module")
def found() -> list[Prediction]:
    return roofline.predictions(datasheets.used())


def test_the_document_s_tables_are_those_of_the_command(found: list[Prediction]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert roofline.replaced(text, roofline.document(found)) == text, f"run {roofline.BEGIN.split('`')[1]}"


def test_a_user_s_tiles_change_nothing(
    found: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientad_fast.triton_kernels import tiles

    shipped = tiles.choose("conv_pool", {**_facts(), "pool": True})
    rule = {"when": {}, "tile": {**shipped, "outputs": 16}}
    (tmp_path / "tiles.json").write_text(json.dumps({"conv_pool": [rule]}))
    monkeypatch.setenv(tiles.TABLE_VARIABLE, str(tmp_path / "tiles.json"))
    tiles.rules.cache_clear()
    try:
        again = roofline.predictions(datasheets.used()[:1], ["s"])
        assert tiles.choose("conv_pool", {**_facts(), "pool": True})["outputs"] == 16
    finally:
        tiles.rules.cache_clear()
    assert again[0].floor_with_tiles == found[0].floor_with_tiles


def _facts() -> dict[str, object]:
    steps = {step.layer: step for step in meta_steps("s", torch.float16, 1)}
    from efficientad_fast.triton_kernels import tiles

    with tiles.stated() as stated:
        work_of(steps["conv2"], GPU)
    return stated[0][1]


def test_json_and_markdown(
    found: list[Prediction], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "predictions", lambda gpus: found)
    document = tmp_path / "page.md"
    document.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    assert roofline.main(["--markdown", "--json", str(tmp_path / "all.json"), "--into", str(document)]) == 0
    printed = capsys.readouterr().out
    assert printed == roofline.document(found) and "| paper, RTX A6000 |" in printed
    text = document.read_text()
    assert text.startswith(f"before\n{roofline.BEGIN}\n") and text.endswith(f"{roofline.END}\nafter\n")
    assert "old" not in text and printed in text
    content = json.loads((tmp_path / "all.json").read_text())
    first = content["predictions"][0]
    assert first["floor"] <= first["floor_with_tiles"] and first["launches"] == sum(
        len(one["launches"]) for one in first["steps"]
    )
    with pytest.raises(ValueError, match="must have a line"):
        roofline.replaced("nothing", printed)
    assert work.META.type == "meta"
