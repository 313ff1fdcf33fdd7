"""Which files a path names, what is left out and said, and what is no text."""

import gzip
import json
from pathlib import Path

import pytest

from gemma.config import ConfigError, Eval
from gemma.text import corpus, documents, files
from tests.small_text import BATCH, TEXTS, VOCAB, config, write_jsonl

GOOD = " ".join(TEXTS)
NO_SETS = Eval(every=0, rows=8, sets=None, tasks=(), limit=None, data=None)
MB = 1_000_000  # the limit of the tests' config


def check(path: Path) -> None:
    """All of the small files is read."""
    corpus.check(config(path), BATCH)


@pytest.mark.parametrize("name", ["a.parquet", "a.pdf", "a.json", "a", "a.bin", "a.txt.zst", "a.csv.gz"])
@pytest.mark.parametrize("glob", [False, True], ids=["by-name", "by-glob"])
def test_a_suffix_that_is_not_read_is_refused_of_a_file_and_a_glob(tmp_path: Path, name: str, glob: bool) -> None:
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(ConfigError, match=r"data\.path=.*read are \.txt"):
        check(tmp_path / ("*" if glob else name))


@pytest.mark.parametrize(
    "raw, said",
    [
        (GOOD.encode("utf-16"), "at byte 0 .UTF-16"),
        (GOOD.encode("utf-16-be"), "at byte 0 .a zero byte"),
        (GOOD.encode("utf-32"), "at byte 0 .UTF-16 and UTF-32"),
        (GOOD.encode() + b"\0", f"at byte {len(GOOD)} .a zero byte"),
        (b"\x7fELF\x02\x01" + GOOD.encode() + bytes(9), f"at byte {len(GOOD) + 6} .a zero byte"),
        (GOOD.encode() + b"caf\xe9 " + GOOD.encode(), f"at byte {len(GOOD) + 3} "),
        (b"\xef\xbb\xbf" + GOOD.encode() + b"\xff", f"at byte {len(GOOD) + 3} "),
        (GOOD.encode() + b"\xf0\x9f\x99", f"at byte {len(GOOD)} "),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".md.gz", ".jsonl"])
def test_what_is_no_utf8_text_is_refused_by_file_and_byte(tmp_path: Path, raw: bytes, said: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    with pytest.raises(ConfigError, match=rf"data\.path: {path}(:1)? is not UTF-8 text, {said}"):
        check(path)


def test_every_folder_is_read_but_hidden_and_linked_ones_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "test/b.txt", "tests/c.jsonl", "node_modules/d.md", "B.TXT", "e.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in (".hidden/x.txt", ".y.txt", "z.parquet", "w.parquet", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no")
    (tmp_path / "test" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    found = files.listing(config(tmp_path))
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
        *("B.TXT", "a.txt", "e.ndjson", "node_modules/d.md", "test/b.txt", "tests/c.jsonl")
    ]
    assert found.reasons() == {
        ".parquet file": 2,
        "hidden folder": 1,
        "hidden file": 1,
        "file without suffix": 1,
        "link to a folder": 1,
        "link to nothing": 1,
    }


def test_what_was_left_out_is_said_and_written_down(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "half \ud83d a character"])
    (tmp_path / "b.parquet").write_text("no")
    texts = corpus.open_texts(config(tmp_path), NO_SETS, tmp_path.with_name("cache"), VOCAB)
    (said,) = corpus.warnings(texts)
    assert "1 files are read; left out: .parquet file (1)" in said
    assert (
        f"1 documents hold half a character (a lone surrogate), read as U+FFFD, the first {tmp_path}/a.jsonl:201"
        in said
    )
    corpus.record(texts, tmp_path / "data.json")
    written = json.loads((tmp_path / "data.json").read_text())["data"]
    assert written["first_left_out"] == [{"path": str(tmp_path / "b.parquet"), "reason": ".parquet file"}]
    assert (written["documents"], written["fingerprint"]) == (201, texts.own.tokens.meta.fingerprint)


@pytest.mark.parametrize("path", ["/", "/proc", "//", "/usr/.."])
def test_the_whole_file_system_is_no_corpus(path: str) -> None:
    with pytest.raises(ConfigError, match="data.path=.* is no directory of text"):
        check(Path(path))


def test_far_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_NAMES", 5)
    for number in range(6):
        (tmp_path / f"{number}.txt").touch()
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(ConfigError, match="data.path=.*more than 1,000,000 files"):
            check(path)


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("a.txt", b"x" * (MB + 1), "a.txt is a larger"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * MB + b'"}\n', "a.jsonl:2 is a larger"),
        ("a.txt.gz", gzip.compress(b"x" * (MB + 1)), "a.txt.gz is a larger"),
        ("a.jsonl.gz", gzip.compress(b"x" * (MB + 1)), "a.jsonl.gz:1 is a larger"),
    ],
)
def test_a_document_above_the_limit_is_refused_by_key_and_line(
    tmp_path: Path, name: str, raw: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    how = documents.reading(config(tmp_path))
    with pytest.raises(ConfigError, match=rf"data\.max_document_mb=1: .*{said}"):
        list(documents.read(tmp_path / name, how, documents.Repaired()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (b'{"text": "x"}\n' if name == "a.jsonl" else b"x"))
    how = documents.reading(config(tmp_path))
    assert list(documents.read(tmp_path / name, how, documents.Repaired())) == ["x"]


def test_a_text_that_a_check_reads_in_part_may_end_amid_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SMALL_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" + "é" * 800)
    check(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a=b", "a b", "a,b", "a[1]", "a'b", "a{b}"])
def test_a_path_of_special_characters_names_its_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    path = write_jsonl(tmp_path / name / f"{name}.jsonl", TEXTS)
    assert files.listing(config(path)).files == [path] == files.listing(config(path.parent)).files


def test_a_user_who_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.path=~nouser/x: "):
        check(Path("~nouser/x"))
