"""Lab 3.9, the exercise: the loss of a student that has a teacher. Fill the hole; the signature is that of
compresslab.distill.soft_labels.

logits and teacher [rows, classes] are what student and teacher say of the same rows, before any softmax; labels [rows] are the
right classes. With T the temperature, q = softmax(teacher / T) and p = softmax(logits / T), the loss of a row is

    soft * T^2 * KL(q || p)  +  (1 - soft) * cross-entropy of its label at T = 1

    KL(q || p) = sum over classes of q log(q / p)

and what is returned is the mean over rows. It trains the student alone: no gradient may reach the teacher. All you
need is in torch.nn.functional (import it as F).
"""

from __future__ import annotations

from torch import Tensor


def distillation_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0, soft: float = 0.9
) -> Tensor:
    """soft T^2 KL(teacher || student) + (1 - soft) cross-entropy of the labels, the mean over rows."""
    # --- the hole: the two parts, and their sum ---
    raise NotImplementedError
    # --- end of the hole ---
