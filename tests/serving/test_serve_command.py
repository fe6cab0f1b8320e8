"""`compresslab serve` as a user starts and ends it."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from compresslab.serving import server

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
COMMAND = [sys.executable, "-m", "compresslab.cli", "serve"]


def test_it_serves_until_ctrl_c(artifact: Path) -> None:
    command = [*COMMAND, str(artifact), "--port", "0", "--runtime", "torch", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        for said in started.stderr:  # other libraries may have something to say before
            found = re.search(r"artifact on torch, 400 tokens of context: http://0\.0\.0\.0:(\d+)/v1", said)
            if found:
                break
        assert found, said
        assert "torch: weights are multiplied out" in started.stderr.readline()
        assert "warning: 0.0.0.0 can be reached from other machines" in started.stderr.readline()
        url = f"http://127.0.0.1:{found[1]}"
        body = {"model": "artifact", "prompt": "hello", "max_tokens": 3}
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=30, trust_env=False) as client:
            assert client.post(f"{url}/v1/completions", json=body).status_code == 200
            started.send_signal(signal.SIGINT)
            assert started.wait(20) == 0
        assert started.stderr.read() == "stopped\n"  # and no traceback


def test_faults_are_one_line(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, said = tiny.run_cli(monkeypatch, capsys, "serve", artifact, "--port", taken.getsockname()[1])
        assert code == 2 and said.count("\n") == 1 and "choose another --port" in said
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "fastapi" else there(name, *more)
    )
    code, _, said = tiny.run_cli(monkeypatch, capsys, "serve", artifact)
    assert code == 2 and "pip install 'compresslab[serve]'" in said


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("192.168.1.4", False),
        ("box", False),
    ],
)
def test_only_loopback_is_private(host: str, loopback: bool) -> None:
    assert server.is_loopback(host) is loopback
