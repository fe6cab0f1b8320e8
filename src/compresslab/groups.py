"""Groups: what must leave a network together when a neuron or a head does.

A neuron of a feed-forward is a row of the layers that make it (gate and up) and a column of the layer that reads it (down). A
head is rows of query, key and value and columns of the output projection; where several query heads share keys and values, the
unit that can be taken out is such a group of heads, for every query must have its keys.

Which layers play which role is declared here for the common transformer families, by the names that transformers gives them.
What is not declared is no guess: a block whose feed-forward or attention is not found is an error that names it.

    a block's layers -> Group: how many units there are, and which layer reads them
      -> units that stay -> kept_entries: which rows and columns of every tensor stay with them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.models import Source, blocks, is_transposed, linear_layers, matrix_shape
from compresslab.numerics.selection import columns_of

# What makes a feed-forward's neurons, and what reads them; siblings in one module.
FEED_FORWARDS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi
    (("fc1",), "fc2"),  # OPT, ViT, CLIP, Phi-2
    (("c_fc",), "c_proj"),  # GPT-2
    (("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA
    (("lin1",), "lin2"),  # DistilBERT
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),  # T5
)
# Queries, keys and values, and what reads their heads.
ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Mistral, Qwen, Gemma, ViT
    (("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT, CLIP
    (("self.query", "self.key", "self.value"), "output.dense"),  # BERT, RoBERTa, ELECTRA
    (("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT
)
NEURON_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units of one block that one layer reads. Unit i is the i-th `width` of the reader's input channels.

    Attributes:
        kind: "neurons" or "heads".
        count: how many units.
        reader: the layer.
        width: its input channels of one unit.
        rows: layer that makes them -> its output channels of one unit.
    """

    kind: str
    block: str
    count: int
    reader: str
    width: int
    rows: Mapping[str, int]


def groups_of(source: Source, kind: str) -> list[Group]:
    """Every group of "neurons" or "heads" of a network, a block each, in order.

    Raises:
        CompressLabError: a block in which none, or more than one, is found, or one whose heads do not divide its channels.
    """
    skeleton = source.skeleton()
    layers, found = linear_layers(skeleton), []
    for block in blocks(skeleton):
        mine = [name for name in layers if name.startswith(block + ".")]
        read = [_group(source, kind, block, name, layers) for name in mine]
        here = [group for group in read if isinstance(group, Group)]
        if not here and (why := next((said for said in read if isinstance(said, str)), None)) is not None:
            raise CompressLabError(
                f"block {block} of {source.name} ({source.architecture}) has {kind} that cannot be told apart: {why}; leave "
                f"{kind} out of this recipe"
            )
        if len(here) != 1:
            known = ", ".join(reader for _, reader in (FEED_FORWARDS if kind == "neurons" else ATTENTIONS))
            raise CompressLabError(
                f"block {block} of {source.name} ({source.architecture}) has {len(here) or 'no'} places with {kind} that are "
                f"understood (one that is read by {known}): leave {kind} out of this recipe"
            )
        found += here
    if not found:
        raise CompressLabError(f"{source.name} ({source.architecture}) has no repeated blocks to take {kind} from")
    if len({group.count for group in found}) > 1:
        raise CompressLabError(
            f"the blocks of {source.name} differ in how many {kind} they have: that is not understood"
        )
    return found


def _group(source: Source, kind: str, block: str, reader: str, layers: Mapping[str, nn.Module]) -> Group | str | None:
    """The group that this layer reads, if it is a declared reader with its declared producers beside it; or why not."""
    for makers, role in FEED_FORWARDS if kind == "neurons" else ATTENTIONS:
        stem = reader.removesuffix(role)
        named = [stem + maker for maker in makers]
        if reader != stem and stem.endswith(".") and all(name in layers for name in named):
            columns, made = inputs_of(layers[reader]), [outputs_of(layers[name]) for name in named]
            count = columns if kind == "neurons" else key_heads(source.config)
            for name, channels in ((reader, columns), *zip(named, made, strict=True)):
                if channels % count:
                    return f"the {count} heads that have keys do not divide the {channels} channels of {name}"
            rows = {name: rows // count for name, rows in zip(named, made, strict=True)}
            return Group(kind=kind, block=block, count=count, reader=reader, width=columns // count, rows=rows)
    return None


def kept_entries(
    shapes: Mapping[str, Sequence[int]], reader: str, count: int, kept: Tensor
) -> dict[str, tuple[int, Tensor]]:
    """What stays of the tensors around some units when only a few of these do.

    What is left says what the whole would with zeros in the place of the others. Every layer but the reader makes
    the units, and a unit is one of `count` equal parts of its outputs, all neighbours. So with grouped queries, where units
    are counted by their keys, its part of the queries is as many heads as read one key.

    Args:
        shapes: of every tensor by name: [out, in] of "q_proj.weight", [out] of "q_proj.bias", and so on.
        reader: the layer that reads the units, such as "o_proj".
        count: how many units there are.
        kept: int64, those that stay, ascending.

    Returns:
        tensor -> (axis, int64 of what stays along it, ascending), for every tensor that loses something.
    """
    entries = {}
    for tensor, shape in shapes.items():
        layer, _, leaf = tensor.rpartition(".")
        if layer == reader and leaf == "bias":
            continue  # added once, to the sum over all units
        axis = 1 if layer == reader else 0
        entries[tensor] = axis, columns_of(kept, shape[axis] // count)
    return entries


def key_heads(config: Any) -> int:
    """How many heads of keys and values an attention has."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def outputs_of(module: nn.Module) -> int:
    return matrix_shape(module)[1 if is_transposed(module) else 0]


def inputs_of(module: nn.Module) -> int:
    return matrix_shape(module)[0 if is_transposed(module) else 1]


def with_units(config: Any, kind: str, before: int, after: int) -> Any:
    """A config whose network has `after` units in every block. It is changed.

    Raises:
        CompressLabError: if the architecture has no number for that.
    """
    if kind == "neurons":
        keys = [key for key in NEURON_KEYS if getattr(config, key, None) == before]
        if not keys and getattr(config, "n_inner", 0) is None:  # GPT-2: None stands for four times the width
            keys = ["n_inner"]
        if len(keys) != 1:
            raise CompressLabError(f"no number in {type(config).__name__} says how many neurons a feed-forward has")
        setattr(config, keys[0], after)
        return config
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = after
    config.num_attention_heads = heads // before * after
    return config
