"""The best mesh, remat and batch on a slice, and the smallest slice: arithmetic prunes, the compiler decides."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from gemma.config import ConfigError, Mesh, Train, check
from gemma.plan import analytic, v5p
from orchestrator.config import Config
from orchestrator.plan import ahead, plan
from orchestrator.slices.topology import TOPOLOGIES

REMAT: tuple[Any, ...] = get_args(get_type_hints(Train)["remat"])
MOST_ROWS, MOST_TOKENS = 8, 65536  # of a chip's batch: whichever is more
TRIES = 4
CLEARLY_LESS = 0.75  # the next try after one that did not fit
REMAT_DISTANCE = 2.0  # another policy is as far as a mesh with one axis halved and another doubled
MARGIN = 0.25  # by which arithmetic may err about memory


def candidates(config: Config, overridden: set[str]) -> Iterator[Config]:
    """Every config of the slice that contradicts nothing. What the command line gave stays as it is."""
    chips, slices = config.chips, config.cluster.num_slices
    for mesh in meshes(config, overridden, chips):
        if mesh.replica % slices:
            continue
        for remat in [config.train.remat] if "train.remat" in overridden else REMAT:
            shards = mesh.batch_shards
            rows = rows_a_chip(config.data.sequence)
            for batch in [config.train.batch] if "train.batch" in overridden else [n * shards for n in rows]:
                train = replace(config.train, remat=remat, batch=batch)
                found = replace(config, mesh=mesh, train=train)
                try:
                    check(found.program)
                except ConfigError:
                    continue
                yield found


def rows_a_chip(sequence: int) -> list[int]:
    """1, 2, 4 and so on: short rows need many for a chip to be busy."""
    return [2**n for n in range(max(MOST_ROWS, MOST_TOKENS // sequence).bit_length())]


def meshes(config: Config, overridden: set[str], chips: int) -> Iterator[Mesh]:
    powers = [n for n in range(1, chips + 1) if chips % n == 0]
    for fsdp in powers:
        for tensor in (n for n in powers if chips % (fsdp * n) == 0):
            mesh = Mesh(chips // (fsdp * tensor), fsdp, tensor)
            fixed = {
                key: getattr(config.mesh, key) for key in ("replica", "fsdp", "tensor") if f"mesh.{key}" in overridden
            }
            if all(value in (-1, getattr(mesh, key)) for key, value in fixed.items()):
                yield mesh


def likely(config: Config, overridden: set[str]) -> list[Config]:
    """What arithmetic says may fit, the fastest a token first."""
    slices, limit = config.cluster.num_slices, v5p.HBM_BYTES * (1 + MARGIN)
    found = []
    for candidate in candidates(config, overridden):
        rough = analytic.rough(candidate.program, slices)
        if rough.hbm_bytes < limit:
            found.append((rough.step_s / candidate.train.batch, rough.hbm_bytes, candidate))
    return [candidate for *_, candidate in sorted(found, key=lambda entry: entry[:2])]


def best(config: Config, overridden: set[str], plain: list[str], tell: ahead.Tell) -> list[plan.Plan]:
    """Compiles plan.compiles of the likeliest that fit, and ranks them by tokens/s with the network unhidden.

    What does not fit rules out what needs more by the same arithmetic. Raises ConfigError where nothing can fit.
    """
    found: list[plan.Plan] = []
    too_much = float("inf")
    for candidate in likely(config, overridden):
        needed = analytic.hbm_bytes(candidate.program)
        if needed >= too_much:
            continue
        answer = ahead.facts_of(candidate, tell)
        made = plan.make(candidate, answer.facts, overrides(candidate, plain), answer.cached)
        found.append(made)
        if not made.fits:
            too_much = min(too_much, needed)
        if sum(p.fits for p in found) >= config.plan.compiles or len(found) >= 3 * config.plan.compiles:
            break
    if not found:
        why = "fits by arithmetic" if any(candidates(config, overridden)) else "goes with what was given"
        shown = ", ".join(plain) or "nothing"
        raise ConfigError(f"plan.search: no mesh, remat and batch on {config.cluster.slice} {why} ({shown})")
    return sorted(found, key=lambda p: (not p.fits, p.step_s.serial / p.batch if p.step_s else 0.0))


def smallest(config: Config, overridden: set[str], plain: list[str], tell: ahead.Tell) -> list[plan.Plan]:
    """The first slice, from small to large, on which what by arithmetic needs least there fits; of it the best.

    What needs least is slow: one row, every axis cut.
    """
    for name in TOPOLOGIES:
        there = replace(config, cluster=replace(config.cluster, slice=name, topology=None))
        least = min(candidates(there, overridden), key=lambda c: analytic.hbm_bytes(c.program), default=None)
        if least is None or analytic.hbm_bytes(least.program) > v5p.HBM_BYTES * (1 + MARGIN):
            continue
        answer = ahead.facts_of(least, tell)
        here = [f"cluster.slice={name}", *(o for o in plain if not o.startswith("cluster.slice="))]
        made = plan.make(least, answer.facts, overrides(least, here), answer.cached)
        if made.fits:
            found = best(there, overridden, here, tell)
            return found if found[0].fits else [made, *found]
    raise ConfigError(f"model={config.model.name}: fits on no slice up to {name} with what was given")


def nearest(config: Config, tell: ahead.Tell) -> Config | None:
    """The config most like this one that fits: another mesh, or other remat; of equally near ones the fastest. None
    after a few tries.
    """

    def distance(other: Config) -> tuple[float, float]:
        old, new = config.program.mesh.shape, other.program.mesh.shape
        moved = sum(abs(math.log2(a / b)) for a, b in zip(old, new, strict=True))
        moved += REMAT_DISTANCE * (config.train.remat != other.train.remat)
        return moved, analytic.rough(other.program, config.cluster.num_slices).step_s

    too_much = min(v5p.HBM_BYTES, CLEARLY_LESS * analytic.hbm_bytes(config.program))
    tried = 0
    for candidate in sorted(candidates(config, {"train.batch"}), key=distance):
        needed = analytic.hbm_bytes(candidate.program)
        if needed >= too_much or tried == TRIES:
            continue
        answer = ahead.facts_of(candidate, tell)
        if plan.make(candidate, answer.facts, [], answer.cached).fits:
            return candidate
        too_much, tried = CLEARLY_LESS * needed, tried + 1
    return None


def overrides(config: Config, plain: list[str]) -> list[str]:
    """The line to paste: what was given, and what was found."""
    mesh, train = config.mesh, config.train
    chosen = {
        "mesh.replica": mesh.replica,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
        "train.batch": train.batch,
        "train.remat": train.remat,
    }
    rest = [o for o in plain if o.partition("=")[0] not in chosen]
    return [*rest, *(f"{key}={value}" for key, value in chosen.items())]
