"""The OpenAPI 3.1 document of administration, made of the very table and structs that serve it."""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec

from router.frontend.admin_routes import ROOT, Route
from router.lifecycle.wire import Error, VllmError

JSON: Final = "application/json"
REF: Final = "#/components/schemas/{name}"
KEY: Final = "adminKey"
ERRORS: Final = {
    "400": "What was sent cannot be used; the message says what to send instead.",
    "401": "No or wrong admin key.",
    "404": "There is no such adapter, worker or base model.",
    "409": "The state of the adapter or worker does not allow it.",
    "413": "The body is too large.",
    "500": "A fault of the router; its log has the request's id.",
    "503": "It cannot be had now: a store, or a slot. `Retry-After` says when to ask again.",
}
OF_READS: Final = frozenset({"409", "413"})
DESCRIPTION: Final = (
    "For operators of a Lorayard router: the adapters that it serves, where they are, which version a "
    "name means, and its workers. An adapter's id is `base:name`; the slashes of a base model's id may "
    "be quoted (`%2F`) or not. Each call returns when it is done, in all of the router's processes."
)


def document(routes: Sequence[Route[Any]]) -> bytes:
    """The document, as JSON."""
    structs: dict[type, None] = {Error: None, VllmError: None}
    structs |= {route.answers: None for route in routes if route.answers is not str}
    structs |= {route.takes: None for route in routes}
    _, components = msgspec.json.schema_components(structs, ref_template=REF)
    schemas = {name: _tidy(schema) for name, schema in components.items()}
    paths: dict[str, dict[str, Any]] = {
        f"{ROOT}/openapi.json": {"get": _own_operation()},
    }
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Lorayard administration",
                "version": version("lorayard"),
                "description": DESCRIPTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [{KEY: []}],
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {
                    KEY: {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "The key that the router was started with; no API key.",
                    }
                },
            },
        }
    )


def _operation(route: Route[Any], schemas: dict[str, Any]) -> dict[str, Any]:
    parameters = []
    if "{id}" in route.path:
        parameters.append(_id_parameter(route.path))
    made: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": ["vLLM's routes" if route.as_vllm else route.path.split("/")[3]],
    }
    if route.changes:
        needed = bool(schemas[route.takes.__name__].get("required"))
        made["requestBody"] = {
            "required": needed,
            "content": {JSON: {"schema": _ref(route.takes)}},
        }
    else:
        parameters += _query_parameters(schemas[route.takes.__name__])
    if parameters:
        made["parameters"] = parameters
    made["responses"] = _responses(route)
    return made


def _responses(route: Route[Any]) -> dict[str, Any]:
    if route.answers is str:
        content = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": _ref(route.answers)}}
    found: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status, description in ERRORS.items():
        if route.changes or status not in OF_READS:
            # What has not come to the route is said in OpenAI's shape.
            as_vllm = route.as_vllm and status not in {"401", "500"}
            found[status] = _error(description, VllmError if as_vllm else Error)
    return found


def _own_operation() -> dict[str, Any]:
    answer = {JSON: {"schema": {"type": "object"}}}
    return {
        "operationId": "show_document",
        "summary": "This document.",
        "tags": ["openapi.json"],
        "responses": {
            "200": {"description": "The document.", "content": answer},
            "401": _error(ERRORS["401"], Error),
        },
    }


def _error(description: str, shape: type) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": _ref(shape)}}}


def _id_parameter(path: str) -> dict[str, Any]:
    of_adapter = "/adapters/" in path
    return {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "`base:name`" if of_adapter else "as the list of workers has it",
        "schema": {"type": "string", "minLength": 1},
    }


def _query_parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": field}
        for name, field in schema["properties"].items()
    ]


def _ref(struct: type) -> dict[str, str]:
    return {"$ref": REF.format(name=struct.__name__)}


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, its description without the indentation of the source."""
    if "description" in schema:
        schema = schema | {"description": inspect.cleandoc(schema["description"])}
    return schema
