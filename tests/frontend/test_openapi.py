"""The OpenAPI document is true: it is valid, it has every route, and every answer is as it says."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from administered import KEY, NEXT, Administered, Reply, administered
from hypothesis import HealthCheck, Phase, given, settings
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from router.frontend.admin_routes import ROUTES
from router.frontend.vllm_routes import VLLM_ROUTES

EXAMPLES = 12  # of each operation


@pytest.fixture(scope="module")
def server() -> Iterator[Administered]:
    with administered() as made:
        yield made


@pytest.fixture(scope="module")
def document(server: Administered) -> dict[str, Any]:
    reply = server.get("/openapi.json")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = reply.json
    return found


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, item in document["paths"].items() for method in item}


def test_it_is_an_openapi_document(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(document).validate()


def test_it_has_every_route_and_no_other(server: Administered, document: dict[str, Any]) -> None:
    served = {("GET", "/admin/v1/openapi.json")}
    served |= {(route.method, route.path) for route in (*ROUTES, *VLLM_ROUTES)}
    assert operations(document) == served
    assert server.administration is not None
    assert len(server.administration.routes()) == len(served)
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"].endswith(".")
            assert "401" in operation["responses"]


# Each operation of the document, with what it takes: template, what stands in it, body.
EXERCISES: list[tuple[str, str, str, dict[str, Any] | None]] = [
    ("GET", "/admin/v1/openapi.json", "", None),
    ("GET", "/admin/v1/adapters", "?prefix=s&limit=1", None),
    ("POST", "/admin/v1/adapters/{id}/warm", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/load", "org/base:sql", {"workers": 2}),
    ("GET", "/admin/v1/adapters/{id}", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/pin", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/unpin", "org/base:sql", {}),
    ("POST", "/admin/v1/adapters/{id}/refresh", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/rollout", "org/base:sql", {"version": NEXT, "weight": 0.5}),
    ("POST", "/admin/v1/adapters/{id}/promote", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/rollback", "org/base:sql", None),
    ("POST", "/admin/v1/adapters/{id}/unload", "org/base:sql", None),
    ("POST", "/admin/v1/refresh", "", {"model": "org/base"}),
    ("GET", "/admin/v1/workers", "", None),
    ("POST", "/admin/v1/workers/{id}/drain", "org%2Fbase-0", None),
    ("POST", "/admin/v1/workers/{id}/undrain", "org%2Fbase-0", None),
    ("POST", "/v1/load_lora_adapter", "", {"lora_name": "mine", "lora_path": "/a/mine"}),
    ("POST", "/v1/unload_lora_adapter", "", {"lora_name": "mine"}),
]


def check(document: dict[str, Any], method: str, path: str, reply: Reply) -> None:
    """The answer is one of those that the document has for the operation."""
    said = document["paths"][path][method.lower()]["responses"][str(reply.status)]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    schema = said[kind]["schema"]
    if kind == "text/plain":
        return
    # A struct's answer has all of its fields and none that the document has not.
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry: Registry[Any] = Registry().with_resource("urn:document", resource)
    whole = {"$ref": f"urn:document{schema['$ref']}"} if "$ref" in schema else schema
    OAS31Validator(whole, registry=registry).validate(reply.json)


def test_every_operation_answers_as_the_document_says(
    server: Administered, document: dict[str, Any]
) -> None:
    for method, path, filled, body in EXERCISES:
        target = path.replace("{id}", filled) if "{id}" in path else path + filled
        reply = server.ask(method, target, body)
        assert reply.status == 200, (target, reply.body)
        check(document, method, path, reply)
    assert {(method, path) for method, path, *_ in EXERCISES} == operations(document)


@pytest.mark.parametrize(
    ("method", "path", "filled", "body", "status"),
    [
        ("GET", "/admin/v1/adapters", "?limit=0", None, 400),
        ("GET", "/admin/v1/adapters/{id}", "org/base:nope", None, 404),
        ("POST", "/admin/v1/adapters/{id}/rollout", "org/base:sql", {"version": "x", "weight": 1}, 409),
        ("POST", "/admin/v1/adapters/{id}/load", "org/base:sql", {"workers": "2" * 70_000}, 413),
        ("POST", "/v1/load_lora_adapter", "", {"lora_name": ""}, 400),
        ("POST", "/v1/unload_lora_adapter", "", {"lora_name": "nope"}, 404),
    ],
)  # fmt: skip
def test_every_refusal_is_as_the_document_says(
    server: Administered,
    document: dict[str, Any],
    method: str,
    path: str,
    filled: str,
    body: Any,  # noqa: ANN401
    status: int,
) -> None:
    target = path.replace("{id}", filled) if "{id}" in path else path + filled
    reply = server.ask(method, target, body)
    assert reply.status == status
    check(document, method, path, reply)


def test_schemathesis_finds_nothing(server: Administered, document: dict[str, Any]) -> None:
    """What it makes of the document, valid or not: no fault, no answer that is not written down."""
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {KEY}"}
    tried = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        cases = operation.as_strategy() | operation.as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def send(case: "schemathesis.Case[Any]") -> None:
            # Not excluded, it would want 1.0 to be taken for a whole number, as JSON Schema does.
            case.call_and_validate(
                base_url=server.url, headers=headers, excluded_checks=[positive_data_acceptance]
            )

        send()
        tried += 1
    assert tried == len(operations(document))
