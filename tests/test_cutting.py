"""Coupled channels taken out for good: the same as zeros, on every architecture, saved, reopened, and gone on with."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import compresslab
import tiny
from compresslab import channels, cutting, models, pipeline, removing
from compresslab.coupling import Coupling, couplings
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.models import Source
from compresslab.plan import make_plan
from compresslab.prune.group_magnitude import GroupMagnitude
from compresslab.prune.taylor import Taylor
from compresslab.recipe import Recipe, parse
from compresslab.solving import Pass
from networks import NETS, Attention, ResNet20

torch.set_num_threads(1)


def some(coupling: Coupling, kinds: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
    """Another share of every group, at random."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in coupling.groups:
        if group.kind in kinds:
            count = max(1, int(group.count * (0.3 + 0.5 * float(torch.rand(1, generator=generator)))))
            keep[group.name] = torch.randperm(group.count, generator=generator)[:count].sort().values
    return keep


def half(coupling: Coupling, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The same share of every group, as configs have it; which ones is left to chance."""
    generator = torch.Generator().manual_seed(3)
    return {
        group.name: torch.randperm(group.count, generator=generator)[: group.count // 2].sort().values
        for group in coupling.groups
        if group.kind in kinds
    }


def normed_over_what_is_left(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Layer norms whose statistics are those of these entries only, in a network whose other entries are zero."""
    for name, module in model.named_modules():
        if name in kept:

            def forward(x: Tensor, module: Any = module, left: Tensor = kept[name]) -> Tensor:
                part = x[..., left]
                eps = getattr(module, "eps", None) or module.variance_epsilon
                if getattr(module, "bias", None) is not None:
                    part = torch.nn.functional.layer_norm(
                        part, (len(left),), module.weight[left], module.bias[left], eps
                    )
                else:
                    part = part * (part.square().mean(-1, keepdim=True) + eps).rsqrt() * module.weight[left]
                return torch.zeros_like(x).index_copy(-1, left, part)

            module.forward = forward  # type: ignore[method-assign]


def masked_norms(coupling: Coupling, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    entries = cutting.entries_left(coupling, keep)
    return {t.rpartition(".")[0]: axes[0] for t, axes in entries.items() if "norm" in t.lower() or "ln_" in t.lower()}


# -- networks of torch alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETS)
def test_what_is_left_is_the_network_with_zeros(name: str, seed: int) -> None:
    net = NETS[name]
    masked, inputs = net.model(), net.inputs(3)
    coupling = couplings(masked, net.inputs())
    keep = some(coupling, ("channels", "heads"), seed)
    cut = net.model()
    cutting.cut_(cut, coupling, keep, net.inputs())
    cutting.mask_(masked, coupling, keep)
    assert sum(p.numel() for p in cut.parameters()) < 0.9 * sum(p.numel() for p in masked.parameters())
    with torch.no_grad():
        torch.testing.assert_close(cut(*inputs), masked(*inputs), rtol=1e-4, atol=1e-4)
        assert float((cut(*inputs) - net.model()(*inputs)).abs().max()) > 1e-3
    again = couplings(cut, net.inputs())
    assert sum(group.count for group in again.groups) <= sum(len(kept) for kept in keep.values()) + sum(
        group.count for group in coupling.groups if group.name not in keep
    )
    assert cutting.macs(again, {}) == cutting.macs(coupling, keep)


def test_an_embedding_is_cut_with_the_norms_over_what_is_left() -> None:
    net = NETS["vit"]
    masked, cut = net.model(), net.model()
    coupling = couplings(masked, net.inputs())
    keep = half(coupling, ("width",))
    cutting.cut_(cut, coupling, keep, net.inputs())
    cutting.mask_(masked, coupling, keep)
    normed_over_what_is_left(masked, masked_norms(coupling, keep))
    with torch.no_grad():
        torch.testing.assert_close(cut(*net.inputs()), masked(*net.inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet-20", "mobilenet", "gated", "grouped", "vit"])
def test_a_module_is_saved_and_reopened(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    model = net.model()
    coupling = couplings(model, net.inputs())
    edits = cutting.cut_(model, coupling, some(coupling, ("channels", "heads", "width")), net.inputs())
    cutting.save(model, edits, tmp_path / "cut")
    opened = cutting.reopen(net.model(seed=5), tmp_path / "cut").eval()
    with torch.no_grad():
        assert torch.equal(opened(*net.inputs()), model(*net.inputs()))
    if name == "resnet-20":
        assert opened.blocks[0].conv1.out_channels == opened.blocks[0].conv1.weight.shape[0] < 8
        program = (
            "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path; from networks import NETS; from compresslab import cutting\n"
            "net = NETS['resnet-20']; model = cutting.reopen(net.make(), Path(sys.argv[2])).eval()\n"
            "print(float(model(*net.inputs()).double().sum()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "cut")],
            capture_output=True,
            text=True,
            check=True,
        )
        with torch.no_grad():
            assert float(done.stdout) == pytest.approx(float(model(*net.inputs()).double().sum()), rel=1e-5)
    with pytest.raises(CompressLabError, match="another class"):
        cutting.reopen(NETS["mlp"].model(), tmp_path / "cut")
    with pytest.raises(CompressLabError, match="holds no module"):
        cutting.reopen(net.model(), tmp_path)


class Fixed(nn.Module):
    """Its code knows how wide it is, where no trace can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(12, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x).reshape(len(x), -1, 12))


class Halved(nn.Module):
    """Splits its channels at a place that a smaller network has elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.cat([x[:, :3] * 2, x[:, 3:]], dim=1))


def test_shapes_in_the_code_are_an_error_and_change_nothing() -> None:
    for model, example in ((Fixed(), torch.randn(2, 5, 12)), (Halved(), torch.randn(3, 4))):
        model.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        coupling = couplings(model, [example])
        keep = {group.name: torch.arange(1, group.count) for group in coupling.groups}
        with pytest.raises(CompressLabError, match="its code has numbers of its own"):
            cutting.cut_(model, coupling, keep, [example])
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_layer_that_would_be_emptied_is_named() -> None:
    coupling = couplings(NETS["mlp"].model(), NETS["mlp"].inputs())
    with pytest.raises(CompressLabError, match="nothing would be left of the 9 channels that 0 makes"):
        cutting.entries_left(coupling, {"0": torch.tensor([], dtype=torch.int64)})


# -- transformers -------------------------------------------------------------------------------------------------------

PLAIN = {  # kinds of units whose number a config can tell, where all blocks lose the same
    **dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "vit"), ("channels", "heads", "width")),
    **dict.fromkeys(("gpt2", "bert"), ("channels",)),
}  # fmt: skip
KINDS = ("channels", "heads", "width")


def source_of(kind: str) -> tuple[Any, Source]:
    model = tiny.make_convnet(kind) if kind in tiny.CONVNETS else tiny.make(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    source = models.find(model)
    source.config.image_size = getattr(source.config, "image_size", tiny.PIXELS)
    return model, source


def batch_of(source: Source) -> dict[str, Tensor]:
    if source.reads_images:
        shape = models.picture_shape(source.config)
        return {"pixel_values": torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))}
    return tiny.token_batches(3)[0]


@pytest.mark.parametrize("unit", KINDS)
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_transformer_without_units_is_the_one_with_zeros(kind: str, unit: str, tmp_path: Path) -> None:
    model, source = source_of(kind)
    coupling = cutting.couplings_of(source)
    keep = half(coupling, [unit])
    if not keep:
        assert (kind, unit) == ("bert", "width")  # what it returns is that wide
        return
    cut = cutting.cut_source(source, coupling, keep)
    assert (cut.edits == ()) == (unit in PLAIN[kind])
    smaller = models.materialise(cut)
    cutting.mask_(model, coupling, keep)
    if unit == "width":
        normed_over_what_is_left(model, masked_norms(coupling, keep))
    batch = batch_of(source)
    with torch.no_grad():
        torch.testing.assert_close(cutting.said(smaller, batch), cutting.said(model, batch), rtol=1e-3, atol=1e-4)
    if not cut.edits:
        smaller.save_pretrained(tmp_path)
        opened = type(model).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(cutting.said(opened, batch), cutting.said(smaller, batch))


def test_a_width_that_transformers_would_not_open_is_told_by_edits() -> None:
    """A config may be set to it in memory, and is refused when it is read from a file: 30 is no multiple of 4 heads."""
    _, source = source_of("llama")
    coupling = cutting.couplings_of(source)
    cut = cutting.cut_source(source, coupling, {"model.embed_tokens": torch.arange(30)})
    assert cut.edits and cut.config.hidden_size == 32 and models.materialise(cut).lm_head.weight.shape[1] == 30


@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_a_convolutional_network_without_channels_is_the_one_with_zeros(kind: str) -> None:
    model, source = source_of(kind)
    coupling = cutting.couplings_of(source)
    keep = some(coupling, KINDS)
    smaller = models.materialise(cutting.cut_source(source, coupling, keep))
    cutting.mask_(model, coupling, keep)
    with torch.no_grad():
        found, wanted = (cutting.said(one, batch_of(source)) for one in (smaller, model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


# -- runs ----------------------------------------------------------------------------------------------------------------


def recipe(*steps: dict[str, Any]) -> Recipe:
    calibration = {"samples": 8, "sequence_length": 16}
    return parse({"name": "smaller", "version": 1, "steps": list(steps), "calibration": calibration}, "smaller")


def run(model: Path, out: Path, *steps: dict[str, Any], data: str | None, fresh_process: bool = False) -> Any:
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        if not fresh_process:
            patch.setattr(fresh, "measure", tiny.fake_measure)
        return pipeline.compress(model, recipe(*steps), data, out=out, measure=False)


def test_a_run_on_a_language_model_ends_in_a_plain_model(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    step = {"method": "taylor", "channel_frac": 0.25, "head_frac": 0.5, "width_frac": 0.25}
    artifact, report = run(model, tmp_path / "out", step, data=text)
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"], config["head_dim"]) == (
        24,
        48,
        1,
        8,
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)
    assert opened.lm_head.weight.shape == (tiny.VOCABULARY, 24)
    assert (
        "of the multiply-accumulates left" in report.model["changed"]
        and "8 of 32 channels of the embedding" in report.model["changed"]
    )


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["resnet", "efficientnet-lite"])
def test_a_run_on_pictures_is_opened_with_its_edits(kind: str, rounded: bool, tmp_path: Path) -> None:
    """Also where it goes on: batch norms folded first, codes afterwards."""
    model = tiny.save_convnet(kind, tmp_path / "model")
    steps: list[dict[str, Any]] = [
        {"method": "group-magnitude", "channel_frac": 0.4, "multiple": 1, "scope": "isomorphic"}
    ]
    if rounded:
        steps = [
            {"method": "batchnorm-folding"},
            *steps,
            {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True},
        ]
    artifact, report = run(model, tmp_path / "out", *steps, data=None, fresh_process=kind == "resnet" and not rounded)
    opened = models.load(artifact.folder)
    before = models.load(model)
    assert sum(p.numel() for p in opened.parameters()) < 0.7 * sum(p.numel() for p in before.parameters())
    assert opened(**tiny.picture_batches(2)[0]).logits.shape == (2, 5)
    assert report.parity.runtime == "compresslab" and report.parity.tensors == len(report.layers)
    sizes = {m.name: m.value for m in report.before}, {m.name: m.value for m in report.after}
    assert sizes[1]["weight_bytes"] < sizes[0]["weight_bytes"]


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_what_has_edits_is_exported_to_onnx(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    make = tiny.save_convnet if kind in tiny.CONVNETS else tiny.save
    units = {"channel_frac": 0.4} | ({"head_frac": 0.5} if kind == "bert" else {})
    step = {"method": "group-magnitude", "multiple": 1, **units}
    artifact, _ = run(make(kind, tmp_path / "model"), tmp_path / "out", step, data=None)
    compresslab.export(artifact.folder, "onnx", out=tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    batch = tiny.picture_batches(2)[0] if kind == "resnet" else tiny.token_batches(2)[0]
    given = batch | ({} if kind == "resnet" else {k: torch.full_like(batch["input_ids"], int(k == "attention_mask"))
                                                 for k in ("attention_mask", "token_type_ids")})  # fmt: skip
    found = session.run(None, {one.name: given[one.name].numpy() for one in session.get_inputs()})[0]
    with torch.no_grad():
        wanted = cutting.said(models.load(artifact.folder, dtype=torch.float32), given)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)


def test_a_module_of_any_class_goes_through_the_same(tmp_path: Path) -> None:
    model = ResNet20(width=4, depth=1).eval()
    example = {"x": torch.zeros(1, 3, 16, 16)}
    batch = {"x": NETS["resnet-20"].inputs(4)[0], "labels": torch.tensor([0, 3, 1, 1])}
    whole = cutting.macs(couplings(model, example), {})
    edits, told = channels.take_out_(model, example, Taylor(channel_frac=0.5, macs_frac=0.6, multiple=1), [batch])
    share = cutting.macs(couplings(model, example), {}) / whole
    assert 0.45 < share <= 0.6 and told[-1] == f"{share:.1%} of the multiply-accumulates left"
    cutting.save(model, edits, tmp_path)
    with torch.no_grad():
        assert torch.equal(cutting.reopen(ResNet20(width=4, depth=1), tmp_path).eval()(batch["x"]), model(batch["x"]))
    with pytest.raises(CompressLabError, match="ResNet20 has no heads"):
        channels.take_out_(ResNet20(), example, GroupMagnitude(head_frac=0.5))


def a_pass(kind: str, **more: Any) -> Pass:
    _, source = source_of(kind)
    source = dataclasses.replace(source, **more)
    batches = [batch_of(source)]
    return Pass(source=source, plan=make_plan(source, ("@outside-blocks",)), batches=batches)


@pytest.mark.parametrize("kind", ["resnet", "bert", "llama-tied"])
def test_a_target_of_operations_is_met_with_no_more_than_it_takes(kind: str) -> None:
    calibration = a_pass(kind)
    method = Taylor(channel_frac=0.5, head_frac=0.0 if kind == "resnet" else 0.5, macs_frac=0.7, multiple=1)
    source, told = removing.removed(calibration, [method])
    share = cutting.macs(cutting.couplings_of(source), {}) / cutting.macs(cutting.couplings_of(calibration.source), {})
    assert 0.5 < share <= 0.7 and f"{share:.1%} of the multiply-accumulates left" in told


def test_what_cannot_be_met_is_said() -> None:
    with pytest.raises(
        CompressLabError, match=r"0.1 of the multiply-accumulates cannot be reached: the closest is 0\.[5-9]"
    ):
        removing.removed(a_pass("llama"), [GroupMagnitude(macs_frac=0.1)])
    with pytest.raises(
        CompressLabError, match=r"would leave none of the 2 heads that model.layers.0.self_attn.q_proj makes"
    ):
        removing.removed(a_pass("llama"), [GroupMagnitude(channel_frac=0, head_frac=0.9)])
    with pytest.raises(CompressLabError, match="has no heads that could be taken out"):
        removing.removed(a_pass("resnet"), [GroupMagnitude(head_frac=0.5)])
    with pytest.raises(CompressLabError, match="has no width that could be taken out: what it returns would lose them"):
        removing.removed(a_pass("bert"), [GroupMagnitude(width_frac=0.5)])
    with pytest.raises(CompressLabError, match="would take out none"):
        removing.removed(a_pass("llama"), [GroupMagnitude(channel_frac=0.01)])
    with pytest.raises(CompressLabError, match="needs calibration data"):
        removing.removed(dataclasses.replace(a_pass("llama"), batches=None), [Taylor()])
