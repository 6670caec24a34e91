from hypothesis import given
from hypothesis import strategies as st

from router.core.prefixes import marks
from router.frontend.head import BYTES_PER_TOKEN
from router.frontend.prefix import BLOCK_BYTES, HASHED_MAX_BYTES, prefix_of

# Long bodies cheaply: a short pattern, repeated.
bodies = st.builds(
    lambda seed, size: (seed * (size // len(seed) + 1))[:size],
    st.binary(min_size=1, max_size=16),
    st.integers(0, 40 * BLOCK_BYTES),
)


@given(bodies)
def test_the_marks_are_those_of_the_index(body: bytes) -> None:
    found = prefix_of(body)
    wanted = [mark * BLOCK_BYTES // BYTES_PER_TOKEN for mark in marks(len(body) // BLOCK_BYTES)]
    assert [mark.tokens for mark in found] == wanted
    assert prefix_of(body) == found


@given(bodies, bodies, bodies)
def test_two_bodies_share_the_marks_in_which_they_are_alike(
    beginning: bytes, one: bytes, other: bytes
) -> None:
    # Behind the common part each differs at once.
    first, second = prefix_of(beginning + b"1" + one), prefix_of(beginning + b"2" + other)
    alike = len(beginning) // BYTES_PER_TOKEN
    for mark, same in zip(first, second, strict=False):
        assert (mark == same) is (mark.tokens <= alike)


def test_a_short_body_has_none_and_a_huge_one_few() -> None:
    assert prefix_of(b"") == prefix_of(b"x" * (BLOCK_BYTES - 1)) == ()
    assert len(prefix_of(b"x" * BLOCK_BYTES)) == 1
    huge = b"x" * (4 * HASHED_MAX_BYTES)
    assert prefix_of(huge) == prefix_of(huge[:HASHED_MAX_BYTES] + b"y" * 100_000)
    assert len(prefix_of(huge)) == 16
