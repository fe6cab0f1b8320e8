"""Commands that take an artifact to where it runs: export, formats, mobile, chat, serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compresslab.cli.console import Json, app, error_console, out_console, settings_of, table_of


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="An artifact, or the folder or zoo name of a model.")],
    to: Annotated[str, typer.Option(help="The format; see `compresslab formats`.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of this format; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write an artifact in the format of another runtime."""
    import dataclasses

    from compresslab import exporters as exports
    from compresslab.report.render import human

    settings = settings_of(set_ or [], None, None)
    done = exports.export(folder, to, out=out, force=force, options=settings, alone=True)
    if as_json:
        print(json.dumps(dataclasses.asdict(done), default=str, indent=1))  # noqa: T201
        return
    for note in done.notes:
        out_console.print(f"note: {note}", highlight=False)
    size = human(done.disk_bytes, "bytes")
    out_console.print(f"wrote {done.folder} ({to}, {size}, {done.seconds:.1f} s)", highlight=False, soft_wrap=True)


@app.command()
def formats(as_json: Json = False) -> None:
    """The formats that `compresslab export` writes, and what each needs."""
    from compresslab import exporters as exports

    found = {name: exports.exporter(name) for name in exports.FORMATS}
    rows = [
        {"name": name, "extra": e.extra, "summary": e.summary, "options": dict(e.options)} for name, e in found.items()
    ]
    table_of(
        rows, as_json, lambda row: [row["name"], row["extra"], row["summary"], ", ".join(row["options"])],
        ["format", "extra", "what it is for", "--set"],
    )  # fmt: skip


@app.command()
def mobile(
    folder: Annotated[str, typer.Argument(help="An artifact, or the folder or zoo name of a model.")],
    profile: Annotated[
        list[str] | None, typer.Option(help="A device; repeatable. All that are known by default.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a text may have, or a decoder's cache holds.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt, or an encoder's text.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often it is timed here.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="All that may be used by default.")] = None,
    as_json: Json = False,
) -> None:
    """Is a model ready for phones: what XNNPACK runs of it, its size and memory there, and an estimate of its time."""
    from compresslab import mobile

    found = mobile.check(folder, profile or (), length=length, tokens=tokens, turns=rounds, threads=threads)
    if as_json:
        print(found.model_dump_json(indent=1))  # noqa: T201
    else:
        out_console.print(mobile.to_terminal(found))


@app.command()
def chat(
    folder: Annotated[
        Path, typer.Argument(help="An artifact, a model's folder, or a GGUF, onnx-genai or OpenVINO export.")
    ],
    runtime: Annotated[str, typer.Option(help="auto, packed, torch, llama.cpp, onnx-genai or openvino.")] = "auto",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens up to this.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
) -> None:
    """Talk to a model in the terminal; through a pipe, each line is a turn."""
    from compresslab.serving import chat
    from compresslab.serving.runtime import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    chat.chat(folder, runtime=runtime, sampling=sampling)


@app.command()
def serve(
    folder: Annotated[
        Path, typer.Argument(help="An artifact, a model's folder, or a GGUF, onnx-genai or OpenVINO export.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    runtime: Annotated[str, typer.Option(help="auto, packed, torch, llama.cpp, onnx-genai or openvino.")] = "auto",
    max_tokens_limit: Annotated[int, typer.Option(min=1, help="Of one answer, whatever is asked for.")] = 1024,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait while one is answered.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a request, waiting included.")] = 300,
    body_limit: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1_000_000,
) -> None:
    """A model behind OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""
    from compresslab.serving import server

    def say(line: str) -> None:
        error_console.print(line, highlight=False, markup=False, soft_wrap=True)

    server.serve(folder, runtime=runtime, host=host, port=port, max_tokens=max_tokens_limit, queue=queue, timeout=timeout,
                 body=body_limit, say=say)  # fmt: skip
