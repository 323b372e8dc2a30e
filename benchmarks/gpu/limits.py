"""Stops what takes too long, and goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when the time is over. Blocks may be nested."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, min(seconds, outer or seconds)))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        rest = max(0.001, outer - (time.monotonic() - started)) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, rest)
