"""Recipes: what to do to a model, as strict YAML.

    name: w4a16-gptq
    version: 1
    summary: 4-bit weights, second-order rounding
    steps:
      - method: gptq
        bits: 4
        group_size: 64
        layers:
          "model.layers.0.*": {bits: 8, group_size: null, symmetric: true}
          "*.down_proj": float
    ignore: ["@outside-blocks"]
    calibration: {samples: 64, sequence_length: 512}
    expect:
      smollm2-135m: {perplexity_ratio: [1.02, 1.2]}

`layers` belongs to the steps that prune or round, weights or activations: shell patterns of layer names, and the settings
in which these layers differ from the step's own, or `float` to leave them alone. Of the patterns that match a layer the last one
counts, and only that one.

A recipe whose steps are losses (soft-labels, hints and so on) teaches a student, by `compresslab distill`. In a recipe that
prunes, losses after that step are those of the training: what is left learns from the network as it was.

A recipe with a step that trains (ste, lsq, pact, dorefa, e2e-qp, gradual, movement, or a loss) has a block
`training: {epochs: 3, learning_rate: 1.0e-4}`, see Training. In a recipe that prunes, or takes out neurons, heads or blocks, such
a block asks for a training of what is left.

Unknown keys are errors that name the nearest known key. YAML is loaded safely: it can name rows of METHODS, and nothing
else can be constructed from it.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compresslab import methods
from compresslab.contract import (
    ActivationQuantizer,
    AwareTraining,
    BlockRemover,
    ChannelRemover,
    Distilling,
    Method,
    NetworkPruner,
    Pruner,
    Rounding,
    TrainedPruner,
    Tuner,
    UnitRemover,
)
from compresslab.errors import CompressLabError, unknown

DEFAULT = "w4a16-gptq"
FLOAT = "float"  # in place of settings: the layer is left alone
HALVES = {"bf16": "bfloat16", "fp16": "float16"}  # in place of settings: no codes, but numbers of 16 bits
UNROUNDED = (FLOAT, *HALVES)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Step(BaseModel):
    """A method and its settings; every setting the method has is filled in, so a recipe says all that was done.

    A step that rounds also has `layers`, the settings of single layers by shell pattern; see the top of this file.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    method: str

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "method" not in raw:
            raise CompressLabError("a step needs a 'method' key")
        settings = {key: value for key, value in raw.items() if key not in ("method", "layers")}
        method = methods.build(raw["method"], settings)
        filled = {"method": raw["method"]} | methods.defaults(raw["method"]) | settings
        if isinstance(method, Rounding | ActivationQuantizer | Pruner | TrainedPruner | NetworkPruner):
            return filled | {"layers": _checked_layers(raw["method"], settings, raw.get("layers", {}))}
        if "layers" in raw:
            raise CompressLabError(
                f"method {raw['method']} has no 'layers': they belong to the step that prunes or rounds"
            )
        return filled

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in (self.model_extra or {}).items() if key != "layers"}

    @property
    def layers(self) -> dict[str, dict[str, Any] | str]:
        return dict((self.model_extra or {}).get("layers", {}))

    def build(self, layer: str | None = None) -> Method:
        """The method, with the settings of one layer if it is named (a layer that is not left in float)."""
        differing = {} if layer is None else differing_settings(self.layers, layer)
        assert not isinstance(differing, str), f"{layer} stays in float"
        return methods.build(self.method, self.settings | differing)


def _checked_layers(method: str, settings: dict[str, Any], layers: Any) -> dict[str, Any]:
    """CompressLabError unless these are patterns with settings that the method takes."""
    if not isinstance(layers, dict):
        raise CompressLabError(f"layers is a mapping from patterns to settings, not {layers!r}")
    for pattern, differing in layers.items():
        if not isinstance(pattern, str) or not (isinstance(differing, dict) or differing in UNROUNDED):
            raise CompressLabError(
                f"layers '{pattern}': a pattern has settings of {method} or one of {', '.join(UNROUNDED)}, not {differing!r}"
            )
        if isinstance(differing, str):
            continue
        try:
            methods.build(method, settings | differing)
        except CompressLabError as error:
            raise CompressLabError(f"layers '{pattern}': {error}") from None
    return layers


def differing_settings(layers: Mapping[str, dict[str, Any] | str], layer: str) -> dict[str, Any] | str:
    """What the last pattern that matches says of a layer: settings, or one of UNROUNDED; no settings where none matches.

    >>> differing_settings({"*.q": {"bits": 8}, "0.*": "float"}, "0.q"), differing_settings({"*.q": {"bits": 8}}, "0.k")
    ('float', {})
    """
    matching = [said for pattern, said in layers.items() if fnmatch.fnmatchcase(layer, pattern)]
    return matching[-1] if matching else {}


class CalibrationSize(Strict):
    samples: int = Field(default=64, ge=1)
    sequence_length: int = Field(default=512, ge=2)


class Training(Strict):
    """How long and how fast to train.

    Attributes:
        epochs: passes over the examples.
        steps: of the optimiser, in place of `epochs` where it is named.
        optimizer: "adamw", or "sgd" with a momentum of 0.9, whose learning rates are larger.
        warmup: share of the steps over which the learning rate rises from 0, before it falls to 0 along a cosine.
        batch: examples in one step.
        checks: how often in all the loss on the examples held back is taken, and a checkpoint written.
        held_back: share of the examples that only this loss sees.
        shard: under torchrun, each rank keeps a part of every weight, gradient and moment in place of all (sharding.py).
        teacher_dtype: what a teacher that reads tokens is opened in, "float32" or "stored", as its weights are on disk: half the
            memory of one in bfloat16, whose logits have three digits.
        only: shell patterns of the parameters that learn; all others stand still.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0, lt=10)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    batch: int = Field(default=16, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    checks: int = Field(default=10, ge=1)
    held_back: float = Field(default=0.1, gt=0, lt=1)
    shard: bool = False
    teacher_dtype: Literal["float32", "stored"] = "float32"
    only: tuple[str, ...] = Field(default=("*",), min_length=1, strict=False)

    def seen(self, examples: int) -> int:
        """Examples that pass through the network in all."""
        return self.steps_for(examples) * self.batch

    def steps_for(self, examples: int) -> int:
        """Steps of the optimiser over this many examples."""
        return self.steps or math.ceil(math.ceil(examples / self.batch) * self.epochs)


class Recipe(Strict):
    """A recipe as it will run."""

    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    summary: str = ""
    steps: tuple[Step, ...] = Field(min_length=1, strict=False)
    ignore: tuple[str, ...] = Field(default=("@outside-blocks",), strict=False)
    calibration: CalibrationSize = CalibrationSize()
    training: Training | None = None
    expect: dict[str, dict[str, list[float]]] = {}

    @model_validator(mode="after")
    def _trains(self) -> Recipe:
        kinds = AwareTraining | Tuner | TrainedPruner | Distilling
        trains = [step.method for step in self.steps if isinstance(step.build(), kinds)]
        if self.training is not None and not trains and not self.removing and self.pruning is None:
            raise CompressLabError(
                "'training' belongs to a recipe with a method that trains, such as lsq, or that prunes; this one has none"
            )
        if self.training is not None and self.training.teacher_dtype != "float32" and not self.teaching:
            raise CompressLabError("'training.teacher_dtype' belongs to a recipe for teaching; this one has no teacher")
        if self.training is None and trains:
            object.__setattr__(self, "training", Training())  # written down as it will run, like every other default
        return self

    @property
    def rounding(self) -> Step | None:
        """The step that rounds weights, if there is one."""
        return next((step for step in self.steps if isinstance(step.build(), Rounding)), None)

    @property
    def pruning(self) -> Step | None:
        """The step that sets weights to zero, if there is one."""
        return next(
            (step for step in self.steps if isinstance(step.build(), Pruner | TrainedPruner | NetworkPruner)), None
        )

    @property
    def removing(self) -> tuple[Step, ...]:
        """The steps that take out neurons, channels, heads or blocks."""
        return tuple(
            step for step in self.steps if isinstance(step.build(), UnitRemover | ChannelRemover | BlockRemover)
        )

    @property
    def shaping(self) -> Step:
        """The step that says which layers are worked on. CompressLabError if none does, which the pipeline refuses first."""
        step = self.rounding or self.pruning or next(iter(self.removing), None)
        if step is None:
            raise CompressLabError(f"recipe '{self.name}' has no step that rounds or prunes")
        return step

    @property
    def teaching(self) -> tuple[Step, ...]:
        """The steps that are losses of a student."""
        return tuple(step for step in self.steps if isinstance(step.build(), Distilling))

    @property
    def is_for_a_student(self) -> bool:
        """Whether it teaches a student that somebody names, and changes no network itself."""
        return bool(self.teaching) and not (self.rounding or self.pruning or self.removing)

    @property
    def activations(self) -> Step | None:
        """The step that says how inputs are rounded, if there is one."""
        return next((step for step in self.steps if isinstance(step.build(), ActivationQuantizer)), None)

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def override(self, settings: dict[str, Any]) -> Recipe:
        """A copy with settings replaced: a key of a step, or "ignore", or "calibration.samples" and the like.

        Of several steps that have a key the last one takes it, which rounds the weights; "dynamic.bits" names the step.

        Raises:
            CompressLabError: a key that neither the recipe nor its method has.
        """
        raw = self.model_dump(mode="json")
        steps = {step["method"]: step for step in raw["steps"]}
        for key, value in settings.items():
            where: dict[str, Any] = raw
            *path, leaf = key.split(".")
            for part in path:
                inner = steps.get(part, raw.get(part)) if where is raw else None
                if not isinstance(inner, dict):
                    raise unknown("recipe setting", key, _settings_of(raw))
                where = inner
            if path or leaf in ("ignore", "name", "summary"):
                if leaf not in where or leaf == "method":
                    raise unknown("recipe setting", key, _settings_of(raw))
                where[leaf] = value
            else:
                takers = [step for step in raw["steps"] if leaf in step and leaf != "method"]
                if not takers:
                    raise unknown("recipe setting", key, _settings_of(raw))
                takers[-1][leaf] = value
        return parse(raw, f"recipe '{self.name}' with --set")


def _settings_of(raw: dict[str, Any]) -> list[str]:
    own = [key for step in raw["steps"] for key in step if key != "method"]
    inner = [f"{block}.{key}" for block in ("calibration", "training") for key in raw.get(block) or ()]
    return [*own, "ignore", *inner]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 3e-3 and 2.5e2 for texts; here they are the numbers they are in YAML 1.2, JSON and Python."""


class _Dumper(yaml.SafeDumper):
    """So that a text like 1e5 is quoted."""


WITH_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", WITH_EXPONENT, list("-+.0123456789"))


def plain_value(text: str) -> Any:
    """What a piece of YAML says, in plain values. yaml.YAMLError: it is none, or wants to construct objects."""
    return yaml.load(text, _Loader)  # noqa: S506, it is a SafeLoader


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("compresslab"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(name_or_file: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file.

    Raises:
        CompressLabError: neither; not YAML; YAML that tries to construct objects; unknown keys; wrong values.
    """
    name = str(name_or_file)
    path = shipped().get(name, Path(name))
    if name not in shipped() and path.suffix not in (".yaml", ".yml"):
        raise unknown("recipe", name, shipped())
    try:
        raw = plain_value(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise CompressLabError(f"{path} is a folder: name a YAML file or a shipped recipe") from None
    except FileNotFoundError:
        raise CompressLabError(f"no recipe file {path}; shipped recipes: {', '.join(shipped())}") from None
    except yaml.constructor.ConstructorError as error:
        problem = (error.problem or "").split(" for the tag ")[-1]
        raise CompressLabError(f"{path}: a recipe cannot construct objects ({problem}): use plain values") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompressLabError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return parse(raw, str(path))


def parse(raw: Any, where: str) -> Recipe:
    """A recipe from plain data. CompressLabError that says what is wrong in `where`."""
    if not isinstance(raw, dict):
        raise CompressLabError(f"{where}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(raw)
    except CompressLabError as error:
        raise CompressLabError(f"{where}: {error}") from None
    except ValidationError as error:
        raise CompressLabError(f"{where}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{path}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
    known = [*Recipe.model_fields, *CalibrationSize.model_fields, *Training.model_fields]
    near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
    return f"unknown key '{path}'" + (f": did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")
