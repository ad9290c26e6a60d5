"""The catalogue's CUDA C++ kernels on CPU tensors, by the emulator: a function per overload, with its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import simt_build
import torch
from torch import Tensor

from efficientad_fast.ops import anomaly_map as anomaly_map_operator
from efficientad_fast.ops import autoencoder as autoencoder_operator
from efficientad_fast.ops import conv_pool as conv_pool_operator
from efficientad_fast.ops import feature_distance as feature_distance_operator
from efficientad_fast.ops import hard_feature_loss as loss_operator
from efficientad_fast.ops import packing
from efficientad_fast.ops import preprocess as preprocess_operator
from efficientad_fast.ops import quantile as quantile_operator
from efficientad_fast.reference.losses import HARD_FRACTION
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD


def anomaly_map(
    map_st: Tensor, map_ae: Tensor, size: Sequence[int], quantiles: Sequence[float] | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    out, score = anomaly_map_operator.fake(map_st, map_ae, size, quantiles, **options)
    anomaly_map_out(map_st, map_ae, quantiles, **options, anomaly_map=out, score=score)
    return out, score


def anomaly_map_out(
    map_st: Tensor,
    map_ae: Tensor,
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
    anomaly_map: Tensor,
    score: Tensor,
) -> None:
    anomaly_map_operator.fake_out(
        map_st, map_ae, quantiles, border=border, convention=convention, anomaly_map=anomaly_map, score=score
    )
    coefficients = _coefficients(quantiles, convention)
    _kernels().anomaly_map(_array(map_st), _array(map_ae), coefficients, border, _array(anomaly_map), _array(score))


def anomaly_map_drop_in(
    map_st: Tensor, map_ae: Tensor, st_quantiles: Tensor | None = None, ae_quantiles: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    results = anomaly_map_operator.fake_drop_in(map_st, map_ae, st_quantiles, ae_quantiles)
    combined, *normalised = (one.contiguous() for one in results)
    maps = [one.contiguous() for one in (map_st, map_ae)]
    quantiles = [None if one is None else _array(one) for one in (st_quantiles, ae_quantiles)]
    _kernels().drop_in(list(map(_array, maps)), quantiles, list(map(_array, [*normalised, combined])))
    return combined, normalised[0], normalised[1]


def hard_feature_loss(
    teacher: Tensor, student: Tensor, fraction: float = HARD_FRACTION
) -> tuple[Tensor, Tensor, Tensor]:
    loss, threshold, count = loss_operator.fake(teacher, student, fraction)
    results = {"loss": loss, "threshold": threshold, "count": count}
    workspace = torch.empty(loss_operator.WORKSPACE, dtype=torch.int64)
    hard_feature_loss_out(teacher, student, fraction, **results, workspace=workspace)
    return loss, threshold, count


def hard_feature_loss_out(
    teacher: Tensor,
    student: Tensor,
    fraction: float = HARD_FRACTION,
    *,
    loss: Tensor,
    threshold: Tensor,
    count: Tensor,
    workspace: Tensor,
) -> None:
    loss_operator.fake_out(teacher, student, fraction, loss=loss, threshold=threshold, count=count, workspace=workspace)
    features, results = in_rows(teacher, student), (loss, threshold, count, workspace)
    _kernels().hard_feature_loss(*map(_array, features), fraction, *map(_array, results))


def hard_feature_loss_gradient(
    teacher: Tensor, student: Tensor, threshold: Tensor, count: Tensor, grad_loss: Tensor
) -> Tensor:
    gradient = loss_operator.fake_gradient(teacher, student, threshold, count, grad_loss)
    features = in_rows(teacher, student)
    _kernels().loss_gradient(*map(_array, (*features, threshold, count, grad_loss, gradient)))
    return gradient


def preprocess(
    image: Tensor,
    size: Sequence[int],
    *,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    out = preprocess_operator.fake(image, size, channels_last=channels_last, dtype=dtype, **options)
    preprocess_out(image, **options, out=out)
    return out


def preprocess_out(
    image: Tensor,
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor,
) -> None:
    preprocess_operator.fake_out(image, resize=resize, mean=mean, std=std, out=out)
    pixel_stride = preprocess_operator.pixel_stride(out)
    _kernels().preprocess(_array(image), resize == "pillow", list(mean), list(std), pixel_stride, _array(out))


def quantile(values: Tensor, fractions: Sequence[float]) -> Tensor:
    out = quantile_operator.fake(values, fractions)
    workspace = torch.empty(quantile_operator.WORKSPACE, dtype=torch.int64)
    quantile_out(values, fractions, out=out, workspace=workspace)
    return out


def quantile_out(values: Tensor, fractions: Sequence[float], *, out: Tensor, workspace: Tensor) -> None:
    quantile_operator.fake_out(values, fractions, out=out, workspace=workspace)
    dense = values.contiguous()
    _kernels().quantile(_array(dense), list(fractions), _array(out), _array(workspace))


def quantile_count(values: Tensor, prefixes: Sequence[int], *, counts: Tensor) -> None:
    quantile_operator.fake_count(values, prefixes, counts=counts)
    dense = values.contiguous()
    _kernels().quantile_count(_array(dense), list(prefixes), _array(counts))


def autoencoder_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    autoencoder_operator.fake_mixed(image, weights, biases, out=out, workspace=workspace)
    if image.shape[0] == 0:
        return
    read = packing.mixed(image)
    placed = [one.contiguous(memory_format=torch.channels_last) for one in weights]
    added = [one.contiguous() for one in biases]
    arrays = [list(map(_array, given)) for given in (placed, added)]
    _kernels().autoencoder(_array(read), *arrays, _array(out), _array(workspace))


def conv_pool(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    out = conv_pool_operator.fake(input, weight, bias, **options)
    conv_pool_mixed(input, weight, None, bias, **options, out=out)
    return out


def conv_pool_mixed(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
) -> None:
    conv_pool_operator.check_mixed(input, weight, scale, bias, padding, pool, pool_padding, groups, out)
    images, weights = packing.mixed(input), weight.contiguous(memory_format=torch.channels_last)
    given = (_array(images), _array(weights), _optional_array(scale), _optional_array(bias))
    gpu = (_multiprocessors, _shared_of_block)
    _kernels().conv_pool(*given, padding, relu, pool, pool_padding, groups, _array(out), *gpu)


def feature_distance(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    bias: Tensor | None = None,
    **paddings: int,
) -> Tensor:
    out = feature_distance_operator.fake(first, weight_first, second, weight_second, bias, **paddings)
    images, _, height, width = out.shape
    numbers = feature_distance_operator.mixed_workspace_size(images, height, width, weight_first.shape[0])
    given = (first, weight_first, second, weight_second, None, bias)
    feature_distance_mixed(*given, **paddings, out=out, workspace=torch.zeros(numbers))
    return out


def feature_distance_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    given = (first, weight_first, second, weight_second, scale, bias)
    paddings = (padding_first, padding_second)
    feature_distance_operator.check_mixed(*given, *paddings, out, workspace)
    images = [packing.mixed(one) for one in (first, second) if one is not None]
    weights = [
        one.contiguous(memory_format=torch.channels_last) for one in (weight_first, weight_second) if one is not None
    ]
    arrays = [list(map(_array, operands)) for operands in (images, weights)]
    statistics = (_optional_array(scale), _optional_array(bias))
    gpu = (_multiprocessors, _shared_of_block)
    _kernels().feature_distance(*arrays, *statistics, paddings, _array(out), _array(workspace), *gpu)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "anomaly_map": anomaly_map,
    "anomaly_map.out": anomaly_map_out,
    "anomaly_map.drop_in": anomaly_map_drop_in,
    "hard_feature_loss": hard_feature_loss,
    "hard_feature_loss.out": hard_feature_loss_out,
    "hard_feature_loss.gradient": hard_feature_loss_gradient,
    "conv_pool": conv_pool,
    "conv_pool.mixed": conv_pool_mixed,
    "feature_distance": feature_distance,
    "feature_distance.mixed": feature_distance_mixed,
    "preprocess": preprocess,
    "preprocess.out": preprocess_out,
    "autoencoder.mixed": autoencoder_mixed,
    "quantile": quantile,
    "quantile.out": quantile_out,
    "quantile.count": quantile_count,
}
"""By the overload's name, as a schema has it."""


def in_rows(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """In the order of the gradient's memory, and copied as far as they have no rows in common."""
    if loss_operator.has_channels_innermost(student):
        teacher, student = teacher.permute(0, 2, 3, 1), student.permute(0, 2, 3, 1)
    copied = teacher.contiguous(), student.contiguous()
    tried = [(teacher, student), (copied[0], student), (teacher, copied[1]), copied]
    return next(both for both in tried if _kernels().have_rows(*map(_array, both)))


_multiprocessors = 0
_shared_of_block = 227 * 1024


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Of the GPU that is emulated: convolutions work in small tiles where large ones are fewer than one for each."""
    global _multiprocessors
    before, _multiprocessors = _multiprocessors, count
    try:
        yield
    finally:
        _multiprocessors = before


@contextlib.contextmanager
def shared_of_block(size: int) -> Iterator[None]:
    """Bytes of shared memory that a block of that GPU may have at most."""
    global _shared_of_block
    before, _shared_of_block = _shared_of_block, size
    try:
        yield
    finally:
        _shared_of_block = before


@contextlib.contextmanager
def shuffled(order: int) -> Iterator[None]:
    """Blocks, two at a time, and threads run in another order than that of their indices, one for every ``order``."""
    _kernels().configure(threads=2, order=order)
    try:
        yield
    finally:
        _kernels().configure(threads=1, order=0)


def unguarded_shared_variables() -> list[str]:
    """Those past which an access would not be noticed."""
    found: list[str] = _kernels().unguarded_shared_variables()
    return found


def _kernels() -> Any:
    return simt_build.load("operators", simt_build.SIMT / "operators.cpp")


def _coefficients(quantiles: Sequence[float] | None, convention: str) -> list[float]:
    """Factors of map_st and map_ae, and what is added before and after padding and resizing; csrc/anomaly_map.h."""
    if quantiles is None:
        return [0.5, 0.5, 0.0, 0.0]
    st_start, st_end, ae_start, ae_end = quantiles
    st, ae = 0.05 / (st_end - st_start), 0.05 / (ae_end - ae_start)
    offset = -(st * st_start + ae * ae_start)
    return [st, ae, offset, 0.0] if convention == "native" else [st, ae, 0.0, offset]


def _optional_array(tensor: Tensor | None) -> Any:
    return None if tensor is None else _array(tensor.contiguous())


def _array(tensor: Tensor) -> Any:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _kernels().Array(tensor.data_ptr(), dtype, list(tensor.shape), list(tensor.stride()))
