"""Many clients, slow answers, clients that leave, and the end of the server."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_api import HELLO, PROMPT, Slowed, httpx, running, wait_for

LONG = {**PROMPT, "max_tokens": 300, "logit_bias": None}


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> Slowed:
    opened = Slowed(artifact, packed=False)
    opened.ends = frozenset()  # only the cap ends a text
    return opened


def test_a_flood_is_answered_or_refused(runtime: Slowed) -> None:
    with running(runtime, queue=8) as client, ThreadPoolExecutor(40) as pool:
        runtime.delay = 0.02
        before = runtime.made

        def ask(number: int) -> httpx.Response:
            return client.post("/v1/completions", json={**PROMPT, "max_tokens": 4, "seed": number})

        found = list(pool.map(ask, range(40)))
        accepted = [response for response in found if response.status_code == 200]
        refused = [response for response in found if response.status_code == 429]
        assert len(accepted) + len(refused) == 40 and len(accepted) >= 9 and refused
        assert all(x.json()["usage"]["completion_tokens"] == 4 for x in accepted)
        assert runtime.made - before == 4 * len(accepted)
        assert all(int(x.headers["retry-after"]) > 0 and x.json()["error"]["code"] == "queue_full" for x in refused)
        assert client.post("/v1/completions", json={**PROMPT, "max_tokens": 2}).status_code == 200


def test_time_runs_out(runtime: Slowed) -> None:
    with running(runtime, timeout=0.5) as client:
        runtime.delay = 0.05
        response = client.post("/v1/completions", json=LONG)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert streamed.status_code == 200 and '"code": "timeout"' in lines[-2] and lines[-1] == "data: [DONE]"
        wait_for(lambda: client.get("/health").json()["running"] == 0, 2)
        runtime.delay = 1.0
        assert client.post("/v1/completions", json={**LONG, "stream": True}).status_code == 504
        runtime.delay = 0.0
        wait_for(lambda: client.get("/health").json()["running"] == 0, 3)
        assert client.post("/v1/completions", json={**PROMPT, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(runtime: Slowed, stream: bool) -> None:
    with running(runtime) as client:
        runtime.delay, before = 0.02, runtime.made
        if stream:
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=LONG, timeout=0.3)
        wait_for(lambda: client.get("/health").json()["running"] == 0, 3)
        assert 0 < runtime.made - before < 200


def test_one_that_leaves_the_queue_gives_up_its_place(runtime: Slowed) -> None:
    with running(runtime, queue=1) as client, ThreadPoolExecutor(1) as pool:
        runtime.delay = 0.02
        first = pool.submit(client.post, "/v1/completions", json={**PROMPT, "max_tokens": 100})
        wait_for(lambda: client.get("/health").json()["running"] == 1)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG, timeout=0.3)
        wait_for(lambda: client.get("/health").json() == {"status": "ok", "running": 1, "waiting": 0}, 2)
        assert first.result().json()["usage"]["completion_tokens"] == 100


def test_what_waits_as_the_server_ends_is_told_so(runtime: Slowed) -> None:
    with httpx.Client(timeout=30, trust_env=False) as other, ThreadPoolExecutor(3) as pool:
        with running(runtime) as client:
            runtime.delay, url = 0.05, f"{client.base_url}/v1/chat/completions"
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 300}
            asked = [pool.submit(other.post, url, json=body) for _ in range(3)]
            wait_for(lambda: client.get("/health").json() == {"status": "ok", "running": 1, "waiting": 2})
            started = time.monotonic()
        assert [x.result().status_code for x in asked] == [503] * 3
        assert time.monotonic() - started < 5


def test_a_failing_model_is_an_answer_and_not_the_end(runtime: Slowed, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(runtime) as client:
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "_logits", lambda *given: 1 / 0)
            response = client.post("/v1/completions", json=PROMPT)
            assert response.status_code == 500 and "ZeroDivisionError" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json={**PROMPT, "max_tokens": 2}).status_code == 200


def test_a_body_that_never_comes(runtime: Slowed) -> None:
    with running(runtime, timeout=0.3) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=10) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = raw.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408")
