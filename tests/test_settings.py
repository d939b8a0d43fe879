"""Settings files and overrides: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.settings import from_mapping, load_settings, to_mapping


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int = 3
    names: tuple[str, ...] = ()
    betas: tuple[float, ...] = (0.9, 0.95)
    mode: Literal["fast", "slow"] = "fast"
    compile: bool | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps must not be negative, got {self.steps}")


@dataclass(frozen=True)
class Outer:
    title: str
    inner: Inner = field(default_factory=Inner)
    second: Inner | None = None
    rates: dict[str, float] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    ids: int | tuple[int, ...] | None = None


def load(file: Path, text: str, *overrides: str) -> Outer:
    file.write_text(text, encoding="utf-8")
    return load_settings(Outer, file, overrides)


EXPECTED = Outer(
    "a run",
    Inner(rate=1e-3, steps=1_000_000, names=("a", "b"), mode="slow", compile=True),
    Inner(limit=7),
    {"x": 1.0},
    {"anything": [1, {"goes": None}]},
    (1, 2),
)


def test_yaml(tmp_path: Path) -> None:
    text = """
        title: a run
        inner: {rate: 1e-3, steps: 1e6, names: [a, b], mode: slow, compile: true}
        second:
            limit: 7
        rates: {x: 1}
        free: {anything: [1, {goes: null}]}
        ids: [1, 2]
    """
    assert load(tmp_path / "a.yaml", text) == EXPECTED


def test_toml(tmp_path: Path) -> None:
    text = """
        title = "a run"
        rates = {x = 1}
        ids = [1, 2]
        [inner]
        rate = 1e-3
        steps = 1e6
        names = ["a", "b"]
        mode = "slow"
        compile = true
        [second]
        limit = 7
    """
    loaded = load(tmp_path / "a.toml", text)
    assert loaded == Outer(EXPECTED.title, EXPECTED.inner, EXPECTED.second, EXPECTED.rates, {}, EXPECTED.ids)
    assert type(loaded.inner.steps) is int
    assert type(loaded.rates["x"]) is float


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("title=other", "title", "other"),
        ("title='1'", "title", "1"),
        ("inner.rate=1e-3", "inner.rate", 1e-3),
        ("inner.rate=2", "inner.rate", 2.0),
        ("inner.rate=.inf", "inner.rate", float("inf")),
        ("inner.steps=1_000", "inner.steps", 1000),
        ("inner.steps=1e3", "inner.steps", 1000),
        ("inner.names=[a, b]", "inner.names", ("a", "b")),
        ("inner.names=a.txt", "inner.names", ("a.txt",)),
        ("inner.betas=[0, 0.5]", "inner.betas", (0.0, 0.5)),
        ("inner.compile=false", "inner.compile", False),
        ("inner.compile=null", "inner.compile", None),
        ("inner.limit=null", "inner.limit", None),
        ("inner.limit=", "inner.limit", None),
        ("second.limit=4", "second.limit", 4),  # a section that the file does not have
        ("rates.y=1e-3", "rates", {"y": 1e-3}),
        ("free.deep.er=x=y", "free", {"deep": {"er": "x=y"}}),
        ("ids=5", "ids", 5),
    ],
)
def test_overrides(override: str, place: str, value: object, tmp_path: Path) -> None:
    loaded: Any = load(tmp_path / "a.yaml", "title: t\ninner: {limit: 9}\nrates:\n", override)
    for name in place.split("."):
        loaded = getattr(loaded, name)
    assert loaded == value
    assert type(loaded) is type(value)


def test_later_overrides_win_and_no_file_means_defaults(tmp_path: Path) -> None:
    assert load_settings(Outer, None, ["title=t"]) == Outer("t")
    assert load_settings(Outer, None, ["title=t", "inner.steps=4", "inner.steps=5"]).inner.steps == 5
    # A section with nothing but comments in it.
    assert load(tmp_path / "a.yaml", "title: t\ninner:\n  # rate: 1\n") == Outer("t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titel: t", "unknown key titel; did you mean title?"),
        ("title: t\ninner: {raet: 1}", "unknown key inner.raet; did you mean inner.rate?"),
        ("title: t\nsecond: {stesp: 1}", "unknown key second.stesp; did you mean second.steps?"),
        ("title: t\n1: 2", "unknown key 1; known keys: title, inner, second, rates, free, ids"),
        ("inner: {}", "title is missing"),
        ("title: 5", "title must be text, got 5"),
        ("title: t\ninner: 5", "inner must be a section of settings, got 5"),
        ("title: t\ninner: {steps: 1.5}", "inner.steps must be a whole number, got 1.5"),
        ("title: t\ninner: {steps: true}", "inner.steps must be a whole number, got True"),
        ("title: t\ninner: {steps: many}", "inner.steps must be a whole number, got 'many'"),
        ("title: t\ninner: {rate: fast}", "inner.rate must be a number, got 'fast'"),
        ("title: t\ninner: {rate: .nan}", "inner.rate must be a number, got nan"),
        ("title: t\ninner: {rate: no}", "inner.rate must be a number, got False"),
        ("title: t\ninner: {compile: 1}", "inner.compile must be true or false, got 1"),
        ("title: t\ninner: {betas: 0.9}", "inner.betas must be a list, got 0.9"),
        ("title: t\ninner: {betas: [0.9, x]}", "inner.betas[1] must be a number, got 'x'"),
        ("title: t\ninner: {mode: quick}", "inner.mode must be one of fast, slow; got 'quick'"),
        ("title: t\ninner: {mode: [fast]}", "inner.mode must be one of fast, slow; got ['fast']"),
        ("title: t\nrates: {a: b}", "rates.a must be a number, got 'b'"),
        ("title: t\ninner: {steps: -1}", "inner: steps must not be negative, got -1"),
        ("title: t\ntitle: u", "title is set twice in one section"),
        ("title: t\ninner: {rate: 1, rate: 2}", "rate is set twice in one section"),
        ("- a", "want a mapping of settings, got list"),
        ("just text", "want a mapping of settings, got str"),
        ("a: [1", "while parsing a flow sequence"),
        ("title: 2024-99-99", "month must be in 1..12"),
    ],
)
def test_errors_name_the_file_the_key_and_the_nearest(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(UserError) as caught:
        load(file, text)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        load_settings(Outer, tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_settings(Outer, tmp_path)
    with pytest.raises(UserError, match=r"a\.toml: .*line 1"):
        load(tmp_path / "a.toml", "title: t")
    (tmp_path / "latin.yaml").write_bytes("title: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: 'utf-8' codec"):
        load_settings(Outer, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("title", "override 'title': want key=value"),
        ("=5", "override '=5': want key=value"),
        ("title.x=5", "override 'title.x=5': title is not a section"),
        ("inner.names=[a", "override 'inner.names=[a': '[a' is not a value"),
        ("inner.raet=1", "unknown key inner.raet; did you mean inner.rate?"),
        ("inner..rate=1", "unknown key inner."),
    ],
)
def test_errors_of_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.yaml", "title: t", override)
    assert message in str(caught.value)


numbers = st.floats(allow_nan=False)
inner = st.builds(
    Inner,
    rate=numbers,
    steps=st.integers(min_value=0),
    names=st.lists(st.text()).map(tuple),
    betas=st.lists(numbers).map(tuple),
    mode=st.sampled_from(["fast", "slow"]),
    compile=st.sampled_from([None, True, False]),
    limit=st.none() | st.integers(),
)
outer = st.builds(
    Outer,
    title=st.text(),
    inner=inner,
    second=st.none() | inner,
    rates=st.dictionaries(st.text(), numbers),
    free=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers())),
    ids=st.none() | st.integers() | st.lists(st.integers()).map(tuple),
)


@given(outer)
def test_a_mapping_and_its_json_read_back_as_the_same_settings(settings: Outer) -> None:
    mapping = to_mapping(settings)
    assert from_mapping(Outer, mapping) == settings
    assert from_mapping(Outer, json.loads(json.dumps(mapping))) == settings
