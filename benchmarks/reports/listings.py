"""Reading what compilers and disassemblers print."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory, spilled registers included.
        spill_stores, spill_loads: bytes that the instructions move which spill registers.
        shared: bytes of a block, static.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Entry:
    """What PTX says of a kernel.

    Attributes:
        threads: of a block at most, None where nothing bounds them.
        dynamic_shared: whether it has shared memory whose size the launch decides.
    """

    threads: int | None
    dynamic_shared: bool


def resources(log: str) -> dict[str, Resources]:
    """Of each kernel, by its mangled name, from ``ptxas -v``."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        frame = re.search(
            r"Function properties for "
            + re.escape(name)
            + r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            part,
        )
        used = re.search(r"Used (\d+) registers(.*)", part)
        if frame is None or used is None:
            raise ValueError(f"ptxas says nothing of the resources of {name}:\n{part}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        found[name] = Resources(int(used[1]), *map(int, frame.groups()), int(shared[1]) if shared else 0)
    return found


def entries(ptx: str) -> dict[str, Entry]:
    """Of each kernel, by its mangled name, from PTX."""
    dynamic = re.findall(r"^\s*\.extern \.shared .*?(\w+)\[\];", ptx, re.MULTILINE)
    parts = re.split(r"^\s*(?:\.\w+\s+)*\.entry\s+", ptx, flags=re.MULTILINE)
    functions = re.findall(r"^\s*(?:\.visible |\.weak )?\.func.*?^\}", ptx, re.MULTILINE | re.DOTALL)

    def mentioned(text: str) -> bool:
        return any(re.search(rf"\b{re.escape(name)}\b", text) for name in dynamic)

    found = {}
    for part in parts[1:]:
        name = re.match(r"[\w$]+", part)
        assert name is not None, part
        bound = re.search(r"^\s*\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", part, re.MULTILINE)
        threads = None
        if bound is not None:
            threads = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)
        # A function that is not inlined may serve every kernel.
        found[name[0]] = Entry(threads, mentioned(part) or any(map(mentioned, functions)))
    return found


def instructions(sass: str) -> dict[str, Counter[str]]:
    """How often each instruction, with its modifiers, stands in each kernel, by its mangled name, from ``nvdisasm``.

    Padding (NOP) is left out.
    """
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in sass.splitlines():
        section = re.match(r"\.text\.(\S+):", line)
        if section is not None:
            current = found.setdefault(section[1], Counter())
            continue
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*(?:\.[\w.]+)?)", line)
        if instruction is not None and instruction[1] != "NOP":
            current[instruction[1]] += 1
    return found


# Of tensor cores: of a warp, of a warp group (sm_90), and from tensor memory (sm_100).
PRODUCTS = (
    *("HMMA", "QMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA"),
    *("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"),
)

# From global to shared memory and back, past registers: cp.async, TMA by descriptor, TMA in bulk.
COPIES = ("LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")

# What a performance question starts with: tensor cores, copies, tensor memory, memory, atomics, barriers, arithmetic.
INSTRUCTIONS = (
    *PRODUCTS,
    *COPIES,
    *("LDTM", "STTM", "UTCCP"),
    *("LDG", "STG", "LDSM", "LDS", "STS", "LDL", "STL", "ATOMG", "RED", "REDG", "ATOMS", "BAR", "FFMA"),
)


# Of global and shared memory, whose instructions may move 16 bytes a thread.
WIDE = ("LDG", "STG", "LDGSTS", "LDS", "STS")


def counts(listing: Counter[str]) -> dict[str, int]:
    """Of those of `INSTRUCTIONS` that occur, of the 128-bit ones among `WIDE`, of 64-bit copies, and of all."""
    found = {name: 0 for name in INSTRUCTIONS}
    for instruction, count in listing.items():
        name, *modifiers = instruction.split(".")
        if name in found:
            found[name] += count
            if name in WIDE and "128" in modifiers:
                found[f"{name} of 128 bits"] = found.get(f"{name} of 128 bits", 0) + count
            if name == "LDGSTS" and "64" in modifiers:
                found["LDGSTS of 64 bits"] = found.get("LDGSTS of 64 bits", 0) + count
    return {name: count for name, count in found.items() if count} | {"all": sum(listing.values())}


def operations_a_byte(listing: Counter[str]) -> float | None:
    """Operations of tensor cores for each byte that is loaded from global memory, as listed: a loop counts once.

    None where there are no products by warps, or where TMA loads, whose instructions do not say how much.
    """
    operations = loaded = 0
    for instruction, count in listing.items():
        name, *modifiers = instruction.split(".")
        if name == "UTMALDG":
            return None
        if name in ("HMMA", "QMMA"):
            # m16n8kK as 168 and K.
            depth = next((int(one[3:]) for one in modifiers if one.startswith("168") and one[3:].isdigit()), 0)
            operations += count * 2 * 16 * 8 * depth
        if name in ("LDG", "LDGSTS"):
            bits = next((int(one) for one in modifiers if one in ("64", "128")), None)
            narrow = next((8 * size for size in (1, 2) if f"U{8 * size}" in modifiers), 32)
            loaded += count * 32 * (bits or narrow) // 8
    return operations / loaded if operations and loaded else None
