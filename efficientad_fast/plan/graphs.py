"""Who may use a plan's buffers when, CUDA graphs of what is run from them, and copies beside computing.

A plan on a GPU has one set of buffers for each shape of batch. A thread that runs a batch has its turn: it enqueues
everything that reads or writes buffers, on the stream that is current for it, behind the work of whoever was before it.
Nothing waits for the GPU, and since turns follow each other, all graphs can share one pool of memory.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficientad_fast.plan.base import Step

BESIDE = ("autoencoder",)
"""Layers that read the image alone: they may run beside the others."""

JOINED = ("map_ae",)
"""Layers that read what those wrote."""


class Launches(NamedTuple):
    """What is run for a batch that is in its buffers.

    Attributes:
        first: before all else, such as preprocessing.
        last: behind all else, such as copying results to the host.
        side_first: whether what may run beside is what the others wait for in the end: multiprocessors are its own
            first. Where it is done before them anyway, it would only be in their way.
    """

    first: Callable[[], None] | None
    steps: Sequence[Step]
    last: Callable[[], None] | None = None
    side_first: bool = False

    def one_by_one(self) -> None:
        if self.first is not None:
            self.first()
        for step in self.steps:
            step.run()
        if self.last is not None:
            self.last()

    def forked(self, cuda: Any, main: Any, side: Any) -> None:
        """On stream ``main``, which is the current one, what may run beside on ``side``, and both joined."""
        if self.first is not None:
            self.first()
        side.wait_stream(main)
        with cuda.stream(side):
            for step in self.steps:
                if step.layer in BESIDE:
                    step.run()
        joined = False
        for step in self.steps:
            if step.layer in BESIDE:
                continue
            if step.layer in JOINED and not joined:
                main.wait_stream(side)
                joined = True
            step.run()
        # A capture ends with an error where a stream was not joined.
        if not joined:
            main.wait_stream(side)
        if self.last is not None:
            self.last()


class Work:
    """What is known of something that is run again and again for one shape of batch.

    Args:
        has_run: whether the same kernels were launched before, so that none is to be compiled.
    """

    def __init__(self, *, has_run: bool = False) -> None:
        self.launches: Launches | None = None
        self.graph: Any = None
        self.has_run = has_run


class Turns:
    """Where there are no graphs: one thread at a time, and activations that stay."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the buffers are this thread's."""
        with self._lock:
            yield

    def run(self, work: Work, make: Callable[[], Launches]) -> None:
        """In a turn.

        Args:
            make: binds the work to buffers. Activations are made there, so that those of a graph come from the graphs'
                pool.
        """
        if work.launches is None:
            work.launches = make()
        work.launches.one_by_one()

    def is_captured_by_caller(self) -> bool:
        """Whether what is launched now becomes part of a graph of somebody else's."""
        return False

    def settle(self) -> None:
        """Waits until no buffer is used any more."""


_capturing = threading.Lock()
"""One capture at a time in this process."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, no cycles are collected: a graph among them, whoever's, cannot be let go by a thread that captures, and
    trying to ends the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphTurns(Turns):
    """Turns on a GPU, with a CUDA graph for each work from the second time on.

    The first time it is launched kernel by kernel, which compiles what is to be compiled: that cannot be captured. So
    is it while something else is captured, and for ever where capturing has failed, which is told once.

    Args:
        cuda: in place of `torch.cuda`, for tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        super().__init__()
        self._device = device
        self._cuda = cuda
        self._last: Any = None  # stream that has the last work on the buffers
        self._behind = cuda.Event()  # that work
        self._main: Any = None
        self._sides: dict[bool, Any] = {}  # by whether it goes first
        self._pool: Any = None
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._works = True

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, self._cuda.device(self._device):
            current = self._cuda.current_stream(self._device)
            if self._last is not None and self._last != current:
                current.wait_event(self._behind)
            try:
                yield
            finally:
                self._behind.record(current)
                self._last = current

    def run(self, work: Work, make: Callable[[], Launches]) -> None:
        if work.graph is None and work.has_run and self._works:
            work.graph = self._captured(make)
        if work.graph is not None:
            work.graph.replay()
            return
        make().one_by_one()
        work.has_run = True

    def is_captured_by_caller(self) -> bool:
        with self._cuda.device(self._device):
            return bool(self._cuda.is_current_stream_capturing())

    def settle(self) -> None:
        if self._last is not None:
            self._behind.synchronize()

    def _captured(self, make: Callable[[], Launches]) -> Any:
        """A graph of them, or None where there can be none, now or ever."""
        if not _capturing.acquire(blocking=False):
            return None
        try:
            return self._capture(make)
        except RuntimeError as error:
            self._works = False
            warnings.warn(
                f"The GPU plan launches its kernels one by one, which takes longer at small batches: capturing them in "
                f"a CUDA graph failed ({error}).",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        finally:
            _capturing.release()

    def _side(self, first: bool) -> Any:
        if first not in self._sides:
            # CUDA's lower numbers go first.
            self._sides[first] = self._cuda.Stream(self._device, priority=-1 if first else 0)
        return self._sides[first]

    def _capture(self, make: Callable[[], Launches]) -> Any:
        cuda = self._cuda
        if self._main is None:
            self._main = cuda.Stream(self._device)
        main = self._main
        if not self._alive:
            # A pool that no graph uses any more cannot be used again.
            self._pool = cuda.graph_pool_handle()
        current = cuda.current_stream(self._device)
        graph = cuda.CUDAGraph()
        main.wait_stream(current)
        with cuda.stream(main), _uncollected():
            # torch.cuda.graph would wait for the whole GPU, which is an error while another thread captures. What other
            # threads do, such as allocating, does not disturb a capture in this mode.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launches = make()
                launches.forked(cuda, main, self._side(launches.side_first))
            finally:
                graph.capture_end()
        current.wait_stream(main)
        self._alive.add(graph)
        return graph


class Stage:
    """Host memory for a batch and its results, which a graph copies from and to, beside everything between.

    For small batches: the copies wait for the networks' turn, but nothing of them is asked for one by one.

    Args:
        pixels: on the device, of which the stage's are copied to.
        outcome: on the device, which is copied to the stage's.
    """

    def __init__(self, pixels: Tensor, outcome: Tensor, work: Work, cuda: Any) -> None:
        self.work = work
        self._device = (pixels, outcome)
        pins = pixels.is_cuda
        self._pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=pins)
        self._outcome = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=pins)
        self._done = cuda.Event()

    def fill(self, images: Sequence[Tensor]) -> None:
        """With ``(3, h, w)`` each, once nothing reads those of before."""
        self._done.synchronize()
        _stack(images, self._pixels)

    def copy_in(self) -> None:
        self._device[0].copy_(self._pixels, non_blocking=True)

    def copy_out(self) -> None:
        self._outcome.copy_(self._device[1], non_blocking=True)

    def launched(self) -> None:
        """What copies, and all before it, is behind on the current stream."""
        self._done.record()

    def results(self) -> Tensor:
        """Waits for them. They are overwritten when the stage is used again."""
        self._done.synchronize()
        return self._outcome


class Stages:
    """A few of one shape, each lent to one batch at a time. Those used last are lent first."""

    def __init__(self) -> None:
        self._free: deque[Stage] = deque()
        self._made = 0

    def lend(self, make: Callable[[], Stage]) -> Loan | None:
        """In a turn. None where all are lent."""
        try:
            stage = self._free.pop()
        except IndexError:
            if self._made == _STAGES:
                return None
            stage = make()
            self._made += 1
        return Loan(stage, self._free)


_STAGES = 2
"""One that is computed, and one that is filled meanwhile."""


class Loan:
    """A stage until this is dropped."""

    def __init__(self, stage: Stage, free: deque[Stage]) -> None:
        self.stage = stage
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.stage)


def _stack(images: Sequence[Tensor], pixels: Tensor) -> None:
    """``(3, h, w)`` each to ``(N, h, w, 3)``."""
    for image, target in zip(images, pixels, strict=True):
        target.copy_(image.movedim(0, -1))


class Transfers:
    """Copies between pinned memory and a GPU, on streams of their own.

    Memory comes from PyTorch's caches, which hand out pinned memory again only after its last copy is done: while one
    batch is computed, the next one is copied from other memory, and with two batches under way two are in use.

    Args:
        cuda: in place of `torch.cuda`, for tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._pins = device.type == "cuda"
        self._to_device = cuda.Stream(device)
        self._to_host = cuda.Stream(device)

    def stage(self, pixels: Tensor, outcome: Tensor, work: Work) -> Stage:
        return Stage(pixels, outcome, work, self._cuda)

    def to_device(self, images: Sequence[Tensor]) -> Tensor:
        """``(3, h, w)`` of one shape and dtype to ``(N, h, w, 3)`` on the device, for the current stream.

        Host images may be changed once this returns.
        """
        if images[0].device.type != "cpu":
            return torch.stack([one.movedim(0, -1).to(self._device) for one in images])
        shape = (len(images), *images[0].shape[1:], 3)
        pinned = torch.empty(shape, dtype=images[0].dtype, pin_memory=self._pins)
        _stack(images, pinned)
        current = self._cuda.current_stream(self._device)
        with self._cuda.stream(self._to_device):
            moved = pinned.to(self._device, non_blocking=True)
        current.wait_stream(self._to_device)
        if moved.is_cuda:
            moved.record_stream(current)
        return moved

    def to_host(self, results: Tensor) -> Callable[[], Tensor]:
        """What waits for ``results`` of the current stream and gives them, in pinned memory."""
        self._to_host.wait_stream(self._cuda.current_stream(self._device))
        arrived = self._cuda.Event()
        with self._cuda.stream(self._to_host):
            host = torch.empty(results.shape, dtype=results.dtype, pin_memory=self._pins)
            host.copy_(results, non_blocking=True)
            arrived.record(self._to_host)
        if results.is_cuda:
            results.record_stream(self._to_host)

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait
