"""Makes items in threads, while their consumer computes: in one thread, or in several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()
MOST_THREADS = 8


def called_ahead(
    functions: Iterable[Callable[[], T]], count: int, threads: int | None = None
) -> Generator[T, None, None]:
    """Yields the results of functions in their order; threads call the next ones meanwhile.

    An error of a function is raised where its result would be yielded. When the consumer stops, so
    do the threads, after the calls that have begun.

    Args:
        functions: Functions that may run at the same time.
        count: Most functions that are called before their results are asked for, at least 1.
        threads: Number of threads; None for one less than the cores that this process may use,
            and at most MOST_THREADS.
    """
    pool = ThreadPoolExecutor(threads or _threads(), thread_name_prefix="called_ahead")
    try:
        waiting: deque[Future[T]] = deque()
        for function in functions:
            waiting.append(pool.submit(function))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def called_aside(functions: Iterable[Callable[[], object]]) -> Callable[[], None]:
    """Calls functions in threads while the caller goes on; what they return or raise is dropped.

    Args:
        functions: Functions that may run at the same time.

    Returns:
        A function that waits for the calls in progress, and drops those that have not begun.
    """
    pool = ThreadPoolExecutor(_threads(), thread_name_prefix="called_aside")
    for function in functions:
        pool.submit(function)
    pool.shutdown(wait=False)  # the threads end after the last call
    return partial(pool.shutdown, cancel_futures=True)


def _threads() -> int:
    return max(1, min(MOST_THREADS, usable_cores() - 1))


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def made_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yields items in their order; one thread makes the next ones meanwhile.

    Tokenizers release Python's lock, so prompts are tokenized while a GPU generates. An error of
    the source is raised where its item would be yielded. When the consumer stops, so does the
    thread, after the item that it is making.

    Args:
        items: The source, which only this thread uses.
        count: Most items that are made before they are asked for, at least 1.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="made_ahead")
    try:
        waiting: deque[Future[Any]] = deque(pool.submit(next, source, _END) for _ in range(count))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, source, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
