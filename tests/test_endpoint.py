"""A model behind an API, asked through a server of Python's own that can be slow, busy, broken or stingy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compresslab.endpoint import CACHE, Answer, Asking, Endpoint
from compresslab.errors import CompressLabError
from stub_server import Server, good, serving

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


class Clock:
    """Time that passes only when it is slept through."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def asking(server: Server, folder: Path, clock: Clock | None = None, **settings: Any) -> Asking:
    clock = clock or Clock()
    endpoint = Endpoint(**{"url": server.url, "model": "m", "at_once": 1, "timeout": 5.0, **settings})
    return Asking(endpoint, folder, sleep=clock.sleep, clock=lambda: clock.now)


def test_answers_come_in_order_and_each_question_is_asked_once(server: Server, tmp_path: Path) -> None:
    asked = asking(server, tmp_path, at_once=3, price_in=2e6, price_out=1e6)
    found = asked.all(["a b", "c", "a b", "d e f"])
    assert [answer.text for answer in found] == ["A B", "C", "A B", "D E F"]
    assert len(server.asked) == 3 and server.paths[0] == "/v1/chat/completions"
    assert server.asked[0] == {"model": "m", "max_tokens": 256, "temperature": 0.0, "seed": 0,
                               "messages": [{"role": "user", "content": server.asked[0]["messages"][0]["content"]}]}  # fmt: skip
    assert (asked.bill.asked, asked.bill.prompt_tokens, asked.bill.answer_tokens) == (3, 6, 6)
    assert asked.bill.cost == pytest.approx(18.0)


def test_what_was_answered_is_never_asked_again(server: Server, tmp_path: Path) -> None:
    first = asking(server, tmp_path, top=2).all(["a b", "c"])
    again = asking(server, tmp_path, top=2, price_in=1.0)
    assert again.all(["c", "a b"]) == first[::-1]
    assert len(server.asked) == 2 and again.bill.from_cache == 2 and again.bill.cost == 0
    for other in ({"temperature": 0.5}, {"max_tokens": 3}, {"model": "n"}, {"top": 3}, {"kind": "completions"}):
        asking(server, tmp_path, **({"top": 2} | other)).all(["c"])
    assert len(server.asked) == 7


def test_a_line_that_a_kill_cut_is_asked_again(server: Server, tmp_path: Path) -> None:
    asking(server, tmp_path).all(["a", "b"])
    path = tmp_path / CACHE
    path.write_bytes(path.read_bytes()[:-9])
    assert [answer.text for answer in asking(server, tmp_path).all(["a", "b"])] == ["A", "B"]
    assert len(server.asked) == 3
    assert asking(server, tmp_path).all(["a", "b"]) and len(server.asked) == 3
    path.write_bytes(b"junk\n" + path.read_bytes())
    with pytest.raises(CompressLabError, match="is damaged after byte 0"):
        asking(server, tmp_path)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_log_probabilities(kind: str, server: Server, tmp_path: Path) -> None:
    asked = asking(server, tmp_path, kind=kind, top=2)
    (answer,) = asked.all(["a b"])
    assert answer.tokens is not None
    assert [(t.text, t.log_prob, t.top) for t in answer.tokens] == [
        ("A", -0.5, (("A0", -0.5), ("A1", -1.5))), ("B", -0.5, (("B0", -0.5), ("B1", -1.5))),
    ]  # fmt: skip
    assert server.paths == ["/v1/chat/completions" if kind == "chat" else "/v1/completions"]
    assert asked.bill.fewest_top == 2


def test_the_key_comes_from_the_environment_and_is_nowhere_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.troubles = [(429, {}, {"error": {"message": f"slow down, {KEY}"}})]
    asking(server, tmp_path, key_variable="MY_KEY").all(["a"])
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    server.troubles = [(401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    with pytest.raises(CompressLabError, match=r"refuses with status 401 .*\*\*\*.*comes from MY_KEY") as refused:
        asking(server, tmp_path, key_variable="MY_KEY").all(["b"])
    assert KEY not in str(refused.value) and refused.value.__suppress_context__
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in repr(asking(server, tmp_path, key_variable="MY_KEY"))
    asking(server, tmp_path, key_variable="NO_KEY").all(["c"])
    assert "Authorization" not in server.headers[-1]


def test_a_key_goes_to_no_other_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.troubles = [(307, {"Location": "http://127.0.0.1:9/elsewhere"}, "")]
    with pytest.raises(CompressLabError, match="refuses with status 307"):
        asking(server, tmp_path).all(["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_trouble_that_passes_is_waited_out(status: int, server: Server, tmp_path: Path) -> None:
    clock = Clock()
    server.troubles = [(status, {}, "busy")] * 3
    asked = asking(server, tmp_path, clock)
    assert asked.all(["a"])[0].text == "A"
    assert asked.bill.repeated == 3 and len(clock.slept) == 3
    assert all(2**i / 2 <= pause <= 2**i for i, pause in enumerate(clock.slept))


def test_a_server_is_waited_for_as_long_as_it_says(server: Server, tmp_path: Path) -> None:
    clock = Clock()
    server.troubles = [(429, {"Retry-After": "17"}, ""), (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "")]
    asking(server, tmp_path, clock).all(["a"])
    assert clock.slept[0] == 17 and 1 <= clock.slept[1] <= 2


def test_a_server_that_stays_busy_ends_it_and_what_was_said_is_kept(server: Server, tmp_path: Path) -> None:
    asking(server, tmp_path).all(["a"])
    server.troubles = [(503, {}, {"error": {"message": "overloaded"}})] * 3
    with pytest.raises(CompressLabError, match=r"did not answer in 3 tries \(status 503: overloaded\).*kept"):
        asking(server, tmp_path, retries=2).all(["a", "b", "c", "d"])
    assert len(server.asked) == 4  # nothing was asked after it had failed
    assert [answer.text for answer in asking(server, tmp_path).all(["a", "b"])] == ["A", "B"]


def test_a_slow_server(server: Server, tmp_path: Path) -> None:
    server.delay = 0.5
    with pytest.raises(CompressLabError, match=r"did not answer in 2 tries \(nothing came within 0.1 seconds\)"):
        asking(server, tmp_path, timeout=0.1, retries=1).all(["a"])


def test_no_server(server: Server, tmp_path: Path) -> None:
    gone = Server(url="http://127.0.0.1:9/v1")
    with pytest.raises(CompressLabError, match="did not answer in 2 tries"):
        asking(gone, tmp_path, retries=1).all(["a"])


def test_an_answer_that_breaks_off_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.troubles = [(200, {}, '{"choices": [{"mess'), (200, {"Content-Length": "5000"}, "{}")]
    assert asking(server, tmp_path, timeout=0.3).all(["a"])[0].text == "A"


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_refusal_is_told_at_once(status: int, server: Server, tmp_path: Path) -> None:
    server.troubles = [(status, {}, {"error": {"message": "no such model"}})]
    with pytest.raises(CompressLabError, match=rf"refuses with status {status} \(no such model\)"):
        asking(server, tmp_path).all(["a"])
    assert len(server.asked) == 1


def without(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def answer(body: dict[str, Any]) -> Any:
        found = good(body)
        inner: Any = found
        for part in path[:-1]:
            inner = inner[part]
        del inner[path[-1]]
        return found

    return answer


@pytest.mark.parametrize(
    ("answer", "settings", "words"),
    [
        (without("choices"), {}, "no chat answer"),
        (without("choices", 0), {}, "no chat answer"),
        (without("choices", 0, "message"), {}, "no chat answer"),
        (lambda body: [1], {}, "no chat answer"),
        (without("choices", 0, "logprobs"), {"top": 3}, "gives no log-probabilities, of which 3 were asked"),
        (without("usage"), {"price_out": 1.0}, "does not count tokens"),
    ],
)
def test_less_than_was_asked(
    answer: Callable[[dict[str, Any]], Any], settings: dict[str, Any], words: str, server: Server, tmp_path: Path
) -> None:
    server.answer = answer
    with pytest.raises(CompressLabError, match=words):
        asking(server, tmp_path, **settings).all(["a"])
    assert not (tmp_path / CACHE).exists()


def test_what_is_short_is_counted(server: Server, tmp_path: Path) -> None:
    def stingy(body: dict[str, Any]) -> dict[str, Any]:
        found = good(body)
        choice = found["choices"][0]
        if body["messages"][0]["content"] == "empty":
            choice |= {"message": {"content": None}, "logprobs": None}
        else:
            choice["finish_reason"] = "length"
            for token in choice["logprobs"]["content"]:
                del token["top_logprobs"][1:]
        return found

    server.answer = stingy
    asked = asking(server, tmp_path, top=5)
    found = asked.all(["a b", "empty"])
    assert (found[0].finish, found[1].text) == ("length", "")
    bill = asked.bill
    assert (bill.cut, bill.empty, bill.fewest_top, bill.short, bill.places) == (1, 1, 1, 2, 2)


def test_turns_are_taken_at_the_rate(server: Server, tmp_path: Path) -> None:
    clock = Clock()
    asking(server, tmp_path, clock, requests_a_minute=30).all(["a", "b", "c", "d"])
    assert clock.slept == [2.0, 2.0, 2.0]


def test_as_many_at_once_as_may_be(server: Server, tmp_path: Path) -> None:
    server.delay = 0.05
    asking(server, tmp_path, at_once=3).all([str(i) for i in range(9)])
    assert 2 <= server.most_under_way <= 3


@pytest.mark.parametrize("at_once", [1, 4])
def test_asking_ends_before_a_limit_is_passed(at_once: int, server: Server, tmp_path: Path) -> None:
    """Whatever is under way: each answer costs 1, or 3 where it says as much as it may."""
    server.delay = 0.02
    settings: dict[str, Any] = {"price_out": 1e6, "max_tokens": 3, "at_once": at_once}
    questions = [*"abcde", "f g h", "i j k"]
    with pytest.raises(
        CompressLabError, match=r"\d.0000 is spent of 7.5 that may be, and one more answer may cost 3.0000"
    ):
        asking(server, tmp_path, most_cost=7.5, **settings).all(questions)
    kept = asking(server, tmp_path, **settings)
    assert 7.5 - 3 < kept.bill.paid_before <= 7.5
    kept.all(questions)
    assert kept.bill.paid_before + kept.bill.cost == 11
    assert kept.bill.from_cache + kept.bill.asked == 7


def test_what_the_cache_cost_is_a_part_of_the_limit(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"price_out": 1e6, "max_tokens": 1}
    asking(server, tmp_path, **settings).all(["a", "b"])
    again = asking(server, tmp_path, most_cost=2.5, **settings)
    assert again.all(["a", "b"])[1] == Answer(text="B", finish="stop", prompt_tokens=1, answer_tokens=1)
    assert (again.bill.cost, again.bill.paid_before) == (0.0, 2.0)
    with pytest.raises(CompressLabError, match=r"2.0000 is spent of 2.5"):
        again.all(["c"])
    assert len(server.asked) == 2


def test_of_a_question_a_token_is_put_by_for_each_byte_and_some_for_its_frame() -> None:
    endpoint = Endpoint(url="http://h/v1", model="m", price_in=2e6, price_out=1e6, max_tokens=5)
    assert endpoint.most_for("\u00e9t") == 2 * (3 + 64) + 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "ftp://host"}, "like https://host/v1"),
        ({"url": "https://me:pass@host/v1"}, "without a name or password"),
        ({"kind": "edits"}, "chat or completions"),
        ({"max_tokens": 0}, "max_tokens of an endpoint is 1 or more"),
        ({"timeout": 0.0}, "are above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressLabError, match=words):
        Endpoint(**{"url": "http://h/v1", "model": "m", **settings})
