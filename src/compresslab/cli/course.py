"""`compresslab lab ...`: what to do next, the grader, hints, the measurement, progress."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from compresslab.cli.console import Json, app, error_console, out_console

lab_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The course: labs to fill in, run and compare.")
app.add_typer(lab_app, name="lab")

Number = Annotated[str, typer.Argument(help="The lab's number; see `compresslab lab list`.")]
Folder = Annotated[Path | None, typer.Argument(help="Your folder; the one you started if left out.")]
Lang = Annotated[str | None, typer.Option(help="en or zh-TW; what the terminal speaks if left out.")]
Learner = Annotated[str | None, typer.Option(help="Whose progress; you, if left out.")]


def _say(text: str) -> None:
    out_console.print(text, highlight=False, markup=False, soft_wrap=True)


def _show(lines: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for head in lines[0]:
        table.add_column(head, overflow="fold")  # Chinese has no spaces to break a line at; nothing may be cut off
    for line in lines[1:]:
        table.add_row(*line)
    out_console.print(table)


@lab_app.command("list")
def list_labs(lang: Lang = None, learner: Learner = None, as_json: Json = False) -> None:
    """The labs that are there, and how far you are."""
    from compresslab.course import catalogue

    _labs(list(catalogue.labs().values()), lang, learner, as_json)


@lab_app.command()
def progress(lang: Lang = None, learner: Learner = None, as_json: Json = False) -> None:
    """How far you are with what you started."""
    from compresslab.course import catalogue
    from compresslab.course.learner import Progress

    started = Progress(learner).steps
    _labs([lab for number, lab in catalogue.labs().items() if number in started], lang, learner, as_json)


@lab_app.command()
def path(
    name: Annotated[str, typer.Argument(help="beginner, advanced or research.")], lang: Lang = None,
    learner: Learner = None, as_json: Json = False,
) -> None:  # fmt: skip
    """A learning path, week by week: what to read, which labs, and how far you are."""
    from compresslab.course import catalogue, words
    from compresslab.course import theory as shelf

    stretches, known, lang = catalogue.path(name), catalogue.labs(), words.language(lang)
    if as_json:
        rows = [
            {"weeks": stretch.weeks, "chapters": stretch.chapters, "project": stretch.project}
            | {"labs": _rows([known[number] for number in stretch.labs], lang, learner)}
            for stretch in stretches
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))  # noqa: T201
        return
    for stretch in stretches:
        _say(words.say("weeks", lang, weeks=stretch.weeks))
        for number in stretch.chapters:
            _say(words.say("read-chapter", lang, number=number, title=shelf.title(number)))
        if stretch.labs:
            _labs([known[number] for number in stretch.labs], lang, learner, as_json=False)
        if stretch.project:
            _say(words.say(stretch.project, lang))
        _say("")


@lab_app.command()
def theory(
    number: Annotated[
        str | None, typer.Argument(help="The chapter's number, such as 3.1; all are listed if left out.")
    ] = None,
    lang: Lang = None,
) -> None:
    """A chapter of the theory, with its formulas, in the terminal."""
    from rich.markdown import Markdown

    from compresslab.course import theory as shelf
    from compresslab.course import words

    if number is None:
        for known in shelf.chapters():
            _say(f"{known}  {shelf.title(known)}")
    else:
        out_console.print(Markdown(shelf.read(number, words.language(lang)), code_theme="default"))


def _rows(found: list[Any], lang: str, learner: str | None) -> list[dict[str, Any]]:
    """Labs, and how far the learner is with each."""
    from compresslab.course import words
    from compresslab.course.learner import Progress

    steps = Progress(learner)
    return [
        {
            "number": lab.number, "title": lab.say("title", lang), "question": lab.say("question", lang),
            "state": words.say(steps.of(lab).state, lang), "attempts": steps.of(lab).attempts,
            "hints": steps.of(lab).hints, "looked": steps.of(lab).looked,
        }
        for lab in found
    ]  # fmt: skip


def _labs(found: list[Any], lang: str | None, learner: str | None, as_json: bool) -> None:
    from compresslab.course import words

    lang = words.language(lang)
    rows = _rows(found, lang, learner)
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))  # noqa: T201
        return
    looked = words.say("looked", lang)
    _show(
        [["", "", "", ""]]
        + [[r["number"], r["title"], r["state"] + (f", {looked}" if r["looked"] else ""), r["question"]] for r in rows]
    )


@lab_app.command()
def start(number: Number, folder: Folder = None, lang: Lang = None, learner: Learner = None) -> None:
    """A folder of your own to work in: the exercise, the text, and a sheet for what you expect."""
    from compresslab.course import catalogue, words
    from compresslab.course import learner as learners

    lab, lang, steps = catalogue.lab(number), words.language(lang), learners.Progress(learner)
    folder = folder or Path(f"lab-{number}")
    learners.start(lab, folder, steps, lang)
    _say(f"{lab.number} {lab.say('title', lang)}\n\n{lab.say('question', lang)}\n\n{lab.say('task', lang)}\n")
    _say(words.say("next-fill", lang, folder=folder, number=number))


@lab_app.command()
def check(number: Number, folder: Folder = None, lang: Lang = None, learner: Learner = None) -> None:
    """Grade your exercise, in a process of its own. Exit code 1 if something is wrong."""
    from compresslab.course import catalogue, grading, words
    from compresslab.course.learner import Progress

    lab, lang, steps = catalogue.lab(number), words.language(lang), Progress(learner)
    where = steps.folder(lab, folder)
    verdict = grading.grade(lab, where / "exercise.py")
    step = steps.of(lab)
    step.attempts += 1
    step.passed = step.passed or verdict.symptom is None
    step.folder = str(where.absolute())
    steps.save()
    _say(grading.explain(lab, verdict, lang))
    if verdict.symptom is None:
        _say(words.say("next-run", lang, folder=where, number=number))
        return
    _say("\n" + words.say("next-hint", lang, number=number))
    raise typer.Exit(1)


@lab_app.command()
def hint(number: Number, lang: Lang = None, learner: Learner = None) -> None:
    """The next hint, from a nudge to nearly the answer."""
    from compresslab.course import catalogue, words
    from compresslab.course.learner import Progress

    lab, lang, steps = catalogue.lab(number), words.language(lang), Progress(learner)
    step = steps.of(lab)
    step.hints = min(step.hints + 1, lab.hints)
    steps.save()
    _say(f"{words.say('hint', lang, step=step.hints, steps=lab.hints)}: {lab.say(f'hint-{step.hints}', lang)}")
    if step.hints == lab.hints:
        _say(words.say("no-more-hints", lang, number=number))


@lab_app.command()
def solve(number: Number, folder: Folder = None, lang: Lang = None, learner: Learner = None) -> None:
    """What leads from your file to the solution; your file stays as it is."""
    from compresslab.course import catalogue, words
    from compresslab.course.learner import Progress

    lab, lang, steps = catalogue.lab(number), words.language(lang), Progress(learner)
    yours = steps.folder(lab, folder) / "exercise.py"
    step = steps.of(lab)
    step.looked = step.looked or not step.passed
    steps.save()
    mine, theirs = (p.read_text(encoding="utf-8").splitlines() for p in (yours, lab.folder / "solution.py"))
    _say(words.say("solution", lang))
    _say("\n".join(difflib.unified_diff(mine, theirs, "exercise.py", "solution.py", lineterm="")))
    _say("\n" + lab.say("why", lang))
    _say(f"\n{lab.answer}.{lab.function}")


@lab_app.command()
def run(
    number: Number,
    folder: Folder = None,
    scale: Annotated[str, typer.Option(help="micro (offline, minutes), real (a pre-trained model), paper.")] = "micro",
    seeds: Annotated[int | None, typer.Option(help="How many; the lab's own number if left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the lab's.")] = None,
    pictures: Annotated[str | None, typer.Option(help="Labelled pictures, if the lab reads some: a folder or .parquet.")] = None,
    small_pictures: Annotated[
        str | None, typer.Option(help="Small ones in ten classes, such as CIFAR-10's, if the lab learns some beside.")
    ] = None,
    parts: Annotated[str | None, typer.Option(help="Only these parts of the lab, with commas between them.")] = None,
    into: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="An earlier result file, to which the rows are added.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Ask the lab's other frameworks too; see `compresslab peers`.")] = False,
    out: Annotated[Path | None, typer.Option(help="The result file; in your folder if left out.")] = None,
    prediction: Annotated[bool, typer.Option(help="Ask for your prediction first.")] = True,
    lang: Lang = None, learner: Learner = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure, and hold what came out against what you and the paper said."""
    import dataclasses

    from compresslab.course import catalogue, experiment, showing, words
    from compresslab.course import learner as learners

    lab, lang, steps = catalogue.lab(number), words.language(lang), learners.Progress(learner)
    said = None
    if prediction:
        where = steps.folder(lab, folder)
        said = learners.predictions(lab, where, scale)
        out = out or into or where / f"result-{scale}.json"
    result = experiment.run(
        number,
        scale=scale,
        seeds=seeds,
        model=model,
        pictures=pictures,
        small_pictures=small_pictures,
        parts=None if parts is None else parts.split(","),
        into=None if into is None else experiment.read(into),
        peers=peers,
        say=lambda what: error_console.print(what, highlight=False),
    )
    if (out := out or into) is not None:
        result.save(out)
    steps.of(lab).ran.append(scale)
    steps.save()
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))  # noqa: T201
        return
    for lines in (
        *showing.tables(result, lang),
        showing.verdicts(result, lang, said),
        showing.papers(result, lang),
        *showing.peers(result, lang),
    ):
        if len(lines) > 1:  # no paper speaks of these rows, no peer was asked
            _show(lines)
            _say("")
    for failure in showing.failures(result, lang):
        _say(failure)
    _say(lab.say("explain", lang))


@lab_app.command()
def notebook(
    number: Number,
    out: Annotated[Path, typer.Option(help="The folder for notebook, page and result.")],
    scale: Annotated[str, typer.Option(help="micro or real.")] = "micro",
    lang: Lang = None,
) -> None:
    """The lab as a notebook, executed and rendered."""
    from compresslab.course import catalogue, words
    from compresslab.course import notebook as notebooks

    _say(f"wrote {notebooks.render(catalogue.lab(number), out, scale=scale, lang=words.language(lang))}")


@lab_app.command()
def verify(
    number: Annotated[str | None, typer.Argument(help="One lab; all if left out.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for notebooks and results.")] = Path("labs-out"),
    jobs: Annotated[int, typer.Option(min=1, help="Labs at a time.")] = 1,
) -> None:
    """Prove the labs: graders, notebooks at micro scale, expectations. Exit code 1 if one does not stand."""
    from compresslab.course import catalogue, verifying

    chosen = [catalogue.lab(number)] if number else list(catalogue.labs().values())
    bad = []
    for lab, faults in zip(chosen, verifying.in_parallel(chosen, out, jobs), strict=True):
        bad += faults
        _say(f"lab {lab.number}: {'; '.join(faults) or 'ok'}")
    if bad:
        raise typer.Exit(1)


@lab_app.command()
def glossary(term: Annotated[str, typer.Argument(help="In English or Chinese; all if left out.")] = "") -> None:
    """Terms in English and in Traditional Chinese."""
    from compresslab.course import words

    _show([["English", "繁體中文"], *([en, zh] for en, zh in words.look_up(term))])
