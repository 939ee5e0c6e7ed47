"""A few long waits at once: each call starts Ray work of its own and waits for it. An interrupt does not wait for any of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
_NAME = "soul-waits-for-ray"


def run_together(calls: Sequence[Callable[[], T]], *, slots: int) -> list[T]:
    """The calls' results in order, at most `slots` at a time. The first failure is raised at once; calls under way end with Ray."""
    if slots <= 1 or len(calls) <= 1:
        return [call() for call in calls]
    executor = ThreadPoolExecutor(slots, _NAME)
    try:
        futures = [executor.submit(call) for call in calls]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def run_beside(call: Callable[[], T]) -> T:
    """The call's result, from a thread of its own: Ray Train takes Ctrl-C for itself in the main thread, and exits with 0."""
    executor = ThreadPoolExecutor(1, _NAME)
    try:
        return executor.submit(call).result()
    finally:
        executor.shutdown(wait=False)


def waiting_threads() -> list[threading.Thread]:
    """Those of the calls above that are still under way."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(_NAME)]
