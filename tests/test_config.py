"""The border of the configuration: every choice crosses, everything wrong is refused by name."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from gemma.config import ConfigError, Mesh, fill
from gemma.schedule import rate
from launch.weights import defaults
from orchestrator.change import Change, Kind, changes, extending, kind_of, rates, refuse
from orchestrator.config import Config, flatten, from_container, typed_keys

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.glob("*/*.yaml"))
# What a choice cannot do without.
NEEDS = {"data/text": ["data.path=/somewhere"], "cluster/ray": ["cluster.address=head:6379"]}


def container(*overrides: str) -> dict[str, Any]:
    """What Hydra hands over, resolved."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = OmegaConf.to_container(compose("run", list(overrides)), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def config_of(*overrides: str) -> Config:
    return from_container(container(*overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_crosses_into_config(choice: str) -> None:
    config = config_of(choice.replace("/", "="), *NEEDS.get(choice, []))
    group, _, name = choice.partition("/")
    chosen = {"model": config.model.name, "data": config.data.source, "cluster": config.cluster.kind}
    assert chosen.get(group, name) == name


def test_the_yaml_holds_every_key_of_config_and_no_other() -> None:
    """A provider's section is there with that provider, and null with others; evaluate's with launch.evaluate, and
    serve's in a file of its own.
    """
    found = {key for kind in ("local", "gcp", "gke") for key in flatten(container(f"cluster={kind}"))}
    assert found == {key for key, _ in typed_keys(Config) if not key.startswith(("evaluate.", "serve."))}
    served = {key for key in flatten(defaults([], "serve")) if key.startswith("serve.")}
    assert served == {key for key, _ in typed_keys(Config) if key.startswith("serve.")}
    assert container()["cluster"]["gcp"] is container()["cluster"]["gke"] is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+train.stepz=3", r"train\.stepz: unknown key; did you mean train\.steps"),
        ("+optimizer.lr=3", r"optimizer\.lr: unknown key; did you mean optim\.lr"),
        ("+nonsense.key=3", r"nonsense\.key: unknown key; sections are run, model"),
        ("+nonsense={}", r"nonsense: unknown key; sections are run, model"),
        ("~train.steps", r"train\.steps: missing"),
        ("~retry", r"retry: missing"),
        ("train.steps=many", r"train\.steps=many: must be a whole number"),
        ("train.steps=1.5", r"train\.steps=1\.5: must be a whole number"),
        ("train.steps=null", r"train\.steps=None: must be a whole number"),
        ("train.steps=true", r"train\.steps=True: must be a whole number"),
        ("optim.lr=true", r"optim\.lr=True: must be a number"),
        ("optim.lr=fast", r"optim\.lr=fast: must be a number"),
        ("model.name=true", r"model\.name=True: must be text"),
        ("run.root=null", r"run\.root=None: must be text"),
        ("resume.allow_data_change=1", r"resume\.allow_data_change=1: must be true or false"),
        ("train.dtype=float16", r"train\.dtype=float16: must be one of 'float32', 'bfloat16'"),
        ("wandb.mode=foo", r"wandb\.mode=foo: must be one of 'auto', 'online', 'offline', 'disabled'"),
        ("profile.steps=abc", r"profile\.steps=abc: must be a list of whole numbers"),
        ("profile.steps=[1,x]", r"profile\.steps=.*: must be a list of whole numbers"),
        ("profile.steps=[true,3]", r"profile\.steps=.*: must be a list of whole numbers"),
        ("profile.steps=[3,2]", r"profile\.steps=\[3, 2\]: must be \[\] or"),
        ("train.steps=0", r"train\.steps=0: must be at least 1"),
        ("train.accumulation=3", r"train\.accumulation=3: must divide train\.batch=8"),
        ("optim.lr=0", r"optim\.lr=0: must be above 0"),
        ("optim.lr=nan", r"optim\.lr=nan"),
        ("optim.lr=inf", r"optim\.lr=inf"),
        ("optim.beta1=1", r"optim\.beta1=1"),
        ("optim.beta2=1", r"optim\.beta2=1"),
        ("optim.eps=-1", r"optim\.eps=-1"),
        ("optim.clip_norm=0", r"optim\.clip_norm=0: must be above 0, or null"),
        ("data.path=/x", r"data\.path=/x: only data=text"),
        ("data=text", r"data\.path: missing"),
        ("data.eval_fraction=0.7", r"data\.eval_fraction=0\.7: must lie between"),
        ("run.id='a/b'", r"run\.id=a/b: letters"),
        ("run.id=-x", r"run\.id=-x: letters"),
        ("cluster.slice=v5p-17", r"cluster\.slice=v5p-17: no such slice; allowed: v5p-8,"),
        ("cluster.num_slices=0", r"cluster\.num_slices=0: must be at least 1"),
        ("cluster=ray", r"cluster\.address: missing; cluster=ray needs"),
        ("guard.action=ignore", r"guard\.action=ignore: must be one of 'skip', 'rollback', 'stop'"),
        ("guard.spike_sigmas=-1", r"guard\.spike_sigmas=-1: must be at least 0, and finite; 0 is off"),
        ("guard.warmup=1", r"guard\.warmup=1: must lie in 2\.\."),
        ("guard.rollback_steps=0", r"guard\.rollback_steps=0: must be at least 1"),
        ("guard.budget=101", r"guard\.budget=101: must lie in 0\.\.100"),
        ("~guard", r"guard: missing"),
        ("retry.budget=-1", r"retry\.budget=-1: must be at least 0"),
        ("fitness.slow_factor=1", r"fitness\.slow_factor=1: must be above 1, or null"),
        ("fitness.free_share=1.1", r"fitness\.free_share=1\.1: must lie between 0 and 1"),
        ("fitness.check=1", r"fitness\.check=1: must be true or false"),
        ("chaos.faults=[chip@3:save]", r"chaos\.faults=chip@3:save: must be KIND"),
        ("timeout.check_s=0", r"timeout\.check_s=0: must be above 0"),
        ("timeout.step_s=0", r"timeout\.step_s=0: must be above 0"),
        ("checkpoint.keep_last=0", r"checkpoint\.keep_last=0: must be at least 1"),
        ("model.layers=3", r"model\.layers=3: must be even"),
        ("model.kv_heads=3", r"model\.kv_heads=3: must divide model\.heads=4"),
        ("model.vocab=128", r"model\.vocab=128: the byte tokenizer needs at least 260"),
        ("mesh.fsdp=0", r"mesh\.fsdp=0: must be -1 \(fill\) or at least 1"),
        ("train.batch=12", r"train\.batch=12: must be a multiple of 8"),
        ("data.sequence=8193", r"data\.sequence=8193: tiny was made for at most 8192"),
        ("mesh.tensor=4", r"mesh\.tensor=4: must divide model\.kv_heads=2; allowed: \[1, 2\]"),
        ("model.width=60", r"mesh\.fsdp=8: must divide model\.width=60"),
        ("mesh.fsdp=3", r"mesh\.fsdp=3 .*: makes 3 chips, the cluster has 8; what would fit: mesh\.fsdp=8"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^.*{expected}") as refused:
        config_of(override)
    assert "\n" not in str(refused.value)


def test_an_unknown_override_without_plus_is_refused_by_hydra_itself() -> None:
    with pytest.raises(HydraException, match="stepz"):
        config_of("train.stepz=3")


@pytest.mark.parametrize("slices", [2, 4])
def test_replica_must_be_a_multiple_of_the_slices(slices: int) -> None:
    overrides = [f"cluster.num_slices={slices}", "train.batch=64"]
    with pytest.raises(ConfigError, match=f"mesh.replica=1: must be a multiple of cluster.num_slices={slices}"):
        config_of(*overrides)
    assert config_of(*overrides, "mesh=multislice").program.mesh.replica == slices


@pytest.mark.parametrize(
    ("mesh", "chips", "filled"),
    [
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 16, (2, 4, 2)),
        ((-1, 4, 2), 8, (1, 4, 2)),
        ((1, 4, -1), 8, (1, 4, 2)),
        ((1, 4, 2), 8, (1, 4, 2)),
    ],
)
def test_minus_one_fills_the_mesh(mesh: tuple[int, int, int], chips: int, filled: tuple[int, int, int]) -> None:
    assert fill(Mesh(*mesh), chips).shape == filled


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ((-1, -1, 1), "only one axis may be -1"),
        ((3, -1, 1), "3 does not divide the 8 chips"),
        ((1, -1, 16), "16 does not divide the 8 chips"),
        ((1, 4, 1), "makes 4 chips, the cluster has 8; what would fit: mesh.fsdp=8"),
        ((3, 1, 1), "makes 3 chips, the cluster has 8; what would fit: mesh.replica=1 mesh.fsdp=8 mesh.tensor=1"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(mesh: tuple[int, int, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"mesh.replica={mesh[0]} mesh.fsdp={mesh[1]} .*{expected}"):
        fill(Mesh(*mesh), 8)


def resumed(base: dict[str, Any], **new: Any) -> tuple[Config, Config, list[Change]]:
    """The run before and after a resume with other values, and what it changes."""
    old = asdict(from_container(base))
    container = {**base, "optim": dict(old["optim"])}
    for key, value in new.items():
        section, _, name = key.partition("__")
        container[section] = {**container[section], name: value}
    config = from_container(container)
    return from_container(base), config, changes(flatten(old), flatten(asdict(config)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [401, 800, 100000])
def test_more_steps_are_safe_and_leave_the_rate_of_every_step_as_it_was(schedule: str, steps: int) -> None:
    before, after, found = resumed(container(f"optim.schedule={schedule}", "train.steps=400"), train__steps=steps)
    assert [(c.key, c.kind) for c in found] == [("train.steps", Kind.SAFE)]
    assert before.optim == after.optim  # so the step's program is the same as well
    last, first = rate(before.optim, 399), rate(after.optim, 400)
    assert abs(first - last) < 0.03 * before.optim.lr
    assert f"learning rate of step 401: {first:.3g} as before" in rates(before.optim, after.optim, 400, steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_no_change_that_alters_a_rate_to_come_is_safe(schedule: str) -> None:
    """Of every key there is: of those that are safe, none is one that the schedule is made of."""
    values = {"lr": 1e-3, "schedule": "linear", "warmup_steps": 100, "decay_steps": 600, "wsd_decay_steps": 200}
    values |= {"final_lr_ratio": 0.5}
    if schedule == "linear":
        values["schedule"] = "cosine"
    altered = 0
    for name, value in values.items():
        base = container(f"optim.schedule={schedule}", "train.steps=400")
        before, after, found = resumed(base, **{f"optim__{name}": value})
        same = all(rate(before.optim, step) == rate(after.optim, step) for step in range(0, 1000, 5))
        altered += not same
        assert same or {c.kind for c in found} == {Kind.TRAINING}
    assert altered >= 2


def test_a_jump_of_the_rate_is_printed() -> None:
    before, after, _ = resumed(container("train.steps=400"), train__steps=800, optim__decay_steps=800)
    assert rates(before.optim, after.optim, 400, 800) == (
        f"learning rate of step 401: 0.0003 -> {rate(after.optim, 400):.3g}; of step 800, the last: 0.0003"
    )
    assert rate(after.optim, 400) > 5 * rate(before.optim, 400)


@pytest.mark.parametrize("overrides", [[], ["optim.schedule=wsd"], ["optim.schedule=constant"], ["train.steps=3"]])
def test_the_values_proposed_after_a_finished_run_are_allowed(overrides: list[str]) -> None:
    base = container(*overrides)
    config = from_container(base)
    text = extending(config.optim, config.train.steps)
    proposed = dict(word.split("=") for word in text.split() if word.startswith("optim.") and "=" in word)
    more = {"train.steps": str(2 * config.train.steps), **proposed}
    _, after, found = resumed(base, **{k.replace(".", "__"): int(v) if v.isdigit() else v for k, v in more.items()})
    refuse(found, False)
    assert rate(after.optim, config.train.steps) == rate(config.optim, config.train.steps)


def test_every_key_has_a_kind_and_what_makes_the_model_or_the_data_is_never_safe() -> None:
    kinds = {key: kind_of(key) for key, _ in typed_keys(Config)}
    for section in ("model", "data", "optim", "mesh", "guard"):
        assert Kind.SAFE not in {kind for key, kind in kinds.items() if key.startswith(f"{section}.")}
    for section in ("eval", "checkpoint", "profile", "wandb", "timeout", "retry"):
        assert {kind for key, kind in kinds.items() if key.startswith(f"{section}.")} == {Kind.SAFE}
    never_safe = {"train.seed", "train.batch", "train.dtype", "train.accumulation", "train.init_from", "run.id"}
    assert not {key for key in never_safe if kinds[key] is Kind.SAFE}


@pytest.mark.parametrize(
    ("key", "allowed", "allowed_with_data_change"),
    [
        ("train.steps", True, True),
        ("mesh.fsdp", True, True),
        ("train.seed", False, True),
        ("model.width", False, False),
    ],
)
def test_data_changes_need_leave_and_the_model_never_changes(
    key: str, allowed: bool, allowed_with_data_change: bool
) -> None:
    found = changes({key: 1, "train.dtype": "float32"}, {key: 2, "train.dtype": "float32"})
    assert [(c.key, c.old, c.new) for c in found] == [(key, 1, 2)]
    for leave, passes in ((False, allowed), (True, allowed_with_data_change)):
        if passes:
            refuse(found, leave)
        else:
            with pytest.raises(ConfigError, match=f"^{key}=2: .*1"):
                refuse(found, leave)
