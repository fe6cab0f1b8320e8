"""One generation at a time in a thread of its own, and a bounded number that wait for it.

    submit -> waiting -> the thread -> deliver(piece) for each token; the last piece has a finish, or an exception ends it

Every accepted job is answered: by a last piece, by the exception that ended it, or by Stopped when the server goes down;
but for one that was cancelled, whose client is gone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from compresslab.serving.generation import Piece


class Stopped(Exception):
    """The server is going down."""


class Job:
    def __init__(self, pieces: Callable[[], Iterator[Piece]], deliver: Callable[[Piece | Exception], object]) -> None:
        self.pieces, self.deliver = pieces, deliver
        self.cancelled = threading.Event()


class Worker:
    """Args: places, how many jobs may wait while one runs."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopped = False
        # Re-entrant: a signal's handler calls stop() in a thread that may be inside submit().
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Whether there was room for it."""
        with self._changed:
            if self._stopped:
                raise Stopped
            if len(self._waiting) + (self._running is not None) > self.places:
                return False
            self._waiting.append(job)
            self._changed.notify()
            return True

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more. It gives up its place at once, or ends after the token that is being made."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def counts(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        with self._changed:
            return int(self._running is not None), len(self._waiting)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._work(job)

    def _work(self, job: Job) -> None:
        try:
            if self._stopped:  # who still waits is told so one by one: an answer may make a client cancel another
                raise Stopped
            for piece in job.pieces():
                if job.cancelled.is_set():
                    return
                if self._stopped:
                    raise Stopped
                job.deliver(piece)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises is this request's answer, not the thread's end
            job.deliver(error)
