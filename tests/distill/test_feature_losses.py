"""Losses on features: each against its formula in plain loops, and the laws that hold for all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.contract import Feature, FeatureLoss, Heads
from compresslab.distill.attention_transfer import AttentionTransfer
from compresslab.distill.contrastive import Contrastive
from compresslab.distill.distilbert import DistilBERT
from compresslab.distill.early_exits import EarlyExits
from compresslab.distill.flow_of_solution import FlowOfSolution
from compresslab.distill.hints import Hints, hint_loss
from compresslab.distill.minilm import MiniLM
from compresslab.distill.neuron_selectivity import NeuronSelectivity
from compresslab.distill.relational import Relational
from compresslab.distill.tinybert import TinyBERT
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.features import JUDGES, FeatureTerms
from compresslab.measure import fresh
from compresslab.recipe import Training, parse
from compresslab.students import Shape, student_of
from compresslab.training import train_
from oracles import features as oracle

EXAMPLES, POSITIONS = 3, 5
LENGTHS = (5, 3, 2)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted() -> Tensor:
    return torch.arange(POSITIONS) < torch.tensor(LENGTHS)[:, None]


def feature(channels: int, seed: int, mask: Tensor | None = None) -> Feature:
    """Where nothing counts stands something that would be noticed."""
    mask = counted() if mask is None else mask
    values = random(EXAMPLES, POSITIONS, channels, seed=seed)
    return Feature(values=torch.where(mask[..., None], values, 1e3 * (1 + seed)), counted=mask)


def heads(count: int, width: int, seed: int, causal: bool = False) -> Heads:
    made = [random(EXAMPLES, count, POSITIONS, width, seed=10 * seed + i) for i in range(3)]
    made = [torch.where(counted()[:, None, :, None], x, 1e3 * (1 + seed)) for x in made]
    return Heads(queries=made[0], keys=made[1], values=made[2], counted=counted(), is_causal=causal)


def value(loss: FeatureLoss, mine: list[Any], its: list[Any], examples: int = 10) -> tuple[float, Any]:
    torch.manual_seed(0)
    judge = loss.judge(mine, its, examples).double()
    return float(judge(mine, its).detach()), judge


def pictures(channels: int, size: int, seed: int) -> Feature:
    values = random(EXAMPLES, size * size, channels, seed=seed)
    return Feature(values=values, counted=torch.ones(EXAMPLES, size * size, dtype=torch.bool), pixels=(size, size))


def halved(one: Feature) -> list[Any]:
    """Means of squares of four pixels, in loops."""
    size = one.pixels[0]
    return [
        [
            [sum(x[(r + a) * size + c + b][k] for a in (0, 1) for b in (0, 1)) / 4 for k in range(one.values.shape[2])]
            for r in range(0, size, 2)
            for c in range(0, size, 2)
        ]
        for x in one.values.tolist()
    ]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


# -- each against its formula ----------------------------------------------------------------------------------------


def test_hints_are_the_mean_square_through_the_matrix() -> None:
    mine, its = [feature(4, 1), feature(3, 2)], [feature(6, 3), feature(3, 4)]
    found, judge = value(Hints(), mine, its)
    expected = sum(
        oracle.mean_square(*oracle.lists(s.values, t.values, s.counted, matrix.weight.detach()))
        for s, t, matrix in zip(mine, its, judge.projections.each, strict=True)
    )
    assert found == pytest.approx(expected)
    direct, _ = value(Hints(project="needed"), mine[1:], its[1:])
    identity = torch.eye(3, dtype=torch.float64)
    assert direct == pytest.approx(
        oracle.mean_square(*oracle.lists(mine[1].values, its[1].values, counted(), identity))
    )


def test_hints_of_networks_of_ones_own_take_the_last_block_of_each_run() -> None:
    mine, its = [feature(2, seed) for seed in (1, 2)], [feature(3, seed) for seed in (3, 4, 5, 6)]
    matrices = [random(3, 2, seed=seed) for seed in (7, 8)]
    leaves = [one.values.clone().requires_grad_() for one in its]
    found = hint_loss([one.values for one in mine], leaves, [m.requires_grad_() for m in matrices], counted())
    expected = sum(
        oracle.mean_square(*oracle.lists(s.values, t.values, counted(), matrix.detach()))
        for s, t, matrix in zip(mine, (its[1], its[3]), matrices, strict=True)
    )
    assert float(found.detach()) == pytest.approx(expected)
    found.backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert all(matrix.grad is not None and matrix.grad.any() for matrix in matrices)


def test_hints_average_the_larger_picture() -> None:
    mine, its = pictures(2, 2, 1), pictures(2, 4, 2)
    found, _ = value(Hints(project="needed"), [mine], [its])
    everything, identity = [[True] * 4] * EXAMPLES, [[1.0, 0.0], [0.0, 1.0]]
    assert found == pytest.approx(oracle.mean_square(mine.values.tolist(), halved(its), everything, identity))


def test_a_learned_map_compares_with_the_mixture() -> None:
    mine, its = [feature(4, 1)], [feature(4, 2), feature(4, 3)]
    _, judge = value(Hints(blocks="learned", project="needed"), mine, its)
    with torch.no_grad():
        judge.mixing.copy_(torch.tensor([[0.3, -0.9]]))
    share = torch.tensor([0.3, -0.9], dtype=torch.float64).softmax(0)
    mixed = share[0] * its[0].values + share[1] * its[1].values
    identity = torch.eye(4, dtype=torch.float64)
    expected = oracle.mean_square(*oracle.lists(mine[0].values, mixed, counted(), identity))
    found = judge(mine, its)
    assert float(found.detach()) == pytest.approx(expected)
    found.backward()
    assert judge.mixing.grad.abs().sum() > 0


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer_is_its_formula(power: float) -> None:
    mine, its = feature(4, 1), feature(6, 2)
    found, _ = value(AttentionTransfer(power=power), [mine], [its])
    expected = oracle.attention_maps(*oracle.lists(mine.values, its.values, counted()), power)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kernel", ["linear", "poly", "gaussian"])
def test_neuron_selectivity_is_its_formula(kernel: str) -> None:
    mine, its = feature(4, 1), feature(6, 2)
    found, _ = value(NeuronSelectivity(kernel=kernel), [mine], [its])
    assert found == pytest.approx(oracle.discrepancy(*oracle.lists(mine.values, its.values, counted()), kernel))
    shuffled = Feature(values=mine.values[..., [2, 0, 3, 1]], counted=mine.counted)
    assert value(NeuronSelectivity(kernel=kernel), [shuffled], [mine])[0] == pytest.approx(0, abs=1e-12)


def test_flows_are_their_formula() -> None:
    mine, its = [feature(c, c) for c in (2, 3, 4)], [feature(c, 10 + c) for c in (2, 3, 4)]
    found, _ = value(FlowOfSolution(), mine, its)
    s, t = ([x.values.tolist() for x in places] for places in (mine, its))
    assert found == pytest.approx(oracle.flows(s, t, counted().tolist()))


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 2.0), (25.0, 0.0), (0.0, 1.0)])
def test_relations_are_their_formula(distance: float, angle: float) -> None:
    mine, its = feature(4, 1), feature(6, 2)
    found, _ = value(Relational(distance=distance, angle=angle), [mine], [its])
    s, t = (oracle.means(*oracle.lists(x.values, x.counted)) for x in (mine, its))
    assert found == pytest.approx(oracle.relations(s, t, distance, angle))


def test_one_example_has_no_relations() -> None:
    one = Feature(values=random(1, 2, 4, seed=1).requires_grad_(), counted=torch.ones(1, 2, dtype=torch.bool))
    judge = Relational().judge([one], [one], 10)
    judge([one], [one]).backward()
    assert float(judge([one], [one]).detach()) == 0 and not one.values.grad.any()


def test_relations_know_no_rotation_scale_or_shift() -> None:
    mine = feature(4, 1)
    turn = torch.linalg.qr(random(4, 4, seed=3)).Q
    moved = Feature(values=3 * mine.values @ turn + 2, counted=mine.counted)
    assert value(Relational(), [moved], [mine])[0] == pytest.approx(0, abs=1e-12)


def test_contrast_is_its_formula_and_remembers() -> None:
    mine, its = feature(4, 1), feature(6, 2)
    torch.manual_seed(0)
    judge = Contrastive(dimension=3, negatives=7, temperature=0.5).judge([mine], [its], 20).double()
    critic = judge.critics[0]
    assert float(judge([feature(4, 3)], [feature(6, 4)]).detach()) == 0  # nothing is in the memory yet
    assert critic.scales.isnan().all()
    memories = critic.teachers[:3].tolist(), critic.students[:3].tolist()
    found = float(judge([mine], [its]).detach())
    vectors = []
    for one, layer in ((mine, critic.of_student), (its, critic.of_teacher)):
        pooled = oracle.means(*oracle.lists(one.values, one.counted))
        out = [
            [a + b for a, b in zip(oracle.through(layer.weight.tolist(), x), layer.bias.tolist(), strict=True)]
            for x in pooled
        ]
        vectors.append([[v / oracle.dot(x, x) ** 0.5 for v in x] for x in out])
    expected = 0.0
    for anchors, positives, memory in zip(vectors, vectors[::-1], memories, strict=True):
        shares = [math.exp(oracle.dot(a, m) / 0.5) for a in anchors for m in memory]
        z = 20 * math.fsum(shares) / len(shares)
        expected += oracle.contrast(anchors, positives, memory, 0.5, 20, z)
    assert found == pytest.approx(expected)
    assert critic.teachers[3:6].tolist() == [pytest.approx(x) for x in vectors[1]]
    assert int(critic.place) == int(critic.seen) == 6
    judge([mine], [its])
    assert int(critic.place) == 2 and int(critic.seen) == 7  # 9 examples in a ring of 7
    judge.eval()
    before = critic.students.clone()
    judge([mine], [its])
    assert torch.equal(critic.students, before)


def test_contrast_that_tells_nothing_apart_is_what_guessing_costs() -> None:
    """Where all examples are the same, one in N + 1 is the pair, whatever M is; and equal widths begin with one matrix."""
    torch.manual_seed(0)
    same = Feature(values=feature(4, 1).values[:1, :1].expand(3, 1, 4), counted=torch.ones(3, 1, dtype=torch.bool))
    for examples in (20, 2000):
        judge = Contrastive(dimension=3, negatives=7).judge([same], [same], examples).double()
        assert torch.equal(judge.critics[0].of_student.weight, judge.critics[0].of_teacher.weight)
        judge([same], [same])
        found = float(judge([same], [same]).detach())
        assert found == pytest.approx(2 * (math.log(1 + 3) + 3 * math.log(1 + 1 / 3)))


@pytest.mark.parametrize("causal", [False, True])
def test_relations_of_attention_are_their_formula(causal: bool) -> None:
    mine, its = heads(2, 3, 1, causal), heads(2, 4, 2, causal)
    found, _ = value(MiniLM(relations="qk, vv"), [mine], [its])
    expected = 0.0
    for a, b in (("queries", "keys"), ("values", "values")):
        s, t = (tuple(oracle.lists(getattr(x, a), getattr(x, b))) for x in (mine, its))
        expected += oracle.relation_divergence(s, t, counted().tolist(), causal)
    assert found == pytest.approx(expected)


def test_heads_are_cut_anew() -> None:
    """Of 2 heads of 6 channels and 4 of 3: with 3 heads, channels 0 to 3 of all 12 are the first."""
    mine, its = heads(2, 6, 1), heads(4, 3, 2)
    found, _ = value(MiniLM(relations="qq", heads=3), [mine], [its])
    cut = []
    for one in (mine, its):
        whole = [
            [[v for h in range(one.queries.shape[1]) for v in x[h][i]] for i in range(POSITIONS)]
            for x in one.queries.tolist()
        ]
        cut.append([[[row[4 * h : 4 * h + 4] for row in x] for h in range(3)] for x in whole])
    s, t = ((x, x) for x in cut)
    assert found == pytest.approx(oracle.relation_divergence(s, t, counted().tolist(), False))


@pytest.mark.parametrize("causal", [False, True])
def test_tinybert_is_its_formula(causal: bool) -> None:
    mine = [feature(4, 1), feature(4, 2), heads(2, 3, 3, causal)]
    its = [feature(6, 4), feature(6, 5), heads(2, 4, 6, causal)]
    found, judge = value(TinyBERT(embedding=0.5, hidden=2.0, attention=3.0), mine, its)
    first, second = (matrix.weight.detach() for matrix in judge.projections.each)
    s, t = (tuple(oracle.lists(x.queries, x.keys)) for x in (mine[2], its[2]))
    expected = (
        0.5 * oracle.mean_square(*oracle.lists(mine[0].values, its[0].values, counted(), first))
        + 2.0 * oracle.mean_square(*oracle.lists(mine[1].values, its[1].values, counted(), second))
        + 3.0 * oracle.scores_apart(s, t, counted().tolist(), causal)
    )
    assert found == pytest.approx(expected)


def test_distilbert_is_the_cosine() -> None:
    mine, its = feature(4, 1), feature(4, 2)
    found, _ = value(DistilBERT(), [mine], [its])
    assert found == pytest.approx(oracle.cosine(*oracle.lists(mine.values, its.values, counted())))


def test_exits_are_their_formula() -> None:
    features = [feature(4, 1), feature(6, 2), feature(5, 3)]
    logits = Feature(values=random(EXAMPLES, 1, 3, seed=4), counted=torch.ones(EXAMPLES, 1, dtype=torch.bool))
    settings, labels = EarlyExits(soft=0.4, temperature=2.0, hint=0.7), torch.tensor([2, 0, 1])
    torch.manual_seed(0)
    judge = settings.judge([*features, logits], [], 10).double()
    found = float(judge([*features, logits], [], labels).detach())
    pooled = [oracle.means(*oracle.lists(one.values, one.counted)) for one in features]
    expected = 0.0
    for vectors, bottleneck, classifier in zip(pooled[:-1], judge.bottlenecks, judge.classifiers, strict=True):
        seen, said = [], []
        for layer, before, after in ((bottleneck, vectors, seen), (classifier, seen, said)):
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            after += [[a + b for a, b in zip(oracle.through(weight, x), bias, strict=True)] for x in before]
        expected += oracle.exit_loss(
            seen, said, pooled[-1], logits.values[:, 0].tolist(), labels.tolist(), 0.4, 2.0, 0.7
        )
    assert found == pytest.approx(expected)


# -- at work on networks ---------------------------------------------------------------------------------------------

LOSSES: dict[str, Any] = {
    "hints": Hints(project="needed"),
    "hints-learned": Hints(blocks="learned"),
    "attention-transfer": AttentionTransfer(power=4.0),
    "neuron-selectivity": NeuronSelectivity(),
    "flow-of-solution": FlowOfSolution(),
    "relational": Relational(blocks="uniform"),
    "contrastive": Contrastive(dimension=8, negatives=16),
    "minilm": MiniLM(),
    "minilm-v2": MiniLM(relations="qq, kk, vv", heads=2),
    "tinybert": TinyBERT(project="needed"),
    "distilbert": DistilBERT(),
}
WITHOUT_ZERO = ("contrastive", "hints-learned")
KINDS = ("bert", "llama", "gpt2")


def network(kind: str, *, blocks: int = 3, seed: int = 0) -> Any:
    return tiny.make(kind, seed=seed, **({"n_layer": blocks} if kind == "gpt2" else {"num_hidden_layers": blocks}))


def padded(filler: int = 0) -> dict[str, Tensor]:
    ids = tiny.token_batches(4, 6)[0]["input_ids"].clone()
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 5])[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}


def run(
    student: nn.Module, teacher: nn.Module, losses: list[Any], batch: dict[str, Tensor]
) -> tuple[Tensor, FeatureTerms]:
    """The loss of a batch that has been seen once before: what remembers examples has some then."""
    terms = FeatureTerms(student, teacher, losses, batch, examples=40)
    with terms.at_work(student):
        for _ in range(2):
            student(**batch)
            with torch.no_grad():
                teacher(**batch)
            loss = terms.loss()
        return loss, terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, kind: str) -> None:
    teacher = network(kind)
    loss, _ = run(copy.deepcopy(teacher), teacher, [LOSSES[name]], padded())
    assert float(loss.detach()) == pytest.approx(0, abs=2e-6) or name in WITHOUT_ZERO
    other, _ = run(network(kind, seed=1), teacher, [LOSSES[name]], padded())
    assert float(other.detach()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_never_counted(name: str, kind: str) -> None:
    teacher, student = network(kind), network(kind, seed=1)
    found = []
    for filler in (0, 17):
        student.zero_grad()
        loss, _ = run(student, teacher, [LOSSES[name]], padded(filler))
        loss.backward()
        table = student.get_input_embeddings().weight.grad
        assert all(p.grad is None for p in teacher.parameters())
        used = padded()["input_ids"][padded()["attention_mask"].bool()].unique()
        assert table[used].abs().sum() > 0
        absent = torch.ones(len(table), dtype=torch.bool).index_fill_(0, used, False)
        assert float(table[absent].abs().max()) < 1e-7
        found.append(float(loss.detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_networks_stay_as_they_are(kind: str) -> None:
    teacher = network(kind)
    student, _ = student_of(models.find(teacher), Shape(layers=2, take="skip", width=0.5))
    student = models.materialise(student).requires_grad_(True)
    batch = {"pixel_values": random(3, 3, 8, 8, seed=1).float()} if kind == "vit" else padded()
    names, before = [name for name, _ in student.named_modules()], student(**batch)[0]
    losses = [Hints(blocks="skip"), MiniLM(blocks="end", heads=2), Relational()]
    terms = FeatureTerms(student, teacher, losses, batch, examples=10)
    with terms.at_work(student):
        during = student(**batch)[0]
        teacher(**batch)
        terms.loss().backward()
        assert any(name.startswith(JUDGES) for name in student.state_dict())
    assert torch.allclose(during, before, atol=1e-5)
    assert torch.equal(student(**batch)[0], before)
    assert [name for name, _ in student.named_modules()] == names
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any("watcher" in key for m in model.modules() for key in m.__dict__)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_of_them_in_one_recipe(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a last batch of one example."""
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    folder, text = tiny.save(kind, tmp_path / "teacher", num_hidden_layers=3), tiny.write_text(tmp_path / "text.txt")
    names = [name for name in LOSSES if name not in ("hints-learned", "minilm-v2")]
    steps = [{"method": name} | ({"power": 4.0} if name == "attention-transfer" else {}) for name in names]
    settings = {"epochs": 4, "learning_rate": 3e-3, "batch": 4, "held_back": 0.4, "checks": 2}
    raw = {"name": "all", "version": 1, "steps": steps, "calibration": {"samples": 15, "sequence_length": 16}}
    chosen = parse(raw | {"training": settings}, "all")
    artifact, report = distill(str(folder), Shape(layers=2), chosen, str(text), out=tmp_path / "out", measure=False)
    told: Any = report.data
    assert min(map(float, told["training"]["losses"])) < float(told["training"]["loss_before"])
    assert not any(JUDGES in name for name in models.load(artifact.folder).state_dict())


def test_exits_teach_the_early_blocks_and_leave_again() -> None:
    model = tiny.make("vit", num_hidden_layers=4)
    batch = {"pixel_values": random(3, 3, 8, 8, seed=1).float()}
    terms = FeatureTerms(model, model, [EarlyExits(exits=2)], batch, examples=10)
    with terms.at_work(model):
        model(**batch)
        terms.loss(torch.tensor([0, 1, 2])).backward()
    reached = [
        any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in models.blocks(model).values()
    ]
    assert reached == [True, True, True, False]  # nothing is taught back to the deepest
    assert not any(name.startswith(JUDGES) for name in model.state_dict())
    with terms.at_work(model):
        model(**batch)
        with pytest.raises(CompressLabError, match="exits learn from labels"):
            terms.loss()
    for kind, words in (("llama", "exits are for classifiers"), ("bert", "what passes at '@logits' is no feature")):
        with pytest.raises(CompressLabError, match=words):
            FeatureTerms(network(kind), network(kind), [EarlyExits()], padded(), examples=10)
    with pytest.raises(CompressLabError, match="at least two blocks"):
        FeatureTerms(network("bert", blocks=1), network("bert"), [EarlyExits()], padded(), examples=10)


def test_pictures_of_other_sizes_and_channels() -> None:
    teacher, student = tiny.make_convnet("resnet"), tiny.make_convnet("resnet", embedding_size=6, hidden_sizes=[6, 12])
    student.requires_grad_(True)
    batch = tiny.picture_batches(4)[0]
    layers = "resnet.encoder.stages.0:resnet.encoder.stages.0, resnet.encoder.stages.1:resnet.encoder.stages.1"
    losses = [
        Hints(blocks=layers),
        AttentionTransfer(blocks=layers),
        NeuronSelectivity(blocks=layers),
        Relational(blocks=layers),
    ]
    loss, _ = run(student, teacher, losses, batch)
    loss.backward()
    assert float(loss.detach()) > 0 and student.resnet.embedder.embedder.convolution.weight.grad.abs().sum() > 0


def test_hidden_states_come_nearer(tmp_path: Path) -> None:
    teacher = network("llama")
    student = models.materialise(student_of(models.find(teacher), Shape(layers=2, width=0.5))[0]).requires_grad_(True)
    examples = [
        {"input_ids": ids} for ids in torch.randint(3, 200, (32, 6), generator=torch.Generator().manual_seed(1))
    ]
    batch = {"input_ids": examples[0]["input_ids"][None]}
    terms = FeatureTerms(student, teacher, [Hints(blocks="skip", project="needed")], batch, examples=len(examples))

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        model(**inputs)
        with torch.no_grad():
            teacher(**inputs)
        return terms.loss()

    with terms.at_work(student):
        settings = Training(steps=12, batch=8, learning_rate=3e-3, checks=3)
        record = train_(student, examples, settings, tmp_path, held_back=examples[:8], loss=loss)
    assert record.best_step == 12 and record.best_loss < 0.9 * record.losses[0][1]


def test_a_killed_training_goes_on_with_judges_and_memories(tmp_path: Path) -> None:
    teacher = network("bert")
    start, _ = student_of(models.find(teacher), Shape(layers=2, width=0.5))
    examples = [{k: v[0] for k, v in padded().items()} | {"input_ids": ids} for ids in torch.randint(3, 200, (24, 6))]
    settings = Training(steps=6, batch=4, learning_rate=1e-3, checks=3, held_back=0.2)
    losses = [Hints(weight=0.5), Contrastive(dimension=8, negatives=10)]

    def taught(folder: Path, stop: int | None) -> dict[str, Tensor]:
        student = models.materialise(start).requires_grad_(True)
        batch = {key: value[None] for key, value in examples[0].items()}
        terms = FeatureTerms(student, teacher, losses, batch, examples=len(examples))
        steps = [0]

        def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            steps[0] += model.training
            if stop is not None and steps[0] > stop:
                raise KeyboardInterrupt
            model(**inputs)
            with torch.no_grad():
                teacher(**inputs)
            return terms.loss()

        with terms.at_work(student):
            record = train_(student, examples, settings, folder, loss=loss)
        assert record.steps == 6
        return student.state_dict() | {f"judges.{k}": v for k, v in terms.judges.state_dict().items()}

    whole = taught(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path / "killed", 4)
    again = taught(tmp_path / "killed", None)
    assert whole.keys() == again.keys() and any("teachers" in key for key in whole)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Hints(blocks="0:9"), "no block 9 among 3"),
        (Hints(blocks="nowhere:encoder.layer.0"), "no module 'nowhere' to watch"),
        (Hints(blocks="pooler:encoder.layer.0"), "no order in common"),
        (
            DistilBERT(blocks="embeddings.word_embeddings:encoder.layer.0.intermediate.dense"),
            "use hints, which projects",
        ),
        (FlowOfSolution(blocks="end"), "at least two pairs"),
        (MiniLM(heads=5), "cannot be cut into 5 heads"),
        (MiniLM(blocks="embeddings:encoder.layer.0"), "nothing passed through 'embeddings@attention'"),
        (MiniLM(blocks="encoder:encoder"), "more than one attention"),
    ],
)
def test_what_cannot_be_compared_is_said(loss: Any, words: str) -> None:
    teacher = network("bert")
    with pytest.raises(CompressLabError, match=words):
        run(network("bert", seed=1), teacher, [loss], padded())


def test_heads_that_differ_in_number_are_said() -> None:
    teacher, student = network("bert"), tiny.make("bert", num_hidden_layers=3, num_attention_heads=2)
    for loss, words in ((MiniLM(), "set heads, into which"), (TinyBERT(), "set attention to 0")):
        with pytest.raises(CompressLabError, match=words):
            run(student, teacher, [loss], padded())
    assert float(run(student, teacher, [TinyBERT(attention=0.0)], padded())[0].detach()) > 0


def test_batches_that_differ_are_said() -> None:
    teacher, student, batch = network("bert"), network("bert", seed=1), padded()
    terms = FeatureTerms(student, teacher, [Hints()], batch, examples=10)
    with terms.at_work(student):
        student(**batch)
        teacher(**{key: value[:2] for key, value in batch.items()})
        with pytest.raises(CompressLabError, match="has seen 4 examples and the teacher 2"):
            terms.loss()
        with pytest.raises(CompressLabError, match="nothing passed through"):
            terms.loss()


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_teacher_that_was_shown_the_same_examples_in_another_order_is_said(kind: str) -> None:
    teacher, student = network(kind), network(kind, seed=1)
    batch = padded() if kind == "bert" else {"pixel_values": random(4, 3, 8, 8, seed=1).float()}
    turned, copied = (
        {key: change(value) for key, value in batch.items()} for change in (lambda x: x.flip(0), torch.clone)
    )
    terms = FeatureTerms(student, teacher, [Hints()], batch, examples=10)
    words = f"the teacher was not shown the student's {next(iter(batch))}: .*in the same order"
    with terms.at_work(student):
        student(**batch), teacher(**copied)
        assert terms.loss().isfinite()
        student(**batch), teacher(**turned)
        with pytest.raises(CompressLabError, match=words):
            terms.loss()
        student(*batch.values()), teacher(**turned)  # what has no name at the call has one in the network
        with pytest.raises(CompressLabError, match=words):
            terms.loss()


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (Hints, {"blocks": "middle"}, "blocks is uniform"),
        (Hints, {"project": "never"}, "project is always"),
        (Hints, {"weight": 0.0}, "weight must be above 0"),
        (AttentionTransfer, {"power": 0.5}, "power must be"),
        (NeuronSelectivity, {"kernel": "cubic"}, "kernel is linear"),
        (Relational, {"distance": 0.0, "angle": 0.0}, "not both 0"),
        (Contrastive, {"negatives": 0}, "negatives is a positive"),
        (Contrastive, {"temperature": 0.0}, "temperature must be"),
        (MiniLM, {"relations": "qx"}, "relations are pairs"),
        (MiniLM, {"heads": 0}, "heads is a positive"),
        (TinyBERT, {"embedding": 0.0, "hidden": 0.0, "attention": 0.0}, "not all 0"),
        (EarlyExits, {"exits": 0}, "exits is a positive"),
        (EarlyExits, {"soft": 2.0}, "soft is from 0 to 1"),
        (TinyBERT, {"project": "never"}, "project is always"),
    ],
)
def test_settings_that_cannot_be_are_refused(cls: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**settings)
