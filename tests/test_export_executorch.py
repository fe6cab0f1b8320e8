"""ExecuTorch: run by its own runtime a .pte computes what torch does, on the artifact's codes, within XNNPACK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compresslab
import tiny
from compresslab import models
from compresslab.deploy import coded_layers, xnnpack_layers
from compresslab.deploy.layouts import read_weights
from compresslab.deploy.xnnpack_layers import DYNAMIC, STATIC
from compresslab.errors import CompressLabError
from compresslab.exporters import executorch as exporter
from compresslab.exporters import executorch_lowering as lowering
from compresslab.exporters.contract import Given
from compresslab.measure import fresh, runtimes
from compresslab.numerics.grid import Grid, round_to_nearest

pytest.importorskip("executorch")

W8 = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
W4 = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
STATIC_INPUTS = {"method": "static", "calibrator": "minmax"}
IDS = torch.randint(3, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "measure", tiny.fake_measure)  # that a fresh process opens artifacts is tested elsewhere
        yield


def exported(folder: Path, out: Path, **options: Any) -> tuple[Path, str]:
    done = compresslab.export(folder, "executorch", out=out / "pte", options=options)
    return done.folder / exporter.MODEL, "\n".join(done.notes)


def opened(pte: Path) -> Any:
    """The method `forward` with the program that holds its memory."""
    return runtimes.runtime("executorch").open(pte.parent, 1)


def run(session: Any, *inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = session.method.execute(inputs)[0]
    return found.clone()


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=tolerance * float(wanted.abs().max()))


def stored(codes: torch.Tensor, bits: int) -> bytes:
    """Codes as XNNPACK has them: bytes, or two to a byte from -8 upwards, the first in the low bits; a convolution's with
    the channels last."""
    if codes.dim() == 4:
        depthwise = codes.shape[1] == 1
        codes = (codes.permute(1, 2, 3, 0) if depthwise else codes.permute(0, 2, 3, 1)).contiguous()
    if bits > 4:
        return codes.contiguous().numpy().tobytes()
    raised = (codes.short() + 8).to(torch.uint8).reshape(-1)
    return (raised[0::2] | raised[1::2] << 4).numpy().tobytes()


def check_codes(artifact: Path, pte: Path, bits: int) -> None:
    """Every layer's codes lie in the file, byte for byte."""
    content = pte.read_bytes()
    skeleton = models.build(models.read_config(artifact))
    layers = dict(read_weights(artifact))
    assert layers
    for name, weight in layers.items():
        shape = models.weight_of(skeleton.get_submodule(name)).shape
        assert stored(weight.codes.reshape(shape), bits) in content, name


def as_xnnpack_computes(artifact: Path) -> Any:
    """The artifact in torch, its inputs rounded as the model runs."""
    model, grids = coded_layers.network(artifact), Given(artifact).grids
    coded: dict[str, Any] = {name: model.get_submodule(name) for name in grids}
    xnnpack_layers.install_(model, coded, grids, dict.fromkeys(grids, DYNAMIC))
    return model


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, None), (5, None), (4, None), (4, 32), (3, 64)])
def test_a_linear_layer_on_each_kind_of_grid(bits: int, group: int | None, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = nn.Linear(128, 8).requires_grad_(False), torch.randn(1, 5, 128)
    weight = round_to_nearest(layer.weight, Grid.of_weights(bits, True, group), torch.bfloat16, "in")
    assert xnnpack_layers.misfit("it", weight, layer) is None and not xnnpack_layers.scale_error(weight)
    ours = xnnpack_layers.XnnpackLayer(coded_layers.CodedLayer(weight, layer), bits, DYNAMIC)
    edge = lowering._edge(torch.export.export(nn.Sequential(ours).eval(), (x,)), None)
    made = lowering.Lowered(edge=edge, ways={}, inputs=("x",), length=0, table_bytes=0, cache_bytes=0, in_float={})
    assert made.delegates == 1 and all(node.delegated for node in made.nodes())
    exporter.write_program(made, tmp_path / exporter.MODEL)
    assert stored(weight.codes, bits) in (tmp_path / exporter.MODEL).read_bytes()
    near(run(opened(tmp_path / exporter.MODEL), x), ours(x), 1e-6)
    near(ours(x), nn.functional.linear(x, weight.dequantize(), layer.bias), 2e-2)


def test_scales_that_bfloat16_rounds_are_told(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path, W4)
    worst = max(xnnpack_layers.scale_error(weight) for _, weight in read_weights(artifact))
    assert 0 < worst < 2**-8  # tiny models are in float32, and so are their scales


# -- decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_with_groups_of_four_bits(tmp_path: Path) -> None:
    """A prompt, then a token at a time; then another text in the same cache, from position 0 on."""
    artifact = tiny.steps_taken(tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path, W4)
    pte, notes = exported(artifact, tmp_path, length=24)
    check_codes(artifact, pte, 4)
    assert "XNNPACK rounds the inputs of 7 of 7 compressed layers" in notes and "cache holds 24 tokens" in notes
    assert "scales of groups in bfloat16: theirs changed by up to 0." in notes
    assert "layers that were not compressed (1) take 25.6 kB in float32, most of all lm_head" in notes
    session, in_float, in_integers = (
        opened(pte),
        models.load(artifact, dtype=torch.float32),
        as_xnnpack_computes(artifact),
    )
    for ids in (IDS, IDS.flip(1)):
        with torch.inference_mode():
            exact, wanted = (model(input_ids=ids).logits for model in (in_float, in_integers))
        found = [run(session, ids[:, :5].contiguous(), torch.arange(5))]
        found += [run(session, ids[:, n : n + 1].contiguous(), torch.tensor([n])) for n in range(5, ids.shape[1])]
        near(torch.stack(found, 1), wanted[:, 4:], 1e-2)
        near(torch.stack(found, 1), exact[:, 4:], 6e-2)
    constants = session.program.method_names
    assert constants >= {"forward", "get_max_seq_len", "get_vocab_size", "use_kv_cache", "get_eos_ids"}
    assert session.program.load_method("get_max_seq_len").execute(())[0] == 24
    assert {p.name for p in pte.parent.iterdir()} >= {"config.json", "tokenizer.json"}
    session.prefill([3, 4, 5, 6])
    made = [session.next, *(session.step() for _ in range(3))]
    assert all(0 <= token < tiny.VOCABULARY for token in made)


def test_an_uncompressed_decoder_gives_the_greedy_tokens_of_generate(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    session = opened(exported(model, tmp_path, length=24)[0])
    session.prefill(IDS[0].tolist())
    made = [session.next, *(session.step() for _ in range(7))]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    wanted = models.load(model, dtype=torch.float32).generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert made == wanted[0, IDS.shape[1] :].tolist()


# -- encoders and vision ---------------------------------------------------------------------------------------------


def test_an_encoder_whose_inputs_have_fixed_ranges(tmp_path: Path) -> None:
    data = tiny.write_text(tmp_path / "text.txt")
    model = tiny.save("bert", tmp_path / "model", num_hidden_layers=1)
    artifact = tiny.steps_taken(model, tmp_path, STATIC_INPUTS, W8, data=data)
    pte, notes = exported(artifact, tmp_path, length=16)
    check_codes(artifact, pte, 8)
    assert "6 of them had a fixed range, 0 float inputs" in notes
    session, opened_by_torch = opened(pte), models.load(artifact, dtype=torch.float32)
    for tokens in (9, 4):
        ids = IDS[:, :tokens].contiguous()
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        with torch.inference_mode():
            wanted = opened_by_torch(input_ids=ids, attention_mask=mask).last_hidden_state
        near(run(session, ids, mask, torch.zeros_like(ids)), wanted, 3e-2)
    given = session.inputs(1, 128)
    assert {name: x.shape for name, x in given.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (1, 16)
    )
    assert session.forward(given)[0].shape == (1, 16, tiny.HIDDEN)


def test_convolutions_with_fixed_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers where the range of the output is known, which every depthwise convolution's is; else rounded anew."""
    seen: list[lowering.Lowered] = []
    lower = lowering.lower
    monkeypatch.setattr(lowering, "lower", lambda *given: seen.append(lower(*given)) or seen[-1])
    data = tiny.write_pictures(tmp_path / "pictures")
    model = tiny.save_convnet("efficientnet-lite", tmp_path / "model")
    steps = ({"method": "batchnorm-folding"}, STATIC_INPUTS | {"symmetric": False}, W8)
    artifact = tiny.steps_taken(model, tmp_path, *steps, data=data, ignore=())
    pte, notes = exported(artifact, tmp_path)
    check_codes(artifact, pte, 8)
    x = torch.randn(1, 3, tiny.PIXELS, tiny.PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = models.load(artifact, dtype=torch.float32)(pixel_values=x).logits
    near(run(opened(pte), x), wanted, 3e-2)
    (lowered,) = seen
    dynamic = {name for name, way in lowered.ways.items() if way == DYNAMIC}
    assert dynamic == {*(f"_blocks.{n}._project_conv" for n in (1, 2, 3, 4)), "_conv_head", "_fc"}
    assert {way for name, way in lowered.ways.items() if name not in dynamic} == {STATIC}
    nodes = lowered.nodes()
    assert all(node.delegated for node in nodes)
    assert all(node.integer for node in nodes if node.macs)
    assert "XNNPACK rounds the inputs of 6 of 17 compressed layers" in notes


def test_a_depthwise_convolution_without_ranges_is_multiplied_out_and_named(tmp_path: Path) -> None:
    settings = {"stages": [[1, 3, 1, 1, 8]]}
    model = tiny.save_convnet("efficientnet-lite", tmp_path / "model", **settings)
    artifact = tiny.steps_taken(model, tmp_path, W8, ignore=("_conv_stem", "_conv_head", "_fc"))
    pte, notes = exported(artifact, tmp_path)
    assert "no integer kernel for 1 compressed layers, first _blocks.0._depthwise_conv" in notes
    x = torch.randn(1, 3, tiny.PIXELS, tiny.PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = models.load(artifact, dtype=torch.float32)(pixel_values=x).logits
    near(run(opened(pte), x), wanted, 3e-2)
    codes = {name: weight.codes for name, weight in read_weights(artifact)}
    content = pte.read_bytes()
    assert stored(codes["_blocks.0._project_conv"].reshape(8, 8, 1, 1), 8) in content
    assert stored(codes["_blocks.0._depthwise_conv"].reshape(8, 1, 3, 3), 8) not in content


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step", "said"),
    [
        ("llama", W4 | {"symmetric": False}, r"has zero points.*symmetric=true, bits=4 group_size=64, or bits=8"),
        ("llama", W8 | {"group_size": 32, "bits": 8}, r"is in 8 bits with groups of 32.*bits=8 group_size=null"),
        ("llama", W4 | {"group_size": 16}, r"has groups of 16, and XNNPACK's are multiples of 32.*group_size=64"),
        ("bert", {"method": "rtn", "format": "fp8-e4m3"}, r"is in number format fp8-e4m3.*format=int"),
        ("gpt2", W8, r"keeps its weight as \[in, out\].*leave it in float"),
    ],
)
def test_grids_that_do_not_fit_are_refused_before_anything_is_written(
    kind: str, step: dict[str, Any], said: str, tmp_path: Path
) -> None:
    one = {"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}
    artifact = tiny.steps_taken(tiny.save(kind, tmp_path / "model", **one), tmp_path, step)
    with pytest.raises(CompressLabError, match=rf"executorch cannot hold .*: layer \S+ .*{said}"):
        exported(artifact, tmp_path)
    assert not (tmp_path / "pte").exists()


def test_convolutions_in_groups_are_refused(tmp_path: Path) -> None:
    model = tiny.save_convnet("efficientnet-lite", tmp_path / "model", stages=[[1, 3, 1, 1, 8]])
    artifact = tiny.steps_taken(model, tmp_path, W4 | {"group_size": 3}, ignore=("*project*", "_conv_head", "_fc"))
    with pytest.raises(CompressLabError, match=r"is a convolution with groups of 3.*bits=8 group_size=null"):
        exported(artifact, tmp_path)


def test_inputs_of_four_bits_are_refused(tmp_path: Path) -> None:
    model = tiny.save("bert", tmp_path / "model", num_hidden_layers=1)
    artifact = tiny.steps_taken(model, tmp_path, {"method": "dynamic", "bits": 4}, W8)
    with pytest.raises(CompressLabError, match=r"rounds its input to 4 bits, and XNNPACK has 8-bit integers"):
        exported(artifact, tmp_path)


def test_caches_that_forget_tokens_and_lengths_without_positions_are_refused(tmp_path: Path) -> None:
    sliding = tiny.save("mistral", tmp_path / "sliding", sliding_window=4, num_hidden_layers=1)
    with pytest.raises(CompressLabError, match=r"sliding windows.*export it to gguf"):
        exported(sliding, tmp_path)
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(CompressLabError, match=rf"length=99, and the network has positions for {tiny.LONGEST} tokens"):
        exported(model, tmp_path, length=99)
    with pytest.raises(CompressLabError, match=r"length=0: give a number of tokens"):
        exported(model, tmp_path, length=0)


def test_an_operator_without_a_kernel_is_named_with_its_layer() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    with pytest.raises(CompressLabError, match=r"ExecuTorch .*linalg_inv"):
        lowering._check_kernels(lowering._edge(torch.export.export(nn.Sequential(Odd()), (torch.eye(3),)), None))


def test_without_the_library_the_install_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.ExecuTorch, "packages", ("executorch", "no_such_module"))
    with pytest.raises(
        CompressLabError, match=r"no_such_module not installed: pip install 'compresslab\[executorch\]'"
    ):
        compresslab.export(tmp_path, "executorch", out=tmp_path / "out")
