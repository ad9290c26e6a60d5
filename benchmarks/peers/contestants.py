"""Who is compared, and how each is set up.

A contestant is a function from a `Task` to one that runs the batch and returns both maps. Frameworks are imported there
alone: a process pays for its own. Each rival has the best of the settings tried, and what did not help is said beside
them. Nor did a teacher normalised by its weights, or the older ONNX exporter.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import INPUT, OUTPUTS

if TYPE_CHECKING:
    from torch import Tensor, nn

Maps = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[], Maps]
Precision = Literal["float32", "int8"]

OURS = "efficientad_fast"


@dataclass(frozen=True)
class Task:
    """What a contestant's process is given.

    Attributes:
        batch: ``.npy``, float32 ``(N, 3, H, W)``, preprocessed.
        calibration: ``.npy``, float32 ``(count, 3, H, W)``, for quantisation; there where somebody quantises.
        onnx: both maps from the batch, every shape fixed; there where somebody needs it.
        outputs: ``.npz`` that the process writes its maps to.
        folder: an empty one, for whatever is compiled or converted.
        warm_up_seconds: how long it runs untimed, at most, before its first turn.
    """

    contestant: str
    detector: str
    batch: str
    calibration: str
    onnx: str
    outputs: str
    folder: str
    threads: int
    warm_up_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        modules: imported before its setup is timed.
        needs_onnx: whether it reads `Task.onnx`.
    """

    name: str
    prepare: Callable[[Task], Run]
    modules: tuple[str, ...] = ("torch", "efficientad_fast.detector")
    precision: Precision = "float32"
    needs_onnx: bool = False

    def missing(self) -> list[str]:
        """What it needs and is not installed, exporting included."""
        needed = (*self.modules, *(("onnx", "onnxscript") if self.needs_onnx else ()))
        return [module for module in needed if importlib.util.find_spec(module) is None]

    @property
    def settings(self) -> str:
        """The first paragraph of what its function says of itself."""
        return " ".join((self.prepare.__doc__ or "").partition("\n\n")[0].split())


def _this_package(task: Task) -> Run:
    """The plan that `build_plan` chooses for the CPU and float32."""
    import torch

    from efficientad_fast.detector import Detector
    from efficientad_fast.plan import build_plan

    batch = _torch_batch(task)
    source = Detector.load(task.detector).plan_input((batch.shape[2], batch.shape[3]))
    plan = build_plan(source, torch.device("cpu"), torch.float32)
    return _inferring(lambda: plan.raw_maps(batch))


def _eager(task: Task) -> Run:
    """PyTorch as it is, in inference mode, NCHW."""
    network, batch = _raw_maps_network(task), _torch_batch(task)
    return _inferring(lambda: network(batch))


def _eager_channels_last(task: Task) -> Run:
    """PyTorch, in inference mode; weights and batch in channels-last layout, converting the batch included."""
    import torch

    network, batch = _raw_maps_network(task), _torch_batch(task)
    network = network.to(memory_format=torch.channels_last)
    return _inferring(lambda: network(batch.contiguous(memory_format=torch.channels_last)))


def _compiled(task: Task) -> Run:
    """torch.compile by inductor, freezing, static shapes; NCHW given, inductor lays out convolutions as it likes.

    Channels-last weights and batch, max_autotune and cpp_wrapper were no faster.
    """
    import torch

    network, batch = _raw_maps_network(task), _torch_batch(task)
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})
    return _inferring(lambda: compiled(batch))


def _onnxruntime(task: Task) -> Run:
    """All graph optimisations, bound inputs and outputs; threads spin while it runs and not afterwards.

    It was as fast as spinning always, and as never spinning.
    """
    return _onnxruntime_session(task, task.onnx)


def _openvino(task: Task) -> Run:
    """Latency hint, float32 for inference, one request with its own tensors filled beforehand.

    Converting from PyTorch in place of ONNX, and threads that are not pinned, were no faster.
    """
    import openvino

    return _openvino_request(task, openvino.Core().read_model(task.onnx))


def _onnxruntime_int8(task: Task) -> Run:
    """Static QDQ quantisation: int8 weights per channel, uint8 activations by their extremes; else as in float32."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _calibration_batches(task)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    simplified, quantised = (str(Path(task.folder) / name) for name in ("simplified.onnx", "int8.onnx"))
    quant_pre_process(task.onnx, simplified)
    quantize_static(
        simplified,
        quantised,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return _onnxruntime_session(task, quantised)


def _openvino_int8(task: Task) -> Run:
    """nncf's post-training quantisation for CPUs; else as in float32."""
    import nncf
    import openvino

    model = openvino.Core().read_model(task.onnx)
    batches = list(_calibration_batches(task))
    quantised = nncf.quantize(
        model, nncf.Dataset(batches), target_device=nncf.TargetDevice.CPU, subset_size=len(batches)
    )
    return _openvino_request(task, quantised)


CONTESTANTS = {
    one.name: one
    for one in (
        Contestant(OURS, _this_package),
        Contestant("eager", _eager),
        Contestant("eager-channels-last", _eager_channels_last),
        Contestant("compile", _compiled),
        Contestant("onnxruntime", _onnxruntime, ("onnxruntime",), needs_onnx=True),
        Contestant("openvino", _openvino, ("openvino",), needs_onnx=True),
        Contestant("onnxruntime-int8", _onnxruntime_int8, ("onnxruntime",), "int8", needs_onnx=True),
        Contestant("openvino-int8", _openvino_int8, ("openvino", "nncf"), "int8", needs_onnx=True),
    )
}


def _torch_batch(task: Task) -> Tensor:
    import torch

    torch.set_num_threads(task.threads)
    return torch.from_numpy(np.load(task.batch))


def _raw_maps_network(task: Task) -> nn.Module:
    from benchmarks.peers.networks import RawMaps
    from efficientad_fast.detector import Detector

    return RawMaps(Detector.load(task.detector))


def _inferring(run: Callable[[], tuple[Tensor, Tensor]]) -> Run:
    import torch

    @torch.inference_mode()
    def arrays() -> Maps:
        map_st, map_ae = run()
        return map_st.numpy(), map_ae.numpy()

    return arrays


def _onnxruntime_session(task: Task, model: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(np.load(task.batch)))
    outputs = {}
    for output in session.get_outputs():
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32)
        binding.bind_ortvalue_output(output.name, value)
        outputs[output.name] = value

    def run() -> Maps:
        session.run_with_iobinding(binding)
        return outputs[OUTPUTS[0]].numpy(), outputs[OUTPUTS[1]].numpy()

    return run


def _openvino_request(task: Task, model: Any) -> Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
        # Else processors with bfloat16 units compute in that.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.get_input_tensor().data[:] = np.load(task.batch)
    outputs = [request.get_tensor(name) for name in OUTPUTS]

    def run() -> Maps:
        request.infer()
        return outputs[0].data, outputs[1].data

    return run


def _calibration_batches(task: Task) -> Iterator[NDArray[np.float32]]:
    """The calibration images, as many together as the model takes; from the start again to fill the last batch."""
    images = np.load(task.calibration)
    size = len(np.load(task.batch, mmap_mode="r"))
    for start in range(0, len(images), size):
        yield np.take(images, range(start, start + size), axis=0, mode="wrap")
