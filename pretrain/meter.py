"""Speed of a run, and the time that it may still take."""

from __future__ import annotations

import time

from pretrain.flops import Peak


class Meter:
    """Tokens per second and utilisation between readings; time spent in `pause` does not count."""

    def __init__(self, *, token_flops: float, num_ranks: int, peak: Peak | None) -> None:
        self._token_flops, self._num_ranks, self._peak = token_flops, num_ranks, peak
        self._tokens = 0
        self._started = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Adds tokens that all ranks together have trained on."""
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Rates since the last reading; with a known peak, also `mfu`."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._started, 1e-9)
        self._tokens, self._started = 0, now
        found = {"tokens_per_second": rate}
        if self._peak is not None:
            found["mfu"] = rate * self._token_flops / (self._num_ranks * self._peak.flops)
        return found

    def skip(self, seconds: float) -> None:
        """Leaves out time that was not spent on training."""
        self._started += seconds


class Budget:
    """How many steps fit into the time of a run: measured on its first steps, then fixed.

    `horizon` is the number of steps in the whole run, None until it is known. With a time limit it is the smaller of
    the planned steps and of those that fit.
    """

    MEASURED_SHARE = 0.1
    """The share of the time over which steps are timed; the curves are all but flat until then."""
    MARGIN = 0.97
    """The share of the time that is planned: evaluations and other users of the machine take the rest."""

    def __init__(self, planned: int | None, seconds: float | None, *, horizon: int | None, spent: float) -> None:
        self._planned, self._seconds, self._spent = planned, seconds, spent
        self.horizon = planned if seconds is None or planned == 0 else horizon
        self._started = time.perf_counter()
        self._times: list[float] = []

    @property
    def spent(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._spent + time.perf_counter() - self._started

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._seconds is not None and self.spent >= self._seconds

    def measured_horizon(self, step: int) -> int | None:
        """Called after each of the first steps: the horizon, as soon as enough steps were timed."""
        assert self._seconds is not None
        self._times.append(time.perf_counter())
        if self.spent < self.MEASURED_SHARE * self._seconds or len(self._times) < 3:
            return None
        # The first step is left out: it compiles, allocates and fills caches.
        each = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        left = max(self.MARGIN * self._seconds - self.spent, 0.0)
        fitting = step + max(int(left / each), 1)
        return fitting if self._planned is None else min(fitting, self._planned)
