"""A server of Python's own that speaks OpenAI's API, and can be slow, busy, broken or stingy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """What it is asked, and what it answers: a list of (status, headers, body or text), then always good answers."""

    url: str = ""
    troubles: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], Any] = lambda body: good(body)
    delay: float = 0.0
    under_way: int = 0
    most_under_way: int = 0


def good(body: dict[str, Any]) -> dict[str, Any]:
    """The question's words in upper case, each a token, with as many alternatives as were asked for."""
    chat = "messages" in body
    question = body["messages"][0]["content"] if chat else body["prompt"]
    words = question.upper().split()[: body["max_tokens"]]
    usage = {"prompt_tokens": len(question.split()), "completion_tokens": len(words)}
    top = body.get("top_logprobs") if chat else body.get("logprobs")
    logs: Any = None
    if top and chat:
        tops = {w: [{"token": f"{w}{i}", "logprob": -0.5 - i} for i in range(top)] for w in words}
        logs = {"content": [{"token": w, "logprob": -0.5, "top_logprobs": tops[w]} for w in words]}
    elif top:
        best = [{f"{w}{i}": -0.5 - i for i in range(top)} for w in words]
        logs = {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": best}
    said = {"message": {"role": "assistant", "content": " ".join(words)}} if chat else {"text": " ".join(words)}
    return {"choices": [{"index": 0, **said, "logprobs": logs, "finish_reason": "stop"}], "usage": usage}


@contextmanager
def serving() -> Iterator[Server]:
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
                trouble = state.troubles.pop(0) if state.troubles else None
            time.sleep(state.delay)
            status, headers, content = trouble or (200, {}, state.answer(body))
            sent = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            with lock:
                state.under_way -= 1
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)
            except OSError:  # the one who asked has gone away
                pass

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        state.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        running.shutdown()
        thread.join()
