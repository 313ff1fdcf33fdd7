"""What a step needs and takes, by arithmetic alone: rough, instant, for choosing what to compile.

B batch, T time, D width, N query heads, K kv heads, H head size, F hidden, V vocabulary, P layer pairs; all of a chip.
"""

from dataclasses import dataclass

from gemma.config import Program
from gemma.plan import flops, v5p

RECOMPUTED = {"none": 0.0, "dots": 0.0, "narrow": 0.5, "full": 1.0}  # of the forward products, in the backward pass
UPDATE_BYTES = 28  # a parameter: itself and two moments read and written, its gradient read, float32
SNAPSHOT_COPY_SHARE = 0.05  # of HBM at most is a copy of the state that lies there while a step runs
LAYERS_IN_FLIGHT = 2  # a pair is rematerialised and gathered at once


@dataclass(frozen=True)
class Rough:
    hbm_bytes: float
    step_s: float


def rough(program: Program, num_slices: int = 1) -> Rough:
    """HBM of a chip, and the seconds of a step with nothing overlapped."""
    return Rough(hbm_bytes(program), compute_s(program) + network_s(program, num_slices) + update_s(program))


def tokens(program: Program) -> float:
    """Of a chip, in a microbatch."""
    train, mesh = program.train, program.mesh
    return train.batch / mesh.batch_shards / train.accumulation * program.data.sequence


def hbm_bytes(program: Program) -> float:
    model, mesh, train = program.model, program.mesh, program.train
    width = 2 if train.dtype == "bfloat16" else 4
    embedding, other = flops.parameters(model)
    state = 16 * (embedding + other) / (mesh.fsdp * mesh.tensor)  # weights, two moments, gradients, float32
    state *= 1 + 0.75 * state_copies(program)  # of all but the gradients
    layer = other / model.layers / mesh.tensor * width
    table = embedding / mesh.tensor * width
    rows = program.train.batch / mesh.batch_shards / train.accumulation
    logits = 2 * 4 * model.vocab / mesh.tensor * min(train.loss_chunk, program.data.sequence) * rows
    kept = tokens(program) * width * model.layers // 2 * pair_elements(program, train.remat)
    wide = 3 * model.hidden / mesh.tensor + 6 * model.width
    working = LAYERS_IN_FLIGHT * (tokens(program) * width * wide + 2 * layer)
    return state + kept + max(working, 2 * table + logits)


def state_copies(program: Program) -> int:
    """Of weights and moments, beside a step: on their way to host memory, and to disk. None where they are large:
    training waits for them then (`gemma.checkpoint.snapshot.fits_beside`).
    """
    kept, mesh = program.checkpoint, program.mesh
    copy_bytes = 12 * sum(flops.parameters(program.model)) / (mesh.fsdp * mesh.tensor)
    if copy_bytes > SNAPSHOT_COPY_SHARE * v5p.HBM_BYTES:
        return 0
    return (kept.snapshot != "off") + (kept.every > 0 or kept.every_minutes > 0)


def pair_elements(program: Program, remat: str) -> float:
    """Numbers a token that the forward pass keeps of a pair of layers."""
    model, tensor = program.model, program.mesh.tensor
    D, N, K, H, F = model.width, model.heads, model.kv_heads, model.head_size, model.hidden
    narrow = 2 * ((2 * N * H + 2 * K * H) / tensor + 2 * D)
    dots = narrow + 2 * 2 * F / tensor
    return D + {"full": 0.0, "narrow": narrow, "dots": dots, "none": dots + 2 * (2 * F / tensor + 12 * D)}[remat]


def compute_s(program: Program) -> float:
    model, train = program.model, program.train
    chips = program.mesh.batch_shards * program.mesh.tensor
    products = flops.step_flops(model, train.batch, program.data.sequence) / chips
    return products * (1 + RECOMPUTED[train.remat] / 3) / v5p.COMPILER_FLOPS


def network_s(program: Program, num_slices: int) -> float:
    model, mesh, train = program.model, program.mesh, program.train
    width = 2 if train.dtype == "bfloat16" else 4
    weights = sum(flops.parameters(model)) / mesh.tensor * width
    gathers = 2 if train.remat == "none" else 3  # forward, backward, gradients
    fsdp = weights * gathers * (mesh.fsdp - 1) / mesh.fsdp * train.accumulation
    replica = 2 * 2 * weights / mesh.fsdp * (mesh.replica - 1) / mesh.replica  # float32 sums of the shards
    across = 4 + 2 * RECOMPUTED[train.remat]  # all-reduces of a layer over `tensor`
    moved = tokens(program) * train.accumulation * model.width * width
    tensor = across * model.layers * 2 * moved * (mesh.tensor - 1) / mesh.tensor
    slow = v5p.DCN_BYTES_PER_S if num_slices > 1 else v5p.ICI_BYTES_PER_S
    link = v5p.ICI_BYTES_PER_S / 6  # of a torus `tensor` has one axis, `fsdp` the rest
    return fsdp / (4 * link) + tensor / (2 * link) + replica / slow


def update_s(program: Program) -> float:
    """The optimizer's, bound by HBM: whatever the batch, so more rows are cheaper a row."""
    held = sum(flops.parameters(program.model)) / (program.mesh.fsdp * program.mesh.tensor)
    return UPDATE_BYTES * held / v5p.HBM_BYTES_PER_S
