"""Tasks of lm-evaluation-harness, through its own API, on a model that is already open.

a loaded model and its tokenizer -> the harness's HFLM around them -> simple_evaluate -> a Scored per task and metric, whose
units are the task's documents. A task is a name the harness knows or the path of a YAML file in its format; one whose data
lie on this machine needs no network. Oracle: the harness's own aggregate of each metric.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn

from compresslab.errors import CompressLabError
from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Array, Scored, mean


def run(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> list[Scored]:
    """Every metric of every task, named `task_metric`.

    Args:
        tasks: names of tasks or groups, or paths of YAML files.
        limit: documents of each task; None for all.

    Raises:
        CompressLabError: if the harness is not installed, there is no such task, or its data cannot be had.
    """
    check(tasks)
    with _quiet():
        evaluator = importlib.import_module("lm_eval.evaluator")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size
        )
        names, manager = _tasks(tasks)
        try:
            found = evaluator.simple_evaluate(
                wrapper, tasks=names, task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=0
            )
        except Exception as error:
            raise CompressLabError(
                f"lm-evaluation-harness could not run {', '.join(names)}: {type(error).__name__}: {str(error)[:300]}"
            ) from error
    said = f"lm-evaluation-harness {_version()}" + (f", first {limit} documents" if limit else "")
    device = device_label(next(model.parameters()).device)
    return [
        scored for task, samples in found["samples"].items() for scored in _scored(task, samples, found, device, said)
    ]


def check(tasks: Sequence[str]) -> None:
    """CompressLabError if the harness is not installed or there is no such task; opens no data."""
    try:
        importlib.import_module("lm_eval")
    except ImportError:
        raise CompressLabError("lm-eval not installed: pip install 'compresslab[harness]'") from None
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise CompressLabError(f"no task file {task}: --tasks takes names of the harness or paths of YAML files")
    with _quiet():
        names, manager = _tasks(tasks)
        unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise CompressLabError(f"lm-evaluation-harness has no task '{unknown[0]}': see `lm_eval ls tasks`")


def _tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Names, and a manager that knows them; the harness's own tasks are indexed only where one of them is asked for."""
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_name_in(Path(task)) if Path(task) in files else task for task in tasks]
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=[str(folder) for folder in dict.fromkeys(file.resolve().parent for file in files)] or None,
        include_defaults=len(files) < len(tasks),
    )
    return names, manager


def _name_in(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():  # not as YAML: tasks may name functions with !function
        if line.startswith("task:"):
            return str(yaml.safe_load(line)["task"])
    raise CompressLabError(f"{file} has no line 'task: NAME': lm-evaluation-harness asks for one")


def _scored(task: str, samples: list[dict], found: dict, device: str, said: str) -> Iterator[Scored]:
    """One for each filter and metric of a task; without interval where the harness does not take the mean."""
    for key, reported in found["results"][task].items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(reported, int | float):
            continue
        rows = [s for s in samples if s.get("filter") == kept]
        values = [s.get(metric) for s in rows]
        plain = all(isinstance(v, int | float | bool | np.number) for v in values)
        parts = np.array(values if plain else [0.0] * len(values), dtype=np.float64)[:, None]
        is_mean = plain and np.isclose(parts.mean(), reported, rtol=1e-9, atol=1e-12)
        name = f"{task}_{metric}" + (f"_{kept}" if kept != "none" else "")
        yield Scored(
            name=name, parts=parts, of=mean if is_mean else _as_reported(float(reported)), units="documents",
            regular=bool(is_mean), device=device, conditions=said + ("" if is_mean else ", no mean over documents"),
        )  # fmt: skip


def _as_reported(value: float) -> Any:
    def of(parts: Array, counts: Array) -> Array:
        return np.full(len(counts), value)

    return of


def _version() -> str:
    return importlib.metadata.version("lm_eval")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines and the warnings of what it imports, for the time of a call."""
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("lm_eval").setLevel(level)
