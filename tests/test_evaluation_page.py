"""The results of an evaluation: the table, results side by side, and one self-contained page that no text can break."""

import json
import math
import re
import tomllib
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from orchestrator.evaluation import page, table
from orchestrator.page.page import digest
from orchestrator.record.source import files
from tests import test_chat_page as chat
from tests.test_report import TOP, Tags

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}<!--&\'\x00\ud800\u2028]]>'
SHOWN = page.SAMPLES

browser = chat.page  # the fixture


def row(name: str, **more: Any) -> dict[str, Any]:
    said = {
        "name": name,
        "title": name.upper(),
        "table": "quality",
        "how": "5-shot, top-1",
        "metric": "acc",
        "higher_is_better": True,
        "state": "done",
        "value": 71.04,
        "low": 70.26,
        "high": 71.83,
        "documents": 14042,
        "chance": 25.0,
        "published": {"2B": 51.3, "9B": 71.3, "27B": 75.2},
        "note": "",
        "parts": [],
        "contaminated": None,
        "seconds": 2.0,
    }
    return said | more


def missing(name: str, state: str, why: str) -> dict[str, Any]:
    kept = ("name", "title", "table", "how", "metric", "higher_is_better", "published")
    return {key: value for key, value in row(name).items() if key in kept} | {"state": state, "why": why}


def results(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    said = {"run": "some", "model": "gemma2_9b", "weights": "weights/9b", "step": None, "suite": "card", "chat": False}
    said |= {"limit": None, "examples": False, "platform": "cpu", "dtype": "float32", "digest": "abc"}
    return said | {"rows": list(rows)} | more


def eventful() -> dict[str, Any]:
    """What a row can be."""
    parts = [{"name": n, "value": v, "documents": 100} for n, v in (("law", 40.0), ("anatomy", 60.1), ("logic", 50.2))]
    return results(
        row("mmlu", parts=parts, note="Five fixed examples.", contaminated=0.012),
        row("piqa", value=75.0, low=74.1, high=75.9, note="Other examples.", chance=None),
        row("arc", note="Five fixed examples."),
        missing("drop", "no data", "drop/dev.json"),
        missing("mbpp", "not run", "evaluate.run_code=false"),
        row("toxigen", table="safety", higher_is_better=False, published={"9B": 39.3}, value=39.0, low=38.0, high=40.0),
    )


def sample(doc: int, score: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"part": "law", "doc": doc, "prompt": "Q", "answer": "A", "target": "B", "score": score} | more


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name.upper()))


def test_a_line_has_the_value_its_interval_the_card_s_numbers_and_the_difference_from_the_model_s_size() -> None:
    shown = table.text(eventful())
    assert line_of(shown, "mmlu").split() == [
        *("MMLU", "5-shot,", "top-1", "71.0", "[70.3,", "71.8]", "14,042", "51.3", "71.3", "75.2", "-0.3"),
        *("1.2", "%", "(1)"),
    ]
    assert "+3.7*" in line_of(shown, "piqa")  # the card's number is outside the interval
    assert "* the card's number of 9B" in shown
    assert "TOXIGEN ↓" in shown


@pytest.mark.parametrize("model", ["tiny", "gemma2_3b", "gemma2_9bx"])
def test_a_model_that_the_card_does_not_have_is_not_compared_to_it(model: str) -> None:
    found = eventful() | {"model": model}
    assert "vs " not in table.text(found)
    assert not {"own", "apart"} & {name for _, one in Tags(page.render(found, {})).seen for name in classes(one)}
    assert {"own", "apart"} <= {name for _, one in Tags(page.render(eventful(), {})).seen for name in classes(one)}


def classes(attributes: dict[str, str | None]) -> list[str]:
    return (attributes.get("class") or "").split()


def test_the_numbers_of_a_column_stand_below_one_another() -> None:
    shown = table.text(eventful())
    assert line_of(shown, "mmlu").index("-0.3") == line_of(shown, "piqa").index("+3.7*")
    assert len({line_of(shown, name).index("71.3  75.2") for name in ("mmlu", "piqa", "arc")}) == 1


def test_what_has_no_numbers_says_why() -> None:
    for shown in (table.text(eventful()), Tags(page.render(eventful(), {})).text):
        assert "no data: drop/dev.json" in shown
        assert "not run: evaluate.run_code=false" in shown


def test_a_number_is_said_not_to_be_the_card_s_where_it_cannot_be() -> None:
    for more, said in (({"limit": 50}, "at most 50 documents"), ({"examples": True}, "the documents are examples")):
        found = eventful() | more
        assert f"WARNING: {said}" in table.text(found)
        assert f"WARNING: A: {said}" in table.compare([found], [{}])
        assert said in Tags(page.render(found, {})).text
        assert said not in table.text(eventful()) + page.render(eventful(), {})


def test_notes_are_numbered_and_a_note_of_two_rows_is_one() -> None:
    shown = table.text(eventful())
    assert [line_of(shown, name).split()[-1] for name in ("mmlu", "piqa", "arc")] == ["(1)", "(2)", "(1)"]
    assert [line for line in shown.splitlines() if line.startswith("(")] == [
        "(1) Five fixed examples.",
        "(2) Other examples.",
    ]
    tags = Tags(page.render(eventful(), {}))
    assert [one["value"] for tag, one in tags.seen if tag == "li" and "value" in one] == ["1", "2"]
    assert tags.text.count("MMLU, ARC") == 1


def test_a_reason_longer_than_a_line_goes_on_below_itself() -> None:
    shown = table.text(results(row("mmlu"), missing("drop", "not run", "because " * 40)))
    lines = [line for line in shown.splitlines() if "because" in line]
    assert len(lines) > 2
    assert all(len(line) <= table.WIDTH for line in lines)
    assert {len(line) - len(line.lstrip()) for line in lines[1:]} == {lines[0].index("not run")}


def test_a_paired_difference_is_that_of_the_documents_which_both_have() -> None:
    first = {("law", 0): 1.0, ("law", 1): 0.0, ("law", 2): 0.0, ("law", 3): 0.5, ("law", 9): 1.0}
    second = {("law", 0): 1.0, ("law", 1): 1.0, ("law", 2): 0.0, ("law", 3): 1.0, ("other", 9): 0.0}
    found = table.paired(first, second)
    each = [0.0, 100.0, 0.0, 50.0]
    assert found is not None
    assert (found.documents, found.mean) == (4, pytest.approx(fmean(each)))
    assert found.high - found.mean == pytest.approx(1.959964 * stdev(each) / math.sqrt(4), rel=1e-6)
    assert found.low == pytest.approx(2 * found.mean - found.high)
    assert table.paired(first, {("law", 7): 1.0}) is None
    one = table.paired({("law", 0): 0.0}, {("law", 0): 1.0})
    assert one is not None
    assert (one.mean, math.isnan(one.low)) == (100.0, True)


def test_results_stand_side_by_side_the_card_without_pairs() -> None:
    scores = {"mmlu": {("law", doc): float(doc % 2) for doc in range(100)}}
    better = {"mmlu": {("law", doc): float(doc % 2 or doc < 20) for doc in range(100)}}
    other = results(row("mmlu", value=80.5, how="0-shot"), row("piqa"), run="other", step=300)
    shown = table.compare([{"card": "9B"}, results(row("mmlu")), other], [{}, scores, better])
    assert "C - B" in shown
    assert "B - A" not in shown
    assert shown.startswith("A  Gemma 2's model card, 9B\nB  gemma2_9b, weights weights/9b; run some\n")
    said = line_of(shown, "mmlu")
    assert "5-shot, top-1 / 0-shot  71.3 " in said
    half = 1.959964 * math.sqrt(10 * 90 / 99)  # of 100 differences, 10 are 100 and 90 are 0
    assert said.endswith(
        f"71.3  71.0 [70.3, 71.8]  80.5 [70.3, 71.8]  +10.0 [{10 - half:+.1f}, {10 + half:+.1f}]*    100"
    )
    assert line_of(shown, "piqa").split()[-1] == "–"  # nothing to pair
    assert "pairs" not in table.compare([results(row("mmlu")), {"card": "27B"}], [scores, {}])


def test_the_same_result_twice_differs_by_nothing() -> None:
    scores = {"mmlu": {("law", doc): doc / 10 for doc in range(10)}}
    said = line_of(table.compare([eventful()] * 2, [scores] * 2), "mmlu")
    assert "+0.0 [+0.0, +0.0] " in said
    assert "*" not in said


def whole(content: str) -> Tags:
    tags = Tags(content)
    assert not tags.open
    assert [one.get("type") for tag, one in tags.seen if tag == "script"] == ["application/json", None]
    return tags


def test_the_page_shows_values_intervals_parts_in_order_and_the_card() -> None:
    tags = whole(page.render(eventful(), {}))
    for said in ("71.0", "70.3 – 71.8", "14,042", "1.2 % contaminated", "2B 51.3, 9B 71.3, 27B 75.2", "by chance 25.0"):
        assert said in tags.text
    places = [tags.text.index(name) for name in ("anatomy", "logic", "law")]
    assert places == sorted(places)
    within = [one for tag, one in tags.seen if tag == "rect" and one["class"] == "within"]
    assert (within[0]["x"], within[0]["width"]) == ("70.26%", "1.57%")
    own = [one for tag, one in tags.seen if tag == "g" and one["class"] == "card own"]
    assert len(own) == len(eventful()["rows"])


def test_the_page_refers_to_nothing_outside_itself_and_runs_its_own_script_alone() -> None:
    content = page.render(eventful(), {"mmlu": [sample(1)]})
    tags = whole(content)
    for tag, attributes in tags.seen:
        assert tag not in {"link", "img", "iframe", "object", "base", "image", "use", "a"}
        assert not [name for name in attributes if name in {"src", "href", "style"} or name.startswith("on")]
    for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "innerHTML", "import("):
        assert word not in content
    (policy,) = [one["content"] for tag, one in tags.seen if tag == "meta" and "http-equiv" in one]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        **dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'"),
        "script-src": f"'{digest(tags.inside['script'][1])}'",
        "style-src": f"'{digest(tags.inside['style'][0])}'",
    }


def test_an_interval_beyond_the_scale_ends_with_it() -> None:
    tags = whole(
        page.render(results(row("mmlu", value=1.0, low=-1.0, high=3.0), row("piqa", low=99.0, high=101.0)), {})
    )
    within = [one for tag, one in tags.seen if tag == "rect" and one["class"] == "within"]
    assert [(one["x"], one["width"]) for one in within] == [("0.00%", "3.00%"), ("99.00%", "1.00%")]


def test_what_a_result_leaves_out_is_left_out() -> None:
    found = results(row("mmlu", published={}, how=""), row("piqa", table="other"))
    for key in ("platform", "step", "suite", "chat", "limit", "examples", "digest"):
        del found[key]
    for key in ("chance", "parts", "contaminated", "seconds", "note"):
        del found["rows"][0][key]
    assert "71.0" in table.text(found)
    assert "71.0" in table.compare([found, found], [{}, {}])
    assert "71.0" in whole(page.render(found, {})).text


def hostile() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    found = eventful() | dict.fromkeys(("run", "model", "weights", "suite", "platform", "dtype", "digest"), HOSTILE)
    for one in found["rows"]:
        one |= {"title": HOSTILE, "how": HOSTILE, "metric": HOSTILE, "why": HOSTILE, "note": HOSTILE}
        one["parts"] = [{"name": HOSTILE, "value": 1.0, "documents": 1}]
    texts = dict.fromkeys(("part", "prompt", "answer", "taken", "target"), HOSTILE)
    return found, {"mmlu": [sample(1, choices=[[HOSTILE, -1.0]], **texts)]}


def test_no_text_becomes_markup() -> None:
    calm = whole(page.render(eventful(), {"mmlu": [sample(1)]}))
    content = page.render(*hostile())
    tags = whole(content)
    assert {tag for tag, _ in tags.seen} == {tag for tag, _ in calm.seen}
    assert {name for _, one in tags.seen for name in one} == {name for _, one in calm.seen for name in one}
    assert tags.inside["script"][1:] == calm.inside["script"][1:]
    assert tags.drawn()["mmlu"][0]["prompt"] == HOSTILE
    assert "<img" not in content
    assert "{{ 7 * 7 }}" in tags.text
    content.encode()
    assert "\x00" not in table.text(hostile()[0])


def test_samples_are_few_as_many_right_as_wrong_and_the_same_each_time(tmp_path: Path) -> None:
    def written(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + '{"torn": ')
        return page.read_samples(tmp_path)[name]

    many = [sample(doc, float(doc % 10 == 0)) for doc in range(2000)]
    found = written("mmlu", many)
    assert [sum(one["score"] == score for one in found) for score in (0.0, 1.0)] == [SHOWN // 2, SHOWN // 2]
    assert [one["doc"] for one in found] == sorted(one["doc"] for one in found)
    assert max(one["doc"] for one in found) > 1000  # not the first ones
    assert written("backwards", many[::-1])[::-1] == found
    few = written("few", [sample(doc, float(doc < 3)) for doc in range(500)])
    assert [sum(one["score"] == score for one in few) for score in (0.0, 1.0)] == [SHOWN - 3, 3]
    assert len(written("right", [sample(doc) for doc in range(7)])) == 7
    drawn = whole(page.render(results(row("mmlu"), row("none")), {"mmlu": many, "none": [], "gone": many})).drawn()
    assert {name: len(those) for name, those in drawn.items()} == {"mmlu": SHOWN}  # also where more is given


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = f"first {'x' * 10_000} last"
    short, long = page.bounded(sample(1, prompt="y" * page.LETTERS)), page.bounded(sample(1, prompt=text))
    assert short["prompt"] == "y" * page.LETTERS
    assert len(long["prompt"]) <= page.LETTERS
    assert long["prompt"].startswith("first x")
    assert long["prompt"].endswith("x last")
    left_out = int(re.findall(r"\[… ([\d,]+) characters are left out here …\]", long["prompt"])[0].replace(",", ""))
    assert long["prompt"].count("x") + left_out == 10_000
    assert page.bounded(long) == long


@pytest.mark.parametrize("odd", ["x", [1], {"a": 1}, None, True, float("nan"), 10**30])
def test_a_sample_of_another_shape_breaks_nothing(odd: Any) -> None:
    found = dict.fromkeys(("part", "doc", "prompt", "answer", "taken", "target", "score", "choices"), odd)
    tags = whole(page.render(results(row("mmlu")), {"mmlu": [found, {}, found | {"choices": [[odd, odd], odd]}]}))
    assert len(tags.drawn()["mmlu"]) == 3


def test_the_page_s_files_travel_with_the_code() -> None:
    packaged = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    needed = {path for path in page.FOLDER.iterdir() if path.name.startswith("page.") and path.suffix != ".py"}
    assert {path.name for path in needed} == {"page.html", "page.css", "page.js"}
    assert needed <= {path for pattern in packaged["orchestrator.evaluation"] for path in page.FOLDER.glob(pattern)}
    assert {path.relative_to(TOP).as_posix() for path in needed} <= set(files())


@pytest.mark.skipif(not (chat.BROWSER and chat.DRIVER), reason="needs Debian's chromium and chromium-driver")
def test_samples_are_leafed_through_filtered_and_searched_in_a_browser(browser: chat.Page, tmp_path: Path) -> None:
    (_, samples), path = hostile(), tmp_path / "page.html"
    samples["mmlu"] += [sample(doc, float(doc % 2), prompt=f"What is {doc}? (a+") for doc in range(2, 12)]
    path.write_text(page.render(eventful(), samples))

    def text(css: str) -> str:
        return str(browser.run(f"return document.querySelector({css!r}).textContent"))

    browser.complaints()
    browser.open(f"{path.as_uri()}#row-mmlu")
    place = "#row-mmlu .leaf output"
    chat.until(lambda: browser.run(f"return Boolean(document.querySelector({place!r}))"), "the samples")
    assert text(place) == "1 of 11"
    assert browser.run("return document.querySelector('.viewer .prompt').textContent.startsWith('</script><script>')")
    assert browser.run("return document.querySelectorAll('img, script').length") == 2
    browser.click("#row-mmlu .on")
    assert (text(place), text(".viewer .prompt")) == ("2 of 11", "What is 2? (a+")
    browser.click("#row-mmlu [data-want=wrong]")
    assert (text(place), text(".viewer .verdict")) == ("1 of 5", "wrong")
    browser.write("#row-mmlu input", "8? (A+")
    assert (text(place), text(".viewer .prompt mark")) == ("1 of 1", "8? (a+")
    browser.write("#row-mmlu input", "z")
    assert text(place) == "none"
    assert browser.complaints() == []
