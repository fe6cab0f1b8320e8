"""Lab 3.12, the exercise: students that teach each other. Fill the hole; the signature is that of compresslab.mutual.

logits[k] are what student k says, [rows, classes]. Its loss is the cross-entropy of the labels, which is there already, and what
its peers teach it: for every row the divergences KL(p_l || p_k) of all other students l, weighted; of that the mean over rows.

The weights of the peers of a student add up to 1 in each row:

    "mean"       all peers alike
    "adaptive"   by how sure a peer is of that row: exp(-H) over the sum of its student's peers, H the peer's entropy in nats

A peer teaches and learns nothing by it: no gradient goes into p_l, nor into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mutual_loss(logits: Sequence[Tensor], labels: Tensor, *, weights: str = "mean") -> Tensor:
    """The sum over students of their losses, each the mean over rows."""
    log_p = [z.float().log_softmax(1) for z in logits]
    found = []
    for k, own in enumerate(log_p):
        found.append(nn.functional.cross_entropy(logits[k].float(), labels))
        # --- the hole: what the others teach student k, as one number appended to `found` ---
        raise NotImplementedError
        # --- end of the hole ---
    return torch.stack(found).sum()
