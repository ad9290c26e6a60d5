"""The plan that runs as operators, against the plain networks in float64, and what it promises beside its numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from assertions import assert_close
from plan_cases import CHANNELS, CPU, images, near_student, source
from tolerances import EXACT, tolerance
from torch import Tensor, nn

from efficientad_fast import native
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.plan import OperatorPlan, PlanInput, ReferencePlan, build_plan
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

pytestmark = pytest.mark.skipif(not native.is_built("cpu"), reason=f"no CPU library: {native.why_not_built('cpu')}")


@pytest.fixture(scope="module")
def plain() -> PlanInput:
    return source()


@pytest.fixture(scope="module")
def plan(plain: PlanInput) -> OperatorPlan:
    return OperatorPlan(plain, CPU, torch.float32)


def assert_maps(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], quantity: str = "winograd map") -> None:
    for name, one, other in zip(("map_st", "map_ae"), actual, expected, strict=True):
        assert_close(one, other, tolerance(quantity, torch.float32), name)


@pytest.mark.parametrize(
    ("model_size", "size", "count", "padding"),
    [
        ("s", (256, 256), 1, False),
        ("s", (271, 323), 2, False),
        ("s", (265, 256), 1, True),
        ("m", (256, 265), 1, False),
        ("m", (257, 256), 1, True),
    ],
)
def test_maps_are_those_of_the_networks(model_size: str, size: tuple[int, int], count: int, padding: bool) -> None:
    planned = source(model_size, padding=padding, size=size)
    batch = images(count, size)
    trusted = ReferencePlan(planned, CPU, torch.float64).raw_maps(batch)
    assert_maps(OperatorPlan(planned, CPU, torch.float32).raw_maps(batch), trusted)


@pytest.mark.parametrize("model_size", ["s", "m"])
@torch.no_grad()
def test_a_student_that_nearly_equals_its_teacher(model_size: str) -> None:
    plain = source(model_size)
    planned = replace(plain, student=near_student(plain, 0.1))
    trusted = ReferencePlan(planned, CPU, torch.float64).raw_maps(images())
    assert 0.001 < trusted[0].mean() < 0.4  # of features with variance 1
    found = OperatorPlan(planned, CPU, torch.float32).raw_maps(images())
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, trusted, strict=True)]
    print(model_size, f"mean of map_st {float(trusted[0].mean()):.3f}, errors", *(f"{one:.1e}" for one in errors))
    assert_maps(found, trusted)


def test_the_plan_that_is_built_by_default(plain: PlanInput) -> None:
    assert type(build_plan(plain, CPU, torch.float32)) is OperatorPlan
    assert type(build_plan(plain, CPU, torch.float32, backend="reference")) is ReferencePlan
    assert type(build_plan(plain, CPU, torch.float64)) is ReferencePlan


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, torch.float64, "float32 on the CPU alone, not in torch.float64 on cpu"),
        ({"teacher": nn.Conv2d(3, CHANNELS, 33, stride=4)}, torch.float32, "are not PatchDescriptionNetwork"),
        ({"student": PatchDescriptionNetwork("s", 2 * CHANNELS, padding=True)}, torch.float32, "are not those that"),
        ({"student": PatchDescriptionNetwork("s", CHANNELS)}, torch.float32, "are not those that"),
        ({"autoencoder": Autoencoder(CHANNELS, padding=True)}, torch.float32, "are not those that"),
    ],
)
def test_operators_that_cannot_run_say_why(
    plain: PlanInput, changes: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(BackendError, match=f"'operators' was asked for, but .*{reason}.* Use backend='auto'"):
        build_plan(replace(plain, **changes), CPU, dtype, backend="operators")


def test_other_widths_run_as_plain_networks(plain: PlanInput) -> None:
    student = PatchDescriptionNetwork("s", 2 * CHANNELS)
    student.conv2, student.conv3 = nn.Conv2d(128, 64, 4), nn.Conv2d(64, 256, 3)
    assert type(build_plan(replace(plain, student=student), CPU, torch.float32)) is ReferencePlan
    student = PatchDescriptionNetwork("s", 2 * CHANNELS)
    student.conv1.register_parameter("bias", None)
    assert type(build_plan(replace(plain, student=student), CPU, torch.float32)) is ReferencePlan


@pytest.mark.parametrize("shape", [(1, 1, 256, 256), (1, 4, 256, 256), (3, 256, 256)])
def test_what_is_no_batch_of_rgb_images_is_refused(plan: OperatorPlan, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must have shape \(N, 3, H, W\), got"):
        plan.raw_maps(torch.zeros(shape))


def test_statistics_of_another_shape_are_refused(plain: PlanInput, plan: OperatorPlan) -> None:
    with pytest.raises(InputError, match=r"teacher's std must have shape \(1, 48, 1, 1\), got \(1, 1, 1, 1\)"):
        plan.raw_maps(images(), statistics=(plain.teacher_mean, torch.ones(1, 1, 1, 1)))


def test_too_small_an_image_is_refused_as_by_the_networks(plan: OperatorPlan) -> None:
    with pytest.raises(InputError, match=r"255x300 pixels, but each side must be at least 256"):
        plan.raw_maps(images(1, (255, 300)))


def test_an_empty_batch(plan: OperatorPlan) -> None:
    assert [one.shape for one in plan.raw_maps(images(0))] == [(0, 1, 56, 56)] * 2
    scores, maps = plan.run(images(0), [])
    assert scores.shape == (0,) and maps == []


def test_bits_depend_neither_on_threads_nor_on_the_batch(plan: OperatorPlan) -> None:
    batch = images(3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(plan.raw_maps(batch))
        torch.set_num_threads(2)
        alone = [plan.raw_maps(one) for one in batch.split(1)]
    finally:
        torch.set_num_threads(before)
    together = (torch.cat([st for st, _ in alone]), torch.cat([ae for _, ae in alone]))
    for other in (*found[1:], together):
        for name, one, same in zip(("map_st", "map_ae"), found[0], other, strict=True):
            assert_close(one, same, EXACT, name)


def test_layouts_and_dtypes_of_the_batch(plan: OperatorPlan) -> None:
    batch = images(2)
    expected = plan.raw_maps(batch)
    strided = torch.zeros(2, 3, 256, 512)[..., ::2]
    strided.copy_(batch)
    for other in (batch.to(memory_format=torch.channels_last), strided, batch.double()):
        assert_maps(plan.raw_maps(other), expected, "map")


def test_results_are_the_callers_own(plan: OperatorPlan) -> None:
    first = plan.raw_maps(images(seed=1))
    kept = [one.clone() for one in first]
    plan.raw_maps(images(seed=2))
    for one, same in zip(first, kept, strict=True):
        assert_close(one, same, EXACT, "map")
        one.zero_()
    assert plan.raw_maps(images(seed=1))[0].sum() > 0


def test_inference_mode_and_none_take_turns(plan: OperatorPlan) -> None:
    with torch.inference_mode():
        inside = plan.raw_maps(images(2, seed=5))
    assert_maps(plan.raw_maps(images(2, seed=5)), inside, "map")


def test_nan_reaches_all_that_it_reaches_in_the_networks(plain: PlanInput, plan: OperatorPlan) -> None:
    batch = images(2)
    batch[1, 2, 130, 77] = float("nan")
    expected = ReferencePlan(plain, CPU, torch.float32).raw_maps(batch)
    for one, trusted in zip(plan.raw_maps(batch), expected, strict=True):
        assert one[trusted.isnan()].isnan().all()
        assert one[0].isfinite().all()


def test_statistics_of_a_call_take_the_place_of_the_plans(plain: PlanInput, plan: OperatorPlan) -> None:
    assert plain.teacher_mean is not None and plain.teacher_std is not None
    other = (plain.teacher_mean + 0.3, 1.7 * plain.teacher_std)
    planned = replace(plain, teacher_mean=other[0], teacher_std=other[1])
    expected = OperatorPlan(planned, CPU, torch.float32).raw_maps(images())
    own = plan.raw_maps(images())
    for _ in range(2):
        assert_maps(plan.raw_maps(images(), statistics=other), expected, "map")
        assert_maps(plan.raw_maps(images()), own, "map")
    zero = (other[0], other[1].clone().index_fill_(1, torch.tensor([3]), 0))  # divides by zero, as the networks do
    assert plan.raw_maps(images(), statistics=zero)[0].isposinf().all()
    other[0].zero_()  # the plan does not hold the caller's tensors
    assert_maps(
        plan.raw_maps(images(), statistics=other),
        ReferencePlan(plain, CPU, torch.float64).raw_maps(images(), statistics=other),
    )


def test_several_threads_get_the_same_numbers(plan: OperatorPlan) -> None:
    batches = [images(1 + seed % 2, (256, 256 + 16 * (seed % 3)), seed) for seed in range(6)]
    expected = [plan.raw_maps(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(plan.raw_maps, batches * 2))
    for one, other in zip(found, expected * 2, strict=True):
        assert_maps(one, other, "map")


@pytest.mark.parametrize("model_size", ["s", "m"])
def test_memory_of_a_prediction(model_size: str) -> None:
    """Under 150 MB beside the weights at batch 1 and two threads, and nothing new from the second prediction on."""
    plan = OperatorPlan(source(model_size), CPU, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert plan.memory(images())["workspace"] < 150e6
    finally:
        torch.set_num_threads(before)

    def buffers() -> list[int]:
        with plan.steps(images()) as steps:
            return [one.data_ptr() for step in steps for one in (*step.inputs, step.out)]

    first = buffers()
    plan.raw_maps(images())
    assert buffers() == first
