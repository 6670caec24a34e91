"""Which adapter each request of a trace asks for, where the trace does not say.

Real adapter traffic comes in bursts and sessions: in a production trace of 864 adapters one cache
of 4 slots hits 77% of the requests and of 16 slots 85%, and the same requests shuffled 4.5% and
16%. Independent draws misjudge every affinity policy, so the model here has two parts: with
probability `locality` the request asks again for a recently used adapter, the last one most often
(each place further back half as likely); otherwise for one drawn by Zipf's law. `locality` 0.8
gives the shares above; 0 gives independent draws.
"""

from bisect import bisect_left
from collections import deque
from itertools import accumulate
from random import Random
from typing import Final

DEFAULT_LOCALITY: Final = 0.8
RECENT: Final = 16


class AdapterDraw:
    """Draws the adapter of each request in turn: `adapter-0001` and so on, by one seed."""

    def __init__(self, count: int, *, locality: float, zipf: float, seed: int) -> None:
        assert count > 0
        assert 0 <= locality <= 1
        self._rng = Random(f"adapters:{seed}")
        self._locality = locality
        width = max(4, len(str(count - 1)))
        self._names = [f"adapter-{number:0{width}d}" for number in range(count)]
        # Rounded, so that a last bit that differs between machines' pow() changes no draw.
        weights = [round((rank + 1) ** -zipf, 12) for rank in range(count)]
        self._cumulated = list(accumulate(weights))
        self._recent: deque[int] = deque(maxlen=RECENT)

    def next(self) -> str:
        """The next request's adapter."""
        rng, recent = self._rng, self._recent
        if recent and rng.random() < self._locality:
            back = 0
            while back + 1 < len(recent) and rng.random() < 0.5:  # noqa: PLR2004  (see above)
                back += 1
            chosen = recent[back]
        else:
            cumulated = self._cumulated
            chosen = bisect_left(cumulated, rng.random() * cumulated[-1])
        if chosen in recent:
            recent.remove(chosen)
        recent.appendleft(chosen)
        return self._names[chosen]
