"""What teaching is worth, at sizes that two cores can do: a language model, an encoder, classifiers of texts and of pictures.

    python benchmarks/distillation.py --work FOLDER [--parts ...] [--sst2 FOLDER] [--cifar10 FILE.parquet] [--out FILE]

    language   SmolLM2-135M to 20 of its 30 blocks, those with the most influence on the text, by one `compresslab distill`,
               timed as a process from start to end: perplexity of the whole model, of the blocks alone, and of the student
    text       the same blocks for as many steps on the text alone
    encoder    MiniLM-L6 to 3 and to 2 blocks on Wikipedia passages: correlation with what people say of pairs of documents,
               milliseconds; the controls: the same blocks untaught, and 3 trained on the same passages for as many steps
               without the teacher
    features   the same 3 blocks by other losses on features, with few steps: hints by layer maps, learnt ones among them,
               TinyBERT's loss and DistilBERT's, relations of attention, of examples, contrast
    sentences  MiniLM-L6 with a head, trained on SST-2 here, to 3 blocks: accuracy; the control learns from the labels alone
    pictures   ResNet-56, trained on CIFAR-10 here, to ResNet-20: accuracy; the control likewise; both also on few pictures
    data_free  a ResNet of digits taught to a narrower one on pictures drawn out of it (DeepInversion): accuracy on real digits;
               the controls: as many pictures of noise, and drawn out without the statistics of batch norms; real digits beside
    logits     a ResNet of digits teaches a narrower one that sees few pictures, by every loss on logits; the controls are labels
    maps       a ResNet of digits teaches a shallower one by where it looks, what its channels say, and how one block follows
               from another
    ensembles  three teachers of digits, one of them bad (it does not know, or is sure of what is wrong): the best alone, their
               mean, weights by numbers, weights for each picture
    written    a language model of characters to half its blocks by shipped recipes and others, in equal steps from equal
               weights: perplexity, and divergence from the teacher on what the student writes; the controls: the text alone,
               and what the teacher says of it; texts of the student's own, and teachers of other tokens, among the rows
    stages     the characters' model to half of its neurons, heads and residual stream: perplexity after one cut and after two,
               each by what is loud on text and by the norms of weights, for as many steps in all; fresh weights of that shape
               beside; and after one cut its blocks taught one by one, or by hints first, in place of all at once

An encoder has no loss without a teacher, so its control needs one: simcse.py.

Quality is that of folders as reloaded from disk, in a process of its own; times are medians over A B A B ..., on one thread, and
their ratio is the median of the pairs' ratios. Parts are kept as they finish, and can be measured again one by one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import simcse
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from compresslab import data, models, pairing, recipe, teaching
from compresslab.course import character_model, digits, encoders, in_memory, own_pictures
from compresslab.course.timing import one_thread
from compresslab.data.labelled import Example
from compresslab.distill.attention_transfer import AttentionTransfer
from compresslab.distill.contrastive import Contrastive
from compresslab.distill.deep_inversion import DeepInversion
from compresslab.distill.dist import DIST
from compresslab.distill.distilbert import DistilBERT
from compresslab.distill.dkd import DKD
from compresslab.distill.flow_of_solution import FlowOfSolution
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.hints import Hints
from compresslab.distill.jensen_shannon import JensenShannon
from compresslab.distill.minilm import MiniLM
from compresslab.distill.neuron_selectivity import NeuronSelectivity
from compresslab.distill.relational import Relational
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.tinybert import TinyBERT
from compresslab.distill.total_variation import TotalVariation
from compresslab.distilling import distill
from compresslab.losses import Losses, losses_of
from compresslab.measure import embedding, environment, fresh
from compresslab.measure.perplexity import perplexity
from compresslab.plan import OUTSIDE, make_plan
from compresslab.recipe import Training
from compresslab.solving import Pass
from compresslab.staging import parameters_of
from compresslab.students import Shape, student_of, write
from compresslab.teachers import Ensemble, Translated
from compresslab.weights import partial_of

LANGUAGE, ENCODER = "smollm2-135m", "minilm-l6"
WINDOWS, LENGTH = 24, 512  # of the test split
AIM_RECOVERED, AIM_SECONDS = 0.5, 1200.0
AIM_CORRELATION, AIM_FASTER = 0.97, 1.8
BATCHES, TOKENS = (1, 16), 128

SMALL = ("logits", "maps", "ensembles", "written", "stages")  # networks that learn in seconds
PARTS = ("language", "text", "encoder", "features", "sentences", "pictures", "data_free", *SMALL)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long each part is trained.

    Attributes:
        pictures, few: that the larger and the smaller part of the pictures have.
    """

    language_blocks: int = 20
    language_samples: int = 240
    language_window: int = 256
    language_batch: int = 4
    language_rate: float = 4e-4
    encoder_samples: int = 256
    encoder_window: int = 128
    encoder_batch: int = 8
    encoder_rate: float = 2e-4
    simcse_temperature: float = simcse.TEMPERATURE
    features_samples: int = 72
    features_window: int = 64
    sentences_epochs: float = 2.0
    sentences_batch: int = 32
    sentences_rate: float = 1e-4
    sentences_temperature: float = 2.0
    pictures: int = 20_000
    few: int = 2_000
    tested: int = 5_000
    side: int = 16
    teacher_steps: int = 1200
    pictures_steps: int = 600
    pictures_batch: int = 64
    pictures_rate: float = 3e-3
    pictures_temperature: float = 4.0
    pictures_soft: float = 0.9
    digits: int = 600
    digits_side: int = 8
    digits_noise: float = 0.1
    digits_seeds: int = 2
    digits_steps: int = 400
    digits_batch: int = 50
    digits_rate: float = 1e-2
    digits_temperature: float = 4.0
    seeds: int = 3
    small_pictures: int = 100
    small_noise: float = 0.3
    small_side: int = 8
    small_steps: int = 120
    small_batch: int = 32
    small_rate: float = 1e-2
    small_widths: tuple[int, ...] = (8, 16, 32)
    deep_blocks: int = 2
    weights: tuple[float, ...] = (6.0, 3.0, 1.0)
    transfer: float = 50.0
    selectivity: float = 50.0
    flow: float = 50.0
    written_seeds: int = 2
    written_windows: int = 1600
    written_length: int = 48
    written_start: int = 100
    written_steps: int = 100
    written_batch: int = 16
    written_rate: float = 2e-3
    written_tokens: int = 256
    stages_seeds: int = 3
    stages_steps: int = 96
    stages_batch: int = 8
    stages_rate: float = 4e-3
    inversion: Mapping[str, float] = field(default_factory=lambda: {"batch": 100, "steps": 200, "shift": 0})


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.work: Path = given.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.settings = Settings()
        self.sst2, self.cifar10 = given.sst2, given.cifar10
        self.rounds, self.threads = given.rounds, torch.get_num_threads()
        self.goes_on = False

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        """What was measured in this folder under these settings, by a run that was killed; or `make` now."""
        path, told = self.work / "measured.json", json.dumps(asdict(self.settings), sort_keys=True)
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = known.setdefault(told, {})
        self.goes_on |= what in rows
        if what not in rows:
            rows[what] = make()
            path.write_text(json.dumps(known), encoding="utf-8")
            print(what, rows[what], flush=True)
        return rows[what]

    # -- language models -----------------------------------------------------------------------------------------------

    def language(self) -> dict[str, Any]:
        seconds, taught = self._commanded("distill-soft-labels", "language")
        source = models.find(LANGUAGE)
        kept = [int(part) for part in taught["blocks"].split(",")]
        untaught = fresh_folder(self.work / "language-untaught")
        write(student_of(source, Shape(take=kept))[0], untaught)
        assert source.folder is not None
        found = {"whole": taught["before"], "taught": taught["after"], "untaught": self._perplexity(untaught)}
        recovered = {
            "perplexity": share(found, lambda ppl: ppl),
            "nats": share(found, math.log),
        }
        return {
            "perplexity": found, "recovered": recovered, "blocks": kept, "seconds": seconds, **taught["report"],
            "aim_met": min(recovered.values()) >= AIM_RECOVERED and seconds <= AIM_SECONDS,
        }  # fmt: skip

    def text(self) -> dict[str, Any]:
        """Settings as above, and labels that are not smoothed."""
        seconds, taught = self._commanded("distill-control", "text", "hard-labels.smoothing=0.0")
        return {"perplexity": {"trained": taught["after"]}, "seconds": seconds, **taught["report"]}

    def _commanded(self, name: str, out: str, *more: str) -> tuple[float, dict[str, Any]]:
        """A whole `compresslab distill`: its seconds from outside, and what its report says."""
        s, folder = self.settings, fresh_folder(self.work / out)
        told = {
            "training.epochs": 1.0, "training.batch": s.language_batch, "training.learning_rate": s.language_rate,
            "training.held_back": 0.02, "training.checks": 2,
        }  # fmt: skip
        sets = [part for key, value in told.items() for part in ("--set", f"{key}={value}")]
        sets += [part for one in more for part in ("--set", one)]
        command = [
            sys.executable, "-m", "compresslab.cli", "distill", LANGUAGE, "--layers", str(s.language_blocks), "--take",
            "influence", "--recipe", name, "--data", "wiki", "--samples", str(s.language_samples), "--sequence-length",
            str(s.language_window), "--windows", str(WINDOWS), "--device", "cpu", "--json", "--out", str(folder), *sets,
        ]  # fmt: skip
        started = time.perf_counter()
        said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds = time.perf_counter() - started
        both = [named(said[when], "perplexity") for when in ("before", "after")]
        training = said["data"]["training"]
        kept = {key: training[key] for key in ("steps", "examples", "losses", "checked_at", "loss_before", "notice")}
        blocks = said["model"]["changed"].removeprefix("blocks ").partition(" of ")[0]
        return seconds, {
            "before": both[0], "after": both[1], "blocks": blocks,
            "report": {"training": kept, "by_stage": said["seconds"], "command": command[2:-len(sets) - 2] + sets},
        }  # fmt: skip

    def _perplexity(self, folder: Path) -> float:
        tokenizer = models.find(folder).tokenizer()
        path = self.work / "windows.safetensors"
        save_file({"input_ids": data.windows("wiki", tokenizer, length=LENGTH, count=WINDOWS)}, path)
        return self._measured(folder, windows=path)["perplexity"]

    def _measured(self, folder: Path, **asked: Any) -> dict[str, float]:
        job = fresh.Job(folder=folder, threads=self.threads, speed=False, **asked)
        return {one.name: one.value for one in fresh.measure(job).measurements}

    # -- an encoder ------------------------------------------------------------------------------------------------------

    def encoder(self) -> dict[str, Any]:
        s, source = self.settings, models.find(ENCODER)
        assert source.folder is not None
        given = {
            "calibration.samples": s.encoder_samples, "calibration.sequence_length": s.encoder_window,
            "training.batch": s.encoder_batch, "training.learning_rate": s.encoder_rate, "training.epochs": 1.0,
        }  # fmt: skip
        chosen = recipe.read("distill-hints").override(given)
        shapes = {"": Shape(layers=3, take="skip"), "_2": Shape(layers=2, take="skip")}
        folders, seconds = {"whole": source.folder}, {}
        for said, shape in shapes.items():
            for name in ("untaught", "taught"):
                folders[name + said] = fresh_folder(self.work / f"encoder-{name}{said}")
            write(student_of(source, shape)[0], folders[f"untaught{said}"])
            started = time.perf_counter()
            distill(ENCODER, shape, chosen, "wiki", out=folders[f"taught{said}"], measure=False, device="cpu")
            seconds[f"taught{said}"] = time.perf_counter() - started
        student, _ = student_of(source, shapes[""])
        examples = pairing.material_of(student, chosen, "wiki", 0).examples
        started = time.perf_counter()
        assert chosen.training is not None
        scratch = fresh_folder(self.work / "encoder-control-training")
        network = models.materialise(student).float()
        simcse.train_without_teacher_(network, examples, chosen.training, scratch, s.simcse_temperature)
        seconds["without_teacher"] = time.perf_counter() - started
        folders["without_teacher"] = fresh_folder(self.work / "encoder-without_teacher")
        write(models.retrained(student, network), folders["without_teacher"])
        texts = self.work / "encoder-texts.safetensors"
        tokenizer = source.tokenizer()
        windows = {"input_ids": data.windows("wiki", tokenizer, length=LENGTH, count=8)}
        save_file(windows | data.encoder_texts("wiki", tokenizer, count=192, longest=LENGTH), texts)
        reference = self.work / "encoder-reference.safetensors"
        fresh_folder(reference)
        kinds = ("document_similarity_correlation", "embedding_cosine", "similarity_correlation")
        rows = {}
        for name, folder in folders.items():
            found = self._measured(folder, windows=texts, reference=reference)
            rows[name] = {kind: found[kind] for kind in kinds if kind in found}
        of_teacher = {name: row[kinds[0]] / rows["whole"][kinds[0]] for name, row in rows.items()}
        whole = models.load(folders["whole"])
        times = {name: self._times(whole, models.load(folders[name])) for name in ("taught", "taught_2")}
        faster = min(one["times_faster"] for one in times["taught"].values())
        return {
            "rows": rows, "of_the_teacher": of_teacher, "times": times, "training_seconds": seconds,
            "steps": chosen.training.steps_for(len(examples) - round(len(examples) * chosen.training.held_back)),
            "aim_met": of_teacher["taught"] >= AIM_CORRELATION and faster >= AIM_FASTER
            and of_teacher["taught"] > of_teacher["without_teacher"],
        }  # fmt: skip

    def _times(self, whole: nn.Module, student: nn.Module) -> dict[str, dict[str, float]]:
        found = {}
        ids = torch.randint(1000, 20_000, (max(BATCHES), TOKENS), generator=torch.Generator().manual_seed(0))
        with one_thread(), torch.inference_mode():
            for batch in BATCHES:
                times: dict[str, list[float]] = {"whole": [], "student": []}
                for turn in range(self.rounds + 2):
                    for name, network in (("whole", whole), ("student", student)):
                        started = time.perf_counter()
                        network(input_ids=ids[:batch])
                        if turn >= 2:  # the first ones find no caches
                            times[name].append(1000 * (time.perf_counter() - started))
                ratios = [a / b for a, b in zip(times["whole"], times["student"], strict=True)]
                medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
                found[f"batch_{batch}"] = medians | {"times_faster": statistics.median(ratios)}
        return found

    def features(self) -> dict[str, Any]:
        """In memory: embeddings of 96 passages beside the teacher's, and of documents beside what people say."""
        s, source = self.settings, models.find(ENCODER)
        tokenizer, skip = source.tokenizer(), Shape(layers=3, take="skip")
        shown = encoders.passages(tokenizer, samples=s.features_samples, window=s.features_window, seed=0)
        texts = data.encoder_texts("wiki", tokenizer, count=96, longest=256)
        teacher = models.materialise(source).float().eval().requires_grad_(False)
        student, _ = student_of(source, skip)
        training = Training(epochs=1.0, batch=s.encoder_batch, learning_rate=s.encoder_rate, checks=1)
        contrast = Contrastive(negatives=256, weight=0.1)
        losses: dict[str, list[Any]] = {
            "hints_skip": [Hints(blocks="skip", project="needed")],
            "hints_uniform": [Hints(blocks="uniform", project="needed")],
            "hints_similar": [Hints(blocks="similar", project="needed")],
            "hints_learned": [Hints(blocks="learned", project="needed")],
            "tinybert": [TinyBERT(project="needed")], "distilbert": [DistilBERT()],
            "minilm": [MiniLM()], "relational": [Relational()], "contrastive": [contrast],
            "relations": [Relational(), contrast],
        }  # fmt: skip
        rows: dict[str, dict[str, float]] = {}

        def embedded(network: nn.Module, kind: str) -> Tensor:
            return embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])

        def judged(name: str, network: nn.Module) -> None:
            found = embedding.human_documents(embedded(network, "rated"), texts["rated.similarity"])
            found += embedding.agreement(reference, embedded(network, "passages"))
            rows[name] = {one.name: one.value for one in found}
            print(name, rows[name], flush=True)

        reference = embedded(teacher, "passages")
        judged("teacher", teacher)
        judged("untaught", models.materialise(student).float().eval())
        for name, told in losses.items():
            network = models.materialise(student).float().requires_grad_(True)
            on_features = Losses(on_logits=(), on_features=told)
            judged(name, in_memory.taught_on(network, teacher, on_features, shown, training, seed=0))
        network = models.materialise(student).float()
        similar = Losses(on_logits=(), on_features=losses["hints_similar"])
        with teaching.at_work(similar, network, teacher, shown, 0) as lesson:
            assert lesson.features is not None
            pairs = lesson.features.found
        steps = training.steps_for(len(shown) - round(len(shown) * training.held_back))
        return {"rows": rows, "steps": steps, "similar_blocks": pairs}

    # -- classifiers -----------------------------------------------------------------------------------------------------

    def sentences(self) -> dict[str, Any]:
        """The test part is SST-2's own file for development; the best network on examples held back from training is taken."""
        if self.sst2 is None:
            raise SystemExit("part sentences needs --sst2, a folder with train.tsv and dev.tsv")
        s, source = self.settings, models.find(ENCODER)
        teacher = self.work / "sentences-teacher"
        training = {
            "training.epochs": s.sentences_epochs, "training.batch": s.sentences_batch,
            "training.learning_rate": s.sentences_rate, "training.checks": 4,
        }  # fmt: skip
        labels = recipe.read("distill-control").override({"hard-labels.smoothing": 0.0, **training})
        started = fresh_folder(self.work / "sentences-start")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = transformers.AutoModelForSequenceClassification.from_pretrained(source.folder, num_labels=2)
        network.save_pretrained(started)
        source.tokenizer().save_pretrained(started)
        seconds, rows = {}, {}
        both = recipe.read("distill-soft-labels").override({
            "soft-labels.temperature": s.sentences_temperature, **training,
        })  # fmt: skip
        jobs: dict[str, tuple[Path, Any, recipe.Recipe]] = {
            "teacher": (started, started, labels),
            "untaught": (teacher, Shape(layers=3, take="skip"), labels.override({"training.learning_rate": 1e-12,
                         "training.steps": 1})),
            "labels": (teacher, Shape(layers=3, take="skip"), labels),
            "taught": (teacher, Shape(layers=3, take="skip"), both),
        }  # fmt: skip
        for name, (by, student, chosen) in jobs.items():
            out = fresh_folder(self.work / f"sentences-{name}")
            begun = time.perf_counter()
            _, report = distill(by, student, chosen, str(self.sst2), out=out, device="cpu")
            seconds[name] = time.perf_counter() - begun
            rows[name] = {one.name: one.value for one in report.after if "accuracy" in one.name}
            n = [one.n for one in report.after if "accuracy" in one.name]
            print(name, rows[name], flush=True)
        return {"rows": rows, "seconds": seconds, "tested": n[0]}

    def pictures(self) -> dict[str, Any]:
        if self.cifar10 is None:
            raise SystemExit("part pictures needs --cifar10, CIFAR-10's training split as .parquet")
        s = self.settings
        (many,), test = own_pictures.drawn(self.cifar10, (s.pictures,), tested=s.tested, seed=0, side=s.side)
        few = many[: s.few]
        seconds: dict[str, float] = {}
        accuracy: dict[str, float] = {}

        def learned(name: str, model: str, shown: list[Example], steps: int, teacher: nn.Module | None) -> nn.Module:
            network, started = own_pictures.resnet(model, 1), time.perf_counter()
            training = Training(
                steps=steps, batch=s.pictures_batch, learning_rate=s.pictures_rate, weight_decay=0.01, warmup=0.1, checks=1,
                held_back=0.02,
            )  # fmt: skip
            soft = s.pictures_soft if teacher is not None else 0.0
            told: list[Any] = [HardLabels(weight=1 - soft)]
            told += [SoftLabels(weight=soft, temperature=s.pictures_temperature)] if soft else []
            losses = Losses(on_logits=told, on_features=())
            in_memory.taught_on(network, teacher, losses, shown, training, seed=0)
            seconds[name] = time.perf_counter() - started
            accuracy[name] = own_pictures.accuracy(network, test)
            print(name, accuracy[name], flush=True)
            return network

        teacher = learned("teacher", "resnet-56", many, s.teacher_steps, None)
        for said, shown in (("", many), ("_few", few)):
            learned(f"taught{said}", "resnet-20", shown, s.pictures_steps, teacher)
            learned(f"labels{said}", "resnet-20", shown, s.pictures_steps, None)
        return {"accuracy": accuracy, "seconds": seconds, "tested": s.tested}

    def data_free(self) -> dict[str, Any]:
        s = self.settings
        accuracy: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        kind: dict[str, Any] = {"noise": s.digits_noise, "side": s.digits_side}
        test = digits.pictures("test", 2000, seed=100, **kind)
        small, shape = digits.Training(widths=(8, 16, 32), **kind), (1, s.digits_side, s.digits_side)
        training = Training(
            steps=s.digits_steps, batch=s.digits_batch, learning_rate=s.digits_rate, checks=1, held_back=0.05, warmup=0.1,
        )  # fmt: skip
        losses = Losses(on_logits=[SoftLabels(temperature=s.digits_temperature)], on_features=())
        for seed in range(s.digits_seeds):
            teacher = digits.trained(seed, digits.Training(**kind))
            accuracy.setdefault("teacher", []).append(digits.accuracy(teacher, test))

            def drawn(seed: int = seed, teacher: nn.Module = teacher, **more: float) -> Tensor:
                making = DeepInversion(pictures=s.digits, **{**s.inversion, **more})  # type: ignore[arg-type]
                return torch.cat([pixels for pixels, _ in making.made(teacher, shape, digits.CLASSES, seed)])

            kinds: dict[str, Callable[[], Tensor]] = {
                "made": drawn,
                "without_statistics": lambda: drawn(statistics=0.0),
                "noise": lambda seed=seed: torch.randn(s.digits, *shape, generator=torch.Generator().manual_seed(seed)),
                "real": lambda seed=seed: digits.pictures("transfer", s.digits, seed, **kind).pixels,
            }
            for name, make in kinds.items():
                started = time.process_time()
                shown = [{"pixel_values": one, "labels": torch.tensor(0)} for one in make()]
                seconds.setdefault(name, []).append(time.process_time() - started)
                network = digits.build(small, seed)
                in_memory.taught_on(network, teacher, losses, shown, training, seed=seed)
                accuracy.setdefault(name, []).append(digits.accuracy(network, test))
                print(seed, name, accuracy[name][-1], flush=True)
        means = {name: statistics.mean(values) for name, values in accuracy.items()}
        return {"accuracy": accuracy, "means": means, "making_processor_seconds": seconds, "tested": len(test.labels)}

    def stages(self) -> dict[str, Any]:
        """In memory, on other windows for each seed and always the same test."""
        rows: dict[str, list[float]] = {}
        for seed in range(self.settings.stages_seeds):
            for name, value in self._stages_of(seed):
                rows.setdefault(name, []).append(value)
                print(seed, name, value, flush=True)
        return {
            "perplexity": rows,
            "means": {name: statistics.mean(values) for name, values in rows.items()},
            "less": {f"{a} than {b}": apart(rows[b], rows[a]) for a, b in (
                ("one cut, loud", "one cut, norms"), ("two cuts, loud", "two cuts, norms"), ("two cuts, loud", "one cut, loud"),
                ("two cuts, norms", "one cut, norms"), ("one cut, loud", "fresh"), ("blocks in turn", "one cut, loud"),
                ("hints first", "one cut, loud"),
            )},
        }  # fmt: skip

    def _stages_of(self, seed: int) -> Iterator[tuple[str, float]]:
        s, whole, window = self.settings, character_model.trained(seed), character_model.Training().window
        windows = character_model.calibration_windows(2048, window, seed)
        test, soft = character_model.held_out_windows(96, 2 * window), Losses(on_logits=[SoftLabels()], on_features=())
        hints = Losses(on_logits=(), on_features=[Hints(blocks="skip")])
        shown = [{"input_ids": windows[: teaching.EXAMPLES_SHOWN]}]

        def judged(network: nn.Module) -> float:
            return perplexity(network, test, batch_size=32).value

        def cut(network: nn.Module, **shape: Any) -> models.Source:
            source = models.find(network)
            looking = Pass(source=source, plan=make_plan(source, (OUTSIDE,)), batches=shown)
            return student_of(source, Shape(seed=seed, **shape), calibration=looking)[0]

        def taught(source: models.Source, steps: int, losses: Losses = soft, only: Sequence[str] = ("*",)) -> nn.Module:
            network = models.materialise(source).float().requires_grad_(True)
            training = Training(
                steps=steps, batch=s.stages_batch, learning_rate=s.stages_rate, warmup=0.1, checks=1, held_back=0.02,
                only=tuple(only),
            )  # fmt: skip
            return in_memory.taught(network, whole, losses, windows, training, seed=seed)

        yield "whole", judged(whole)
        half = {"width": 0.5, "hidden": 0.5}
        yield "fresh", judged(taught(cut(whole, **half, fresh=True), s.stages_steps))
        for name, by in (("loud", "activation-norm"), ("norms", "group-magnitude")):
            once = cut(whole, **half, by=by)
            yield f"untaught, {name}", judged(models.materialise(once).float().eval())
            yield f"one cut, {name}", judged(taught(once, s.stages_steps))
            between = taught(cut(whole, width=0.75, hidden=0.75, by=by), s.stages_steps // 2)
            twice = cut(between, width=0.5 / 0.75, hidden=0.5 / 0.75, by=by)
            assert numbers(twice) == numbers(once)  # of weights
            yield f"two cuts, {name}", judged(taught(twice, s.stages_steps // 2))
        start = cut(whole, **half, by="activation-norm")
        network, count = start, len(whole.model.layers)
        for place in range(count):
            network = models.find(taught(network, s.stages_steps // count, soft, parameters_of(network, place, count)))
        yield "blocks in turn", judged(models.materialise(network).float().eval())
        hinted = models.find(taught(start, s.stages_steps // 2, hints))
        yield "hints first", judged(taught(hinted, s.stages_steps // 2))

    # -- networks that learn in seconds ----------------------------------------------------------------------------------

    def logits(self) -> dict[str, Any]:
        """Each loss alone but for dkd and dist, which their papers take beside labels."""

        def told(seed: int) -> tuple[dict[str, nn.Module], Told]:
            teacher = digits.trained(seed, self._of_digits())
            rows: Told = {"labels": (None, [HardLabels()], []), "smoothed": (None, [HardLabels(smoothing=0.1)], [])}
            for t in (1.0, 4.0):
                every = {
                    "forward_kl": SoftLabels(temperature=t), "reverse_kl": ReverseKL(temperature=t),
                    "jensen_shannon": JensenShannon(temperature=t), "total_variation": TotalVariation(temperature=t),
                }  # fmt: skip
                rows |= {f"{name}_at_{t:g}": (teacher, [loss], []) for name, loss in every.items()}
            rows["dkd"] = (teacher, [DKD(), HardLabels()], [])
            rows["dist"] = (teacher, [DIST(between=2.0, within=2.0), HardLabels()], [])
            rows["dist_at_4"] = (teacher, [DIST(between=2.0, within=2.0, temperature=4.0), HardLabels()], [])
            return {"teacher": teacher}, rows

        return self._on_digits("logits", self._of_digits(widths=self.settings.small_widths), told)

    def maps(self) -> dict[str, Any]:
        """Beside labels, for a student of the same widths, as flows ask; the last block of each stage beside the teacher's."""
        s, labels = self.settings, HardLabels()
        losses: dict[str, Any] = {
            "hints": Hints(blocks="skip"),
            "attention_transfer": AttentionTransfer(blocks="skip", weight=s.transfer),
            "neuron_selectivity": NeuronSelectivity(blocks="skip", weight=s.selectivity),
            "flow_of_solution": FlowOfSolution(blocks="skip", weight=s.flow),
        }  # fmt: skip

        def told(seed: int) -> tuple[dict[str, nn.Module], Told]:
            teacher = digits.trained(seed, self._of_digits(blocks=s.deep_blocks))
            rows: Told = {"labels": (None, [labels], []), "soft": (teacher, [labels, SoftLabels(temperature=4.0)], [])}
            rows |= {name: (teacher, [labels], [loss]) for name, loss in losses.items()}
            return {"teacher": teacher}, rows

        return self._on_digits("maps", self._of_digits(), told)

    def ensembles(self) -> dict[str, Any]:
        """Soft labels alone, of pictures that no teacher has seen."""
        s, soft = self.settings, [SoftLabels(temperature=4.0)]

        def told(seed: int) -> tuple[dict[str, nn.Module], Told]:
            good = digits.trained(seed, self._of_digits())
            middling = digits.trained(seed + 100, self._of_digits(pictures=1000, epochs=3))
            bad = {
                "unsure": digits.trained(seed + 200, self._of_digits(pictures=100, epochs=3)),
                "mistaken": mistaken(seed, self._of_digits()),
            }  # fmt: skip
            rows: Told = {"labels": (None, [HardLabels()], []), "best_alone": (good, soft, [])}
            for name, network in bad.items():
                for how, weights in (("mean", "mean"), ("weighted", s.weights), ("adaptive", "adaptive")):
                    rows[f"{name}_{how}"] = (Ensemble([good, middling, network], weights), soft, [])
            return {"good": good, "middling": middling, **bad}, rows

        return self._on_digits("ensembles", self._of_digits(widths=s.small_widths), told)

    def _of_digits(self, **more: Any) -> digits.Training:
        return digits.Training(noise=self.settings.small_noise, side=self.settings.small_side, **more)

    def _on_digits(
        self, part: str, shape: digits.Training, told: Callable[[int], tuple[dict[str, nn.Module], Told]]
    ) -> dict[str, Any]:
        """Accuracy on test digits, by seed and as means, of teachers and of students that all see the same few pictures."""
        s = self.settings
        accuracy: dict[str, list[float]] = {}
        training = Training(
            steps=s.small_steps, batch=s.small_batch, learning_rate=s.small_rate, checks=1, held_back=0.05, warmup=0.1,
            weight_decay=0.01,
        )  # fmt: skip
        kind: dict[str, Any] = {"noise": s.small_noise, "side": s.small_side}
        test = digits.pictures("test", 2000, seed=100, **kind)
        for seed in range(s.seeds):
            shown = digits.pictures("transfer", s.small_pictures, seed, **kind).examples()
            teachers, rows = told(seed)

            def learned(row: str, rows: Told = rows, shown: list[Any] = shown, seed: int = seed) -> float:
                teacher, on_logits, on_features = rows[row]
                losses = Losses(on_logits=on_logits, on_features=on_features)
                network = in_memory.taught_on(digits.build(shape, seed), teacher, losses, shown, training, seed=seed)
                return digits.accuracy(network, test)

            for name, network in teachers.items():
                accuracy.setdefault(f"teacher: {name}", []).append(digits.accuracy(network, test))
            for name in rows:
                found = self._once(f"{part} {seed} {name}", lambda name=name: learned(name))
                accuracy.setdefault(name, []).append(found)
        means = {name: statistics.mean(values) for name, values in accuracy.items()}
        return {"accuracy": accuracy, "means": means, "tested": len(test.labels)}

    def written(self) -> dict[str, Any]:
        """Students go on from a training on the text that all have in common: without one, what they write is noise."""
        s = self.settings
        shown, test = character_model.calibration_windows, character_model.held_out_windows(400, 64)
        begun, longer = (
            Training(steps=n, batch=s.written_batch, learning_rate=s.written_rate, checks=1, held_back=0.02, warmup=0.1)
            for n in (s.written_start, s.written_steps)
        )
        found: dict[str, dict[str, list[float]]] = {}
        for seed in range(s.written_seeds):
            teacher = character_model.trained(seed)
            teacher.generation_config.eos_token_id = None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                student = character_model.build(character_model.Training(blocks=2))
            student.generation_config.eos_token_id = None
            windows = shown(s.written_windows, s.written_length, seed)
            text = Losses(on_logits=[HardLabels()], on_features=())
            in_memory.taught(student, None, text, windows, begun, seed=seed)

            def judged(network: nn.Module, seed: int = seed, teacher: nn.Module = teacher) -> dict[str, float]:
                return {
                    "perplexity": perplexity(network, test, batch_size=50).value,
                    **on_own_texts(network, teacher, test[:, :16], seed),
                }

            def learned(
                lesson: tuple[nn.Module | None, Losses], seed: int = seed, student: nn.Module = student,
                windows: Tensor = windows, judged: Callable[[nn.Module], dict[str, float]] = judged,
            ) -> dict[str, float]:  # fmt: skip
                network = copy.deepcopy(student).requires_grad_(True)
                return judged(in_memory.taught(network, *lesson, windows, longer, seed=seed + 1))

            rows = {"teacher": judged(teacher), "untaught": judged(student)}
            for name, lesson in self._lessons(teacher, seed).items():
                rows[name] = self._once(f"written {seed} {name}", lambda lesson=lesson: learned(lesson))
            for name, row in rows.items():
                for key, value in row.items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)
        means = {name: {key: statistics.mean(v) for key, v in row.items()} for name, row in found.items()}
        return {"rows": found, "means": means, "characters_tested": test.numel()}

    def _lessons(self, teacher: nn.Module, seed: int) -> dict[str, tuple[nn.Module | None, Losses]]:
        """What a student of the character model is taught by, and how; shipped recipes where there is one."""

        def shipped(name: str, **given: float) -> Losses:
            told = {f"{name}.{setting}": value for setting, value in given.items()}
            return losses_of(recipe.read(f"distill-{name}").override(told))

        text, soft = HardLabels(), SoftLabels(temperature=1.0)
        kinds = ("soft-labels", "reverse-kl", "jensen-shannon", "total-variation", "on-policy", "distilbert")
        rows: dict[str, tuple[nn.Module | None, Losses]] = {"text": (None, Losses(on_logits=[text], on_features=()))}
        rows |= {name: (teacher, shipped(name)) for name in kinds}
        rows["on-policy only"] = (teacher, shipped("on-policy", share=1.0))
        rows["distilbert without its cosine"] = (
            teacher, Losses(on_logits=shipped("distilbert").on_logits, on_features=()),
        )  # fmt: skip
        for name, loss in (
            ("tinybert", TinyBERT()), ("hints skip", Hints(blocks="skip")), ("hints learned", Hints(blocks="learned")),
        ):  # fmt: skip
            rows[f"soft and {name}"] = (teacher, Losses(on_logits=[soft], on_features=[loss]))
        rows["soft alone"] = (teacher, Losses(on_logits=[soft], on_features=()))
        ours = character_model.tokenizer()
        for name, (network, theirs) in {
            "reversed alphabet": (reversed_alphabet(teacher), character_model.tokenizer(character_model.ALPHABET[::-1])),
            "other pieces": self._other_pieces(seed),
        }.items():  # fmt: skip
            rows[f"uld, {name}"] = (Translated(network, ours, theirs), shipped("uld"))
        return rows

    def _other_pieces(self, seed: int) -> tuple[nn.Module, Any]:
        """A language model of the same text in pieces of some characters each, and its tokenizer."""
        s = self.settings
        text = "".join(character_model.ALPHABET[i] for i in character_model.rows()[0].tolist())
        tokenizer = pieces_of(text, s.written_tokens)
        row = torch.tensor(tokenizer(text)["input_ids"])
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(row) - s.written_length, (s.written_windows * 4,), generator=generator)
        windows = torch.stack([row[start : start + s.written_length] for start in starts.tolist()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = character_model.build(character_model.Training(), tokens=s.written_tokens)
        losses = Losses(on_logits=[HardLabels()], on_features=())
        training = Training(
            steps=character_model.Training().steps,
            batch=s.written_batch,
            learning_rate=4e-3,
            checks=1,
            held_back=0.02,
            warmup=0.1,
        )
        return in_memory.taught(network, None, losses, windows, training, seed=seed), tokenizer


Told = dict[str, tuple[nn.Module | None, list[Any], list[Any]]]  # row -> teacher, losses on logits, losses on features


def mistaken(seed: int, settings: digits.Training) -> nn.Module:
    """A teacher of digits who has learnt six of the ten classes by each other's names."""
    others = torch.tensor([1, 0, 3, 2, 5, 4, 6, 7, 8, 9])
    shown = digits.pictures("train", settings.pictures, seed, noise=settings.noise, side=settings.side)
    examples = digits.Pictures(pixels=shown.pixels, labels=others[shown.labels]).examples()
    training = Training(
        epochs=settings.epochs, batch=settings.batch, learning_rate=settings.learning_rate, checks=1, held_back=0.01,
        warmup=0.1, weight_decay=digits.WEIGHT_DECAY,
    )  # fmt: skip
    return in_memory.trained_on(digits.build(settings, seed + 300), examples, training, seed=seed)


@torch.no_grad()
def reversed_alphabet(network: nn.Module) -> nn.Module:
    """The character model that knows each character by another number, and says the same."""
    other = copy.deepcopy(network)
    for table in (other.get_input_embeddings(), other.get_output_embeddings()):
        table.weight.copy_(table.weight.flip(0))
    return other


def pieces_of(text: str, count: int) -> Any:
    """A tokenizer of byte pairs, learnt from a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    learning = tokenizers.trainers.BpeTrainer(vocab_size=count, show_progress=False)
    made.train_from_iterator(text.splitlines(keepends=True), learning)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@torch.no_grad()
def on_own_texts(student: nn.Module, teacher: nn.Module, prompts: Tensor, seed: int) -> dict[str, float]:
    """Of 48 characters that a student writes after each prompt, by character: KL(student || teacher), which is that of whole
    texts taken apart, and what the teacher pays for what was written."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        written = student.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=48, do_sample=True, top_k=0, top_p=1.0,
            pad_token_id=0,
        )  # fmt: skip
    start = prompts.shape[1] - 1
    ours, theirs = (n(input_ids=written).logits[:, start:-1].log_softmax(-1) for n in (student, teacher))
    said = theirs.gather(2, written[:, start + 1 :, None])
    return {
        "divergence_on_own_texts": float((ours.exp() * (ours - theirs)).sum(-1).mean()),
        "teacher_nats_on_own_texts": -float(said.mean()),
    }


def numbers(source: models.Source) -> int:
    return sum(math.prod(source.weights.shape(name)) for name in source.weights.names())


def apart(larger: Sequence[float], smaller: Sequence[float]) -> dict[str, float]:
    """By how much, and the standard error of that over the seeds."""
    differences = [a - b for a, b in zip(larger, smaller, strict=True)]
    return {"mean": statistics.mean(differences), "error": statistics.stdev(differences) / math.sqrt(len(differences))}


def share(found: Mapping[str, float], scale: Callable[[float], float]) -> float:
    """Of what was lost by dropping the blocks, what the student has back."""
    whole, untaught, taught = (scale(found[name]) for name in ("whole", "untaught", "taught"))
    return (untaught - taught) / (untaught - whole)


def named(measurements: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(next(one["value"] for one in measurements if one["name"] == name))


def fresh_folder(folder: Path) -> Path:
    """A place where nothing is yet, and no run that was stopped."""
    for old in (folder, partial_of(folder)):
        shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found["part_seconds"] = time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all that have their data, where none is named")
    parser.add_argument("--sst2", type=Path, help="a folder with train.tsv and dev.tsv")
    parser.add_argument("--cifar10", help="CIFAR-10's training split as .parquet")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/distillation.json"))
    given = parser.parse_args()
    bench = Bench(given)
    kept = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"parts": {}}
    lacking = {name for name, where in (("sentences", given.sst2), ("pictures", given.cifar10)) if where is None}
    for part in given.parts or [part for part in PARTS if part not in lacking]:
        found: dict[str, Any] = {}
        bench.goes_on = False
        with timed(found):
            found |= getattr(bench, part)()
        if bench.goes_on:
            del found["part_seconds"]  # of the last run alone
        kept["parts"][part] = found | {"settings": asdict(bench.settings)}
        kept["environment"] = environment.describe(torch.device("cpu"))
        given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
