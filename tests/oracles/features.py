"""Oracles for losses on features: the formulas as loops over examples, positions, channels and heads, in Python's own floats.

Features are [examples][positions][channels] and counted [examples][positions], as nested lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def lists(*tensors: Tensor) -> list[Any]:
    return [tensor.double().tolist() if tensor.is_floating_point() else tensor.tolist() for tensor in tensors]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def through(matrix: Any, x: Sequence[float]) -> list[float]:
    return [dot(row, x) for row in matrix]


def mean_square(s: Any, t: Any, counted: Any, matrix: Any) -> float:
    """Hints, and TinyBERT's hidden states: of matrix s - t over everything that counts."""
    found = [
        (a - b) ** 2
        for one, other, keep in zip(s, t, counted, strict=True)
        for x, y, kept in zip(one, other, keep, strict=True)
        if kept
        for a, b in zip(through(matrix, x), y, strict=True)
    ]
    return math.fsum(found) / len(found)


def cosine(s: Any, t: Any, counted: Any) -> float:
    """DistilBERT."""
    found = [
        1 - dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))
        for one, other, keep in zip(s, t, counted, strict=True)
        for x, y, kept in zip(one, other, keep, strict=True)
        if kept
    ]
    return math.fsum(found) / len(found)


def attention_maps(s: Any, t: Any, counted: Any, power: float) -> float:
    """Attention transfer."""
    total = 0.0
    for one, other, keep in zip(s, t, counted, strict=True):
        maps = []
        for feature in (one, other):
            q = [math.fsum(abs(v) ** power for v in x) if kept else 0.0 for x, kept in zip(feature, keep, strict=True)]
            norm = math.sqrt(dot(q, q))
            maps.append([v / norm for v in q])
        total += math.fsum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    return total / len(s)


def discrepancy(s: Any, t: Any, counted: Any, kernel: str) -> float:
    """NST: channels as samples."""
    total = 0.0
    for one, other, keep in zip(s, t, counted, strict=True):
        samples = []
        for feature in (one, other):
            columns = [
                [x[c] if kept else 0.0 for x, kept in zip(feature, keep, strict=True)] for c in range(len(feature[0]))
            ]
            samples.append([[v / math.sqrt(dot(f, f)) for v in f] for f in columns])
        ours, theirs = samples
        apart = [math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x in ours for y in theirs]
        spread = math.fsum(apart) / len(apart)

        def k(x: Sequence[float], y: Sequence[float], spread: float = spread) -> float:
            if kernel == "gaussian":
                return math.exp(-math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * spread))
            return dot(x, y) ** 2 if kernel == "poly" else dot(x, y)

        def mean(a: Any, b: Any, k: Any = k) -> float:
            return math.fsum(k(x, y) for x in a for y in b) / (len(a) * len(b))

        total += mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs)
    return total / len(s)


def flows(s: Sequence[Any], t: Sequence[Any], counted: Any) -> float:
    """FSP: between neighbouring places."""
    total = 0.0
    for place in range(len(s) - 1):
        for example in range(len(s[0])):
            keep = [i for i, kept in enumerate(counted[example]) if kept]
            squares = []
            for c in range(len(s[place][0][0])):
                for d in range(len(s[place + 1][0][0])):
                    g, h = (
                        math.fsum(net[place][example][i][c] * net[place + 1][example][i][d] for i in keep) / len(keep)
                        for net in (s, t)
                    )
                    squares.append((g - h) ** 2)
            total += math.fsum(squares) / len(squares) / len(s[0])
    return total


def means(feature: Any, counted: Any) -> list[list[float]]:
    """One vector for each example."""
    return [
        [math.fsum(x[c] for x, kept in zip(one, keep, strict=True) if kept) / sum(keep) for c in range(len(one[0]))]
        for one, keep in zip(feature, counted, strict=True)
    ]


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def relations(s: Any, t: Any, distance: float, angle: float) -> float:
    """RKD of vectors."""
    n = len(s)
    lengths, cosines = [], []
    for vectors in (s, t):
        apart = {(i, j): math.dist(vectors[i], vectors[j]) for i in range(n) for j in range(n)}
        mean = math.fsum(apart.values()) / (n * (n - 1))
        lengths.append({pair: d / mean for pair, d in apart.items()})
        found = {}
        for j in range(n):
            for i in range(n):
                for k in range(n):
                    if j in (i, k):
                        found[i, j, k] = 0.0
                        continue
                    a, b = ([x - y for x, y in zip(vectors[end], vectors[j], strict=True)] for end in (i, k))
                    found[i, j, k] = dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
        cosines.append(found)
    total = 0.0
    for weight, (ours, theirs) in ((distance, lengths), (angle, cosines)):
        total += weight * math.fsum(huber(ours[key], theirs[key]) for key in ours) / len(ours)
    return total


def contrast(anchors: Any, positives: Any, memory: Any, temperature: float, examples: int, mean_e: float) -> float:
    """One side of CRD, of vectors of norm 1."""
    total = 0.0
    for anchor, positive in zip(anchors, positives, strict=True):

        def h(x: Sequence[float], anchor: Sequence[float] = anchor) -> float:
            e = math.exp(dot(anchor, x) / temperature) / mean_e
            return e / (e + len(memory) / examples)

        total -= math.log(h(positive)) + math.fsum(math.log(1 - h(negative)) for negative in memory)
    return total / len(anchors)


def relation_divergence(s: tuple[Any, Any], t: tuple[Any, Any], counted: Any, causal: bool) -> float:
    """MiniLM: of A and B, [examples][heads][positions][width] each, of student and teacher."""
    found = []
    for example, keep in enumerate(counted):
        for head in range(len(s[0][example])):
            for i, kept in enumerate(keep):
                if not kept:
                    continue
                seen = [j for j, other in enumerate(keep) if other and (j <= i or not causal)]
                rows = []
                for a, b in (s, t):
                    width = len(a[example][head][i])
                    e = [math.exp(dot(a[example][head][i], b[example][head][j]) / math.sqrt(width)) for j in seen]
                    rows.append([v / math.fsum(e) for v in e])
                found.append(math.fsum(q * math.log(q / p) for p, q in zip(*rows, strict=True)))
    return math.fsum(found) / len(found)


def scores_apart(s: tuple[Any, Any], t: tuple[Any, Any], counted: Any, causal: bool) -> float:
    """TinyBERT's attention: of queries and keys, as above."""
    found = []
    for example, keep in enumerate(counted):
        for head in range(len(s[0][example])):
            for i, kept in enumerate(keep):
                for j, other in enumerate(keep):
                    if kept and other and (j <= i or not causal):
                        a, b = (
                            dot(q[example][head][i], k[example][head][j]) / math.sqrt(len(q[example][head][i]))
                            for q, k in (s, t)
                        )
                        found.append((a - b) ** 2)
    return math.fsum(found) / len(found)


def softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [x / math.fsum(powers) for x in powers]


def exit_loss(
    seen: Any, said: Any, deepest: Any, logits: Any, labels: Sequence[int], soft: float, temperature: float, hint: float
) -> float:
    """One exit of be-your-own-teacher: [examples][channels] before its classifier, [examples][classes] behind it."""
    hard_part = soft_part = hint_part = 0.0
    for x, row, deep, wanted, label in zip(seen, said, deepest, logits, labels, strict=True):
        hard_part -= math.log(softmax(row)[label])
        q, p = softmax(wanted, temperature), softmax(row, temperature)
        soft_part += temperature**2 * math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
        hint_part += math.fsum((a - b) ** 2 for a, b in zip(x, deep, strict=True)) / len(deep)
    return ((1 - soft) * hard_part + soft * soft_part + hint * hint_part) / len(labels)


def cka(x: Any, y: Any) -> float:
    """Linear CKA by Gram matrices [n, n] of rows: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), centred element by element."""
    n = len(x)

    def centred(rows: Any) -> list[list[float]]:
        k = [[dot(a, b) for b in rows] for a in rows]
        means = [math.fsum(row) / n for row in k]
        every = math.fsum(means) / n
        return [[k[i][j] - means[i] - means[j] + every for j in range(n)] for i in range(n)]

    def hsic(k: Any, other: Any) -> float:
        return math.fsum(k[i][j] * other[i][j] for i in range(n) for j in range(n))

    k, other = centred(x), centred(y)
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))
