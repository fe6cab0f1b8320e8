"""The language model of every lab at micro scale: 0.2 million parameters, trained on the spot on the manual of Python.

A larger one of 0.5 million is for a lab that has to train its network anew for every row.

topics of the interpreter's own manual (`pydoc_data`, so no network) -> characters -> windows -> a Llama of four blocks that was
trained for some seconds. It is kept in the cache folder by seed and settings, so a second lab does not train it again.

The manual is split by topic: the last fifth of the topics, in an order that depends on nothing, is the test text.
Oracle: the perplexity of a model that knows only how often each character occurs (tests/course/test_lab_3_3.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import pydoc_data.topics as manual
import random
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresslab.wheels import cache_home

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
TEST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the character model is made."""

    hidden: int = 64
    intermediate: int = 192
    blocks: int = 4
    steps: int = 300
    batch: int = 32
    window: int = 64
    learning_rate: float = 4e-3


# What the labs call these models.
SIZES = {
    "characters": Training(),
    "characters-500k": Training(hidden=96, intermediate=288, steps=1000, window=128, learning_rate=3e-3),
}


@cache
def rows() -> tuple[Tensor, Tensor]:
    """Character ids, int64 [n], of the training text and of the test text."""
    topics = sorted(manual.topics)
    random.Random(0).shuffle(topics)
    kept = round(len(topics) * (1 - TEST_SHARE))
    place = {character: i for i, character in enumerate(ALPHABET)}

    def ids(names: list[str]) -> Tensor:
        text = "\n".join(str(manual.topics[name]) for name in names)
        return torch.tensor([place[c] for c in text if c in place])

    return ids(topics[:kept]), ids(topics[kept:])


def held_out_windows(count: int, length: int) -> Tensor:
    """int64 [count, length], spread evenly over the test text; always the same."""
    row = rows()[1]
    starts = torch.linspace(0, len(row) - length, count).long()
    return torch.stack([row[start : start + length] for start in starts.tolist()])


def calibration_windows(count: int, length: int, seed: int) -> Tensor:
    """int64 [count, length], drawn from the training text."""
    return _drawn(torch.Generator().manual_seed(10_000 + seed), count, length)


def _drawn(generator: torch.Generator, count: int, length: int) -> Tensor:
    row = rows()[0]
    starts = torch.randint(0, len(row) - length, (count,), generator=generator)
    return torch.stack([row[start : start + length] for start in starts.tolist()])


def build(settings: Training, *, tokens: int = len(ALPHABET)) -> nn.Module:
    """The untrained network; of so many tokens."""
    config = transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.blocks, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(seed: int, settings: Training | None = None) -> nn.Module:
    """The model of this seed, float32, in eval mode: from the cache, or trained now."""
    settings = settings or Training()
    path = _cached_as(seed, settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(settings)
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        _train_(model, seed, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{random.getrandbits(32):08x}")
        save_file(model.state_dict(), partial)
        partial.replace(path)
    return model.eval().requires_grad_(False)


def save(model: nn.Module, folder: Path) -> None:
    """The model as a folder that transformers opens, with a tokenizer of one token per character, for tools that want one."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)


def tokenizer(alphabet: str = ALPHABET) -> transformers.PreTrainedTokenizerFast:
    """Of one token per character, numbered as they stand."""
    table = {character: i for i, character in enumerate(alphabet)}
    spelled = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token=" "))
    spelled.decoder = tokenizers.decoders.Fuse()  # without one, a blank comes between any two tokens
    spelled.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled, eos_token="\n", pad_token="\n", model_max_length=256
    )


def _cached_as(seed: int, settings: Training) -> Path:
    text = hashlib.sha256(rows()[0].numpy().tobytes()).hexdigest()
    key = json.dumps([asdict(settings), seed, text, torch.__version__], sort_keys=True)
    return cache_home() / "labs" / f"characters-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _train_(model: nn.Module, seed: int, settings: Training) -> None:
    """AdamW with a linear warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    for step in range(settings.steps):
        share = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        ids = _drawn(generator, settings.batch, settings.window)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
