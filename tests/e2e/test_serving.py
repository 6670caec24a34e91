"""What a client sees, through the `openai` package and plain HTTP, on real processes."""

import asyncio
import contextlib
import itertools
from typing import Any

import openai
import pytest
from apart import run_apart
from conftest import ADAPTERS, MODEL, Served
from deployment import wait_until

# One deployment serves them all: keep them in one of pytest-xdist's processes.
pytestmark = pytest.mark.xdist_group("serving")

IDS = (MODEL, *(f"{MODEL}:{name}" for name in ADAPTERS))
PROMPT = "Tell me about the sea."


def chat(served: Served, model: str, prompt: str = PROMPT, tokens: int = 24) -> str:
    answer = served.deployment.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def body(model: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


def test_models_lists_the_base_and_every_adapter(served: Served) -> None:
    client = served.deployment.client
    assert [model.id for model in client.models.list()] == list(IDS)
    assert client.models.retrieve(f"{MODEL}:{ADAPTERS[0]}").id == f"{MODEL}:{ADAPTERS[0]}"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{MODEL}:nope")


def test_every_model_answers_as_the_engine_alone(served: Served) -> None:
    through = {model: chat(served, model) for model in IDS}
    alone = {model: served.alone.chat(model, PROMPT) for model in IDS}
    assert through == alone
    assert len(set(through.values())) == len(IDS), "each adapter answers differently"


def test_streaming_equals_not_streaming(served: Served) -> None:
    for model in (MODEL, f"{MODEL}:{ADAPTERS[1]}"):
        stream = served.deployment.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces, usage = [], None
        for chunk in stream:
            usage = chunk.usage or usage
            pieces += [choice.delta.content or "" for choice in chunk.choices]
        assert "".join(pieces) == chat(served, model)
        # vLLM puts tokens together that come faster than they are sent; the emulated engine is paced.
        assert len(pieces) == 24 if served.engine == "emulated" else len(pieces) > 1
        assert usage is not None
        assert usage.completion_tokens == 24


def test_a_cold_burst_gives_no_error_and_one_load_a_worker(served: Served) -> None:
    """64 requests at once for an adapter that no worker holds: the peers answer most with 500."""
    deployment = served.deployment
    cold = cold_adapters(served)[0]  # six adapters, four slots

    async def burst() -> list[Any]:
        async with deployment.async_client as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.with_raw_response.create(
                        model=f"{MODEL}:{cold}",
                        messages=[{"role": "user", "content": PROMPT}],
                        max_tokens=24,
                        temperature=0,
                    )
                    for _ in range(64)
                )
            )

    answers = run_apart(burst())
    assert {answer.status_code for answer in answers} == {200}
    uses = [answer.headers["x-adapter"] for answer in answers]
    # The burst may be worth a second holder, but no worker is asked to load it twice.
    began = [
        answer.headers["x-worker"] for answer in answers if answer.headers["x-adapter"] == "cold"
    ]
    assert began
    assert len(set(began)) == len(began)
    assert set(uses) <= {"cold", "loading", "hit"}
    expected = served.alone.chat(f"{MODEL}:{cold}", PROMPT)
    texts = {answer.parse().choices[0].message.content for answer in answers}
    assert texts == {expected}


def cold_adapters(served: Served) -> list[str]:
    """The adapters that no worker holds, by the router's ledger."""
    held = served.deployment.get("/metrics")[2]
    return [name for name in ADAPTERS if f'adapter="{name}",model="{MODEL}",phase=' not in held]


def test_churn_evicts_and_every_answer_is_right(served: Served) -> None:
    deployment = served.deployment
    expected = {model: served.alone.chat(model, PROMPT, 12) for model in IDS}
    before = deployment.metric("lorayard_adapter_evictions_total")
    order = [model for model, _ in itertools.product(IDS, range(6))]
    order = order[::7] + order[3::7] + order[5::7] + order[1::7]

    async def all_of_them() -> list[str]:
        async with deployment.async_client as client:
            limit = asyncio.Semaphore(12)

            async def one(model: str) -> str:
                async with limit:
                    answer = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": PROMPT}],
                        max_tokens=12,
                        temperature=0,
                    )
                    return answer.choices[0].message.content or ""

            return await asyncio.gather(*(one(model) for model in order))

    answers = run_apart(all_of_them())
    assert answers == [expected[model] for model in order]
    assert deployment.metric("lorayard_adapter_evictions_total") > before
    assert deployment.metric("lorayard_adapter_loads_total", result="worker") == 0


@pytest.mark.parametrize("name", ["nope", "..", "../adapter-a", "a/b", "", "%2e%2e", "x" * 300])
def test_an_unknown_adapter_is_404_before_any_worker(served: Served, name: str) -> None:
    decisions = served.deployment.metric("lorayard_decisions_total")
    status, headers, answer = served.deployment.post(
        "/v1/chat/completions", body(f"{MODEL}:{name}")
    )
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert answer["error"]["param"] == "model"
    assert headers["x-worker"] == "none"
    assert headers["x-adapter"] == "none"
    assert served.deployment.metric("lorayard_decisions_total") == decisions


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"no json", 400, "not valid JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"model": 7}', 400, "`model`"),
        (b'{"model": "other"}', 404, "`other` does not exist"),
    ],
)
def test_a_bad_body_gets_one_clear_line(
    served: Served, data: bytes, status: int, message: str
) -> None:
    got, headers, answer = served.deployment.post("/v1/chat/completions", data)
    assert got == status
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]


def test_every_answer_carries_its_headers(served: Served) -> None:
    _, headers, _ = served.deployment.post(
        "/v1/chat/completions", body(MODEL), x_request_id="my-id-1"
    )
    assert headers["x-request-id"] == "my-id-1"
    assert headers["x-worker"].startswith(f"{MODEL}-")
    assert headers["x-adapter"] == "none"
    for path in ("/health", "/v1/models", "/nowhere"):
        _, headers, _ = served.deployment.get(path)
        assert {"x-request-id", "x-worker", "x-adapter"} <= set(headers)


def test_an_error_of_the_engine_comes_through(served: Served) -> None:
    status, headers, answer = served.deployment.post(
        "/v1/chat/completions", {"model": MODEL, "max_tokens": 4}
    )
    assert status == 400
    assert "messages" in answer["error"]["message"]
    assert headers["x-worker"].startswith(f"{MODEL}-")


def test_other_routes_of_the_engine_are_passed_on(served: Served) -> None:
    client = served.deployment.client
    done = client.completions.create(
        model=f"{MODEL}:{ADAPTERS[2]}", prompt="Once upon", max_tokens=5, temperature=0
    )
    assert done.model == f"{MODEL}:{ADAPTERS[2]}"
    assert done.usage is not None
    assert done.usage.completion_tokens == 5
    if served.engine == "emulated":
        vectors = client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float")
        assert len(vectors.data) == 2
    else:
        answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=16)
        assert answer.model == MODEL
    loads = served.deployment.metric("lorayard_adapter_loads_total")
    for model in (MODEL, f"{MODEL}:{ADAPTERS[2]}"):
        status, _, answer_body = served.deployment.post("/v1/no/such/route", {"model": model})
        assert status == 404, answer_body
    assert served.deployment.metric("lorayard_adapter_loads_total") == loads
    status, _, _ = served.deployment.post("/v1/load_lora_adapter", {"lora_name": "x"})
    assert status == 404


def test_a_client_that_leaves_ends_its_work_in_the_engine(served: Served) -> None:
    deployment = served.deployment
    before = deployment.metric("lorayard_requests_total", outcome="client_gone")

    async def leave_early() -> None:
        async with deployment.async_client as client:
            stream = await client.chat.completions.create(
                model=f"{MODEL}:{ADAPTERS[0]}",
                messages=[{"role": "user", "content": PROMPT}],
                # Minutes of work for the emulated engine; all that the tiny model can do.
                max_tokens=50_000 if served.engine == "emulated" else 400,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                break
            await stream.close()

    run_apart(leave_early())

    def idle() -> bool:
        return (
            deployment.metric("lorayard_worker_running")
            + deployment.metric("lorayard_worker_in_flight")
            == 0
        )

    wait_until(idle, "the engine has stopped", 10)
    after = deployment.metric("lorayard_requests_total", outcome="client_gone")
    assert after == before + 1


def test_metrics_count_each_adapter(served: Served) -> None:
    deployment = served.deployment
    chat(served, f"{MODEL}:{ADAPTERS[0]}", tokens=2)
    before = deployment.metric("lorayard_adapter_requests_total", adapter=ADAPTERS[0], use="hit")
    chat(served, f"{MODEL}:{ADAPTERS[0]}", tokens=2)
    after = deployment.metric("lorayard_adapter_requests_total", adapter=ADAPTERS[0], use="hit")
    assert after == before + 1
    with contextlib.suppress(openai.NotFoundError):
        chat(served, f"{MODEL}:never-heard-of")
    assert "never-heard-of" not in deployment.get("/metrics")[2]
