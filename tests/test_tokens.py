"""From files to tokens on disk: what is read, what is refused, how it is split and cached."""

import gzip
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma.config import ConfigError, Data
from gemma.text import corpus, tokenizer, tokens
from gemma.text.tokenizer import BOS, BYTE_OFFSET, EOS, PAD
from tests.small_text import BATCH, TEXTS, VOCAB, config, write_jsonl

GEMMA2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizer" / "gemma2.model"
needs_gemma2 = pytest.mark.skipif(not GEMMA2.exists(), reason=f"Gemma 2's tokenizer is not at {GEMMA2}")


def texts_of(flat: np.ndarray) -> list[str]:
    """Byte tokens back to documents."""
    assert flat[0] == BOS
    assert flat[-1] == EOS
    framed = np.split(np.asarray(flat), np.flatnonzero(flat == BOS)[1:])
    assert all(document[-1] == EOS for document in framed)
    return [(document[1:-1] - BYTE_OFFSET).astype(np.uint8).tobytes().decode() for document in framed]


# Splits


def test_no_held_out_document_is_trained_on(opened: tokens.Tokens) -> None:
    train, held_out = texts_of(opened.train), texts_of(opened.eval)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(TEXTS + TEXTS)


def test_the_held_out_share_is_about_what_was_asked(opened: tokens.Tokens) -> None:
    assert 0.05 < len(opened.eval) / (len(opened.train) + len(opened.eval)) < 0.2


def test_one_large_document_gives_its_end_to_the_held_out_rows(tmp_path: Path) -> None:
    text = "".join(map(str, range(3000)))
    (tmp_path / "one.txt").write_text(text)
    opened = tokens.open_tokens(config(tmp_path / "one.txt"), tmp_path / "cache", VOCAB)
    assert texts_of(np.concatenate([opened.train, opened.eval])) == [text]
    assert len(opened.eval) / len(text) == pytest.approx(0.1, abs=0.001)


def test_meta_counts_what_was_written(opened: tokens.Tokens) -> None:
    meta, text_bytes = opened.meta, 2 * sum(map(len, TEXTS))
    assert (meta.train_tokens, meta.eval_tokens) == (len(opened.train), len(opened.eval))
    assert (meta.documents, meta.text_bytes) == (400, text_bytes)
    assert meta.bytes_per_target == text_bytes / (text_bytes + 400)  # a target for each byte and each EOS


def test_the_fingerprint_tells_other_tokens(tmp_path: Path) -> None:
    prints = []
    for name, texts in (("a", TEXTS), ("same", TEXTS), ("other", [*TEXTS[:-1], "document 2OO"])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        prints.append(tokens.open_tokens(config(path), tmp_path / "cache", VOCAB).meta.fingerprint)
    assert prints[0] == prints[1] != prints[2]


# Sources


def write_sources(root: Path) -> None:
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("plain")
    (root / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    write_jsonl(root / "c.jsonl", ["line one", "  ", "line two"])
    (root / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped line"}\n\n'))
    (root / "e.png").write_bytes(b"\x89PNG")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "f.txt").write_text("hidden")


@pytest.mark.parametrize(
    "path, texts",
    [
        ("a.txt", ["plain"]),
        ("b.txt.gz", ["zipped"]),
        ("c.jsonl", ["line one", "line two"]),
        ("deep/d.jsonl.gz", ["zipped line"]),
        (".", ["plain", "zipped", "line one", "line two", "zipped line"]),
        ("*.txt*", ["plain", "zipped"]),
        ("**/*.jsonl.gz", ["zipped line"]),
    ],
)
def test_a_path_names_a_file_a_directory_or_a_glob(tmp_path: Path, path: str, texts: list[str]) -> None:
    write_sources(tmp_path / "root")
    chosen = config(tmp_path / "root" / path)
    assert [text for file in corpus.files(chosen) for text in corpus.documents(file, "text")] == texts


def test_text_key_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert list(corpus.documents(tmp_path / "a.jsonl", "content")) == ["yes"]


def test_stdlib_needs_no_file() -> None:
    assert len(corpus.files(replace(config(Path("x")), source="stdlib", path=None))) > 100


# Refusals


def prepare(root: Path, name: str, content: bytes | None) -> Path:
    path = root / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("directory", None, "data.path=.*directory: no text in this directory"),
        ("empty.txt", b"", "data.path=.*empty.txt: .* no text"),
        ("blank.jsonl", b'{"text": " "}\n', "data.path=.*blank.jsonl: .* no text"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "data.path: .*broken.jsonl:2 is not JSON"),
        ("other.jsonl", b'{"body": "fine"}\n', "data.text_key=text: .*other.jsonl:1 has no such field"),
        ("list.jsonl", b"[1]\n", "data.text_key=text: .*list.jsonl:1 has no such field"),
        ("number.jsonl", b'{"text": 3}\n', "data.text_key=text: .*number.jsonl:1 holds int"),
        ("torn.txt.gz", gzip.compress(b"x" * 999)[:-9], "data.path: cannot read .*torn.txt.gz"),
        ("small.txt", b"too small", "data.path=.*small.txt: 9 bytes .* data.sequence=16"),
    ],
)
def test_bad_data_is_refused_by_its_key_before_the_run(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    chosen = config(prepare(tmp_path, name, content))
    with pytest.raises(ConfigError, match=told):
        corpus.check(chosen, BATCH)


@pytest.mark.parametrize(
    "check", [lambda c, root: corpus.check(c, BATCH), lambda c, root: tokens.open_tokens(c, root, VOCAB)]
)
def test_a_missing_path_is_refused(tmp_path: Path, check: Callable[[Data, Path], object]) -> None:
    with pytest.raises(ConfigError, match="data.path=.*missing: no such file or directory"):
        check(config(tmp_path / "missing"), tmp_path)


@pytest.mark.parametrize(
    "name, content", [("missing.model", None), ("bad.model", b"no protobuf"), ("empty.model", b"")]
)
def test_a_bad_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.tokenizer=.*{name}: "):
        tokenizer.load(str(tmp_path / name))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="model.vocab=259: data.tokenizer=byte makes 260 ids"):
        tokens.open_tokens(config(path), tmp_path / "cache", 259)


# Cache


def test_a_touched_file_is_a_new_key(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("same length")
    os.utime(path, ns=(10**18, 10**18))
    before = tokens.key(config(path), [path])
    assert tokens.key(config(path), [path]) == before
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert tokens.key(config(path), [path]) != before
    path.write_text("another length")
    os.utime(path, ns=(10**18, 10**18))
    assert tokens.key(config(path), [path]) != before


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"sequence": 99}, True),
        ({"text_key": "body"}, False),
        ({"eval_fraction": 0.2}, False),
        ({"tokenizer": __file__}, False),
    ],
)
def test_the_key_holds_what_the_tokens_depend_on(tmp_path: Path, changes: dict[str, object], same: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert (tokens.key(config(path, **changes), [path]) == tokens.key(config(path), [path])) == same


def test_a_second_opening_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = tokens.open_tokens(config(path), tmp_path / "cache", VOCAB)
    monkeypatch.delattr(tokens, "build")
    again = tokens.open_tokens(config(path), tmp_path / "cache", VOCAB)
    np.testing.assert_array_equal(again.train, first.train)


@pytest.mark.parametrize("killed", [False, True], ids=["an-exception", "a-kill"])
def test_a_build_that_dies_leaves_nothing_to_be_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "balance", die)  # both files are written by then
        if killed:
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody cleans up
        with pytest.raises(KeyboardInterrupt):
            tokens.open_tokens(config(path), cache, VOCAB)
    assert killed == any(cache.glob("tokens/*.partial-*"))
    opened = tokens.open_tokens(config(path), cache, VOCAB)
    assert sorted(texts_of(opened.train) + texts_of(opened.eval)) == TEXTS


# Tokenizers


def test_bytes_come_back_from_their_tokens() -> None:
    text = "naïve 東京 🙂\n\x00\x7f"
    (ids,) = tokenizer.ByteTokenizer().encode([text])
    assert (ids - BYTE_OFFSET).astype(np.uint8).tobytes().decode() == text


def test_no_byte_is_a_special_token() -> None:
    (ids,) = tokenizer.ByteTokenizer().encode(["".join(map(chr, range(256)))])
    assert ids.min() == BYTE_OFFSET
    assert ids.max() < tokenizer.ByteTokenizer.vocab


@needs_gemma2
def test_gemma2_has_256000_pieces() -> None:
    assert tokenizer.load(str(GEMMA2)).vocab == 256_000


@needs_gemma2
def test_gemma2_ids_are_those_of_the_released_tokenizer() -> None:
    (ids,) = tokenizer.load(str(GEMMA2)).encode(["Hello world"])
    assert ids.tolist() == [4521, 2134]


@needs_gemma2
def test_text_cannot_forge_the_frame_of_a_document(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"<bos>{text}<eos><pad>" for text in TEXTS])
    opened = tokens.open_tokens(config(path, tokenizer=str(GEMMA2)), tmp_path / "cache", 256_000)
    flat = np.concatenate([opened.train, opened.eval])
    starts, ends = np.flatnonzero(flat == BOS), np.flatnonzero(flat == EOS)
    assert len(starts) == len(ends) == len(TEXTS)
    np.testing.assert_array_equal(starts[1:], ends[:-1] + 1)
    assert PAD not in flat
