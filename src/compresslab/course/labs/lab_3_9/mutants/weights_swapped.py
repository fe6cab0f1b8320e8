"""Lab 3.9, a mutant: the share of the teacher goes to the labels.

Symptom: swapped
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0, soft: float = 0.9
) -> Tensor:
    """soft T^2 KL(teacher || student) + (1 - soft) cross-entropy of the labels, the mean over rows."""
    q = F.log_softmax(teacher.detach() / temperature, dim=1)
    p = F.log_softmax(logits / temperature, dim=1)
    from_teacher = temperature**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    from_labels = F.cross_entropy(logits, labels)
    return (1 - soft) * from_teacher + soft * from_labels
