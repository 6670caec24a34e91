"""What a request may ask for in its headers, and what tenants may use, on real processes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import ADAPTERS, MODEL, config_for
from deployment import Deployment, deployed, wait_until

# One deployment serves them all: keep them in one of pytest-xdist's processes.
pytestmark = [pytest.mark.xdist_group("tenants"), pytest.mark.processes]

TENANTS = [
    {"name": "few", "requests_per_minute": 2},
    {"name": "metered", "tokens_per_minute": 1500},
    {"name": "streaming", "tokens_per_minute": 1_000_000},
    {"name": "free", "weight": 3, "priority": -1},
]
PINNED = ADAPTERS[0]
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, adapter_store: tuple[Path, dict[str, str]]
) -> Iterator[Deployment]:
    """Two emulated workers, four tenants, one pinned adapter and one that is not there."""
    config = config_for("emulated", None, str(adapter_store[0]))
    config["llm_configs"][0]["lora_config"]["pinned_adapters"] = [PINNED]
    config["router"] = {"tenants": TENANTS, "explain_sample": 1.0}
    with deployed(config, tmp_path_factory.mktemp("tenants") / "router") as started:
        yield started


def ask(deployment: Deployment, model: str = MODEL, fields: Any = (), **headers: str) -> Answer:  # noqa: ANN401
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "temperature": 0,
        **dict(fields),
    }
    return deployment.post("/v1/chat/completions", body, **headers)


def assert_turned_away(answer: Answer, status: int, kind: str, code: str) -> None:
    got, headers, body = answer
    error = body["error"]
    assert (got, error["type"], error["code"]) == (status, kind, code), body
    assert set(error) == {"message", "type", "param", "code"}
    assert int(headers["retry-after"]) >= 1
    assert headers["x-worker"] == "none"


def test_a_pinned_adapter_is_there_before_it_is_asked_for(deployment: Deployment) -> None:
    def there() -> float:
        return deployment.metric("lorayard_worker_adapter", adapter=PINNED, phase="resident")

    wait_until(there, "the pinned adapter is resident")
    model = f"{MODEL}:{PINNED}"
    status, headers, _ = ask(deployment, model, x_adapter_cold="reject")
    assert (status, headers["x-adapter"]) == (200, "hit")
    for name in ADAPTERS[1:] * 2:
        assert ask(deployment, f"{MODEL}:{name}")[0] == 200
    assert deployment.metric("lorayard_adapter_evictions_total") > 0
    assert ask(deployment, model, x_adapter_cold="reject")[0] == 200


def test_over_its_quota_of_requests_a_tenant_is_told_when_to_come_again(
    deployment: Deployment,
) -> None:
    assert [ask(deployment, x_tenant="few")[0] for _ in range(2)] == [200, 200]
    third = ask(deployment, x_tenant="few")
    assert_turned_away(third, 429, "rate_limit_error", "over_quota")
    assert 20 <= int(third[1]["retry-after"]) <= 30
    assert "tenant `few` is over its quota" in third[2]["error"]["message"]
    assert ask(deployment, x_tenant="free")[0] == 200
    assert ask(deployment)[0] == 200

    def counted(outcome: str) -> float:
        return deployment.metric("lorayard_tenant_requests_total", tenant="few", outcome=outcome)

    assert (counted("completed"), counted("over_quota")) == (2, 1)


def test_what_a_request_did_not_use_is_given_back(deployment: Deployment) -> None:
    # The body looks like a thousand tokens; the engine says how few its prompt has.
    looks_long = {"metadata": {"note": "x" * 4000}}
    answers = [ask(deployment, fields=looks_long, x_tenant="metered") for _ in range(4)]
    assert [status for status, _, _ in answers] == [200] * 4
    used = sum(body["usage"]["total_tokens"] for _, _, body in answers)
    counted = deployment.metric("lorayard_tenant_tokens_total", tenant="metered")
    assert counted == used < 1000
    too_long = {"metadata": {"note": "x" * 6000}}
    assert ask(deployment, fields=too_long, x_tenant="metered")[0] == 429


@pytest.mark.parametrize("with_usage", [True, False])
def test_the_tokens_of_a_stream_are_counted(deployment: Deployment, with_usage: bool) -> None:
    def counted() -> float:
        return deployment.metric("lorayard_tenant_tokens_total", tenant="streaming")

    fields: dict[str, Any] = {"stream": True, "max_tokens": 40, "ignore_eos": True}
    if with_usage:
        fields["stream_options"] = {"include_usage": True}
    before = counted()
    _, _, text = ask(deployment, fields=fields, x_tenant="streaming")
    tokens = counted() - before
    if with_usage:
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        [usage] = [event["usage"] for event in events if event.get("usage")]
        assert tokens == usage["total_tokens"]
    else:  # an event a token, about, and the prompt by the bytes of the body
        assert 40 <= tokens <= 40 + 5 + 60


def test_a_refusal_of_the_engine_costs_no_tokens(deployment: Deployment) -> None:
    before = deployment.metric("lorayard_tenant_tokens_total", tenant="free")
    assert ask(deployment, fields={"messages": None}, x_tenant="free")[0] == 400
    assert deployment.metric("lorayard_tenant_tokens_total", tenant="free") == before
    refused = {"tenant": "free", "outcome": "refused"}
    assert deployment.metric("lorayard_tenant_requests_total", **refused) == 1


def test_a_cold_load_can_be_refused(deployment: Deployment) -> None:
    held = deployment.get("/metrics")[2]
    cold = next(one for one in ADAPTERS if f'adapter="{one}",model="{MODEL}",phase=' not in held)
    loads = deployment.metric("lorayard_adapter_loads_total")
    answer = ask(deployment, f"{MODEL}:{cold}", x_adapter_cold="reject")
    assert_turned_away(answer, 503, "server_error", "cold_refused")
    assert f"adapter {cold} is not resident" in answer[2]["error"]["message"]
    assert deployment.metric("lorayard_adapter_loads_total") == loads
    assert ask(deployment, f"{MODEL}:{cold}", x_adapter_cold="allow")[0] == 200
    assert ask(deployment, f"{MODEL}:{cold}", x_adapter_cold="reject")[0] == 200


def test_what_would_miss_its_deadline_is_turned_away_at_once(deployment: Deployment) -> None:
    before = deployment.metric("lorayard_requests_total", outcome="deadline")
    began = time.monotonic()
    answer = ask(deployment, x_ttft_deadline_ms="0.01")
    assert time.monotonic() - began < 1
    assert_turned_away(answer, 503, "server_error", "deadline")
    assert deployment.metric("lorayard_requests_total", outcome="deadline") == before + 1
    assert ask(deployment, x_ttft_deadline_ms="60000")[0] == 200


def test_a_header_that_cannot_be_read_is_400(deployment: Deployment) -> None:
    status, headers, body = ask(deployment, x_priority="urgent")
    assert (status, body["error"]["param"], body["error"]["code"]) == (
        400, "x-priority", "invalid_value",
    )  # fmt: skip
    assert "retry-after" not in headers


def test_a_tenant_that_is_not_configured_is_no_label(deployment: Deployment) -> None:
    assert ask(deployment, x_tenant="made-up")[0] == 200
    assert "made-up" not in deployment.get("/metrics")[2]


def test_decisions_are_logged_with_their_terms(deployment: Deployment) -> None:
    assert ask(deployment, x_request_id="to-explain")[0] == 200
    [line] = [line for line in deployment.log.splitlines() if "id=to-explain " in line]
    assert "adapter=- worker=tiny-" in line
    assert "(wait:" in line


def test_a_pin_that_is_not_in_the_store_is_said_and_loaded_once_it_is_there(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_adapter(store / "one", seed=1)
    config = config_for("emulated", None, str(store))
    config["llm_configs"][0]["lora_config"]["pinned_adapters"] = ["late"]
    config["router"] = {"store_refresh_s": 0.2}
    with deployed(config, tmp_path / "router") as started:
        said = "to be loaded or pinned, but not in the store: late"
        wait_until(lambda: said in started.log, "that it is missing")
        write_adapter(tmp_path / "late", seed=2)
        (tmp_path / "late").rename(store / "late")
        wait_until(
            lambda: started.metric("lorayard_worker_adapter", adapter="late", phase="resident"),
            "the pinned adapter is resident",
        )
        assert started.log.count(said) == 1, "not at each listing"
