"""Prepared data: what is on disk is the text, re-used while nothing changes, never used when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from crosslayer.data import DataConfig, PreparedData, Tokenizer, TokenStream, default_cache_dir, open_prepared, prepare
from crosslayer.data import shards as shards_module
from crosslayer.data.corpus import split_documents
from crosslayer.data.shards import Shard, ShardWriter, record_dtype
from crosslayer.errors import UserError
from tests.limits import file_size_limit

TEXTS = [f"Document {i}: é 世界 😀 and {'some more words ' * (i % 7)}\n" for i in range(200)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    return DataConfig("jsonl", str(tmp_path / "texts.jsonl"), valid_fraction=0.2, vocab_size=300)


def quietly(config: DataConfig, cache: Path) -> PreparedData:
    return prepare(config, cache, progress=lambda line: None)


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    ids = stream.read(0, len(stream))
    return [
        tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
    ]


def test_the_streams_are_the_documents(config: DataConfig, tmp_path: Path) -> None:
    data = quietly(config, tmp_path)
    for split, stream in (("train", data.train), ("valid", data.valid)):
        expected = [document.text for side, document in split_documents(config) if side == split]
        assert documents(stream, data.tokenizer) == expected
        assert stream.documents == len(expected)
        assert stream.text_bytes == sum(len(text.encode()) for text in expected)
        assert stream.read(len(stream) - 1, len(stream)).tolist() == [data.tokenizer.eos_id]
    train_text = [document.text for side, document in split_documents(config) if side == "train"]
    assert data.tokenizer.files() == Tokenizer.train(train_text, 300).files()
    assert data.train.read(3, 9).dtype == np.int64


def test_bytes_of_any_range_add_up_to_the_text(config: DataConfig, tmp_path: Path) -> None:
    data = quietly(config, tmp_path)
    assert data.valid.measured
    assert not data.train.measured
    widths = data.valid.read_bytes(0, len(data.valid))
    assert widths.sum() == data.valid.text_bytes
    ids = data.valid.read(0, len(data.valid))
    ends = np.flatnonzero(ids == data.tokenizer.eos_id)
    sizes = [widths[start:stop].sum() for start, stop in zip([0, *ends[:-1] + 1], ends + 1, strict=True)]
    assert sizes == [len(text.encode()) for text in documents(data.valid, data.tokenizer)]
    assert (widths[ends] == 0).all()


def test_shards_are_bounded_and_read_across(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_BATCH_CHARACTERS", 300)
    tokenizer = Tokenizer.train(TEXTS, 300)
    writer = ShardWriter(tmp_path, "valid", tokenizer, measured=True, shard_tokens=500)
    for text in TEXTS:
        writer.add(text)
    shards = writer.close()
    assert len(shards) > 5
    assert all(shard.tokens < 500 + 2 * 300 for shard in shards)
    stream = TokenStream.open(tmp_path, writer.dtype, shards)
    memory = TokenStream.from_texts(tokenizer, TEXTS)
    assert (len(stream), stream.documents, stream.text_bytes) == (len(memory), memory.documents, memory.text_bytes)
    flat = np.concatenate([[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS])
    widths = memory.read_bytes(0, len(memory))
    assert len(stream) == len(flat)
    generator = np.random.default_rng(0)
    for start, stop in [(0, len(flat)), (5, 5), *np.sort(generator.integers(0, len(flat), (50, 2)), axis=1)]:
        assert (stream.read(start, stop) == flat[start:stop]).all()
        assert (stream.read_bytes(start, stop) == widths[start:stop]).all()
    with pytest.raises(IndexError):
        stream.read(0, len(flat) + 1)


def test_a_large_vocabulary_gets_wider_records(tmp_path: Path) -> None:
    assert record_dtype(2**16, False).itemsize == 2
    assert record_dtype(2**16 + 1, False).itemsize == 4
    backend = Tokenizer.train(TEXTS, 300).backend
    backend.add_tokens([f"<{i}>" for i in range(2**16)])
    tokenizer = Tokenizer(backend)
    writer = ShardWriter(tmp_path, "train", tokenizer, measured=False)
    writer.add("a<65000>")
    stream = TokenStream.open(tmp_path, writer.dtype, writer.close())
    assert stream.read(0, 3).tolist() == [*tokenizer.encode("a<65000>"), tokenizer.eos_id]
    assert stream.read(1, 2)[0] > 2**16 - 600


@pytest.mark.parametrize("normalizer", [normalizers.Strip(), normalizers.NFC(), normalizers.NFD(), normalizers.NFKC()])
def test_text_that_a_tokenizer_drops_or_rewrites_still_counts(normalizer: normalizers.Normalizer) -> None:
    backend = Tokenizer.train(TEXTS, 300).backend
    backend.normalizer = normalizer
    texts = ["  words   ", "café ﬁne ①", "order a\u0301\u0323 of marks", "e\u0301 e\u0323\u0301"]
    stream = TokenStream.from_texts(Tokenizer(backend), texts)
    widths = stream.read_bytes(0, len(stream))
    ends = np.flatnonzero(stream.read(0, len(stream)) == 0) + 1
    assert (widths >= 0).all()
    assert np.diff(np.cumsum(widths)[ends - 1], prepend=0).tolist() == [len(text.encode()) for text in texts]


def test_a_full_disk(config: DataConfig, tmp_path: Path) -> None:
    message = r"cache folder .* cannot be written \(File too large\); set CROSSLAYER_CACHE"
    with file_size_limit(3000), pytest.raises(UserError, match=message):
        quietly(config, tmp_path)
    assert not list((tmp_path / "data").iterdir())


def test_an_error_without_a_number_says_what_it_says(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(ShardWriter, "add", broken)
    with pytest.raises(UserError, match=r"cannot be written \(the disk is on fire\); set CROSSLAYER_CACHE"):
        quietly(config, tmp_path)


def test_reuse_and_redo(config: DataConfig, tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare(config, tmp_path, lines.append)
    assert any(line.startswith("training a tokenizer") for line in lines)
    assert lines[-1] == f"prepared {first.summary()}"
    lines.clear()
    files = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(config, tmp_path, lines.append).folder == first.folder
    assert not lines
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == files

    def changed(**changes: Any) -> Path:
        return quietly(DataConfig(**{**config.__dict__, **changes}), tmp_path).folder

    folders = {first.folder, changed(valid_fraction=0.3), changed(vocab_size=290), changed(max_bytes=5000)}
    first.tokenizer.save(tmp_path)
    folders.add(changed(tokenizer=str(tmp_path)))
    named = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    folders.add(changed(tokenizer=str(tmp_path)))
    path = Path(config.paths[0])
    path.write_text(path.read_text(encoding="utf-8").replace("more", "MORE"), encoding="utf-8")
    folders.add(changed())
    assert len(folders) == 7
    assert not list((tmp_path / "data").glob(".*"))


def test_the_fingerprint_is_that_of_the_content(config: DataConfig, tmp_path: Path) -> None:
    first = quietly(config, tmp_path)

    def changed(**changes: Any) -> PreparedData:
        return quietly(DataConfig(**{**config.__dict__, **changes}), tmp_path)

    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(config.paths[0], copy)
    os.utime(copy, ns=(0, 0))
    again = changed(paths=str(copy))
    assert again.folder != first.folder
    assert again.fingerprint == first.fingerprint

    first.tokenizer.save(tmp_path)
    assert changed(tokenizer=str(tmp_path)).fingerprint == first.fingerprint
    prints = {first.fingerprint, changed(valid_fraction=0.3).fingerprint, changed(vocab_size=290).fingerprint}
    prints.add(changed(tokenizer=str(tmp_path), eos_token="a").fingerprint)
    copy.write_text(copy.read_text(encoding="utf-8").replace("more", "MORE", 1), encoding="utf-8")
    prints.add(changed(paths=str(copy)).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin", "tokenizer.json", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_damage_is_detected_and_prepared_again(config: DataConfig, tmp_path: Path, name: str, damage: str) -> None:
    first = quietly(config, tmp_path)
    path = first.folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"is damaged|is missing"):
        open_prepared(first.folder)
    lines: list[str] = []
    again = prepare(config, tmp_path, lines.append)
    assert lines[0].endswith("preparing the data again")
    assert str(first.folder) in lines[0]
    assert (again.folder / name).read_bytes() == content
    assert not list((tmp_path / "data").glob(".*"))


def test_an_index_with_other_figures_is_damaged(config: DataConfig, tmp_path: Path) -> None:
    index = quietly(config, tmp_path).folder / "index.json"
    content = json.loads(index.read_text())
    content["valid"][0]["text_bytes"] += 1  # on which bits per byte depend
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is damaged: its index\.json is altered"):
        open_prepared(index.parent)


def test_a_shard_with_bytes_of_another_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS, 300)
    writer = ShardWriter(tmp_path, "train", tokenizer, measured=False)
    writer.add(TEXTS[0])
    [shard] = writer.close()
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged: .* bytes where its index says"):
        TokenStream.open(tmp_path, record_dtype(300, measured=True), [shard])
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged: its checksum"):
        TokenStream.open(tmp_path, writer.dtype, [Shard(**{**shard.__dict__, "crc32": shard.crc32 ^ 1})])


def test_a_failure_leaves_nothing(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no field 'body'"):
        quietly(DataConfig(**{**config.__dict__, "text_field": "body"}), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "data").iterdir())
    with pytest.raises(UserError, match=r"cannot be written .* set CROSSLAYER_CACHE"):
        quietly(config, Path(config.paths[0]))


def _prepare(arguments: tuple[DataConfig, Path]) -> tuple[str, int]:
    data = quietly(*arguments)
    return data.fingerprint, int(data.train.read(0, len(data.train)).sum())


def test_processes_that_prepare_at_once_agree(config: DataConfig, tmp_path: Path) -> None:
    program = "import sys; from tests.data.test_prepared import _prepare; from crosslayer.data import DataConfig; "
    program += "from pathlib import Path; print(_prepare((DataConfig('jsonl', sys.argv[1], valid_fraction=0.2, "
    program += "vocab_size=300), Path(sys.argv[2]))))"
    command = [sys.executable, "-c", program, config.paths[0], str(tmp_path)]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert outputs == {f"{_prepare((config, tmp_path))}\n"}
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CROSSLAYER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "crosslayer"
    monkeypatch.setenv("CROSSLAYER_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("CROSSLAYER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "crosslayer"


def test_progress_tells_rate_and_time_left(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslayer.data.prepared._SECONDS_BETWEEN_REPORTS", 0.0)
    lines: list[str] = []
    prepare(config, tmp_path, lines.append)
    tokenising = [line for line in lines if line.startswith("tokenising")]
    assert "MB/s" in tokenising[0]
    assert "left" in tokenising[0]
    assert "100% done, 0:00 left" in tokenising[-1]
