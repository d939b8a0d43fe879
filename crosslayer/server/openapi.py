"""The description of the service at /openapi.json, made from the classes that check requests and shape answers."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from crosslayer.server import responses
from crosslayer.server.protocol import ChatRequest, CompletionRequest
from crosslayer.version import __version__

PROBLEMS = {
    "400": "The request is wrong: the message says where.",
    "401": "No key, or a wrong one.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "The queue is full; try again.",
    "500": "The engine failed.",
    "503": "The server is shutting down.",
}
ANSWERS = (
    responses.Completion,
    responses.ChatCompletion,
    responses.ModelList,
    responses.Model,
    responses.Error,
)


def describe_api(model: str, *, with_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1, for the one model that is served; with a security scheme if the server wants a key."""
    template = "#/components/schemas/{model}"
    _, requests = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=template
    )
    schemas: dict[str, Any] = dict(requests["$defs"])
    for schema in schemas.values():
        optional = schema["properties"].keys() - set(schema.get("required", ()))
        for name in optional:  # null is the default, whatever the type
            schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "null"}]}
    for request in (CompletionRequest, ChatRequest):
        schemas[request.__name__]["properties"]["model"]["const"] = model
    for answer in ANSWERS:
        schema = TypeAdapter(answer).json_schema(ref_template=template)
        schemas |= schema.pop("$defs", {})
        schemas[answer.__name__] = schema
    plain = {"200": {"description": "", "content": {"text/plain": {}}}}
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "const": model}}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "crosslayer", "version": __version__},
        "paths": {
            "/v1/completions": {"post": _generate("CompletionRequest", "Completion")},
            "/v1/chat/completions": {"post": _generate("ChatRequest", "ChatCompletion")},
            "/v1/models": {"get": {"responses": _responses("ModelList", "401")}},
            "/v1/models/{model}": {"get": {"parameters": [model_id], "responses": _responses("Model", "401", "404")}},
            "/health": {"get": {"security": [], "responses": plain | {"503": {"description": "Steps fail."}}}},
            "/metrics": {"get": {"security": [], "responses": plain}},
        },
        "components": {"schemas": schemas},
    }
    if with_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _generate(request: str, answer: str) -> dict[str, Any]:
    responses = _responses(answer, *PROBLEMS)
    responses["200"]["content"]["text/event-stream"] = {}
    return {"requestBody": {"required": True, "content": _json(request)}, "responses": responses}


def _responses(answer: str, *problems: str) -> dict[str, Any]:
    answers = {"200": {"description": "", "content": _json(answer)}}
    return answers | {status: {"description": PROBLEMS[status], "content": _json("Error")} for status in problems}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
