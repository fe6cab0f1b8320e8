"""What an exporter is, and what it is given."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy import layouts
from compresslab.errors import CompressLabError
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.weights import FolderWeights, goes_along

EXPORT_MANIFEST = "compresslab-export.json"


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    folder: Path
    format: str
    files: tuple[str, ...]
    notes: tuple[str, ...]  # what the user should know: what was rounded anew, what stayed in float
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Given:
    """The model to export, read one tensor at a time.

    Attributes:
        options: what the user set for this format, by the names in Exporter.options.
        alone: whether this process does nothing else, so that a library may run in it that changes it.
    """

    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, as it stands."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return found

    @property
    def is_compressed(self) -> bool:
        return bool(self.config.get("quantization_config"))

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of every compressed layer; empty for an uncompressed model."""
        return {name: weight.grid for name, weight in self.weights()}

    def weights(self) -> Iterator[tuple[str, QuantWeight]]:
        """Every compressed layer's codes, scales and zero points, one at a time, as they lie on disk."""
        return layouts.read_weights(self.folder) if self.is_compressed else iter(())

    def skeleton(self) -> nn.Module:
        """The uncompressed architecture, parameters on the meta device."""
        return models.build(models.read_config(self.folder))

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """Every other tensor (embeddings, norms, biases, layers left in float), one at a time, in the stored dtype."""
        stored = FolderWeights(self.folder)
        of_layers = tuple(f"{layer}." for layer in self.grids)
        for name in stored.names():
            if not name.startswith(of_layers) or name.rpartition(".")[2] == "bias":
                yield name, stored.get(name)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The whole model in memory, its weights de-quantised."""
        return models.load(self.folder, dtype=dtype)

    def companions(self) -> list[Path]:
        """The files that go along with the weights: tokenizer, generation settings, pre-processing, licence."""
        return [path for path in sorted(self.folder.iterdir()) if path.is_file() and goes_along(path.name)]


class Exporter(ABC):
    """One format.

    Attributes:
        summary: one line for `compresslab formats`.
        extra: the extra of this package that installs what it needs, or "".
        packages: the modules it cannot do without.
        options: what `--set NAME=VALUE` can choose: NAME and what it does.
    """

    summary: ClassVar[str]
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, str]] = {}

    def require(self) -> None:
        """CompressLabError with the command that installs what is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise CompressLabError(f"{', '.join(missing)} not installed: pip install 'compresslab[{self.extra}]'")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """CompressLabError for an option that this format does not have."""
        if unknown := sorted(set(options) - set(self.options)):
            known = ", ".join(f"{name} ({what})" for name, what in self.options.items()) or "none"
            raise CompressLabError(f"no option '{unknown[0]}' of this format: it has {known}")

    @abstractmethod
    def refuses(self, given: Given) -> Sequence[str]:
        """What of this model the format cannot hold, each naming the layer and what to do; empty if it holds all."""

    @abstractmethod
    def write(self, given: Given, folder: Path) -> Sequence[str]:
        """Write the files into an empty folder; return what the user should know.

        Raises:
            CompressLabError: if the runtime's library fails, naming the operator or layer.
        """
