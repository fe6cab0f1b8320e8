"""On-policy distillation: the student writes, and its teacher says of every token what it would have written there.

Paper. Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), arXiv 2306.13649,
algorithm 1.

Symbols. x [examples, prompt] how texts begin; y what the student writes after x; lambda the `share` of steps with such y.

Method. A student that has only seen texts of others does not know what to do after a mistake of its own. So in a step, with
probability lambda, every text of the batch is cut after `prompt` tokens and written on by the student as it stands, drawn at
`temperature`; the recipe's losses are then taken on what it wrote, up to the end of the text where it wrote one. There is no
gradient through the drawing. The other steps learn from the texts as they are.

It is a step beside the losses, which are the paper's generalised divergence:

    steps:
      - {method: jensen-shannon, mixture: 0.1}
      - {method: on-policy, share: 0.5}

Losses on labels have no place beside it: what the student wrote is no label.

Cost. A step on own texts writes length - prompt tokens, one forward of the student for each with keys and values kept: many
times a plain step.

Differences from the paper. The draw of a step is for its batch as a whole, as in the paper; held-back texts are judged as they
are. What is random comes from the generator that checkpoints keep, so that a run that was killed goes on with the same texts.

Oracle. tests/oracles/on_policy.py: logits read anew for every place, for argmax without temperature and for frequencies with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Texts of the student's own.

    Args:
        share: lambda, of the steps that learn from them.
        prompt: how many tokens of a text stay.
        temperature: at which the student writes.
    """

    paper: ClassVar[Paper] = Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        authors="Agarwal et al.",
        year=2023,
        arxiv="2306.13649",
        claim="T5 students gain 2.1 times (summaries) to 1.9 times (arithmetic) what other distillation does [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    share: float = 0.5
    prompt: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {self.share}")
        if self.prompt < 1:
            raise ValueError(f"prompt is a positive number of tokens, not {self.prompt}")
        if not 0.01 <= self.temperature <= 10:
            raise ValueError(f"temperature must be from 0.01 to 10, not {self.temperature}")

    def drawn(self) -> bool:
        """Whether this step is one on own texts."""
        return self.share > 0 and bool(torch.rand(()) < self.share)

    @torch.no_grad()
    def written(self, network: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what the network writes after its prompts; labels count what was written, and not what it began with.

        Raises:
            ValueError: texts that differ in length, or are no longer than the prompt.
        """
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        if (mask is not None and not mask.all()) or ids.shape[1] <= self.prompt:
            raise ValueError(
                f"a student writes on after {self.prompt} tokens of windows that are longer and all of one length: shorten "
                "prompt, or take text for data"
            )
        was_training = network.training
        network.eval()
        start, ends = ids[:, : self.prompt], ends_of(network)
        found = network.generate(
            input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=ids.shape[1] - self.prompt, do_sample=True,
            temperature=self.temperature, top_k=0, top_p=1.0, pad_token_id=ends[0] if ends else 0,
            use_cache=True,
        )  # fmt: skip
        network.train(was_training)
        labels = found.clone()
        labels[:, : self.prompt] = IGNORED_LABEL
        if ends:
            is_end = torch.isin(found, torch.tensor(ends, device=found.device))
            is_end[:, : self.prompt] = False
            after = is_end.int().cumsum(1) - is_end.int() > 0
            labels[after] = IGNORED_LABEL
        return {"input_ids": found, "labels": labels}


def ends_of(network: Any) -> list[int]:
    """The tokens that end a text."""
    said = network.generation_config.eos_token_id
    return [] if said is None else [int(token) for token in (said if isinstance(said, list) else [said])]
