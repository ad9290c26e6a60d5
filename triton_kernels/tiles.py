"""Which tiles a kernel works in: the rules of ``choices.json``, and of the user's own table, which `tune` writes.

A table is a list of rules by kernel, such as::

    {"conv_pool": [{"when": {"capability": [9.0, null], "images": 1, "pool": true}, "tile": {"outputs": 128}}]}

The first rule counts of which every condition holds: a fact equals a value, or lies in a range of ``[least, most]``,
where null is no limit. A rule without conditions holds always, and stands last. What facts a kernel states, and what
its tiles consist of, its own module says. Rules of the user's table come first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from efficientad_fast import ops
from efficientad_fast.errors import InputError

TABLE_VARIABLE = "EFFICIENTAD_FAST_TILES"
"""Names the user's table in place of the one in the cache folder; empty for none."""

Facts = Mapping[str, int | float | bool | str]
Rule = Mapping[str, Any]

_forced: ContextVar[Mapping[Any, Mapping[str, int]]] = ContextVar("forced", default=MappingProxyType({}))
_stated: ContextVar[list[tuple[str, dict[str, Any]]] | None] = ContextVar("stated", default=None)


@contextlib.contextmanager
def forced(kernel: str, facts: Facts, tile: Mapping[str, int]) -> Iterator[None]:
    """Inside, and in this thread, ``kernel`` works in ``tile`` for those facts, whatever the rules say.

    For who times candidates.
    """
    token = _forced.set({**_forced.get(), _key(kernel, facts): tile})
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def stated() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Inside, and in this thread, what tiles are chosen for is written down: kernels' names, and the facts of each."""
    noted: list[tuple[str, dict[str, Any]]] = []
    token = _stated.set(noted)
    try:
        yield noted
    finally:
        _stated.reset(token)


def user_table() -> Path | None:
    """Where the user's table is or would be; None where they want none."""
    named = os.environ.get(TABLE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "efficientad_fast" / "tiles.json"


@functools.cache
def rules(kernel: str) -> tuple[Rule, ...]:
    """Of the user's table, then those that ship.

    Raises:
        InputError: the user's table is not one.
    """
    path = user_table()
    own: Sequence[Rule] = ()
    if path is not None and path.is_file():
        try:
            own = json.loads(path.read_text(encoding="utf-8")).get(kernel, ())
            if not all({"when", "tile"} <= rule.keys() for rule in own):
                raise ValueError("a rule without 'when' or 'tile'")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is no table of tiles: {error}. Remove it, or write it again with `efficientad-fast tune`."
            ) from error
    return (*own, *ops.tiles()[kernel])


def choose(kernel: str, facts: Facts) -> dict[str, int]:
    """The tile of the first rule that holds.

    Raises:
        LookupError: none does, or it asks for a fact that the kernel does not state.
    """
    noted = _stated.get()
    if noted is not None:
        noted.append((kernel, dict(facts)))
    tile = _forced.get().get(_key(kernel, facts))
    if tile is not None:
        return dict(tile)
    for rule in rules(kernel):
        if all(_holds(facts[name], wanted) for name, wanted in rule["when"].items()):
            return dict(rule["tile"])
    raise LookupError(f"no rule for {kernel} with {dict(facts)}")


def _holds(fact: int | float | bool | str, wanted: Any) -> bool:
    if isinstance(wanted, list):
        least, most = wanted
        return (least is None or fact >= least) and (most is None or fact <= most)
    return bool(fact == wanted)


def _key(kernel: str, facts: Facts) -> tuple[str, frozenset[tuple[str, int | float | bool | str]]]:
    return kernel, frozenset(facts.items())
