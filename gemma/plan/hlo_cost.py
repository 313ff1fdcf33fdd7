"""What a compiled program does on one device: floating-point work, HBM traffic, collectives, the compiler's cycles.

Every loop counts as often as it runs. Sources of each number: `Cost`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from gemma.plan import flops, v5p
from gemma.plan.hlo import HBM, Computation, HloError, Instruction, Module, arrays, executed, nested

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "copy-done"}
ASYNC_OPS = ("copy-start", "async-start", "async-update", "async-done")  # while other things are computed
PAGED = "ragged_paged_attention"
# What reads or writes a part of a large array, where only the part moves.
READS_PART, WRITES_PART = ("dynamic-slice", "slice", "gather"), ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Cost:
    """On one device, in one call of the program.

    flops: of matrix products, in fusions too, and of attention kernels by the blocks their mask leaves.
    hbm_bytes: what every fusion, copy and kernel reads and writes of HBM; of a slice only the part.
    roofline_s: each instruction's larger time of products and of bytes, at the rates of the compiler's cost model.
    To it a kernel is a black box, so of kernels only the bytes are in it.
    roofline_once_s: the same with every loop's body counted once, as the compiler does.
    overlapped_s: roofline_s where what is copied to VMEM ahead of its use is counted with the instruction that uses it:
    the copy runs while others compute. Of programs that read their weights once, decode steps, this is much.
    kernels_s: the products of attention kernels at the chip's peak.
    cycles_s: the compiler's `estimated_cycles`; where it gives none, the same larger time at the chip's full rates.
    sent_bytes: {mesh axes: {kind: bytes a device sends}}, by the ring algorithm.
    network_s: the time those take one after another, by `bandwidth`.
    gradients_s: of it the reduce-scatters over `fsdp`.
    Nothing of a paged kernel is in any of them: what it reads follows from the rows' lengths.
    """

    flops: float
    hbm_bytes: float
    roofline_s: float
    roofline_once_s: float
    overlapped_s: float
    kernels_s: float
    cycles_s: float
    sent_bytes: dict[str, dict[str, float]]
    network_s: float
    gradients_s: float


@dataclass(frozen=True)
class Place:
    """Where a device is: its slice, and its coordinates on that slice's torus."""

    slice: int
    coords: tuple[int, ...]


def cost(module: Module, mesh: dict[str, int], places: Sequence[Place]) -> Cost:
    """mesh: axis names and sizes in the order in which devices are numbered; places: of each of them, in that order."""
    total_flops = hbm_bytes = roofline_s = roofline_once_s = kernels_s = cycles_s = network_s = gradients_s = 0.0
    overlapped_s = 0.0
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for where, i, times in executed(module):
        if i.opcode in FREE or i.opcode == "custom-call" and PAGED in i.name:
            continue
        kinds = [(piece, kind) for piece in nested(module, i) if (kind := collective_kind(piece))]
        for piece, kind in kinds:
            group = one_of_each_slice(places) if piece.opcode == "send" else groups_of(piece, len(places))
            size = times * sent_by(piece, kind, len(group))
            sent[axes_of(group, mesh)][kind] += size
            taken_s = size / bandwidth([places[device] for device in group], places)
            network_s += taken_s
            gradients_s += taken_s if (kind, axes_of(group, mesh)) == ("reduce-scatter", "fsdp") else 0.0
        if i.opcode in ("send", "recv", "send-done", "recv-done"):  # the host's work: the compiler cannot tell
            continue
        work = sum(product_flops(piece, home) for home, piece in with_homes(module, where, i))
        kernel = kernel_flops(i)
        moved = traffic(module, where, i)
        total_flops += times * (work + kernel)
        hbm_bytes += times * moved
        bytes_s = moved / v5p.COMPILER_BYTES_PER_S
        roofline_s += times * max(work / v5p.COMPILER_FLOPS, bytes_s)
        roofline_once_s += max(work / v5p.COMPILER_FLOPS, bytes_s)
        if not is_fetch(i):
            fetched_s = fetched(where, i) / v5p.COMPILER_BYTES_PER_S
            overlapped_s += times * max(work / v5p.COMPILER_FLOPS, bytes_s + fetched_s)
        kernels_s += times * kernel / v5p.FLOPS
        if not kinds and i.opcode not in ASYNC_OPS:
            fastest_s = max((work + kernel) / v5p.FLOPS, moved / v5p.HBM_BYTES_PER_S)
            cycles_s += times * (estimated_cycles(i) / v5p.CLOCK_HZ or fastest_s)
    by_axes = {axes: dict(kinds) for axes, kinds in sent.items()}
    times_s = (roofline_s, roofline_once_s, overlapped_s, kernels_s, cycles_s)
    return Cost(total_flops, hbm_bytes, *times_s, by_axes, network_s, gradients_s)


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
    sides = [re.search(rf'block_{of}(?:_dkv)?\\*": (\d+)', i.attributes) for of in ("q", "kv")]
    window = re.search(r"window_(\d+|None)/", i.attributes)
    queries, keys = (int(side.group(1)) if side else 0 for side in sides)
    if not queries or not keys or not window:
        raise HloError(f"{i.name}: an attention kernel without its blocks or its window")
    taken = arrays(str(i.attribute("operand_layout_constraints")))
    *heads, T, H = next(a.shape for a in taken if a.dtype in ("bf16", "f32") and len(a.shape) > 2)  # q
    seen = None if window.group(1) == "None" else int(window.group(1))
    products = 2 if named.group(1) == "fwd" else 5  # backward: logits again, and for dv, dp, dk, dq
    return 2.0 * products * prod(heads) * H * flops.block_pairs(T, queries, keys, seen)


def traffic(module: Module, where: Computation, i: Instruction) -> float:
    """Bytes of HBM read and written by one run of an instruction."""
    if i.opcode == "custom-call" and "AllocateBuffer" in i.attributes:
        return 0.0
    if i.opcode in READS_PART:
        return 2 * sum(a.bytes for a in i.arrays if a.space == HBM)
    if i.opcode in WRITES_PART:
        return 2 * where.by_name[i.operands[1]].arrays[0].bytes
    if i.opcode == "copy-start":  # (target, source, flag)
        return float(sum(a.bytes for a in i.arrays[:2] if a.space == HBM))
    inner = module.computations[str(i.attribute("calls"))] if i.opcode == "fusion" else None
    updates = updates_in_place(inner, len(i.arrays)) if inner else [None] * len(i.arrays)
    results = [update or a.bytes for a, update in zip(i.arrays, updates, strict=True) if a.space == HBM]
    written = float(sum(results))
    read = 0.0
    for at, name in enumerate(i.operands):
        source = where.by_name[name]
        whole = sum(a.bytes for a in source.arrays if a.space == HBM)
        read += min(whole, part_read(module, inner, at)) if inner and whole else whole
    return read + written


def is_fetch(i: Instruction) -> bool:
    """A copy from HBM to VMEM that others do not wait for: (target, source, flag)."""
    return i.opcode == "copy-start" and i.arrays[0].space != HBM and i.arrays[1].space == HBM


def fetched(where: Computation, i: Instruction) -> float:
    """Bytes of HBM that were copied to VMEM for this instruction."""
    done = [where.by_name[name] for name in i.operands if where.by_name[name].opcode == "copy-done"]
    starts = [where.by_name[one.operands[0]] for one in done]
    return float(sum(start.arrays[1].bytes for start in starts if is_fetch(start)))


def updates_in_place(inner: Computation, results: int) -> list[int | None]:
    """For each result of a fusion the bytes that an update in place writes; None where the whole result is written."""
    ends = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    found: list[int | None] = []
    for name in ends:
        end = inner.by_name[name]
        while end.opcode == "bitcast":
            end = inner.by_name[end.operands[0]]
        found.append(inner.by_name[end.operands[1]].arrays[0].bytes if end.opcode in WRITES_PART else None)
    return found if len(found) == results else [None] * results


def part_read(module: Module, inner: Computation, at: int) -> float:
    """Bytes that a fusion reads of its operand number `at`: where only slices are used, only those."""
    if at >= len(inner.parameters):
        return float("inf")
    names, total = [inner.parameters[at].name], 0.0
    while names:
        name = names.pop()
        if inner.by_name[name].root:
            return float("inf")
        for user in inner.instructions:
            if name not in user.operands:
                continue
            within = module.computations[str(user.attribute("calls"))] if user.opcode == "fusion" else None
            if user.opcode == "bitcast" or within and only_bitcasts(within):
                names.append(user.name)
            elif within:
                total += sum(part_read(module, within, k) for k, used in enumerate(user.operands) if used == name)
            elif user.opcode in READS_PART and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif not (user.opcode in WRITES_PART and user.operands[0] == name):
                return float("inf")
    return total


def only_bitcasts(within: Computation) -> bool:
    return all(i.opcode in ("bitcast", "parameter") for i in within.instructions)


def collective_kind(i: Instruction) -> str | None:
    """all-gather and the like; None for anything else, and for the end of an asynchronous one.

    Between slices a collective is a transfer by the hosts: a `send` that names its kind, and a `recv`.
    """
    if i.opcode == "send" and (found := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)):
        kind = found.group(1).lower().replace("_", "-")
        return kind if kind in COLLECTIVES else "collective-permute"
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


def one_of_each_slice(places: Sequence[Place]) -> list[int]:
    first: dict[int, int] = {}
    for device, place in enumerate(places):
        first.setdefault(place.slice, device)
    return list(first.values())


def axes_of(group: list[int], mesh: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ, as in "replica+fsdp"."""
    found = [coordinates(device, mesh) for device in group]
    return "+".join(axis for at, axis in enumerate(mesh) if len({c[at] for c in found}) > 1) or "none"


def coordinates(device: int, mesh: dict[str, int]) -> tuple[int, ...]:
    found = []
    for size in reversed(mesh.values()):
        device, at = divmod(device, size)
        found.append(at)
    return tuple(reversed(found))


def bandwidth(group: list[Place], everyone: Sequence[Place]) -> float:
    """Bytes a second that a member can send around its group: two links for each torus axis that the group spans.

    One where that axis does not close to a ring: below 4 chips, or where the group has but a part of it.
    Across slices it is the DCN's.
    """
    if len({place.slice for place in group}) > 1:
        return v5p.DCN_BYTES_PER_S
    links = 0
    for axis in range(len(group[0].coords)):
        spanned = {place.coords[axis] for place in group}
        whole = 1 + max(place.coords[axis] for place in everyone)
        if len(spanned) > 1:
            links += 2 if len(spanned) == whole >= v5p.SMALLEST_RING else 1
    return max(links, 1) * v5p.ICI_BYTES_PER_S / 6


def sent_by(i: Instruction, kind: str, n: int) -> float:
    """Bytes that each of n devices sends, around their ring."""
    arrays = i.arrays[:1] if i.opcode == "send" else i.arrays
    if i.opcode.endswith("-start") and kind == "all-gather":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    size = float(sum(a.bytes for a in arrays))
    if kind == "collective-permute":
        return size / (2 if i.opcode.endswith("-start") else 1)
    share = {"all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    return size * (n - 1) if kind == "reduce-scatter" else size * share[kind]
