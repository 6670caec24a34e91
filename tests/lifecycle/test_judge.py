"""When a new version is worse than what is served beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lifecycle.judge import Tally, bounds, is_worse


def tally(failures: int, requests: int) -> Tally:
    made = Tally()
    made.failures, made.requests = failures, requests
    return made


@pytest.mark.parametrize(
    ("new", "rest", "worse"),
    [
        ((0, 0), (0, 0), False),
        ((1, 1), (0, 1000), False),  # one failure is an accident
        ((5, 5), (0, 0), True),  # all of them, and nothing else to compare with
        ((5, 5), (0, 1000), True),
        ((4, 100), (0, 1000), False),
        ((20, 100), (0, 1000), True),
        ((20, 100), (200, 1000), False),  # everything fails as often: a worker's fault
        ((50, 50), (40, 50), False),
        ((500, 1000), (30, 1000), True),
    ],
)
def test_worse(new: tuple[int, int], rest: tuple[int, int], worse: bool) -> None:
    assert is_worse(tally(*new), tally(*rest)) is worse


@given(st.integers(0, 500), st.integers(1, 500))
def test_bounds_hold_the_share_that_was_seen(failures: int, others: int) -> None:
    requests = failures + others
    low, high = bounds(failures, requests)
    assert 0.0 <= low <= failures / requests <= high <= 1.0


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_a_failure_more_never_speaks_for_a_version(failures: int, good: int, rest: int) -> None:
    before = is_worse(tally(failures, failures + good), tally(1, 1 + rest))
    after = is_worse(tally(failures + 1, failures + good + 1), tally(1, 1 + rest))
    assert after or not before
