"""The chat page in a real browser: headless Chromium by WebDriver, where both are installed."""

import json
import shutil
import subprocess
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_front import serving, wait_idle

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference to one
ENTER = "\ue007"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,700"]

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver")


class Page:
    """A browser's one page."""

    def __init__(self, port: int):
        self.driver = f"http://127.0.0.1:{port}"
        options = {"binary": BROWSER, "args": FLAGS}
        asked = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        self.session = f"{self.driver}/session/{send(f'{self.driver}/session', asked)['sessionId']}"

    def open(self, address: str) -> None:
        send(f"{self.session}/url", {"url": address})

    def one(self, css: str) -> str:
        found = send(f"{self.session}/element", {"using": "css selector", "value": css})
        return f"{self.session}/element/{found[ELEMENT]}"

    def write(self, css: str, text: str) -> None:
        send(f"{self.one(css)}/value", {"text": text})

    def click(self, css: str) -> None:
        send(f"{self.one(css)}/click", {})

    def run(self, script: str) -> Any:
        return send(f"{self.session}/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in send(f"{self.session}/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(b64decode(send(f"{self.session}/screenshot")))


def send(address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data), timeout=60) as answer:
        return json.loads(answer.read())["value"]


def until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        started = next(line for line in driver.stdout if "successfully on port" in line)
        made = Page(int(started.rstrip(".\n").rsplit(" ", 1)[1]))
        yield made
        urllib.request.urlopen(urllib.request.Request(made.session, method="DELETE"), timeout=60).close()
    finally:
        driver.kill()
        driver.wait()


def shown(page: Page) -> str:
    return str(page.run("return [...document.querySelectorAll('.turn')].at(-1)?.textContent ?? ''"))


def test_an_answer_streams_in_and_its_speed_is_told(page: Page, tmp_path: Path) -> None:
    with serving(steps_s=0.1) as (address, router):
        page.open(address)
        until(lambda: page.run("return document.title") == "gemma-2", "the model's name")
        page.run("document.getElementById('max_tokens').value = 40")
        page.write("#text", f"Hello{ENTER}")
        early = until(lambda: shown(page), "the first tokens")
        until(lambda: page.run("return document.getElementById('send').textContent") == "Send", "the end")
        whole = shown(page)
        assert whole.startswith(early)
        assert len(whole) > len(early)  # it was shown before it was whole
        note = page.run("return document.querySelector('.note').textContent")
        assert "first token" in note
        assert "40 tokens, " in note
        assert page.run("return document.querySelector('.user').textContent") == "Hello"
        page.picture(tmp_path / "chat.png")
        assert (tmp_path / "chat.png").stat().st_size > 5_000
        wait_idle(router)


def test_the_stop_button_ends_the_answer_and_frees_its_slot(page: Page) -> None:
    with serving(steps_s=0.1) as (address, router):
        page.open(address)
        page.run("document.getElementById('max_tokens').value = 60")
        page.write("#text", "Hello")
        page.click("#send")
        until(lambda: shown(page), "the first tokens")
        page.click("#send")  # it says Stop now
        until(lambda: page.run("return document.getElementById('send').textContent") == "Send", "the end")
        wait_idle(router)
        assert router.tokens < 60


def test_a_refusal_is_told_and_the_page_goes_on(page: Page) -> None:
    with serving() as (address, _):
        page.open(address)
        page.run("document.getElementById('max_tokens').value = 5000")
        page.write("#text", f"Hello{ENTER}")
        told = until(lambda: page.run("return document.querySelector('.error')?.textContent"), "the refusal")
        assert "max_tokens=5000" in told
        page.run("document.getElementById('max_tokens').value = 3")
        page.write("#text", f"Hello{ENTER}")
        until(lambda: page.run("return document.querySelectorAll('.note')[1]?.textContent"), "an answer")


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    with serving() as (address, _):
        page.complaints()
        page.open(address)
        until(lambda: page.run("return document.title") == "gemma-2", "the model's name")
        asked = page.run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert all(one.startswith(address) for one in asked), asked
        assert [said for said in page.complaints() if "favicon" not in said] == []
