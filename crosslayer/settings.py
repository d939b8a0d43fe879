"""Config files: YAML or TOML plus key=value overrides, read strictly into dataclasses.

Every key must be a field of the dataclass it lands in and every value must have the field's type; anything else is an
error that names the key and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from crosslayer.errors import UserError

T = TypeVar("T")


def load_settings(cls: type[T], file: Path | None, overrides: Iterable[str] = ()) -> T:
    """Read `file` (none: every default), apply overrides such as `train.learning_rate=1e-3`, and build a `cls`.

    Raises:
        UserError: the file is missing or malformed, or a key or value does not fit; one line that names both.
    """
    data = _read(file) if file is not None else {}
    for override in overrides:
        _override(data, override)
    try:
        return from_mapping(cls, data)
    except UserError as error:
        raise UserError(f"{file or 'config'}: {error}") from None


def from_mapping(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from nested mappings. `where` is the dotted place of `data`, for messages.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise unknown_key(key, known, where)
    values = {key: _convert(hints[key], value, f"{where}{key}") for key, value in data.items()}
    for name, field in known.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}{name} is missing")
    try:
        return typing.cast(T, cls(**values))
    except UserError as error:
        raise UserError(f"{where.rstrip('.')}: {error}" if where else str(error)) from None


def unknown_key(key: object, known: Iterable[str], where: str = "") -> UserError:
    """The error for a key that is not among `known`, naming the nearest one."""
    known = list(known)
    near = get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}"
    return UserError(f"unknown key {where}{key}; {hint}")


def to_mapping(settings: Any) -> dict[str, Any]:
    """The dataclass as plain nested mappings that `from_mapping` reads back."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text) if file.suffix == ".toml" else _load_yaml(text)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # TOML's and Unicode's errors are ValueErrors too
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{file}: want a mapping of settings, got {type(data).__name__}")
    return data or {}


def _load_yaml(text: str) -> Any:
    """Like yaml.safe_load, but a key that is set twice is an error instead of the first being lost.

    Raises:
        ValueError: not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{name} is set twice in one section")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r}: want key=value, such as train.learning_rate=1e-3")
    *sections, last = path.split(".")
    for section in sections:
        if data.get(section) is None:  # also a section that the file leaves empty
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    try:
        data[last] = _load_yaml(text)
    except ValueError:
        raise UserError(f"override {override!r}: {text!r} is not a value") from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, or an error that says what the type wants."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, name)
            except UserError:
                continue
        return _convert(options[-1], value, name)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{name} must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if value is None and (dataclasses.is_dataclass(hint) or origin is dict):
        value = {}  # a section with nothing in it
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(typing.cast(type, hint), value, f"{name}.")
    if origin in (tuple, list) and arguments[0] is str and isinstance(value, str):
        value = [value]  # one path or name needs no brackets
    if origin in (tuple, list) and isinstance(value, list | tuple):
        items = (_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
        return tuple(items) if origin is tuple else list(items)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # also "1e-3", which YAML 1.1 reads as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if hint is int and number.is_integer():
            return int(number)
        if hint is float and not math.isnan(number):
            return number
    wanted = getattr(hint, "__name__", str(hint))
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(wanted, wanted)
    if dataclasses.is_dataclass(hint) or origin is dict:
        wanted = "a section of settings"
    elif origin in (tuple, list):
        wanted = "a list"
    raise UserError(f"{name} must be {wanted}, got {value!r}")
