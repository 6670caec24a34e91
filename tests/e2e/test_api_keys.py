"""Keys over a real router: what they give, and how they are changed while it runs."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, MODEL, config_for
from deployment import Deployment, deployed, wait_until

from router.__main__ import main

# One deployment serves them all: keep them in one of pytest-xdist's processes.
pytestmark = [pytest.mark.xdist_group("access"), pytest.mark.processes]

MINE, OTHERS = ADAPTERS[0], ADAPTERS[1]
SECRETS = ("ly-mine", "ly-limited", "ly-old", "ly-new", "ly-environment")


class KeysFile:
    """The file of keys of the deployment that runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entries: dict[str, Any]) -> None:
        """Put another file in its place; entries are by their keys' names, `ly-NAME` the keys."""
        keys = [
            {"name": name, "sha256": hashlib.sha256(f"ly-{name}".encode()).hexdigest(), **fields}
            for name, fields in entries.items()
        ]
        self.replace(json.dumps({"keys": keys}))

    def replace(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)


USUAL: dict[str, dict[str, Any]] = {
    "mine": {"tenant": "gold", "adapters": [MINE]},
    "limited": {"requests_per_minute": 2},
}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, adapter_store: tuple[Path, dict[str, str]]
) -> Iterator[tuple[Deployment, KeysFile]]:
    """Two emulated workers, a file of keys, and one key in the environment."""
    folder = tmp_path_factory.mktemp("access")
    file = KeysFile(folder / "keys.yaml")
    file.write(**USUAL)
    config = config_for("emulated", None, str(adapter_store[0]))
    config["router"] = {
        "api_keys_file": str(file.path),
        "tenants": [{"name": "gold"}, {"name": "plain"}],
        "record": {"path": str(folder / "traffic.jsonl"), "window_s": 0.01},
    }
    environment = {"LORAYARD_API_KEYS": "ly-environment"}
    with deployed(config, folder / "router", environment) as started:
        yield started, file
    for written in (started.log, (folder / "traffic.jsonl").read_text()):
        for secret in SECRETS:
            assert secret not in written
            assert hashlib.sha256(secret.encode()).hexdigest() not in written


def ask(
    deployment: Deployment, key: str, model: str = MODEL, **headers: str
) -> tuple[int, dict[str, str], Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    headers["Authorization"] = f"Bearer {key}"
    return deployment.post("/v1/chat/completions", body, **headers)


def listed(deployment: Deployment, key: str) -> list[str]:
    status, _, answer = deployment.get("/v1/models", Authorization=f"Bearer {key}")
    assert status == 200
    return [one["id"] for one in answer["data"]]


def test_a_key_gives_what_its_entry_says(served: tuple[Deployment, KeysFile]) -> None:
    deployment, _ = served
    mine, others = f"{MODEL}:{MINE}", f"{MODEL}:{OTHERS}"
    assert listed(deployment, "ly-mine") == [MODEL, mine]
    assert listed(deployment, "ly-environment") == [MODEL, *(f"{MODEL}:{a}" for a in ADAPTERS)]
    assert ask(deployment, "ly-mine", mine)[0] == 200
    status, headers, hidden = ask(deployment, "ly-mine", others)
    absent = ask(deployment, "ly-mine", f"{MODEL}:{OTHERS[:-1]}z")[2]
    assert status == 404
    assert headers["x-worker"] == "none"
    assert hidden["error"]["code"] == "model_not_found"
    message = hidden["error"]["message"].replace(OTHERS, f"{OTHERS[:-1]}z")
    assert {**hidden["error"], "message": message} == absent["error"]
    assert ask(deployment, "ly-environment", others)[0] == 200

    # It is its tenant's, whatever it says.
    assert ask(deployment, "ly-mine", mine, x_tenant="plain")[0] == 200
    assert deployment.metric("lorayard_tenant_requests_total", tenant="gold") == 2
    assert deployment.metric("lorayard_tenant_requests_total", tenant="plain") == 0


def test_a_key_has_limits_of_its_own(served: tuple[Deployment, KeysFile]) -> None:
    deployment, _ = served
    assert [ask(deployment, "ly-limited")[0] for _ in range(2)] == [200, 200]
    status, headers, answer = ask(deployment, "ly-limited")
    assert (status, answer["error"]["code"]) == (429, "over_quota")
    assert 20 <= int(headers["retry-after"]) <= 30
    assert "account `key:limited` is over its quota" in answer["error"]["message"]
    assert ask(deployment, "ly-environment")[0] == 200


def test_a_key_is_rotated_by_editing_the_file(served: tuple[Deployment, KeysFile]) -> None:
    deployment, file = served

    def accepted(key: str) -> bool:
        status = ask(deployment, key)[0]
        assert status in {200, 401}
        return status == 200

    assert not accepted("ly-old")
    file.write(**USUAL, old={})
    wait_until(lambda: accepted("ly-old"), "the first key")
    file.write(**USUAL, old={}, new={})
    wait_until(lambda: accepted("ly-new"), "the second key")
    assert accepted("ly-old"), "both, while the client changes over"
    file.write(**USUAL, new={})
    wait_until(lambda: not accepted("ly-old"), "the first key is taken back")
    assert accepted("ly-new")
    file.replace('keys:\n  - {name: new, sha256: "ly-new"}\n')
    wait_until(lambda: "kept as they were" in deployment.log, "the mistake is told")
    assert f"{file.path}:2: sha256: Expected" in deployment.log
    assert accepted("ly-new")
    assert accepted("ly-environment")
    file.write(**USUAL)
    wait_until(lambda: not accepted("ly-new"), "the file that was mended")


def test_with_several_processes_each_has_its_part(
    tmp_path: Path, adapter_store: tuple[Path, dict[str, str]]
) -> None:
    file = KeysFile(tmp_path / "keys.yaml")
    file.write(shared={"requests_per_minute": 8})
    config = config_for("emulated", None, str(adapter_store[0]))
    config["router"] = {"api_keys_file": str(file.path), "processes": 2}
    with deployed(config, tmp_path / "router") as deployment:
        answers = [ask(deployment, "ly-shared")[0] for _ in range(40)]
        # Each has four, the kernel chooses who is asked, and a minute gives four more.
        assert 4 <= answers.count(200) <= 12
        assert answers.count(429) == 40 - answers.count(200)
        file.write(other={})
        # Each process looks for itself.
        wait_until(
            lambda: [ask(deployment, "ly-shared")[0] for _ in range(12)] == [401] * 12, "both know"
        )
        assert ask(deployment, "ly-other")[0] == 200


@pytest.mark.parametrize("options", [[], ["--processes", "2"]])
def test_a_broken_file_of_keys_is_told_at_the_start(
    tmp_path: Path,
    adapter_store: tuple[Path, dict[str, str]],
    capfd: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    (tmp_path / "keys.yaml").write_text("keys:\n  - {name: a}\n")
    config = config_for("emulated", None, str(adapter_store[0]))
    config["router"] = {"api_keys_file": "keys.yaml", "port": 0, "cache_dir": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["serve", str(tmp_path / "config.yaml"), *options]) == 2
    told = capfd.readouterr().err
    assert told.count("error: ") == 1
    assert f"{tmp_path}/keys.yaml:2: keys[0]: `sha256` is missing" in told
    assert main(["check", str(tmp_path / "config.yaml")]) == 2


@pytest.mark.parametrize("options", [[], ["--processes", "2"]])
def test_an_operators_key_in_the_file_is_told_at_the_start(
    options: list[str],
    adapter_store: tuple[Path, dict[str, str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAYARD_ADMIN_KEY", "ly-operators")
    KeysFile(tmp_path / "keys.yaml").write(operators={})
    config = config_for("emulated", None, str(adapter_store[0]))
    config["router"] = {"api_keys_file": "keys.yaml", "port": 0, "cache_dir": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["serve", str(tmp_path / "config.yaml"), *options]) == 2
    told = capfd.readouterr().err
    assert told.count("error: ") == 1
    assert "the key `operators` of the file of keys is the admin key too" in told
    assert main(["check", str(tmp_path / "config.yaml")]) == 2
