"""Training that was interrupted continues to the same bits; a state of another run is refused."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.files import write_tensors
from efficientad_fast.training.state import (
    count_steps,
    file_sizes,
    find_state,
    fingerprint,
    interruptible,
    load_state,
    save_state,
    step_seed,
    weights_digest,
)

RUN: dict[str, Any] = {"steps": 9, "size": (256, 256), "teacher": {"name": "default"}, "penalty": None}


class Training:
    """Two small networks in channels-last layout, trained by one Adam on data drawn by the step number."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, second = nn.Conv2d(3, 17, 4), nn.Sequential(nn.Conv2d(17, 5, 3), nn.BatchNorm2d(5))
        self.modules = {
            name: network.to(memory_format=torch.channels_last)
            for name, network in {"student": first, "autoencoder": second}.items()
        }
        self.optimiser = torch.optim.Adam(
            [parameter for network in self.modules.values() for parameter in network.parameters()],
            lr=1e-2,
            weight_decay=1e-3,
        )

    def take_steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step_seed(0, step))
            image = torch.randn(2, 3, 12, 13, generator=generator)
            output = self.modules["autoencoder"](self.modules["student"](image).relu())
            self.optimiser.zero_grad(set_to_none=True)
            ((output - image.mean()) ** 2).mean().backward()
            self.optimiser.step()

    def tensors(self) -> list[torch.Tensor]:
        networks = [value for network in self.modules.values() for value in network.state_dict().values()]
        state = self.optimiser.state_dict()["state"]
        return networks + [state[index][field] for index in sorted(state) for field in sorted(state[index])]


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = Training(0)
    whole.take_steps(0, 9)
    broken = Training(0)
    broken.take_steps(0, 4)
    save_state(tmp_path / "state", broken.modules, broken.optimiser, 4, RUN)
    resumed = Training(1)
    resumed.take_steps(0, 2)
    first = load_state(tmp_path / "state", resumed.modules, resumed.optimiser, RUN)
    assert first == 4
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), broken.tensors(), strict=True))
    resumed.take_steps(first, 9)
    assert not all(torch.equal(a, b) for a, b in zip(resumed.tensors(), broken.tensors(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), whole.tensors(), strict=True))


def test_a_state_can_be_loaded_before_the_first_step(tmp_path: Path) -> None:
    fresh, resumed = Training(0), Training(1)
    save_state(tmp_path / "state", fresh.modules, fresh.optimiser, 0, RUN)
    assert load_state(tmp_path / "state", resumed.modules, resumed.optimiser, RUN) == 0
    for training in (fresh, resumed):
        training.take_steps(0, 2)
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), fresh.tensors(), strict=True))


def test_moments_keep_the_memory_layout_of_their_parameters(tmp_path: Path) -> None:
    training, resumed = Training(0), Training(1)
    training.take_steps(0, 1)
    save_state(tmp_path / "state", training.modules, training.optimiser, 1, RUN)
    load_state(tmp_path / "state", resumed.modules, resumed.optimiser, RUN)
    for before, after in zip(training.tensors(), resumed.tensors(), strict=True):
        assert before.stride() == after.stride()


def test_the_learning_rate_is_that_of_the_resuming_run(tmp_path: Path) -> None:
    training, resumed = Training(0), Training(1)
    training.take_steps(0, 1)
    training.optimiser.param_groups[0]["lr"] = 5.0
    save_state(tmp_path / "state", training.modules, training.optimiser, 1, RUN)
    load_state(tmp_path / "state", resumed.modules, resumed.optimiser, RUN)
    assert resumed.optimiser.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 10}, "steps = 9, but this run has 10"),
        ({"size": (256, 320)}, r"size = \[256, 256\], but this run has \[256, 320\]"),
        ({"teacher": {"name": "mine"}}, "teacher = {'name': 'default'}"),
        ({"extra": 1}, "extra = None, but this run has 1"),
    ],
)
def test_a_state_of_another_run_is_refused_and_the_difference_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    training, other = Training(0), Training(1)
    before = [tensor.clone() for tensor in other.tensors()]
    save_state(tmp_path / "state", training.modules, training.optimiser, 0, RUN)
    with pytest.raises(InputError, match=named):
        load_state(tmp_path / "state", other.modules, other.optimiser, RUN | change)
    assert all(torch.equal(a, b) for a, b in zip(other.tensors(), before, strict=True))


def test_a_truncated_state_is_refused_by_name(tmp_path: Path) -> None:
    training, path = Training(0), tmp_path / "state"
    save_state(path, training.modules, training.optimiser, 0, RUN)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DetectorFileError, match="state is not a safetensors file, or it is damaged"):
        load_state(path, training.modules, training.optimiser, RUN)


@pytest.mark.parametrize("metadata", [{}, {"step": "1"}, {"step": "one", "run": "{}"}, {"step": "1", "run": "{"}])
def test_a_tensor_file_of_another_kind_is_no_training_state(tmp_path: Path, metadata: dict[str, str]) -> None:
    training, path = Training(0), tmp_path / "detector"
    write_tensors(path, {"weight": torch.ones(2)}, metadata)
    with pytest.raises(DetectorFileError, match="detector is not a training state"):
        load_state(path, training.modules, training.optimiser, RUN)


@pytest.mark.parametrize("kept", ["student", "optimiser"])
def test_a_state_of_other_networks_is_refused_by_name(tmp_path: Path, kept: str) -> None:
    training, path = Training(0), tmp_path / "state"
    training.take_steps(0, 1)
    modules = training.modules if kept == "optimiser" else {"student": training.modules["student"]}
    optimiser = torch.optim.SGD(training.modules["student"].parameters(), momentum=0.9)
    save_state(path, modules, training.optimiser if kept == "student" else optimiser, 1, RUN)
    if kept == "optimiser":
        write_tensors(path, {"student.weight": torch.ones(1)}, {"step": "1", "run": "{}"})
    with pytest.raises(DetectorFileError, match="state does not hold the networks and the optimiser of this run"):
        load_state(path, training.modules, training.optimiser, RUN if kept == "student" else {})


def test_step_seeds_are_stable_across_versions() -> None:
    # A change here would make interrupted trainings continue differently.
    assert step_seed(0, 0) == 37690156179941161
    assert step_seed(7, 123, "data") == 5641811592720479593


def test_step_seeds_differ_by_seed_step_and_purpose_and_fit_a_generator() -> None:
    seeds = [
        step_seed(seed, step, purpose)
        for seed in range(4)
        for step in (*range(50), 69_999)
        for purpose in ("", "data", "epoch")
    ]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


def test_fingerprint_notices_names_sizes_and_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"123")
    second.write_bytes(b"12")
    original = fingerprint([first, second])
    assert fingerprint([first, second]) == original
    others = {fingerprint([second, first]), fingerprint([first]), fingerprint([])}
    second.write_bytes(b"1234")
    others.add(fingerprint([first, second]))
    second.write_bytes(b"12")
    others.add(fingerprint([first, second.rename(tmp_path / "c.png")]))
    assert original not in others
    assert len(others) == 5


def test_file_names_need_not_be_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(b"123")
    assert fingerprint([path]) != fingerprint([])
    training, state = Training(0), tmp_path / "state"
    save_state(state, training.modules, training.optimiser, 0, RUN, {"images": file_sizes([path])})
    assert load_state(state, training.modules, training.optimiser, RUN, {"images": file_sizes([path])}) == 0


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ([["a", 1], ["b", 2], ["c", 4]], "of another size: c"),
        ([["a", 1], ["b", 2]], "missing: c"),
        ([["a", 1], ["d", 2], ["c", 3], ["c", 3]], "missing: b; new: d, c"),
        ([["b", 2], ["a", 1], ["c", 3]], "the same files in another order"),
        ([[f"n{index}", 0] for index in range(7)], "missing: a, b, c; new: n0, n1, n2, n3, n4 and 2 more"),
        ([], "missing: a, b, c"),
    ],
)
def test_a_state_of_other_files_is_refused_and_the_files_named(tmp_path: Path, wanted: list[Any], named: str) -> None:
    training, path = Training(0), tmp_path / "state"
    files = {"images": [("a", 1), ("b", 2), ("c", 3)]}
    save_state(path, training.modules, training.optimiser, 0, RUN, files)
    assert load_state(path, training.modules, training.optimiser, RUN, files) == 0
    with pytest.raises(InputError, match=rf"state was made with other images \({named}\)"):
        load_state(path, training.modules, training.optimiser, RUN, {"images": wanted} if wanted else {})


def test_a_state_is_found_only_to_be_continued(tmp_path: Path) -> None:
    training, path = Training(0), tmp_path / "state"
    assert count_steps(path) == 0
    for options in ((True, False), (False, True), (False, False)):
        assert find_state(path, RUN, {}, resume=options[0], restart=options[1]) is None
    save_state(path, training.modules, training.optimiser, 3, RUN)
    with pytest.raises(InputError, match="holds 3 of 9 steps"):
        find_state(path, RUN, {}, resume=False, restart=False)
    with pytest.raises(InputError, match="exclude each other"):
        find_state(path, RUN, {}, resume=True, restart=True)
    state = find_state(path, RUN, {}, resume=True, restart=False)
    assert state is not None and state.step == count_steps(path) == 3
    assert find_state(path, RUN, {}, resume=False, restart=True) is None
    with pytest.raises(InputError, match="steps = 9"):
        find_state(path, RUN | {"steps": 10}, {}, resume=True, restart=False)


def test_a_digest_of_weights_hangs_on_their_values_alone() -> None:
    network = Training(0).modules["student"]
    assert isinstance(network, nn.Conv2d)
    digest = weights_digest(network)
    assert weights_digest(Training(0).modules["student"].to(memory_format=torch.contiguous_format)) == digest
    assert weights_digest(Training(1).modules["student"]) != digest
    with torch.no_grad():
        network.bias[3] = torch.nextafter(network.bias[3], torch.tensor(9.0))
    assert weights_digest(network) != digest


def test_the_first_ctrl_c_asks_to_stop_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as interruption:
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_where_the_training_fails_and_requests_do_not_carry_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="failed"), interruptible():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("failed")
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible() as interruption:
        assert not interruption.requested


def test_outside_the_main_thread_training_runs_and_the_handler_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with interruptible() as interruption:
            seen.extend([interruption.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
