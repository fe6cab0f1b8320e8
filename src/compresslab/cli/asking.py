"""`compresslab distill-answers`: a student taught by a model behind an API, of which nothing is known but what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compresslab.cli.compressing import announce_fetch, bars
from compresslab.cli.console import Device, Json, Seed, app, out_console, settings_of, warn


@app.command()
def distill_answers(
    url: Annotated[str, typer.Argument(help="Of the API, up to and with its version: https://host/v1.")],
    model: Annotated[str, typer.Argument(help="The teacher, as the server calls it.")],
    student: Annotated[str, typer.Argument(help="A hub id, a folder, or a name from `compresslab models`.")],
    questions: Annotated[Path, typer.Option(help="A text file with a question a line, or .jsonl with 'prompt'.")],
    out: Annotated[Path, typer.Option(help="The folder to make. Answers are kept beside it, in OUT.answers.")],
    kind: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    key: Annotated[
        str, typer.Option(metavar="VARIABLE", help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    top: Annotated[int, typer.Option(help="Tokens in each place to ask log-probabilities of; 0 for none.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 for the most likely answer.")] = 0.0,
    rate: Annotated[float | None, typer.Option(help="Requests a minute.")] = None,
    at_once: Annotated[int, typer.Option(help="Requests under way.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer must be there.")] = 120.0,
    price_in: Annotated[float, typer.Option(help="Of a million tokens of questions.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="Of a million tokens of answers.")] = 0.0,
    most_cost: Annotated[
        float | None, typer.Option(help="What may be spent in all, with what is kept beside OUT.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe whose losses are at temperature 1.")] = "distill-answers",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    longest: Annotated[int, typer.Option(help="Tokens of question and answer together.")] = 512,
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a model behind an API, and teach a student what it says."""
    from compresslab import models
    from compresslab.answers import answered, questions_of
    from compresslab.distilling import distill
    from compresslab.endpoint import Asking, Endpoint
    from compresslab.report import render

    endpoint = Endpoint(
        url=url, model=model, kind=kind, key_variable=key, max_tokens=max_tokens, temperature=temperature, top=top,
        requests_a_minute=rate, at_once=at_once, timeout=timeout, price_in=price_in, price_out=price_out, most_cost=most_cost,
    )  # fmt: skip
    asked = questions_of(questions)
    if not as_json:
        announce_fetch(student)
    beside = out.parent / f"{out.name}.answers"
    with bars(silent=as_json) as progress:
        progress.stage("ask", len(asked))
        box = answered(
            Asking(endpoint, beside), asked, models.find(student), out=beside / "rows", longest=longest, force=True,
            on_answer=lambda: progress.step("an answer"),
        )  # fmt: skip
        artifact, report = distill(
            box, student, recipe, None, out=out, settings=settings_of(set_ or [], None, None), seed=seed, device=device,
            force=force, progress=progress,
        )  # fmt: skip
    warn((report.data or {})["training"]["notice"])
    if as_json:
        print(report.model_dump_json(indent=1))  # noqa: T201
        return
    told = box.told
    out_console.print(
        f"{told['asked']} answers asked for, {told['from_cache']} kept from before; {told['prompt_tokens']} + "
        f"{told['answer_tokens']} tokens, cost {told['cost']:.4f} and {told['paid_before']:.4f} before; {told['repeated']} "
        f"requests repeated; {told['cut']} answers cut, {told['empty']} empty; log-probabilities in "
        f"{told['rows_with_log_probabilities']} of {told['rows_with_log_probabilities'] + told['rows_of_one_token']} rows",
        highlight=False,
    )
    out_console.print(render.to_terminal(report))
    out_console.print(f"\nartifact  {artifact.folder}", highlight=False, soft_wrap=True)
