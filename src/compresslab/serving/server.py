"""`compresslab serve`: a folder's model behind OpenAI's API on an address of this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compresslab.errors import CompressLabError
from compresslab.serving.opening import open_runtime, reason

if TYPE_CHECKING:
    import uvicorn

    from compresslab.serving.api import Service

GRACE = 10  # seconds from Ctrl-C until connections that still send or read are cut


def serve(
    folder: Path, *, runtime: str = "auto", host: str = "127.0.0.1", port: int = 8000, max_tokens: int = 1024,
    queue: int = 16, timeout: float = 300, body: int = 1_000_000, say: Callable[[str], object],
) -> None:  # fmt: skip
    """Serve until a signal comes.

    Args:
        port: 0 takes a free one; `say` is told which.

    Raises:
        CompressLabError: if the address is taken, or nothing in the folder opens.
    """
    _require()
    from compresslab.serving.api import Limits, Service

    with bound(host, port) as listening:
        opened = open_runtime(folder, runtime)
        limits = Limits(max_tokens=max_tokens, queue=queue, timeout=timeout, body=body)
        service = Service(opened, folder.resolve().name, limits)
        shown = f"[{host}]" if ":" in host else host
        say(f"{service.name} on {opened.name}, {opened.context_length} tokens of context: "
            f"http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C ends)")  # fmt: skip
        say(f"{opened.name}: {reason(folder, opened.name)}")
        if not is_loopback(host):
            say(f"warning: {host} can be reached from other machines, and there is no password")
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once all is closed
                make_server(service).run(sockets=[listening])
        finally:
            service.worker.stop()
        say("stopped")


@contextlib.contextmanager
def served(
    folder: Path, *, runtime: str = "auto", max_tokens: int = 1024, timeout: float = 300
) -> Iterator[tuple[str, str]]:
    """A folder's model behind the API on a free port of this machine alone, for as long as the context lasts.

    Returns:
        The url, and what the model is called there.

    Raises:
        CompressLabError: if nothing in the folder opens, or the server does not start.
    """
    _require()
    from compresslab.serving.api import Limits, Service

    with bound("127.0.0.1", 0) as listening:
        service = Service(
            open_runtime(folder, runtime), folder.resolve().name, Limits(max_tokens=max_tokens, timeout=timeout)
        )
        server = make_server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise CompressLabError("the server of this machine did not start: try `compresslab serve`")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", service.name
        finally:
            server.should_exit = True
            thread.join()
            service.worker.stop()


def _require() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompressLabError(f"{' and '.join(missing)} not installed: pip install 'compresslab[serve]'")


def make_server(service: Service) -> uvicorn.Server:
    """A server whose end is told to the worker first, so that whoever waits gets an answer."""
    import uvicorn

    from compresslab.serving.api import make_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            service.worker.stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(make_app(service), log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE)
    return Server(config)


def bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise CompressLabError(f"cannot listen on {host}, port {port} ({error}): choose another --port") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
