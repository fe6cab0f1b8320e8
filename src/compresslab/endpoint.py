"""Endpoint: a model behind any server that speaks OpenAI's API, asked with patience, and never twice for the same thing.

    question -> is it in the cache? -> wait for a turn (requests a minute) -> POST /chat/completions or /completions
             -> again after a pause, where the server is slow, busy or broken -> checked -> a line in the cache -> Answer

- A key comes from the environment variable that is named, and goes into the header of a request and nowhere else: it is in no
  file, and cut out of what a server says before that is shown.
- The cache is a file of one line an answer, named by a hash of what was asked of whom. A line that a kill left half written is
  asked for again.
- A server that says "Retry-After" is waited for that long; otherwise pauses double, from 1 to 60 seconds, with some chance in
  them so that many askers do not come back at once.
- What a server is paid is counted from its own count of tokens, together with what the answers in the cache were paid for at
  the same prices. Asking ends before a limit is passed: before a request the most that its answer may cost is put by, which is
  `max_tokens` and a token for each byte of the question (and ROOM more, for a chat's frame). What a server charges for requests
  that it does not answer cannot be known, and is not counted.
- What comes back is held against what was asked: none of the log-probabilities is an error; fewer of them, answers that were
  cut and empty ones are counted in the bill.

Source: OpenAI's API reference (chat/completions and completions, with `logprobs`). Nothing but Python's own HTTP is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compresslab.errors import CompressLabError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth asking again
LONGEST_PAUSE = 60.0
MOST_WAITED_FOR = 600.0  # seconds that a server may ask one to wait
MOST_BYTES = 64_000_000  # of one answer
CACHE = "answers.jsonl"
ROOM = 64  # tokens around a question


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer, and the most likely ones in its place, with natural logarithms of their probabilities."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said.

    Attributes:
        finish: "stop" at its end, "length" where it was cut.
        tokens: with log-probabilities, if they were asked for.
        prompt_tokens, answer_tokens: as the server counts them, 0 if it does not.
    """

    text: str
    finish: str
    tokens: tuple[Token, ...] | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how to ask.

    Args:
        url: of the API, up to and with its version: https://.../v1.
        model: as the server calls it.
        kind: "chat", a question and an answer; "completions", a text and how it goes on.
        key_variable: the environment variable that holds the key; unset, no key is sent.
        max_tokens: of an answer.
        temperature, seed: how the answer is drawn; 0 is the most likely one.
        top: of how many tokens in each place log-probabilities are asked for; 0 for none.
        requests_a_minute: None for as many as the server takes.
        at_once: requests under way.
        timeout: seconds until an answer must be there.
        retries: how often a request is repeated.
        price_in, price_out: of a million tokens of questions and of answers, in any currency.
        most_cost: what may be spent in all, with what the answers in the cache cost before; None for no limit.
    """

    url: str
    model: str
    kind: str = "chat"
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = 0
    top: int = 0
    requests_a_minute: float | None = None
    at_once: int = 4
    timeout: float = 120.0
    retries: int = 6
    price_in: float = 0.0
    price_out: float = 0.0
    most_cost: float | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.username or parts.password:
            raise CompressLabError("the url of an endpoint is like https://host/v1, without a name or password in it")
        if self.kind not in ("chat", "completions"):
            raise CompressLabError(f"an endpoint's kind is chat or completions, not {self.kind!r}")
        for name, least in (
            ("max_tokens", 1),
            ("at_once", 1),
            ("retries", 0),
            ("top", 0),
            ("price_in", 0),
            ("price_out", 0),
        ):
            if getattr(self, name) < least:
                raise CompressLabError(f"{name} of an endpoint is {least} or more, not {getattr(self, name)}")
        if self.timeout <= 0 or (self.requests_a_minute is not None and self.requests_a_minute <= 0):
            raise CompressLabError("timeout and requests_a_minute of an endpoint are above 0")

    def body(self, question: str) -> dict[str, Any]:
        """A request as the API has it."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.seed is not None:
            asked["seed"] = self.seed
        if self.kind == "chat":
            logs = {"logprobs": True, "top_logprobs": self.top} if self.top else {}
            return asked | {"messages": [{"role": "user", "content": question}]} | logs
        return asked | {"prompt": question} | ({"logprobs": self.top} if self.top else {})

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.price_in + answer_tokens * self.price_out) / 1e6

    def most_for(self, question: str) -> float:
        """What an answer may cost at most."""
        return self.cost(len(question.encode()) + ROOM, self.max_tokens)

    def name_of(self, question: str) -> str:
        """What an answer is kept under: a hash of all that it depends on."""
        asked = {"url": self.url.rstrip("/"), "kind": self.kind, **self.body(question)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(kw_only=True)
class Bill:
    """What asking came to.

    Attributes:
        cost: of the requests that were made now.
        paid_before: what all answers cost that the cache had at the beginning.
        cut, empty: answers that were ended by their length, and those without words.
        places, short: tokens with log-probabilities, and how many of them have those of fewer others than were asked for.
        fewest_top: the fewest; None without any.
    """

    asked: int = 0
    from_cache: int = 0
    repeated: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0
    paid_before: float = 0.0
    cut: int = 0
    empty: int = 0
    places: int = 0
    short: int = 0
    fewest_top: int | None = None


@dataclass
class Asking:
    """An endpoint, its cache and its bill.

    Args:
        folder: where the cache lies.
        sleep, clock: time itself, but for tests.
    """

    endpoint: Endpoint
    folder: Path
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    bill: Bill = field(default_factory=Bill)

    def __post_init__(self) -> None:
        self._lock, self._turn = threading.Lock(), 0.0
        self._freed, self._put_by = threading.Condition(self._lock), 0.0
        self._chance = random.Random(0)
        self._stop = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kept = _read_cache(self.folder / CACHE)
        self.bill.paid_before = sum(self._cost(answer) for answer in self._kept.values())

    def all(self, questions: Sequence[str], on_answer: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in the order of the questions. The same question is asked once.

        Raises:
            CompressLabError: where the server refuses, stays silent, is no such server, or gives less than was asked. What it has
                said so far is in the cache.
        """
        wanted = list(dict.fromkeys(questions))

        def one(question: str) -> Answer:
            if self._stop.is_set():
                raise CompressLabError("stopped")
            try:
                answer = self._one(question)
            except BaseException:
                self._stop.set()
                raise
            on_answer()
            return answer

        self._stop.clear()
        with ThreadPoolExecutor(max_workers=self.endpoint.at_once) as pool:
            futures = [pool.submit(one, question) for question in wanted]
        failed = [error for future in futures if (error := future.exception()) is not None]
        if failed:
            raise next((error for error in failed if str(error) != "stopped"), failed[0])
        found = dict(zip(wanted, [future.result() for future in futures], strict=True))
        return [found[question] for question in questions]

    def _one(self, question: str) -> Answer:
        name = self.endpoint.name_of(question)
        kept = self._kept.get(name)
        if kept is not None:
            with self._lock:
                self._count_(kept)
                self.bill.from_cache += 1
            return kept
        with self._money_for(question):
            answer = self._checked(self._reply(self.endpoint.body(question)))
            with self._lock:
                with (self.folder / CACHE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, "answer": asdict(answer)}) + "\n")
                self._kept[name] = answer
                self._count_(answer)
                self._pay_(answer)
        return answer

    def _count_(self, answer: Answer) -> None:
        bill = self.bill
        bill.cut += answer.finish == "length"
        bill.empty += not answer.text.strip()
        for token in answer.tokens or ():
            bill.places += 1
            bill.short += len(token.top) < self.endpoint.top
            bill.fewest_top = min(len(token.top), self.endpoint.top if bill.fewest_top is None else bill.fewest_top)

    def _pay_(self, answer: Answer) -> None:
        self.bill.asked += 1
        self.bill.prompt_tokens += answer.prompt_tokens
        self.bill.answer_tokens += answer.answer_tokens
        self.bill.cost += self._cost(answer)

    def _cost(self, answer: Answer) -> float:
        return self.endpoint.cost(answer.prompt_tokens, answer.answer_tokens)

    @contextlib.contextmanager
    def _money_for(self, question: str) -> Iterator[None]:
        """Put by what an answer may cost, while it is asked for; CompressLabError where that might pass the limit."""
        most, limit, bill = self.endpoint.most_for(question), self.endpoint.most_cost, self.bill
        with self._freed:
            while limit is not None and bill.paid_before + bill.cost + self._put_by + most > limit:
                if not self._put_by:
                    raise CompressLabError(
                        f"{bill.paid_before + bill.cost:.4f} is spent of {limit:g} that may be, and one more answer may cost "
                        f"{most:.4f}: what was said so far is kept; raise the limit to go on, or lower max_tokens"
                    )
                self._freed.wait()  # for what comes back of what was put by
            self._put_by += most
        try:
            yield
        finally:
            with self._freed:
                self._put_by -= most
                self._freed.notify_all()

    # -- the wire ------------------------------------------------------------------------------------------------------

    def _reply(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers with, after as many tries as it takes."""
        trouble = ""
        for attempt in range(self.endpoint.retries + 1):
            self._take_turn()
            pause = min(LONGEST_PAUSE, 2.0**attempt) * (0.5 + self._chance.random() / 2)
            try:
                return self._post(body)
            except _Passing as passing:
                trouble, pause = str(passing), max(passing.wait, pause) if passing.wait is not None else pause
            if attempt < self.endpoint.retries:
                with self._lock:
                    self.bill.repeated += 1
                self.sleep(pause)
        raise CompressLabError(
            f"{self.endpoint.url} did not answer in {self.endpoint.retries + 1} tries ({trouble}): what it said so far is kept: "
            "run the same command again later, with fewer requests a minute or a longer timeout"
        )

    def _take_turn(self) -> None:
        """Wait until the rate allows a request."""
        with self._lock:
            if self.endpoint.requests_a_minute is None:
                return
            now = self.clock()
            start = max(now, self._turn)
            self._turn = start + 60 / self.endpoint.requests_a_minute
        if start > now:
            self.sleep(start - now)

    def _post(self, body: Mapping[str, Any]) -> Any:
        key = os.environ.get(self.endpoint.key_variable, "")
        path = "/chat/completions" if self.endpoint.kind == "chat" else "/completions"
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "compresslab"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(
            self.endpoint.url.rstrip("/") + path, data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        try:
            with _OPENER.open(request, timeout=self.endpoint.timeout) as reply:
                content = reply.read(MOST_BYTES + 1)
                is_cut = len(content) <= MOST_BYTES and bool(reply.length)
        except urllib.error.HTTPError as error:
            said = _said(error, key)
            if error.code in PASSING:
                raise _Passing(f"status {error.code}: {said}", _wait_of(error.headers)) from None
            hint = f"; the key comes from {self.endpoint.key_variable}" if error.code in (401, 403) else ""
            raise CompressLabError(f"{self.endpoint.url} refuses with status {error.code} ({said}){hint}") from None
        except TimeoutError:
            raise _Passing(f"nothing came within {self.endpoint.timeout:g} seconds") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"nothing came within {self.endpoint.timeout:g} seconds") from None
            raise _Passing(_without(key, str(reason) or type(error).__name__)) from None
        if len(content) > MOST_BYTES:
            raise CompressLabError(f"{self.endpoint.url} sent more than {MOST_BYTES // 10**6} MB for one answer")
        if is_cut:
            raise _Passing("the answer broke off")
        try:
            return json.loads(content)
        except ValueError:
            raise _Passing(f"no JSON: {_without(key, content[:60].decode(errors='replace'))!r}") from None

    # -- what came back ------------------------------------------------------------------------------------------------

    def _checked(self, reply: Any) -> Answer:
        """CompressLabError where less came back than was asked for."""
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if self.endpoint.kind == "chat" else choice["text"]
            usage = reply.get("usage") or {}
            answer = Answer(
                text=str(text or ""), finish=str(choice.get("finish_reason") or "stop"),
                tokens=self._tokens(choice.get("logprobs")),
                prompt_tokens=int(usage.get("prompt_tokens") or 0), answer_tokens=int(usage.get("completion_tokens") or 0),
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise CompressLabError(
                f"{self.endpoint.url} answered with JSON that is no {self.endpoint.kind} answer of OpenAI's API: is the url "
                "right, and the kind?"
            ) from None
        if self.endpoint.top and answer.text and not answer.tokens:
            raise CompressLabError(
                f"{self.endpoint.url} gives no log-probabilities, of which {self.endpoint.top} were asked: leave them "
                "out, and learn from its words alone"
            )
        if (self.endpoint.price_in or self.endpoint.price_out) and not usage:
            raise CompressLabError(
                f"{self.endpoint.url} does not count tokens, so that no cost can be counted: set the prices to 0"
            )
        return answer

    def _tokens(self, logs: Any) -> tuple[Token, ...] | None:
        if not self.endpoint.top or not logs:
            return None
        if self.endpoint.kind == "chat":
            return tuple(
                Token(text=entry["token"], log_prob=float(entry["logprob"]),
                      top=tuple((one["token"], float(one["logprob"])) for one in entry.get("top_logprobs") or ()))
                for entry in logs.get("content") or ()
            )  # fmt: skip
        tops = logs.get("top_logprobs") or [None] * len(logs["tokens"])
        rows = zip(logs["tokens"], logs["token_logprobs"], tops, strict=True)
        return tuple(
            Token(text=text, log_prob=float(value), top=tuple((k, float(v)) for k, v in (top or {}).items()))
            for text, value, top in rows
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named: a redirection is an answer like any other."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class _Passing(Exception):
    """A trouble that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


def _wait_of(headers: Any) -> float | None:
    try:
        return min(max(float(headers.get("Retry-After", "")), 0.0), MOST_WAITED_FOR)
    except ValueError:  # absent, or a date
        return None


def _said(error: urllib.error.HTTPError, key: str) -> str:
    """What a server says of its refusal, in a line."""
    try:
        content = error.read(2000).decode(errors="replace")
    except OSError:
        content = ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = str(json.loads(content)["error"]["message"])
    return _without(key, " ".join(content.split())[:200]) or error.reason


def _without(key: str, text: str) -> str:
    return text.replace(key, "***") if key else text


def _read_cache(path: Path) -> dict[str, Answer]:
    """The answers that are there; a line that a kill left half written is cut off."""
    if not path.exists():
        return {}
    found, good = {}, 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n"):
                break
            answer = entry["answer"]
            tokens = answer.pop("tokens")
            if tokens is not None:
                tokens = tuple(
                    Token(text=t["text"], log_prob=t["log_prob"], top=tuple((k, v) for k, v in t["top"]))
                    for t in tokens
                )
            found[entry["name"]] = Answer(**answer, tokens=tokens)
        except (ValueError, KeyError, TypeError):
            break
        good += len(line)
    if good < len(content):
        if b"\n" in content[good:-1]:
            raise CompressLabError(f"{path} is damaged after byte {good}: remove it to ask everything again")
        with path.open("r+b") as file:
            file.truncate(good)
    return found
