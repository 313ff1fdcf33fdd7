"""The house: which folder may import what, how long a file may be, what it may not be called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
LINES = 500
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Rooms of gemma/ that load no JAX when they are imported, beside the files at its top: what the controller and the
# commands may use.
PLAIN_ROOMS = {"batching", "memory", "plan", "text", "weights"}
NEVER = {
    "gemma": {"ray", "hydra", "wandb", "orchestrator", "launch", "tests"},
    "orchestrator": {"hydra", "launch", "tests"},
    "launch": {"tests"},
}
# A process of their own each; JAX inside their functions, so that importing them costs nothing.
JAX_INSIDE = {"orchestrator/hosts/worker.py", "launch/convert.py"}
WORKER_OPENS = {
    *(
        "gemma.engine.server",
        "gemma.score.scorer",
        "gemma.train.evaluator",
        "gemma.train.fitness",
        "gemma.train.trainer",
    )
}
CODE = [p.relative_to(TOP).as_posix() for folder in NEVER for p in sorted((TOP / folder).rglob("*.py"))]
PYTHON = [*CODE, *(p.relative_to(TOP).as_posix() for p in sorted((TOP / "tests").rglob("*.py")))]


def imports(nodes: Iterator[ast.AST], file: str) -> set[str]:
    """Dotted names; `from a.b import c` counts as a.b.c."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: none of a function's body, none of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from when_imported(node)


@pytest.mark.parametrize("file", CODE)
def test_a_folder_imports_only_what_the_house_allows(file: str) -> None:
    folder = file.split("/")[0]
    tree = ast.parse((TOP / file).read_text())
    anywhere, at_once = imports(ast.walk(tree), file), imports(when_imported(tree), file)
    assert not {name for name in anywhere if name.split(".")[0] in NEVER[folder]}
    if folder == "gemma":
        return
    judged = at_once if file in JAX_INSIDE else anywhere
    assert not {name for name in judged if name.split(".")[0] in JAX}
    assert not {name for name in judged if not is_plain(name)}
    if file == "orchestrator/hosts/worker.py":
        assert {".".join(name.split(".")[:3]) for name in anywhere if not is_plain(name)} <= WORKER_OPENS


def is_plain(name: str) -> bool:
    """Whether a dotted name is outside gemma/, at its top, or in one of its plain rooms."""
    folder, *rest = name.split(".")
    return folder != "gemma" or rest[0] in PLAIN_ROOMS or (TOP / "gemma" / f"{rest[0]}.py").is_file()


PLAIN = ", ".join(
    file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for file in CODE
    if file.startswith("gemma/") and (file.count("/") == 1 or file.split("/")[1] in PLAIN_ROOMS)
)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "launch.train, launch.resume, launch.status, launch.report, launch.convert, launch.plan, launch.cluster,"
            " launch.logs, launch.stop",
            {"ray", "wandb", *JAX},
        ),
        ("orchestrator.run, orchestrator.hosts.worker", JAX),
        (PLAIN, {"ray", "hydra", "wandb", "orchestrator", "launch", *JAX}),
    ],
)
def test_importing_loads_nothing_heavy_behind_its_back(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("file", PYTHON)
def test_a_file_is_named_for_what_it_is(file: str) -> None:
    vague = {"util", "utils", "helper", "helpers", "common", "base", "manager", "misc"}
    assert not vague & set(Path(file).with_suffix("").parts)


@pytest.mark.parametrize("file", PYTHON)
def test_a_file_is_at_most_500_lines(file: str) -> None:
    assert len((TOP / file).read_text().splitlines()) <= LINES


def test_conf_holds_values_only() -> None:
    assert {p.suffix for p in (TOP / "conf").rglob("*") if p.is_file()} == {".yaml"}
