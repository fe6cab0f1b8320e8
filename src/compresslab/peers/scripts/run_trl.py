"""Hugging Face's TRL, distillation: the peer of Lab 3.10, and of Lab 3.9 on a pre-trained model.

networks: "model" is the student as it begins, "teacher" its teacher; "calibration" is what it is trained on. settings: "steps",
"batch", "learning_rate", "warmup", "weight_decay", "max_grad_norm".

TRL's own DistillationTrainer learns from what the student writes. The trainer for given texts is GKDTrainer: with lmbda 0 the
student writes nothing, and with beta 0 the loss is the divergence KL(teacher || student) of every next token, which is that of
soft labels. Its `temperature` is that of writing; the loss knows none, so it is the one at temperature 1. It has no share of
labels.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from peer_job import TextJob
from transformers import AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def batch_of(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> None:
    job = TextJob("trl", "torch", "transformers", "accelerate")
    told = job.settings
    student, teacher = job.open(), job.open(network="teacher")
    arguments = GKDConfig(
        output_dir=str(job.out), max_steps=told["steps"], per_device_train_batch_size=told["batch"],
        learning_rate=told["learning_rate"], lr_scheduler_type="cosine", warmup_steps=int(told["steps"] * told["warmup"]),
        weight_decay=told["weight_decay"], max_grad_norm=told["max_grad_norm"], seed=job.seed, data_seed=job.seed, lmbda=0.0,
        beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, save_strategy="no",
        disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=arguments, data_collator=batch_of,
        train_dataset=Dataset.from_dict({"input_ids": job.calibration.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(job.networks["teacher"]),
    )  # fmt: skip
    job.timed("train", trainer.train)
    job.measure(student.eval())
    student.save_pretrained(job.out)
    job.answer(sorted(job.out.glob("*.safetensors")))


if __name__ == "__main__":
    main()
