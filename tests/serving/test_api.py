"""The server through real HTTP on 127.0.0.1, with a tiny artifact behind it."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.serving import server as serving
from compresslab.serving.runtime import Sampling
from compresslab.serving.torch_runtime import TorchRuntime

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
api = pytest.importorskip("compresslab.serving.api")

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = {"model": "tiny", "prompt": "hello"}


class Slowed(TorchRuntime):
    """The same runtime, which can be told to take its time, and says how many tokens it made."""

    delay = 0.0
    made = 0

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        for token in super().stream(ids, sampling):
            time.sleep(self.delay)
            self.made += 1
            yield token


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> Slowed:
    return Slowed(artifact, packed=False)


@contextmanager
def running(runtime: Slowed, **limits: Any) -> Iterator[Any]:
    """A client of a server with these limits."""
    service = api.Service(runtime, "tiny", api.Limits(**limits))
    server = serving.make_server(service)
    with serving.bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                wait_for(lambda: server.started)
                yield client
        finally:
            runtime.delay = 0.0
            server.handle_exit(2, None)
            thread.join(20)
            service.worker.join(20)
            assert not thread.is_alive()


def wait_for(met: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client(runtime: Slowed) -> Iterator[Any]:
    with running(runtime, max_tokens=50, body=20_000) as opened:
        yield opened


def events(client: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(response.iter_bytes()).decode("utf-8")  # strict: broken UTF-8 would raise
    found = raw.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in found) and found[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in found[:-1]]


def test_greedy_text_is_that_of_generate(client: Any, artifact: Path) -> None:
    tokenizer = models.load_tokenizer(artifact, "tiny")
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    model: Any = models.load(artifact)
    made = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    answer = client.post("/v1/completions", json={**PROMPT, "temperature": 0, "max_tokens": 40}).json()
    assert answer["object"] == "text_completion"
    choice = answer["choices"][0]
    assert choice["text"] == tokenizer.decode(made, skip_special_tokens=True).rstrip("\ufffd") != ""
    assert choice["finish_reason"] == ("stop" if 2 in made.tolist() else "length")
    new = len([token for token in made.tolist() if token != 2])
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": new, "total_tokens": 5 + new}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("is_chat", [True, False])
def test_streamed_and_whole_answers_are_the_same_and_seeds_repeat(client: Any, seed: int, is_chat: bool) -> None:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body = {"model": "tiny", "seed": seed, "top_p": 0.9, "max_tokens": 45, "stream_options": {"include_usage": True}}
    body |= {"messages": HELLO} if is_chat else {"prompt": "hello"}
    whole = client.post(path, json=body).json()
    *parts, last = events(client, path, body)
    if is_chat:
        assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
        text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    else:
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert whole["choices"][0]["text"] == text
    assert text and not text.endswith("\ufffd")
    assert parts[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    other = client.post(path, json={**body, "seed": seed + 100}).json()
    assert other["choices"] != whole["choices"]


def test_stop_strings_and_the_cap_on_tokens(client: Any) -> None:
    body = {**PROMPT, "temperature": 0, "max_tokens": 1000}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["usage"]["completion_tokens"] <= 50
    text = whole["choices"][0]["text"]
    stop = text[4:7]
    assert len(stop) == 3  # of a token each, at most
    at = text.index(stop)
    for given in (stop, ["never said", stop]):
        stopped = client.post("/v1/completions", json={**body, "stop": given}).json()
        assert stopped["choices"][0]["text"] == text[:at] and stopped["choices"][0]["finish_reason"] == "stop"
    parts = events(client, "/v1/completions", {**body, "stop": stop})
    assert "".join(part["choices"][0]["text"] for part in parts) == text[:at]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": None, "top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"model": "gpt-4"}, "model"),
        ({"model": 7}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "no!"}]}, "messages"),  # says the chat template
        ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_wrong_fields_are_named(client: Any, body: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **body})
    error = response.json()["error"]
    assert response.status_code == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error" and error["code"]


def test_other_fields_may_be_there_if_they_change_nothing(client: Any) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 3, "messages": HELLO}
    more = {"messages": [{"role": "user", "content": parts}], "presence_penalty": 0, "user": "me", "n": 1, "best_of": 1}
    plain, other = (client.post("/v1/chat/completions", json={**body, **x}).json()["choices"] for x in ({}, more))
    assert plain == other


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"model": "tiny", "prompt": "\\ud800"}']
)
def test_malformed_bodies(client: Any, content: bytes) -> None:
    response = client.post("/v1/completions", content=content)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_other_addresses_and_models(client: Any) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    for method, path, status in (("GET", "/v1/models/x", 404), ("GET", "/x", 404), ("GET", "/v1/completions", 405)):
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize("says_length", [True, False])
def test_a_body_is_given_up_while_it_is_read(client: Any, says_length: bool) -> None:
    """Through a bare socket: the answer must come although the body never ends."""
    address = (client.base_url.host, client.base_url.port)
    head = b"Content-Length: 1000000" if says_length else b"Transfer-Encoding: chunked"
    part = b"x" * 30_000 if says_length else b"7530\r\n" + b"x" * 30_000 + b"\r\n"
    with socket.create_connection(address, timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n" + part)
        answer = b"".join(iter(lambda: raw.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 413") and b"20000 bytes" in answer


def test_who_sends_far_too_much_reads_why(client: Any) -> None:
    response = client.post("/v1/completions", content=b" " * 5_000_000)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_a_server_for_as_long_as_it_is_wanted(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving.served(artifact, runtime="torch", max_tokens=3) as (url, name):
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            found = client.post("/completions", json={"model": name, "prompt": "hello", "max_tokens": 3}).json()
        assert name == artifact.name and found["usage"]["completion_tokens"] <= 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models", trust_env=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressLabError, match="fastapi and uvicorn not installed"), serving.served(artifact):
        pass
