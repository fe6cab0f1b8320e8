"""Text that a language model writes: greedily, after prompts, for BLEU and ROUGE against references.

prompts -> batches of like length, filled up on the left (on the right for a seq2seq model, whose decoder starts anew) ->
model.generate, the likeliest token each time -> what stands after the prompt, without special tokens.
Oracle: one prompt at a time, the likeliest token of a forward without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.errors import CompressLabError

BATCH = 8


def write(model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int) -> list[str]:
    """What the model writes after each prompt: up to `new_tokens` tokens, or to its own end.

    Raises:
        CompressLabError: if a prompt leaves too little of what the model can read.
    """
    two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    rows: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    check(model.config, rows, new_tokens)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [""] * len(rows)
    for start in range(0, len(rows), BATCH):
        picked = by_length[start : start + BATCH]
        inputs = _filled([rows[i] for i in picked], left=not two_sided, device=next(model.parameters()).device)
        written = _generate(model, tokenizer, inputs, new_tokens)
        if not two_sided:
            written = written[:, inputs["input_ids"].shape[1] :]
        for i, row in zip(picked, written.tolist(), strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return found


def check(config: Any, rows: Sequence[Sequence[int]], new_tokens: int) -> None:
    """CompressLabError if one of the rows of token ids, with what is to be written, is more than the model reads."""
    if new_tokens < 1:
        raise CompressLabError(f"--new-tokens {new_tokens}: at least 1")
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    longest = getattr(config, "max_position_embeddings", None)
    number, row = max(enumerate(rows, 1), key=lambda pair: len(pair[1]))
    needs = len(row) + (0 if two_sided else new_tokens)
    if longest and needs > longest:
        more = "" if two_sided else f" and {new_tokens} to write"
        raise CompressLabError(
            f"prompt {number} has {len(row)} tokens{more}, more than the {longest} that the model reads: shorten it"
            + ("" if two_sided else ", or take fewer --new-tokens")
        )


def _filled(rows: list[list[int]], *, left: bool, device: torch.device) -> dict[str, Tensor]:
    """A batch with its mask; the filling is token 0, which the mask hides."""
    longest = max(map(len, rows))

    def padded(row: list[int], rest: list[int]) -> list[int]:
        return rest + row if left else row + rest

    ids = [padded(row, [0] * (longest - len(row))) for row in rows]
    mask = [padded([1] * len(row), [0] * (longest - len(row))) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _generate(model: Any, tokenizer: Any, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
    """[rows, tokens]. What a model's generation_config asks of sampling is set aside: greedy text is the same every time."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end] if end is not None else []
    filling = next(
        (one for one in (model.generation_config.pad_token_id, tokenizer.pad_token_id, *ends) if one is not None), 0
    )
    with torch.inference_mode():
        found: Tensor = model.generate(
            **inputs, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            max_new_tokens=new_tokens, pad_token_id=filling,
        )  # fmt: skip
    return found
