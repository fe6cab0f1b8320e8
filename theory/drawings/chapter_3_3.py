"""The figures of chapter 3.3, distillation."""

from __future__ import annotations

from typing import Any

from drawings.common import BLUE, GREEN, GREY, RED, panels

BAYES, TEACHER = (0.7, 0.2, 0.1), (0.6, 0.3, 0.1)  # of exercise 1
MIXTURE = ((0.6, -2.0, 0.5), (0.4, 2.0, 0.5))  # of exercise 5: share, mean, deviation


def soft_labels() -> Any:
    """Exercise 1: a label, a teacher and both, as estimates of the Bayes probabilities."""
    import numpy as np

    figure, (left, right) = panels(3.6, 5.4, height=3.3)
    for place, (values, name, colour) in enumerate(
        ((BAYES, "Bayes", GREY), ((1, 0, 0), "a label", RED), (TEACHER, "a teacher", BLUE))
    ):
        left.bar(np.arange(3) + 0.27 * (place - 1), values, 0.25, color=colour, label=name)
    left.set(xticks=range(3), xticklabels=["cat", "dog", "truck"], title="Three things to learn from")
    left.legend(frameon=False)
    noise = 1 - sum(p**2 for p in BAYES)
    bias = sum((p - q) ** 2 for p, q in zip(BAYES, TEACHER, strict=True))
    n = np.geomspace(1, 1000, 200)
    right.loglog(n, noise / n, color=RED, label="labels: V/n")
    right.loglog(n, np.full_like(n, bias), color=BLUE, label="teacher: B")
    right.loglog(n, noise / n * bias / (noise / n + bias), color=GREEN, label="the best mixture")
    right.set(xlabel="labels n of like inputs", ylabel="squared error", title="Noise averages out, bias stays")
    right.legend(frameon=False)
    return figure


def temperature() -> Any:
    """What a teacher says at four temperatures; and how large the gradient is, with and without T^2."""
    import numpy as np
    import torch

    from compresslab.distill.soft_labels import SoftLabels

    teacher = torch.tensor([[8.0, 5, 3, 0, -2, -4]], dtype=torch.float64)
    student = torch.tensor([[5.0, 5, 2, 1, -1, -2]], dtype=torch.float64)
    figure, (left, right) = panels(4.4, 4.6, height=3.4)
    for heat, colour in ((1, RED), (2, BLUE), (4, GREEN), (16, GREY)):
        left.semilogy(range(1, 7), (teacher[0] / heat).softmax(0), "o-", color=colour, label=f"T = {heat}")
    left.set(xlabel="class, most likely first", ylabel="probability", title="One teacher")
    left.legend(frameon=False)
    heats = np.geomspace(1, 64, 60)
    scaled = np.array(
        [float(SoftLabels(temperature=float(heat)).rows(student, teacher, None)[1].norm()) for heat in heats]
    )
    apart = (student - student.mean()) - (teacher - teacher.mean())
    right.loglog(heats, scaled, color=BLUE, label="with T²")
    right.loglog(heats, scaled / heats**2, color=RED, label="without")
    right.axhline(float(apart.norm()) / 6, color=GREY, ls="--", lw=1, label="matching logits")
    right.set(xlabel="T", title="Length of the gradient in the logits")
    right.legend(frameon=False)
    return figure


def divergences() -> Any:
    """Exercise 5: the Gaussian nearest to a mixture of two, by each divergence."""
    import numpy as np
    import torch
    from scipy.optimize import minimize
    from scipy.stats import norm

    from compresslab.distill.jensen_shannon import JensenShannon
    from compresslab.distill.reverse_kl import ReverseKL
    from compresslab.distill.soft_labels import SoftLabels
    from compresslab.distill.total_variation import TotalVariation

    x = np.linspace(-7, 7, 421)
    step = x[1] - x[0]
    goal = sum(share * norm.pdf(x, mean, deviation) for share, mean, deviation in MIXTURE)
    figure, axes = panels(4.5, 4.5, height=3.2, sharey=True)
    ways = (
        (0, "forward KL", SoftLabels(temperature=1.0), BLUE), (0, "reverse KL", ReverseKL(), RED),
        (1, "Jensen-Shannon", JensenShannon(), GREEN), (1, "total variation", TotalVariation(), "black"),
    )  # fmt: skip

    def distance(numbers: Any, loss: Any) -> float:
        mine = norm.logpdf(x, numbers[0], np.exp(numbers[1])) + np.log(step)
        return float(loss.rows(torch.tensor(mine)[None], torch.tensor(np.log(goal * step))[None], None)[0])

    for axis in axes:
        axis.fill_between(x, goal, color=GREY, alpha=0.35, lw=0, label="teacher")
    for place, name, loss, colour in ways:
        found = [minimize(distance, start, (loss,), "Nelder-Mead") for start in ((-2, 0), (0, 1), (2, 0))]
        mean, log_deviation = min(found, key=lambda one: one.fun).x
        axes[place].plot(x, norm.pdf(x, mean, np.exp(log_deviation)), color=colour, label=name)
    for axis in axes:
        axis.set(xlabel="x")
        axis.legend(frameon=False, fontsize=9)
    axes[0].set(ylabel="density", title="The student is one Gaussian")
    axes[1].set(title="Two that are bounded")
    return figure


def rotation() -> Any:
    """A student that is the teacher in a basis turned by an angle: what each feature loss says of it."""
    import numpy as np
    import torch
    from torch import nn

    from compresslab.contract import Feature
    from compresslab.distill import distilbert, hints, relational
    from compresslab.distill.pairs import Linears

    torch.manual_seed(0)
    values = torch.randn(24, 12, 8)

    def feature(x: torch.Tensor) -> Feature:
        return Feature(values=x, counted=torch.ones(x.shape[:2], dtype=torch.bool), pixels=None)

    goal = [feature(values)]
    lost: dict[str, list[float]] = {"hints, no matrix": [], "1 - cosine": [], "hints, best matrix": [], "relations": []}
    angles = np.linspace(0, np.pi, 37)
    for angle in angles:
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        turn = torch.block_diag(*[torch.tensor([[cos, -sin], [sin, cos]])] * 4)
        mine = [feature(values @ turn)]
        best = Linears([(8, 8)], always=True)
        best[0].weight = nn.Parameter(torch.linalg.lstsq(mine[0].values.flatten(0, 1), values.flatten(0, 1)).solution.T)
        judges = {
            "hints, no matrix": hints.Judge(Linears([(8, 8)], always=False), None), "1 - cosine": distilbert.Judge(),
            "hints, best matrix": hints.Judge(best, None), "relations": relational.Judge(1.0, 2.0),
        }  # fmt: skip
        for name, judge in judges.items():
            lost[name].append(float(judge(mine, goal).detach()))
    figure, axis = panels(6.5, height=3.2)
    styles = (("-", RED), ("-", BLUE), ("-", GREEN), ("--", "black"))
    for (name, line), (style, colour) in zip(lost.items(), styles, strict=True):
        axis.plot(np.degrees(angles), line, style, color=colour, label=name)
    axis.set(xlabel="angle by which the student's hidden space is turned", ylabel="loss", xticks=range(0, 181, 45))
    axis.set(title="The same function in another basis")
    axis.legend(frameon=False)
    return figure


def self_distillation() -> Any:
    """What rounds of kernel ridge regression leave of every eigen-direction, and whether the error falls, in closed form."""
    import numpy as np

    figure, (left, right) = panels(4.5, 4.5, height=3.4)
    ratio = np.geomspace(0.01, 100, 300)
    for rounds, colour in ((1, BLUE), (2, GREEN), (4, RED)):
        left.semilogx(ratio, (ratio / (ratio + 1)) ** rounds, color=colour, label=f"{rounds} round{'s'[: rounds > 1]}")
    half = 2**0.25 - 1  # a ridge that halves what four rounds halve
    left.semilogx(ratio, ratio / (ratio + 1 / half), "--", color=GREY, label="one round, larger c")
    left.set(xlabel="eigenvalue over c", ylabel="share that is left", title="Small directions die first")
    left.legend(frameon=False)
    count, values, noise = np.arange(1, 9), np.arange(1, 201) ** -2.0, 0.002
    for power, colour in ((1, RED), (2, BLUE), (3, GREEN)):
        least = [
            min(error((values / (values + c)) ** t, values**power, noise) for c in np.geomspace(1e-5, 1, 400))
            for t in count
        ]
        right.plot(
            count, np.array(least) / least[0], "o-", color=colour, ms=4, label=f"signal as eigenvalue to the {power}"
        )
    right.set(xlabel="rounds, with the best c for each", ylabel="squared error, one round = 1", ylim=(0.8, 1.15))
    right.set(title="Whether it helps depends on the signal")
    right.legend(frameon=False)
    return figure


def error(kept: Any, signal: Any, noise: float) -> float:
    """Bias and variance where a share is left of every direction, the squared signal in which is given."""
    return float(((1 - kept) ** 2 * signal + kept**2 * noise).sum())


def exposure() -> Any:
    """Wrong tokens of a text, where an error is never made up for and where it is."""
    import numpy as np

    length = np.arange(1, 201)
    figure, axis = panels(5.5, height=3.1)
    for rate, colour in ((0.002, GREEN), (0.01, BLUE), (0.05, RED)):
        axis.loglog(length, np.cumsum(1 - (1 - rate) ** length), color=colour, label=f"{rate:g}, no way back")
        axis.loglog(length, rate * length, "--", color=colour, label=f"{rate:g}, back at once")
    axis.set(xlabel="tokens written", ylabel="wrong ones, on average", title="Errors of a student, by its rate")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def top_k() -> Any:
    """A Zipf teacher: what its first k hold at three temperatures, and how far off the gradient is without the rest."""
    import numpy as np
    import torch

    from compresslab.contract import TopK
    from compresslab.distill.soft_labels import SoftLabels

    ranks = torch.arange(1, 49153, dtype=torch.float64)
    teacher = -1.5 * ranks.log()
    ks = np.unique(np.geomspace(4, 4096, 40).astype(int))
    figure, (left, right) = panels(4.5, 4.5, height=3.3)
    for heat, colour in ((1, BLUE), (2, GREEN), (4, RED)):
        kept = (teacher / heat).softmax(0).cumsum(0)
        left.semilogx(ks, kept[ks - 1], color=colour, label=f"T = {heat}")
    left.axvline(64, color=GREY, ls="--", lw=1)
    left.set(xlabel="k", ylabel="probability that is kept", title="49,152 tokens, q as rank to the -1.5")
    left.legend(frameon=False)
    student = (teacher + 0.5 * torch.randn(len(teacher), generator=torch.Generator().manual_seed(0)).double())[None]
    loss, log_q = SoftLabels(temperature=1.0), teacher.log_softmax(0)[None]
    true = loss.rows(student, teacher[None], None)[1]
    as_one, without, most = [], [], []
    for k in ks.tolist():
        ids = torch.arange(k)[None]
        said = TopK(ids=ids, log_probs=log_q[:, :k], temperature=1.0)
        as_one.append(float((loss.rows(student, said, None)[1] - true).abs().sum()))
        cut = torch.full_like(log_q, -torch.inf).scatter(1, ids, log_q[:, :k])
        without.append(float((loss.rows(student, cut, None)[1] - true).abs().sum()))
        most.append(2 * float(1 - log_q[0, :k].exp().sum()))
    right.loglog(ks, without, color=RED, label="the rest left out")
    right.loglog(ks, most, "--", color=GREY, label="bound 2r")
    right.loglog(ks, as_one, color=BLUE, label="the rest as one outcome")
    right.set(xlabel="k", title="Error of the gradient, T = 1")
    right.legend(frameon=False)
    return figure


FIGURES = {
    "soft-labels": soft_labels, "temperature": temperature, "divergences": divergences, "rotation": rotation,
    "self-distillation": self_distillation, "exposure": exposure, "top-k": top_k,
}  # fmt: skip
