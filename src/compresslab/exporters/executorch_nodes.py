"""The operators of a graph that was lowered to ExecuTorch, as data: what each is, from which layer, and how much it does.

    fx.Node of the edge dialect -> Node(operator, layer, delegated, macs, integer)

Oracle: multiply-accumulates by hand, and the counts of ExecuTorch's devtools (tests/test_mobile.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

_PRODUCTS = ("aten.linear", "aten.mm", "aten.bmm", "aten.addmm", "aten.convolution")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of the lowered graph.

    Attributes:
        operator: as ExecuTorch calls it, e.g. "aten.index_put".
        layer: the module it comes from; "" for what lies outside of all.
        delegated: whether XNNPACK runs it.
        macs: multiply-accumulates, at the number of tokens that was asked for.
        integer: whether they are of integers.
    """

    operator: str
    layer: str
    delegated: bool
    macs: int = 0
    integer: bool = False


def is_operator(node: fx.Node) -> bool:
    """Whether a node computes a tensor: of the edge dialect, or the few that ExecuTorch leaves in torch's own."""
    if node.op != "call_function":
        return False
    is_aten = isinstance(node.target, torch._ops.OpOverload) and not str(node.target).startswith("aten.sym_")
    return is_aten or hasattr(node.target, "to_out_variant")


def operator(node: fx.Node) -> str:
    """What ExecuTorch calls it."""
    target: Any = node.target
    name = target.__name__ if hasattr(target, "to_out_variant") else target
    return str(name).removesuffix(".default")


def layer(node: fx.Node) -> str:
    """The module that a node comes from, as the network names it."""
    stack = node.meta.get("nn_module_stack") or {}
    name = str(list(stack.values())[-1][0]) if stack else ""
    return "" if name == "model" or name.startswith("_empty") else name.removeprefix("model.")


def read(node: fx.Node, delegated: bool, tokens: int) -> Node:
    """A node as data; its multiply-accumulates with the number of tokens put in."""
    name = operator(node)
    if name not in _PRODUCTS:
        return Node(operator=name, layer=layer(node), delegated=delegated)
    first, second = (1, 2) if name == "aten.addmm" else (0, 1)
    weight: Any = node.args[second]
    left, right = (_sizes(cast("fx.Node", node.args[i]).meta["val"], tokens) for i in (first, second))
    depth = left[-1]
    if name == "aten.convolution":
        depth = 1
        for size in right[1:]:
            depth *= size
    out = 1
    for size in _sizes(node.meta["val"], tokens):
        out *= size
    integer = (
        "dequantize" in operator(weight) if isinstance(weight, fx.Node) and weight.op == "call_function" else False
    )
    return Node(operator=name, layer=layer(node), delegated=delegated, macs=out * depth, integer=integer)


def _sizes(value: torch.Tensor, tokens: int) -> Sequence[int]:
    """A shape with the number of tokens put in."""
    sizes = []
    for size in value.shape:
        expression: Any = size.node.expr if isinstance(size, torch.SymInt) else None
        sizes.append(
            int(size) if expression is None else int(expression.subs(dict.fromkeys(expression.free_symbols, tokens)))
        )
    return sizes
