"""made_ahead: makes the next items of an iterator in a thread, while their consumer computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


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
