"""What teaching is worth, at sizes that two cores can do: a language model, an encoder, classifiers of texts and of pictures.

    python benchmarks/distillation.py --work FOLDER [--parts ...] [--sst2 FOLDER] [--cifar10 FILE.parquet] [--out FILE]

    language   SmolLM2-135M to 20 of its 30 blocks, those with the most influence on the text, by one `compresslab distill`,
               timed as a process from start to end: perplexity of the whole model, of the blocks alone, and of the student
    text       the same blocks for as many steps on the text alone
    encoder    MiniLM-L6 to 3 blocks on Wikipedia passages: correlation with what people say of pairs of documents, milliseconds;
               the controls: the same blocks untaught, and trained on the same passages for as many steps without the teacher
    features   the same 3 blocks by other losses on features, with few steps: hints by two layer maps, relations of attention, of
               examples, contrast
    sentences  MiniLM-L6 with a head, trained on SST-2 here, to 3 blocks: accuracy; the control learns from the labels alone
    pictures   ResNet-56, trained on CIFAR-10 here, to ResNet-20: accuracy; the control likewise; both also on few pictures
    data_free  a ResNet of digits taught to a narrower one on pictures drawn out of it (DeepInversion): accuracy on real digits;
               the controls: as many pictures of noise, and drawn out without the statistics of batch norms; real digits beside
    stages     the characters' model to half of its neurons, heads and residual stream: perplexity after one cut and after two,
               each by what is loud on text and by the norms of weights, for as many steps in all; fresh weights of that shape
               beside; and after one cut its blocks taught one by one, or by hints first, in place of all at once

An encoder has no loss without a teacher, so its control needs one: two readings of a passage, with other neurons dropped,
shall be nearer to each other than to the other passages of the batch (Gao et al., SimCSE, arXiv 2104.08821).

Quality is that of folders as reloaded from disk, in a process of its own; times are medians over A B A B ..., on one thread, and
their ratio is the median of the pairs' ratios. Parts are kept as they finish, and can be measured again one by one.
"""

from __future__ import annotations

import argparse
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

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from compresslab import data, models, pairing, recipe
from compresslab.course import character_model, digits, encoders, in_memory, own_pictures
from compresslab.course.timing import one_thread
from compresslab.data.labelled import Example
from compresslab.distill.contrastive import Contrastive
from compresslab.distill.deep_inversion import DeepInversion
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.hints import Hints
from compresslab.distill.minilm import MiniLM
from compresslab.distill.relational import Relational
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distilling import distill
from compresslab.features import FeatureTerms
from compresslab.measure import embedding, environment, fresh
from compresslab.measure.perplexity import perplexity
from compresslab.pairing import Losses
from compresslab.plan import OUTSIDE, make_plan
from compresslab.recipe import Training
from compresslab.solving import Pass
from compresslab.staging import parameters_of
from compresslab.students import Shape, student_of, write
from compresslab.training import collate, split, train_

LANGUAGE, ENCODER = "smollm2-135m", "minilm-l6"
WINDOWS, LENGTH = 24, 512  # of the test split
AIM_RECOVERED, AIM_SECONDS = 0.5, 1200.0
AIM_CORRELATION, AIM_FASTER = 0.97, 1.8
BATCHES, TOKENS = (1, 16), 128

PARTS = ("language", "text", "encoder", "features", "sentences", "pictures", "data_free", "stages")


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
    simcse_temperature: float = 0.05
    features_samples: int = 72
    features_window: int = 64
    sentences_epochs: float = 0.34
    sentences_batch: int = 32
    sentences_rate: float = 1e-4
    sentences_temperature: float = 2.0
    pictures: int = 20_000
    few: int = 2_000
    tested: int = 5_000
    side: int = 16
    teacher_steps: int = 400
    pictures_steps: int = 200
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
        chosen, shape = recipe.read("distill-hints").override(given), Shape(layers=3, take="skip")
        folders = {"whole": source.folder, **{name: fresh_folder(self.work / f"encoder-{name}") for name in
                   ("untaught", "taught", "without_teacher")}}  # fmt: skip
        started = time.perf_counter()
        distill(ENCODER, shape, chosen, "wiki", out=folders["taught"], measure=False, device="cpu")
        seconds = {"taught": time.perf_counter() - started}
        student, _ = student_of(source, shape)
        write(student, folders["untaught"])
        examples = pairing.material_of(student, chosen, "wiki", 0).examples
        started = time.perf_counter()
        assert chosen.training is not None
        network = self._without_teacher(student, examples, chosen.training)
        seconds["without_teacher"] = time.perf_counter() - started
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
        times = self._times(models.load(folders["whole"]), models.load(folders["taught"]))
        faster = min(one["times_faster"] for one in times.values())
        return {
            "rows": rows, "of_the_teacher": of_teacher, "times": times, "training_seconds": seconds,
            "steps": chosen.training.steps_for(len(examples) - round(len(examples) * chosen.training.held_back)),
            "aim_met": of_teacher["taught"] >= AIM_CORRELATION and faster >= AIM_FASTER
            and of_teacher["taught"] > of_teacher["without_teacher"],
        }  # fmt: skip

    def _without_teacher(self, student: models.Source, examples: Sequence[Example], training: Training) -> nn.Module:
        """SimCSE: each passage is to find its own second reading among those of its batch."""
        network = models.materialise(student).float().requires_grad_(True)
        network.config.hidden_dropout_prob = 0.1  # as BERT was trained
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        temperature = self.settings.simcse_temperature

        def embedded(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            hidden = model(**batch).last_hidden_state
            return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            first, second = embedded(model, batch), embedded(model, batch)
            return nn.functional.cross_entropy(first @ second.t() / temperature, torch.arange(len(first)))

        scratch = fresh_folder(self.work / "encoder-control-training")
        shown, held_back = split(examples, training.held_back, 0)
        train_(network, shown, training, scratch, held_back=held_back, loss=loss)
        return network.eval()

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
        batch = collate([{"input_ids": one["input_ids"]} for one in shown[: pairing.EXAMPLES_SHOWN]])
        network = models.materialise(student).float()
        pairs = FeatureTerms(network, teacher, losses["hints_similar"], batch, examples=len(shown)).found
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
        shown = [{"input_ids": windows[: pairing.EXAMPLES_SHOWN]}]

        def judged(network: nn.Module) -> float:
            losses, tokens = perplexity(network, test, batch_size=32).parts.sum(axis=0)
            return math.exp(losses / tokens)

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
    """A place where nothing is yet."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found["part_seconds"] = time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sst2", type=Path, help="a folder with train.tsv and dev.tsv")
    parser.add_argument("--cifar10", help="CIFAR-10's training split as .parquet")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/distillation.json"))
    given = parser.parse_args()
    bench = Bench(given)
    kept = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"parts": {}}
    for part in given.parts:
        found: dict[str, Any] = {}
        with timed(found):
            found |= getattr(bench, part)()
        kept["parts"][part] = found | {"settings": asdict(bench.settings)}
        kept["environment"] = environment.describe(torch.device("cpu"))
        given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
