"""The figures of chapter 3.1, quantisation."""

from __future__ import annotations

from typing import Any

from drawings.common import BLUE, GREEN, GREY, RED, measured, panels, result


def grid() -> Any:
    """x and its rounded twin on the grid of exercise 1, and the error."""
    import torch

    from compresslab.numerics.grid import Grid, fit_minmax, quantize

    spec = Grid(bits=3, symmetric=False, granularity="channel")
    scale, zero = fit_minmax(torch.tensor([[-0.9, 2.1]]), spec, torch.float32)
    x = torch.linspace(-1.4, 2.6, 2001)[None]
    rounded = quantize(x, scale, zero, spec).dequantize()[0].numpy()
    x, step = x[0].numpy(), float(scale)
    figure, (left, right) = panels(4.5, 4.5)
    left.plot(x, x, color=GREY, lw=1, label="x")
    left.plot(x, rounded, color=BLUE, label="rounded, 3 bits")
    left.set(xlabel="x", title="A range of -0.9 to 2.1 on 8 points")
    left.legend(frameon=False)
    right.plot(x, rounded - x, color=RED)
    for edge in (-step / 2, step / 2):
        right.axhline(edge, color=GREY, lw=1, ls="--")
    right.annotate("s/2", (2.35, step / 2), textcoords="offset points", xytext=(0, 4))
    right.set(xlabel="x", title="Error: within half a step, then clipped")
    return figure


def clipping() -> Any:
    """Mean squared error of a unit Gaussian against the cut, in closed form."""
    import numpy as np
    from scipy.stats import norm

    cut = np.linspace(0.3, 6, 400)
    outside = 2 * ((1 + cut**2) * norm.sf(cut) - cut * norm.pdf(cut))
    figure, axis = panels(7, height=3.6)
    for bits, colour in ((2, RED), (3, BLUE), (4, GREEN), (8, GREY)):
        total = (2 * cut / (2**bits - 1)) ** 2 / 12 + outside
        axis.semilogy(cut, total, color=colour, label=f"{bits} bits")
        best = int(np.argmin(total))
        axis.plot(cut[best], total[best], "o", color=colour)
    axis.set(xlabel="cut, in standard deviations", ylabel="mean squared error")
    axis.set(title="The fewer the bits, the earlier the best cut (dots)")
    axis.legend(frameon=False)
    return figure


def lattice() -> Any:
    """Exercise 4: two correlated inputs, the nearest point and the one that the feedback finds."""
    import numpy as np

    gram, weight = np.array([[1, 0.9], [0.9, 1]]), np.array([0.4, 0.4])
    figure, axis = panels(5, height=4.6)
    u, v = np.meshgrid(np.linspace(-1, 2, 200), np.linspace(-1, 2, 200))
    damage = sum(
        gram[i, j] * (p - weight[i]) * (q - weight[j]) for i, p in enumerate((u, v)) for j, q in enumerate((u, v))
    )
    axis.contour(u, v, damage, levels=[0.02, 0.088, 0.3, 0.608, 1.2], colors=BLUE, linewidths=1)
    points = np.stack(np.meshgrid([-1, 0, 1, 2], [-1, 0, 1, 2])).reshape(2, -1)
    axis.plot(*points, "o", color=GREY, ms=5)
    axis.plot(*weight, "x", color="black", ms=8, mew=2)
    axis.plot(0, 0, "o", color=RED, ms=10)
    axis.plot(0, 1, "o", color=GREEN, ms=10)
    axis.annotate("w", weight, textcoords="offset points", xytext=(8, -4))
    axis.annotate("nearest: 0.608", (0, 0), textcoords="offset points", xytext=(-30, -18), color=RED)
    axis.annotate("with feedback: 0.088", (0, 1), textcoords="offset points", xytext=(-30, 12), color=GREEN)
    axis.set(title="Lines of equal damage, for inputs with correlation 0.9", aspect="equal")
    axis.set(xlabel="first weight", ylabel="second weight", xlim=(-1.1, 2.1), ylim=(-1.1, 2.1))
    return figure


def outliers() -> Any:
    """64 channels, one 40 times as loud: as they are, smoothed against weights of one size, rotated."""
    import numpy as np
    from scipy.linalg import hadamard

    x = np.random.default_rng(0).standard_normal((128, 64))
    x[:, 20] *= 40
    largest = np.abs(x).max(axis=0)
    ways = {
        "as it is": x,
        "smoothed": x / np.sqrt(largest / np.sqrt(largest.min() * largest.max())),
        "rotated": x @ hadamard(64) / 8,
    }
    figure, axes = panels(3, 3, 3, height=2.8, sharey=True)
    for axis, (name, values), colour in zip(axes, ways.items(), (RED, BLUE, GREEN), strict=True):
        axis.bar(range(64), np.abs(values).max(axis=0), color=colour, width=0.9)
        axis.set(title=f"{name}: largest {np.abs(values).max():.0f}", xlabel="channel", yscale="log")
    axes[0].set(ylabel="largest magnitude")
    return figure


def formats() -> Any:
    """All points of four formats, the largest at 1."""
    import numpy as np

    from compresslab.numerics.formats import FORMATS

    rows = {
        "int4": np.arange(-8, 8) / 8,
        "nf4": FORMATS["nf4"].values.numpy(),
        "fp4 (E2M1)": FORMATS["mxfp4"].values.numpy(),
        "fp8 (E4M3)": FORMATS["fp8-e4m3"].values.numpy(),
    }
    figure, axis = panels(8, height=2.6)
    for place, values in enumerate(rows.values()):
        points = values / np.abs(values).max()
        axis.plot(points, np.full(len(points), -place), "|", ms=16, color=(BLUE, GREEN, RED, GREY)[place])
    axis.set(yticks=[-i for i in range(len(rows))], yticklabels=list(rows), ylim=(-3.6, 0.6))
    axis.set(title="Where the points lie, the largest at 1")
    axis.grid(axis="y", visible=False)
    return figure


def front() -> Any:
    """Perplexity against bytes in Lab 3.4, on both models."""
    figure, axes = panels(4.5, 4.5, height=3.4)
    for axis, (name, title) in zip(
        axes, (("lab-3.4-micro", "characters, 0.2 million weights"), ("lab-3.4-real", "SmolLM2-135M")), strict=True
    ):
        rows = result(name)["rows"]

        def line(
            kind: str, style: str, colour: str, label: str, name: str = name, rows: Any = rows, axis: Any = axis
        ) -> None:
            found = [row for row in rows if row.startswith(kind)]
            points = sorted((measured(name, row, "bytes") / 1e6, measured(name, row, "perplexity")) for row in found)
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label)

        line("chosen", "o-", BLUE, "exact allocation")
        line("uniform", "s", "black", "one width")
        line("greedy", "^", GREEN, "most sensitive first")
        line("random", "D", GREY, "random order")
        line("worst", "v", RED, "least sensitive first")
        axis.set(title=title, xlabel="MB", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set(ylabel="perplexity")
    axes[1].legend(frameon=False, fontsize=9)
    return figure


FIGURES = {
    "grid": grid, "clipping": clipping, "lattice": lattice, "outliers": outliers, "formats": formats, "front": front,
}  # fmt: skip
