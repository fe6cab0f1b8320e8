"""Other frameworks: the list, their environments, and asking one. The toy peer here is a script of Python's own library."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import recipe
from compresslab.course import beside, catalogue, digits, experiment, showing
from compresslab.course.beside import Asked, Beside
from compresslab.course.trials import TextSettings
from compresslab.errors import CompressLabError
from compresslab.measure.perplexity import perplexity
from compresslab.methods import METHODS
from compresslab.peers import asking, environments, registry
from compresslab.peers.registry import Peer
from compresslab.recipe import Training
from compresslab.training import split

PEERS = registry.peers()
TOY = """
import hashlib, json, sys
job = json.load(open(sys.argv[1]))
told = job["settings"]
if "say" in told:
    sys.exit(told["say"])
if "sleep" in told:
    import time; time.sleep(told["sleep"])
read = {what: hashlib.sha256(open(path, "rb").read()).hexdigest() for what, path in job["data"].items()}
answer = {"sha256": read | told.get("sha256", {}), "before": told.get("before", {"perplexity": 2.0}),
          "after": {"bytes": 123.0, "perplexity": 2.25}, "versions": {"toy": "1.0"}, "seconds": {}, "peak_rss_bytes": 5,
          "notes": ["a toy"]}
for absent in told.get("without", []):
    del answer[absent]
json.dump(answer, open(sys.argv[2], "w"))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer without requirements; its environment is made in a cache folder of its own."""
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "home"))
    script, pins = tmp_path / "run_toy.py", tmp_path / "toy.txt"
    script.write_text(TOY, encoding="utf-8")
    pins.write_text("# nothing\n", encoding="utf-8")
    return Peer(
        name="toy", package="toy", labs=("3.3",), state="runs", ours="gptq", note={"en": "a toy", "zh-TW": "玩具"},
        script=script, requirements=pins,
    )  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> asking.Job:
    data = {name: {"input_ids": torch.arange(8).view(2, 4) + len(name)} for name in ("calibration", "test")}
    return asking.Job(networks={"model": tmp_path}, data=beside.files(data, tmp_path), out=tmp_path / "out")


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_the_list_is_true(peer: Peer) -> None:
    assert set(peer.note) == {"en", "zh-TW"} and all(peer.note.values())
    assert peer.ours in {*METHODS, *recipe.shipped()} or (peer.ours is None and peer.state != "runs")
    assert peer.script.is_file() == (peer.state == "runs")
    assert peer.requirements.is_file() == (peer.state != "excluded")
    if peer.state != "excluded":
        names = [pin.partition("==")[0].lower().replace("_", "-") for pin in peer.pins()]
        assert all(pin.count("==") == 1 for pin in peer.pins()) and len(set(names)) == len(names)
        assert peer.package in names and "torch==2.13.0" in peer.pins()


def test_every_framework_of_the_course_is_listed() -> None:
    assert set(PEERS) >= {
        "onnxruntime", "neural-compressor", "torchao", "llm-compressor", "gptqmodel", "auto-round", "torch-prune", "nni",
        "torch-pruning", "trl", "paddleslim", "naslib", "tensorflow-model-optimization",
    }  # fmt: skip


def test_labs_ask_peers_that_run_about_rows_that_they_have() -> None:
    results = Path(__file__).resolve().parent.parent / "results"
    asked_at_all = set()
    for number, lab in catalogue.labs().items():
        module = lab.module("experiment")
        for scale, settings in module.SETTINGS.items():
            kept = results / f"lab-{number}-{scale}.json"
            for asked in getattr(module, "peers", lambda _: ())(settings):
                assert PEERS[asked.peer].state == "runs" and number in PEERS[asked.peer].labs
                assert not kept.exists() or {asked.ours, asked.whole} <= set(experiment.read(kept).rows)
                assert lab.say(f"peer-{asked.row}", "en") and lab.say(f"peer-{asked.row}", "zh-TW")
                asked_at_all.add((asked.peer, number))
    assert asked_at_all == {(name, lab) for name, peer in PEERS.items() if peer.state == "runs" for lab in peer.labs}


def test_an_environment_is_made_once_and_only_whole(toy: Peer) -> None:
    said: list[str] = []
    with pytest.raises(CompressLabError, match=r"'toy' is not installed: compresslab peers install toy"):
        environments.python(toy)
    folder = environments.install(toy, said.append)
    assert environments.python(toy).is_file() and len(said) == 1
    assert environments.install(toy, said.append) == folder and len(said) == 1
    (folder / environments.MARK).unlink()  # as if it had been interrupted
    assert not environments.is_installed(toy)
    environments.install(toy, said.append)
    assert len(said) == 2
    toy.requirements.write_text("torch==9.9.9\n", encoding="utf-8")
    with pytest.raises(CompressLabError, match="was installed with other pins"):
        environments.python(toy)
    assert environments.remove(toy) and not folder.exists() and not environments.remove(toy)


def test_what_cannot_be_installed_says_why(toy: Peer) -> None:
    out = dataclasses.replace(toy, state="excluded", note={"en": "It needs Python 3.8.", "zh-TW": "需要 Python 3.8。"})
    with pytest.raises(CompressLabError, match=r"It needs Python 3.8. Ours for its job: gptq"):
        environments.install(out)
    with pytest.raises(CompressLabError, match=r"cannot be run: it is 'excluded'"):
        environments.python(out)


def test_a_fault_of_pip_is_one_line(toy: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.requirements.write_text("no-such-package-of-ours==1.0\n", encoding="utf-8")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CompressLabError, match=r"pip failed \(.*no-such-package-of-ours"):
        environments.install(toy)
    assert not environments.is_installed(toy)


def test_a_peer_answers_about_what_it_was_given(toy: Peer, job: asking.Job) -> None:
    environments.install(toy)
    answer = asking.ask(toy, job)
    assert answer.before == {"perplexity": 2.0} and answer.after == {"bytes": 123.0, "perplexity": 2.25}
    assert answer.notes == ("a toy",) and answer.seconds["total"] > 0

    def asked(**told: object) -> asking.Answer:
        return asking.ask(toy, dataclasses.replace(job, settings=told), time_limit=told.get("limit", 60))  # type: ignore[arg-type]

    with pytest.raises(CompressLabError, match="read another test file than it was given"):
        asked(sha256={"test": "0" * 64})
    with pytest.raises(CompressLabError, match=r"'toy' failed: ValueError: 3 bits are not supported"):
        asked(say="Traceback\nValueError: 3 bits are not supported\n")
    with pytest.raises(CompressLabError, match=r"'toy' was stopped after 0.2 s"):
        asked(sleep=30, limit=0.2)
    with pytest.raises(CompressLabError, match="answered in another form"):
        asked(without=["after"])


SETTINGS = TextSettings(model="characters", seeds=1, samples=2, window=8, test_windows=2, test_length=8)


@pytest.fixture
def listed(toy: Peer, monkeypatch: pytest.MonkeyPatch) -> Peer:
    monkeypatch.setattr(registry, "peers", lambda: PEERS | {"toy": toy})
    model = tiny.make("llama")
    monkeypatch.setattr(beside, "material", lambda *_: (model, torch.ones(2, 8).long(), torch.ones(2, 8).long()))
    monkeypatch.setattr(beside.character_model, "save", lambda _, folder: folder.mkdir())
    return toy


def _beside(perplexity: float, *told: dict[str, object]) -> dict[str, Beside]:
    found: dict[str, Beside] = {}
    rows = [Asked(row=f"toy-{i}", peer="toy", ours="gptq-4", settings=dict(one)) for i, one in enumerate(told)]
    for seed in range(2):
        beside.measure_(found, rows, SETTINGS, seed, {"float": {"perplexity": perplexity}}, lambda _: None)
    return found


def test_rows_of_peers_stand_beside_ours(listed: Peer) -> None:
    environments.install(listed)
    found = _beside(2.01, {}, {"say": "no"})
    assert found["toy-0"].metrics == {"perplexity": [2.25, 2.25], "bytes": [123.0, 123.0]}
    assert found["toy-0"].before == {"perplexity": [2.0, 2.0]}
    assert found["toy-0"].versions == {"toy": "1.0"} and len(found["toy-0"].seconds) == 2
    assert found["toy-1"].failed == "peer 'toy' failed: no" and not found["toy-1"].seconds
    kept = experiment.read(Path(__file__).resolve().parent.parent / "results" / "lab-3.3-micro.json")
    words = catalogue.lab("3.3").say
    again = dataclasses.replace(kept, peers={"gptqmodel-4": found["toy-0"], "gptqmodel-3": found["toy-1"]})
    ((_, ours, good, bad),) = showing.peers(again, "en")
    assert ours[0] == f"ours: {words('row-gptq-4', 'en')}"
    assert good[:2] == [f"  toy 1.0: {words('peer-gptqmodel-4', 'en')}", "2.25"]
    assert bad[1] == "-"
    assert showing.failures(again, "en") == [f"{words('peer-gptqmodel-3', 'en')} gave nothing: peer 'toy' failed: no"]


def test_a_peer_that_measured_something_else_is_an_error(listed: Peer) -> None:
    environments.install(listed)
    with pytest.raises(
        CompressLabError, match=r"perplexity 2.0000 .* 2.0300: it did not measure the same network and data"
    ):
        _beside(2.03, {})
    with pytest.raises(CompressLabError, match=r"did not measure the same network"):
        _beside(2.0, {"before": {"perplexity": math.nan}})
    with pytest.raises(
        CompressLabError, match=r"says nothing of the network .* row 'float' says too: .* perplexity, accuracy"
    ):
        _beside(2.0, {"before": {"bytes": 1.0}})


def test_a_lab_asks_those_peers_that_are_installed_and_says_which_are_not(
    listed: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lab:
        @staticmethod
        def peers(settings: TextSettings) -> list[Asked]:
            return [Asked(row=f"{peer}-4", peer=peer, ours="gptq-4", settings={}) for peer in ("toy", "torchao")]

    said: list[str] = []
    monkeypatch.setattr(
        environments, "is_installed", lambda peer: peer.name == "toy" and environments.folder(peer).exists()
    )
    with pytest.raises(CompressLabError, match=r"needs torchao, toy: run `compresslab peers install torchao toy`"):
        beside.asked_by(Lab, "3.3", SETTINGS, said.append)
    environments.install(listed)
    assert [one.peer for one in beside.asked_by(Lab, "3.3", SETTINGS, said.append)] == ["toy"]
    assert said == ["without torchao: not installed, run `compresslab peers install torchao`"]
    with pytest.raises(CompressLabError, match="asks no other framework"):
        beside.asked_by(object(), "3.4", SETTINGS, said.append)


@pytest.fixture
def peer_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the scripts share, for jobs that `_told` writes: CompressLab is not installed where it runs."""
    spec = importlib.util.spec_from_file_location("peer_job", registry.SCRIPTS / "peer_job.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "job.json"), str(tmp_path / "answer.json")])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return found


def _told(folder: Path, data: dict[str, dict[str, Tensor]], **settings: object) -> None:
    job = asking.Job(networks={"model": folder}, data=beside.files(data, folder), out=folder / "out", settings=settings)
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job), default=str), encoding="utf-8")


def test_the_scripts_take_the_perplexity_as_we_do(tmp_path: Path, peer_job: Any) -> None:
    model: nn.Module = tiny.make("llama").eval()
    ids = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    _told(tmp_path, {"calibration": {"input_ids": ids}, "test": {"input_ids": ids}})
    asked = peer_job.job_of("torch")
    losses, tokens = perplexity(model, ids).parts.sum(axis=0)
    asked.measure(model)
    assert asked.after["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-6)
    weights = tmp_path / "test.safetensors"
    asked.answer([weights])
    said = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert set(said["sha256"]) == {"calibration", "test"} and said["after"]["bytes"] == weights.stat().st_size
    assert {field.name for field in dataclasses.fields(asking.Answer)} == set(said)


def test_the_scripts_train_on_pictures_as_we_do(tmp_path: Path, peer_job: Any) -> None:
    """Weights after some steps, accuracy, and the count of weights; a network that is traced says the same."""
    training = digits.Training(widths=(4, 8, 8), pictures=100, epochs=2, batch=40)
    shown, test = digits.pictures("train", training.pictures, 3), digits.pictures("test", 60)
    ours, theirs = digits.build(training, 0), digits.build(training, 0)
    digits.train_(ours, 3, training)
    data = {
        name: {"pixel_values": one.pixels, "labels": one.labels} for name, one in (("train", shown), ("test", test))
    }
    data["train"]["order"] = digits.orders(training, 3)
    options = {"lr": training.learning_rate, "weight_decay": digits.WEIGHT_DECAY}
    told = {"optimizer": "AdamW", "options": options, "batch": training.batch, "steps": 6}
    _told(tmp_path, data, training=told, batches=[2], rounds=1)
    asked = peer_job.job_of("torch")
    asked.train_(theirs)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    asked.measure(theirs)
    asked.weigh(theirs)
    assert asked.after["accuracy"] == pytest.approx(100 * digits.accuracy(ours, test))
    assert asked.after["kweights"] == sum(int(t.count_nonzero()) for t in ours.parameters()) / 1000
    assert asked.after["ms_2"] > 0
    logits = peer_job.Logits(ours)(test.pixels)
    assert torch.equal(logits, ours(pixel_values=test.pixels).logits)


def test_torchs_own_pruning_finds_our_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script for once in our own environment: a network of ours opened by its code alone, pruned and trained on."""
    lab = catalogue.lab("3.5").module("experiment")
    told = lab.Digits(widths=(4, 8, 8), pictures=300, steps=4, sparsities=(0.5,), more_steps=3)
    settings = dataclasses.replace(lab.SETTINGS["micro"], digits=told)
    ours = lab.OnDigits(told, 0, lambda _: None)
    dense = ours.dense()
    ours.row("dense", dense)
    ours.row("layer-50", ours.trained_on(dense, ours.masks(dense, 0.5)["layer"]))
    asked = [one for one in lab.peers(settings) if one.row == "torch-prune-layer-50"]
    monkeypatch.setattr(environments, "python", lambda peer: Path(sys.executable))
    found: dict[str, Beside] = {}
    beside.measure_(found, asked, settings, 0, ours.rows, lambda _: None)
    said = found["torch-prune-layer-50"]
    assert not said.failed and said.metrics["agreement"] == [100.0]
    assert said.metrics["accuracy"] == [pytest.approx(ours.rows["layer-50"]["accuracy"])]
    assert said.before["accuracy"] == [pytest.approx(ours.rows["dense"]["accuracy"])]


def test_a_student_is_handed_over_with_its_teacher_and_without_what_is_held_back(tmp_path: Path) -> None:
    student, teacher = tiny.make("llama"), tiny.make("llama")
    windows, training = torch.arange(40).view(10, 4), Training(steps=7, held_back=0.3)
    handed = beside.lesson(student, teacher, training, windows, windows[:2], 5, tmp_path)
    shown = load_file(handed.data["calibration"])["input_ids"]
    kept, _ = split([{"input_ids": window} for window in windows], 0.3, 5)
    assert torch.equal(shown, torch.stack([one["input_ids"] for one in kept])) and len(shown) == 7
    assert all((folder / "config.json").is_file() for folder in handed.networks.values())
    assert set(handed.networks) == {"model", "teacher"} and beside.told_to_train(training)["steps"] == 7


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], listed: Peer) -> None:
    def peers(*words: str) -> tuple[int, str, str]:
        return tiny.run_cli(monkeypatch, capsys, "peers", *words)

    rows = {row["name"]: row for row in json.loads(peers("list", "--json")[1])}
    assert not rows["toy"]["installed"] and rows["naslib"]["state"] == "excluded"
    assert peers("install", "toy")[0] == 0 and environments.is_installed(listed)
    monkeypatch.setenv("COLUMNS", "100")
    assert "玩具" in peers("list", "--lang", "zh-TW")[1]
    assert peers("remove", "toy")[1] == "toy: removed\n"
    code, _, said = peers("install", "naslib")
    assert code == 2 and "is not offered" in said
    assert peers("install", "autoround")[0] == 2
