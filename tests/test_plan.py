"""A plan's scores and maps against the same steps written out, in each convention, dtype and size."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from assertions import assert_close
from formulations import bilinear
from tolerances import EXACT, tolerance
from torch import Tensor, nn

from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.plan import (
    DTYPES,
    PlanInput,
    ReferencePlan,
    build_plan,
    parse_device,
    parse_dtype,
)
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

CPU = torch.device("cpu")
CHANNELS = 6
QUANTILES = Quantiles(st_start=0.4, st_end=1.1, ae_start=0.3, ae_end=0.7)
SIZE = (96, 128)
FEATURES = (16, 24)
ORIGINAL_SIZES = [(200, 130), (96, 128), (33, 250)]


def stand_in(channels: int, seed: int) -> nn.Module:
    """One convolution with the PDN's patch size and stride, so that its maps have the PDN's geometry."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, channels, 33, stride=4), nn.Tanh(), nn.Conv2d(channels, channels, 1))


def source(**changes: Any) -> PlanInput:
    generator = torch.Generator().manual_seed(5)
    plain = PlanInput(
        teacher=stand_in(CHANNELS, 0),
        student=stand_in(2 * CHANNELS, 1),
        autoencoder=stand_in(CHANNELS, 2),
        teacher_mean=torch.randn(1, CHANNELS, 1, 1, generator=generator) * 0.1,
        teacher_std=torch.rand(1, CHANNELS, 1, 1, generator=generator) + 0.5,
        quantiles=QUANTILES,
        map_convention="resized",
        pad_maps=True,
        size=SIZE,
    )
    return replace(plain, **changes)


def images(count: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(9))


def raw_maps_by_hand(planned: PlanInput, batch: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """In float64, from copies of the networks in ``dtype``."""
    with torch.inference_mode():
        teacher, student, autoencoder = (
            copy.deepcopy(network).to(dtype).eval()(batch.to(dtype)).double()
            for network in (planned.teacher, planned.student, planned.autoencoder)
        )
    if planned.teacher_mean is not None and planned.teacher_std is not None:
        teacher = (teacher - planned.teacher_mean.double()) / planned.teacher_std.double()
    half = student.shape[1] // 2
    map_st = sum((teacher[:, c] - student[:, c]) ** 2 for c in range(half)) / half
    map_ae = sum((autoencoder[:, c] - student[:, half + c]) ** 2 for c in range(half)) / half
    return map_st, map_ae


def run_by_hand(
    planned: PlanInput,
    batch: Tensor,
    original_sizes: list[tuple[int, int]],
    original_maps: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[float], list[Tensor]]:
    """SPEC's table of the two conventions, image by image, in float64."""

    def normalised(one: Tensor, start: float, end: float) -> Tensor:
        return one if planned.quantiles is None else 0.1 * (one - start) / (end - start)

    def padded(one: Tensor) -> Tensor:
        return nn.functional.pad(one, (4, 4, 4, 4)) if planned.pad_maps else one

    quantiles = planned.quantiles or QUANTILES
    scores, anomaly_maps = [], []
    for map_st, map_ae, original in zip(*raw_maps_by_hand(planned, batch, dtype), original_sizes, strict=True):
        if planned.map_convention == "resized":
            st = normalised(bilinear(padded(map_st), planned.size), quantiles.st_start, quantiles.st_end)
            ae = normalised(bilinear(padded(map_ae), planned.size), quantiles.ae_start, quantiles.ae_end)
            final = (st + ae) / 2
            scored = final
        else:
            st = normalised(map_st, quantiles.st_start, quantiles.st_end)
            ae = normalised(map_ae, quantiles.ae_start, quantiles.ae_end)
            final = padded((st + ae) / 2)
            scored = bilinear(final, original)
        scores.append(float(scored.max()))
        anomaly_maps.append(bilinear(final, original if original_maps else planned.size))
    return scores, anomaly_maps


@pytest.mark.parametrize("original_maps", [False, True])
@pytest.mark.parametrize("pad_maps", [False, True])
@pytest.mark.parametrize("map_convention", ["resized", "native"])
def test_scores_and_maps_are_the_conventions_steps_written_out(
    map_convention: str, pad_maps: bool, original_maps: bool
) -> None:
    planned = source(map_convention=map_convention, pad_maps=pad_maps)
    plan = ReferencePlan(planned, CPU, torch.float64)
    scores, anomaly_maps = plan.run(images(), ORIGINAL_SIZES, original_maps=original_maps)
    expected_scores, expected_maps = run_by_hand(planned, images(), ORIGINAL_SIZES, original_maps)
    assert scores.dtype == torch.float64
    assert_close(scores, expected_scores, tolerance("map", torch.float64), "scores")
    sizes = ORIGINAL_SIZES if original_maps else [SIZE] * 3
    assert [tuple(one.shape) for one in anomaly_maps] == sizes
    for one, expected in zip(anomaly_maps, expected_maps, strict=True):
        assert_close(one, expected, tolerance("map", torch.float64), "map")


def test_the_resized_score_ignores_the_original_size_and_the_native_one_does_not() -> None:
    one = images(1)
    for convention, same in (("resized", True), ("native", False)):
        plan = ReferencePlan(source(map_convention=convention), CPU, torch.float64)
        scores = [plan.run(one, [size], original_maps=True)[0].item() for size in ((96, 128), (57, 31))]
        assert (scores[0] == scores[1]) is same


@pytest.mark.parametrize("convention", ["resized", "native"])
def test_without_quantiles_and_statistics_the_maps_are_left_as_they_are(convention: str) -> None:
    planned = source(quantiles=None, teacher_mean=None, teacher_std=None, map_convention=convention)
    scores, anomaly_maps = ReferencePlan(planned, CPU, torch.float64).run(images(), ORIGINAL_SIZES)
    expected_scores, expected_maps = run_by_hand(planned, images(), ORIGINAL_SIZES, False)
    assert_close(scores, expected_scores, tolerance("map", torch.float64))
    assert_close(anomaly_maps[1], expected_maps[1], tolerance("map", torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float64_and_returns_float32(dtype: torch.dtype) -> None:
    planned = source()
    scores, anomaly_maps = ReferencePlan(planned, CPU, dtype).run(images(), ORIGINAL_SIZES, original_maps=True)
    expected_scores, expected_maps = run_by_hand(planned, images(), ORIGINAL_SIZES, True)
    assert scores.dtype == torch.float32
    assert {one.dtype for one in anomaly_maps} == {torch.float32}
    assert_close(scores, expected_scores, tolerance("map", dtype), "scores")
    for one, expected in zip(anomaly_maps, expected_maps, strict=True):
        assert_close(one, expected, tolerance("map", dtype), "map")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_raw_maps_are_at_feature_resolution_and_the_callers_to_change(dtype: torch.dtype) -> None:
    planned = source()
    plan = ReferencePlan(planned, CPU, dtype)
    for result, expected in zip(plan.raw_maps(images()), raw_maps_by_hand(planned, images()), strict=True):
        assert result.shape == (3, 1, *FEATURES)
        assert result.dtype == dtype
        assert not result.requires_grad
        assert_close(result[:, 0], expected, tolerance("map", dtype))
        result.add_(1.0)


def test_statistics_given_to_a_call_replace_the_plans_for_that_call_alone() -> None:
    planned = source()
    plan = ReferencePlan(planned, CPU, torch.float64)
    before = plan.raw_maps(images())
    mean, std = torch.full((1, CHANNELS, 1, 1), 0.25), torch.full((1, CHANNELS, 1, 1), 3.0)
    other = plan.raw_maps(images(), statistics=(mean, std))
    expected = raw_maps_by_hand(replace(planned, teacher_mean=mean, teacher_std=std), images())
    assert_close(other[0][:, 0], expected[0], tolerance("map", torch.float64))
    assert_close(other[1], before[1], EXACT)
    assert_close(plan.raw_maps(images())[0], before[0], EXACT)


def test_a_real_teacher_and_autoencoder_with_few_channels_in_a_plan() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, autoencoder = PatchDescriptionNetwork("s", CHANNELS), Autoencoder(CHANNELS)
    planned = source(teacher=teacher, autoencoder=autoencoder, size=(256, 256))
    batch = images(1, (256, 256))
    scores, anomaly_maps = build_plan(planned, CPU, torch.float32).run(batch, [(64, 80)], original_maps=True)
    expected_scores, expected_maps = run_by_hand(planned, batch, [(64, 80)], True, torch.float32)
    assert_close(scores, expected_scores, tolerance("map", torch.float32))
    assert_close(anomaly_maps[0], expected_maps[0], tolerance("map", torch.float32))


def test_each_image_of_a_batch_is_as_alone() -> None:
    plan = ReferencePlan(source(map_convention="native"), CPU, torch.float64)
    scores, anomaly_maps = plan.run(images(), ORIGINAL_SIZES)
    for index, size in enumerate(ORIGINAL_SIZES):
        score, anomaly_map = plan.run(images()[index : index + 1], [size])
        assert_close(score[0], scores[index], tolerance("map", torch.float64))
        assert_close(anomaly_map[0], anomaly_maps[index], tolerance("map", torch.float64))


def test_a_nan_in_one_image_makes_its_score_nan_and_leaves_the_others() -> None:
    for convention in ("resized", "native"):
        plan = ReferencePlan(source(map_convention=convention), CPU, torch.float32)
        clean, _ = plan.run(images(), ORIGINAL_SIZES)
        batch = images()
        batch[1, 0, 50, 60] = float("nan")
        scores, _ = plan.run(batch, ORIGINAL_SIZES)
        assert torch.isnan(scores).tolist() == [False, True, False]
        assert torch.equal(scores[[0, 2]], clean[[0, 2]])


def test_a_number_of_original_sizes_other_than_of_images_is_refused() -> None:
    for convention in ("resized", "native"):
        plan = ReferencePlan(source(map_convention=convention), CPU, torch.float32)
        with pytest.raises(InputError, match="one size per image, 3, got 2"):
            plan.run(images(), ORIGINAL_SIZES[:2])


def test_planning_and_running_do_not_change_the_source_networks() -> None:
    planned = source()
    networks = (planned.teacher, planned.student, planned.autoencoder)
    for network in networks:
        network.train()
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    plan = ReferencePlan(planned, CPU, torch.bfloat16)
    plan.run(images(), ORIGINAL_SIZES)
    for network, state in zip(networks, before, strict=True):
        assert network.training
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert parameter.is_contiguous()
            assert torch.equal(parameter, state[name])


def test_later_changes_to_the_source_networks_do_not_reach_the_plan() -> None:
    planned = source()
    plan = ReferencePlan(planned, CPU, torch.float32)
    before, _ = plan.run(images(), ORIGINAL_SIZES)
    with torch.no_grad():
        for parameter in planned.student.parameters():
            parameter.zero_()
    after, _ = plan.run(images(), ORIGINAL_SIZES)
    assert torch.equal(before, after)


def test_two_threads_on_one_plan_get_the_numbers_of_one() -> None:
    plan = ReferencePlan(source(), CPU, torch.float32)
    batches = [images()[index : index + 1] for index in range(3)] * 4
    alone = [plan.run(batch, [(50, 60)], original_maps=True) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda batch: plan.run(batch, [(50, 60)], original_maps=True), batches))
    for (score, anomaly_maps), (expected_score, expected_maps) in zip(together, alone, strict=True):
        assert torch.equal(score, expected_score)
        assert torch.equal(anomaly_maps[0], expected_maps[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_backend_name_builds_a_plan(backend: str) -> None:
    plan = build_plan(source(), CPU, torch.float64, backend=backend)  # type: ignore[arg-type]
    assert (plan.device, plan.dtype, plan.size) == (CPU, torch.float64, SIZE)


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(InputError, match="auto, operators, triton, cuda, reference, got 'tpu'"):
        build_plan(source(), CPU, torch.float32, backend="tpu")  # type: ignore[arg-type]


def test_dtypes_are_taken_by_name_or_as_themselves() -> None:
    for name, dtype in DTYPES.items():
        assert parse_dtype(name) is dtype
        assert parse_dtype(dtype) is dtype


@pytest.mark.parametrize("dtype", ["int8", "FLOAT32", "", torch.int32, torch.complex64, None, 32])
def test_another_dtype_is_refused_with_the_known_names(dtype: Any) -> None:
    with pytest.raises(InputError) as refusal:
        parse_dtype(dtype)
    assert repr(dtype) in str(refusal.value)
    assert "float32, float64, float16, bfloat16" in str(refusal.value)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_cpu_is_a_device(device: str | torch.device) -> None:
    assert parse_device(device) == CPU


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", None, 1.5])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match="Unknown device"):
        parse_device(device)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_devices_of_other_kinds_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"'{device}' is not supported: use 'cpu', 'cuda'"):
        parse_device(device)


def test_cuda_where_there_is_none_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"sees no CUDA GPU.*device='cpu'"):
        parse_device("cuda")


def test_a_cuda_index_is_checked_against_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert parse_device("cuda") == torch.device("cuda:1")
    assert parse_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(BackendError, match="'cuda:2' was asked for, but there are 2"):
        parse_device("cuda:2")
