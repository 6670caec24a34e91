"""The arithmetic of the ranking on real workers; the serving itself needs vLLM and minutes."""

import json
from pathlib import Path

import pytest

from benchmarks.ranking import order, tell, verdict

REAL = {"cost": 1.0, "affinity": 2.0, "round_robin": 4.0}


@pytest.mark.parametrize(
    ("simulated", "noise", "expected"),
    [
        (REAL, 0.0, "3 as simulated, 0 not, 0 within noise"),
        (
            {"cost": 4.0, "affinity": 2.0, "round_robin": 1.0},
            0.0,
            "0 as simulated, 3 not, 0 within noise",
        ),
        (REAL, 1.0, "2 as simulated, 0 not, 1 within noise"),
        (
            {"cost": 3.0, "affinity": 2.0, "round_robin": 4.0},
            0.5,
            "2 as simulated, 1 not, 0 within noise",
        ),
    ],
)
def test_pairs_are_counted(simulated: dict[str, float], noise: float, expected: str) -> None:
    assert verdict(REAL, simulated, noise) == expected


def test_the_best_stands_first() -> None:
    assert order(REAL, more_is_better=False) == ["cost", "affinity", "round_robin"]
    assert order(REAL, more_is_better=True) == ["round_robin", "affinity", "cost"]


def test_the_file_has_both_orders_and_the_noise(tmp_path: Path) -> None:
    keys = ("ttft_s mean", "e2e_s mean", "adapters hits", "adapters loads")
    found = {
        policy: {
            side: [dict.fromkeys(keys, value + step) for step in (0.0, 0.2)]
            for side in ("real", "simulated")
        }
        for policy, value in REAL.items()
    }
    path = tmp_path / "ranking.json"
    tell(found, path)
    orders = json.loads(path.read_text())["results"]["orders"]
    assert orders["ttft_s mean"]["real"] == ["cost", "affinity", "round_robin"]
    assert orders["adapters hits"]["simulated"] == ["round_robin", "affinity", "cost"]
    assert orders["e2e_s mean"]["noise"] == pytest.approx(0.2)
