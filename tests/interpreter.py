"""Triton's interpreter, mended in two places in which it differs from a GPU (Triton 3.6 to 3.8).

It rounds float32 to bfloat16 and e4m3 toward zero, where GPUs round to the nearest; and `tl.dot` multiplies the bits of
bfloat16 as if they were whole numbers. Both are done by PyTorch and in float32 here, in which such products are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """For the rest of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    known = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    original = interpreter._convert_float

    def bits(width: int) -> Any:
        return getattr(np, f"uint{width}")

    def convert(numbers: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in known or target not in known:
            return original(numbers, source, target, rounding)
        given = np.ascontiguousarray(numbers).view(bits(source.primitive_bitwidth)).reshape(-1)
        converted = torch.from_numpy(given.copy()).view(known[source]).to(known[target])
        result: np.ndarray = converted.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()
        return result.reshape(numbers.shape)

    def as_float32(handle: Any) -> np.ndarray:
        if handle.data.dtype == np.float32:
            return handle.data  # type: ignore[no-any-return]
        return convert(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, most_imprecise: Any) -> Any:
        if d.data.dtype == np.float64:
            return interpreter.TensorHandle(np.matmul(a.data, b.data) + d.data, d.dtype.scalar)
        return interpreter.TensorHandle(np.matmul(as_float32(a), as_float32(b)) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
