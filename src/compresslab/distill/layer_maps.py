"""Layer maps: which layer of a teacher a layer of the student stands for.

    uniform  evenly spread from the first layer to the last, both among them
    skip     the last layer of each of equally long runs: TinyBERT's g(m) = (N / M) m, the patient teacher's PKD-skip
    first    the lowest ones
    last     the highest ones: PKD-last

A student copies its layers from these (students.py), and losses that compare layers compare these. What is measured instead: the
layers with the most influence for a student's shape (students.py), similar layers for losses (similar_blocks.py).
"""

from __future__ import annotations

from collections.abc import Sequence

MAPS = ("uniform", "skip", "first", "last")


def chosen(how: str | Sequence[int], count: int, of: int) -> list[int]:
    """`count` of the layers 0 to `of` - 1, ascending.

    Raises:
        ValueError: more layers than there are; no such map; a list that is not ascending, or names a layer there is not.

    >>> chosen("uniform", 3, 6), chosen("skip", 3, 6), chosen("first", 2, 6), chosen("last", 2, 6)
    ([0, 2, 5], [1, 3, 5], [0, 1], [4, 5])
    """
    if not 1 <= count <= of:
        raise ValueError(f"{count} of {of} layers: choose between 1 and {of}")
    if not isinstance(how, str):
        layers = [int(layer) for layer in how]
        if len(layers) != count or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < of:
            raise ValueError(f"layers {layers} are not {count} different ones from 0 to {of - 1}, in rising order")
        return layers
    if how == "uniform":
        return [(2 * i * (of - 1) + count - 1) // (2 * (count - 1)) if count > 1 else of - 1 for i in range(count)]
    if how == "skip":
        return [-(-(i + 1) * of // count) - 1 for i in range(count)]
    if how == "first":
        return list(range(count))
    if how == "last":
        return list(range(of - count, of))
    raise ValueError(f"no layer map '{how}': choose {', '.join(MAPS)}, or list the layers")
