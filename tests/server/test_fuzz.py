"""Requests made from the service's own description, well formed and deformed: none may hang, leak or be answered with
anything that the description does not name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.server.servers import Live, serving

ENDPOINTS = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest"}
# What no field expects, or expects only now and then.
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live
        live.settle()


def values(schema: dict[str, Any], description: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema allows; sizes a little beyond the model's, but no larger."""
    if "$ref" in schema:
        return values(description["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], description)
    if "anyOf" in schema:
        return st.one_of(*(values(option, description) for option in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "object":
        fields = {name: values(field, description) for name, field in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=fields)
    if kind == "array":
        items = values(schema["items"], description)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=min(4, schema.get("maxItems", 4)))
    if kind == "integer":
        return st.integers(max(schema.get("minimum", 0), -300), min(schema.get("maximum", 300), 300))
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=20)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), path=st.sampled_from(sorted(ENDPOINTS)), deformed=st.booleans())
def test_every_answer_is_one_that_is_described(live: Live, data: st.DataObject, path: str, deformed: bool) -> None:
    description = json.loads(live.call("GET", "/openapi.json")[1])
    schema = description["components"]["schemas"][ENDPOINTS[path]]
    body = data.draw(values(schema, description))
    if deformed:
        field = st.sampled_from([*schema["properties"], "tools", "logit_bias", "other"])
        body |= data.draw(st.dictionaries(field, GARBAGE, min_size=1, max_size=2))
    status, text = live.call("POST", path, body)
    assert str(status) in description["paths"][path]["post"]["responses"]
    event(f"{status}, {'deformed' if deformed else 'well formed'}")
    assert status in (200, 400, 404 if deformed else 200), text
    if status != 200:
        error = json.loads(text)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    elif body.get("stream"):
        *chunks, done, end = text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for chunk in chunks:
            assert "error" not in json.loads(chunk.removeprefix("data: "))
    else:
        assert len(json.loads(text)["choices"]) >= 1
