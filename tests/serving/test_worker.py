"""The thread that generates: every job that it accepted is answered once, whatever happens around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from compresslab.serving.generation import Piece
from compresslab.serving.worker import Job, Stopped, Worker


def test_an_answer_at_the_end_may_cancel_what_waits() -> None:
    """Told that the server ends, a client leaves: what it does to the queue then must not end the thread."""
    worker = Worker(places=4)
    running, go_on = threading.Event(), threading.Event()
    answers: dict[str, list[Piece | Exception]] = {name: [] for name in ("running", "first", "second", "third")}

    def blocked() -> Iterator[Piece]:
        running.set()
        go_on.wait(10)
        yield Piece(text="a", tokens=1)

    def never() -> Iterator[Piece]:
        raise AssertionError("started after the end")
        yield

    second = Job(never, answers["second"].append)

    def first_leaves(answer: Piece | Exception) -> None:
        answers["first"].append(answer)
        worker.cancel(second)

    for job in (
        Job(blocked, answers["running"].append),
        Job(never, first_leaves),
        second,
        Job(never, answers["third"].append),
    ):
        assert worker.submit(job)
    assert running.wait(10)
    worker.stop()
    go_on.set()
    worker.join(10)
    assert not worker._thread.is_alive()
    assert {name: [type(answer) for answer in found] for name, found in answers.items()} == {
        "running": [Stopped],
        "first": [Stopped],
        "second": [],
        "third": [Stopped],
    }
