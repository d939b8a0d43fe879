"""Sources and splits: the same documents every time, whole, on the right side, and mistakes named."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crosslayer.data import DataConfig, corpus, read_documents
from crosslayer.data.corpus import source_state, split_documents
from crosslayer.errors import UserError

TEXTS = [f"Document {i} says é 世界 😀.\nIts second line.\n" * (i % 3 + 1) for i in range(60)]


def texts_of(config: DataConfig) -> list[str]:
    return [document.text for document in read_documents(config, config.paths)]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


# Every source gives the documents that were written


@pytest.mark.parametrize(
    ("name", "opened"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)], ids=lambda v: str(v)
)
def test_json_lines(tmp_path: Path, name: str, opened: Any) -> None:
    with opened(tmp_path / name, "wb") as file:
        file.write(jsonl(TEXTS[:30], "body") + b"\n" + b'{"body": null}\n{"body": ""}\n' + jsonl(TEXTS[30:], "body"))
    documents = list(read_documents(DataConfig("jsonl", str(tmp_path), text_field="body"), [str(tmp_path / name)]))
    assert [document.text for document in documents] == TEXTS
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in TEXTS]
    assert documents[-1].done == pytest.approx(1.0)


def test_text_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.txt", "a.txt", "Z.txt", "note.md"):
        (tmp_path / name).write_bytes(f"{name} text\r\n".encode())
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"c text\n"))
    by_folder = ["Z.txt text\r\n", "a.txt text\r\n", "b.txt text\r\n", "c text\n", "sub/a.txt text\r\n"]
    assert texts_of(DataConfig("text", str(tmp_path))) == by_folder
    assert texts_of(DataConfig("text", (f"{tmp_path}/*.md", f"{tmp_path}/**/a.txt"))) == [
        "note.md text\r\n",
        "a.txt text\r\n",
        "sub/a.txt text\r\n",
    ]
    assert texts_of(DataConfig("text", [f"{tmp_path}/a.txt", str(tmp_path)])).count("a.txt text\r\n") == 1


def test_a_large_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslayer.data.sources.TEXT_DOCUMENT", 500)
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 700)
    whole = "".join(f"line {i} é\n" for i in range(400)) + "x" * 2000
    (tmp_path / "book.txt").write_bytes(whole.encode())
    config = DataConfig("text", str(tmp_path / "book.txt"))
    pieces = [document.text for document in read_documents(config, config.paths, longest=700)]
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= 700
    assert all(piece.endswith("\n") for piece in pieces if not piece.startswith("x"))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": range(30), "body": TEXTS[:30]}), tmp_path / "0.parquet", row_group_size=7)
    pq.write_table(pa.table({"body": [None, *TEXTS[30:]]}), tmp_path / "1.parquet")
    config = DataConfig("parquet", str(tmp_path), text_field="body")
    assert texts_of(config) == TEXTS
    with pytest.raises(UserError, match=r"0\.parquet: no column 'text'; it has n, body"):
        texts_of(DataConfig("parquet", str(tmp_path)))
    with pytest.raises(UserError, match=r"0\.parquet, row 1: field 'n' is a int, not text"):
        texts_of(DataConfig("parquet", str(tmp_path), text_field="n"))
    (tmp_path / "2.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"2\.parquet: cannot be read as Parquet"):
        texts_of(config)


def test_a_local_dataset_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(TEXTS[:40]))
    (folder / "validation.jsonl").write_bytes(jsonl(TEXTS[40:]))
    config = DataConfig("huggingface", str(folder), valid_paths=f"{folder}::validation")
    splits = [(split, document.text) for split, document in split_documents(config)]
    assert splits == [("train", text) for text in TEXTS[:40]] + [("valid", text) for text in TEXTS[40:]]
    with pytest.raises(UserError, match=r"::nosuch' cannot be opened: .*nosuch"):
        texts_of(DataConfig("huggingface", f"{folder}::nosuch"))


def test_what_a_dataset_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*names: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append((*names, options["split"], options["revision"], options["streaming"]))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    names = ("org/a", "org/a@v1", "org/a:sub", "org/a@v1:sub:test", "org/a::test[:10]")
    with pytest.raises(UserError, match=r"is not NAME\[@REVISION\]"):
        texts_of(DataConfig("huggingface", names))
    assert calls == [
        ("org/a", None, "train", None, True),
        ("org/a", None, "train", "v1", True),
        ("org/a", "sub", "train", None, True),
        ("org/a", "sub", "test", "v1", True),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets: pip install 'crosslayer\[data\]'"):
        texts_of(DataConfig("huggingface", "org/a"))


def test_a_dataset_that_breaks_off_is_named_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield from ({"text": text} for text in TEXTS[:3])
        raise RuntimeError("the connection broke\nat byte 17")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    with pytest.raises(UserError, match=r"^dataset org/a, row 3: cannot be read: the connection broke$"):
        texts_of(DataConfig("huggingface", "org/a"))


# The standard library


def test_the_standard_library_and_its_tokenizer_are_the_same_from_anywhere(tmp_path: Path) -> None:
    program = (
        "import hashlib\n"
        "from crosslayer.data import Tokenizer, corpus\n"
        "digest = hashlib.sha256()\n"
        "documents = list(corpus.split_documents(corpus.DataConfig(max_bytes=1_000_000)))\n"
        "for split, document in documents:\n"
        "    digest.update(f'{split} {document.key} {document.text}'.encode())\n"
        "digest.update(str(Tokenizer.train((d.text for _, d in documents), 1000).files()).encode())\n"
        "print(digest.hexdigest(), corpus.source_state(corpus.DataConfig()))\n"
    )
    root = str(Path(__file__).parents[2])
    outputs = set()
    for folder, changes in (
        (root, {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}),
        (str(tmp_path), {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "2", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    ):
        environment = {**os.environ, "PYTHONPATH": root, **changes}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_the_standard_library_is_sources_held_out_by_file() -> None:
    documents = list(split_documents(DataConfig()))
    root = Path(sysconfig.get_path("stdlib"))
    keys = Counter(document.key for _, document in documents)
    assert max(keys.values()) == 1
    assert not [key for key in keys if key.startswith(("test/", "site-packages/", "idlelib/", "encodings/"))]
    total = sum(document.num_bytes for _, document in documents)
    assert total == corpus.STDLIB_BYTES  # as all common Pythons ship more than that
    whole = [d for _, d in documents if (root / d.key).read_bytes().decode().replace("\r\n", "\n") == d.text]
    assert len(whole) >= len(documents) - 1  # the last one read is cut at the budget
    held_out = {document.key for split, document in documents if split == "valid"}
    assert 0.01 < sum(d.num_bytes for _, d in documents if d.key in held_out) / total < 0.15
    # A smaller budget keeps each file on its side.
    smaller = list(split_documents(DataConfig(max_bytes=2_000_000)))
    assert {document.key for split, document in smaller if split == "valid"} <= held_out


# Splits and budgets


def test_held_out_documents_are_a_share_that_does_not_move(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(4000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "b.jsonl").write_bytes(jsonl([*texts[2000:], *texts[:1000], *texts[:1000]]))

    def sides(name: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"train": set(), "valid": set()}
        for split, document in split_documents(DataConfig("jsonl", str(tmp_path / name), valid_fraction=0.1)):
            found[split].add(document.text)
        return found

    first, second = sides("a.jsonl"), sides("b.jsonl")
    assert first["train"] | first["valid"] == set(texts)
    assert not first["train"] & first["valid"]
    assert not second["train"] & second["valid"]
    assert second["valid"] == first["valid"] & (second["train"] | second["valid"])
    assert 320 < len(first["valid"]) < 480  # 400 expected, standard deviation 19


def test_few_documents_still_give_a_validation_split(tmp_path: Path) -> None:
    for count in (2, 3, 10):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(jsonl([f"text {i}" for i in range(count)]))
        splits = Counter(split for split, _ in split_documents(DataConfig("jsonl", str(path), valid_fraction=1e-9)))
        assert splits == {"train": count - 1, "valid": 1}
    lone = tmp_path / "lone.txt"
    lone.write_text("to be or not to be\n" * 4000)  # 76 kB
    documents = list(split_documents(DataConfig("text", str(lone), valid_fraction=1e-9)))
    assert [split for split, _ in documents].count("valid") == 1
    assert sum(document.num_bytes for _, document in documents) == lone.stat().st_size
    assert max(document.num_bytes for _, document in documents) <= corpus.LONE_TEXT_DOCUMENT


def test_copies_are_on_one_side_when_one_document_is_to_be_held_out(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(5)]
    for start in range(5):
        path = tmp_path / f"{start}.jsonl"
        path.write_bytes(jsonl([*texts[start:], *texts, *texts[:start], texts[start]]))
        sides: dict[str, Counter[str]] = {"train": Counter(), "valid": Counter()}
        for split, document in split_documents(DataConfig("jsonl", str(path), valid_fraction=1e-9)):
            sides[split][document.text] += 1
        assert sides["train"] + sides["valid"] == Counter([*texts, *texts, texts[start]])
        assert len(sides["valid"]) == 1
        assert not sides["train"].keys() & sides["valid"].keys()
    (tmp_path / "copies.jsonl").write_bytes(jsonl(["the same"] * 3))
    with pytest.raises(UserError, match="single document, so none can be held out"):
        list(split_documents(DataConfig("jsonl", str(tmp_path / "copies.jsonl"))))


def test_validation_paths_are_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:50]))
    (tmp_path / "v.jsonl").write_bytes(jsonl(TEXTS[50:]))
    config = DataConfig("jsonl", str(tmp_path / "a.jsonl"), valid_paths=str(tmp_path / "v.jsonl"))
    assert [(split, document.text) for split, document in split_documents(config)] == [
        *(("train", text) for text in TEXTS[:50]),
        *(("valid", text) for text in TEXTS[50:]),
    ]


@pytest.mark.parametrize("limit", [1, 17, 18, 19, 21, 1000])
def test_the_byte_budget_is_kept_and_cuts_no_character(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    whole = "".join(TEXTS)
    got = "".join(texts_of(DataConfig("jsonl", str(path), max_bytes=limit)))
    assert whole.startswith(got)
    assert limit - 4 < len(got.encode()) <= limit


def test_state_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    config = DataConfig("jsonl", str(path))
    before = source_state(config)
    assert source_state(DataConfig("jsonl", str(tmp_path / "*.jsonl"))) == before
    os.utime(path, ns=(0, 0))
    assert source_state(config) != before
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS))
    assert source_state(DataConfig("jsonl", str(tmp_path))) != source_state(config)


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: a JSON list, not an object"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', r"a\.jsonl, line 1: no field 'text'; it has body, id"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: field 'text' is a int, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl, line 1: half a surrogate pair at character 2"),
        ("a.jsonl", b'\n{"text": ""}\n', "has no text"),
        ("a.jsonl", b'{"text": "only"}\n', "a single document, so none can be held out; set valid_paths"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-30], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.xz", b"no xz at all", r"a\.jsonl\.xz: cannot be read"),
        ("a.txt", b"ok\n" * 1000 + b"caf\xe9\n", r"a\.txt: not UTF-8 at byte 3003"),
    ],
)
@pytest.mark.parametrize("block", [8, 2**21])
def test_bad_content_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosslayer.data.sources.TEXT_DOCUMENT", block)
    (tmp_path / name).write_bytes(content)
    source = "jsonl" if "jsonl" in name else "text"
    with pytest.raises(UserError, match=message) as caught:
        list(split_documents(DataConfig(source, str(tmp_path / name))))
    assert "\n" not in str(caught.value)


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        list(split_documents(DataConfig("jsonl", str(tmp_path / "gone.jsonl"))))
    with pytest.raises(UserError, match=r"has no \.txt, .* files; for others give a pattern"):
        list(split_documents(DataConfig("text", str(tmp_path))))
    (tmp_path / "v.txt").write_text("")
    with pytest.raises(UserError, match=r"validation paths .*v\.txt have no text"):
        list(split_documents(DataConfig("text", str(tmp_path / "a.md"), valid_paths=str(tmp_path / "v.txt"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "json"}, "'json' is not known; known: stdlib, text, jsonl, parquet, huggingface"),
        ({"paths": "a.txt"}, "stdlib takes no paths"),
        ({"source": "text"}, "text needs paths"),
        ({"valid_fraction": 0.0}, "valid_fraction must lie between 0 and 1"),
        ({"max_bytes": 0}, "max_bytes must be positive"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"eos_token": "</s>"}, "eos_token goes with an existing tokenizer"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)
