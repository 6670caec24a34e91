"""`sim calibrate` and `sim validate` against real processes of the emulated engine."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_files import write_adapter
from deployment import ROOT, wait_until

from sim.latency import LatencyModel, read_calibration

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("calibrate")]
LISTENING = re.compile(r"http://\S+")
KWARGS = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_model_len": 4096,
    "max_num_seqs": 8,
}


def sim(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """`python -m sim`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "sim", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310  (loopback)
            return bool(answer.status == 200)
    except OSError:
        return False


def load_adapter(url: str, name: str, folder: Path) -> None:
    body = json.dumps({"adapter": {"name": name, "version": "1"}, "path": str(folder)}).encode()
    request = urllib.request.Request(f"{url}/worker/v1/load", body)  # noqa: S310  (loopback)
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        assert answer.status == 200


def held(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/worker/v1/adapters", timeout=30) as answer:  # noqa: S310
        state = json.load(answer)
    return [adapter["name"] for adapter in (*state["gpu"], *state["host"])]


@contextmanager
def worker(folder: Path) -> Iterator[str]:
    """An emulated engine worker; its URL."""
    out = folder / "worker.out"
    command = ["-m", "engine_worker", "--engine", "emulated", "--model", "m", "--port", "0"]
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--engine-kwargs", json.dumps(KWARGS)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        found: Any = wait_until(
            lambda: LISTENING.search(out.read_text()), "the worker's address", 30
        )
        url = found[0]
        wait_until(lambda: is_healthy(url), "the worker serves", 30)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_running_worker_is_measured_and_the_calibration_can_be_simulated(
    tmp_path: Path,
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    out = tmp_path / "mine.json"
    with worker(tmp_path) as url:
        # What a measurement that was killed has left in both slots.
        for number in range(2):
            load_adapter(url, f"m:calibrate-killed-{number}", adapter)
        command = ["calibrate", url, "--out", out, "--quick", "--rounds", "1"]
        without = sim(*command)
        assert without.returncode == 2, "an engine with adapters is to be given one"
        assert "--adapter FOLDER" in without.stderr
        command += ["--adapter", adapter]
        measured = sim(*command)
        assert measured.returncode == 0, measured.stderr
        first = out.read_bytes()
        # What was seen is kept: a second run only fits again, to the same numbers.
        again = sim(*command)
        assert again.returncode == 0, again.stderr
        assert "already" in again.stderr
        assert held(url) == []
    assert out.read_bytes() == first
    made = read_calibration(str(out))
    assert (made.engine, made.model) == ("emulated 1", "m")
    assert made.defaults.block_size == 16
    assert made.step_base_s.interval is not None
    assert LatencyModel(made, slots=2, rank_max=8).step_s(running=4, adapters=1) > 0


def test_nobody_there_is_said(tmp_path: Path) -> None:
    alone = sim("calibrate", "http://127.0.0.1:9", "--out", tmp_path / "x.json")
    assert alone.returncode == 2
    assert alone.stderr.startswith("error: http://127.0.0.1:9")


def test_a_real_run_is_compared_with_its_simulation(tmp_path: Path) -> None:
    for number in range(6):
        write_adapter(tmp_path / "store" / f"adapter-{number}")
    calibration = tmp_path / "mine.json"
    shutil.copy(ROOT / "sim" / "calibrations" / "emulated.json", calibration)
    config = {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "m"},
                "lora_config": {
                    "dynamic_lora_loading_path": str(tmp_path / "store"),
                    "max_num_adapters_per_replica": 2,
                    "accepted_base_models": ["tiny"],
                },
                "engine_kwargs": KWARGS,
                "engine": "emulated",
                "calibration": str(calibration),
                "deployment_config": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}},
            }
        ],
        "router": {"port": 0, "cache_dir": str(tmp_path / "cache")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    record, figures = tmp_path / "run.jsonl", tmp_path / "figures.json"
    report = tmp_path / "report.md"
    command = [
        *(
            "validate",
            "--config",
            str(path),
            "--requests",
            "8",
            "--rate",
            "20",
            "--seeds",
            "2",
            "--pause",
            "0",
        ),
        *("--cases", "steady,slots", "--record", str(record)),
        *("--json", str(figures), "--report", str(report)),
    ]
    # 0 or 1: whether the machine was quiet enough is not what is tested.
    done = sim(*command)
    assert done.returncode in {0, 1}, done.stderr
    assert "not answered" not in done.stderr
    assert "slots: real against simulated" in done.stdout
    told = json.loads(figures.read_text())["figures"]
    by_name = {(one["case"], one["group"], one["name"]): one for one in told}
    for case in ("steady", "slots"):
        one = by_name[case, "e2e_s", "p50"]
        assert len(one["real"]) == 2
        assert all(value > 0 for value in one["real"])
        assert one["simulated"] > 0
        asked = by_name[case, "adapters", "hits"]
        assert all(value <= 8 for value in asked["real"])
    assert "| e2e_s p50 |" in report.read_text()
    # With the recording at hand nothing is run again, and the same is found.
    before = figures.read_bytes()
    assert read_calibration(str(calibration)).validated is None
    assert "nothing is run" in sim(*command, "--note").stderr
    again = json.loads(figures.read_bytes())["figures"]
    assert again == json.loads(before)["figures"]
    # Whoever simulates with this calibration is told how far it was from what happened.
    noted = read_calibration(str(calibration)).validated
    assert noted is not None
    assert noted.workloads == ("steady", "slots")
    worst = max(by_name[case, "e2e_s", "p50"]["error"] for case in noted.workloads)
    assert noted.errors["e2e_s p50"] == pytest.approx(worst, abs=1e-4)
    replayed = sim("replay", record, "--config", path, "--workers", "1")
    assert f"e2e_s p50 within {noted.errors['e2e_s p50']:.1%}" in " ".join(replayed.stdout.split())
