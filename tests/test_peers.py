"""Other frameworks: the list, their environments, and asking one. The toy peer here is a script of Python's own library."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tiny
from compresslab import recipe
from compresslab.course import beside, catalogue, experiment, showing
from compresslab.course.beside import Asked, Beside
from compresslab.course.trials import TextSettings
from compresslab.errors import CompressLabError
from compresslab.methods import METHODS
from compresslab.peers import asking, environments, registry
from compresslab.peers.registry import Peer

PEERS = registry.peers()
TOY = """
import hashlib, json, sys
job = json.load(open(sys.argv[1]))
told = job["settings"]
if "say" in told:
    sys.exit(told["say"])
if "sleep" in told:
    import time; time.sleep(told["sleep"])
read = {w: hashlib.sha256(open(job[w], "rb").read()).hexdigest() for w in ("calibration", "test") if job[w]}
answer = {"sha256": read | told.get("sha256", {}), "tokens": 10, "float_loss": told.get("float_loss", 7.0), "loss": 8.0,
          "nbytes": 123, "versions": {"toy": "1.0"}, "seconds": {}, "peak_rss_bytes": 5, "notes": ["a toy"]}
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
    for name in ("calibration", "test"):
        save_file({"input_ids": torch.arange(8).view(2, 4) + len(name)}, tmp_path / f"{name}.safetensors")
    return asking.Job(
        model=tmp_path, calibration=tmp_path / "calibration.safetensors", test=tmp_path / "test.safetensors",
        out=tmp_path / "out",
    )  # fmt: skip


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
        if not hasattr(module, "peers"):
            continue
        rows = experiment.read(results / f"lab-{number}-micro.json").rows
        for asked in module.peers(module.SETTINGS["micro"]):
            assert PEERS[asked.peer].state == "runs" and number in PEERS[asked.peer].labs
            assert asked.ours in rows
            assert lab.say(f"peer-{asked.row}", "en") and lab.say(f"peer-{asked.row}", "zh-TW")
            asked_at_all.add(asked.peer)
    assert asked_at_all == {name for name, peer in PEERS.items() if peer.state == "runs"}


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
    assert (answer.loss, answer.nbytes, answer.notes) == (8.0, 123, ("a toy",)) and answer.seconds["total"] > 0

    def asked(**told: object) -> asking.Answer:
        return asking.ask(toy, dataclasses.replace(job, settings=told), time_limit=told.get("limit", 60))  # type: ignore[arg-type]

    with pytest.raises(CompressLabError, match="read another test file than it was given"):
        asked(sha256={"test": "0" * 64})
    with pytest.raises(CompressLabError, match=r"'toy' failed: ValueError: 3 bits are not supported"):
        asked(say="Traceback\nValueError: 3 bits are not supported\n")
    with pytest.raises(CompressLabError, match=r"'toy' was stopped after 0.2 s"):
        asked(sleep=30, limit=0.2)
    with pytest.raises(CompressLabError, match="answered in another form"):
        asked(without=["nbytes"])


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
        beside.measure_(found, rows, SETTINGS, seed, perplexity, lambda _: None)
    return found


def test_rows_of_peers_stand_beside_ours(listed: Peer) -> None:
    environments.install(listed)
    found = _beside(math.exp(0.7), {}, {"say": "no"})
    assert found["toy-0"].metrics == {"perplexity": [pytest.approx(math.exp(0.8))] * 2, "bytes": [123.0, 123.0]}
    assert found["toy-0"].versions == {"toy": "1.0"} and len(found["toy-0"].seconds) == 2
    assert found["toy-1"].failed == "peer 'toy' failed: no" and not found["toy-1"].seconds
    kept = experiment.read(Path(__file__).resolve().parent.parent / "results" / "lab-3.3-micro.json")
    words = catalogue.lab("3.3").say
    again = dataclasses.replace(kept, peers={"gptqmodel-4": found["toy-0"], "gptqmodel-3": found["toy-1"]})
    _, ours, good, bad = showing.peers(again, "en")
    assert ours[0] == f"ours: {words('row-gptq-4', 'en')}"
    assert good[:2] == [f"  toy 1.0: {words('peer-gptqmodel-4', 'en')}", "2.226 ± 0"]
    assert bad[1] == "-"
    assert showing.failures(again, "en") == [f"{words('peer-gptqmodel-3', 'en')} gave nothing: peer 'toy' failed: no"]


def test_a_peer_that_measured_something_else_is_an_error(listed: Peer) -> None:
    environments.install(listed)
    with pytest.raises(CompressLabError, match=r"did not measure the same network and windows"):
        _beside(math.exp(0.7), {"float_loss": 9.0})


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


def test_the_scripts_take_the_loss_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peer_job.py writes the loss out once more, for CompressLab is not installed where it runs."""
    from compresslab.measure.perplexity import perplexity

    spec = importlib.util.spec_from_file_location("peer_job", registry.SCRIPTS / "peer_job.py")
    assert spec is not None and spec.loader is not None
    peer_job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer_job)
    model: nn.Module = tiny.make("llama").eval()
    ids = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    job = {"model": str(tmp_path), "out": str(tmp_path / "out"), "settings": {}, "seed": 0, "threads": 1}
    job |= dict.fromkeys(("calibration", "test"), str(tmp_path / "ids.safetensors"))
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "job.json"), str(tmp_path / "answer.json")])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    asked = peer_job.PeerJob("torch")
    losses, tokens = perplexity(model, ids).parts.sum(axis=0)
    asked.float_loss = asked.loss = asked.loss_of(peer_job.logits_of(model))
    assert asked.loss == pytest.approx(losses, rel=1e-6)
    asked.answer([tmp_path / "ids.safetensors"])
    said = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert said["tokens"] == tokens and said["nbytes"] == (tmp_path / "ids.safetensors").stat().st_size
    assert {field.name for field in dataclasses.fields(asking.Answer)} == set(said)


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
