"""Eight CPU devices in one process, and a program small enough to compile in a second."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma.config import Checkpoint, Data, Eval, Guard, Mesh, Model, Optim, Profile, Program, Train
from gemma.text import tokens
from tests import existing_cluster as existing
from tests.runs import RUN, SMALL, finish, launch
from tests.small_text import TEXTS, VOCAB, config, write_jsonl

# Before anything imports jax. The hosts of a simulated slice set their own. Unoptimised code compiles twice as fast.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"


@pytest.fixture(scope="session")
def program() -> Program:
    """Rows of 16 tokens from byte text, 8 a step, for one device; every size divides by the meshes of 8 devices."""
    return Program(
        model=Model(
            name="small",
            vocab=264,
            width=16,
            layers=2,
            heads=4,
            kv_heads=2,
            head_size=8,
            hidden=32,
            window=4,
            attention_cap=50.0,
            final_cap=30.0,
            query_scale=0.5,
            context=64,
            rope_base=10000.0,
            norm_eps=1e-6,
        ),
        data=Data(
            source="stdlib",
            path=None,
            text_key="text",
            tokenizer="byte",
            sequence=16,
            eval_fraction=0.1,
            max_document_mb=128,
        ),
        mesh=Mesh(replica=1, fsdp=1, tensor=1),
        optim=Optim(
            lr=1e-2,
            schedule="cosine",
            warmup_steps=2,
            decay_steps=10,
            wsd_decay_steps=None,
            final_lr_ratio=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=Train(
            steps=10,
            tokens=None,
            batch=8,
            seed=0,
            dtype="float32",
            accumulation=1,
            remat="none",
            loss_chunk=8,
            init_from=None,
            reduce_dtype="auto",
        ),
        eval=Eval(every=0, rows=8, sets=None, tasks=(), limit=None, data=None),
        checkpoint=Checkpoint(
            every=0,
            every_minutes=0.0,
            keep_last=1,
            keep_every=0,
            snapshot="auto",
            snapshot_cost=0.01,
            memory_idle_s=60.0,
        ),
        profile=Profile(steps=()),
        guard=Guard(action="skip", spike_sigmas=0.0, warmup=100, rollback_steps=1, budget=10),
        evaluate=None,
        serve=None,
    )


@pytest.fixture
def opened(tmp_path: Path) -> tokens.Tokens:
    """Each of 200 documents twice, the copies far apart."""
    return tokens.open_tokens(config(write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS)), tmp_path / "cache", VOCAB)


@pytest.fixture
def existing_cluster() -> Iterator[str]:
    """The address of a Ray cluster that somebody else has started."""
    with existing.cluster() as address:
        yield address


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the Trainers of all tests share: equal programs are compiled once a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a local run with the settings SMALL that nothing befell."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(launch("train", f"run.root={folder.parent}", f"run.id={folder.name}", *SMALL), 0)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a local run with the settings RUN that nothing befell."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(launch("train", f"run.root={folder.parent}", f"run.id={folder.name}", *RUN), 0)
    return folder
