"""The plan of a GPU: float16, bfloat16 or float8, by operators in mixed precision."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.errors import InputError
from efficientad_fast.ops import autoencoder, packing
from efficientad_fast.ops.feature_distance import mixed_workspace_size
from efficientad_fast.plan.base import (
    ImagePreprocessing,
    Pending,
    Plan,
    PlanInput,
    Results,
    Step,
    check_batch,
)
from efficientad_fast.plan.folding import (
    Convolution,
    Distance,
    Parameters,
    Refolded,
    Scales,
    channels_last,
    fold,
    hidden_layers,
    link,
    ordinary_tensors,
)
from efficientad_fast.plan.graphs import GraphTurns, Launches, Stage, Stages, Transfers, Turns, Work
from efficientad_fast.reference.networks import feature_size

MIXED_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)

OPERATORS = ("conv_pool.mixed", "feature_distance.mixed", "autoencoder.mixed", "anomaly_map.out", "preprocess.out")
"""That the plan is made of."""

IMAGE_CHANNELS = 4
"""A fourth of zeros: a pixel in 16 bits is 8 bytes, which a GPU loads at once."""

MARGIN = 2.0
"""How much larger than the largest calibrated one an activation may be in float8.

It costs nothing: a floating format is as precise one binade lower, down to where its numbers end.
"""

LARGEST_WEIGHT = 2.0**15
"""Of the autoencoder in float8: half of float16's largest number."""

_KEPT = 6
"""Shapes and forms of batches whose buffers and graphs a plan keeps."""

_FORMS_REMEMBERED = 16

_MOST_STAGED = 2**20
"""Bytes of images and results for which copies are part of the graph. Copying more takes so long that it is better done
beside the networks."""

_Taken = TypeVar("_Taken")


class _Form(NamedTuple):
    """Of images that are preprocessed on the device, as part of the graph."""

    height: int
    width: int
    dtype: torch.dtype
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Key(NamedTuple):
    """Of what is captured.

    Attributes:
        given: whether map_st is folded with statistics given to the call.
        form: None for what comes preprocessed.
    """

    images: int
    height: int
    width: int
    given: bool
    form: _Form | None


@dataclass(frozen=True)
class _Buffers:
    """What stays from batch to batch: inputs, results, and a workspace whose zeros are handed on.

    Attributes:
        image: ``(N, 4, H, W)``, channels-last, the fourth of zeros.
        pixels: ``(N, h, w, 3)``: what it reads where it is part of the graph.
        raw: ``(2, N, 1, h, w)``: map_st and map_ae.
        outcome: N scores, then N maps of the network's size, or None where the convention scores elsewhere.
    """

    image: Tensor
    pixels: Tensor | None
    raw: Tensor
    workspace: Tensor
    outcome: Tensor | None

    @property
    def rgb(self) -> Tensor:
        return self.image[:, :3]

    @property
    def score(self) -> Tensor:
        assert self.outcome is not None
        return self.outcome[: len(self.image)]

    @property
    def anomaly_map(self) -> Tensor:
        assert self.outcome is not None
        images, _, height, width = self.image.shape
        return self.outcome[images:].view(images, 1, height, width)


@dataclass(frozen=True)
class _Narrow:
    """A convolution's weights in the plan's dtype, channels-last, and the factors that undo their scaling."""

    weights: list[Tensor]
    scale: Tensor | None
    bias: Tensor


@dataclass(frozen=True)
class _Entry:
    buffers: _Buffers
    work: Work
    stages: Stages


class MixedPlan(Plan):
    """The networks as operators in mixed precision: weights folded and narrowed once, and a CUDA graph for each batch.

    `efficientad_fast.plan.folding` says what becomes of the networks. Products are of ``dtype``, sums in float32; the
    raw maps are float32. In float8 (e4m3) the image and the autoencoder stay in float16, and activations are divided by
    a scale for each channel, with which the weights that read them are multiplied: twice the largest activation over
    calibration images becomes 448, the largest number there is. Each output's weights are scaled by a power of two so
    that the largest is between 224 and 448, which is undone on the sums: it loses nothing, and makes float16 safe from
    statistics that divide by little.

    On a GPU `efficientad_fast.plan.graphs` runs it; on a CPU the operators' references do, in float32 on rounded
    numbers, which is slow and tells what the precision costs; on the meta device its steps can be counted.

    Args:
        source: networks of the classes in `efficientad_fast.reference.networks`; in float8 with ``activations``.
        namespace: of the operators, for tests.
        cuda: in place of `torch.cuda`, for tests.

    Raises:
        InputError: float8 without activations, or with others than the networks have.
    """

    def __init__(
        self,
        source: PlanInput,
        device: torch.device,
        dtype: torch.dtype,
        *,
        namespace: str = ops.NAMESPACE,
        cuda: Any = None,
    ) -> None:
        super().__init__(source, device, dtype)
        if dtype not in MIXED_DTYPES:
            raise InputError(f"A plan in mixed precision is in float16, bfloat16 or float8, got {dtype}.")
        ops.load()
        self._namespace = namespace
        self._image_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        on_gpu = device.type == "cuda"
        graphs = cuda is not None or on_gpu
        self._turns = GraphTurns(device, cuda or torch.cuda) if graphs else Turns()
        self._transfers = Transfers(device, cuda or torch.cuda) if graphs else None
        self._is_small = getattr(source.student, "model_size", None) == "s"
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._forms: OrderedDict[tuple[int, _Form], None] = OrderedDict()
        self._forms_lock = threading.Lock()
        # In a turn, so that whoever has the next one finds the weights written.
        with self._turns.turn(), ordinary_tensors():
            folded = fold(source, self._scales(source) if dtype == torch.float8_e4m3fn else None)
            self._padded = folded.padded
            self._stages = {
                layer: [(one.geometry, self._narrow_convolution(one, first=index == 0)) for one in stage]
                for index, (layer, stage) in enumerate(folded.stages.items())
            }
            first, *others = folded.autoencoder
            narrowed = [self._narrow([one], self._image_dtype) for one in (_with_zeros(first), *others)]
            self._autoencoder = [one.weights[0] for one in narrowed]
            self._autoencoder_biases = [one.bias for one in narrowed]
            self._map_ae = self._narrow_distance(folded.map_ae)
            self._map_ae_padding = folded.map_ae.padding
            self._last = folded.last
            self._own = self._narrow_distance(self._last.map_st(source.teacher_mean, source.teacher_std))
        self._given: _Narrow | None = None
        self._refolded: Refolded[None] = Refolded()

    def __del__(self) -> None:
        # Memory that a GPU still works on must not be anybody else's.
        with contextlib.suppress(Exception):
            self._turns.settle()

    @torch.no_grad()
    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        images, height, width = check_batch(batch)
        self._last.check(statistics)

        def take(buffers: _Buffers) -> tuple[Tensor, Tensor]:
            map_st, map_ae = buffers.raw.clone()
            return map_st, map_ae

        return self._predict(_Key(images, height, width, statistics is not None, None), batch, take, statistics)

    @torch.inference_mode()
    def run_images(self, images: Tensor, preprocessing: ImagePreprocessing) -> tuple[Tensor, Tensor]:
        """Scores ``(N,)`` and anomaly maps ``(N, 1, *size)`` on the plan's device, without waiting for them.

        They may share memory, which is copied at once: who keeps scores alone had better clone them.

        Args:
            images: ``(N, h, w, 3)`` RGB, uint8 or float32 in [0, 1], on any device.
            preprocessing: a `Preprocessing`, of the plan's size.

        Raises:
            InputError: a preprocessing of another size.
        """
        self._check_size(preprocessing)
        original_size = (images.shape[1], images.shape[2])

        def take(buffers: _Buffers) -> tuple[Tensor, Tensor]:
            if buffers.outcome is not None:
                outcome = buffers.outcome.clone()
                return outcome[: len(images)], outcome[len(images) :].view(buffers.anomaly_map.shape)
            map_st, map_ae = buffers.raw
            scores, _ = self.scored_maps(map_st, map_ae, self.quantiles, [original_size] * len(images))
            return scores, self.anomaly_map(map_st, map_ae, self.quantiles, self.size)[0]

        form = self._known_form(len(images), original_size, images.dtype, _options(preprocessing))
        return self._predict_images([images.to(self.device)], preprocessing, form, take)

    def _run(self, batch: Tensor, original_sizes: Sequence[tuple[int, int]], original_maps: bool) -> Results:
        if len(batch) == 0:
            return super()._run(batch, original_sizes, original_maps)
        images, height, width = check_batch(batch)
        take = partial(self._take, original_sizes=original_sizes, original_maps=original_maps)
        flat, sizes = self._predict(_Key(images, height, width, False, None), batch, take, None)
        return _parted(flat.cpu(), sizes)

    @torch.inference_mode()
    def submit(
        self, images: Sequence[Tensor], preprocessing: ImagePreprocessing, *, original_maps: bool = False
    ) -> Pending:
        if self._transfers is None or not images:
            return super().submit(images, preprocessing, original_maps=original_maps)
        self._check_size(preprocessing)
        known = [one if one.dtype == torch.uint8 else one.float() for one in images]
        alike = len({(one.shape, one.dtype, one.device.type) for one in known}) == 1
        sizes = [(one.shape[-2], one.shape[-1]) for one in images]
        form = self._known_form(len(known), sizes[0], known[0].dtype, _options(preprocessing)) if alike else None
        if form is not None and not original_maps:
            staged = self._submit_staged(known, form)
            if staged is not None:
                return staged
        moved = [self._transfers.to_device(group) for group in ([known] if alike else [[one] for one in known])]
        take = partial(self._take, original_sizes=sizes, original_maps=original_maps)
        flat, made = self._predict_images(moved, preprocessing, form, take)
        wait = self._transfers.to_host(flat)
        return Pending(lambda: _parted(wait(), made))

    def _submit_staged(self, images: Sequence[Tensor], form: _Form) -> Pending | None:
        """By a graph that copies too, or None where that is for none or there is no stage free."""
        count, (height, width) = len(images), self.size
        copied = count * (images[0].nbytes + 4 * (1 + height * width))
        scored = self.map_convention == "resized"
        on_host = images[0].device.type == "cpu"
        if not scored or not on_host or copied > _MOST_STAGED or self._turns.is_captured_by_caller():
            return None
        key = _Key(count, height, width, False, form)
        with self._turns.turn():
            entry = self._entry(key)
            loan = entry.stages.lend(partial(self._stage, entry))
            if loan is None:
                return None
            stage = loan.stage
            stage.fill(images)
            self._turns.run(stage.work, partial(self._launches, entry.buffers, key, self._own, stage))
            entry.work.has_run = True
            stage.launched()
        return Pending(lambda: _parted(loan.stage.results(), [self.size] * count))

    @contextlib.contextmanager
    def steps(self, batch: Tensor) -> Iterator[list[Step]]:
        """The operators of one prediction, in order, with ``batch`` in buffers of their own.

        For who wants to time or to count them: also of a plan on the meta device, for a batch there.
        """
        images, height, width = check_batch(batch)
        with self._turns.turn(), ordinary_tensors():
            buffers = self._buffers(_Key(images, height, width, False, None))
            _fill(buffers, batch)
            yield self._steps(buffers, self._own)

    def memory(self, batch: Tensor) -> dict[str, int]:
        """Bytes of the ``weights``, and of the ``workspace``: buffers and activations that such a batch takes."""
        with self.steps(batch) as steps:
            kept = {one.data_ptr(): one.nbytes for one in self._parameters()}
            used = {
                one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
                for step in steps
                for one in (*step.run.args, *step.run.keywords.values())
                if isinstance(one, Tensor) and one.data_ptr() not in kept
            }
        return {"weights": sum(kept.values()), "workspace": sum(used.values())}

    @torch.no_grad()
    def observe(self, batch: Tensor) -> dict[str, Tensor]:
        """By layer, the largest activation of each channel in a batch: `PlanInput.activations` of it alone.

        Those of several batches together are the larger of each.

        Args:
            batch: ``(N, 3, H, W)``, preprocessed, with at least one image.

        Raises:
            InputError: an empty batch, or a plan in float8, whose activations are scaled.
        """
        if self.dtype == torch.float8_e4m3fn:
            raise InputError("Activations are observed by a plan in float16 or bfloat16, not in float8.")
        if len(batch) == 0:
            raise InputError("Activations are observed of at least one image, got none.")
        found: dict[str, list[Tensor]] = {}
        with self.steps(batch) as steps:
            for step in steps:
                step.run()
                if step.layer in self._stages or step.layer == "autoencoder":
                    found.setdefault(step.layer, []).append(step.out.float().amax((0, 2, 3)))
        return {layer: torch.cat(parts).cpu() for layer, parts in found.items()}

    @torch.no_grad()
    def reference_maps(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`raw_maps`, by the operators' references: with the same roundings, but for the order of sums."""
        made: dict[str, Tensor] = {}
        with self.steps(batch) as steps:
            for step in steps:
                operator = step.run.func.name().partition("::")[2]  # type: ignore[attr-defined]
                ops.overload(operator).reference(*step.run.args, **step.run.keywords)
                made[step.layer] = step.out.clone()
        return made["map_st"], made["map_ae"]

    # Folding

    def _scales(self, source: PlanInput) -> Scales:
        """For float8, of a layer's activations: those that were observed, with a margin, become 448."""
        given = source.activations
        if given is None:
            if self.device.type != "meta":
                raise InputError(
                    "float8 needs to know how large activations become, and this detector was not calibrated for it. "
                    "Get one that was by detector.calibrated(images, 'float8'), with some tens of good images."
                )
            given = {}
        names, _ = hidden_layers(source.teacher)
        layers = {
            name: [Parameters.of(network, name) for network in (source.teacher, source.student)] for name in names
        }
        layers["autoencoder"] = [Parameters.of(source.autoencoder, "decoder.deconv7")]
        scales: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, convolutions in layers.items():
            counts = [len(one.bias) for one in convolutions]
            largest = torch.zeros(sum(counts)) if self.device.type == "meta" else given.get(layer)
            shape = None if largest is None else tuple(largest.shape)
            if largest is None or shape != (sum(counts),) or not bool((largest.isfinite() & (largest >= 0)).all()):
                raise InputError(
                    f"The activations of {layer} must be {sum(counts)} finite numbers from 0 on, got shape {shape}. "
                    "Calibrate this detector again: detector.calibrated(images, 'float8')."
                )
            scale = MARGIN * largest.to(convolutions[0].bias.device).double() / packing.LARGEST_E4M3
            parts = torch.where(scale == 0, 1, scale).split(counts)
            scales[layer] = (parts[0], parts[-1])
        # Its weights stay in float16 and have no factors, so that a scale must not make them too large for that.
        weight = layers["autoencoder"][0].weight
        least = weight.abs().flatten(1).amax(1) / LARGEST_WEIGHT
        scales["autoencoder"] = (torch.maximum(scales["autoencoder"][0], least),) * 2
        return scales

    def _narrow(self, convolutions: Sequence[Parameters], dtype: torch.dtype, *, scaled: bool = False) -> _Narrow:
        """Of convolutions whose difference is taken, or of one; their outputs share scales."""
        bias = convolutions[0].bias
        for other in convolutions[1:]:
            bias = bias - other.bias
        factor = scale = None
        if scaled:
            largest = torch.stack([one.weight.abs().flatten(1).amax(1) for one in convolutions]).amax(0)
            exponent = (packing.LARGEST_E4M3 / largest).log2().floor().clamp(-100, 100)
            factor = torch.where(largest > 0, exponent, 0).exp2()
            scale = (1 / factor).float().to(self.device)
        weights = []
        for one in convolutions:
            weight = one.weight if factor is None else one.weight * factor[:, None, None, None]
            weights.append(weight.float().to(dtype).contiguous(memory_format=torch.channels_last).to(self.device))
        return _Narrow(weights, scale, bias.float().to(self.device))

    def _narrow_convolution(self, convolution: Convolution, *, first: bool) -> _Narrow:
        parameters = _with_zeros(convolution.parameters) if first else convolution.parameters
        dtype = self._image_dtype if first else self.dtype
        return self._narrow([parameters], dtype, scaled=self.dtype == torch.float8_e4m3fn)

    def _narrow_distance(self, distance: Distance) -> _Narrow:
        # In float16 too: weights over a small deviation may be larger than its numbers.
        return self._narrow([distance.first, distance.second], self.dtype, scaled=True)

    def _refold(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Into the tensors that graphs read."""
        made = self._narrow_distance(self._last.map_st(mean, std))
        if self._given is None:
            self._given = made
            return
        known = self._given
        assert known.scale is not None and made.scale is not None
        for target, value in zip(
            (*known.weights, known.scale, known.bias), (*made.weights, made.scale, made.bias), strict=True
        ):
            target.copy_(value)

    def _parameters(self) -> Iterator[Tensor]:
        narrow = [one for stage in self._stages.values() for _, one in stage]
        narrow += [self._map_ae, self._own, *([] if self._given is None else [self._given])]
        for one in narrow:
            yield from one.weights
            yield one.bias
            if one.scale is not None:
                yield one.scale
        yield from self._autoencoder
        yield from self._autoencoder_biases

    # Running

    def _predict(
        self,
        key: _Key,
        batch: Tensor,
        take: Callable[[_Buffers], _Taken],
        statistics: tuple[Tensor, Tensor] | None,
    ) -> _Taken:
        """What ``take`` makes of the results of a batch; it must copy what it keeps."""
        return self._in_turn(key, lambda buffers: _fill(buffers, batch), take, statistics)

    def _predict_images(
        self,
        images: Sequence[Tensor],
        preprocessing: ImagePreprocessing,
        form: _Form | None,
        take: Callable[[_Buffers], _Taken],
    ) -> _Taken:
        """The same for ``(n, h, w, 3)`` on the device: groups of one size, or one group of that form."""
        first, options = images[0], _options(preprocessing)
        count = sum(map(len, images))

        def fill(buffers: _Buffers) -> None:
            if buffers.pixels is not None:
                buffers.pixels.copy_(first)
                return
            preprocess = self._operator("preprocess.out")
            begin = 0
            for group in images:
                preprocess(group, **options, out=buffers.rgb[begin : begin + len(group)])
                begin += len(group)

        return self._in_turn(_Key(count, *self.size, False, form), fill, take, None)

    def _known_form(
        self, count: int, size: tuple[int, int], dtype: torch.dtype, options: Mapping[str, Any]
    ) -> _Form | None:
        """Of images that came before, else None.

        Sizes that come once would cost a capture each: the graph begins behind the preprocessing for them.
        """
        form = _Form(*size, dtype, **options)
        if _Key(count, *self.size, False, form) in self._entries:
            return form
        with self._forms_lock:
            is_known = (count, form) in self._forms
            self._forms[count, form] = None
            self._forms.move_to_end((count, form))
            while len(self._forms) > _FORMS_REMEMBERED:
                self._forms.popitem(last=False)
        return form if is_known else None

    def _in_turn(
        self,
        key: _Key,
        fill: Callable[[_Buffers], None],
        take: Callable[[_Buffers], _Taken],
        statistics: tuple[Tensor, Tensor] | None,
    ) -> _Taken:
        if self._turns.is_captured_by_caller():
            # Into a graph of the caller's, whose order only they know: with memory of its own, and no events.
            with ordinary_tensors():
                own = statistics is None
                distance = self._own if own else self._narrow_distance(self._last.map_st(*(statistics or ())))
                buffers = self._buffers(key)
            fill(buffers)
            self._launches(buffers, key, distance).one_by_one()
            return take(buffers)
        with self._turns.turn():
            if statistics is not None:
                self._refolded.get(statistics, self._refold)
            entry = self._entry(key)
            fill(entry.buffers)
            folded = self._given if key.given else self._own
            assert folded is not None
            # A graph of nothing cannot be replayed without a warning.
            if key.images > 0:
                # The entry holds no plan, which would hold it.
                self._turns.run(entry.work, partial(self._launches, entry.buffers, key, folded))
            return take(entry.buffers)

    def _entry(self, key: _Key) -> _Entry:
        """In a turn. The buffers for such a batch, of which those used last are kept."""
        entry = self._entries.pop(key, None)
        if entry is None:
            with ordinary_tensors():
                entry = _Entry(self._buffers(key), Work(), Stages())
        self._entries[key] = entry
        if len(self._entries) > _KEPT:
            self._turns.settle()
            self._entries.popitem(last=False)
        return entry

    def _buffers(self, key: _Key) -> _Buffers:
        images, height, width, _, form = key
        features = feature_size((height, width), padding=self._padded)
        make = partial(torch.empty, device=self.device)
        image = channels_last((images, IMAGE_CHANNELS, height, width), self.device, self._image_dtype)
        outputs = len(self._own.bias)
        scored = self.map_convention == "resized" and (height, width) == tuple(self.size)
        return _Buffers(
            image.zero_(),
            None if form is None else make((images, form.height, form.width, 3), dtype=form.dtype),
            make((2, images, 1, *features)),
            make(mixed_workspace_size(images, *features, outputs)).zero_(),
            make(images * (1 + height * width)) if scored else None,
        )

    def _stage(self, entry: _Entry) -> Stage:
        buffers = entry.buffers
        assert self._transfers is not None and buffers.pixels is not None and buffers.outcome is not None
        with ordinary_tensors():
            return self._transfers.stage(buffers.pixels, buffers.outcome, Work(has_run=entry.work.has_run))

    def _launches(self, buffers: _Buffers, key: _Key, distance: _Narrow, stage: Stage | None = None) -> Launches:
        first = None
        form, pixels = key.form, buffers.pixels
        if form is not None and pixels is not None:
            preprocess = self._operator("preprocess.out")

            def first() -> None:
                if stage is not None:
                    stage.copy_in()
                preprocess(pixels, resize=form.resize, mean=form.mean, std=form.std, out=buffers.rgb)

        with ordinary_tensors():
            steps = self._steps(buffers, distance)
        return Launches(
            first,
            steps,
            None if stage is None else stage.copy_out,
            # On an H200 a graph of one image takes 171 us in place of 184 so; one of EfficientAD-M 2 % longer.
            side_first=key.images == 1 and self._is_small,
        )

    def _steps(self, buffers: _Buffers, distance: _Narrow) -> list[Step]:
        """With activations of their own."""
        image = buffers.image
        geometries = {layer: [geometry for geometry, _ in stage] for layer, stage in self._stages.items()}
        links, teacher, student = link(geometries, image, self.dtype)
        steps = []
        for layer, index, read, out in links:
            geometry, narrow = self._stages[layer][index]
            operator = self._operator("conv_pool.mixed")
            [weight], settings = narrow.weights, geometry.settings
            run = partial(operator, read, weight, narrow.scale, narrow.bias, **settings, out=out)
            steps.append(Step(layer, (read,), [weight], settings, out, run))
        map_st, map_ae = buffers.raw
        features = (map_st.shape[2], map_st.shape[3])
        channels = [len(one) for one in self._autoencoder_biases]
        hidden = channels_last((len(image), channels[-1], *features), self.device, self.dtype)
        numbers = autoencoder.mixed_workspace_size(len(image), image.shape[2:], features, channels)
        run = partial(
            self._operator("autoencoder.mixed"),
            image,
            self._autoencoder,
            self._autoencoder_biases,
            out=hidden,
            workspace=image.new_empty(numbers),
        )
        steps.append(Step("autoencoder", (image,), self._autoencoder, {}, hidden, run))
        steps.append(self._distance_step("map_st", teacher, student, distance, 0, map_st, buffers))
        steps.append(
            self._distance_step("map_ae", hidden, student, self._map_ae, self._map_ae_padding, map_ae, buffers)
        )
        if buffers.outcome is not None:
            run = partial(
                self._operator("anomaly_map.out"),
                map_st,
                map_ae,
                None if self.quantiles is None else list(astuple(self.quantiles)),
                border=self._border,
                convention=self.map_convention,
                anomaly_map=buffers.anomaly_map,
                score=buffers.score,
            )
            steps.append(Step("anomaly_map", (map_st, map_ae), [], {"border": self._border}, buffers.anomaly_map, run))
        return steps

    def _distance_step(
        self, layer: str, first: Tensor, second: Tensor, narrow: _Narrow, padding: int, out: Tensor, buffers: _Buffers
    ) -> Step:
        settings = {"padding_first": padding}
        run = partial(
            self._operator("feature_distance.mixed"),
            first,
            narrow.weights[0],
            second,
            narrow.weights[1],
            narrow.scale,
            narrow.bias,
            **settings,
            out=out,
            workspace=buffers.workspace,
        )
        return Step(layer, (first, second), narrow.weights, settings, out, run)

    def _operator(self, name: str) -> Callable[..., None]:
        return ops.resolve(self._namespace, name)

    def _take(
        self, buffers: _Buffers, *, original_sizes: Sequence[tuple[int, int]], original_maps: bool
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Scores, then maps, one behind the other in a new tensor, and the maps' sizes."""
        if buffers.outcome is not None and not original_maps:
            return buffers.outcome.clone(), [self.size] * len(buffers.image)
        if buffers.outcome is not None:
            scores, scored = buffers.score, list(buffers.anomaly_map.split(1))
        else:
            map_st, map_ae = buffers.raw
            scores, scored = self.scored_maps(map_st, map_ae, self.quantiles, original_sizes)
        sized = self._sized(buffers.raw[0], buffers.raw[1], scored, original_sizes, original_maps)
        flat = torch.cat([scores, *(one.flatten() for one in sized)])
        return flat, [(one.shape[2], one.shape[3]) for one in sized]


def _with_zeros(parameters: Parameters) -> Parameters:
    """For an image with a fourth channel."""
    missing = IMAGE_CHANNELS - parameters.weight.shape[1]
    return Parameters(torch.nn.functional.pad(parameters.weight, (0, 0, 0, 0, 0, missing)), parameters.bias)


def _fill(buffers: _Buffers, batch: Tensor) -> None:
    buffers.rgb.copy_(batch)


def _options(preprocessing: ImagePreprocessing) -> dict[str, Any]:
    return {
        "resize": preprocessing.resize,
        "mean": tuple(preprocessing.mean),
        "std": tuple(preprocessing.std),
    }


def _parted(flat: Tensor, sizes: Sequence[tuple[int, int]]) -> Results:
    """What :meth:`MixedPlan._take` put together, each map in memory of its own."""
    scores, *parts = flat.split([len(sizes), *(height * width for height, width in sizes)])
    return scores.clone(), [part.view(size).clone() for part, size in zip(parts, sizes, strict=True)]
