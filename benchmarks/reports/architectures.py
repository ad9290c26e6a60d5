"""Limits of GPU architectures, how many warps fit on a multiprocessor, and what its tensor cores' instructions are.

Sources: CUDA C++ Programming Guide, technical specifications per compute capability; PTX ISA, tensor memory; CUDA
Binary Utilities, instruction set reference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KILOBYTE = 1024
WARP = 32
REGISTERS = 64 * KILOBYTE  # of a multiprocessor, 32 bits each, of all these
REGISTER_UNIT = 256  # a warp's registers are given out in multiples
PARTITIONS = 4  # of a multiprocessor, each with its share of registers and warps
SHARED_UNIT = 128  # a block's shared memory is given out in multiples
SHARED_RESERVED = 1 * KILOBYTE  # of each block's, for the system
TENSOR_MEMORY_UNIT = 32  # columns; a block gets a power of two of them


@dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability.

    Attributes:
        warps, blocks: resident on a multiprocessor at most.
        shared: bytes of shared memory of a multiprocessor.
        shared_of_block: bytes that one block can have at most, static and dynamic.
        products: SASS instructions by which its tensor cores work at their full rate in 16 and 8 bits.
        tensor_memory: columns of a multiprocessor.
    """

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    products: tuple[str, ...]
    tensor_memory: int = 0


def _architecture(warps: int, blocks: int, shared: int, products: tuple[str, ...], columns: int = 0) -> Architecture:
    return Architecture(warps, blocks, shared * KILOBYTE, shared * KILOBYTE - SHARED_RESERVED, products, columns)


ARCHITECTURES = {
    80: _architecture(warps=64, blocks=32, shared=164, products=("HMMA",)),
    86: _architecture(warps=48, blocks=16, shared=100, products=("HMMA",)),
    89: _architecture(warps=48, blocks=24, shared=100, products=("HMMA", "QMMA")),
    90: _architecture(warps=64, blocks=32, shared=228, products=("HGMMA", "QGMMA")),
    100: _architecture(warps=64, blocks=32, shared=228, products=("UTCHMMA", "UTCQMMA"), columns=512),
    120: _architecture(warps=48, blocks=24, shared=100, products=("HMMA", "QMMA")),
}


def capability(name: str) -> int:
    """10 * major + minor of an architecture such as ``sm_90`` or ``sm_90a``.

    Raises:
        ValueError: it is not in `ARCHITECTURES`; the message lists those that are.
    """
    match = re.fullmatch(r"sm_(\d+)[a-z]?", name)
    if match is None or int(match[1]) not in ARCHITECTURES:
        known = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
        raise ValueError(f"architecture must be one of {known}, got {name!r}")
    return int(match[1])


def occupancy(architecture: Architecture, threads: int, registers: int, shared: int, tensor_memory: int = 0) -> float:
    """The part of a multiprocessor's warps that can be resident at once, between 0 and 1.

    Args:
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
        tensor_memory: columns of a block.
    """
    warps = -(-threads // WARP)
    registers_of_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // PARTITIONS // registers_of_warp * PARTITIONS
    shared_of_block = -(-shared // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    blocks = min(
        architecture.blocks,
        architecture.warps // warps,
        warps_by_registers // warps,
        architecture.shared // shared_of_block if shared <= architecture.shared_of_block else 0,
    )
    if tensor_memory:
        columns = TENSOR_MEMORY_UNIT
        while columns < tensor_memory:
            columns *= 2
        blocks = min(blocks, architecture.tensor_memory // columns)
    return blocks * warps / architecture.warps
