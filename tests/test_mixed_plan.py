"""The plan in mixed precision, by the operators' references on a CPU, against the plain networks in float64.

What it does beside its numbers on a GPU stands in test_graphs.py.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from assertions import assert_close
from conftest import ROOT
from plan_cases import CHANNELS, CPU, images, near_student, source
from tolerances import EXACT, tolerance
from torch import Tensor, nn

import efficientad_fast.plan as planning
from efficientad_fast import native, ops
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.ops import conv_pool
from efficientad_fast.plan import MixedPlan, OperatorPlan, Plan, PlanInput, ReferencePlan, build_plan, default_dtype
from efficientad_fast.plan.folding import fold
from efficientad_fast.plan.mixed import OPERATORS
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import PatchDescriptionNetwork

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float16, torch.bfloat16, FLOAT8)
GPU = torch.device("cuda", 0)
QUANTILES = Quantiles(0.4, 1.1, 0.3, 0.7)
SIZES = [(300, 260), (256, 256)]


def calibrated(planned: PlanInput, batch: Tensor) -> PlanInput:
    return replace(planned, activations=MixedPlan(planned, CPU, torch.float16).observe(batch))


def mixed(planned: PlanInput, dtype: torch.dtype = torch.float16) -> MixedPlan:
    given = calibrated(planned, images(2, planned.size, seed=1)) if dtype == FLOAT8 else planned
    return MixedPlan(given, CPU, dtype)


@pytest.fixture(scope="module")
def plain() -> PlanInput:
    return source()


@pytest.fixture(scope="module")
def plan(plain: PlanInput) -> MixedPlan:
    return mixed(plain)


@functools.cache
def trusted_maps(
    model_size: str = "s", size: tuple[int, int] = (256, 256), count: int = 1, padding: bool = False
) -> tuple[Tensor, Tensor]:
    """Of the plain networks in float64, which takes the longest."""
    planned = source(model_size, padding=padding, size=size)
    return ReferencePlan(planned, CPU, torch.float64).raw_maps(images(count, size))


def assert_maps(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], allowed: Any = EXACT) -> None:
    for name, one, other in zip(("map_st", "map_ae"), actual, expected, strict=True):
        assert_close(one, other, allowed, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_size", "size", "count", "padding"),
    [("s", (265, 271), 2, False), ("s", (256, 256), 1, True), ("m", (256, 265), 1, False), ("m", (257, 256), 1, True)],
)
def test_maps_are_those_of_the_networks(
    model_size: str, size: tuple[int, int], count: int, padding: bool, dtype: torch.dtype
) -> None:
    planned = source(model_size, padding=padding, size=size)
    found = mixed(planned, dtype).raw_maps(images(count, size))
    assert {one.dtype for one in found} == {torch.float32}
    assert_maps(found, trusted_maps(model_size, size, count, padding), tolerance("mixed map", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_student_that_nearly_equals_its_teacher(plain: PlanInput, dtype: torch.dtype) -> None:
    planned = replace(plain, student=near_student(plain, 0.1))
    trusted = ReferencePlan(planned, CPU, torch.float32).raw_maps(images())
    found = mixed(planned, dtype).raw_maps(images())
    assert_maps(found, trusted, tolerance("mixed map of a near student", dtype))


@pytest.mark.parametrize(
    ("model_size", "size", "padding", "scaled"),
    [("s", (256, 256), False, False), ("s", (256, 256), True, True), ("m", (257, 256), True, True)],
)
@torch.no_grad()
def test_folded_networks_are_the_networks(model_size: str, size: tuple[int, int], padding: bool, scaled: bool) -> None:
    """In float64, stage by stage: nothing but the order of sums differs, with scales and without."""
    planned = source(model_size, padding=padding, size=size)
    batch = images(1, size).double()
    expected = trusted_maps(model_size, size, 1, padding)
    scales = None
    if scaled:
        generator = torch.Generator().manual_seed(2)
        scales = {
            layer: tuple(0.5 + torch.rand(len(part), generator=generator).double() for part in parts)
            for layer, parts in stage_parts(planned).items()
        }
    folded = fold(planned, scales)
    sources = [batch]
    for stage in folded.stages.values():
        if len(stage) > len(sources):
            sources = list(sources[0].chunk(2, 1))
        sources = [
            conv_pool.compute(read, *one.parameters, **one.geometry.settings)
            for read, one in zip(sources, stage, strict=True)
        ]
    teacher, student = sources if len(sources) == 2 else sources[0].chunk(2, 1)
    hidden = ops.autoencoder.compute(batch, *zip(*folded.autoencoder, strict=True), expected[0].shape[2:])
    distances = [
        (teacher, folded.last.map_st(planned.teacher_mean, planned.teacher_std)),
        (hidden, folded.map_ae),
    ]
    found = [
        (
            conv_pool.compute(first, *distance.first, padding=distance.padding, relu=False)
            - conv_pool.compute(student, *distance.second, relu=False)
        )
        .square()
        .mean(1, keepdim=True)
        for first, distance in distances
    ]
    assert_maps((found[0], found[1]), expected, tolerance("map", torch.float64))


def stage_parts(planned: PlanInput) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, the biases of teacher and student."""
    *hidden, _ = (name for name, layer in planned.teacher.named_children() if isinstance(layer, nn.Conv2d))
    parts = {name: tuple(one.get_submodule(name).bias for one in (planned.teacher, planned.student)) for name in hidden}
    return parts | {"autoencoder": (planned.autoencoder.get_submodule("decoder.deconv7").bias,) * 2}


@pytest.mark.parametrize("model_size", ["s", "m"])
@torch.no_grad()
def test_observed_activations_are_the_largest_of_each_channel(model_size: str) -> None:
    planned, batch = source(model_size, padding=True), images(2)
    expected: dict[str, Tensor] = {}
    for network in (planned.teacher, planned.student):
        x = batch
        for index, name in enumerate(list(stage_parts(planned))[:-1]):
            x = network.get_submodule(name)(x).relu()
            x = network.pool(x) if index < 2 else x
            expected[name] = torch.cat([expected.get(name, torch.empty(0)), x.amax((0, 2, 3))])
    decoder = planned.autoencoder.get_submodule("decoder")
    seen: list[Tensor] = []
    hook = decoder.get_submodule("deconv8").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    planned.autoencoder(batch)
    hook.remove()
    expected["autoencoder"] = seen[0].amax((0, 2, 3))
    found = MixedPlan(planned, CPU, torch.float16).observe(batch)
    assert found.keys() == expected.keys()
    for layer, largest in found.items():
        assert_close(largest, expected[layer], tolerance("features", torch.float16), layer)


def test_float8_uses_half_of_its_range_on_what_it_was_calibrated_with(plain: PlanInput) -> None:
    planned = calibrated(plain, images())
    dead = 0
    with MixedPlan(planned, CPU, FLOAT8).steps(images()) as steps:
        for step in steps:
            step.run()
            if step.out.dtype == FLOAT8:
                largest, observed = step.out.float().amax((0, 2, 3)), planned.activations[step.layer]
                half = (largest >= 192) & (largest <= 256)
                # What hardly acts at all is made of roundings.
                assert half[observed > 0].float().mean() > 0.9, step.layer
                dead += int((observed == 0).sum())
    assert dead > 0, "no channel is tried that nothing is known of"
    assert all(step.out.float().isfinite().all() for step in steps)


def test_float8_needs_activations_that_fit(plain: PlanInput) -> None:
    with pytest.raises(InputError, match=r"float8 needs to know.*detector\.calibrated\(images, 'float8'\)"):
        MixedPlan(plain, CPU, FLOAT8)
    whole = {layer: torch.cat(parts).detach().abs() for layer, parts in stage_parts(plain).items()}
    whole["autoencoder"] = whole["autoencoder"][:64]
    for layer, other in (("conv2", whole["conv2"][1:]), ("autoencoder", whole["autoencoder"].clone().fill_(-1.0))):
        with pytest.raises(InputError, match=rf"activations of {layer} must be .* finite numbers from 0 on, got shape"):
            MixedPlan(replace(plain, activations={**whole, layer: other}), CPU, FLOAT8)
    missing = {layer: largest for layer, largest in whole.items() if layer != "conv3"}
    with pytest.raises(InputError, match="activations of conv3 must be 512 finite numbers from 0 on, got shape None"):
        MixedPlan(replace(plain, activations=missing), CPU, FLOAT8)
    with pytest.raises(InputError, match=r"float16, bfloat16 or float8, got torch\.float32"):
        MixedPlan(plain, CPU, torch.float32)


def test_activations_are_observed_of_images_by_a_plan_that_does_not_scale_them(plain: PlanInput) -> None:
    with pytest.raises(InputError, match="at least one image, got none"):
        mixed(plain).observe(images(0))
    with pytest.raises(InputError, match="by a plan in float16 or bfloat16, not in float8"):
        mixed(plain, FLOAT8).observe(images())


def test_steps_on_the_meta_device_for_any_batch() -> None:
    launches = {"s": 7, "m": 10}
    for model_size, count in launches.items():
        with torch.device("meta"):
            planned = source_on_meta(model_size)
        for dtype in DTYPES:
            with MixedPlan(planned, torch.device("meta"), dtype).steps(
                torch.empty(32, 3, 256, 256, device="meta")
            ) as steps:
                for step in steps:
                    step.run()
            assert len(steps) == count
            assert steps[0].inputs[0].shape == (32, 4, 256, 256)
            assert steps[0].inputs[0].dtype == (torch.float16 if dtype == FLOAT8 else dtype)
            assert {one.out.dtype for one in steps if one.layer.startswith("conv")} == {dtype}
            assert steps[-1].out.shape == (32, 1, 256, 256)


def source_on_meta(model_size: str) -> PlanInput:
    teacher = PatchDescriptionNetwork(model_size)
    student, autoencoder = PatchDescriptionNetwork(model_size, 768), planning.Autoencoder()
    statistics = torch.empty(2, 1, 384, 1, 1).unbind()
    return PlanInput(teacher, student, autoencoder, *statistics, QUANTILES, "resized", True, (256, 256))


@pytest.mark.parametrize("original_maps", [False, True])
@pytest.mark.parametrize("convention", ["resized", "native"])
def test_scores_and_maps_are_made_of_the_raw_maps(plain: PlanInput, convention: str, original_maps: bool) -> None:
    plan = mixed(replace(plain, map_convention=convention, pad_maps=True, quantiles=QUANTILES))
    batch = images(2)
    scores, found = plan.run(batch, SIZES, original_maps=original_maps)
    expected_scores, expected = Plan._run(plan, batch, SIZES, original_maps)
    assert torch.equal(scores, expected_scores)
    assert [one.shape for one in found] == (SIZES if original_maps else [(256, 256)] * 2)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, EXACT, "map")
    kept = found[0].clone()
    plan.run(images(2, seed=3), SIZES, original_maps=original_maps)
    assert torch.equal(kept, found[0])


def test_images_as_they_were_decoded(plain: PlanInput) -> None:
    plan, preprocessing = mixed(replace(plain, quantiles=QUANTILES)), Preprocessing()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 300, 260, 3), dtype=torch.uint8, generator=generator)
    scores, maps = plan.submit(list(pixels.movedim(3, 1)), preprocessing).result()
    for _ in range(3):  # as such sizes come for the first, the second and the third time
        on_device = plan.run_images(pixels, preprocessing)
        assert_close(on_device[0], scores, tolerance("preprocess", torch.float16), "scores")
        assert_close(on_device[1][:, 0], torch.stack(maps), tolerance("preprocess", torch.float16), "maps")
    with pytest.raises(InputError, match=r"of the plan's size \(256, 256\), got \(320, 256\)"):
        plan.run_images(pixels, Preprocessing(size=(320, 256)))
    with pytest.raises(InputError, match=r"of the plan's size \(256, 256\), got \(320, 256\)"):
        plan.submit(list(pixels.movedim(3, 1)), Preprocessing(size=(320, 256)))


def test_what_is_no_batch_is_refused(plain: PlanInput, plan: MixedPlan) -> None:
    with pytest.raises(InputError, match=r"must have shape \(N, 3, H, W\), got"):
        plan.raw_maps(torch.zeros(1, 4, 256, 256))
    with pytest.raises(InputError, match=r"255x300 pixels, but each side must be at least 256"):
        plan.raw_maps(images(1, (255, 300)))
    with pytest.raises(InputError, match=r"teacher's std must have shape \(1, 48, 1, 1\), got \(1, 1, 1, 1\)"):
        plan.raw_maps(images(), statistics=(plain.teacher_mean, torch.ones(1, 1, 1, 1)))


def test_an_empty_batch(plan: MixedPlan) -> None:
    assert [one.shape for one in plan.raw_maps(images(0))] == [(0, 1, 56, 56)] * 2
    scores, maps = plan.run(images(0), [])
    assert scores.shape == (0,) and maps == []
    assert plan.submit([], Preprocessing()).result()[1] == []


def test_other_sizes_than_the_plans_have_raw_maps(plain: PlanInput, plan: MixedPlan) -> None:
    batch = images(1, (272, 300))
    trusted = ReferencePlan(plain, CPU, torch.float32).raw_maps(batch)
    assert_maps(plan.raw_maps(batch), trusted, tolerance("mixed map", torch.float16))


def test_nan_stays_in_its_image(plan: MixedPlan) -> None:
    batch = images(2)
    batch[1, 2, 130, 77] = float("nan")
    map_st, map_ae = plan.raw_maps(batch)
    assert map_st[1].isnan().any() and map_ae[1].isnan().any()
    assert map_st[0].isfinite().all() and map_ae[0].isfinite().all()


def test_statistics_of_a_call_are_folded_where_their_values_differ_from_the_last(
    plain: PlanInput, plan: MixedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[tuple[Tensor, Tensor]] = []
    refold = plan._refold
    monkeypatch.setattr(plan, "_refold", lambda *given: (folded.append(given), refold(*given)))
    own = plan.raw_maps(images())
    other = (plain.teacher_mean + 0.3, 1.7 * plain.teacher_std)
    expected = mixed(replace(plain, teacher_mean=other[0], teacher_std=other[1])).raw_maps(images())
    for _ in range(2):
        assert_maps(plan.raw_maps(images(), statistics=other), expected)
        assert_maps(plan.raw_maps(images(), statistics=tuple(one.clone() for one in other)), expected)
        assert_maps(plan.raw_maps(images()), own)
    assert len(folded) == 1
    zero = (other[0], other[1].clone().index_fill_(1, torch.tensor([3]), 0))  # divides by zero, as the networks do
    assert plan.raw_maps(images(), statistics=zero)[0].isposinf().all()
    other[0].zero_()
    trusted = ReferencePlan(plain, CPU, torch.float32).raw_maps(images(), statistics=other)
    assert_maps(plan.raw_maps(images(), statistics=other), trusted, tolerance("mixed map", torch.float16))
    assert len(folded) == 3


def test_a_small_deviation_does_not_overflow_float16(plain: PlanInput, plan: MixedPlan) -> None:
    small = plain.teacher_std.clone()
    small[0, 5] = 1e-7
    statistics = (plain.teacher_mean, small)
    trusted = ReferencePlan(plain, CPU, torch.float32).raw_maps(images(), statistics=statistics)
    found = plan.raw_maps(images(), statistics=statistics)
    assert trusted[0].median() > 65504**2 / CHANNELS
    assert found[0].isfinite().all()
    error = (found[0] - trusted[0]).norm() / trusted[0].norm()
    assert error <= tolerance("mixed map", torch.float16).norm


def test_several_threads_get_the_same_numbers_in_few_buffers(plan: MixedPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.mixed, "_KEPT", 2)
    batches = [images(1, (256, 256 + 16 * (seed % 3)), seed) for seed in range(6)]
    expected = [plan.raw_maps(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(plan.raw_maps, batches))
    for one, other in zip(found, expected, strict=True):
        assert_maps(one, other)
    assert len(plan._entries) == 2


def test_results_are_the_callers_own(plan: MixedPlan) -> None:
    first = plan.raw_maps(images(seed=1))
    kept = [one.clone() for one in first]
    plan.raw_maps(images(seed=2))
    for one, same in zip(first, kept, strict=True):
        assert_close(one, same, EXACT, "map")
        one.zero_()
    with torch.inference_mode():
        assert_maps(plan.raw_maps(images(seed=1)), tuple(kept))


def test_a_plan_that_nobody_has_any_more_is_gone_at_once(plain: PlanInput) -> None:
    """Memory of a GPU does not wait for Python's garbage collection."""
    found = [MixedPlan(plain, CPU, torch.float16)]
    if native.is_built("cpu"):
        found.append(OperatorPlan(plain, CPU, torch.float32))
    for plan in found:
        plan.raw_maps(images(), statistics=(plain.teacher_mean, plain.teacher_std))
    left = [weakref.ref(plan) for plan in found]
    gc.disable()
    try:
        del plan
        found.clear()
        assert [one() for one in left] == [None] * len(left)
    finally:
        gc.enable()


def test_memory(plan: MixedPlan) -> None:
    found = {count: plan.memory(images(count)) for count in (1, 2)}
    assert found[1]["weights"] == found[2]["weights"] > 2 * 3e6
    assert found[2]["workspace"] == 2 * found[1]["workspace"] > 0


def test_reference_maps_round_as_the_kernels_should(plain: PlanInput) -> None:
    plan = mixed(plain, FLOAT8)
    assert_maps(plan.raw_maps(images()), plan.reference_maps(images()))


# Choosing


class Standing:
    """In place of a plan: remembers what it was made of."""

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype, namespace: str = "") -> None:
        self.device, self.dtype, self.size, self.namespace = device, dtype, source.size, namespace


class StandingMixed(Standing):
    pass


class StandingReference(Standing):
    pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU that can be asked for its capability alone, with plans that compute nothing."""
    facts: dict[str, Any] = {"capability": (9, 0), "broken": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setattr(ops, "works_on", lambda implementation, device: implementation == "triton")
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: True)
    monkeypatch.setattr(planning, "MixedPlan", StandingMixed)
    monkeypatch.setattr(planning, "ReferencePlan", StandingReference)
    monkeypatch.setattr(planning, "_why_broken", lambda plan, source: facts["broken"])
    monkeypatch.setattr(planning, "_warned", set())
    yield facts


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_runs_in_mixed_precision(plain: PlanInput, dtype: torch.dtype) -> None:
    assert type(build_plan(plain, GPU, dtype)) is StandingMixed
    assert type(build_plan(plain, GPU, dtype, backend="operators")) is StandingMixed
    assert type(build_plan(plain, GPU, torch.float32)) is StandingReference
    assert type(build_plan(plain, GPU, torch.float64)) is StandingReference
    assert default_dtype(GPU, plain) == torch.float16
    assert default_dtype(CPU, plain) == torch.float32


@pytest.mark.parametrize(
    ("facts", "dtype", "reason"),
    [
        ({"capability": (7, 5)}, torch.float16, r"in float16 need a GPU of .* 8\.0 or newer, and Test GPU has 7\.5"),
        ({"capability": (7, 5)}, torch.bfloat16, r"in bfloat16 need a GPU of .* 8\.0 or newer"),
        ({"capability": (8, 6)}, FLOAT8, r"in float8 need a GPU of .* 8\.9 or newer, and Test GPU has 8\.6"),
        ({"broken": "the maps are wrong"}, torch.float16, "the maps are wrong"),
        ({"broken": "the maps are wrong"}, FLOAT8, "the maps are wrong"),
    ],
)
def test_a_gpu_that_cannot_says_why(
    plain: PlanInput, gpu: dict[str, Any], facts: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    gpu.update(facts)
    if dtype == FLOAT8:
        for backend in ("auto", "operators"):
            with pytest.raises(BackendError, match=f"float8 was asked for, but .*{reason}.*Use dtype='float16'"):
                build_plan(plain, GPU, dtype, backend=backend)
        return
    with pytest.raises(BackendError, match=f"'operators' was asked for, but .*{reason}.*Use backend='auto'"):
        build_plan(plain, GPU, dtype, backend="operators")
    with pytest.warns(RuntimeWarning, match=f"run as plain PyTorch in .*{reason}") as told:
        found = [build_plan(plain, GPU, dtype) for _ in range(2)]
    assert {type(one) for one in found} == {StandingReference}
    assert len(told) == 1
    assert build_plan(plain, GPU, dtype, backend="reference").dtype == dtype
    assert default_dtype(GPU, plain) == (torch.float16 if "broken" in facts else torch.float32)


def test_without_triton_or_with_other_networks(
    plain: PlanInput, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(plain, teacher=nn.Conv2d(3, CHANNELS, 33, stride=4))
    with pytest.warns(RuntimeWarning, match="the networks are not PatchDescriptionNetwork"):
        assert type(build_plan(other, GPU, torch.float16)) is StandingReference
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: name != "autoencoder.mixed")
    monkeypatch.setattr(native, "why_not_built", lambda name: "off")
    reason = r"no kernel of autoencoder\.mixed: the CUDA library was not built \(off\); .* says more\. Use"
    with pytest.raises(BackendError, match=reason):
        build_plan(plain, GPU, torch.float16, backend="operators")
    monkeypatch.setattr(ops, "works_on", lambda implementation, device: False)
    monkeypatch.setattr(native, "why_not_built", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"Triton is not installed, .*, and the CUDA library was built for other"):
        assert type(build_plan(plain, GPU, torch.float16)) is StandingReference
    assert default_dtype(GPU, plain) == torch.float32


def test_one_implementation_runs_every_step_or_the_plan_is_refused(
    plain: PlanInput, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(plain, GPU, torch.float16, backend="triton")
    assert isinstance(plan, StandingMixed) and plan.namespace == "efficientad_fast_triton"
    with pytest.raises(BackendError, match=r"'cuda' was asked for, but there are no kernels for this GPU: .*Use"):
        build_plan(plain, GPU, torch.float16, backend="cuda")
    monkeypatch.setattr(ops, "works_on", lambda implementation, device: True)
    for backend, namespace in (("cuda", "efficientad_fast_cuda"), ("auto", "efficientad_fast")):
        plan = build_plan(plain, GPU, torch.float16, backend=backend)  # type: ignore[arg-type]
        assert isinstance(plan, StandingMixed) and plan.namespace == namespace
    # CUDA C++ alone is enough where there is no Triton.
    monkeypatch.setattr(ops, "works_on", lambda implementation, device: implementation == "cuda")
    assert type(build_plan(plain, GPU, torch.float16)) is StandingMixed
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: name != "preprocess.out")
    assert type(build_plan(plain, GPU, torch.float16)) is StandingMixed
    with pytest.raises(BackendError, match=r"'cuda' was asked for, but there is no kernel of preprocess\.out"):
        build_plan(plain, GPU, torch.float16, backend="cuda")
    with pytest.raises(BackendError, match=r"'triton' was asked for, but its kernels run on GPUs alone, .* is cpu"):
        build_plan(plain, CPU, torch.float32, backend="triton")


def test_float8_on_a_cpu_runs_by_the_references_and_nowhere_else(plain: PlanInput) -> None:
    planned = calibrated(plain, images())
    assert type(build_plan(planned, CPU, FLOAT8)) is MixedPlan
    assert type(build_plan(planned, CPU, FLOAT8, backend="operators")) is MixedPlan
    assert type(build_plan(planned, CPU, torch.float16)) is ReferencePlan
    assert type(build_plan(planned, CPU, torch.float32)) in (OperatorPlan, ReferencePlan)
    with pytest.raises(BackendError, match=r"no convolutions in float8.*dtype='float16'"):
        build_plan(planned, CPU, FLOAT8, backend="reference")
    with pytest.raises(BackendError, match=r"float8 was asked for, but the networks are not .*Use dtype='float32'"):
        build_plan(replace(planned, teacher=nn.Identity()), CPU, FLOAT8)
    with pytest.raises(InputError, match="float8 needs to know how large activations become"):
        build_plan(plain, CPU, FLOAT8)


@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8])
def test_the_trial_of_a_plan_finds_broken_kernels(
    plain: PlanInput, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = calibrated(plain, images())
    plan = MixedPlan(planned, CPU, dtype)
    assert planning._why_broken(plan, planned) is None
    right = plan.raw_maps
    with monkeypatch.context() as patch:
        calls = iter((1.0, 1.5))  # from the second time on, as from a graph
        patch.setattr(plan, "raw_maps", lambda batch: tuple(next(calls, 1.5) ** 0.5 * one for one in right(batch)))
        assert "are wrong on this GPU: they are off by" in planning._why_broken(plan, planned)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "raw_maps", lambda batch: tuple(float("nan") * one for one in right(batch)))
        assert "are wrong on this GPU" in planning._why_broken(plan, planned)
    with monkeypatch.context() as patch:

        def refuse(batch: Tensor) -> None:
            raise RuntimeError("out of shared memory")

        patch.setattr(plan, "raw_maps", refuse)
        assert "failed on this GPU (RuntimeError: out of shared memory)" in planning._why_broken(plan, planned)


# In Triton's interpreter


# The interpreter takes as long for a small tile as for a large one; those that ship, test_triton_kernels.py tries.
# By descriptors, with fewer steps than pointers take, which test_operators.py tries.
LARGE_TILES = {
    "conv_pool": {"rows": 2, "columns": 128, "outputs": 256, "depth": 256, "warps": 4, "stages": 3},
    "feature_distance": {"rows": 2, "columns": 256, "outputs": 128, "depth": 256, "warps": 4, "stages": 3},
}

IN_THE_INTERPRETER = """
import torch
from plan_cases import CPU, images, source
from efficientad_fast import ops
from efficientad_fast.plan import MixedPlan
from efficientad_fast.triton_kernels import launching
from test_mixed_plan import kernels_missing
assert not kernels_missing(), kernels_missing()
plan = MixedPlan(source(), CPU, torch.float16, namespace="efficientad_fast_triton")
with launching.as_if_on(9.0):
    scores, maps = plan.run(images(), [(256, 256)])
[entry] = plan._entries.values()
torch.save((tuple(entry.buffers.raw), scores, maps), {path!r})
"""


def kernels_missing() -> list[str]:
    if "triton" not in ops.implementations():
        return list(OPERATORS)
    return [name for name in OPERATORS if not ops.has_kernel("triton", name, "CPU")]


def test_an_image_from_end_to_end_in_the_interpreter(plain: PlanInput, tmp_path: Path) -> None:
    ops.load()
    if missing := kernels_missing():
        pytest.skip(f"Triton is not installed, or has no kernel of {', '.join(missing)}")
    path, table = str(tmp_path / "maps.pt"), tmp_path / "tiles.json"
    large = {kernel: [{"when": {}, "tile": tile}] for kernel, tile in LARGE_TILES.items()}
    own = json.loads((ROOT / "tests" / "interpreter_tiles.json").read_text())
    table.write_text(json.dumps(own | large))
    run = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER.format(path=path)],
        cwd=ROOT / "tests",
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "EFFICIENTAD_FAST_TILES": str(table)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    raw, scores, maps = torch.load(path, weights_only=True)
    trusted = ReferencePlan(plain, CPU, torch.float32)
    assert_maps(raw, trusted_maps(), tolerance("mixed map", torch.float16))
    expected_scores, expected_maps = trusted.run(images(), [(256, 256)])
    assert_close(scores, expected_scores, tolerance("mixed map", torch.float16), "scores")
    assert_close(maps[0], expected_maps[0], tolerance("mixed map", torch.float16), "map")


# In the emulator of CUDA C++


def test_an_image_from_end_to_end_in_the_emulator(plain: PlanInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of EfficientAD-S by the CUDA C++ kernels, two blocks at a time."""
    monkeypatch.setattr(MixedPlan, "_operator", lambda plan, name: emulated.FUNCTIONS[name])
    plan = MixedPlan(plain, CPU, torch.float16)
    with emulated.shuffled(order=1):
        raw = plan.raw_maps(images())
    assert_maps(raw, trusted_maps(), tolerance("mixed map", torch.float16))
