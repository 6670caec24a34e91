"""Steps from one meaning of a name to the next: what each does, and what holds after any of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lifecycle.alias import Alias, followed, promoted, refused, rolled_back, split
from router.lifecycle.words import LifecycleError

A, B, C = "a" * 16, "b" * 16, "c" * 16
SERVES_A = Alias(serving=A)
TRIES_B = Alias(serving=A, candidate=B, weight=0.1)
B_AFTER_A = Alias(serving=B, previous=A)


def meaning(alias: Alias) -> tuple[str, str, str, float, str]:
    return alias.serving, alias.previous, alias.candidate, alias.weight, alias.refused


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (followed(SERVES_A, B, 1.0, 0), (B, A, "", 0.0, "")),
        (followed(SERVES_A, B, 0.25, 0), (A, "", B, 0.25, "")),
        (followed(SERVES_A, B, 0.0, 0), (A, "", B, 0.0, "")),
        (followed(SERVES_A, A, 1.0, 0), (A, "", "", 0.0, "")),
        (followed(TRIES_B, C, 1.0, 0), (C, A, "", 0.0, "")),
        (followed(TRIES_B, C, 0.5, 0), (A, "", C, 0.5, "")),
        (followed(refused(SERVES_A, B, "bad", 0), B, 1.0, 0), (A, "", "", 0.0, B)),
        (split(SERVES_A, B, 0.5, 0), (A, "", B, 0.5, "")),
        (split(refused(SERVES_A, B, "bad", 0), B, 0.5, 0), (A, "", B, 0.5, "")),
        (promoted(TRIES_B, "", 0), (B, A, "", 0.0, "")),
        (promoted(TRIES_B, C, 0), (C, A, "", 0.0, "")),
        (promoted(TRIES_B, A, 0), (A, "", "", 0.0, "")),
        (rolled_back(TRIES_B, "worse", 0), (A, "", "", 0.0, B)),
        (rolled_back(B_AFTER_A, "worse", 0), (A, "", "", 0.0, B)),
        (promoted(rolled_back(B_AFTER_A, "worse", 0), B, 0), (B, A, "", 0.0, "")),
    ],
)
def test_a_step(after: Alias, expected: tuple[str, str, str, float, str]) -> None:
    assert meaning(after) == expected


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (lambda: split(SERVES_A, A, 0.5, 0), "conflict"),
        (lambda: split(SERVES_A, B, 1.0, 0), "invalid"),
        (lambda: split(SERVES_A, B, -0.1, 0), "invalid"),
        (lambda: promoted(SERVES_A, "", 0), "conflict"),
        (lambda: promoted(SERVES_A, A, 0), "conflict"),
        (lambda: rolled_back(SERVES_A, "worse", 0), "conflict"),
    ],
)
def test_what_cannot_be_done_says_so(step: object, kind: str) -> None:
    with pytest.raises(LifecycleError) as caught:
        step()  # type: ignore[operator]
    assert caught.value.kind == kind


VERSIONS = st.sampled_from([A, B, C])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("followed"), VERSIONS, st.sampled_from([0.0, 0.3, 1.0])),
        st.tuples(st.just("split"), VERSIONS, st.sampled_from([0.0, 0.3, 1.0])),
        st.tuples(st.just("promoted"), VERSIONS | st.just(""), st.just(0.0)),
        st.tuples(st.just("rolled_back"), st.just(""), st.just(0.0)),
    ),
    max_size=12,
)


@given(STEPS)
def test_whatever_is_done_something_serves_and_nothing_is_two_things(
    steps: list[tuple[str, str, float]],
) -> None:
    alias = SERVES_A
    for what, version, weight in steps:
        try:
            match what:
                case "followed":
                    alias = followed(alias, version, weight, 0)
                case "split":
                    alias = split(alias, version, weight, 0)
                case "promoted":
                    alias = promoted(alias, version, 0)
                case _:
                    back_from = alias.candidate or alias.serving
                    alias = rolled_back(alias, "worse", 0)
                    assert alias.refused == back_from
                    assert followed(alias, back_from, 1.0, 0) == alias
        except LifecycleError:
            continue
        assert alias.serving
        assert alias.candidate != alias.serving
        assert alias.previous != alias.serving
        assert alias.refused not in alias.versions or not alias.refused
        assert 0.0 <= alias.weight < 1.0
        assert alias.candidate or not alias.weight
