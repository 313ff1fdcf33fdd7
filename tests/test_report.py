"""launch.report: one page, whole and self-contained, whatever a run directory holds."""

import json
import re
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gemma.digest import seal, unseal
from orchestrator.page.history import read
from orchestrator.page.page import FOLDER, digest, page
from orchestrator.record import rundir
from orchestrator.record.goodput import BUCKETS
from orchestrator.record.source import files
from tests.runs import launch
from tests.test_rundir import fabricate

BEGAN = 1_800_000_000.0
HOSTILE = '</script><script>alert("x")</script>{{ 7 * 7 }}<!--&\'\x00\ud800\u2028]]>'
VOID = {"meta", "br", "link", "img", "input", "hr"}
TOP = Path(__file__).parents[1]


def row(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    at = BEGAN + 10 + step + 20 * (attempt - 1)
    values = {"loss": 5.0 / step, "bits_per_byte": 2.0, "tokens_per_s": 1000.0 + step % 7, "step_s": 1.0, "ok": 1.0}
    return {"step": step, "attempt": attempt, "time": at} | values | more


def incident(number: int, **more: Any) -> dict[str, Any]:
    said = {
        "outcome": "host died",
        "rank": 1,
        "step": 5,
        "evidence": f"evidence of {number}",
        "decision": "Restart: go",
    }
    return {"time": BEGAN + 12 + number, "attempt": number, "source": "memory", "steps_lost": 2} | said | more


def told(folder: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]], **goodput: Any) -> Path:
    for name, found in (("metrics", rows), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    if goodput:
        rundir.write_json(folder / "goodput.json", goodput)
    return folder


def eventful(folder: Path) -> Path:
    """Two attempts, steps done again, a bad step, an incident, an eval, a checkpoint."""
    rows = [row(step) for step in range(1, 11)] + [row(step, 2) for step in range(8, 21)]
    rows[3] |= {"loss": float("nan"), "ok": 0.0}
    del rows[5]["loss"], rows[6]["tokens_per_s"], rows[7]["time"]
    events = [
        {"time": BEGAN + at, "event": event, "attempt": attempt, "step": 0} | more
        for at, event, attempt, more in (
            (0.0, "phase", 0, {"name": "reserve"}),
            (1.0, "phase", 1, {"name": "start"}),
            (10.0, "phase", 1, {"name": "step"}),
            (20.0, "phase", 1, {"name": "down"}),
            (21.0, "phase", 2, {"name": "step"}),
            (45.0, "eval", 2, {"loss": 0.3, "duration_s": 0.5}),
            (50.0, "commit", 2, {"step": 20}),
            (50.0, "finish", 2, {}),
        )
    ]
    buckets = {"step": 30.0, "start": 9.0, "down": 11.0}
    return told(folder, rows, events, wall_s=50.0, goodput=0.6, restarts=1, buckets=buckets, incidents=[incident(1)])


def page_of(folder: Path, state: str = "finished") -> str:
    return page(read(folder, state, BEGAN + 60))


class Tags(HTMLParser):
    """Every tag with its attributes; whether each is closed in turn; the text between."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]].append(data)
        else:
            self.text += data

    def drawn(self) -> dict[str, Any]:
        """What the page's script draws."""

        def refused(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        return json.loads(self.inside["script"][0], parse_constant=refused)


def assert_whole(content: str) -> Tags:
    tags = Tags(content)
    assert not tags.open
    assert [a.get("type") for tag, a in tags.seen if tag == "script"] == ["application/json", None]
    assert set(tags.drawn()) == {"training", "time", "buckets"}
    return tags


def bare(folder: Path) -> Path:
    return folder


def one_step(folder: Path) -> Path:
    return told(folder, [row(1)], [])


def no_values(folder: Path) -> Path:
    events = [{"time": BEGAN, "event": "failure"}, {"event": "eval"}, {"time": "x"}]
    rows = [{"step": 1}, {"loss": 2.0}, {"step": None}, {"step": 2, "loss": "low", "ok": None}]
    return told(folder, rows, events, wall_s=None, goodput=None, buckets={"step": None, "new": 3.0}, incidents=[{}])


def torn(folder: Path) -> Path:
    eventful(folder)
    (folder / "goodput.json").write_text('{"wall_s": 1')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    return folder


def damaged(folder: Path) -> Path:
    """Every value of another kind than it should be, and as large as can be."""
    odd: list[Any] = ["x", [1], {"a": 1}, None, True, 10**400, -(10**400), 1e308, -1e308]
    rows = [dict.fromkeys(row(1), value) for value in odd] + [row(1) | {"step": value} for value in odd]
    events = [
        {"time": time, "event": "failure", "attempt": value, "step": value} for value in odd for time in (1e308, 1)
    ]
    events += [{"time": BEGAN, "event": value, "name": value} for value in odd]
    events += [
        {"time": BEGAN, "event": name, "name": v, "seconds": v, "duration_s": v, "attempt": v, "loss": v, "step": v}
        for name in ("phase", "eval", "commit", "save", "bad_step", "restore", "decision")
        for v in odd
    ]
    incidents = [incident(1) | dict.fromkeys(incident(1), value) for value in odd]
    spent = {"step": 3.0} | {str(index): value for index, value in enumerate(odd)}
    told(folder, rows, events, wall_s=[1], goodput="x", restarts=odd, buckets=spent, incidents=incidents)
    found = json.loads((folder / "manifest.json").read_text())  # mistyped itself, it is refused: test_damaged_files
    found["config"] = seal(unseal(found["config"]) | {"data": None, "optim": [1], "mesh": 3})
    found |= {"mesh": {"a": [1]}, "created": 1e308, "parent": {"a": 1}}
    (folder / "manifest.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("made", [bare, one_step, no_values, torn, eventful, damaged])
@pytest.mark.parametrize("state", ["running", "died", "finished"])
def test_the_page_is_well_formed_whatever_the_run_has_told(tmp_path: Path, made: Any, state: str) -> None:
    assert_whole(page_of(made(fabricate(tmp_path, "some", created=BEGAN)), state))


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    content = page_of(eventful(fabricate(tmp_path, "some", created=BEGAN)))
    for tag, attributes in Tags(content).seen:
        assert tag not in {"link", "img", "iframe", "object", "base", "image", "use"}
        assert not [name for name in attributes if name in {"src", "href", "style"} or name.startswith("on")]
    for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon", "import("):
        assert word not in content
    assert set(re.findall(r"https?://[^\"' )]*", content)) == {"https://github.com/leeoniya/uPlot"}  # in its notice


def test_the_browser_runs_the_pages_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    tags = Tags(page_of(eventful(fabricate(tmp_path, "some", created=BEGAN))))
    (policy,) = [a["content"] for tag, a in tags.seen if tag == "meta" and "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        **dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'"),
        "script-src": f"'{digest(tags.inside['script'][1])}'",
        "style-src": f"'{digest(tags.inside['style'][0])}'",
    }


def test_the_page_carries_the_licence_of_what_it_contains(tmp_path: Path) -> None:
    licence = (FOLDER / "uplot-1.6.32/LICENSE").read_text()
    assert "Leon Sorokin" in licence
    assert licence in page_of(fabricate(tmp_path, "some", created=BEGAN))


def test_the_pages_files_travel_with_the_code() -> None:
    packaged = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    needed = {path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(needed) == 6
    assert {path for pattern in packaged["orchestrator.page"] for path in FOLDER.glob(pattern)} == needed
    assert {path.relative_to(TOP).as_posix() for path in needed} <= set(files())


def test_each_bucket_has_a_colour_of_its_own() -> None:
    colours = re.findall(r"--b-(\w+):(#\w+);", (FOLDER / "report.css").read_text())
    assert [name for name, _ in colours] == list(BUCKETS)
    assert len({colour for _, colour in colours}) == len(BUCKETS)


def test_what_befell_the_run_is_among_what_is_drawn(tmp_path: Path) -> None:
    found = Tags(page_of(eventful(fabricate(tmp_path, "some", created=BEGAN)))).drawn()
    training, time_ = found["training"], found["time"]
    assert [chart["name"] for chart in training["charts"]] == ["loss", "bits_per_byte", "tokens_per_s"]
    loss = training["charts"][0]
    values = dict(zip(loss["x"], loss["kept"], strict=True))
    assert (values[3], values[4], values[6], values[20]) == (1.66667, None, None, 0.25)
    assert (training["attempts"], training["again"]) == ([[2, 7]], [[8, 10]])
    assert [bad[0] for bad in training["bad"]] == [4, 6]
    assert [phase[:3] for phase in time_["phases"]][:3] == [[0, 1, "reserve"], [1, 10, "start"], [10, 20, "step"]]
    assert time_["commits"] == [[50, 20, 20]]
    assert time_["incidents"] == [[13, 1, "host died, rank 1, after step 5"]]
    assert time_["length_s"] == 50


def test_each_incident_has_its_row_and_its_mark(tmp_path: Path) -> None:
    folder = eventful(fabricate(tmp_path, "some", created=BEGAN))
    found = json.loads((folder / "goodput.json").read_text())
    rundir.write_json(folder / "goodput.json", found | {"incidents": [incident(number) for number in range(1, 9)]})
    tags = Tags(page_of(folder))
    rows = [attributes["id"] for tag, attributes in tags.seen if tag == "tr" and "id" in attributes]
    assert rows == [f"incident-{number}" for number in range(1, 9)]
    assert [index for _, index, _ in tags.drawn()["time"]["incidents"]] == list(range(1, 9))
    assert all(f"evidence of {number}" in tags.text for number in range(1, 9))


def test_without_incidents_in_goodput_the_failures_are_told_from_the_events(tmp_path: Path) -> None:
    folder = eventful(fabricate(tmp_path, "some", created=BEGAN))
    (folder / "goodput.json").unlink()
    at = {"time": BEGAN + 51, "attempt": 2, "step": 20}
    file = rundir.Appender(folder / "events.jsonl")
    file.write(at | {"event": "failure", "outcome": "hang", "rank": 0, "evidence": "too late", "detect_s": 3.0})
    file.write(at | {"event": "decision", "decision": "Restart", "reason": "one of three"})
    (one,) = read(folder, "died", 0.0).incidents
    assert (one.time, one.outcome, one.decision) == (BEGAN + 48, "hang", "Restart: one of three")
    assert "too late" in Tags(page_of(folder)).text


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    calm, folder = (eventful(fabricate(tmp_path / name, "some", created=BEGAN)) for name in ("calm", "hostile"))
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    found["attempts"][0] |= {"command": HOSTILE, "overrides": [HOSTILE]}
    found |= {"id": HOSTILE, "git_commit": HOSTILE, "versions": {HOSTILE: HOSTILE}, "mesh": {HOSTILE: HOSTILE}}
    config = unseal(found["config"])
    config["model"]["name"] = config["cluster"]["slice"] = HOSTILE
    found["config"] = seal(config)
    path.write_text(json.dumps(found))
    goodput = json.loads((folder / "goodput.json").read_text())
    texts = dict.fromkeys(("outcome", "rank", "evidence", "decision", "source", "steps_lost"), HOSTILE)
    goodput |= {"incidents": [incident(1, **texts)], "restarts": HOSTILE}
    goodput["buckets"][HOSTILE] = 50.0
    (folder / "goodput.json").write_text(json.dumps(goodput))
    events = folder / "events.jsonl"
    events.write_text(events.read_text().replace('"name": "down"', f'"name": {json.dumps(HOSTILE)}'))
    content = page_of(folder, HOSTILE)
    tags = assert_whole(content)
    assert {tag for tag, _ in tags.seen} == {tag for tag, _ in assert_whole(page_of(calm)).seen}
    assert {name for _, attributes in tags.seen for name in attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "id", "type", "data-chart"),
        *("viewbox", "preserveaspectratio", "role", "aria-label", "x", "y", "width", "height"),
    }
    assert content.count("&lt;script&gt;") >= 10
    assert "{{ 7 * 7 }}" in tags.text
    assert "49" not in re.findall(r"<title>(.*)</title>", content)[0]
    shown = HOSTILE.replace("\x00", "\ufffd")
    assert shown.split("\ud800")[0] in tags.text
    read = HOSTILE.replace("\ud800", "?")  # as jsonfile reads a lone surrogate
    assert read in {phase[2] for phase in tags.drawn()["time"]["phases"]}
    assert tags.inside["script"][1:] == Tags(page_of(calm)).inside["script"][1:]
    content.encode()


def test_a_hundred_thousand_steps_take_under_a_megabyte_and_three_seconds(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "some", created=BEGAN)
    rows = [row(step, 1 + step // 5000, ok=float(step % 50 != 0)) for step in range(1, 100_001)]
    events = [
        {"time": BEGAN + 10 * number, "event": event, "attempt": 1, "step": number, "name": name, "duration_s": 1.0}
        for number in range(10_000)
        for event, name in (("phase", "save" if number % 2 else "step"), ("commit", ""), ("eval", ""), ("save", ""))
    ]
    told(folder, rows, events, incidents=[incident(number) for number in range(1000)])
    began = time.process_time()
    content = page_of(folder)
    assert time.process_time() - began < 10.0  # 2 s where nothing else runs
    assert len(content.encode()) < 1_000_000


def test_one_odd_step_among_a_hundred_thousand_is_drawn(tmp_path: Path) -> None:
    rows = [row(step, loss=2.0 + step % 2) for step in range(1, 100_001)]
    rows[54_321]["loss"] = 9.0
    loss = Tags(page_of(told(fabricate(tmp_path, "odd", created=BEGAN), rows, []))).drawn()["training"]["charts"][0]
    assert len(loss["x"]) < 5000
    assert loss["kept"][loss["x"].index(54_322)] == 9.0
    assert loss["kept"].count(9.0) == 1


def test_the_time_between_two_controllers_belongs_to_neither(tmp_path: Path) -> None:
    folder = eventful(fabricate(tmp_path, "some", created=BEGAN))
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    day = 86400.0
    found["attempts"] = [
        {"command": c, "overrides": [], "time": BEGAN + at} for c, at in (("train", 0), ("resume", day))
    ]
    path.write_text(json.dumps(found))
    file = rundir.Appender(folder / "events.jsonl")
    file.write({"time": BEGAN + day + 1, "event": "phase", "attempt": 2, "step": 20, "name": "reserve"})
    first, second = read(folder, "running", BEGAN + day + 4).controllers
    assert (first.began, first.ended, first.end) == (BEGAN, BEGAN + 50, "finished")
    assert (second.began, second.ended, second.end) == (BEGAN + day + 1, BEGAN + day + 4, "running")
    assert "resumed 23 h 59 min later" in Tags(page_of(folder, "running")).text


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["run=some"], 0, "some/report.html\n"),
        (["run=latest", "to={root}/other.html"], 0, "other.html\n"),
        (["--help"], 0, "run.root"),
        (["run=none"], 1, "report: run=none: no such run"),
        ([], 1, "report: run: missing"),
        (["run=some", "steps=3"], 1, "report: steps: unknown key"),
        (["run=some", "to={root}/no/such/page.html"], 1, "report: to={root}/no/such/page.html: cannot be written"),
        (["run=some", "to={root}"], 1, "report: to={root}: cannot be written (it is a directory)"),
    ],
)
def test_the_command_prints_the_page_s_path_or_one_line(
    tmp_path: Path, overrides: list[str], code: int, said: str
) -> None:
    folder = eventful(fabricate(tmp_path, "some", created=BEGAN))
    asked = [override.format(root=tmp_path) for override in overrides]
    process = launch("report", f"run.root={tmp_path}", *asked)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    text = out if code == 0 else err
    assert said.format(root=tmp_path) in text
    assert code == 0 or (out == "" and err.count("\n") == 1)
    if said.endswith("html\n"):
        written = Path(out.strip())
        assert written.parent == (folder if overrides == ["run=some"] else tmp_path)
        assert_whole(written.read_text(encoding="utf-8"))
    assert not list(tmp_path.rglob("*partial*"))
