"""A tokenizer as GGUF keeps it: a list of tokens with types, merges or scores, and which rule cuts text before that.

    tokenizer.json -> its family -> tokens, types, merges or scores, special ids, chat template

    byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)   "gpt2": merges, and llama.cpp's name of the splitting rule
    BPE with byte fall-back (Llama 2, Mistral)      "llama": a score for each token, which is minus the number of its merge,
                                                    so that the pairs are merged in the same order
    WordPiece, lower-cased (BERT)                   "bert": words begin with a mark, the pieces after them with nothing

GGUF holds no splitting rule, only names that llama.cpp knows; the name is looked up by the rule itself. Source: llama.cpp's
conversion script. Oracle: llama-cpp-python makes the same tokens of the same text, in tests/test_export_gguf.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab import models
from compresslab.errors import CompressLabError

_GPT2 = "bytes"  # the byte-level step with GPT-2's own expression
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of a pre-tokenizer -> llama.cpp's name for them.
SPLITTING: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_WORDS % "{1,3}",): "llama-bpe",
    (_WORDS % "",): "qwen2",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARK = "\u2581"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        model: GGUF's name of the family: gpt2, llama, bert, or "none".
        splitting: llama.cpp's name of the splitting rule, for gpt2.
        tokens, types: one for each row of the embedding.
        scores: for llama.
    """

    model: str
    splitting: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    space_first: bool = False


def read(folder: Path, rows: int, options: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of a folder, padded to the rows of the embedding.

    Raises:
        CompressLabError: if GGUF has no family for it.
    """
    if options.get("tokenizer") == "none":
        return Vocabulary(model="none")
    if "tokenizer" in options:
        raise CompressLabError(f"tokenizer={options['tokenizer']}: the only choice is none, to leave the tokenizer out")
    path = folder / "tokenizer.json"
    without = "set tokenizer=none to write the model without one (it then takes token ids only)"
    if not path.is_file():
        raise CompressLabError(f"{folder} has no tokenizer.json: {without}")
    stored = json.loads(path.read_text(encoding="utf-8"))
    model = stored["model"]
    kind = model.get("type")
    if kind == "BPE" and model.get("byte_fallback"):
        return _with_scores(stored, rows)
    if kind == "BPE":
        name = options.get("pre_tokenizer") or splitting_of(stored.get("pre_tokenizer"))
        if name is None:
            raise CompressLabError(
                f"the splitting rule in {path} has no name here: set pre_tokenizer to llama.cpp's name of it, or {without}"
            )
        tokens, types = _table(stored, rows, model["vocab"])
        return Vocabulary(model="gpt2", splitting=name, tokens=tokens, types=types)
    if kind == "WordPiece" and (stored.get("normalizer") or {}).get("lowercase", True):
        own = {piece["content"] for piece in stored["added_tokens"]}
        marked = {_whole_word(word, own): number for word, number in model["vocab"].items()}
        tokens, types = _table(stored, rows, marked)
        return Vocabulary(model="bert", tokens=tokens, types=types)
    raise CompressLabError(f"GGUF has no tokenizer of type {kind}{' with capitals' * (kind == 'WordPiece')}: {without}")


def splitting_of(rule: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of a pre-tokenizer, or None if it is not known here."""
    steps = []
    for step in (rule or {}).get("pretokenizers", [rule] if rule else []):
        if step["type"] == "ByteLevel":
            steps += [_GPT2] * step.get("use_regex", True)
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split":
            steps.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return SPLITTING.get(tuple(steps))


def _table(
    stored: Mapping[str, Any], rows: int, vocabulary: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every row's token and type; rows that no token has are padding."""
    import gguf

    kinds = gguf.TokenType
    by_id = {number: (token, kinds.NORMAL) for token, number in vocabulary.items()}
    for added in stored.get("added_tokens", ()):
        by_id[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    found = [by_id.get(number, (f"[PAD{number}]", kinds.UNUSED)) for number in range(rows)]
    return tuple(token for token, _ in found), tuple(int(kind) for _, kind in found)


def _with_scores(stored: Mapping[str, Any], rows: int) -> Vocabulary:
    import gguf

    model = stored["model"]
    tokens, types = _table(stored, rows, model["vocab"])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    rank = {"".join(pair): -float(number) for number, pair in reversed(list(enumerate(pairs, 1)))}
    never = -float(len(pairs) + 1)
    kinds = []
    for token, kind in zip(tokens, types, strict=True):
        if token == model.get("unk_token"):
            kinds.append(int(gguf.TokenType.UNKNOWN))
        else:
            kinds.append(int(gguf.TokenType.BYTE) if _BYTE.fullmatch(token) else kind)
    scores = tuple(rank.get(token, never) for token in tokens)
    first = json.dumps([stored.get("normalizer"), stored.get("pre_tokenizer")], ensure_ascii=False)
    space = '"Prepend"' in first or '"prepend_scheme": "first"' in first or '"prepend_scheme": "always"' in first
    return Vocabulary(model="llama", tokens=tokens, types=tuple(kinds), scores=scores, space_first=space)


def _whole_word(piece: str, own: set[str]) -> str:
    if piece in own:
        return piece
    return piece[2:] if piece.startswith("##") else _MARK + piece


def write(writer: Any, vocabulary: Vocabulary, folder: Path) -> None:
    """Put a tokenizer into the metadata."""
    import gguf

    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "none":
        return
    if vocabulary.splitting:
        writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_first)
    special = gguf.SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    special.add_special_token = _what_is_added(folder)
    special.add_to_gguf(writer, quiet=True)


def _what_is_added(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer itself puts special tokens around a text."""
    tokenizer = models.load_tokenizer(folder, str(folder))
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = bool(whole) and bool(bare) and whole[0] != bare[0]
    after = bool(whole) and bool(bare) and whole[-1] != bare[-1]
    return {"bos": before, "eos": after}
