"""What a pickle describes, as inert records: nothing that it names is imported, and nothing that it asks for is called.

A pickle is a program for a machine with a stack, whose instructions import and call whatever it names. This machine
has the instructions that make numbers, texts and containers; of every name it makes a :class:`Name`, and of every
call a :class:`Record` of what would have been called and with what.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from efficientad_fast.errors import DetectorFileError
from efficientad_fast.files import printable

MOST_BYTES = 16 * 2**20
"""Of one pickle; a checkpoint's, whose tensors are beside it, has some kilobytes."""

MOST_INSTRUCTIONS = 2_000_000
"""Of one pickle, each of which makes an object at most."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """What a pickle would have made by calling something.

    Attributes:
        made_by: a :class:`Name`, or what a call of another one would have returned.
        arguments: of the call.
        state: what the object would have been given afterwards, mostly its attributes.
        items: what would have been added to it, where it is a container.
    """

    made_by: Any
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The class's name without its module."""
        return self.made_by.name if isinstance(self.made_by, Name) else ""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The object's ``__dict__``, where its class keeps to pickle's habits."""
        return self.state if isinstance(self.state, dict) else {}


Rebuild = Callable[[tuple[Any, ...]], Any]
"""What stands in for a function that a pickle calls, from its arguments; our own, and without side effects."""


def read_pickle(file: BinaryIO, source: str, rebuild: Mapping[Name, Rebuild], persistent: Callable[[Any], Any]) -> Any:
    """The object that the pickle at the file's position describes; the position is behind it then.

    Args:
        source: what the file is called in errors.
        rebuild: what stands in for which function or class.
        persistent: makes an object of what the pickle calls a persistent id.

    Raises:
        DetectorFileError: it is no pickle, truncated, larger than any checkpoint's, or makes what no checkpoint has.
    """
    try:
        return _Machine(rebuild, persistent).run(_Bounded(file))
    except (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, DetectorFileError):
            raise DetectorFileError(f"{source}: {error}") from error
        raise DetectorFileError(
            f"{source} holds no pickle that can be read, or it is damaged. Copy it again, or save it again."
        ) from error


class _Bounded:
    """A file, of which one pickle's share can be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MOST_BYTES

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise DetectorFileError(f"a pickle of more than {MOST_BYTES} bytes, which no checkpoint has.")
        return data

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def tell(self) -> int:
        return self._file.tell()


_MARK = object()

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}

_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
)

_SMALL = (bool, int, float)


class _Machine:
    def __init__(self, rebuild: Mapping[Name, Rebuild], persistent: Callable[[Any], Any]) -> None:
        self._rebuild = rebuild
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[Any, Any] = {}

    def run(self, file: _Bounded) -> Any:
        push = self._stack.append
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if count > MOST_INSTRUCTIONS:
                raise DetectorFileError(f"a pickle of more than {MOST_INSTRUCTIONS} instructions, which no model has.")
            name = instruction.name
            if name in _LITERALS:
                push(argument)
            elif name in _CONSTANTS:
                push(_CONSTANTS[name])
            elif name in _EMPTY:
                push(_EMPTY[name]())
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                push(self._memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                if not isinstance(argument, int) or not 0 <= argument < 2**32:
                    raise ValueError("a place in the memo that is none")
                self._memo[argument] = self._top()
            elif name == "STOP":
                return self._pop()
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise ValueError("it does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                stack.append(self._top())
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "TUPLE" | "FROZENSET":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop() for _ in range(int(name[-1])))[::-1])
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                items = self._pop_to_mark()
                stack.append({})
                self._set_items(items)
            case "APPEND":
                self._extend([self._pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                stack.append(Name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(), self._pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise ValueError("a name that is no text")
                stack.append(Name(module, name))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name("copyreg", f"extension {argument}"))
            case "REDUCE" | "NEWOBJ":
                arguments, called = self._pop(), self._pop()
                self._call(called, arguments)
            case "NEWOBJ_EX":
                named, arguments, called = self._pop(), self._pop(), self._pop()
                # As a pair: each of many calls would have a copy of the same long arguments.
                self._call(called, (arguments, named))
            case "OBJ":
                called, *given = self._pop_to_mark()
                self._call(called, tuple(given))
            case "INST":
                self._call(Name(*argument.split(" ", 1)), tuple(self._pop_to_mark()))
            case "BUILD":
                state, target = self._pop(), self._top()
                if isinstance(target, Record):
                    target.state = state
            case "PERSID":
                stack.append(self._persistent(argument))
            case "BINPERSID":
                stack.append(self._persistent(self._pop()))
            case _:
                raise ValueError(f"instruction {name}")

    def _call(self, called: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise ValueError(f"a call with {type(arguments).__name__} for arguments")
        stand_in = self._rebuild.get(called) if isinstance(called, Name) else None
        self._stack.append(Record(called, arguments) if stand_in is None else stand_in(arguments))

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where an object should be")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Record):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            # The others are left out: no checkpoint has a tensor under them.
            target.update(pair for pair in pairs if _is_plain_key(pair[0]))
        else:
            raise ValueError(f"items for a {type(target).__name__}")


def _is_plain_key(key: Any) -> bool:
    """Whether it is hashed in no time, and to what no sender can choose: keys of one hash take forever together."""
    return isinstance(key, str | bytes | Name | Record) or key is None or (type(key) in _SMALL and abs(key) < 2**53)


def shown(value: Any) -> str:
    """Of plain data in a few letters, for errors, without what steers a terminal; of everything else, what it is."""
    if isinstance(value, list | tuple) and len(value) <= 4 and not any(isinstance(one, list | tuple) for one in value):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Record):
        return f"a {shown(value.kind or 'record')}"
    if isinstance(value, str):
        return printable(value[:80]) + ("..." if len(value) > 80 else "")
    is_small = value is None or (type(value) in _SMALL and abs(value) < 2**63)
    return str(value) if is_small else f"a {type(value).__name__}"
