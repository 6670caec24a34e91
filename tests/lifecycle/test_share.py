"""A share of the users, each always on the same side."""

from hypothesis import given
from hypothesis import strategies as st

from router.core.job import AdapterRef
from router.lifecycle.share import Share

NEW = AdapterRef("base", "pirate", "b" * 16)


@given(st.text(), st.floats(0, 1))
def test_a_user_stays_on_its_side_and_a_larger_share_keeps_whom_it_has(
    user: str, weight: float
) -> None:
    assert Share(NEW, weight).takes(user) is Share(NEW, weight).takes(user)
    if Share(NEW, weight).takes(user):
        assert Share(NEW, min(1.0, weight + 0.1)).takes(user)


def test_the_share_is_about_its_weight() -> None:
    users = [f"user-{number}" for number in range(10_000)]
    for weight in (0.0, 0.01, 0.3, 0.9):
        taken = sum(Share(NEW, weight).takes(user) for user in users)
        assert abs(taken / len(users) - weight) < 0.02


def test_another_rollout_takes_other_users() -> None:
    users = [f"user-{number}" for number in range(10_000)]
    other = Share(AdapterRef("base", "pirate", "c" * 16), 0.1)
    both = sum(Share(NEW, 0.1).takes(user) and other.takes(user) for user in users)
    assert both < 200, "independent: 100 of 10,000"
