"""Text as it comes, the choice of a token, each runtime, and the conversation in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import CONTEXT, save_model

import compresslab
import tiny
from compresslab import models
from compresslab.deploy import torch_packed
from compresslab.errors import CompressLabError
from compresslab.serving import chat as terminal
from compresslab.serving import opening
from compresslab.serving.generation import StopStrings, TextStream, generate
from compresslab.serving.runtime import Runtime, Sampling
from compresslab.serving.sampling import choose
from compresslab.serving.torch_runtime import TorchRuntime

GREEDY = Sampling(max_tokens=30, temperature=0)


def text_of(runtime: Runtime, ids: Sequence[int], sampling: Sampling = GREEDY) -> str:
    return "".join(piece.text for piece in generate(runtime, ids, sampling))


def greedy(folder: Path, ids: Sequence[int], count: int = 30) -> list[int]:
    """The new tokens of transformers' generate, without the end token."""
    model: Any = models.load(folder)
    made = model.generate(torch.tensor([list(ids)]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()
    return made[: made.index(2)] if 2 in made else made


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> TorchRuntime:
    return TorchRuntime(artifact, packed=False)


# --- text ----------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_come_whole() -> None:
    content = "aé你🙂b".encode()
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    pieces = [stream.push(byte) for byte in content]
    assert pieces == ["a", "", "é", "", "", "你", "", "", "", "🙂", "b"] and stream.rest() == ""
    for byte in "c🙂".encode()[:-1]:
        stream.push(byte)
    assert stream.rest() == ""  # "c" was shown, and the rest is no character
    tails = TextStream(lambda ids: b"".join([b"x\xf0", b"\x9f"][i] for i in ids).decode("utf-8", errors="replace"))
    assert tails.push(0) == tails.push(1) == "" and tails.rest() == "x"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("stops", [["STOP"], ["OPQ", "STOX", "OP"], ["zzz"], ["S"], ["never", "aS"]])
def test_stop_strings_are_met_wherever_the_text_is_cut(stops: list[str], size: int) -> None:
    text = "aSTSTOSTOPbbz"
    ends = [at for at in map(text.find, stops) if at >= 0]
    found = StopStrings(stops)
    shown = ""
    for i in range(0, len(text), size):
        new, met = found.push(text[i : i + size])
        shown += new
        if met:
            break
    else:
        met, shown = False, shown + found.rest()
    assert met == bool(ends) and shown == (text[: min(ends)] if ends else text)


# --- the choice of a token -----------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: float) -> torch.Tensor:
        sampling = Sampling(max_tokens=1, **settings)
        drawn = [choose(probabilities.log(), sampling, generator) for _ in range(3000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 3000

    assert torch.allclose(shares(), probabilities, atol=0.04)
    assert torch.allclose(shares(top_p=0.7), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.04)
    squared = probabilities**2 / (probabilities**2).sum()
    assert torch.allclose(shares(temperature=0.5), squared, atol=0.04)
    assert shares(top_p=0.0)[1] == 1 and shares(temperature=0.0)[1] == 1 and shares(temperature=1e-40)[1] == 1


# --- runtimes ------------------------------------------------------------------------------------------------------


def test_torch_makes_what_generate_makes_and_reads_each_token_once(
    runtime: TorchRuntime, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, read = runtime.encode("hello"), []
    whole = runtime._logits
    monkeypatch.setattr(runtime, "_logits", lambda new, cache: (read.append(len(new)), whole(new, cache))[1])
    assert list(runtime.stream(ids, GREEDY)) == greedy(artifact, ids)
    assert read[0] == 5 and set(read[1:]) == {1}


def test_packed_kernels_are_chosen_where_there_are_fast_ones(
    runtime: TorchRuntime, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch_packed.is_fast_here():
        opened = opening.open_runtime(artifact)
        assert opened.name == "packed" and text_of(opened, opened.encode("hello"))
        assert "--runtime packed" in opening.reason(artifact, "torch")
    assert "stay packed" in opening.reason(artifact, "packed") and "--to onnx-genai" in opening.reason(
        artifact, "packed"
    )
    assert "in float" in opening.reason(artifact.parent / "model", "torch")
    monkeypatch.setattr(torch_packed, "is_fast_here", lambda: False)
    assert opening.pick(artifact) == "torch"
    assert "no layer has a packed kernel" in opening.reason(artifact, "torch")
    with pytest.raises(CompressLabError, match="--runtime torch"):
        opening.open_runtime(artifact, "packed")


def test_a_rounded_cache_is_used_where_the_recipe_asks_for_one(tmp_path: Path) -> None:
    from compresslab import pipeline
    from compresslab.recipe import parse

    save_model(tmp_path / "model")
    steps = [{"method": "kv-cache", "format": "int4"}, {"method": "rtn", "bits": 8, "group_size": 16}]
    made = parse({"name": "tiny", "version": 1, "steps": steps, "ignore": ["@outside-blocks"]}, "tiny")
    with tiny.quick():
        artifact, _ = pipeline.compress(tmp_path / "model", made, None, out=tmp_path / "artifact", measure=False)
    model: Any = artifact.load()
    opened = opening.open_runtime(tmp_path / "artifact", "torch")
    ids = opened.encode("hello there")
    cache = artifact.cache(model)
    said = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, past_key_values=cache)
    said = said[0, len(ids) :].tolist()
    assert list(opened.stream(ids, GREEDY)) == (said[: said.index(2)] if 2 in said else said)
    assert said != model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()


def test_llama_cpp_says_what_torch_says(runtime: TorchRuntime, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    done = compresslab.export(artifact, "gguf", out=tmp_path / "gguf")
    opened = opening.open_runtime(done.folder)
    assert opened.name == "llama.cpp" and opened.context_length == CONTEXT
    messages = [{"role": "user", "content": "héllo"}]
    ids = opened.encode(messages)
    assert ids == runtime.encode(messages) and opened.encode("hello 你") == runtime.encode("hello 你")
    assert opened.decode(ids) == runtime.decode(ids)
    found, wanted = list(opened.stream(ids, GREEDY)), list(runtime.stream(ids, GREEDY))
    assert found[:8] == wanted[:8] and len(wanted) >= 8  # later on, last bits may turn a near tie
    drawn = [text_of(opened, ids, Sampling(max_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for either in (opened, runtime):
        with pytest.raises(CompressLabError, match="none of that"):
            either.encode([{"role": "user", "content": "no!"}])


def test_onnxruntime_genai_says_what_it_says_by_itself(runtime: TorchRuntime, artifact: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("onnxruntime_genai")
    done = compresslab.export(artifact, "onnx-genai", out=tmp_path / "out")
    opened = opening.open_runtime(done.folder)
    ids = opened.encode("hello")
    assert opened.name == "onnx-genai" and ids == runtime.encode("hello")
    params = library.GeneratorParams(opened.model)
    params.set_search_options(max_length=len(ids) + 20, do_sample=False)
    generator = library.Generator(opened.model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    said = list(map(int, generator.get_sequence(0)))[len(ids) :]
    wanted = said[: said.index(2)] if 2 in said else said
    assert list(opened.stream(ids, replace(GREEDY, max_tokens=20))) == wanted and wanted
    drawn = [text_of(opened, ids, Sampling(max_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_opened_is_said(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, name, said in (
        (tmp_path / "empty", "auto", "nothing in"),
        (tmp_path / "nowhere", "auto", "no folder"),
        (artifact, "vllm", "unknown runtime"),
        (artifact, "llama.cpp", "a .gguf file"),
        (tiny.save("bert", tmp_path / "bert"), "auto", "generates no text"),
    ):
        with pytest.raises(CompressLabError, match=said):
            opening.open_runtime(folder, name)


def test_a_model_without_a_template_reads_plain_text(runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert runtime.decode(runtime.encode(messages)) == "user:hiassistant:hoassistant:"  # <s> is not shown
    monkeypatch.setattr(runtime.tokenizer, "chat_template", None)
    assert runtime.decode(runtime.encode(messages)) == "hi\nho\n"


# --- the terminal --------------------------------------------------------------------------------------------------


def talk(runtime: Runtime, *lines: str, **settings: Any) -> tuple[str, str, terminal.Chat]:
    out, notes = io.StringIO(), io.StringIO()
    made = terminal.Chat(runtime, Sampling(**{"max_tokens": 20, "temperature": 0.0, **settings}), out, notes)
    for line in lines:
        if not made.take(line):
            break
    return out.getvalue(), notes.getvalue(), made


def test_a_conversation_is_remembered_until_reset(runtime: TorchRuntime) -> None:
    first, _, made = talk(runtime, "hello\n")
    assert (
        first
        == text_of(runtime, runtime.encode([{"role": "user", "content": "hello"}]), replace(GREEDY, max_tokens=20))
        + "\n"
    )
    assert [turn["role"] for turn in made.history] == ["user", "assistant"]
    assert first[:-1] == made.history[1]["content"]
    both, notes, _ = talk(runtime, "hello\n", "/reset", "", "hello\n", "/exit", "hello")
    assert both == first * 2 and "forgotten" in notes
    assert talk(runtime, "hello", "hello")[0] != first * 2  # the second answer has read the first turn
    assert "no command /quit" in talk(runtime, "/quit")[1] and "/reset" in talk(runtime, "/help")[1]


def test_the_oldest_turns_go_when_the_context_is_full(runtime: TorchRuntime) -> None:
    _, notes, made = talk(runtime, *["x" * 90] * 6)
    assert "dropped: the context is 400 tokens" in notes and made.history[0]["role"] == "user"
    assert len(runtime.encode(made.history[:-1])) <= 300 and len(made.history) >= 4
    _, notes, made = talk(runtime, "y" * 301, "short")
    assert "318 tokens" in notes and "at most 300" in notes and len(made.history) == 2


def test_the_chat_command_reads_a_pipe(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runtime: TorchRuntime
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    settings = ("--runtime", "torch", "--temperature", 0, "--max-tokens", 20)
    code, out, _ = tiny.run_cli(monkeypatch, capsys, "chat", artifact, *settings)
    assert code == 0 and out == talk(runtime, "hello")[0]


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(
    runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["hello"]

    def typed(prompt: str) -> str:
        if lines:
            return lines.pop()
        raise KeyboardInterrupt

    def interrupted(ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        yield from runtime.encode("abc")
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(runtime, "stream", interrupted)
    monkeypatch.setattr(terminal, "open_runtime", lambda *given: runtime)
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    terminal.chat(Path("here"), sampling=GREEDY)
    said = capsys.readouterr()
    assert said.out == "abc\n" and " (stopped)" in said.err and "/reset" in said.err
