"""The command line: what it prints, to whom, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tiny
from compresslab import data, pipeline, recipe, zoo
from compresslab.cli.console import out_console
from compresslab.report.schema import Report, read_report

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny.save("llama", root / "llama")
    tiny.write_text(root / "words.txt")
    (root / "tiny.yaml").write_text(tiny.recipe().to_yaml(), encoding="utf-8")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """The command in this process, in an empty folder, without fresh processes."""
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    monkeypatch.chdir(tmp_path)
    with tiny.quick():
        yield lambda *arguments: tiny.run_cli(monkeypatch, capsys, *arguments)


def widest(said: str) -> int:
    """The longest line, but for the two that say where things are: a path is not broken, so that it can be copied."""
    return max(len(line) for line in said.splitlines() if not line.startswith(("artifact  ", "report    ")))


def arguments(saved: Path, *more: object, out: str = "out") -> list[object]:
    return [
        *("compress", saved / "llama", "--recipe", saved / "tiny.yaml", "--data", saved / "words.txt"),
        *("--out", out, "--no-measure", *more),
    ]


# --- lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"), [("models", zoo.MODELS), ("datasets", data.DATASETS), ("recipes", recipe.shipped())]
)
def test_lists(run: Run, command: str, names: dict[str, object]) -> None:
    code, out, err = run(command)
    assert (code, err) == (0, "")
    assert all(name in out for name in names)
    code, out, err = run(command, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(names)
    if command != "recipes":
        assert all(row["licence"] and row["size_bytes"] > 0 and isinstance(row["cached"], bool) for row in rows)


def test_one_recipe(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("recipes", "w8a16")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out, encoding="utf-8")
    assert recipe.read(tmp_path / "shown.yaml") == recipe.read("w8a16")
    assert recipe.Recipe.model_validate_json(run("recipes", "w8a16", "--json")[1]) == recipe.read("w8a16")
    code, out, err = run("recipes", "w8a61")
    assert (code, out) == (2, "") and err.startswith("error: unknown recipe 'w8a61': did you mean")


def test_no_command_and_wrong_usage(run: Run) -> None:
    assert "compress" in "".join(run()[1:])
    code, out, err = run("compress")
    assert code == 2 and out == "" and "Missing argument" in err and "Traceback" not in err
    code, _, err = run("compres", "x")
    assert code == 2 and "compress" in err
    assert run("--help")[0] == 0


# --- dry run -------------------------------------------------------------------------------------------------------


def test_dry_run_says_what_it_would_take_and_writes_nothing(run: Run, saved: Path, tmp_path: Path) -> None:
    before = sorted(saved.rglob("*"))
    code, out, err = run(*arguments(saved, "--dry-run"))
    assert (code, err) == (0, "")
    for said in (
        "14 in 2 blocks",
        "memory",
        "disk",
        "time",
        "lm_head: outside the repeated blocks",
        "nothing was written",
    ):
        assert said in out
    assert list(tmp_path.iterdir()) == []
    assert sorted(saved.rglob("*")) == before


def test_dry_run_as_json(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, err = run(*arguments(saved, "--dry-run", "--json", "--set", "bits=3", "--samples", 4))
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["layers"] == 14 and facts["blocks"] == 2
    assert facts["skipped"] == {
        "lm_head": "outside the repeated blocks",
        "model.embed_tokens": "Embedding is no linear layer",
    }
    assert all(facts[key] > 0 for key in ("memory_bytes", "disk_bytes", "artifact_bytes"))
    assert facts["recipe"]["steps"][0]["bits"] == 3 and facts["recipe"]["calibration"]["samples"] == 4
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_by_what_the_rest_will_learn(run: Run, saved: Path) -> None:
    """A shipped recipe's losses, in words and in JSON."""
    told = ("compress", saved / "llama", "--recipe", "prune-minitron-25", "--out", "out", "--dry-run")
    code, out, err = run(*told)
    assert (code, err) == (0, "")
    assert "trained after pruning" in out and "by soft-labels from the network as it was, about" in out
    assert json.loads(run(*told, "--json")[1])["learnt_by"] == "soft-labels from the network as it was"
    assert "trained after pruning" not in run(*arguments(saved, "--dry-run"))[1]


def test_the_disk_it_takes_is_what_was_said(run: Run, saved: Path) -> None:
    said = json.loads(run(*arguments(saved, "--dry-run", "--json"))[1])["artifact_bytes"]
    assert run(*arguments(saved, "--quiet"))[0] == 0
    report = read_report(Path("out"))
    tensors = sum(entry.after_bytes for entry in report.bytes if entry.kind != "file headers")
    assert said == pytest.approx(tensors, rel=0.02)


# --- compress ------------------------------------------------------------------------------------------------------


def test_compress_prints_a_report_and_where_it_is(run: Run, saved: Path) -> None:
    code, out, err = run(*arguments(saved))
    assert (code, err) == (0, "")
    assert "out/report.html" in out.replace("\\", "/") and "tiny" in out
    assert {path.name for path in Path("out").iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "report.json", "report.html", "README.md"),
        "compresslab.json",
    }
    assert sorted(path.name for path in Path().iterdir()) == ["out"]


def test_quiet_prints_nothing(run: Run, saved: Path) -> None:
    assert run(*arguments(saved, "--quiet")) == (0, "", "")


def test_json_is_one_document_and_the_report(run: Run, saved: Path) -> None:
    code, out, err = run(*arguments(saved, "--json"))
    assert (code, err) == (0, "")
    printed = Report.model_validate_json(out)
    assert printed == read_report(Path("out"))
    assert len(printed.layers) == 14
    assert printed.parity.tensors == 14


def test_settings_reach_the_report(run: Run, saved: Path) -> None:
    more = ("--set", "bits=3", "--set", "damp_frac=0.1", "--set", "symmetric=true", "--set", "group_size=null")
    code, out, err = run(*arguments(saved, "--json", *more, "--samples", 6, "--sequence-length", 12, "--seed", 7))
    assert (code, err) == (0, "")
    report = Report.model_validate_json(out)
    step = report.recipe["steps"][0]
    assert (step["bits"], step["damp_frac"], step["symmetric"], step["group_size"]) == (3, 0.1, True, None)
    assert report.recipe["calibration"] == {"samples": 6, "sequence_length": 12}
    assert report.data is not None
    assert (report.data["samples"], report.data["sequence_length"], report.data["tokens"]) == (6, 12, 72)
    assert report.data["seed"] == 7
    stored = json.loads(Path("out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stored["config_groups"]["group_0"]["weights"]["num_bits"] == 3


def test_ignore_adds_to_the_recipe(run: Run, saved: Path) -> None:
    code, out, _ = run(*arguments(saved, "--json", "--ignore", "*.down_proj", "--ignore", "*.o_proj"))
    assert code == 0
    report = Report.model_validate_json(out)
    assert report.recipe["ignore"] == ["@outside-blocks", "*.down_proj", "*.o_proj"]
    assert len(report.skipped) == 4 + len({"lm_head", "model.embed_tokens"}) and len(report.layers) == 10


def test_force(run: Run, saved: Path) -> None:
    assert run(*arguments(saved, "--quiet"))[0] == 0
    assert run(*arguments(saved, "--quiet"))[0] == 2
    assert run(*arguments(saved, "--quiet", "--force", "--set", "bits=3")) == (0, "", "")
    assert read_report(Path("out")).recipe["steps"][0]["bits"] == 3


# --- report --------------------------------------------------------------------------------------------------------


def test_report_of_one_and_of_two(run: Run, saved: Path) -> None:
    assert run(*arguments(saved, "--quiet", out="four"))[0] == 0
    assert run(*arguments(saved, "--quiet", "--set", "bits=3", out="three"))[0] == 0
    code, one, err = run("report", "four")
    assert (code, err) == (0, "") and "tiny" in one
    assert run("report", "four/report.json")[1] == one
    code, two, err = run("report", "four", "three")
    assert code == 0 and two != one and "compresslab compare" in err and err.count("\n") == 1
    assert run("compare", "four", "three") == (0, two, "")
    for folders in (["four"], ["four", "three"]):
        command = "report" if len(folders) == 1 else "compare"
        code, markdown, err = run(command, *folders, "--markdown")
        assert (code, err) == (0, "") and "|" in markdown
        code, out, err = run(command, *folders, "--html", "page.html")
        assert (code, err) == (0, "") and "page.html" in out
        assert "</html>" in Path("page.html").read_text(encoding="utf-8")


def test_report_of_nothing(run: Run) -> None:
    code, out, err = run("report", "nothing")
    assert (code, out) == (2, "")
    assert err.startswith("error: no report at ") and err.count("\n") == 1


# --- width ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compress", "dry run", "report", "compare", "models", "datasets", "recipes"])
def test_no_line_is_wider_than_the_terminal(
    run: Run, saved: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert out_console.width == 60
    if command in ("report", "compare"):
        assert run(*arguments(saved, "--quiet", out="one"))[0] == 0
        assert run(*arguments(saved, "--quiet", "--set", "bits=3", out="two"))[0] == 0
    lines: dict[str, list[object]] = {
        "compress": arguments(saved),
        "dry run": arguments(saved, "--dry-run"),
        "report": ["report", "one"],
        "compare": ["compare", "one", "two"],
    }
    code, out, _ = run(*lines.get(command, [command]))
    assert code == 0
    assert widest(out) <= 60


# --- all of it, for real -------------------------------------------------------------------------------------------


def test_a_whole_run_in_a_real_process(saved: Path, tmp_path: Path) -> None:
    """Nothing replaced: compress with all measurements, as a user does; then open what it made."""
    environment = os.environ | {"COLUMNS": "60", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compresslab.cli", *map(str, arguments(saved)[:-1]), "--windows", "4"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert widest(done.stdout) <= 60
    report = read_report(tmp_path / "out")
    names = {after.name for _, after in report.pairs()}
    assert names >= {"perplexity", "disk_bytes", "weight_bytes", "load_ms", "peak_memory_bytes"}
    assert (report.parity.tensors, report.parity.max_abs_difference) == (14, 0.0)
    loaded = pipeline.Artifact(tmp_path / "out").load()
    with torch.inference_mode():
        assert loaded(input_ids=tiny.token_batches(1)[0]["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_other_networks_come_back_from_disk_bit_by_bit(kind: str, saved: Path, tmp_path: Path) -> None:
    """The parity check in a real fresh process; the vision model is given as an object."""
    with tiny.quick():
        model = tiny.make("vit") if kind == "vit" else tiny.save(kind, tmp_path / kind)
        chosen, text = (tiny.recipe("rtn"), None) if kind == "vit" else (tiny.recipe(), str(saved / "words.txt"))
        _, report = pipeline.compress(model, chosen, text, out=tmp_path / "out", measure=False)
    assert report.parity.tensors == (12 if kind == "vit" else 8)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json: is it a model folder?"),
        ("{}", "config.json: Unrecognized model"),
        ("[]", "holds no mapping"),
        ('{"model_type": "bert"}', "names no architecture"),
        ('{"model_type": "bert", "architectures": ["Mine"]}', "names Mine, which transformers"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}', "config.json: "),
    ],
)
def test_a_folder_that_holds_no_model_is_said_so(run: Run, tmp_path: Path, config: str | None, told: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    code, _, err = run("sparse", folder)
    assert code == 2
    assert told in " ".join(err.split())
