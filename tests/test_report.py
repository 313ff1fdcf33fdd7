"""launch.report: one page, whole and self-contained, whatever a run directory holds."""

import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.page.history import read
from orchestrator.page.page import page
from orchestrator.record import rundir
from tests.runs import launch
from tests.test_rundir import fabricate

BEGAN = 1_800_000_000.0
HOSTILE = '<script>alert("x")</script>&\'\x00\ud800]]>'
VOID = {"meta", "br", "link", "img", "input", "hr"}


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
        self.text += data


def assert_whole(content: str) -> Tags:
    tags = Tags(content)
    assert not tags.open
    drawings = re.findall(r"<svg.*?</svg>", content, re.S)
    assert len(drawings) >= 3
    for drawing in drawings:
        assert "nan" not in re.sub(r"<title>.*?</title>", "", drawing, flags=re.S).lower()
        ET.fromstring(drawing)
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


@pytest.mark.parametrize("made", [bare, one_step, no_values, torn, eventful])
@pytest.mark.parametrize("state", ["running", "died", "finished"])
def test_the_page_is_well_formed_whatever_the_run_has_told(tmp_path: Path, made: Any, state: str) -> None:
    assert_whole(page_of(made(fabricate(tmp_path, "some", created=BEGAN)), state))


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    content = page_of(eventful(fabricate(tmp_path, "some", created=BEGAN)))
    for tag, attributes in Tags(content).seen:
        assert tag not in {"script", "link", "img", "iframe", "object", "base", "image", "use"}
        for name, value in attributes.items():
            assert name != "src"
            assert not name.startswith("on")
            assert name != "href" or (value or "").startswith("#")
    assert "@import" not in content
    assert "url(" not in content
    assert set(re.findall(r"https?://[^\"' ]*", content)) == {"http://www.w3.org/2000/svg"}


def test_each_incident_has_its_row_and_its_mark(tmp_path: Path) -> None:
    folder = eventful(fabricate(tmp_path, "some", created=BEGAN))
    found = json.loads((folder / "goodput.json").read_text())
    rundir.write_json(folder / "goodput.json", found | {"incidents": [incident(number) for number in range(1, 9)]})
    tags = Tags(page_of(folder))
    rows = [attributes["id"] for tag, attributes in tags.seen if tag == "tr" and "id" in attributes]
    assert rows == [f"incident-{number}" for number in range(1, 9)]
    assert {a["href"] for tag, a in tags.seen if tag == "a"} == {f"#{name}" for name in rows}
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
    found["config"]["model"]["name"] = found["config"]["cluster"]["slice"] = HOSTILE
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
        *(
            "lang",
            "charset",
            "name",
            "content",
            "http-equiv",
            "class",
            "style",
            "id",
            "href",
            "xmlns",
            "viewbox",
            "role",
        ),
        *("aria-label", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "text-anchor", "d", "cx", "cy", "r"),
    }
    assert content.count("&lt;script&gt;") >= 10
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


def test_one_odd_step_among_a_hundred_thousand_is_seen(tmp_path: Path) -> None:
    calm, odd = (fabricate(tmp_path / name, "some", created=BEGAN) for name in ("calm", "odd"))
    rows = [row(step, loss=2.0 + step % 2) for step in range(1, 100_001)]
    told(calm, rows, [])
    rows[54_321]["loss"] = 9.0
    told(odd, rows, [])
    assert "2.0000 to 9.0000" in page_of(odd)
    assert "2.0000 to 9.0000" not in page_of(calm)


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
        assert_whole(written.read_text())
    assert not list(tmp_path.rglob("*partial*"))
