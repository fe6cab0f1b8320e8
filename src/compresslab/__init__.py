"""CompressLab makes neural networks smaller and faster, and proves what it cost.

    >>> import compresslab
    >>> artifact, report = compresslab.compress("smollm2-135m", out="small")   # doctest: +SKIP
    >>> model = artifact.load()                                                # doctest: +SKIP

The names below are the public ones; each is imported when it is first used, so that `import compresslab` is instant.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

# torch then asks the system for huge pages for tensors of 2 MB and more (it reads this at its first one): pages of 4 KB, met for
# the first time, are half of what passes over a large weight cost.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Where torchao is installed (ExecuTorch brings it), transformers imports it, and it tells of kernels for other machines.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in str(record.msg))

_HOME = {
    "compress": "compresslab.pipeline",
    "plan_only": "compresslab.pipeline",
    "Progress": "compresslab.pipeline",
    "evaluate": "compresslab.evaluation",
    "bench": "compresslab.evaluation",
    "Artifact": "compresslab.artifact",
    "export": "compresslab.exporters",
    "Recipe": "compresslab.recipe",
    "Report": "compresslab.report.schema",
    "read_report": "compresslab.report.schema",
    "Measurement": "compresslab.report.schema",
    "METHODS": "compresslab.methods",
    "load": "compresslab.models",
    "CompressLabError": "compresslab.errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compresslab' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
