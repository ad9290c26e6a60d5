"""`make fuzz` finds what breaks a reader; a moment of it for each target."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_input_breaks_a_reader(name: str, tmp_path: Path) -> None:
    target = fuzz.TARGETS[name](tmp_path)
    for seed in target.seeds():
        target.read(seed)
    assert fuzz.run_mutations(target, 2.0, seed=0, kept=tmp_path / "kept") > 0
    assert not (tmp_path / "kept").exists()


class Breakable(fuzz.Target):
    def seeds(self) -> list[bytes]:
        return [b"abcdefgh"]

    def read(self, data: bytes) -> None:
        if len(data) > 8:
            raise KeyError("longer")


def test_an_input_that_breaks_it_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    target = Breakable(tmp_path)
    with pytest.raises(KeyError):
        fuzz.run_mutations(target, 60.0, seed=0, kept=kept)
    with pytest.raises(KeyError):
        target.read(kept.read_bytes())


def test_mutations_are_those_of_their_seed() -> None:
    seeds = [bytes(range(200)), b"x" * 100]
    first, second = (
        [fuzz.mutated(seeds[0], draw, seeds) for _ in range(50)] for draw in (random.Random(3), random.Random(3))
    )
    assert first == second and len(set(first)) > 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("forbidden", [lambda folder: os.system("true"), lambda folder: (folder / ".." / "x").touch()])
def test_what_a_reader_must_not_do_is_noticed(forbidden: object, tmp_path: Path) -> None:
    folder = tmp_path / "fuzz"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        # Events are watched to the end of a process.
        fuzz.watch_events(folder)
        try:
            (folder / "image.png").write_bytes(b"x")
            forbidden(folder)  # type: ignore[operator]
        except AssertionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
