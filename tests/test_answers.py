"""A black box as a teacher: its answers as examples and as rows of a cache; the whole way against a server of our own."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from compresslab import models
from compresslab.answers import Answered, answered
from compresslab.distill.teacher_cache import SPAN
from compresslab.distilling import distill
from compresslab.endpoint import Answer, Asking, Endpoint, Token
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.recipe import Recipe, parse
from compresslab.report.schema import read_report
from compresslab.students import Shape
from compresslab.training import IGNORED_LABEL
from stub_server import serving


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("student"))


class Said(Asking):
    """An endpoint whose answers are given."""

    def __init__(self, folder: Path, answers: dict[str, Answer], **settings: Any) -> None:
        super().__init__(
            Endpoint(**{"url": "http://nowhere/v1", "model": "box", "kind": "completions", **settings}), folder
        )
        self.answers = answers

    def all(self, questions: Any, on_answer: Any = None) -> list[Answer]:
        return [self.answers[question] for question in questions]


WORDS = tiny.words()


def token_ids(text: str) -> list[int]:
    return [len(tiny.SPECIAL) + WORDS.index(word) for word in text.split()]


def test_rows_are_what_the_teacher_might_have_said(student: Path, tmp_path: Path) -> None:
    """Tokens of whole words; the teacher's has its space with it in the second place, so that only the first fits."""
    a, b, c, d = WORDS[:4]
    tokens = (
        Token(text=b, log_prob=math.log(0.5), top=((b, math.log(0.5)), (c, math.log(0.3)), ("nobody", math.log(0.1)))),
        Token(text=" ", log_prob=-0.1),
        Token(text=d, log_prob=math.log(0.2), top=((c, math.log(0.7)),)),
    )
    plain = Answer(text=f"{c} {d}", finish="length")
    said = {a: Answer(text=f"{b} {d}", finish="stop", tokens=tokens), b: plain, c: plain, d: plain}
    found = answered(
        Said(tmp_path / "asked", said, top=3), [a, b, c, d], models.find(student), out=tmp_path / "cache", longest=16
    )
    first, second = found.labelled.train[0], found.labelled.train[1]
    end = 2
    assert first["input_ids"].tolist() == [*token_ids(f"{a} {b} {d}"), end]
    assert first["labels"].tolist() == [IGNORED_LABEL, *token_ids(f"{b} {d}"), end]
    assert second["input_ids"].tolist() == token_ids(f"{b} {c} {d}")  # cut, so that nothing says it ended there
    rows = found.cache.rows([(first["input_ids"], first["labels"][1:] != IGNORED_LABEL)])
    known = [
        {i: p for i, p in zip(ids, ps, strict=True) if p > -SPAN}
        for ids, ps in zip(rows.ids.tolist(), rows.log_probs.tolist(), strict=True)
    ]
    number = {word: token_ids(word)[0] for word in (b, c, d)}
    assert known[0] == pytest.approx({number[b]: math.log(0.5), number[c]: math.log(0.3)}, abs=0.03)
    assert known[1] == pytest.approx({number[d]: math.log(0.2), number[c]: math.log(0.7)}, abs=0.03)
    assert known[2] == {end: 0.0}
    assert all(len(set(ids)) == 4 for ids in rows.ids.tolist())
    assert (found.told["rows_with_log_probabilities"], found.told["rows_of_one_token"]) == (2, 7)


def test_pieces_that_lie_elsewhere_give_the_token_alone(student: Path, tmp_path: Path) -> None:
    a, b = WORDS[:2]
    halves = (Token(text=b[:1], log_prob=-0.1, top=((a, -3.0),)), Token(text=b[1:], log_prob=-0.1, top=((a, -3.0),)))
    other = (Token(text=a, log_prob=-0.1, top=((b, -3.0),)),)  # not what the answer says
    said = {w: Answer(text=b, finish="length", tokens=halves if i % 2 else other) for i, w in enumerate(WORDS[:4])}
    found = answered(
        Said(tmp_path / "asked", said, top=1), WORDS[:4], models.find(student), out=tmp_path / "cache", longest=16
    )
    assert (found.told["rows_with_log_probabilities"], found.told["rows_of_one_token"]) == (0, 4)


def test_answers_without_use_are_left_out_and_too_few_are_said(student: Path, tmp_path: Path) -> None:
    source = models.find(student)
    empty, good = Answer(text=" ", finish="stop"), Answer(text=WORDS[5], finish="stop")
    few = dict.fromkeys(WORDS[:8], empty) | {WORDS[0]: good}
    with pytest.raises(CompressLabError, match="gave 1 answers with anything in them to 8 questions"):
        answered(Said(tmp_path / "a", few), WORDS[:8], source, out=tmp_path / "b", longest=16)
    long = {" ".join(WORDS[i : i + 20]): good for i in range(5)}
    with pytest.raises(CompressLabError, match="0 answers begin within 16 tokens"):
        answered(Said(tmp_path / "a", long), list(long), source, out=tmp_path / "b", longest=16)
    short = answered(Said(tmp_path / "a", long), list(long), source, out=tmp_path / "b", longest=21)
    assert all(len(example["input_ids"]) == 21 for example in short.labelled.train)


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Our own server over a tiny model, on a free port."""
    pytest.importorskip("uvicorn")
    from compresslab.serving.api import Limits, Service
    from compresslab.serving.opening import open_runtime
    from compresslab.serving.server import make_server

    folder = tiny.save("llama", tmp_path / "teacher", seed=5)
    service = Service(open_runtime(folder, "torch"), "box", Limits())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = make_server(service)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            running.should_exit = True
            thread.join()
            service.worker.stop()


def recipe_of(temperature: float = 1.0) -> Recipe:
    steps = [{"method": "soft-labels", "temperature": temperature}]
    more = {"steps": 24, "learning_rate": 3e-3, "batch": 4, "held_back": 0.2, "checks": 3}
    return parse({"name": "tiny", "version": 1, "steps": steps, "training": more}, "tiny")


def ask(url: str, student: Path, folder: Path, name: str = "cache") -> Answered:
    endpoint = Endpoint(url=url, model="box", kind="completions", max_tokens=6, at_once=2)
    questions = [" ".join(WORDS[i : i + 3]) for i in range(20)]
    return answered(Asking(endpoint, folder / "asked"), questions, models.find(student), out=folder / name, longest=16)


def test_a_student_learns_what_a_server_says(
    served: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    box = ask(served, student, tmp_path)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    example = box.labelled.train[0]
    counted = int((example["labels"] != IGNORED_LABEL).sum())
    prompt = example["input_ids"][:-counted]
    wanted = teacher.generate(prompt[None], max_new_tokens=6, do_sample=False)[0]
    assert example["input_ids"][: len(wanted)].tolist() == wanted.tolist()
    artifact, report = distill(box, student, recipe_of(), None, out=tmp_path / "out", measure=False)
    data: Any = report.data
    assert data["asked"]["asked"] == 20 and data["asked"]["answer_tokens"] > 40
    assert "box at http" in report.title
    nats = []  # on what it was taught: answers of random weights have nothing in common with other answers
    for folder in (student, artifact.folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found = [model(**{k: v[None] for k, v in one.items()}).loss for one in box.labelled.train]
        nats.append(float(torch.stack(found).mean()))
    assert nats[1] < 0.9 * nats[0]
    again = ask(served, student, tmp_path, "again")
    assert again.told["from_cache"] == 20 and again.told["asked"] == 0
    assert (tmp_path / "again" / "rows.bin").read_bytes() == (tmp_path / "cache" / "rows.bin").read_bytes()


def test_the_command(
    served: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": " ".join(WORDS[i : i + 3])}) + "\n" for i in range(6)))
    command = ("distill-answers", served, "box", student, "--questions", questions, "--kind", "completions", "--max-tokens", 4,
               "--out", tmp_path / "out", "--set", "training.steps=2", "--price-out", 1e6)  # fmt: skip
    code, said, complaint = tiny.run_cli(monkeypatch, capsys, *command)
    assert code == 0, complaint
    assert "6 answers asked for, 0 kept from before" in said and "cost 2" in said
    code, said, complaint = tiny.run_cli(monkeypatch, capsys, *command, "--force")
    assert code == 0 and "0 answers asked for, 6 kept from before" in said and "cost 0.0000" in said, complaint
    questions.write_text("no json\n")
    code, _, complaint = tiny.run_cli(monkeypatch, capsys, *command, "--force")
    assert code == 2 and "line 1" in complaint and "is no JSON with a 'prompt'" in complaint


def spoken(nats: float, given: int) -> Any:
    """A teacher that answers every question with the same three words; it thinks of each with so many nats and of others with
    one more each, of `given` in all. Spaces are tokens of their own, as its words are to the student."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        words, content = WORDS[20:23], []
        for word in (token for own in words for token in (" ", own)):
            others = [WORDS[(WORDS.index(word) + i) % len(WORDS)] if word in WORDS else word for i in range(given)]
            top = [{"token": other, "logprob": -nats - i} for i, other in enumerate(others)]
            content.append({"token": word, "logprob": -nats, "top_logprobs": top[: body.get("top_logprobs", 0)]})
        said = {"role": "assistant", "content": "".join(token["token"] for token in content[1:])}
        logs = {"content": content[1:]} if "top_logprobs" in body else None
        return {
            "choices": [{"index": 0, "message": said, "logprobs": logs, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(words), "completion_tokens": len(content)},
        }

    return answer


@pytest.mark.parametrize(
    ("nats", "given", "top", "told", "doubted"),
    [
        (0.5, 5, 3, "teacher 0.500", ()),
        (
            0.3,
            2,
            3,
            "teacher 0.3",
            ("of fewer tokens than the 3 that were asked for in 60 of 60 places, of 2 at least",),
        ),
        (9.0, 5, 3, "teacher 9.0", ("was its head ever trained?", "is worse than the student")),
        (0.5, 5, 0, "not known of the teacher, which gave no log-probabilities", ()),
    ],
    ids=["all", "fewer", "worse", "none"],
)
def test_the_command_learns_from_log_probabilities_that_a_server_gives(
    nats: float, given: int, top: int, told: str, doubted: tuple[str, ...], student: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(" ".join(WORDS[i : i + 3]) + "\n" for i in range(12)), encoding="utf-8")
    with serving() as server:
        server.answer = spoken(nats, given)
        code, said, complaint = tiny.run_cli(
            monkeypatch, capsys, "distill-answers", server.url, "box", student, "--questions", questions, "--top", top,
            "--out", tmp_path / "out", "--set", "training.steps=40", "--set", "training.learning_rate=0.003",
        )  # fmt: skip
    assert code == 0, complaint
    assert {body.get("top_logprobs", 0) for body in server.asked} == {top}
    rows = 12 * 4  # three words and an end, of which nobody says how likely it was
    soft = 12 * 3 if top else 0
    assert f"log-probabilities in {soft} of {rows} rows" in " ".join(said.split())
    complaint = " ".join(complaint.split())
    assert ("warning:" in complaint) == bool(doubted) and all(words in complaint for words in doubted)
    report = read_report(tmp_path / "out")
    assert report.data is not None and told in report.data["training"]["nats_of_labels"]
    if not doubted:
        tokenizer, network = transformers.AutoTokenizer.from_pretrained(student), models.load(tmp_path / "out")
        asked = [*tokenizer(" ".join(WORDS[:3]) + "\n")["input_ids"], *token_ids(WORDS[20])]
        with torch.no_grad():
            likely = (
                network(input_ids=torch.tensor([asked])).logits[0, -1].softmax(0)[token_ids(" ".join(WORDS[21:23]))]
            )
        assert likely.tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.5)] if top else [1.0, 0.0], abs=0.15)


def test_what_a_black_box_cannot_give_is_said(served: str, student: Path, tmp_path: Path) -> None:
    box = ask(served, student, tmp_path)
    with pytest.raises(CompressLabError, match="has no blocks to build a student from"):
        distill(box, Shape(layers=1), recipe_of(), None, out=tmp_path / "out", measure=False)
    with pytest.raises(CompressLabError, match="temperature 1"):
        distill(box, student, recipe_of(temperature=2.0), None, out=tmp_path / "out", measure=False)
    with pytest.raises(CompressLabError, match="looks inside the teacher"):
        distill(box, student, "distill-hints", None, out=tmp_path / "out", measure=False)
    endpoint = Endpoint(url=served, model="box", kind="completions", top=3, retries=0)
    with pytest.raises(CompressLabError, match="refuses with status 400 .*logprobs"):
        Asking(endpoint, tmp_path / "top").all(["a"])
