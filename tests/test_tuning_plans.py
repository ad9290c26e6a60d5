"""`efficientad-fast tune`, as far as it goes without a GPU: what plans ask of kernels, with launches written down."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from typer.testing import CliRunner

sys.path.append(str(ROOT))

pytest.importorskip("triton")

from efficientad_fast.triton_kernels import launching, tiles

from benchmarks.gpu.work import Call, meta_steps
from efficientad_fast import tuning
from efficientad_fast.cli import app
from efficientad_fast.errors import InputError
from efficientad_fast.plan import MixedPlan

META = torch.device("meta")
TUNED = ("conv_pool", "feature_distance", "autoencoder")


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tiles.TABLE_VARIABLE, "")
    tiles.rules.cache_clear()
    yield
    tiles.rules.cache_clear()


def written_down(dtype: torch.dtype) -> list[Any]:
    """Steps of a plan without memory, whose kernels are called by themselves."""
    found = []
    for step in meta_steps("s", dtype, 1):
        call = Call.of(step)
        if call.operator in TUNED:
            module = importlib.import_module(f"efficientad_fast.triton_kernels.{call.operator}")
            found.append(step._replace(run=functools.partial(module.overloads["mixed"], **call.arguments)))
    return found


@pytest.mark.parametrize("capability", [8.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=["float16", "float8"])
def test_every_candidate_is_one_that_its_kernel_takes(dtype: torch.dtype, capability: float) -> None:
    if dtype == torch.float8_e4m3fn and capability < 8.9:
        pytest.skip("there are no products of float8 on such GPUs")
    with launching.as_if_on(capability), launching.recorded():
        cases = tuning.cases_of(written_down(dtype))
        assert {case.kernel for case in cases} == {*TUNED, "autoencoder.resize"}
        for case in cases:
            offered = tuning.candidates(case)
            assert offered and tiles.choose(case.kernel, case.facts).keys() == offered[0].keys()
            # A few, from everywhere.
            for tile in offered[:: max(len(offered) // 8, 1)]:
                with launching.recorded() as launches, tiles.forced(case.kernel, case.facts, tile):
                    for step in case.steps:
                        step.run()
                if "apart" in tile:
                    resized = any(one.kernel.__name__ == "_resize" for one in launches)
                    assert resized or not tile["apart"]
                    continue
                options = {(one.options["num_warps"], one.options.get("num_stages")) for one in launches}
                assert (tile["warps"], tile["stages"]) in options


def test_random_networks_live() -> None:
    source = tuning.random_source("s", (256, 256))
    plan = MixedPlan(source, torch.device("cpu"), torch.float16)
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    observed = plan.observe(image)
    for layer, largest in observed.items():
        assert bool(largest.isfinite().all()) and float((largest > 0).float().mean()) > 0.8, layer


def test_other_dtypes_are_refused() -> None:
    source = tuning.random_source("s", (256, 256))
    with pytest.raises(InputError, match=r"float16, bfloat16 and float8, got torch\.float64"):
        tuning.plans_of(source, [1], [torch.float64], META)
    titles = [title for title, _ in tuning.plans_of(source, [1, 32], [torch.float16, torch.float8_e4m3fn], META)]
    assert titles == ["float16, batch 1", "float16, batch 32", "float8, batch 1", "float8, batch 32"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["tune", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_the_command_says_what_it_needs() -> None:
    code, said = run("--device", "cpu")
    assert code == 2 and "the device must be 'cuda' or 'cuda:N', got 'cpu'" in said
    if not torch.cuda.is_available():
        code, said = run()
        assert code == 1 and "Tiles are timed on a GPU, and this PyTorch" in said


class Guard:
    def __init__(self, device: torch.device) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As far as the command can see; the table's path."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tiles.TABLE_VARIABLE, str(path))
    monkeypatch.setattr(tuning, "parse_gpu", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return path


def test_the_command_s_options_arrive(on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def tune(plans: Any, **options: Any) -> None:
        given.update(options, titles=[title for title, _ in plans])

    monkeypatch.setattr(tuning, "tune", tune)
    code, said = run("--model-size", "s", "--batch", "4", "--dtype", "bfloat16", "--dtype", "float8", "--thorough")
    assert code == 0 and said == f"tiles: {on_a_gpu}"
    assert given["titles"] == ["bfloat16, batch 4", "float8, batch 4"]
    assert (given["device_name"], given["thorough"], given["again"]) == ("a GPU", True, False)
    assert run("--dtype", "float64")[0] == 2 and run("--size", "100")[0] == 2 and run("--model-size", "l")[0] == 2


def test_ctrl_c_says_where_it_is_and_how_to_go_on(on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(plans: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", tune)
    code, said = run()
    assert code == 130 and f"what was found is in {on_a_gpu}. Give the same command to go on." in said
