"""OBS in blocks: what a weight costs after its neighbours have made up for it, and the neighbours changed so. Second order.

Papers. Kurtic et al., "The Optimal BERT Surgeon", arXiv 2203.07259, section 3, with the blocks of the Fisher matrix of Singh and
Alistarh, "WoodFisher", arXiv 2004.14340; the problem is that of Hassibi and Stork, "Optimal Brain Surgeon", 1992.

Symbols. w the B weights of a block, neighbours in a row of W; G [m, B] their gradients, one row for each of m examples; F =
G^T G / m + lambda 1 [B, B], the empirical Fisher matrix, in the Hessian's place; Q those of the block that go, K those that stay.

Method. Near a minimum a change d of w costs d^T F d / 2. If weight q is to become zero and all others of its block may move, the
least cost is

    w_q^2 / (2 [F^-1]_qq) ,

which is the score. When it is known what goes, all of Q in a block go together: d_Q = -w_Q, and the cheapest d of the others is
d_K = F_KK^-1 F_KQ w_Q. Without neighbours (B = 1) this is `fisher`, with lambda added.

lambda. With fewer examples than weights in a block G^T G has no inverse, and what lambda adds decides much: a large one makes F
a multiple of 1, and the method magnitude pruning within each layer. It is `damp_frac` times the mean of diag(G^T G / m) over
the layer.

Cost. A forward and a backward of every example by itself for every round; then B^3 for every block. Memory: m gradients of
every weight, in the dtype of the forward.

Differences from the papers. F^-1 of each block from a Cholesky factorisation, where the papers add one example after the other
(Woodbury); Q is solved for jointly, where the code of oBERT adds up what each weight would want by itself, which leaves
pruned weights that are not zero and sets them so; lambda relative to the layer.

Oracle. tests/oracles/saliency.py: the constrained minimum by least squares for every weight and for every set, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Network, Paper, Scores, Weights
from compresslab.numerics.curvature import gradients
from compresslab.prune.saliency import Sampled

AT_ONCE = 1 << 22  # entries of the Fisher matrices that are in memory at one time


@dataclass(frozen=True, kw_only=True)
class OBS(Sampled):
    """Pruning by the inverse of the Fisher matrix, block by block, with an update of what is kept.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which; nothing is updated.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
        block_size: neighbours in a row that may make up for each other.
        damp_frac: added to the diagonal of the Fisher matrix, as a fraction of its mean over the layer.
    """

    paper: ClassVar[Paper] = Paper(
        title="The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models",
        authors="Kurtic et al.",
        year=2022,
        arxiv="2203.07259",
        claim="BERT-base on SQuAD, 90 % in many rounds of fine-tuning: ten times fewer weights, about 1 % lower accuracy",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    examples: int = 32  # type: ignore[misc]
    block_size: int = 16
    damp_frac: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size is a positive number, not {self.block_size}")
        if not 0 < self.damp_frac < float("inf"):
            raise ValueError(f"damp_frac is a positive fraction, not {self.damp_frac}")

    def score(self, network: Network) -> Scores:
        weights = {layer: weight.detach() for layer, weight in network.weights.items()}
        seen: dict[str, list[Tensor]] = {layer: [] for layer in weights}
        for _, loss in network.losses(size=1):
            mean = loss(network.weights)
            for layer, found in zip(weights, gradients(mean, list(network.weights.values())), strict=True):
                # What an earlier round has pruned stays zero, and so takes no part.
                seen[layer].append((found * (weights[layer] != 0)).to(network.dtype))
        scores = {layer: self._costs(weight, seen[layer]) for layer, weight in weights.items()}

        def updated(kept: Weights) -> Weights:
            return {layer: self._update(weight, seen[layer], kept[layer]) for layer, weight in weights.items()}

        return Scores(values=scores, updated=updated)

    def _costs(self, weight: Tensor, seen: list[Tensor]) -> Tensor:
        """w_q^2 / (2 [F^-1]_qq), [out, in]."""
        found = []
        for fisher, (w,) in self._blocks(seen, weight):
            inverse = torch.linalg.cholesky(fisher).inverse()  # F^-1 = L^-T L^-1
            found.append(w.square() / (2 * inverse.square().sum(dim=-2)))
        return self._put_back(found, weight)

    def _update(self, weight: Tensor, seen: list[Tensor], kept: Tensor) -> Tensor:
        """w + d where `kept`, [out, in]; zero elsewhere."""
        found = []
        for fisher, (w, stays) in self._blocks(seen, weight, kept):
            wanted = (fisher @ (w * (1 - stays))[..., None])[..., 0] * stays  # F_KQ w_Q
            among = fisher * stays[:, :, None] * stays[:, None, :]  # F_KK, and 1 in the place of what goes
            among.diagonal(dim1=-2, dim2=-1).add_(1 - stays)
            moved = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(among))[..., 0]
            found.append((w + moved) * stays)
        return self._put_back(found, weight)

    def _blocks(self, seen: list[Tensor], *matrices: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(F [blocks, B, B], these matrices [out, in] as [blocks, B]) of some rows at a time, in float64: a few loud
        weights among quiet ones are more than float32 can factorise. The last block of a row is filled up with zeros."""
        rows, columns = matrices[0].shape
        size = min(self.block_size, columns)
        fill = -columns % size
        mean = sum(float(one.float().square().mean()) for one in seen) / len(seen)
        damp = self.damp_frac * mean if mean else 1.0  # a layer that no example reaches is pruned by magnitude
        some = max(AT_ONCE // (size * (columns + fill)), 1)
        for start in range(0, rows, some):
            parts = [
                nn.functional.pad(x[start : start + some].double(), (0, fill)).view(-1, size)
                for x in (*seen, *matrices)
            ]
            slopes = torch.stack(parts[: len(seen)], dim=1)
            fisher = slopes.transpose(1, 2) @ slopes / len(seen)
            fisher.diagonal(dim1=-2, dim2=-1).add_(damp)
            yield fisher, parts[len(seen) :]

    def _put_back(self, blocks: list[Tensor], weight: Tensor) -> Tensor:
        return torch.cat(blocks).view(len(weight), -1)[:, : weight.shape[1]].to(weight.dtype).contiguous()

    def numbers_per_weight(self, examples: int) -> int:
        return examples + 4
