"""What ``identity`` is tested with."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal, numbers
from torch import Tensor


def case(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, turned: bool = False) -> Case:
    def make() -> Arguments:
        x = (1000 * numbers(shape, dtype=torch.float64)).to(dtype)
        return (x.T if turned else x,), {}

    return Case(name, "identity", make)


CASES = [
    case("scalar", ()),
    case("empty", (0, 3)),
    case("one", (1,)),
    case("prime", (2, 3, 5, 7)),
    case("turned", (4, 5), turned=True),
    *(
        case(str(dtype).removeprefix("torch."), (3, 11), dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64)
    ),
]


@st.composite
def strategy(draw: Any) -> Case:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    return case(f"drawn, {shape}", shape)


def expected(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    return (x.clone(),)


REFUSALS: list[Refusal] = []
