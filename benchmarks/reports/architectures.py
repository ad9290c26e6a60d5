"""Limits of GPU architectures, and how many warps fit on a multiprocessor.

Source: CUDA C++ Programming Guide, technical specifications per compute capability.
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


@dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability.

    Attributes:
        warps, blocks: resident on a multiprocessor at most.
        shared: bytes of shared memory of a multiprocessor.
        shared_of_block: bytes that one block can have at most, static and dynamic.
    """

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


ARCHITECTURES = {
    80: Architecture(warps=64, blocks=32, shared=164 * KILOBYTE, shared_of_block=163 * KILOBYTE),
    86: Architecture(warps=48, blocks=16, shared=100 * KILOBYTE, shared_of_block=99 * KILOBYTE),
    89: Architecture(warps=48, blocks=24, shared=100 * KILOBYTE, shared_of_block=99 * KILOBYTE),
    90: Architecture(warps=64, blocks=32, shared=228 * KILOBYTE, shared_of_block=227 * KILOBYTE),
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


def occupancy(architecture: Architecture, threads: int, registers: int, shared: int) -> float:
    """The part of a multiprocessor's warps that can be resident at once, between 0 and 1.

    Args:
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
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
    return blocks * warps / architecture.warps
