"""What a report says of zeros: how many, where, and that they make nothing smaller or faster by themselves.

The layers that a pruner worked on are those with a `sparsity`; the zeros are counted in the weights as they were written
(`nonzero_frac`), after any rounding. Oracle: tests/test_pruning.py counts them in the reloaded model.
"""

from __future__ import annotations

import math

from compresslab.report.plots import plain
from compresslab.report.schema import Layer, Report


def pruned(report: Report) -> list[Layer]:
    return [layer for layer in report.layers if layer.sparsity is not None]


def zeros_frac(report: Report) -> float:
    """Share of zeros among the weights of all pruned layers."""
    sizes = [(math.prod(layer.shape), layer.nonzero_frac) for layer in pruned(report)]
    return 1 - sum(size * share for size, share in sizes) / sum(size for size, _ in sizes)


def claim(report: Report) -> str:
    """A clause for the verdict; empty where nothing was pruned."""
    if not pruned(report):
        return ""
    patterns = {layer.pattern for layer in pruned(report)} - {None}
    form = f" ({', '.join(map(str, sorted(map(str, patterns))))})" if patterns else ""
    return f"{100 * zeros_frac(report):.1f} % of the weights of {len(pruned(report))} layers are zero{form}"


def limits(report: Report) -> list[str]:
    """Lines on zeros for the limits of an artifact."""
    layers = pruned(report)
    if not layers:
        return []
    most, least = min(layers, key=lambda one: one.nonzero_frac), max(layers, key=lambda one: one.nonzero_frac)
    found = [
        f"Zeros by layer: from {100 * (1 - least.nonzero_frac):.1f} % ({plain(least.name)}) to "
        f"{100 * (1 - most.nonzero_frac):.1f} % ({plain(most.name)}); report.json has every layer's."
    ]
    patterns = sorted({str(layer.pattern) for layer in layers} - {"None"})
    stored = "stored and multiplied like any other number"
    if any(layer.pattern is None for layer in layers):
        found.append(
            f"The zeros are anywhere and are {stored}: the mask makes this folder neither smaller nor faster. Removing whole "
            f"heads, neurons or layers does; leaving zeros out of the products gains little on a processor even where "
            "nine of ten weights are zero: `compresslab sparse` measures it on your machine."
        )
    if patterns:
        found.append(
            f"The zeros in the pattern {', '.join(patterns)} are {stored}: the mask makes this folder neither smaller nor "
            "faster as it is. Hardware with sparse matrix units (2:4 on GPUs) is faster after a conversion of its own."
        )
    return found


def is_plain(report: Report) -> bool:
    """Whether the folder is an ordinary model in plain numbers: pruned, and not rounded."""
    steps = report.recipe.get("steps", ())
    return bool(pruned(report)) and not any("bits" in step for step in steps)


def tags(report: Report) -> list[str]:
    """Of the model card."""
    return [*(["pruned"] if pruned(report) else []), *([] if is_plain(report) else ["quantized"])]
