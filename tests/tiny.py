"""Tiny models, tokenizers and texts, made on the spot: random weights, real architectures, no network."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from compresslab import layerwise, models, preflight
from compresslab.architectures import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from compresslab.contract import Solver
from compresslab.deploy.compressed_tensors import Layout
from compresslab.measure import fresh
from compresslab.plan import Unit, make_plan
from compresslab.quantize.gptq import GPTQ
from compresslab.recipe import Recipe, parse
from compresslab.solving import BlockState, Job, Solved

VOCABULARY = 200
HIDDEN = 32
LONGEST = 64  # max_position_embeddings
SPECIAL = ("[PAD]", "[UNK]", "[EOS]")


# --- text ----------------------------------------------------------------------------------------------------------


def words() -> list[str]:
    """Made-up words, the same ones every time."""
    rng = random.Random(1)
    found: dict[str, None] = {}
    while len(found) < VOCABULARY - len(SPECIAL):
        found["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))] = None
    return list(found)


def write_text(path: Path, count: int = 6000, seed: int = 0) -> Path:
    """A text file of `count` words in lines of ten, so that every split has its share."""
    rng = random.Random(seed)
    known = words()
    chosen = [known[min(int(rng.expovariate(1 / 40)), len(known) - 1)] for _ in range(count)]
    lines = [" ".join(chosen[i : i + 10]) for i in range(0, count, 10)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of exactly these words, as AutoTokenizer opens it."""
    table = {word: i for i, word in enumerate((*SPECIAL, *words()))}
    made = Tokenizer(tokenizer_models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=LONGEST
    ).save_pretrained(folder)


# --- models --------------------------------------------------------------------------------------------------------

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _llama(**more: Any) -> nn.Module:
    settings = {**_DECODER, "tie_word_embeddings": False, **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def _mistral(**more: Any) -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**_DECODER, "sliding_window": None, **more}))


def _qwen2(**more: Any) -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**_DECODER, **more}))


def _gpt2(**more: Any) -> nn.Module:
    settings = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": LONGEST}
    ends = {"bos_token_id": None, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **ends, **more}))


def _bert(**more: Any) -> nn.Module:
    settings = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, **more}
    return transformers.BertModel(transformers.BertConfig(**settings))


def _vit(**more: Any) -> nn.Module:
    settings = {**_ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 5, **more}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings))


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "llama": _llama,
    "llama-tied": lambda **more: _llama(tie_word_embeddings=True, **more),
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
}
ARCHITECTURES = tuple(_MAKERS)


def make(kind: str, *, seed: int = 0, **more: Any) -> Any:
    """A tiny random model, float32, in eval mode. Weights are larger than usual, so that every layer has a say."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MAKERS[kind](initializer_range=0.2, **more)
    return model.eval()


def save(kind: str, folder: Path, *, seed: int = 0, **more: Any) -> Path:
    """A tiny model's folder, with a tokenizer unless it is a vision model."""
    make(kind, seed=seed, **more).save_pretrained(folder)
    if kind != "vit":
        save_tokenizer(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a model's weights after `change` has worked on the dict of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; the value ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


def token_batches(samples: int, length: int = 16, *, size: int | None = None, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random token ids in batches of `size` (all in one if None); the same ids whatever the size."""
    ids = torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(size or samples)]


# --- convolutional networks and pictures ---------------------------------------------------------------------------

PIXELS = 16


def _efficientnet_lite(**more: Any) -> nn.Module:
    stages = [[1, 3, 1, 1, 10], [2, 3, 2, 2, 12], [2, 5, 1, 2, 12]]
    settings = {
        "stages": stages,
        "stem_channels": 8,
        "head_channels": 16,
        "image_size": PIXELS,
        "num_labels": 5,
        **more,
    }
    return EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**settings))


def _resnet(**more: Any) -> nn.Module:
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**{**settings, **more}))


def _mobilenet(**more: Any) -> nn.Module:
    settings = {"depth_multiplier": 0.25, "image_size": PIXELS, "num_labels": 5, **more}
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**settings))


_CONVNETS: dict[str, Callable[..., nn.Module]] = {
    "efficientnet-lite": _efficientnet_lite,
    "resnet": _resnet,
    "mobilenet": _mobilenet,
}
CONVNETS = tuple(_CONVNETS)


def make_convnet(kind: str, *, seed: int = 0, **more: Any) -> Any:
    """A tiny random convolutional network whose batch norms have seen something, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _CONVNETS[kind](**more)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias, 0.3, 0.5)
    return model.eval().requires_grad_(False)


def save_convnet(kind: str, folder: Path, *, seed: int = 0, **more: Any) -> Path:
    """Its folder, with a preprocessor_config.json."""
    make_convnet(kind, seed=seed, **more).save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    settings = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": True, "crop_size": size,
                "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def picture_batches(samples: int, *, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random smooth pictures in batches."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 3, PIXELS // 4, PIXELS // 4, generator=generator)
    pictures = nn.functional.interpolate(coarse, size=PIXELS, mode="bilinear")
    return [{"pixel_values": part} for part in pictures.split(size)]


def write_pictures(folder: Path, *, classes: int = 5, each: int = 8, seed: int = 0) -> Path:
    """A folder of PNG files, one sub-folder for each class, named by its number."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number in range(each):
            coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            picture = Image.fromarray(coarse.numpy()).resize((PIXELS + 4, PIXELS + 4), Image.Resampling.BILINEAR)
            picture.save(folder / str(label) / f"{number:03d}.png")
    return folder


# --- recipes and runs ----------------------------------------------------------------------------------------------


def recipe(method: str = "gptq", *, samples: int = 8, length: int = 16, ignore: Sequence[str] = ("@outside-blocks",),
           **settings: Any) -> Recipe:  # fmt: skip
    """A small recipe: 4 bits in groups of 16."""
    step = {"method": method, "bits": 4, "group_size": 16, "symmetric": False, **settings}
    raw = {"name": "tiny", "version": 1, "steps": [step], "ignore": list(ignore),
           "calibration": {"samples": samples, "sequence_length": length}}  # fmt: skip
    return parse(raw, "tiny")


def teaching_recipe(*steps: dict[str, Any], samples: int = 12, length: int = 16, **training: Any) -> Recipe:
    """A recipe whose steps are losses, for a few texts."""
    settings = {"steps": 4, "learning_rate": 1e-3, "batch": 4, "held_back": 0.2, "checks": 2} | training
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "training": settings,
           "calibration": {"samples": samples, "sequence_length": length}}  # fmt: skip
    return parse(raw, "tiny")


@dataclass
class MemorySink:
    """A layerwise.Sink that keeps everything."""

    solved: dict[str, Solved] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)

    def is_done(self, unit: str) -> bool:
        return unit in self.units

    def write(
        self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor],
        state: BlockState | None,
    ) -> None:  # fmt: skip
        self.units.append(unit.name)
        self.solved |= solved
        self.floats |= floats

    def last_state(self, units: Sequence[str]) -> BlockState:
        raise AssertionError("nothing is ever finished beforehand here")

    def codes(self) -> dict[str, Tensor]:
        return {name: found.weight.codes for name, found in self.solved.items()}


def solve(
    model: Path | nn.Module, batches: list[dict[str, Tensor]] | None, *, solver: Solver | None = None,
    ignore: Sequence[str] = ("@outside-blocks",), **more: Any,
) -> MemorySink:  # fmt: skip
    """Run the driver in float32 and hand back what it wrote."""
    source = models.find(model)
    plan = make_plan(source, ignore)
    solvers = dict.fromkeys(plan.layers, solver or GPTQ(group_size=16))
    sink = MemorySink()
    job = Job(
        source=source, plan=plan, method="gptq", solvers=solvers, batches=batches,
        sink=sink, encode=Layout(solvers).encode, compute_dtype=torch.float32, gram_precision="float32",
    )  # fmt: skip
    layerwise.run(replace(job, **more))
    return sink


def agreement(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Share of equal codes over all layers, which must be the same ones in both."""
    assert a.keys() == b.keys()
    return sum(int((a[k] == b[k]).sum()) for k in a) / sum(v.numel() for v in a.values())


def fake_measure(job: fresh.Job) -> fresh.Result:
    """What a fresh process would say of a sound artifact, without starting one."""
    return fresh.Result(measurements=(), weights_compared=len(job.weights_xxh3), weights_differing=())


@contextmanager
def unmeasured() -> Iterator[None]:
    """No fresh process: what an artifact is to a reader is not what is asked, and each costs six seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "measure", fake_measure)
        yield


def steps_taken(
    model: Path,
    folder: Path,
    *steps: dict[str, Any],
    data: Path | None = None,
    ignore: Sequence[str] = ("@outside-blocks",),
) -> Path:
    """An artifact of a model's folder by these steps, not measured."""
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "ignore": list(ignore),
           "calibration": {"samples": 8, "sequence_length": 16}}  # fmt: skip
    from compresslab import pipeline

    out = folder / "artifact"
    with unmeasured():
        pipeline.compress(model, parse(raw, "tiny"), None if data is None else str(data), out=out, measure=False)
    return out


def compressed(kind: str, folder: Path, *, method: str = "rtn", **settings: Any) -> Path:
    """An artifact of a tiny random model, in `folder/artifact`; the model is in `folder/model`."""
    from compresslab import pipeline

    model = save(kind, folder / "model")
    data = str(write_text(folder / "text.txt")) if method != "rtn" else None
    with quick(), unmeasured():
        pipeline.compress(model, recipe(method, **settings), data, out=folder / "artifact", measure=False)
    return folder / "artifact"


@contextmanager
def quick() -> Iterator[None]:
    """One thread and no measured rates: for networks this small, waking a second thread takes longer than the work."""
    threads, kernels = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "rates", lambda device: (1e11, 1e11, 1e11))
        yield
    torch.set_num_threads(threads)
    numba.set_num_threads(kernels)


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """The `compresslab` command in this process: exit code, standard output, standard error."""
    from compresslab import cli

    monkeypatch.setattr(sys, "argv", ["compresslab", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    said = capsys.readouterr()
    return code, said.out, said.err
