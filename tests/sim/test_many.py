"""compare, sweep and recommend as their users run them, and the pool that they run on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from traces import write_trace

from router.config import load, parse
from sim.__main__ import main
from sim.commands.arguments import DEFAULT_CONFIG
from sim.pool import Pool, PoolError, Task, Workload, _interrupts_held
from sim.replay import Options
from sim.slo import Verdict

ROOT = Path(__file__).parents[2]
TIGHT = """llm_configs:
  - model_loading_config: {model_id: base}
    lora_config: {dynamic_lora_loading_path: /x, max_num_adapters_per_replica: 4}
    deployment_config: {max_ongoing_requests: 8}
    calibration: h100-llama-3.1-8b
router: {max_queued_requests: 64, queue_timeout_s: 2}
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "t.jsonl", 150, model="base:a{}")


@pytest.fixture
def tight(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TIGHT)
    return path


def run(tmp_path: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main([*map(str, arguments), "--json", str(out)]) == status
    result: dict[str, Any] = json.loads(out.read_text())
    del result["sim"]
    return result


# The pool.


def test_results_do_not_depend_on_the_processes(tmp_path: Path, trace: Path) -> None:
    arguments = ("sweep", trace, "--vary", "workers=1..3", "--seeds", 2, "--adapters", 5)
    one = run(tmp_path, *arguments, "--jobs", 1)
    assert one == run(tmp_path, *arguments, "--jobs", 2)
    assert len({digest for point in one["points"] for digest in point["digests"]}) > 1


def test_the_order_is_that_of_the_tasks_and_progress_is_told(trace: Path) -> None:
    config, told = load(DEFAULT_CONFIG), list[int]()
    tasks = [Task(config, Options(workers=workers)) for workers in (9, 1, 5, 2, 3)]
    with Pool(Workload(trace, None, 150, 3.0), jobs=2, progress=told.append) as pool:
        runs = [*pool.run(tasks), *pool.run(tasks[:1])]
    assert [len(each.result["workers"]) for each in runs] == [9, 1, 5, 2, 3, 9]
    assert told == sorted(told)
    assert told[-1] == 6 * 150


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_users_error_in_a_process_is_said_once(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(TIGHT.replace("h100-llama-3.1-8b", "h100-lama"))
    arguments = ["compare", str(trace), "--config", str(config), "--jobs", str(jobs)]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1
    assert "no calibration `h100-lama`; did you mean" in errors
    assert "Traceback" not in errors


def test_the_first_failure_in_order_is_raised(tmp_path: Path, trace: Path) -> None:
    config = load(DEFAULT_CONFIG)
    missing = Workload(tmp_path / "gone.jsonl", None, 150, 3.0)
    with (
        Pool(missing, jobs=2) as pool,
        pytest.raises(PoolError, match=r"gone\.jsonl: No such file"),
    ):
        pool.run([Task(config, Options())] * 5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds children in /proc")
@pytest.mark.processes
def test_an_interrupt_ends_every_process_quietly(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "long.jsonl", 60_000)
    command = [sys.executable, "-m", "sim", "sweep", str(trace), "--vary", "workers=1..40"]
    with subprocess.Popen(
        [*command, "--jobs", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while len(children.read_text().split()) < 3:  # the pool's two, and Python's tracker
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        try:
            out, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130
    assert (out, errors.strip()) == ("", "interrupted")
    while _is_there(process.pid):  # Python's tracker ends when the pipe to its parent does
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupt_that_another_thread_takes_waits_for_the_start_of_a_process() -> None:
    starting, started = threading.Event(), False

    def take() -> None:
        starting.wait()
        signal.raise_signal(signal.SIGINT)

    taker = threading.Thread(target=take)  # as a progress bar's: its mask was made before
    taker.start()
    # A shell's background jobs ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), _interrupts_held():  # noqa: PT012  (at its end)
            starting.set()
            taker.join()
            started = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert started


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# The commands.


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as into a file: pytest-xdist tells of a terminal of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_compare(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    result = run(
        tmp_path, "compare", trace, "--policies", "affinity,round_robin", "--seeds", 3,
        "--workers", 5, "--jobs", 1, "--report", page,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "paired differences to affinity" in out
    assert "round_robin - affinity" in out
    first, second = result["policies"]
    assert first["choice"] == {"policy": "affinity"}
    assert len(first["figures"]["ttft_p99"]["by_seed"]) == 3
    assert first["figures"]["ttft_p99"]["ci95_half"] > 0
    assert second["figures"]["cold_loads"]["mean"] > first["figures"]["cold_loads"]["mean"]
    assert "Which adapters each worker holds: affinity" in page.read_text()


def test_shedding_cannot_flatter_a_comparison(
    tmp_path: Path, tight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Far too much: most requests are turned away, and those that are served are served fast.
    trace = write_trace(tmp_path / "t.jsonl", 300, every_ms=1, model="base:a{}")
    result = run(tmp_path, "compare", trace, "--config", tight, "--seeds", 2, "--jobs", 1)
    for policy in result["policies"]:
        assert all(count["rejected"] > 100 for count in policy["counts"])
        p99 = policy["figures"]["ttft_p99"]
        assert p99 == {"mean": None, "ci95_half": None, "by_seed": [None, None]}
        assert policy["figures"]["attainment"]["mean"] < 0.7
    rows = [line for line in capsys.readouterr().out.splitlines() if "affinity " in line]
    assert " - " in rows[0]
    patient = tmp_path / "patient.yaml"
    patient.write_text(TIGHT.replace("64", "1000").replace("timeout_s: 2", "timeout_s: 600"))
    served = run(tmp_path, "compare", trace, "--config", patient, "--seeds", 2, "--jobs", 1)
    assert served["policies"][0]["figures"]["ttft_p99"]["mean"] is not None


def test_sweep(tmp_path: Path, tight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 300, every_ms=10, model="base:a{}")
    page = tmp_path / "out.html"
    result = run(
        tmp_path, "sweep", trace, "--config", tight, "--vary", "workers=1..8:7", "--vary",
        "threshold=2,64", "--slo", "ttft_p99=1s", "--seeds", 2, "--jobs", 1, "--report", page,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert len(result["points"]) == 4
    assert result["smallest_fleets"] == [{"world": {}, "choice": {"workers": 8, "threshold": 64}}]
    assert "The smallest fleet that meets the SLO: workers=8, threshold=64." in out
    assert "Put deployment_config.max_ongoing_requests: 64 into the configuration" in out
    assert "verload" in out
    verdicts = {point["verdict"] for point in result["points"]}
    assert verdicts <= {verdict.name.lower() for verdict in Verdict}
    assert "By workers: where overload begins" in page.read_text()


def test_a_point_that_the_engine_refuses_does_not_end_a_sweep(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sweep", trace, "--seeds", 1, "--jobs", 1, "--vary")
    result = run(tmp_path, *arguments, "slots=4,100000")
    assert "leave no memory for KV blocks" in result["points"][1]["refused"]
    assert "slots=100000: 100000 slots" in capsys.readouterr().out
    assert main([str(argument) for argument in (*arguments, "slots=100000")]) == 2


def test_recommend_prints_what_the_router_accepts(
    tmp_path: Path, tight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 200, every_ms=15, model="base:a{}")
    page = tmp_path / "out.html"
    result = run(
        tmp_path, "recommend", trace, "--config", tight, "--slo", "ttft_p99=500ms", "--policy",
        "round_robin", "--seeds", 2, "--jobs", 1, "--report", page, "--max-workers", 32,
    )  # fmt: skip
    assert result["met"]
    best = result["recommended"]
    config = parse(result["yaml"], name="c.yaml", folder=tmp_path)
    llm = config.llm_configs[0]
    assert (llm.replicas, llm.slots) == (best["workers"], best["slots"])
    assert llm.deployment_config.max_ongoing_requests == best["threshold"]
    assert config.router.policy == "round_robin"
    out = capsys.readouterr().out
    assert result["yaml"] in out
    assert f"{best['workers']} worker" in out
    assert page.read_text().count("max_ongoing_requests") >= 2
    met = {
        point["choice"]["workers"] for point in result["points"] if point.get("verdict") == "met"
    }
    assert min(met) == best["workers"]


def test_recommend_says_when_no_fleet_will_do(
    tmp_path: Path, tight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 60)
    result = run(
        tmp_path, "recommend", trace, "--config", tight, "--slo", "ttft_p99=1ms", "--seeds", 2,
        "--jobs", 1, "--max-workers", 2, status=1,
    )  # fmt: skip
    assert (result["met"], result["yaml"], result["recommended"]) == (False, None, None)
    out = capsys.readouterr().out
    assert "No fleet of up to 2 workers gives TTFT p99 ≤ 1.0 ms." in out
    assert "slots" not in out.splitlines()[1], "the trace names no adapter"


BAD: list[tuple[list[str], str]] = [
    (["compare", "T", "--policies", "afinity"], "no policy `afinity`; did you mean `affinity`?"),
    (["compare", "T", "--policies", "affinity,affinity"], "affinity stands there twice"),
    (["compare", "T", "--report", "/nonexistent/x.html"], "there is no folder /nonexistent"),
    (["compare", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["sweep", "T", "--vary", "worker=3"], "did you mean `workers`?"),
    (["sweep", "T", "--vary", "threshold=0"], "--vary threshold=0: max_ongoing_requests"),
    (["sweep", "T", "--vary", "slots=4", "--slo", "x=1"], "there is no figure `x`"),
    (["recommend", "T", "--slo", "ttft_p99=x"], "a time above 0, such as 2s"),
    (["recommend", "T", "--slo", "ttft_p99=2s", "--workers", "3"], "give --max-workers instead"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_gets_one_clear_line(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = [str(trace) if argument == "T" else argument for argument in arguments]
    assert main([*command, "--jobs", "1"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.replace("\n", " ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "0 is below 1"),
        (["--seeds", "101"], "not between 1 and 100"),
        ([], "--slo"),
    ],
)
def test_bad_options(
    trace: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["recommend", str(trace), *options])
    assert message in capsys.readouterr().err


def test_a_replay_without_a_page_loads_no_plots(trace: Path) -> None:
    script = (
        "import sys; from sim.__main__ import main; "
        f"main(['replay', {str(trace)!r}]); "
        "print([name for name in ('plotly', 'numpy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
