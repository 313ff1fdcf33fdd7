"""How much a key may ask for in a minute: requests and tokens, each forgotten a minute later."""

from pathlib import Path

import pytest

from orchestrator.serving import limits
from orchestrator.serving.limits import Spent
from tests.test_front import GOOD, post, serving


def test_requests_of_the_last_minute_are_counted() -> None:
    spent = Spent()
    for now in (0.0, 10.0, 20.0):
        assert limits.wait_s(spent, now, 3, None) == 0
        limits.ask(spent, now)
    assert limits.wait_s(spent, 30.0, 3, None) == pytest.approx(30.0)
    assert limits.wait_s(spent, 61.0, 3, None) == 0
    assert limits.wait_s(spent, 61.0, 2, None) == pytest.approx(9.0)
    assert limits.wait_s(spent, 61.0, 1, None) == pytest.approx(19.0)  # until the newest is forgotten


def test_tokens_of_the_last_minute_are_counted() -> None:
    spent = Spent()
    for now, tokens in ((0.0, 50), (10.0, 30), (20.0, 40)):
        limits.give(spent, now, tokens)
    assert limits.wait_s(spent, 25.0, None, 121) == 0
    assert limits.wait_s(spent, 25.0, None, 120) == pytest.approx(35.0)  # until the first is forgotten
    assert limits.wait_s(spent, 25.0, None, 60) == pytest.approx(45.0)
    assert limits.wait_s(spent, 25.0, None, 1) == pytest.approx(55.0)
    assert limits.wait_s(spent, 200.0, None, 1) == 0
    assert spent.tokens == 0


def test_who_asks_too_much_is_told_when_to_come_again(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(requests_per_minute=2, api_keys=str(tmp_path / "keys")) as (address, _):
        codes = [post(address, GOOD, Authorization="Bearer one")[0] for _ in range(3)]
        assert codes == [200, 200, 429]
        assert post(address, GOOD, Authorization="Bearer two")[0] == 200
    with serving(tokens_per_minute=10) as (address, _):
        assert post(address, GOOD)[0] == 200
        code, found = post(address, GOOD)
        assert code == 429
        assert "serve.tokens_per_minute=10" in found["error"]["message"]
        assert "try again in 60 s" in found["error"]["message"]
