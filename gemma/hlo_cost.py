"""What a compiled program does on one device: floating-point work, HBM traffic, collectives, the compiler's cycles.

Every loop counts as often as it runs. Sources of each number: `Cost`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from gemma import flops, v5p
from gemma.hlo import HBM, Computation, Instruction, Module, executed, nested

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "copy-done"}
# What reads or writes a part of a large array, where only the part moves.
READS_PART, WRITES_PART = ("dynamic-slice", "slice", "gather"), ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Cost:
    """On one device, in one call of the program.

    flops: of matrix products, in fusions too, and of attention kernels by the blocks their mask leaves.
    hbm_bytes: what every fusion, copy and kernel reads and writes of HBM; of a slice only the part.
    compute_s: the compiler's own `estimated_cycles` where it gives them, else the larger of flops at peak and bytes at
    full bandwidth. No collective is in it.
    blind_s: the part of compute_s that is not the compiler's.
    sent_bytes: {(mesh axes, kind): bytes a device sends}, by the ring algorithm.
    """

    flops: float
    hbm_bytes: float
    compute_s: float
    blind_s: float
    sent_bytes: dict[tuple[str, str], float]


def cost(module: Module, mesh: dict[str, int]) -> Cost:
    """mesh: axis names and sizes in the order in which devices are numbered."""
    total_flops = hbm_bytes = compute_s = blind_s = 0.0
    sent: dict[tuple[str, str], float] = defaultdict(float)
    for where, i, times in executed(module):
        if i.opcode in FREE:
            continue
        pieces = list(nested(module, i))
        for piece in pieces:
            if kind := collective_kind(piece):
                sent[axes_of(piece, mesh), kind] += times * sent_by(piece, kind, where, mesh)
        if any(collective_kind(piece) for piece in pieces):
            continue  # its time is the network's
        work = sum(product_flops(piece, w) for w, piece in with_homes(module, where, i)) + kernel_flops(i)
        moved = traffic(module, where, i)
        total_flops += times * work
        hbm_bytes += times * moved
        if i.opcode in ("copy-start", "async-start", "async-update", "async-done"):
            continue  # beside the compute
        if cycles := estimated_cycles(i):
            compute_s += times * cycles / v5p.CLOCK_HZ
        else:
            bound_s = max(work / v5p.FLOPS, moved / v5p.HBM_BYTES_PER_S)
            compute_s += times * bound_s
            blind_s += times * bound_s
    return Cost(total_flops, hbm_bytes, compute_s, blind_s, dict(sent))


def with_homes(module: Module, where: Computation, i: Instruction) -> Iterable[tuple[Computation, Instruction]]:
    yield where, i
    if i.opcode == "fusion":
        inner = module.computations[str(i.attribute("calls"))]
        for piece in inner.instructions:
            yield from with_homes(module, inner, piece)


def estimated_cycles(i: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(found.group(1)) if found else 0


def product_flops(i: Instruction, where: Computation) -> float:
    """2 per multiply-add of a convolution, which on TPU is what every matrix product is. Padding is no work."""
    if i.opcode != "convolution":
        return 0.0
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", str(i.attribute("dim_labels")))
    assert labels, i.name
    lhs, rhs = (where.by_name[name].arrays[0].shape for name in i.operands[:2])
    out = i.arrays[0].shape
    lhs_at, rhs_at, out_at = labels.groups()
    adds = rhs[rhs_at.index("i")] * out[out_at.index("b")] * out[out_at.index("f")]
    window = window_of(i, len(lhs_at) - 2)
    for dim in range(len(lhs_at) - 2):
        at = str(dim)
        adds *= pairs(lhs[lhs_at.index(at)], rhs[rhs_at.index(at)], out[out_at.index(at)], window[dim])
    return 2.0 * adds


def window_of(i: Instruction, dims: int) -> list[dict[str, str]]:
    """For each spatial dimension: stride, pad, lhs_dilate, rhs_dilate, rhs_reversal as far as given."""
    text = (i.attribute("window") or "{}").strip("{}")
    found: list[dict[str, str]] = [{} for _ in range(dims)]
    for part in text.split():
        key, _, values = part.partition("=")
        for dim, value in enumerate(values.split("x")):
            found[dim][key] = value
    return found


def pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """(output, kernel) positions that meet an element of the input, along one dimension."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilate, spread = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    met = 0
    for k in range(kernel):
        for o in range(out):
            at = o * stride + k * spread - low
            met += 0 <= at < (size - 1) * dilate + 1 and at % dilate == 0
    return met


def kernel_flops(i: Instruction) -> float:
    """Of a splash attention kernel: its blocks' sides are in its metadata, its window in its scope's name."""
    named = re.search(r"splash_mha_(fwd|dkv)", i.name)
    if i.opcode != "custom-call" or not named:
        return 0.0
    side = re.search(r'block_q\\*": (\d+)', i.attributes)
    window = re.search(r"window_(\d+|None)/", i.attributes)
    q = next(a for a in i.arrays if a.dtype in ("bf16", "f32") and len(a.shape) >= 3)
    N, T, H = q.shape[-3:]
    assert side and window, i.attributes[:500]
    seen = None if window.group(1) == "None" else int(window.group(1))
    products = 2 if named.group(1) == "fwd" else 5  # backward: logits again, and for dv, dp, dk, dq
    return 2.0 * products * N * H * flops.block_pairs(T, int(side.group(1)), seen)


def traffic(module: Module, where: Computation, i: Instruction) -> float:
    """Bytes of HBM read and written by one run of an instruction."""
    if i.opcode in READS_PART:
        return 2 * sum(a.bytes for a in i.arrays if a.space == HBM)
    if i.opcode in WRITES_PART:
        return 2 * where.by_name[i.operands[1]].arrays[0].bytes
    if i.opcode == "copy-start":  # (target, source, flag)
        return float(sum(a.bytes for a in i.arrays[:2] if a.space == HBM))
    written = float(sum(a.bytes for a in i.arrays if a.space == HBM))
    inner = module.computations[str(i.attribute("calls"))] if i.opcode == "fusion" else None
    if inner and (update := in_place(inner)):
        written = float(update)
    read = 0.0
    for at, name in enumerate(i.operands):
        source = where.by_name[name]
        whole = sum(a.bytes for a in source.arrays if a.space == HBM)
        read += min(whole, part_read(inner, at)) if inner and whole else whole
    return read + written


def in_place(inner: Computation) -> int:
    """Bytes of what a fusion that ends in an update in place writes; 0 for another fusion."""
    root = inner.root
    while root.opcode == "bitcast":
        root = inner.by_name[root.operands[0]]
    return inner.by_name[root.operands[1]].arrays[0].bytes if root.opcode in WRITES_PART else 0


def part_read(inner: Computation, at: int) -> float:
    """Bytes that a fusion reads of its operand number `at`: where only slices are used, only those."""
    if at >= len(inner.parameters):
        return float("inf")
    names, total = [inner.parameters[at].name], 0.0
    while names:
        name = names.pop()
        for user in inner.instructions:
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in READS_PART and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif not (user.opcode in WRITES_PART and user.operands[0] == name):
                return float("inf")
    return total


def collective_kind(i: Instruction) -> str | None:
    """all-gather and the like; None for anything else, and for the end of an asynchronous one."""
    return next((kind for kind in COLLECTIVES if i.opcode in (kind, f"{kind}-start")), None)


def groups_of(i: Instruction, devices: int) -> list[int]:
    """The first of the groups that exchange data: `{{0,1},{2,3}}`, or `[groups,size]<=[dims]T(order)`."""
    text = i.attribute("replica_groups") or i.attribute("source_target_pairs") or ""
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return [int(d) for d in listed.group(1).split(",")]
    iota = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        return list(range(devices))
    dims = [int(d) for d in iota.group(3).split(",")]
    order = [int(d) for d in iota.group(4).split(",")] if iota.group(4) else list(range(len(dims)))
    strides = [prod(dims[at + 1 :]) for at in range(len(dims))]
    group = []
    for n in range(int(iota.group(2))):  # the n-th number in the transposed order
        device = 0
        for axis in reversed(order):
            n, at = divmod(n, dims[axis])
            device += at * strides[axis]
        group.append(device)
    return group


def axes_of(i: Instruction, mesh: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ, as in "replica+fsdp"."""
    group = groups_of(i, prod(mesh.values()))
    places = [place(device, mesh) for device in group]
    return "+".join(axis for at, axis in enumerate(mesh) if len({p[at] for p in places}) > 1) or "none"


def place(device: int, mesh: dict[str, int]) -> tuple[int, ...]:
    found = []
    for size in reversed(mesh.values()):
        device, at = divmod(device, size)
        found.append(at)
    return tuple(reversed(found))


def sent_by(i: Instruction, kind: str, where: Computation, mesh: dict[str, int]) -> float:
    """Bytes that a device sends, around a ring of the group."""
    n = len(groups_of(i, prod(mesh.values())))
    arrays = i.arrays
    if i.opcode.endswith("-start") and kind == "all-gather":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    size = float(sum(a.bytes for a in arrays))
    if kind == "collective-permute":
        return size / (2 if i.opcode.endswith("-start") else 1)
    if n == 1:
        return 0.0
    share = {"all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    return size * (n - 1) if kind == "reduce-scatter" else size * share[kind]
