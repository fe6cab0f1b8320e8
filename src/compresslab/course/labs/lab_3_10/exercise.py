"""Lab 3.10, the exercise: hidden states of a student towards those of its teacher. Fill the hole; the signature is that of
compresslab.distill.hints.

student[m] is what block m of M gives out, [examples, positions, c]; teacher[n] block n of N, [examples, positions, d]. N is a
multiple of M, and block m of the student stands for the last block of its run of N / M: of 2 and 6 blocks, 0 stands for 2 and 1
for 5.

The student may be narrower, so block m has a regressor R = regressors[m], [d, c], which is trained along. The loss of a pair is

    the mean of (R s - t)^2 over the positions that count and the d channels      s [c] and t [d] of one position of one example

and what is returned is the sum over the student's blocks. counted [examples, positions] is False where there is padding. The
teacher is not trained. Import torch if you need it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def hint_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], regressors: Sequence[Tensor], counted: Tensor
) -> Tensor:
    """The sum over blocks of the student of the mean squared difference to the teacher, padding left out."""
    # --- the hole: the pairs, their losses, and the sum ---
    raise NotImplementedError
    # --- end of the hole ---
