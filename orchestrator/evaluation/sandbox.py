"""Runs programs that a model wrote, and judges them by their tests. The kernel holds them, not Python.

A program and its tests run in two sandboxes of bubblewrap (`bwrap`) with nothing in common but two pipes. In each: no
network, no process but itself, no environment, no files but Python's and the system's libraries to read and a small
/tmp to write; memory, processor time, files and system calls are limited. What is printed is not read. Both are killed
at the deadline.

The tests see the program's names. A function or an object there is a handle: calling it asks the other sandbox, and a
plain value comes back (numbers, strings, lists, dicts, ...), built anew by a table. The tests' side says the verdict.
So a program that ends early, redefines `check`, patches builtins, equals everything or walks the stack gains nothing:
tests, expected values and verdict are in a process that it cannot see. Its exit code means nothing.

What it can still do: know the tests by heart; lie where the tests measure it by a function of its own (HumanEval/32 has
such a `poly`); use a hole in the kernel or in CPython's JSON. Builtins and modules are the tests' own, whatever the
program calls so, unless all that the tests name is called so (MBPP has a function `sum`).

Other than in one interpreter: a program gets copies, so the tests do not see it change its arguments; its own objects,
types among them, equal nothing but themselves; it can start threads, but no processes; there are no site-packages.
"""

import builtins
import contextlib
import errno
import functools
import inspect
import json
import math
import os
import platform
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

START_TIMEOUT_S = 60.0  # of a sandbox, on a machine that does much else
TMP_BYTES = 64 << 20  # all files of a program's
FILE_BYTES = 16 << 20  # one of them
WHY_CHARACTERS = 200
HEARD_BYTES = 4096  # at most, of the tests' side
ENDED = "ended before its tests did"

# System calls that are refused: processes and namespaces (where a limit would not count), memory that no limit counts,
# sockets, the user's keys, and what needs much of the kernel. Beside them clone, but for threads, and clone3: a filter
# cannot see its flags, so it is said to be absent, and the C library then uses clone.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
REFUSED = {
    "x86_64": """fork 57 vfork 58 unshare 272 shmget 29 msgget 68 semget 64 memfd_create 319 socket 41 add_key 248
        request_key 249 keyctl 250 bpf 321 perf_event_open 298 userfaultfd 323 io_uring_setup 425""",
    "aarch64": """unshare 97 shmget 194 msgget 186 semget 190 memfd_create 279 socket 198 add_key 217
        request_key 218 keyctl 219 bpf 280 perf_event_open 241 userfaultfd 282 io_uring_setup 425""",
}


@dataclass(frozen=True)
class Verdict:
    passed: bool
    why: str  # one line of at most 200 characters


@functools.cache
def unavailable() -> str | None:
    """Why programs cannot be contained on this machine, in one line; None where they can. Tries it once."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed (Debian's package bubblewrap)"
    if platform.machine() not in ARCHITECTURES:
        return f"no system call filter is known for {platform.machine()}, only for {', '.join(ARCHITECTURES)}"
    try:
        verdict = contained("def two():\n    return 2", "assert two() == 2", 30.0, 2048)
    except (OSError, RuntimeError) as error:
        return one_line(str(error))
    return None if verdict.passed else one_line(f"a program of one line failed: {verdict.why}")


def run(program: str, tests: str, timeout_s: float = 3.0, memory_mb: int = 2048) -> Verdict:
    """Whether a program passes tests that are run after it and see its names.

    timeout_s: of both together, without the start. memory_mb: of each. Raises RuntimeError where they cannot be
    contained, or no sandbox starts: that is no verdict.
    """
    if reason := unavailable():
        raise RuntimeError(f"programs cannot be contained here: {reason}")
    return contained(program, tests, timeout_s, memory_mb)


def run_all(jobs: Sequence[tuple[str, str]], timeout_s: float = 3.0, workers: int | None = None) -> list[Verdict]:
    """The verdicts on (program, tests), in order. workers: how many at a time; None is as many as there are cores."""
    unavailable()  # tried before there are threads that would each try
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(job[0], job[1], timeout_s), jobs))


def contained(program: str, tests: str, timeout_s: float, memory_mb: int) -> Verdict:
    """`run`, without asking first whether this machine can."""
    limits = f"limit({memory_mb}, {math.ceil(timeout_s) + 1})"
    with contextlib.ExitStack() as stack:
        job, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        job.write(json.dumps([program, tests]).encode())
        job.seek(0)
        asks, answers = os.pipe(), os.pipe()
        try:
            programs = start(f"{limits}; answer()", asks[0], answers[1], errors)
            stack.enter_context(programs)
            stack.callback(programs.kill)
            ends = asks[1], answers[0]
            judges = start(f"{limits}; judge{ends}", job, subprocess.PIPE, errors, *ends)
            stack.enter_context(judges)
            stack.callback(judges.kill)
        finally:
            for end in (*asks, *answers):
                os.close(end)
        assert judges.stdout is not None
        heard = bytearray()
        started = hear(judges.stdout.fileno(), heard, 1, START_TIMEOUT_S)
        if b"\n" not in heard:
            errors.seek(0)
            lines = errors.read(HEARD_BYTES).decode(errors="replace").splitlines()
            raise RuntimeError(f"no sandbox: {lines[-1] if lines else 'ended' if started else 'waited for it in vain'}")
        if not hear(judges.stdout.fileno(), heard, 2, timeout_s):
            return Verdict(False, f"timed out after {timeout_s:g} s")
        why = one_line(heard.decode(errors="replace").partition("\n")[2])
        if why == ENDED:  # bwrap ends with 128 + the signal that ended the program
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                why = f"killed by {signal.Signals(programs.wait(1.0) - 128).name}"
        return Verdict(why == "passed", why or "killed")


def start(call: str, stdin: int | IO[bytes], stdout: int, stderr: IO[bytes], *fds: int) -> subprocess.Popen[bytes]:
    """A Python in a sandbox, that makes a call of `inside`. fds: what it inherits beside these three."""
    prefix = Path(sys.base_prefix)
    python = prefix / "bin" / f"python3.{sys.version_info.minor}"
    seen: list[str | Path] = []  # not the whole prefix, which may be somebody's home
    for path in (Path("/usr/lib"), Path("/usr/lib64"), python, prefix / "lib", prefix / sys.platlibdir):
        seen += ["--ro-bind-try", path, path]
    for path in (Path("/lib"), Path("/lib64")):  # links into /usr, on most machines
        seen += ["--symlink", path.readlink(), path] if path.is_symlink() else ["--ro-bind-try", path, path]
    read, write = os.pipe()
    os.write(write, call_filter())
    os.close(write)
    options = f"""--unshare-user --unshare-all --uid 65534 --gid 65534 --cap-drop ALL --hostname sandbox
        --new-session --die-with-parent --as-pid-1 --seccomp {read}
        --clearenv --setenv PYTHONHASHSEED 0 --setenv HOME /tmp --chdir /tmp --size {TMP_BYTES} --tmpfs /tmp
        --dev-bind /dev/null /dev/null --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache""".split()
    # The standard library only. Not -I, which ignores the seed of hashes: by it sets are in the same order each time,
    # and verdicts the same.
    call_python = [str(python), "-B", "-P", "-s", "-S", "-c", inside() + call]
    command = ["bwrap", *options, *map(str, seen), "--remount-ro", "/", *call_python]
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=(read, *fds))
    finally:
        os.close(read)


def call_filter() -> bytes:
    """The program of classic BPF that seccomp runs on each system call."""
    machine = platform.machine()
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    steps = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x86_64's other numbers for the same calls
    steps += [(equal, 0, 1, CLONE3), (give, 0, 0, absent)]
    for number in REFUSED[machine].split()[1::2]:
        steps += [(equal, 0, 1, int(number)), (give, 0, 0, refuse)]
    thread = 0x10000  # CLONE_THREAD
    steps += [(equal, 0, 3, CLONE[machine]), (load, 0, 0, 16), (has, 1, 0, thread), (give, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (give, 0, 0, allow)])


def hear(pipe: int, heard: bytearray, lines: int, timeout_s: float) -> bool:
    """Read until so many lines are heard, or the pipe's end; False where neither came in time."""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while heard.count(b"\n") < lines and len(heard) < HEARD_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        if not (data := os.read(pipe, HEARD_BYTES)):
            break
        heard += data
    return True


def one_line(text: str) -> str:
    """Without what a terminal would obey, and without addresses, which differ each time."""
    text = re.sub(r"\b0x[0-9a-f]{6,}", "0x...", " ".join(text.split()))
    return "".join(c if c.isprintable() else "?" for c in text)[:WHY_CHARACTERS]


@functools.cache
def inside() -> str:
    """What runs in a sandbox: the functions below, as source, so that nothing else is loaded there or to be seen."""
    parts = (limit, silence, forms, plain, made, answer, Handle, EndedError, judge, names, blame)
    head = """
from __future__ import annotations
import builtins, json, os, resource, sys, types
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction
"""
    values = f"{FILE_BYTES=}\n{ENDED=}\n"
    return head + values + "\n".join(inspect.getsource(part) for part in parts) + "\nFORMS = forms()\n"


def limit(memory_mb: int, cpu_s: int) -> None:
    """Of this process, for good."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,  # threads
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def silence() -> None:
    """Nothing to read, and what is printed goes nowhere."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    sys.set_int_max_str_digits(0)  # JSON writes them in decimals


def forms() -> dict[str, tuple[type, Callable, Callable]]:
    """What may cross beside JSON's own: its type, its parts, and how it is made of a list of them."""
    return {
        "tuple": (tuple, list, tuple),
        "set": (set, list, set),
        "frozenset": (frozenset, list, frozenset),
        "Counter": (Counter, lambda value: value.items(), lambda parts: Counter(dict(parts))),
        "OrderedDict": (OrderedDict, lambda value: value.items(), OrderedDict),
        "dict": (dict, lambda value: value.items(), dict),
        "keys": (type({}.keys()), list, lambda parts: dict.fromkeys(parts).keys()),
        "deque": (deque, list, deque),
        "bytes": (bytes, list, bytes),
        "bytearray": (bytearray, list, bytearray),
        "range": (range, lambda value: (value.start, value.stop, value.step), lambda parts: range(*parts)),
        "complex": (complex, lambda value: (value.real, value.imag), lambda parts: complex(*parts)),
        "Decimal": (Decimal, lambda value: [str(value)], lambda parts: Decimal(*parts)),
        "Fraction": (Fraction, lambda value: (value.numerator, value.denominator), lambda parts: Fraction(*parts)),
    }


FORMS = forms()


def plain(value: object, number: Callable[[object], int]) -> object:
    """A value as JSON has it; an object that is not plain is given a number."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, list):
        return [plain(part, number) for part in value]
    for name, (kind, parts, _) in FORMS.items():
        if isinstance(value, kind):
            return {name: [plain(part, number) for part in parts(value)]}
    return {"object": number(value)}


def made(data: Any, find: Callable[[int], object]) -> Any:
    """The value that `plain` was given, or a new one like it."""
    if isinstance(data, list):
        return [made(part, find) for part in data]
    if not isinstance(data, dict):
        return data
    [(name, parts)] = data.items()
    return find(int(parts)) if name == "object" else FORMS[name][2]([made(part, find) for part in parts])


def answer() -> None:
    """The program's side: do what the tests' side asks, until that ends."""
    asks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    silence()
    module = sys.modules["program"] = types.ModuleType("program")
    known: dict[int, object] = {}

    def number(value: object) -> int:
        known[id(value)] = value  # kept, so that no other gets its number
        return id(value)

    does: dict[str, Callable] = {
        "start": lambda: None,
        "load": lambda source: exec(compile(source, "<program>", "exec"), module.__dict__),
        "names": lambda names: {name: module.__dict__[name] for name in names if name in module.__dict__},
        "call": lambda function, args, named: function(*args, **named),
        "get": getattr,
        "set": setattr,
        "iter": iter,
        "next": next,
    }
    for line in asks:
        try:
            what, *args = made(json.loads(line), known.__getitem__)
            said = json.dumps([True, plain(does[what](*args), number)])
        except BaseException as error:
            kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            said = json.dumps([False, kind, str(error)])
        answers.write(f"{said}\n")
        answers.flush()
    os._exit(0)


class Handle:
    """Stands in the tests for an object of the program's. Equal to itself only, whatever the object would say."""

    def __init__(self, number: int, ask: Callable) -> None:
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_ask", ask)

    def __call__(self, *args: object, **named: object) -> object:
        return self._ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", self, name, value)

    def __iter__(self) -> Any:
        return self._ask("iter", self)

    def __next__(self) -> object:
        return self._ask("next", self)


class EndedError(BaseException):
    """The program's side answers no more."""


def judge(asks_fd: int, answers_fd: int) -> None:
    """The tests' side: load the program over there, run the tests here. Says a line when it starts, and its verdict."""
    program, tests = json.load(sys.stdin)
    out, asks, answers = os.dup(1), os.fdopen(asks_fd, "w"), os.fdopen(answers_fd)
    silence()
    handles: dict[int, Handle] = {}
    ended = False

    def number(value: object) -> int:
        if not isinstance(value, Handle):
            raise TypeError(f"a program cannot be given a {type(value).__name__}")
        return value._number

    def find(told: int) -> Handle:
        return handles.setdefault(told, Handle(told, ask))

    def ask(*what: object) -> Any:
        nonlocal ended
        line = json.dumps(plain([*what], number))
        try:
            asks.write(f"{line}\n")
            asks.flush()
            done, value, *text = made(json.loads(answers.readline()), find)
        except Exception:
            ended = True  # remembered, since tests may catch everything
            raise EndedError from None
        if done is True:
            return value
        kind = getattr(builtins, value)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        if kind is StopIteration and what[0] != "next":
            kind = RuntimeError  # or the tests would take it for the end of a loop of theirs
        raise kind(*text)

    ask("start")
    os.write(out, b"started\n")
    try:
        ask("load", program)
        code = compile(tests, "<tests>", "exec")
        exec(code, names(code, ask))
        why = "passed"
    except BaseException as error:
        why = blame(error, tests)
    os.write(out, f"{ENDED if ended else why}\n".encode(errors="replace"))
    os._exit(0)


def names(code: types.CodeType, ask: Callable) -> dict[str, object]:
    """Those of the program that the tests name. Builtins and modules stay what they are, unless there are no others."""
    codes, named = [code], set()
    for part in codes:
        named |= {name for name in part.co_names if not name.startswith("__")}
        codes += [inner for inner in part.co_consts if isinstance(inner, types.CodeType)]
    told = ask("names", sorted(named))
    found = {name: told[name] for name in named if name in told}
    taken = {name for name in found if hasattr(builtins, name) or name in sys.stdlib_module_names}
    if taken < found.keys():
        for name in taken:
            found[name] = getattr(builtins, name) if hasattr(builtins, name) else __import__(name)
    return {**found, "__name__": "tests"}


def blame(error: BaseException, tests: str) -> str:
    """An error in one short line, with the tests' line where it says nothing itself."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = tests.splitlines()[trace.tb_lineno - 1]
        trace = trace.tb_next
    return " ".join(f"{type(error).__name__}: {str(error) or line}"[:1000].split())
