"""Models of anomalib that predict by this package's plans, on a stand-in that computes as anomalib does.

``tests/interop/parity.py`` does the same with anomalib itself, where it is installed.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from anomalib_networks import EfficientAdModel, InferenceBatch, fill, seeded_images
from assertions import assert_close
from fork_networks import pdn_small
from tolerances import EXACT, tolerance
from torch import Tensor, nn

from efficientad_fast import accelerate, dropin
from efficientad_fast.dropin import NotPackedWarning
from efficientad_fast.errors import BackendError, InputError

CHANNELS = 6


class Lightning(nn.Module):
    """As anomalib's Lightning module: it holds the torch model."""

    def __init__(self, model: EfficientAdModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Any:
        return self.model(batch)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    dropin.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    dropin.forget()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that went through a plan, of each time."""
    seen: list[int] = []
    original = dropin.Packed.raw_maps

    def counted(self: Any, image: Tensor, *statistics: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(image))
        return original(self, image, *statistics)

    monkeypatch.setattr(dropin.Packed, "raw_maps", counted)
    return seen


def filled(size: str = "small", **settings: Any) -> EfficientAdModel:
    statistics = settings.pop("statistics", True)
    model = EfficientAdModel(CHANNELS, size, **settings).eval()
    fill(model, statistics=statistics)
    return model


def images(count: int = 1, size: tuple[int, int] = (256, 256)) -> Tensor:
    return torch.from_numpy(seeded_images(count, size)).movedim(-1, 1).float() / 255


def assert_same(model: nn.Module, batch: Tensor, **options: Any) -> None:
    """The accelerated model gives what a plain one with its weights gives."""
    inner = model.model if isinstance(model, Lightning) else model
    plain = copy.deepcopy(inner)
    assert type(plain) is EfficientAdModel
    with torch.no_grad():
        found, expected = inner(batch, **options), plain(batch, **options)
    assert isinstance(found, InferenceBatch)
    for name in ("anomaly_map", "pred_score"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and one.shape == other.shape
        assert_close(one, other, tolerance("map of another implementation", batch.dtype), name)
    assert found.pred_label is None and found.pred_mask is None


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("small", {}),
        ("small", {"padding": True}),
        ("small", {"pad_maps": False}),
        ("small", {"statistics": False}),
        ("medium", {"padding": True}),
    ],
)
def test_an_accelerated_model_gives_the_same_maps_and_scores(
    size: str, settings: dict[str, Any], runs: list[int]
) -> None:
    module = Lightning(filled(size, **settings))
    names = list(module.state_dict())
    assert accelerate(module) is module
    assert list(module.state_dict()) == names and isinstance(module.model, EfficientAdModel)
    runs.clear()
    assert_same(module, images(2))
    assert_same(module, images(1, (256, 300)), normalize=False)
    assert runs == [2, 1]


def test_an_image_without_its_batch_and_float64_go_through_a_plan_too(runs: list[int]) -> None:
    model = accelerate(filled().double())
    assert_same(model, images()[0].double())
    assert runs


def test_where_float64_is_the_default_it_computes_in_it(runs: list[int]) -> None:
    """As in Lightning's Trainer with precision="64-true"."""
    model = accelerate(filled())
    runs.clear()
    assert_same(model, images())
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(model.double(), images())
    finally:
        torch.set_default_dtype(torch.float32)
    assert runs == [1, 1]


def test_changes_of_weights_statistics_and_quantiles_are_noticed(runs: list[int]) -> None:
    model = accelerate(filled())
    batch = images()
    other = filled()
    fill(other, seed=1)
    model.load_state_dict(other.state_dict())
    assert_same(model, batch)
    # As anomalib sets them while it trains and validates.
    model.mean_std.update({"mean": torch.full((1, CHANNELS, 1, 1), 0.1), "std": torch.full((1, CHANNELS, 1, 1), 2.0)})
    model.quantiles.update({name: torch.tensor(0.5 + index) for index, name in enumerate(model.quantiles)})
    assert_same(model, batch)
    with torch.no_grad():
        model.teacher.conv1.weight *= 0.5
        model.quantiles["qb_st"] += 1.0
    assert_same(model, batch)
    model.student.conv3 = nn.Conv2d(256, 256, 3)
    model.load_state_dict(other.state_dict(), assign=True)
    runs.clear()
    assert_same(model, batch)
    assert runs == [1]


def test_training_undoes_it_and_says_so(runs: list[int]) -> None:
    model = accelerate(filled())
    module = Lightning(model)
    module.train()
    module.eval()  # as Lightning does around predicting
    assert type(model) is not EfficientAdModel
    module.train()
    runs.clear()
    with pytest.warns(UserWarning, match="in train mode.*call efficientad_fast.accelerate again"):
        losses = model(images(), images())
    assert len(losses) == 3 and losses[0].requires_grad
    assert type(model) is EfficientAdModel and "_efficientad_fast" not in model.__dict__
    sum(losses).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    module.eval()(images())
    assert not runs
    accelerate(model)
    assert_same(model, images())
    assert runs


def test_gradients_hooks_and_autocast_run_the_model_itself(runs: list[int]) -> None:
    model = accelerate(filled())
    runs.clear()
    batch = images().requires_grad_()
    model(batch).pred_score.sum().backward()
    assert batch.grad is not None and batch.grad.abs().sum() > 0
    seen: list[Any] = []
    handle = model.teacher.conv1.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(NotPackedWarning, match="hooks"):
        model(images())
    model(images())  # told once
    assert len(seen) == 2
    handle.remove()
    with pytest.warns(NotPackedWarning, match="autocast"), torch.autocast("cpu"):
        model(images())
    assert not runs
    assert_same(model, images())
    assert runs


def test_equal_quantiles_are_divided_by_as_anomalib_does(runs: list[int]) -> None:
    model = accelerate(filled())
    model.quantiles.update({"qa_st": torch.tensor(1.0), "qb_st": torch.tensor(1.0)})
    with pytest.warns(NotPackedWarning, match="quantiles are equal"):
        found = model(images())
    assert not found.anomaly_map.isfinite().all()


def test_copies_and_pickles_are_plain(runs: list[int]) -> None:
    model = accelerate(filled())
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is EfficientAdModel and "_efficientad_fast" not in other.__dict__
        assert_close(other.teacher.conv1.weight, model.teacher.conv1.weight, EXACT)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is EfficientAdModel
    assert type(model) is not EfficientAdModel


def test_a_traced_model_is_its_own_forward() -> None:
    model = accelerate(filled())
    plain = copy.deepcopy(model)

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: Tensor) -> Tensor:
            return self.inner(batch).anomaly_map

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Maps(), images(), check_trace=False)
        assert_close(traced(images()), plain(images()).anomaly_map, tolerance("map", torch.float32))


def test_accelerating_twice_is_accelerating_once() -> None:
    model = accelerate(filled())
    kind = type(model)
    assert type(accelerate(model)) is kind
    assert type(accelerate(filled())) is kind
    assert_same(model, images())


def test_what_is_no_such_model_is_refused_and_left_as_it_is() -> None:
    for other in (pdn_small(6), Lightning(nn.Linear(2, 2)), object()):
        with pytest.raises(InputError, match="anomalib's EfficientAd"):
            accelerate(other)  # type: ignore[type-var]
    model = filled()
    model.teacher.conv3 = nn.Conv2d(256, 256, 3, dilation=2)
    with pytest.raises(InputError, match="not built as anomalib builds"):
        accelerate(model)
    assert type(model) is EfficientAdModel

    class Changed(EfficientAdModel):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            found = super().forward(*arguments, **named)
            return found._replace(anomaly_map=2 * found.anomaly_map)

    other = Changed(CHANNELS)
    fill(other)
    modes = [module.training for module in other.modules()]
    with pytest.raises(BackendError, match="computes something else"):
        accelerate(other)
    assert type(other) is Changed and [module.training for module in other.modules()] == modes


@pytest.mark.gpu
def test_on_a_gpu_it_computes_in_float16_and_follows_the_model_there(runs: list[int]) -> None:
    model = EfficientAdModel(8).eval()
    fill(model)
    accelerate(model).cuda()  # as Lightning moves it, after the fact
    plain = copy.deepcopy(model)
    batch = images(2).cuda()
    runs.clear()
    with torch.inference_mode():
        found, expected = model(batch, normalize=False), plain(batch, normalize=False)
    assert runs == [2] and found.anomaly_map.is_cuda and found.anomaly_map.dtype == torch.float32
    assert_close(found.anomaly_map, expected.anomaly_map, tolerance("mixed map", torch.float16))
    exact = accelerate(copy.deepcopy(model), dtype="float32")
    with torch.inference_mode():
        # cuDNN's default for float32 is TF32, which has the mantissa of float16.
        assert_close(exact(batch).pred_score, plain(batch).pred_score, tolerance("mixed map", torch.float16))


def test_a_model_is_let_go_with_what_was_packed_of_it() -> None:
    model = accelerate(filled())
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None and not dropin._entries
