"""A server as a user starts it: OpenAI's own client against it, hosts killed under its streams, and its end."""

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from orchestrator.record import rundir
from tests import hf_cases
from tests.runs import finish, kill_worker, launch, orphaned_folders, wait_for

MODEL = "gemma-2"
SMALL = ["serve.slots=8", "serve.context=256", "serve.chunk=64", "serve.port=0", "wandb.mode=disabled"]
PROMPTS = ["import ", "def main(", "class Error", "for line in", "return self.", "    if not ", "raise ValueError("]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a short run lies."""
    root = tmp_path_factory.mktemp("runs")
    small = ["train.steps=20", "checkpoint.every=10", "eval.every=0", "optim.warmup_steps=5", "wandb.mode=disabled"]
    finish(launch("train", f"run.root={root}", "run.id=trained", "cluster.slice=v5p-8", "mesh.fsdp=4", *small), 0)
    return root


@contextmanager
def started(root: Path, name: str, *more: str, of: str = "run=trained") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command and its address, once it answers. It is stopped at the end, and leaves with 3 and nothing behind."""
    before = orphaned_folders()
    process = launch("serve", of, f"run.root={root}", f"run.id={name}", *SMALL, *more)
    folder = root / name

    def address() -> str | None:
        return next((e["address"] for e in rundir.events(folder) if e["event"] == "listen"), None)

    try:
        wait_for(lambda: address() is not None and healthy(str(address())), "a replica", process)
        yield process, str(address())
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        raise
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    finish(process, 3)
    assert orphaned_folders() <= before


def healthy(address: str) -> bool:
    return asked(address, "/health")[0] == 200


def asked(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, None


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    with started(root, "server") as (_, address):
        yield address


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def chat(address: str, content: str, **more: Any) -> Any:
    """Drawn at a fixed seed: so short a training has little to say at temperature 0."""
    given = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 40, "seed": 7}
    return client(address).chat.completions.create(**given | more)  # type: ignore[call-overload]


def streamed(address: str, content: str, **more: Any) -> tuple[str, list[Any]]:
    chunks = list(chat(address, content, stream=True, **more))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_openai_s_client_gets_an_answer_in_the_api_s_form(server: str) -> None:
    found = chat(server, "Hello", max_tokens=7)
    assert found.id.startswith("chat-")
    assert len(found.id) == 37
    assert (found.object, found.model) == ("chat.completion", MODEL)
    assert abs(found.created - time.time()) < 100
    (choice,) = found.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.content_filter_results["hate"] == {"filtered": False}
    usage = found.usage
    assert usage.completion_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 7
    assert found.system_fingerprint.startswith("fp_")


@pytest.mark.parametrize("prefix", ["/v1", "/v3/openai"])
def test_a_stream_is_the_answer_in_parts(server: str, prefix: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30, "seed": 7}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, raw = asked(server, f"{prefix}/chat/completions", json.dumps(body | options).encode())
    assert status == 200
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    first, *parts, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    assert all(part["choices"][0]["delta"].keys() == {"content"} for part in parts)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 30)
    text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
    assert text == chat(server, "Hello", max_tokens=30).choices[0].message.content


JS = os.environ.get("OPENAI_JS", "")  # a folder in which `npm install openai` was called


@pytest.mark.skipif(not shutil.which("node") or not JS, reason="needs node, and OPENAI_JS=FOLDER with npm's openai")
@pytest.mark.parametrize("prefix", ["/v1", "/v3/openai"])
def test_openai_s_javascript_client_loses_no_text_of_a_stream(server: str, prefix: str) -> None:
    script = str(Path(__file__).with_name("openai_client.mjs"))
    done = subprocess.run(["node", script, server + prefix, JS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    streamed, whole = json.loads(done.stdout)
    assert streamed == whole != ""


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_gets_an_answer(server: str) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5})
    command = ["curl", "-sS", "--fail", f"{server}/v1/chat/completions", "-H", "Content-Type: application/json"]
    command += ["-d", body]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert found["choices"][0]["message"]["role"] == "assistant"


def test_a_slice_of_two_hosts_with_heads_cut_in_two_gives_the_same(server: str, root: Path) -> None:
    with started(root, "sliced", "cluster.slice=v5p-16", "mesh.tensor=2", "serve.chunk=16") as (_, address):
        for prompt in PROMPTS[:3]:
            assert chat(address, prompt).choices[0].message.content == chat(server, prompt).choices[0].message.content


def test_a_seed_and_its_choices_are_the_same_again_whoever_else_asks(server: str) -> None:
    async def crowd() -> list[Any]:
        asking = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        given = {"model": MODEL, "max_tokens": 40, "temperature": 1.0, "n": 2}
        return await asyncio.gather(
            *(
                asking.chat.completions.create(
                    messages=[{"role": "user", "content": PROMPTS[n % 7]}],
                    seed=n % 7,
                    **given,  # type: ignore[call-overload]
                )
                for n in range(28)
            )
        )

    alone = [
        [c.message.content for c in chat(server, PROMPTS[n], seed=n, temperature=1.0, n=2).choices] for n in range(7)
    ]
    assert all(first != second for first, second in alone)
    for n, found in enumerate(asyncio.run(crowd())):
        assert [choice.message.content for choice in found.choices] == alone[n % 7]


def test_text_completions_tell_each_token_and_where_it_stands(server: str) -> None:
    given: Any = {"model": MODEL, "prompt": "import ", "max_tokens": 20, "seed": 3, "logprobs": 2}
    whole = client(server).completions.create(**given).choices[0]
    logprobs = whole.logprobs
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:n])) for n in range(20)]
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 20
    assert all(value < 0 for value in logprobs.token_logprobs)
    parts = [chunk.choices[0].logprobs for chunk in client(server).completions.create(**given, stream=True)]
    assert [at for part in parts if part for at in part.text_offset] == logprobs.text_offset
    assert [token for part in parts if part for token in part.tokens] == logprobs.tokens


def test_a_stop_string_ends_the_answer_and_is_not_shown(server: str) -> None:
    whole = chat(server, "Hello", max_tokens=60).choices[0].message.content
    stop = whole[10:13]
    cut, chunks = streamed(server, "Hello", max_tokens=60, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, 'model="other"'),
        (b'{"model": "gemma-2", "messages": [{"role": "assistant", "content": "x"}]}', 400, "must be user"),
        (
            b'{"model": "gemma-2", "messages": [{"role": "user", "content": "' + b"x" * 300 + b'"}]}',
            400,
            "context is 256",
        ),
        (b" " * 11_000_000, 413, "serve.body_mb"),
    ],
)
def test_a_bad_request_is_refused_in_openai_s_form(server: str, body: bytes, status: int, said: str) -> None:
    code, found = asked(server, "/v1/chat/completions", body)
    assert code == status
    assert said in found["error"]["message"]
    assert found["error"].keys() == {"message", "type", "param", "code"}


def test_a_client_that_goes_away_frees_its_slot(server: str) -> None:
    def running() -> float:
        text = asked(server, "/metrics")[1].decode()
        names = ("gemma:num_requests_running ", "gemma:num_requests_waiting ")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names))

    host, port = server.removeprefix("http://").split(":")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "n": 8}
    for stream in (True, False):
        raw = json.dumps(body | {"stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        for _ in range(20):
            with socket.create_connection((host, int(port))) as gone:
                gone.sendall(head + raw)
                time.sleep(random.uniform(0, 0.05))
    deadline = time.monotonic() + 10
    while chat(server, "Hi", max_tokens=1) is None or running():
        assert time.monotonic() < deadline, "the slots are free again"
        time.sleep(0.2)


def test_streams_outlive_their_hosts_with_the_tokens_they_would_have_had(root: Path) -> None:
    async def all_streams(address: str) -> list[str]:
        asking = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)

        async def one(prompt: str) -> str:
            given: Any = {"model": MODEL, "max_tokens": 200, "seed": 7, "stream": True}
            stream = await asking.chat.completions.create(messages=[{"role": "user", "content": prompt}], **given)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        streams = [asyncio.ensure_future(one(prompt)) for prompt in PROMPTS * 3]  # more than there are slots
        await asyncio.sleep(0.3)
        kill_worker(root / "killed", 0)
        return await asyncio.gather(*streams)

    with started(root, "killed") as (_, address):
        undisturbed = [streamed(address, prompt, max_tokens=200)[0] for prompt in PROMPTS]
        assert asyncio.run(all_streams(address)) == undisturbed * 3
    failures = [event for event in rundir.events(root / "killed") if event["event"] == "failure"]
    assert len(failures) == 1
    finish(launch("report", f"run.root={root}", "run=killed"), 0)
    page = (root / "killed" / "report.html").read_text()
    assert "s to the first token" in page
    assert "host died" in page
    waits = [row["first_token_s"] for row in rundir.metrics(root / "killed").values() if "first_token_s" in row]
    assert waits
    assert all(0 < wait < 60 for wait in waits)


def test_streams_of_a_lost_replica_go_on_at_another_at_once(root: Path) -> None:
    async def all_streams(address: str) -> list[str]:
        asking = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)

        async def one(number: int) -> str:
            given: Any = {"model": MODEL, "max_tokens": 200, "seed": number, "temperature": 1.0, "stream": True}
            stream = await asking.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **given)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        streams = [asyncio.ensure_future(one(number)) for number in range(12)]
        await asyncio.sleep(0.3)
        if kills:
            kill_worker(root / "two" / "replica-1", 0)
        return await asyncio.gather(*streams)

    kills = False
    with started(root, "two", "serve.replicas=2") as (process, address):
        wait_for(lambda: len(stand(root / "two")) == 2, "both replicas", process)
        undisturbed = asyncio.run(all_streams(address))
        kills = True
        assert asyncio.run(all_streams(address)) == undisturbed
        wait_for(lambda: len(stand(root / "two")) == 2, "the lost replica to stand again", process)
    told = {name: [e["event"] for e in rundir.events(root / "two" / name)] for name in ("replica-0", "replica-1")}
    assert (told["replica-0"].count("failure"), told["replica-1"].count("failure")) == (0, 1)
    assert told["replica-1"].count("restore") == 2
    rows = [row for name in told for row in rundir.metrics(root / "two" / name).values()]
    assert rows
    shown = finish(launch("status", f"run.root={root}", "run=two"), 0)
    assert "replica-1  stopped" in shown


def stand(server: Path) -> list[str]:
    """The replicas that have restored since their hosts were last started."""
    found = []
    for folder in rundir.replicas(server):
        told = [e["event"] for e in rundir.events(folder) if e["event"] in ("start", "restore", "failure")]
        found += [folder.name] if told and told[-1] == "restore" else []
    return found


def test_replicas_come_with_the_load_and_go_when_it_is_over(root: Path) -> None:
    few = ["serve.replicas.max=2", "serve.replicas.up_s=0.5", "serve.replicas.down_s=3", "serve.slots=2"]
    with started(root, "scales", *few) as (process, address):
        answers: list[Any] = []

        def ask() -> None:
            answers.append(chat(address, "Hi", max_tokens=200, temperature=1.0, seed=3).choices[0].message.content)

        def news(what: str) -> bool:
            return any(e["event"] == "replica" and what in e["news"] for e in rundir.events(root / "scales"))

        while not news("begins") or len(rundir.replicas(root / "scales")) < 2:
            asking = [threading.Thread(target=ask) for _ in range(12)]
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
        wait_for(lambda: len(stand(root / "scales")) == 2, "a second replica", process)
        wait_for(lambda: news("ended: stopped"), "one fewer", process)
        wait_for(
            lambda: any("one replica fewer" in e.get("news", "") for e in rundir.events(root / "scales")),
            "its slice to be given back",
            process,
        )
        assert len(set(answers)) == 1
        assert healthy(address)


def test_newer_checkpoints_are_moved_to_and_no_stream_ends(server: str, root: Path) -> None:
    """A run has step 10, and then 20: who asks afterwards is answered as by a server of step 20."""
    shutil.copytree(root / "trained", root / "growing")
    newer = root / "growing" / "checkpoints" / "20"
    newer.rename(root / "growing" / "20")
    with started(root, "follows", "serve.follow=true", of="run=growing") as (process, address):
        before = chat(address, "Hello", max_tokens=30)
        stream = chat(address, "Hello", max_tokens=230, stream=True)
        parts = [next(stream).choices[0].delta.content or "" for _ in range(2)]
        (root / "growing" / "20").rename(newer)
        for chunk in stream:
            parts.append(chunk.choices[0].delta.content or "")
            last = chunk.choices[0].finish_reason
        assert last == "length"
        wait_for(lambda: any(e["event"] == "follow" for e in rundir.events(root / "follows")), "step 20", process)
        after, wanted = (chat(where, "Hello", max_tokens=30) for where in (address, server))
        assert after.choices[0].message.content == wanted.choices[0].message.content
        assert after.choices[0].message.content != before.choices[0].message.content
        assert after.system_fingerprint != before.system_fingerprint
    assert not [event for event in rundir.events(root / "follows") if event["event"] == "failure"]


def test_a_judge_beside_the_model_filters_what_it_says_yes_to(root: Path, tmp_path: Path) -> None:
    """By weights drawn at random: what they say is between the two thresholds."""
    judge = f"serve.filter_weights={hf_cases.write_folder(tmp_path / 'judge', hf_cases.JUDGE)}"
    for name, threshold, reason in (("lenient", 1 - 1e-9, "length"), ("strict", 1e-9, "content_filter")):
        more = ["serve.filter=shieldgemma", judge, f"serve.filter_threshold={threshold}"]
        with started(root, name, *more) as (_, address):
            (choice,) = chat(address, "Hello", max_tokens=7).choices
            assert choice.finish_reason == reason
            assert choice.content_filter_results["violence"] == {"filtered": reason == "content_filter"}
            assert bool(choice.message.content) == (reason == "length")


def test_the_end_finishes_what_runs_and_takes_nothing_new(root: Path) -> None:
    with started(root, "drained") as (process, address):
        whole = chat(address, "Hello", max_tokens=200).choices[0].message.content
        stream = chat(address, "Hello", max_tokens=200, stream=True)
        parts = [next(stream).choices[0].delta.content or "" for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: asked(address, "/health")[0] != 200, "draining", process)
        code, _ = asked(address, "/v1/chat/completions", json.dumps({"model": MODEL, "messages": []}).encode())
        assert code in (0, 400, 503)
        parts += [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(parts) == whole


def test_keys_are_asked_for_and_kept(root: Path, tmp_path: Path) -> None:
    right, other = secrets.token_hex(8), secrets.token_hex(8)
    (tmp_path / "keys").write_text(f"{right}\n{other}\n")
    with started(root, "keys", f"serve.api_keys={tmp_path / 'keys'}") as (_, address):
        for key, status in ((right, 200), (other, 200), ("wrong", 401), ("", 401)):
            assert asked(address, "/v1/models", Authorization=f"Bearer {key}")[0] == status
    for path in (root / "keys").rglob("*"):
        assert not path.is_file() or right.encode() not in path.read_bytes()
