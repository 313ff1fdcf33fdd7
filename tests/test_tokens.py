"""From files to tokens on disk: what is read, what is refused, how it is split and cached."""

import gzip
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma.config import ConfigError, Data
from gemma.text import corpus, documents, files, token_cache, tokenise, tokenizer, tokens
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


def read(data: Data) -> list[str]:
    """Every text that `data` names."""
    how = documents.reading(data)
    return [text for path in files.listing(data).files for text in documents.read(path, how, documents.Repaired())]


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
    assert read(chosen) == texts


def test_text_key_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert read(config(tmp_path / "a.jsonl", text_key="content")) == ["yes"]


def test_stdlib_needs_no_file() -> None:
    assert len(files.listing(replace(config(Path("x")), source="stdlib", path=None)).files) > 100


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
    monkeypatch.delattr(tokenise, "build")
    again = tokens.open_tokens(config(path), tmp_path / "cache", VOCAB)
    np.testing.assert_array_equal(again.train, first.train)


def test_a_build_that_dies_leaves_nothing_to_be_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokenise, "balance", die)  # both files are written by then
        with pytest.raises(KeyboardInterrupt):
            tokens.open_tokens(config(path), cache, VOCAB)
    assert any(cache.glob("tokens/*.partial"))
    opened = tokens.open_tokens(config(path), cache, VOCAB)
    assert sorted(texts_of(opened.train) + texts_of(opened.eval)) == TEXTS


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"}}")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["train.bin", "eval.bin", "meta.json"])
@pytest.mark.parametrize("damage", [cut, flip, grow, empty, Path.unlink])
def test_a_damaged_cache_is_made_anew_and_said(
    tmp_path: Path, damage: Callable[[Path], object], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    sound = tokens.open_tokens(config(path), cache, VOCAB)
    train, held_out = np.array(sound.train), np.array(sound.eval)
    (file,) = cache.glob(f"tokens/*/{name}")
    damage(file)
    again = tokens.open_tokens(config(path), cache, VOCAB)
    np.testing.assert_array_equal(again.train, train)
    np.testing.assert_array_equal(again.eval, held_out)
    assert again.meta.fingerprint == sound.meta.fingerprint
    assert "WARNING: the token cache is damaged" in capfd.readouterr().out


def test_a_large_cache_is_checked_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "EAGER_BYTES", 0)
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 256)
    path, cache = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    opened = tokens.open_tokens(config(path), cache, VOCAB)
    (file,) = cache.glob("tokens/*/train.bin")
    with open(file, "r+b") as raw:
        raw.seek(5 * 256 + 7)
        raw.write(b"\xff")
    opened = tokens.open_tokens(config(path), cache, VOCAB)
    size = 128  # tokens of two bytes
    assert len(opened.train[0 : 5 * size]) == 5 * size
    assert len(opened.train[6 * size :]) == len(opened.train) - 6 * size
    with pytest.raises(token_cache.DamagedError, match=r"train\.bin: bytes 1280"):
        opened.train[5 * size - 3 : 5 * size + 1]
    assert not file.exists()


def test_the_fingerprint_is_that_of_what_is_on_disk(opened: tokens.Tokens, tmp_path: Path) -> None:
    (folder,) = (path.parent for path in tmp_path.glob("cache/tokens/*/meta.json"))
    assert opened.meta.digests == {name: token_cache.digests(folder / f"{name}.bin") for name in ("train", "eval")}
    other = replace(opened.meta, digests=opened.meta.digests | {"train": ["0" * 32]})
    assert other.fingerprint != opened.meta.fingerprint


def test_text_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenise.build

    def build(*args: object) -> None:
        real(*args)
        write_jsonl(path, [*TEXTS, "one more"])

    monkeypatch.setattr(tokenise, "build", build)
    with pytest.raises(ConfigError, match="data.path=.*a.jsonl: changed while it was read"):
        tokens.open_tokens(config(path), tmp_path / "cache", VOCAB)
    assert not list(tmp_path.glob("cache/tokens/*/meta.json"))


def test_tokenising_goes_on_with_the_file_that_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "text"
    root.mkdir()
    for number in range(4):
        write_jsonl(root / f"{number}.jsonl", TEXTS[50 * number : 50 * number + 50])
    whole = tokens.open_tokens(config(root), tmp_path / "undisturbed", VOCAB)
    monkeypatch.setattr(tokenise, "SAVED_EVERY_S", 0.0)
    read, seen = documents.read, []

    def dying(path: Path, *rest: object) -> Iterator[str]:
        seen.append(path.name)
        for index, text in enumerate(read(path, *rest)):
            if seen.count("2.jsonl") == 1 and path.name == "2.jsonl" and index == 30:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(documents, "read", dying)
    monkeypatch.setattr(tokenise, "GROUP_BYTES", 100)
    with pytest.raises(KeyboardInterrupt):
        tokens.open_tokens(config(root), tmp_path / "cache", VOCAB)
    again = tokens.open_tokens(config(root), tmp_path / "cache", VOCAB)
    assert seen == ["0.jsonl", "1.jsonl", "2.jsonl", "2.jsonl", "3.jsonl"]
    assert again.meta == whole.meta
    np.testing.assert_array_equal(again.train, whole.train)


def test_who_waits_for_another_to_tokenise_says_for_whom_and_for_how_long(tmp_path: Path) -> None:
    with (
        tokenise.lock(tmp_path / "a.lock", 1.0),
        pytest.raises(TimeoutError, match=f"waited 0 s for process {os.getpid()} on .* to tokenise the same text"),
        tokenise.lock(tmp_path / "a.lock", 0.1),
    ):
        pass


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
