"""soak.py itself: each entry point predicts, and a result that differs from the first is found."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.soak import Soak, rounds


def test_every_entry_point_predicts(tmp_path: Path) -> None:
    soak = Soak(tmp_path)
    counts = list(itertools.islice(rounds(soak), len(soak.entry_points())))
    assert all(count > 0 for count in counts)


def test_another_result_than_the_first_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = Soak(tmp_path)
    results = iter([(3, "a"), (3, "a"), (3, "b")])
    monkeypatch.setattr(soak, "entry_points", lambda: {"one": lambda: next(results)})
    found = rounds(soak)
    assert (next(found), next(found)) == (3, 3)
    with pytest.raises(AssertionError, match="one: b was a"):
        next(found)
