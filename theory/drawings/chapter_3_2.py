"""The figures of chapter 3.2, pruning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawings.common import BLUE, GREEN, GREY, RED, panels

ROW, GRAM = (1.0, 0.8), ((1.0, 0.9), (0.9, 1.0))  # of exercise 2


def surgeon() -> Any:
    """Exercise 2: two correlated inputs, one weight goes, by three methods of the library."""
    import numpy as np
    import torch

    from compresslab.numerics.gram import Gram
    from compresslab.prune.sparsegpt import SparseGPT
    from compresslab.prune.wanda import Wanda
    from compresslab.prune.ziplm import refit

    weight, matrix = torch.tensor([ROW]), torch.tensor(GRAM)
    gram = Gram(2)
    gram.add_(torch.linalg.cholesky(matrix).T)
    found = {
        "masked": Wanda(pattern="1:2").prune(weight, gram).weight,
        "best update": torch.cat([refit(weight, matrix, torch.tensor([0])), torch.zeros(1, 1)], dim=1),
        "SparseGPT": SparseGPT(pattern="1:2", damp_frac=0).prune(weight, gram).weight,
    }
    figure, axis = panels(5.6, height=4.4)
    u, v = np.meshgrid(np.linspace(-0.6, 2.8, 200), np.linspace(-0.6, 2.2, 200))
    first, second = u - ROW[0], v - ROW[1]
    damage = {name: float((weight - q) @ matrix @ (weight - q).T) for name, q in found.items()}
    axis.contour(
        u, v, first**2 + second**2 + 1.8 * first * second, levels=[0.03, *sorted(damage.values()), 1.2], colors=BLUE,
        linewidths=1,
    )  # fmt: skip
    axis.axhline(0, color=GREY, lw=1)
    axis.axvline(0, color=GREY, lw=1)
    axis.plot(*ROW, "x", color="black", ms=8, mew=2)
    axis.annotate("w", ROW, textcoords="offset points", xytext=(8, 0))
    for (name, q), colour, (dx, dy) in zip(
        found.items(), (RED, GREEN, "black"), ((-62, -18), (-28, -18), (10, 2)), strict=True
    ):
        place = q[0].tolist()
        axis.plot(*place, "o", color=colour, ms=9)
        axis.annotate(f"{name}: {damage[name]:.2f}", place, textcoords="offset points", xytext=(dx, dy), color=colour)
    axis.set(title="Equal damage, correlation 0.9", aspect="equal")
    axis.set(xlabel="first weight", ylabel="second weight")
    return figure


def thresholds() -> Any:
    """Two Gaussian layers under one threshold: what each loses."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import norm

    spreads = {"standard deviation 1": (1.0, BLUE), "standard deviation 0.5": (0.5, RED)}

    def lost(threshold: float, spread: float) -> float:
        return float(1 - 2 * norm.sf(threshold / spread))

    def threshold(share: float) -> float:
        return float(brentq(lambda t: np.mean([lost(t, spread) for spread, _ in spreads.values()]) - share, 0, 6))

    figure, (left, right) = panels(4.5, 4.5, height=3.3)
    x, half = np.linspace(-3, 3, 601), threshold(0.5)
    shares = np.linspace(0.001, 0.999, 200)
    for label, (spread, colour) in spreads.items():
        left.plot(x, norm.pdf(x, scale=spread), color=colour, label=label)
        left.fill_between(x, norm.pdf(x, scale=spread), where=np.abs(x) < half, color=colour, alpha=0.2)
        right.plot(shares, [lost(threshold(share), spread) for share in shares], color=colour)
    right.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="a threshold for each")
    right.legend(frameon=False, fontsize=9)
    left.set(title="One threshold takes half", xlabel="weight", ylabel="density")
    right.set(title="What each layer loses", xlabel="sparsity of both together", ylabel="sparsity of the layer")
    left.legend(frameon=False, fontsize=9, loc="upper left")
    left.set(ylim=(0, 1.1))
    return figure


def schedules() -> Any:
    """From 0 to 90 %: along a line, along the library's cubic, and by the same share of what is left in each round."""
    import numpy as np

    from compresslab.prune.gradual import cubic

    done, last = np.linspace(0, 1, 201), 0.9
    ways = {
        "linear": (last * done, GREY),
        "cubic": (np.array([cubic(0.0, last, share) for share in done]), BLUE),
        "the same share each round": (1 - (1 - last) ** done, RED),
    }
    figure, (left, right) = panels(4.5, 4.5, height=3.3)
    for label, (sparsity, colour) in ways.items():
        left.plot(done, sparsity, color=colour, label=label)
        right.semilogy(done, 1 - sparsity, color=colour)
    left.plot(0.5, cubic(0.0, last, 0.5), "o", color=BLUE)
    left.set(title="Zeros", xlabel="share of the way", ylabel="sparsity")
    right.set(title="What is left", xlabel="share of the way", ylabel="density")
    right.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False, fontsize=9)
    return figure


def coupling() -> Any:
    """A residual block as its weights: a hidden channel and a channel of the stream, each with all that leaves with it."""
    from matplotlib.patches import Rectangle

    figure, axis = panels(9, height=3.4)
    width, hidden = 4, 6

    def matrix(
        x: float, rows: int, columns: int, name: str, *, row: tuple[int, str], column: tuple[int, str] | None
    ) -> None:
        for i in range(rows):
            for j in range(columns):
                colour = row[1] if i == row[0] else column[1] if column and j == column[0] else "white"
                axis.add_patch(
                    Rectangle((x + j, rows / 2 - i - 1), 1, 1, facecolor=colour, edgecolor=GREY, lw=0.8, alpha=0.75)
                )
        axis.text(x + columns / 2, -hidden / 2 - 0.9, name, ha="center")

    stream, unit = (1, RED), (3, BLUE)
    matrix(0, width, 1, "stream", row=stream, column=None)
    matrix(4, hidden, width, "$W_1$", row=unit, column=stream)
    matrix(10.5, hidden, 1, "$b_1$", row=unit, column=None)
    matrix(14, width, hidden, "$W_2$", row=stream, column=unit)
    matrix(22.5, width, 1, "$b_2$", row=stream, column=None)
    matrix(26.5, width, 1, "stream", row=stream, column=None)
    for start, end in ((1.2, 3.8), (8.2, 10.3), (11.7, 13.8), (20.2, 22.3), (23.7, 26.3)):
        axis.annotate("", (end, 0), (start, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.plot([0.5, 0.5, 27], [2.1, 3.6, 3.6], color=GREY, lw=1)
    axis.annotate("", (27, 2.0), (27, 3.65), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.text(13.75, 3.9, "residual connection", ha="center", color=GREY)
    axis.set(xlim=(-0.5, 28), ylim=(-4.6, 5), aspect="equal")
    axis.set_title("Blue leaves with a hidden channel, red with a channel of the stream, in every block")
    axis.axis("off")
    return figure


def patterns() -> Any:
    """Energy lost by the library's N:M masks of Gaussian weights, at half and at three quarters zeros."""
    import torch

    from compresslab.numerics.selection import drop_smallest, keep_n_of_m

    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    energy, ones = float(weight.square().sum()), torch.ones(4096)

    def lost(kept: torch.Tensor) -> float:
        return 100 * (1 - float((weight * kept).square().sum()) / energy)

    figure, axis = panels(6.5, height=3.4)
    for share, colour, label in ((2, BLUE, "half zeros"), (4, RED, "three quarters zeros")):
        groups = [m for m in (2, 4, 8, 16, 32, 64) if m % share == 0]
        found = [lost(keep_n_of_m(weight, ones, m // share, m)) for m in groups]
        axis.plot(groups, found, "o-", color=colour, label=label)
        for m, value in zip(groups[:2], found, strict=False):
            axis.annotate(f"{m // share}:{m}", (m, value), textcoords="offset points", xytext=(6, 5))
        bare = lost(drop_smallest(weight.abs(), weight.numel() - weight.numel() // share))
        axis.axhline(bare, color=colour, lw=1, ls="--")
    axis.set(xscale="log", xticks=[2, 4, 8, 16, 32, 64], xlabel="M", ylabel="% of the energy lost", ylim=(0, 44))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set(title="Gaussian weights; dashed: zeros anywhere")
    axis.legend(frameon=False, fontsize=9)
    return figure


def density() -> Any:
    """Bits per weight of four ways to store one."""
    import numpy as np

    share = np.linspace(0, 1, 201)
    figure, axis = panels(6.5, height=3.6)
    axis.axhline(16, color="black", lw=1.5, label="dense, 16 bits")
    axis.plot(share, 32 * share, color=RED, label="CSR, 16-bit values and columns")
    axis.plot(share, 16 * share + 1, color=BLUE, label="bit mask, 16-bit values")
    axis.plot(0.5, 9, "s", color=GREEN, ms=9, label="2:4, 16-bit values")
    axis.axhline(4.25, color=GREY, ls="--", label="dense, 4 bits in groups of 64")
    axis.set(xlabel="density", ylabel="bits for each weight", ylim=(0, 30), title="When zeros pay, and against what")
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    return figure


def roofline() -> Any:
    """A processor of 10^12 operations and 10^10 bytes per second: what it reaches, and how long a product takes."""
    import numpy as np

    peak, memory, gathered = 1e12, 1e10, 0.1
    figure, (left, right) = panels(4.6, 4.6, height=3.6)
    intensity = np.logspace(-1, 4, 200)
    for share, colour, label in ((1.0, "black", "dense"), (gathered, RED, "CSR, gathering at a tenth")):
        left.loglog(intensity, np.minimum(share * peak, memory * intensity) / 1e9, color=colour, label=label)
    for tokens, name in ((1, "T = 1"), (512, "T = 512")):
        for bytes_each, share, colour in ((2, 1.0, "black"), (4, gathered, RED)):
            at = 2 * tokens / bytes_each
            left.plot(at, min(share * peak, memory * at) / 1e9, "o", color=colour)
        left.annotate(name, (tokens, min(peak, memory * tokens) / 1e9), textcoords="offset points", xytext=(-14, 8))
    left.set(xlabel="operations per byte", ylabel="billion operations per second", title="Roofline")
    left.set(ylim=(0.5, 4000))
    left.legend(frameon=False, fontsize=9, loc="lower right")
    share = np.linspace(0.01, 1, 200)
    for tokens, colour in ((1, BLUE), (512, GREEN)):
        dense = max(2 * tokens / peak, 2 / memory)
        sparse = np.maximum(2 * share * tokens / (gathered * peak), 4 * share / memory)
        right.semilogy(share, sparse / dense, color=colour, label=f"T = {tokens}")
    right.axhline(1, color="black", lw=1)
    right.set(xlabel="density", ylabel="times as long as dense", title="CSR with 16-bit values and columns")
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, fontsize=9)
    return figure


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Layers one after the other, as SynFlow sees them: a contract.Network without data."""

    weights: Mapping[str, Any]
    seed: int = 0

    def flow(self, weights: Mapping[str, Any]) -> Any:
        import torch

        carried = torch.ones(next(iter(weights.values())).shape[1], dtype=torch.float64)
        for weight in weights.values():
            carried = weight @ carried
        return carried.sum()


def collapse() -> Any:
    """What SynFlow leaves of each of five layers, in one shot and in 100 rounds."""
    import numpy as np
    import torch

    from compresslab.prune.synflow import SynFlow
    from compresslab.scoring import find_masks

    widths, generator = (16, 32, 96, 96, 24, 10), torch.Generator().manual_seed(0)
    network = Chain(
        weights={
            f"{a} to {b}": torch.randn(b, a, generator=generator) * (2 / a) ** 0.5
            for a, b in itertools.pairwise(widths)
        }
    )
    compressions = np.logspace(0.25, 2.5, 8)
    figure, axes = panels(4.6, 4.6, height=3.6, sharey=True)
    for axis, rounds, title in zip(axes, (1, 100), ("One shot", "100 rounds"), strict=True):
        found = [find_masks(SynFlow(sparsity=1 - 1 / c, rounds=rounds), network) for c in compressions]
        floor = 1.0
        for layer, colour in zip(network.weights, (GREY, BLUE, RED, GREEN, "black"), strict=True):
            left = np.array([int(one.kept[layer].sum()) for one in found])
            axis.loglog(compressions, np.where(left > 0, left, np.nan), ".-", color=colour, label=layer)
            if (left == 0).any():
                empty = int(np.argmax(left == 0))
                axis.plot(compressions[empty], floor := floor * 0.6, "x", color=colour, ms=8, mew=2)
        axis.set(title=title, xlabel="times fewer weights in all")
    axes[0].set(ylabel="weights left in the layer (x: none)")
    axes[1].legend(frameon=False, fontsize=9)
    return figure


FIGURES = {
    "surgeon": surgeon, "thresholds": thresholds, "schedules": schedules, "coupling": coupling, "patterns": patterns,
    "density": density, "roofline": roofline, "collapse": collapse,
}  # fmt: skip
