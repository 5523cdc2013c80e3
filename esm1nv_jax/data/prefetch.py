"""Makes batches in a thread while the device works, and says how long the step had to wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetch(Generic[T]):
    """An iterator that runs `items` in a thread, at most `ahead` items ahead.

    `waited` is the time in seconds that the caller spent waiting for items. An exception raised by
    `items` is raised here, after the items made before it. Close it, or use it in a `with`.
    """

    def __init__(self, items: Iterator[T], ahead: int = 4):
        if ahead < 1:
            raise ValueError(f"ahead must be 1 or more, found {ahead}")
        self.waited = 0.0
        self._queue: queue.Queue = queue.Queue(ahead)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as failure:  # shown to the caller, whatever it is
            self._failure = failure
        self._put(_END)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        if self._over or self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - began
        if item is _END:
            self._over = True
            self.close()
            if self._failure is not None:
                raise self._failure
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread and waits until the item in the making is done."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_) -> None:
        self.close()
