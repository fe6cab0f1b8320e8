"""GPTQ's and AWQ's tensors decoded one bit at a time, in Python's own integers."""

from __future__ import annotations

from torch import Tensor

AWQ_CHANNEL = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this output channel of its eight


def _bits(words: list[int], bits: int, count: int) -> list[int]:
    """`count` numbers from a stream of 32-bit words, lowest bit first."""
    stream = [word % 2**32 >> place & 1 for word in words for place in range(32)]
    return [sum(stream[j * bits + k] << k for k in range(bits)) for j in range(count)]


def gptq(tensors: dict[str, Tensor], bits: int, checkpoint: str) -> list[list[float]]:
    """W [out][in]."""
    channels, out = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    groups = tensors["g_idx"].tolist()
    scales = tensors["scales"].tolist()
    zeros = [_bits(row, bits, out) for row in tensors["qzeros"].tolist()]
    less = 1 if checkpoint == "gptq" else 0
    columns = tensors["qweight"].t().tolist()
    return [
        [
            scales[groups[j]][o] * (u - zeros[groups[j]][o] - less)
            for j, u in enumerate(_bits(columns[o], bits, channels))
        ]
        for o in range(out)
    ]


def _awq_row(words: list[int]) -> list[int]:
    row = [0] * (8 * len(words))
    for at, word in enumerate(words):
        for nibble, channel in enumerate(AWQ_CHANNEL):
            row[8 * at + channel] = word % 2**32 >> 4 * nibble & 15
    return row


def awq(tensors: dict[str, Tensor], group_size: int) -> list[list[float]]:
    """W [out][in]."""
    scales = tensors["scales"].tolist()
    zeros = [_awq_row(words) for words in tensors["qzeros"].tolist()]
    rows = [_awq_row(words) for words in tensors["qweight"].tolist()]
    out = len(rows[0])
    return [
        [scales[j // group_size][o] * (rows[j][o] - zeros[j // group_size][o]) for j in range(len(rows))]
        for o in range(out)
    ]
