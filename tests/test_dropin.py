"""The drop-in ``predict`` against the plain expressions on the original's modules, and against changing modules."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_close
from fork_networks import autoencoder, pdn_medium, pdn_small, plain_predict
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, Tolerance, tolerance
from torch import Tensor, nn
from torch.nn.utils import parametrizations, vector_to_parameters

from efficientad_fast import dropin
from efficientad_fast.dropin import NotPackedWarning, predict, recognise
from efficientad_fast.errors import InputError
from efficientad_fast.plan import Plan, PlanInput
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

CHANNELS = 6
"""C is free; few channels keep the last layers, and so the tests, cheap."""

QUANTILES = (0.02, 0.5, 0.1, 0.35)

Networks = tuple[nn.Sequential, nn.Sequential, nn.Sequential]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    dropin.forget()
    yield
    dropin.forget()


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def build(size: str = "s", *, padding: bool = False, channels: int = CHANNELS, seed: int = 0) -> Networks:
    torch.manual_seed(seed)
    pdn = pdn_small if size == "s" else pdn_medium
    sizes = (3, 8, 15, 32, 63, 127, 64 if padding else 56)
    networks = (
        pdn(channels, padding=padding),
        pdn(2 * channels, padding=padding),
        autoencoder(channels, sizes=sizes),
    )
    for network in networks:
        network.eval()
    return networks


def statistics(channels: int = CHANNELS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    mean = 0.1 * torch.randn(1, channels, 1, 1, generator=generator)
    return mean.to(dtype), (0.1 + torch.rand(1, channels, 1, 1, generator=generator)).to(dtype)


def random_image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (1, 3, 256, 256)), generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same_maps(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], allowed: Tolerance) -> None:
    for name, one, other in zip(("map_combined", "map_st", "map_ae"), actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous() and not one.requires_grad and not one.is_inference()
        assert_close(one, other, allowed, name)


class StandInPlan(Plan):
    """Its maps are as large as the sum of all weights, so that a test sees which weights were packed, at no cost."""

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)
        self.weight = weight_sum((source.teacher, source.student, source.autoencoder))
        self.calls = 0

    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        raw = torch.full((len(batch), 1, 2, 2), self.weight, dtype=torch.float64)
        return raw, raw.clone()


def weight_sum(networks: tuple[nn.Module, ...]) -> float:
    """Each parameter with a factor of its own, so that it matters which is where."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    with torch.no_grad():
        return sum(factor * float(one.double().sum()) for factor, one in enumerate(parameters, start=1))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StandInPlan]:
    """The plans that were built, in order."""
    built: list[StandInPlan] = []

    def build_plan(source: PlanInput, device: torch.device, dtype: torch.dtype) -> Plan:
        built.append(StandInPlan(source, device, dtype))
        return built[-1]

    monkeypatch.setattr(dropin, "build_plan", build_plan)
    return built


# Same numbers


FLOAT32 = Tolerance(1e-4, 1e-7, 1e-5, "float32 sums in another order")
FLOAT64 = Tolerance(1e-10, 1e-14, 1e-10, "float64 sums in another order")


@pytest.fixture(scope="module")
def plain_in_float64() -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Arguments in float64 that any dtype holds exactly, and what the plain expressions make of them."""
    names = ("teacher", "student", "autoencoder", "image", "teacher_mean", "teacher_std")
    rounded = [value.bfloat16().double() for value in (*build(), random_image(), *statistics())]
    arguments = dict(zip(names, rounded, strict=True))
    return arguments, plain_predict(*(arguments[name] for name in ("image", *names[:3], *names[4:])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_warnings")
def test_same_numbers_as_the_plain_expressions_in_float64(
    plain_in_float64: tuple[dict[str, Any], tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    # float16 is too slow on CPUs to be tried here.
    arguments, expected = plain_in_float64
    actual = predict(**{name: copy.deepcopy(value).to(dtype) for name, value in arguments.items()})
    allowed = {torch.float64: FLOAT64, torch.float32: FLOAT32}.get(dtype) or tolerance("map", dtype)
    assert expected[0].shape == (1, 1, 56, 56)
    assert_same_maps(actual, tuple(one.to(dtype) for one in expected), allowed)


@pytest.mark.usefixtures("no_warnings")
def test_same_numbers_with_padding_and_quantiles() -> None:
    networks, image = build(padding=True), random_image()
    expected = plain_predict(image, *networks, *statistics(), *QUANTILES)
    assert expected[0].shape == (1, 1, 64, 64)
    assert_same_maps(predict(image, *networks, *statistics(), *QUANTILES), expected, FLOAT32)


@pytest.mark.usefixtures("no_warnings")
def test_same_numbers_for_the_medium_network() -> None:
    networks, image = build("m"), random_image()
    expected = plain_predict(image, *networks, *statistics())
    assert_same_maps(predict(image, *networks, *statistics()), expected, FLOAT32)


@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize("padding", [False, True])
def test_recognised_networks_compute_what_the_modules_do(size: str, padding: bool) -> None:
    networks = build(size, padding=padding, channels=3)
    found = recognise(*networks)
    assert not isinstance(found, str), found
    assert (found.teacher.model_size, found.teacher.padding, found.image_size) == (size, padding, (256, 256))
    # The PDN takes small images, and the autoencoder is the same for both sizes.
    for module, network in ((networks[0], found.teacher), (networks[1], found.student)):
        image = random_image(2, 3, 49, 37)
        assert_close(network(image), module(image), tolerance("features", torch.float32))
    image = random_image()
    assert_close(found.autoencoder(image), networks[2](image), tolerance("features", torch.float32))


@pytest.mark.usefixtures("no_warnings")
def test_this_packages_own_networks_at_another_size_in_a_batch() -> None:
    torch.manual_seed(0)
    networks = PatchDescriptionNetwork("s", 2), PatchDescriptionNetwork("s", 4), Autoencoder(2)
    for network in networks:
        network.eval()
    image, (mean, std) = random_image(2, 3, 256, 261), statistics(2)
    actual = predict(image, *networks, mean, std)
    assert actual[0].shape == (2, 1, 56, 58)
    expected = plain_predict(image, *networks, mean, std)
    assert_same_maps(actual, expected, FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", ["s", "m"])
def test_same_numbers_on_the_gpu(size: str, dtype: torch.dtype) -> None:
    networks = build(size, channels=384)
    for network in networks:
        network.to("cuda", dtype)
    image, statistic = random_image(2, 3, 256, 256), statistics(384)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = predict(image.to("cuda", dtype), *networks, *(one.to("cuda", dtype) for one in statistic))
    assert {(one.dtype, one.device.type) for one in actual} == {(dtype, "cuda")}
    for network in networks:
        network.double()
    expected = plain_predict(image.cuda().double(), *networks, *(one.cuda().double() for one in statistic))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, tolerance("map", dtype))


def tiny(channels: int, outputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A network that is not recognised."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, outputs, 1)).to(dtype).eval()


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    outputs=st.integers(1, 5),
    quantiles=st.sampled_from([(None,) * 4, QUANTILES, (*QUANTILES[:2], None, None), (None, None, *QUANTILES[2:])]),
)
@pytest.mark.filterwarnings("ignore::efficientad_fast.dropin.NotPackedWarning")
def test_unrecognised_modules_of_any_shape(shape: tuple[int, ...], outputs: int, quantiles: tuple[Any, ...]) -> None:
    networks = [tiny(shape[1], outputs * factor, seed=seed) for seed, factor in enumerate((1, 2, 1))]
    arguments = (random_image(*shape), *networks, *statistics(outputs), *quantiles)
    assert_same_maps(predict(*arguments), plain_predict(*arguments), EXACT)


# Quantiles and dtypes, with raw maps that are known


@pytest.mark.parametrize("as_tensors", [False, True])
def test_division_by_zero_is_the_originals(
    monkeypatch: pytest.MonkeyPatch, plans: list[StandInPlan], as_tensors: bool
) -> None:
    raw = torch.tensor([[[[0.0, 0.25], [1.0, float("nan")]]]])
    monkeypatch.setattr(StandInPlan, "raw_maps", lambda self, batch, *, statistics: (raw, raw.clone()))
    quantiles: list[Any] = [0.25, 0.25, 0.25, 0.5]
    if as_tensors:
        quantiles = [torch.tensor(one) for one in quantiles]
    combined, map_st, map_ae = predict(random_image(), *build(), *statistics(), *quantiles)
    inf, nan = float("inf"), float("nan")
    assert_close(map_st, [[[[-inf, nan], [inf, nan]]]], EXACT)
    assert_close(map_ae, [[[[-0.1, 0.0], [0.3, nan]]]], Tolerance(0, 1e-7, 0, "0.1 in float32"))
    assert_close(combined, [[[[-inf, nan], [inf, nan]]]], EXACT)
    assert_close(raw, [[[[0.0, 0.25], [1.0, nan]]]], EXACT, "the raw map, which must be left alone")


@pytest.mark.parametrize("statistic_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "quantile", [0.5, torch.tensor(0.5), torch.tensor(0.5).double(), torch.tensor([0.5]), torch.tensor([0.5]).double()]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore::efficientad_fast.dropin.NotPackedWarning")
def test_dtypes_are_promoted_as_by_the_plain_expressions(
    plans: list[StandInPlan], dtype: torch.dtype, statistic_dtype: torch.dtype, quantile: Any
) -> None:
    arguments = *statistics(dtype=statistic_dtype), quantile, 2 * quantile, quantile, 2 * quantile
    networks = build()
    for network in networks:
        network.to(dtype)
    actual = predict(random_image(dtype=dtype), *networks, *arguments)
    assert len(plans) == 1
    plain = [tiny(3, CHANNELS * factor, dtype) for factor in (1, 2, 1)]
    expected = plain_predict(random_image(1, 3, 2, 2, dtype=dtype), *plain, *arguments)
    assert [one.dtype for one in actual] == [one.dtype for one in expected]


# Changes are noticed


def step(networks: Networks, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer(parameters, lr=0.01, **options).step()


def add_in_place(networks: Networks, which: int) -> None:
    with torch.no_grad():
        networks[which][0].bias.add_(1)


def add_in_inference_mode(networks: Networks) -> None:
    with torch.inference_mode():
        networks[1][3].weight.mul_(2)


def round_to_half(networks: Networks) -> None:
    for network in networks:
        network.half().float()


def replace_parameter(networks: Networks) -> None:
    networks[0][3].weight = nn.Parameter(torch.ones_like(networks[0][3].weight))


def replace_layer(networks: Networks) -> None:
    networks[2][0] = nn.Conv2d(3, 32, 4, stride=2, padding=1).eval()


def swap_layers(networks: Networks) -> None:
    networks[2][6], networks[2][8] = networks[2][8], networks[2][6]


def replace_data(networks: Networks) -> None:
    networks[2][0].weight.data = torch.ones_like(networks[2][0].weight)


FIXED_MEMORY = np.zeros(128, np.float32)


def return_to_the_same_address(networks: Networks) -> None:
    """As ``.half().float()`` may do: the old memory is free, and an allocator hands it out again."""
    bias = networks[0][0].bias
    bias.data = torch.empty(0)
    FIXED_MEMORY[:] += 1
    bias.data = torch.from_numpy(FIXED_MEMORY)


def swap_contents(networks: Networks) -> None:
    torch.utils.swap_tensors(networks[0][0].weight, nn.Parameter(torch.ones_like(networks[0][0].weight)))


CHANGES: dict[str, Callable[[Networks], object]] = {
    "teacher in place": lambda networks: add_in_place(networks, 0),
    "student in place": lambda networks: add_in_place(networks, 1),
    "autoencoder in place": lambda networks: add_in_place(networks, 2),
    "in place in inference mode": add_in_inference_mode,
    "in place through detach": lambda networks: networks[0][0].bias.detach().add_(1),
    "SGD": lambda networks: step(networks, torch.optim.SGD),
    "Adam, fused": lambda networks: step(networks, torch.optim.Adam, fused=True),
    "load_state_dict": lambda networks: networks[1].load_state_dict(build(seed=1)[1].state_dict()),
    "load_state_dict, assigned": lambda networks: networks[1].load_state_dict(
        build(seed=1)[1].state_dict(), assign=True
    ),
    ".half().float()": round_to_half,
    "parameter replaced": replace_parameter,
    "layer replaced": replace_layer,
    "layers swapped": swap_layers,
    "data replaced": replace_data,
    "data replaced at its address": return_to_the_same_address,
    "contents swapped": swap_contents,
    "vector_to_parameters": lambda networks: vector_to_parameters(torch.ones(10**6 * 3), networks[0].parameters()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("no_warnings")
def test_changed_weights_are_packed_again(plans: list[StandInPlan], change: str) -> None:
    networks = build()
    predict(random_image(), *networks, *statistics())
    for repeat in range(2, 5):
        CHANGES[change](networks)
        map_st = predict(random_image(), *networks, *statistics())[1]
        assert map_st[0, 0, 0, 0] == torch.tensor(weight_sum(networks)).float()
        predict(random_image(), *networks, *statistics())
        assert len(plans) == repeat
    assert plans[1].weight != plans[0].weight


@pytest.mark.usefixtures("no_warnings")
def test_real_weights_loaded_later_count(plain_in_float64: tuple[dict[str, Any], tuple[Tensor, ...]]) -> None:
    arguments, expected = plain_in_float64
    networks = dict(zip(("teacher", "student", "autoencoder"), build(seed=1), strict=True))
    tensors = {name: value.float() for name, value in arguments.items() if isinstance(value, Tensor)}
    before = predict(**networks, **tensors)
    for name, network in networks.items():
        network.load_state_dict(arguments[name].state_dict())
    after = predict(**networks, **tensors)
    assert float((before[0] - expected[0]).norm() / expected[0].norm()) > 0.01
    assert_same_maps(after, tuple(one.float() for one in expected), FLOAT32)


@pytest.mark.usefixtures("no_warnings")
def test_packed_once_while_nothing_changes(plans: list[StandInPlan]) -> None:
    networks, (mean, std) = build(), statistics()
    for number in range(3):
        predict(random_image(number + 1, 3, 256, 256), *networks, mean + number, std, *(number,) * 4)
        with torch.inference_mode():
            predict(random_image(), *networks, mean, std)
        for network in networks:
            network.zero_grad()
            network.requires_grad_(number % 2 == 0)
            network.float().to("cpu").eval()
            network.state_dict()
    assert len(plans) == 1
    predict(random_image(), *networks[:2], build()[2], mean, std)
    assert len(plans) == 2


@pytest.mark.usefixtures("no_warnings")
def test_steps_of_an_optimizer_of_other_networks_do_not_count(plans: list[StandInPlan]) -> None:
    networks, others = build(), build(seed=1)
    predict(random_image(), *networks, *statistics())
    step(others, torch.optim.Adam, fused=True)
    predict(random_image(), *networks, *statistics())
    assert len(plans) == 1


@pytest.mark.usefixtures("no_warnings")
def test_dtype_of_the_modules_is_that_of_the_plan(plans: list[StandInPlan]) -> None:
    networks = build()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for network in networks:
            network.to(dtype)
        assert predict(random_image(dtype=dtype), *networks, *statistics(dtype=dtype))[0].dtype == dtype
        assert plans[-1].dtype == dtype
    assert len(plans) == 4


@pytest.mark.usefixtures("no_warnings")
def test_what_cannot_be_noticed_is_noticed_after_forget(plans: list[StandInPlan]) -> None:
    networks = build()
    predict(random_image(), *networks, *statistics())
    networks[0][0].weight.data.add_(1)
    networks[1][0].weight.detach().numpy()[...] += 1
    predict(random_image(), *networks, *statistics())
    assert len(plans) == 1
    dropin.forget()
    predict(random_image(), *networks, *statistics())
    assert len(plans) == 2
    assert plans[1].weight == weight_sum(networks) != plans[0].weight


@pytest.mark.usefixtures("no_warnings")
def test_modules_made_in_inference_mode(plans: list[StandInPlan]) -> None:
    with torch.inference_mode():
        networks = build()
    for _ in range(2):
        predict(random_image(), *networks, *statistics())
    assert len(plans) == 1


# The modules' own forward, and its warning


@contextlib.contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield record


def test_one_warning_for_each_set_of_unrecognised_modules() -> None:
    image = random_image(1, 3, 4, 4)
    with recorded() as record:
        for seed in range(2):
            networks = [tiny(3, CHANNELS * factor, seed=seed) for factor in (1, 2, 1)]
            for _ in range(3):
                predict(image, *networks, *statistics())
            assert len(record) == seed + 1
    assert record[0].category is NotPackedWarning
    assert record[0].filename == __file__
    assert "the layers of the teacher are not those of a known network" in str(record[0].message)
    assert "PatchDescriptionNetwork" in str(record[0].message)


def test_train_mode_drops_out_and_warns_once_in_all(monkeypatch: pytest.MonkeyPatch, plans: list[StandInPlan]) -> None:
    networks, image = build(channels=1), random_image()
    networks[2].train()
    torch.manual_seed(5)
    expected = plain_predict(image, *networks, *statistics(1))
    with recorded() as record:
        torch.manual_seed(5)
        assert_same_maps(predict(image, *networks, *statistics(1)), expected, EXACT)
        seen = without_forward(monkeypatch)
        networks[2].eval()
        predict(image, *networks, *statistics(1))
        assert (len(plans), len(seen)) == (1, 0)
        networks[2].train()
        predict(image, *networks, *statistics(1))
        assert (len(plans), len(seen)) == (1, 1)
    assert [str(one.message).rpartition(": ")[2] for one in record] == [
        "the autoencoder is in train mode. Call .eval() on it."
    ]


def without_forward(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let the networks' own forward cost nothing; returns the shapes that went there."""
    seen: list[tuple[int, ...]] = []

    def own_forward(image: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        seen.append(tuple(image.shape))
        return torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    monkeypatch.setattr(dropin, "_own_forward", own_forward)
    return seen


def test_hooks_fire_and_packing_comes_back_without_them(plans: list[StandInPlan]) -> None:
    networks, image = build(channels=1), random_image()
    predict(image, *networks, *statistics(1))
    fired: list[str] = []
    handle = networks[1][4].register_forward_hook(lambda *_: fired.append("forward"))
    before = networks[0].register_forward_pre_hook(lambda *_: fired.append("before"))
    with pytest.warns(NotPackedWarning, match="the teacher has forward hooks"):
        predict(image, *networks, *statistics(1))
    assert fired == ["before", "forward"]
    assert plans[0].calls == 1
    handle.remove()
    before.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(image, *networks, *statistics(1))
    assert (len(fired), len(plans), plans[1].calls) == (2, 2, 1)


def test_warnings_by_reason_and_packing_again(monkeypatch: pytest.MonkeyPatch, plans: list[StandInPlan]) -> None:
    seen, networks, arguments = without_forward(monkeypatch), build(), statistics()
    shared = nn.ReLU().eval()
    networks[1][1] = networks[1][4] = shared

    def expect_packed() -> None:
        before = len(seen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predict(random_image(), *networks, *arguments)
        assert len(seen) == before

    def expect_warning(message: str, *shape: int) -> None:
        before = len(seen)
        with pytest.warns(NotPackedWarning, match=message):
            predict(random_image(*shape), *networks, *arguments)
        assert len(seen) == before + 1

    expect_packed()
    global_hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    expect_warning("hooks are registered for all modules")
    global_hook.remove()
    expect_packed()
    networks[0][2].padding = 1
    expect_warning("the layers of the teacher are not")
    networks[0][2].padding = (0, 0)
    expect_packed()
    # The same modules in the same order, if one counts each once.
    networks[1][4], networks[1][5] = networks[1][5], networks[1][4]
    expect_warning("the layers of the student are not")
    networks[1][4], networks[1][5] = networks[1][5], networks[1][4]
    expect_packed()
    networks[1].forward = lambda image: image
    expect_warning("the student has forward hooks or a replaced forward")
    del networks[1].forward
    expect_packed()
    with torch.autocast("cpu"):
        expect_warning("autocast is on")
    expect_warning(r"not made for images of size \(300, 256\)", 1, 3, 300, 256)
    expect_packed()
    assert plans[-1].weight == weight_sum(networks)


def test_a_size_that_the_modules_do_not_take_is_their_own_error(plans: list[StandInPlan]) -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        predict(random_image(1, 3, 128, 128), *build(), *statistics())
    assert plans[0].calls == 0


class Subclass(nn.Sequential):
    pass


def with_changed(which: int, change: Callable[[nn.Sequential], object]) -> Networks:
    networks = build(channels=1)
    change(networks[which])
    return networks


def insert(layer: nn.Module, at: int) -> Callable[[nn.Sequential], object]:
    return lambda network: network.insert(at, layer.eval())


def set_to(layer: nn.Module, at: int) -> Callable[[nn.Sequential], object]:
    return lambda network: network.__setitem__(at, layer.eval())


UNRECOGNISED: dict[str, tuple[Callable[[], tuple[nn.Module, ...]], str]] = {
    "another layer": (lambda: with_changed(0, insert(nn.BatchNorm2d(128), 1)), "teacher holds a BatchNorm2d"),
    "a layer more": (lambda: with_changed(1, insert(nn.ReLU(), 9)), "layers of the student"),
    "other width": (lambda: with_changed(0, set_to(nn.Conv2d(128, 256, 5), 3)), "layers of the teacher"),
    "no bias": (lambda: with_changed(0, set_to(nn.Conv2d(3, 128, 4, bias=False), 0)), "layers of the teacher"),
    "dilated": (lambda: with_changed(0, set_to(nn.Conv2d(3, 128, 4, dilation=2), 0)), "layers of the teacher"),
    "reflected": (
        lambda: with_changed(2, set_to(nn.Conv2d(3, 32, 4, stride=2, padding=1, padding_mode="reflect"), 0)),
        "layers of the autoencoder",
    ),
    "half padded": (lambda: with_changed(0, set_to(nn.AvgPool2d(2, 2, 1), 2)), "layers of the teacher"),
    "nearest": (lambda: with_changed(2, set_to(nn.Upsample(size=3), 11)), "Upsample"),
    "scale factor": (
        lambda: with_changed(2, set_to(nn.Upsample(scale_factor=2, mode="bilinear"), 11)),
        "Upsample",
    ),
    "corners": (
        lambda: with_changed(2, set_to(nn.Upsample(size=3, mode="bilinear", align_corners=True), 11)),
        "Upsample",
    ),
    "no image size": (
        lambda: with_changed(2, set_to(nn.Upsample(size=60, mode="bilinear"), 35)),
        "belong to no image size",
    ),
    "weights parametrised": (
        lambda: with_changed(1, lambda network: parametrizations.weight_norm(network[0])),
        "student holds a ParametrizedConv2d",
    ),
    "subclass": (lambda: (Subclass(*build(channels=1)[0]), *build(channels=1)[1:]), "teacher holds a Subclass"),
    "one layer": (lambda: (nn.Conv2d(3, 1, 1).eval(), *build(channels=1)[1:]), "layers of the teacher"),
    "mixed kinds": (lambda: (build(channels=1)[0], *build("m", channels=1)[1:]), "teacher and student differ"),
    "mixed dtypes": (lambda: with_changed(1, nn.Module.double), "several dtypes or devices"),
    "8-bit floats": (
        lambda: tuple(network.to(torch.float8_e4m3fn) for network in build(channels=1)),
        "they are torch.float8_e4m3fn",
    ),
    "autoencoder as teacher": (lambda: build(channels=1)[::-1], "layers of the teacher"),
    "nested": (lambda: (nn.Sequential(build()[0]).eval(), *build()[1:]), "layers of the teacher"),
    "own network, edited": (
        lambda: (PatchDescriptionNetwork("s", 1).eval(), own_student_with_large_pool(), Autoencoder(1).eval()),
        "layers of the student",
    ),
    "own autoencoder of other padding": (
        lambda: (
            PatchDescriptionNetwork("s", 1).eval(),
            PatchDescriptionNetwork("s", 2).eval(),
            Autoencoder(1, padding=True).eval(),
        ),
        "layers of the autoencoder",
    ),
}


def own_student_with_large_pool() -> PatchDescriptionNetwork:
    network = PatchDescriptionNetwork("s", 2).eval()
    network.pool = nn.AvgPool2d(3, stride=2).eval()
    return network


@pytest.mark.parametrize("case", UNRECOGNISED)
def test_what_is_not_recognised_and_why(case: str) -> None:
    make, reason = UNRECOGNISED[case]
    found = recognise(*make())
    assert isinstance(found, str)
    assert reason in found


def test_spellings_of_the_same_layer_are_recognised() -> None:
    networks = build(channels=1)
    networks[0][2] = nn.AvgPool2d((2, 2), (2, 2), padding=(0, 0)).eval()
    networks[2][11] = nn.Upsample(size=(3, 3), mode="bilinear", align_corners=False).eval()
    networks[2][14] = nn.Dropout(0.5).eval()
    del networks[2][18]
    shared = nn.ReLU().eval()
    networks[1][1] = networks[1][4] = networks[1][7] = shared
    assert not isinstance(recognise(*networks), str)


def test_upsampling_sizes_tell_the_image_size() -> None:
    teacher, student, _ = build(channels=1)
    for size in ((256, 256), (512, 512), (257, 511), (300, 260)):
        found = recognise(teacher, student, Autoencoder(1).eval())
        assert not isinstance(found, str) and found.image_size is None
        sizes = [*found.autoencoder.decoder.step_sizes(size), (-(-size[0] // 4) - 8, -(-size[1] // 4) - 8)]
        found = recognise(teacher, student, autoencoder(1, sizes=tuple(sizes)).eval())
        assert not isinstance(found, str) and found.upsample_sizes == sizes
        assert found.image_size is not None
        # Images of 4k + 2 and 4k + 3 pixels have the same features.
        assert [(one - other) in (0, 1) for one, other in zip(size, found.image_size, strict=True)] == [True, True]


# The cache


def test_modules_are_freed_and_their_packed_weights_with_them() -> None:
    networks, image = build(channels=1), random_image()
    predict(image, *networks, *statistics(1))
    alive = [weakref.ref(item) for network in networks for item in (network, *network.parameters())]
    plan = next(
        weakref.ref(one) for one in gc.get_objects() if isinstance(one, Plan) and not isinstance(one, StandInPlan)
    )
    assert plan() is not None
    del networks
    gc.collect()
    assert [one() for one in alive if one() is not None] == []
    assert plan() is None


def test_the_cache_is_bounded(plans: list[StandInPlan]) -> None:
    sets = [build(channels=1, seed=seed) for seed in range(dropin.CAPACITY + 1)]
    for networks in sets:
        predict(random_image(), *networks, *statistics(1))
    alive = [weakref.ref(plan) for plan in plans]
    plans.clear()
    gc.collect()
    assert [plan() is not None for plan in alive] == [False] + [True] * dropin.CAPACITY
    predict(random_image(), *sets[1], *statistics(1))
    assert plans == []
    predict(random_image(), *sets[0], *statistics(1))
    assert len(plans) == 1
    # The second set was used since, so the third is the one that had to go.
    assert [plan() is not None for plan in alive[1:4]] == [True, False, True]


def test_threads_pack_once_and_each_set_gets_its_own_maps(plans: list[StandInPlan]) -> None:
    sets = [build(channels=1, seed=seed) for seed in range(3)]
    expected = [torch.tensor(weight_sum(networks)).float() for networks in sets]
    start, wrong = threading.Barrier(6), []

    def work(number: int) -> None:
        start.wait()
        for repeat in range(20):
            index = (number + repeat) % len(sets)
            if predict(random_image(), *sets[index], *statistics(1))[1][0, 0, 0, 0] != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(plans) == 3


def test_a_module_that_holds_itself_does_not_hang() -> None:
    loop = nn.Sequential(nn.Conv2d(3, 3, 1))
    loop.add_module("again", loop)
    for module in loop.modules():
        module.training = False
    with pytest.raises(RecursionError):
        predict(random_image(1, 3, 2, 2), loop, *build(channels=1)[1:], *statistics(1))


# Bad input


def arguments(**changes: Any) -> dict[str, Any]:
    teacher, student, autoencoder_ = build()
    mean, std = statistics()
    given = {
        "image": random_image(),
        "teacher": teacher,
        "student": student,
        "autoencoder": autoencoder_,
        "teacher_mean": mean,
        "teacher_std": std,
    }
    return given | changes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "array": ({"image": [[0.0]]}, "image must be a torch.Tensor, got list"),
    "one image": ({"image": torch.zeros(3, 256, 256)}, r"image must be a batch .* got \(3, 256, 256\)"),
    "grey": ({"image": torch.zeros(1, 1, 256, 256)}, r"image must have 3 channels, .* got \(1, 1, 256, 256\)"),
    "uint8": ({"image": torch.zeros(1, 3, 256, 256).byte()}, "image must be torch.float32 .* got torch.uint8"),
    "double": ({"image": torch.zeros(1, 3, 256, 256).double()}, "image must be torch.float32 .* torch.float64"),
    "elsewhere": ({"image": torch.zeros(1, 3, 256, 256, device="meta")}, "on cpu .* on meta"),
    "function": ({"student": torch.relu}, "student must be a torch.nn.Module, got builtin"),
    "no statistics": ({"teacher_mean": None}, "teacher_mean must be a torch.Tensor, got NoneType"),
    "flat mean": ({"teacher_mean": torch.zeros(6)}, r"teacher_mean must have shape \(1, 6, 1, 1\) .* got \(6,\)"),
    "long std": ({"teacher_std": torch.ones(1, 12, 1, 1)}, r"teacher_std must have shape .* got \(1, 12, 1, 1\)"),
    "mean elsewhere": (
        {"teacher_mean": torch.zeros(1, 6, 1, 1, device="meta")},
        "teacher_mean must be on the device of the networks, cpu, got meta",
    ),
    "narrow student": (
        {"student": pdn_small(6).eval()},
        "student must have 12 output channels beside a teacher of 6, got 6",
    ),
    "wide autoencoder": (
        {"autoencoder": autoencoder(7).eval()},
        "autoencoder must have 6 output channels beside a teacher of 6, got 7",
    ),
    "no end": ({"q_st_start": 0.1}, "q_st_end must be given where q_st_start is, got None"),
    "no other end": ({"q_ae_start": 0.1}, "q_ae_end must be given where q_ae_start is, got None"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("plans", "no_warnings")
def test_bad_arguments_are_named(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        predict(**arguments(**changes))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ((tiny(3, 2), tiny(3, 3), tiny(3, 2)), "student must have 4 output channels beside a teacher of 2, got 3"),
        (
            (tiny(3, 2), tiny(3, 4), nn.Conv2d(3, 2, 2)),
            r"autoencoder must return features of the teacher's size, \(4, 4\), .* got \(3, 3\)",
        ),
        ((nn.Flatten(), tiny(3, 4), tiny(3, 2)), r"teacher must return features of shape .* got \(1, 48\)"),
        ((tiny(3, 3), tiny(3, 6), tiny(3, 3)), r"teacher_mean must have shape \(1, 3, 1, 1\)"),
    ],
)
@pytest.mark.usefixtures("no_warnings")
def test_outputs_of_unrecognised_modules_are_checked(networks: tuple[nn.Module, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(random_image(1, 3, 4, 4), *networks, *statistics(2))
