"""From messages to the tokens of a prompt, by the chat template that a model folder brings along."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crosslayer.data import Tokenizer
from crosslayer.errors import UserError
from crosslayer.files import read_json

# A character that no text has (Unicode reserves it for use inside a program), put into names of special tokens.
_CUT = "\ufdd0"


class ChatTemplate:
    """A template, and the special tokens it may use.

    The names of special tokens stand for these tokens where the template writes them, and are ordinary text inside a
    message: a message cannot end its turn and begin one of another role.

    `stop_token_ids` end a reply: the tokenizer's end-of-text token and those of generation_config.json.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, folder: Path) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        # Not those that are added and yet no special tokens, such as </think>: templates look for them in messages.
        added = self._backend.get_added_tokens_decoder().values()
        names = {token.content for token in added if token.special and len(token.content) > 1}
        self._special = sorted(names, key=len, reverse=True)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{folder}: the chat template does not compile: {error}") from None
        named = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        self._variables = {"bos_token": _content(named.get("bos_token")), "eos_token": tokenizer.eos_token}
        self.stop_token_ids = _stop_token_ids(folder, tokenizer)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template in chat_template.jinja, or the one that tokenizer_config.json has; None where there is none.

        Raises:
            UserError: it cannot be read, or is no template.
        """
        folder = Path(folder)
        file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), tokenizer, folder)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None
        source = read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return cls(source, tokenizer, folder) if isinstance(source, str) else None

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt that the next message continues.

        Raises:
            UserError: the template does not take such messages.
        """
        cut = [{key: self._cut(text) for key, text in message.items()} for message in messages]
        try:
            text = self._template.render(messages=cut, add_generation_prompt=True, **self._variables)
        except TemplateError as error:
            raise UserError(f"the model's chat template does not take these messages: {error}") from None
        except Exception as error:  # templates are programs: theirs are also TypeErrors, ZeroDivisionErrors, ...
            raise UserError(f"the model's chat template fails with these messages: {error!r}") from None
        # A name that is cut in two is encoded in two parts, neither of which is a special token.
        parts = self._backend.encode_batch(text.split(_CUT), add_special_tokens=False)
        return [token for part in parts for token in part.ids]

    def _cut(self, text: str) -> str:
        text = text.replace(_CUT, "")
        for name in self._special:
            text = text.replace(name, name[0] + _CUT + name[1:])
        return text


def _stop_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = ids if isinstance(ids, list) else [ids]
    return tuple({tokenizer.eos_id, *(token for token in ids if isinstance(token, int))})


def _content(token: Any) -> str:
    """Older configs spell a token out as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


# -- what templates expect to find ---------------------------------------------------------------------------------


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
