"""A tiny language model whose tokens are mostly single bytes, so that what it says is mostly no whole characters."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import tiny

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = [("q", other) for other in ALPHABET[:29]]  # GGUF wants a few; the product kernels an even vocabulary
ROWS = 288
CONTEXT = 400
TEMPLATE = (
    "{% for m in messages %}{% if 'no!' in m.content %}{{ raise_exception('none of that') }}{% endif %}"
    "<s>{{ m.role }}:{{ m.content }}{% endfor %}<s>assistant:"
)


def save_model(folder: Path, **more: object) -> Path:
    tiny.make("llama", vocab_size=ROWS, max_position_embeddings=CONTEXT, **more).save_pretrained(folder)
    table = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", *ALPHABET, *map("".join, PAIRS)))}
    made = Tokenizer(tokenizer_models.BPE(table, PAIRS))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def compress(model: Path, out: Path, **settings: object) -> Path:
    from compresslab import pipeline

    with tiny.quick():
        pipeline.compress(model, tiny.recipe("rtn", **settings), None, out=out, measure=False)
    return out
