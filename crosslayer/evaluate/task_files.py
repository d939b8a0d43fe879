"""Task sets as their authors published them: files to items.

Paths are those below the folder that the user names. Each file may also be compressed, with .xz, .bz2 or .gz after its
name.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError

_DECOMPRESS = {".xz": lzma.decompress, ".bz2": bz2.decompress, ".gz": gzip.decompress}


@dataclass(frozen=True)
class Item:
    """A question: `context` followed by one of the `choices`, of which number `gold` is right. The text of a choice
    follows the context after a space. `subset` is the part of the set that it belongs to, where that matters."""

    context: str
    choices: tuple[str, ...]
    gold: int = 0
    subset: str = ""


def read_lambada(folder: Path) -> list[Item]:
    """LAMBADA, OpenAI's version: the last word of a passage."""
    rows = _json_rows(folder / "mosaic-gauntlet" / "lambada_openai.jsonl")
    return [Item(_text(row, "context", at).rstrip(), (_text(row, "continuation", at).strip(),)) for at, row in rows]


def read_questions(folder: Path, name: str) -> list[Item]:
    """A set of `query`, `choices` and `gold` (ARC, PIQA), asked as "Question: …", "Answer:"."""
    items = []
    for at, row in _json_rows(folder / "mosaic-gauntlet" / f"{name}.jsonl"):
        choices, gold = row.get("choices"), row.get("gold")
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise UserError(f"{at}: want a list of texts in the field 'choices'")
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise UserError(f"{at}: want the number of a choice in the field 'gold', got {gold!r}")
        items.append(Item(f"{_text(row, 'query', at).strip()}\nAnswer:", tuple(c.strip() for c in choices), gold))
    return items


def read_hellaswag(folder: Path) -> list[Item]:
    """HellaSwag's validation set as text, six lines an item: context, number of the right ending, four endings."""
    file, text = _read(folder / "hellaswag" / "hellaswag_val_full.txt")
    lines = text.rstrip("\n").split("\n")
    items = []
    for start in range(0, len(lines), 6):
        six = [line.strip() for line in lines[start : start + 6]]
        if len(six) != 6 or not all(six) or six[1] not in ("0", "1", "2", "3"):
            raise UserError(f"{file}, line {start + 1}: want a context, the number of an ending, and four endings")
        items.append(Item(six[0], tuple(six[2:]), int(six[1])))
    return items


def read_blimp(folder: Path) -> list[Item]:
    """BLiMP: pairs of sentences, of which the first is grammatical."""
    place = folder / "blimp" / "data"
    files = sorted({re.sub(r"\.(xz|bz2|gz)$", "", str(file)) for file in place.glob("*.jsonl*")})
    if not files:
        raise UserError(f"{place}: no such folder, or no *.jsonl in it")
    rows = ((at, row) for file in files for at, row in _json_rows(Path(file)))
    return [
        Item("", (_text(row, "sentence_good", at), _text(row, "sentence_bad", at)), 0, _text(row, "UID", at))
        for at, row in rows
    ]


def read_wikitext(folder: Path) -> list[str]:
    """The articles of WikiText-2's test set, as they are in the file (tokenised, rare words replaced by <unk>)."""
    file, text = _read(folder / "wikitext-2" / "test.txt")
    # An article begins at a heading of the first level between empty lines.
    starts = [match.start() for match in re.finditer(r"(?m)^ ?\n = [^=\n].* = \n ?\n", text)]
    if not starts:
        raise UserError(f"{file}: no article heading such as ' = Title = ' in it")
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place, for messages, and the object of each line."""
    found, text = _read(file)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{found}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{found}, line {number}: want a JSON object")
        yield f"{found}, line {number}", row


def _text(row: dict[str, Any], name: str, at: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: want text in the field {name!r}")
    return value


def _read(file: Path) -> tuple[Path, str]:
    """The path that was found, plain or compressed, and its text."""
    for suffix in ("", *_DECOMPRESS):
        found = file.with_name(file.name + suffix)
        if not found.is_file():
            continue
        try:
            content = found.read_bytes()
            return found, (_DECOMPRESS[suffix](content) if suffix else content).decode()
        except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{found}: cannot be read: {error}") from None
    raise UserError(f"{file}: no such file, nor one with {', '.join(_DECOMPRESS)}")
