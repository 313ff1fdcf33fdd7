"""Programs that a model wrote: what they try, what they reach, and who says whether they passed."""

import gzip
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.evaluation import sandbox
from orchestrator.evaluation.sandbox import Verdict, run, run_all

EVAL = Path(__file__).parents[2] / "shared" / "data" / "eval"
PASSED = Verdict(True, "passed")
ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"
MARK = 2048 + os.getpid()  # a limit of memory by which our sandboxes are known among those of others

pytestmark = pytest.mark.skipif(sandbox.unavailable() is not None, reason=f"no sandbox: {sandbox.unavailable()}")


@pytest.fixture
def good_after() -> Iterator[None]:
    """Whatever a program did, a right one still passes after it."""
    yield
    assert run(ADD, "assert add(2, 3) == 5") == PASSED


def look(program: str, timeout_s: float = 3.0, memory_mb: int = 2048) -> str:
    """What a program's `look` returns or raises, in one line."""
    return run(program, "raise Exception(look())", timeout_s, memory_mb).why.removeprefix("Exception: ")


def test_a_program_is_judged_by_its_tests() -> None:
    assert run(ADD, "assert add(2, 3) == 5") == PASSED
    assert run(ADD, "assert add(2, 3) == 6") == Verdict(False, "AssertionError: assert add(2, 3) == 6")
    assert run(ADD, "assert add(2, 3) == 6, 'no   sum\\n'") == Verdict(False, "AssertionError: no sum")
    assert run("", "assert add(2, 3) == 5").why == "NameError: name 'add' is not defined"
    assert run("def add(a, b) return", "assert add(2, 3) == 5").why.startswith("SyntaxError: expected ':'")
    assert run("1 / 0", "assert True") == Verdict(False, "ZeroDivisionError: division by zero")
    assert look("def look():\n    return input()") == "EOFError: EOF when reading a line"


def test_why_is_one_short_line_the_same_each_time() -> None:
    program = "def look():\n    raise ValueError(f'{object()} \\x1b[31m\\n' + 'long ' * 1000)"
    why = look(program)
    assert why == look(program)
    assert why.startswith("ValueError: <object object at 0x...> ?[31m long")
    assert len(why) == 200
    hashed = "def look():\n    return list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"
    assert len({look(hashed) for _ in range(3)}) == 1


def test_verdicts_come_in_the_order_of_the_jobs() -> None:
    jobs = [
        (f"import time\ntime.sleep({(7 - i) / 20})\n{ADD}", f"assert add({i}, 0) == {i // 2 * 2}") for i in range(8)
    ]
    assert [verdict.passed for verdict in run_all(jobs, workers=4)] == [True, False] * 4
    assert run_all([]) == []


def test_plain_values_are_the_same_on_both_sides() -> None:
    program = "def same(value):\n    return value, type(value).__name__"
    tests = r"""
import collections, decimal, fractions
for value in (
    1, True, None, -2.5, float("inf"), 10**5000, 1j, "a\n\ud800", b"\xff", bytearray(b"a"), range(1, 9, 2),
    [[], ()], (1, [2, (3,)]), {(1, 2): {3}, "a": frozenset("b"), 4: {}}, set(), {"object": 1}, {"tuple": [1]},
    collections.Counter("aab"), collections.OrderedDict(b=1, a=2), collections.deque([1, 2]), {"b": 1}.keys(),
    decimal.Decimal("0.1"), fractions.Fraction(1, 3),
):
    back, kind = same(value)
    assert (back, type(back), kind) == (value, type(value), type(value).__name__), value
assert repr(same(float("nan"))[0]) == "nan"
"""
    assert run(program, tests) == PASSED


def test_objects_of_a_program_are_used_where_they_are() -> None:
    program = """
import collections, enum
class Node:
    def __init__(self, value):
        self.value, self.next = value, None
    def total(self):
        return self.value + (self.next.total() if self.next else 0)
def count():
    yield from (1, 2, 3)
def adder(n):
    return lambda m: n + m
Point = collections.namedtuple("Point", "x y")
Colour = enum.IntEnum("Colour", "RED")
class Worse(KeyError):
    pass
def worse():
    raise Worse("no")
"""
    tests = """
first = Node(1)
first.next = Node(2)
first.next.value = 5
assert first.total() == 6 and first.next is first.next and first.next != first
assert list(count()) == [1, 2, 3] and next(count()) == 1 and sorted(count()) == [1, 2, 3] and count() != [1, 2, 3]
assert adder(2)(3) == 5
assert Point(1, 2) == (1, 2) and Colour.RED == 1
try:
    worse()
    assert False
except KeyError as error:
    assert "no" in str(error)
"""
    assert run(program, tests) == PASSED


@pytest.mark.parametrize(
    "end",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os\nos.kill(os.getpid(), 9)\nos._exit(0)",
        "import os, sys\nos.execv(sys.executable, ['python', '-c', ''])",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.closerange(0, 64)",
    ],
)
def test_who_ends_before_the_tests_has_not_passed(end: str, good_after: None) -> None:
    assert not run(f"{ADD}{end}", "assert add(2, 3) == 5").passed
    inside = end.replace("\n", "\n    ")
    caught = "try:\n    add(2, 3)\nexcept BaseException:\n    pass"
    assert not run(f"def add(a, b):\n    {inside}", "assert add(2, 3) == 5").passed
    if "raise" not in end and "exit(0)" not in end.partition("sys.")[2]:
        assert run(f"def add(a, b):\n    {inside}", caught).why in (sandbox.ENDED, "killed by SIGSEGV")


@pytest.mark.parametrize(
    "trick",
    [
        "def check(candidate):\n    pass",
        "class Yes:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Yes()",
        "class Yes(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Yes(0)",
        "def abs(x):\n    return 0\ndef round(*x):\n    return 5\nprint = AssertionError = exec = abs",
        "class math:\n    isclose = lambda *a, **k: True",
        "import math\nmath.isclose = lambda *a, **k: True",
        "import builtins\nbuiltins.abs = builtins.all = builtins.exec = builtins.AssertionError = lambda *a: True",
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)\nsys.modules.clear()",
        "import sys\nsys.settrace(lambda frame, *a: frame.f_globals.clear())",
        "__builtins__ = {'abs': lambda x: 0}\n__name__ = '__main__'",
        "def add(a, b):\n    raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nadd = print",
    ],
)
def test_the_tests_names_are_the_tests_own(trick: str, good_after: None) -> None:
    tests = [
        "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)",
        "assert all(map(lambda x: add(x, 3) == x + 3, [2]))",
        "assert abs(add(2, 3) - 5) < 1e-6",
        "assert round(add(2, 3)) == 5",
        "assert math.isclose(add(2, 3), 5)",
    ]
    assert run(f"import math\n{ADD}", "\n".join(tests)) == PASSED
    verdicts = run_all([(f"import math\n{WRONG}{trick}", test) for test in tests])
    assert [test for test, verdict in zip(tests, verdicts, strict=True) if verdict.passed] == []


def test_what_a_program_raises_ends_no_loop_of_the_tests() -> None:
    assert not run("def add(a, b):\n    raise StopIteration", "assert list(map(add, [2], [3])) == []").passed


def test_a_function_may_be_called_like_a_builtin() -> None:
    assert run("def sum(a, b):\n    return a + b", "assert sum(2, 3) == 5") == PASSED


# Run on the tests' side, it would write the verdict.
FORGE = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass"


@pytest.mark.parametrize(
    "said",
    [
        "passed",
        "started\npassed",
        "[true, 5]",
        "[true, {}]",
        json.dumps([False, "exec", FORGE]),
        json.dumps([True, {"exec": [FORGE]}]),
        "",
    ],
)
def test_a_program_that_speaks_for_the_wrapper_says_nothing(said: str, good_after: None) -> None:
    speak = f"""
import os
def speak():
    for fd in range(64):
        try:
            os.write(fd, {said.encode()!r} + bytes([10]))
        except OSError:
            pass
"""
    tests = "assert add(2, 3) == 5 and add(1, 1) == 2"
    assert not run(f"{speak}{WRONG}speak()", tests).passed
    assert not run(f"{speak}def add(a, b):\n    speak()", tests).passed


def test_a_program_that_takes_the_wrappers_place_gives_values_only(good_after: None) -> None:
    program = """
import fcntl, json, os, stat
def pipe(mode):
    for fd in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == mode:
                return fd
        except OSError:
            pass
asks, answers = os.fdopen(pipe(os.O_RDONLY)), os.fdopen(pipe(os.O_WRONLY), "w", 1)
print("[true, null]", file=answers)
for line in asks:
    lie = {"object": 1}
    if '"names"' in line:
        builtins = {"dict": [[name, lie] for name in ("abs", "round", "__import__", "AssertionError")]}
        value = {"dict": [["add", lie], ["__builtins__", builtins]]}
    else:
        value = VALUE
    print(json.dumps([True, value]), file=answers)
"""
    for value in ("0", "None", "{'object': 1}", "{'type': ['object']}", "{'object': []}", "{'exec': ['1']}"):
        for test in ("assert abs(add(2, 3) - 5) < 1e-6", "assert round(add(2, 3)) == 5", "assert add(2, 3) == 5"):
            assert not run(program.replace("VALUE", value), test).passed
    assert (
        run(program.replace("VALUE", "5"), "assert round(add(2, 3)) == 5") == PASSED
    )  # it may as well know the answer


def test_a_program_sees_neither_its_tests_nor_what_they_expect(good_after: None) -> None:
    program = """
import gc, os, select, stat, sys
def look():
    frame, places = sys._getframe(), [sys.argv, sys.orig_argv, os.environ, *gc.get_objects()]
    while frame is not None:
        places += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    found = [repr(place)[:50] for place in places if "hgulp" in repr(place)[::-1]]
    for fd in range(64):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and select.select([fd], [], [], 0)[0]:
                found.append(f"something to read in {fd}")
        except OSError:
            pass
    return found
"""
    assert run(program, "expected = 'plugh'\nfound = look()\nassert found == [], found", 20.0) == PASSED


def test_a_program_reads_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_after: None) -> None:
    monkeypatch.setenv("GEMMA_SECRET_KEY", "plugh")
    (tmp_path / "key").write_text("plugh")
    ours = [tmp_path / "key", __file__, Path.home() / ".ssh", "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/sys"]
    program = """
import os
def there(paths):
    return [path for path in paths if os.path.exists(path)]
def environment():
    return set(os.environ), os.listdir("/tmp"), os.listdir("/dev"), os.getpid(), os.getuid()
"""
    tests = f"""
assert there({[str(path) for path in ours]}) == []
names, *rest = environment()
assert names <= {{"HOME", "LC_CTYPE", "PWD", "PYTHONHASHSEED"}}, names
assert rest == [[], ["null"], 1, 65534], rest
"""
    assert run(program, tests) == PASSED


def test_a_program_writes_a_bounded_tmp_and_nothing_else(tmp_path: Path, good_after: None) -> None:
    program = """
import os
def look():
    wrote, most = 0, 0
    try:
        for i in range(100):
            with open(f"/tmp/{i}", "wb", buffering=0) as file:
                try:
                    while True:
                        wrote += file.write(bytes(1 << 20))
                except OSError as error:
                    most = max(most, os.stat(f"/tmp/{i}").st_size)
                    if "space" in str(error):
                        raise
    except OSError:
        return wrote >> 20, most >> 20
"""
    assert look(program, timeout_s=20.0) == "(64, 16)"
    for path in ("/x", "/dev/x", "/etc/x", "/usr/lib/x", os.__file__):
        assert "Error: [Errno" in look(f"def look():\n    open({path!r}, 'w')")
    look(f"import shutil\ndef look():\n    shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)")
    assert tmp_path.is_dir()
    assert look("import os\ndef look():\n    return os.listdir()") == "[]"  # nothing is left of another's


def test_a_program_has_no_network(good_after: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for address in (("127.0.0.1", port), ("8.8.8.8", 53)):
            program = f"import socket\ndef look():\n    socket.create_connection({address}, 1)"
            assert look(program) == "PermissionError: [Errno 1] Operation not permitted"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("who", ["os.getppid()", "-1", "0", "1", str(os.getpid())])
def test_a_program_kills_nobody_else(who: str, good_after: None) -> None:
    before = time.monotonic()
    run(f"import os\nos.kill({who}, 9)\n{ADD}", "assert add(2, 3) == 5")
    assert time.monotonic() - before < 10


@pytest.mark.parametrize(
    "call",
    [
        "while True: os.fork()",
        "subprocess.Popen(['/bin/sleep', '1000'])",
        "os.posix_spawn(sys.executable, ['python', '-c', 'while True: pass'], {})",
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,)).start()",
        "os.memfd_create('x')",
        "os.chroot('/tmp')",
        *(f"(libc.{call} + 1) or refused()" for call in ("shmget(0, 1 << 30, 0o1600)", "unshare(0x10000000)")),
        "(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) + 1) or refused()",
    ],
)
def test_a_program_starts_no_other_and_leaves_its_limits_to_nobody(call: str, good_after: None) -> None:
    program = f"""
import ctypes, multiprocessing, os, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def refused():
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def look():
    {call}
"""
    assert look(program).startswith("PermissionError: [Errno 1] Operation not permitted")


def test_without_the_filter_of_calls_namespaces_still_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "call_filter", lambda: struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))  # all are allowed
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\ndef look():\n    socket.create_connection(('127.0.0.1', {port}), 1)"
        assert look(program) == "ConnectionRefusedError: [Errno 111] Connection refused"
    program = """
import os, time
def look():
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    return 5
"""
    assert run(program, "assert look() == 5", memory_mb=MARK) == PASSED
    assert_gone()


def test_threads_and_event_loops_work() -> None:
    program = """
import asyncio, concurrent.futures
async def later():
    await asyncio.sleep(0.01)
    return 3
def look():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(int, "12")) + asyncio.run(later())
"""
    assert run(program, "assert look() == 6") == PASSED


@pytest.mark.parametrize(
    "hang",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import signal, time\nfor s in {*signal.Signals} - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(1000)",
        "9 ** 9 ** 9",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading\nfor _ in range(8): threading.Thread(target=lambda: 9 ** 9 ** 9).start()",
        "while True: print('x' * (1 << 20))",
        "import sys\nwhile True: sys.stderr.write('x' * (1 << 20))",
    ],
)
def test_who_hangs_is_killed_at_the_deadline_and_leaves_nothing(hang: str, good_after: None) -> None:
    before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict = run(f"{ADD}{hang}", "assert add(2, 3) == 5", timeout_s=0.5, memory_mb=MARK)
    # One that has started threads, and is slow in them, may still answer in time.
    assert verdict in (Verdict(False, "timed out after 0.5 s"), *([PASSED] if "threading" in hang else []))
    assert time.monotonic() - before < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10
    assert_gone()


def test_tests_that_hang_are_killed_too(good_after: None) -> None:
    assert run(ADD, "while True: pass", timeout_s=0.5, memory_mb=MARK).why == "timed out after 0.5 s"
    assert_gone()


def assert_gone() -> None:
    """No process of a sandbox with our limit is there, or not for long."""
    deadline = time.monotonic() + 5
    while left := [p for p in psutil.process_iter(["cmdline"]) if f"limit({MARK}, " in str(p.info["cmdline"])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_what_is_printed_is_thrown_away() -> None:
    program = f"import sys\nfor _ in range(100): print('x' * (1 << 20), file=sys.stderr)\nprint('passed')\n{ADD}"
    assert run(program, "print('passed')\nassert add(2, 3) == 6").why == "AssertionError: assert add(2, 3) == 6"


def test_memory_is_bounded(good_after: None) -> None:
    assert look("def look():\n    return len(bytearray(3 << 30))").startswith("MemoryError")
    assert look("def look():\n    return len(bytearray(64 << 20))", memory_mb=256) == str(64 << 20)
    assert look("def look():\n    return len(bytearray(256 << 20))", memory_mb=256).startswith("MemoryError")
    assert look("import mmap\ndef look():\n    mmap.mmap(-1, 3 << 30)").startswith("OSError: [Errno 12]")
    # An answer that the tests' side cannot hold ends the tests, not us.
    assert not run("def look():\n    return 'x' * (200 << 20)", "look()", 20.0, memory_mb=512).passed


def test_without_bwrap_programs_are_refused_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.unavailable.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", "/nowhere")
            assert sandbox.unavailable() == "bwrap is not installed (Debian's package bubblewrap)"
            with pytest.raises(RuntimeError, match="programs cannot be contained here: bwrap is not installed"):
                run(ADD, "assert add(2, 3) == 5")
        sandbox.unavailable.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(sandbox, "call_filter", lambda: b"no filter")
            assert str(sandbox.unavailable()).startswith("no sandbox: bwrap: ")
    finally:
        sandbox.unavailable.cache_clear()


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.unavailable() is None
    monkeypatch.setattr(sandbox, "inside", lambda: "raise SystemError('broken')\n")
    with pytest.raises(RuntimeError, match="no sandbox: SystemError: broken"):
        run(ADD, "assert add(2, 3) == 5")


def humaneval() -> list[tuple[str, str, str]]:
    """(head of the function, its right rest, tests) of each problem."""
    if not (path := EVAL / "humaneval" / "HumanEval.jsonl.gz").is_file():
        pytest.skip(f"{path} is absent")
    with gzip.open(path, "rt") as file:
        tasks = [json.loads(line) for line in file]
    return [(t["prompt"], t["canonical_solution"], f"{t['test']}\ncheck({t['entry_point']})") for t in tasks]


def mbpp() -> list[tuple[str, str]]:
    """(a right program, tests) of each problem of the test split."""
    if not (path := EVAL / "mbpp" / "mbpp.jsonl").is_file():
        pytest.skip(f"{path} is absent")
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    tests = ["\n".join([t["test_setup_code"], *t["test_list"]]) for t in tasks]
    return [(t["code"], test) for t, test in zip(tasks, tests, strict=True) if 11 <= t["task_id"] <= 510]


def assert_right_pass_and_empty_fail(right: list[tuple[str, str]], empty: list[tuple[str, str]]) -> None:
    assert [verdict for verdict in run_all(right, timeout_s=30.0) if not verdict.passed] == []  # some take seconds
    assert [job for job, verdict in zip(empty, run_all(empty), strict=True) if verdict.passed] == []


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_right_answers_to_humaneval_pass_and_empty_ones_fail(every: int) -> None:
    tasks = humaneval()
    assert len(tasks) == 164
    right = [(head + rest, tests) for head, rest, tests in tasks[::every]]
    assert_right_pass_and_empty_fail(right, [(f"{head}    pass\n", tests) for head, _, tests in tasks[::every]])


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.soak)])
def test_right_answers_to_mbpp_pass_and_empty_ones_fail(every: int) -> None:
    tasks = mbpp()
    assert len(tasks) == 500
    assert_right_pass_and_empty_fail(tasks[::every], [("", tests) for _, tests in tasks[::every]])


def test_the_example_of_human_eval_is_half_right() -> None:
    if not (folder := EVAL / "humaneval").is_dir():
        pytest.skip(f"{folder} is absent")
    [task] = [json.loads(line) for line in (folder / "example_problem.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "example_samples.jsonl").read_text().splitlines()]
    tests = f"{task['test']}\ncheck({task['entry_point']})"
    verdicts = run_all([(task["prompt"] + sample["completion"], tests) for sample in samples])
    assert [verdict.passed for verdict in verdicts] == [False, False, False, True, True, True]
