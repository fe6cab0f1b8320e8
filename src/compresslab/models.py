"""Models: found by name, read tensor by tensor, opened as a whole. With data/ and zoo.py, all that knows transformers.

A model is a hub id, a local folder, or a name of the offline zoo. `find` turns any of them into a `Source`: a folder with
a config and safetensors files. From there a model can be had in two ways:

- `Source.skeleton()` builds the architecture without any weight, and `Source.weights` reads single tensors from the
  memory-mapped files: this is how the layer-wise driver works on one block at a time, whatever the model's size;
- `load()` opens the whole model the way any user of transformers does.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from compresslab import architectures, zoo
from compresslab.edits import Edit, apply_
from compresslab.errors import CompressLabError
from compresslab.numerics.attention import causal_attention, proportional_attention
from compresslab.weights import FolderWeights, MemoryWeights, Weights

# ---------------------------------------------------------------------------------------------------------------------
# Finding a model
# ---------------------------------------------------------------------------------------------------------------------


# What transformers raises of a config that describes no network.
NO_CONFIG = (ValueError, KeyError, TypeError, OSError, AssertionError, ZeroDivisionError, StrictDataclassError)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that is named and found, but not in memory.

    Attributes:
        name: what the user called it.
        folder: where its files lie; None for a model given as an object.
        config: its transformers configuration.
        weights: its tensors, by the parameter names of the skeleton.
        tied: parameter -> the parameter whose tensor it shares (an output head that is the embedding, say).
        edits: what differs from the network that the config builds (see edits.py).
        unused: tensors of the files that the architecture has no place for; they are left out, and the report says so.
    """

    name: str
    folder: Path | None
    config: transformers.PretrainedConfig
    weights: Weights
    tied: dict[str, str] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    unused: tuple[str, ...] = ()
    licence: str = "unknown"
    revision: str | None = None

    @property
    def architecture(self) -> str:
        return (self.config.architectures or ["unknown"])[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are stored in: scales and untouched tensors keep it."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def skeleton(self, attention: str | None = None) -> nn.Module:
        """The architecture with parameters on the meta device, real buffers, in eval mode."""
        model = _skeleton(self.config, attention)
        apply_(model, self.edits)
        return model

    @property
    def reads_images(self) -> bool:
        return main_input(self.config) == "pixel_values"

    def example(self) -> dict[str, Tensor]:
        """The smallest input that the network runs on."""
        if not self.reads_images:
            return {main_input(self.config): torch.zeros(1, 8, dtype=torch.long)}
        return {"pixel_values": torch.zeros(1, *picture_shape(self.config, self.folder))}

    def image_processor(self) -> Any:
        """What turns pictures into this model's pixel_values. CompressLabError if its folder does not say."""
        return load_image_processor(self.folder, self.name)

    def tokenizer(self) -> Any:
        """The model's tokenizer. CompressLabError if its folder has none."""
        return load_tokenizer(self.folder, self.name)

    def tokenizer_sha256(self) -> str | None:
        """A hash of all that makes tokens of text; None without a tokenizer."""
        if not self.has_tokenizer():
            return None
        tokenizer = self.tokenizer()
        if not tokenizer.is_fast:
            made: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
        else:
            made = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # of a call
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def has_tokenizer(self) -> bool:
        return self.folder is not None and any(
            (self.folder / file).exists()
            for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
        )


def find(model: str | Path | nn.Module, *, revision: str | None = None) -> Source:
    """The source that a name, a folder or a transformers model stands for.

    Raises:
        CompressLabError: nothing of that name, no safetensors, or an architecture that transformers does not have.
    """
    if isinstance(model, nn.Module):
        return _from_object(model)
    name = str(model)
    folder, licence = _folder(name, revision)
    config = _config(folder, name)
    weights, tied, unused = _matched(config, folder, name)
    return Source(
        name=name, folder=folder, config=config, weights=weights, tied=tied, unused=unused, licence=licence,
        revision=revision,
    )  # fmt: skip


def _folder(name: str, revision: str | None) -> tuple[Path, str]:
    if name in zoo.MODELS:
        return zoo.model_folder(name), zoo.MODELS[name].licence
    path = Path(name).expanduser()
    if path.is_dir():
        return path, "unknown"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(sorted(zoo.MODELS))
        raise CompressLabError(f"no model '{name}': not a folder, not a hub id (owner/name), not in the zoo ({known})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted)), "see the hub's model card"
    except RepositoryNotFoundError:
        raise CompressLabError(f"the hub has no model '{name}' (or it is private: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressLabError(
            f"cannot fetch '{name}' from the hub ({reason}): check the network, name a local folder, "
            f"or take an offline model: {', '.join(sorted(zoo.MODELS))}"
        ) from None


def _plain_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CompressLabError(f"{folder} has no config.json: is it a model folder?") from None
    except ValueError as error:
        raise CompressLabError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CompressLabError(f"{path} holds no mapping: is it a transformers config?")
    return raw


def _config(folder: Path, name: str) -> transformers.PretrainedConfig:
    path, raw = folder / "config.json", _plain_config(folder)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise CompressLabError(f"'{name}' is quantised already ({method}): name the model in floating point")
    architecture = (raw.get("architectures") or [None])[0]
    if architecture_class(architecture) is None:
        raise CompressLabError(
            f"'{name}' has the architecture {architecture or raw.get('model_type')!r}, which transformers "
            f"{transformers.__version__} cannot build without running the model's own code"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        _skeleton(config)
    except NO_CONFIG as error:
        raise CompressLabError(
            f"no model can be built from the config {path}: {' '.join(str(error).split())}"
        ) from None
    return config


def architecture_class(name: str | None) -> type[transformers.PreTrainedModel] | None:
    """The model class of that name, ours or transformers'; None if neither has it."""
    found = architectures.CLASSES.get(str(name)) or getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def main_input(config: transformers.PretrainedConfig) -> str:
    """The name of what a network of this config reads: "input_ids", "pixel_values" or another."""
    return str(_class_of(config).main_input_name)


def _class_of(config: transformers.PretrainedConfig) -> Any:
    name = (config.architectures or [""])[0]
    cls = architecture_class(name)
    if cls is None:
        raise CompressLabError(
            f"config.json names {name or 'no architecture'}, which transformers {transformers.__version__} does not have"
        )
    return cls


def build(config: transformers.PretrainedConfig) -> nn.Module:
    """The architecture of a config with parameters on the meta device, real buffers, in eval mode."""
    return _skeleton(config)


def initialised(config: transformers.PretrainedConfig, seed: int) -> nn.Module:
    """The architecture of a config with fresh float32 weights, in eval mode; the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _class_of(config)(copy.deepcopy(config)).eval()


def described(architecture: str, **settings: Any) -> transformers.PretrainedConfig:
    """The config of an architecture, such as "ViTForImageClassification", with these settings in place of its own."""
    cls = architecture_class(architecture)
    if cls is None:
        raise CompressLabError(f"transformers has no architecture '{architecture}': name one of its classes")
    kind: Any = cls.config_class
    config: transformers.PretrainedConfig = kind(architectures=[architecture], **settings)
    return config


def reread(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The config as it comes back from a file, where transformers looks at it harder than at one that is changed in memory.

    Raises:
        CompressLabError: if transformers would not open it.
    """
    try:
        return type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise CompressLabError(f"transformers refuses this config: {' '.join(str(error).split())}") from None


def _skeleton(config: transformers.PretrainedConfig, attention: str | None = None) -> nn.Module:
    cls = _class_of(config)
    config = copy.deepcopy(config)
    config.use_cache = False  # a skeleton only ever reads whole windows: keys and values kept would be a leak
    if attention is not None and cls._supports_sdpa:
        config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        return cls(config).eval().requires_grad_(False)


def _matched(
    config: transformers.PretrainedConfig, folder: Path, name: str
) -> tuple[Weights, dict[str, str], tuple[str, ...]]:
    """A folder's tensors under the names of the architecture's parameters; which of those share another's tensor; and
    which tensors are not used.

    Most checkpoints carry those names, but for the prefix of the model inside a model. One that does not (older names,
    fused experts) is opened whole by transformers, which knows how to rename it, and read from memory.
    """
    skeleton = _skeleton(config)
    weights = FolderWeights(folder)
    wanted = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    tied = {k: v for k, v in getattr(skeleton, "all_tied_weights_keys", {}).items() if k in wanted}
    prefix = getattr(skeleton, "base_model_prefix", "") + "."
    for stored in weights.names():
        for candidate in (prefix + stored, stored.removeprefix(prefix)):
            if stored not in wanted and candidate in wanted and candidate not in weights.names():
                weights.rename(stored, candidate)
                break
    found: Weights = weights
    if _missing(skeleton, wanted, found, tied):
        found = _opened_whole(config, folder, name, tied)
    for key, shape in wanted.items():
        if key in found.names() and found.shape(key) != shape:
            raise CompressLabError(
                f"tensor {key} of '{name}' has shape {list(found.shape(key))}, but its config asks for {list(shape)}"
            )
    unused = tuple(key for key in found.names() if key not in wanted)
    return found, {k: v for k, v in tied.items() if k not in found.names()}, unused


def _missing(skeleton: nn.Module, wanted: Iterable[str], weights: Weights, tied: dict[str, str]) -> list[str]:
    """Parameters that neither the checkpoint nor a tie provides. An encoder without its pooler is still whole."""
    return sorted(k for k in set(wanted) - set(weights.names()) - set(tied) if not _is_optional(skeleton, k))


def _opened_whole(
    config: transformers.PretrainedConfig, folder: Path, name: str, tied: dict[str, str]
) -> MemoryWeights:
    cls = _class_of(config)
    with quiet_transformers():
        model, told = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    missing = sorted(key for key in told["missing_keys"] if not _is_optional(model, key))
    if missing:
        raise CompressLabError(
            f"the checkpoint of '{name}' lacks {len(missing)} of the tensors of {cls.__name__}, "
            f"first {missing[0]}: it may need a newer transformers, or be damaged"
        )
    absent = set(told["missing_keys"])
    return MemoryWeights({k: v for k, v in model.state_dict().items() if k not in tied and k not in absent})


def _is_optional(skeleton: nn.Module, key: str) -> bool:
    """Whether a model without this tensor is still whole: the pooler of an encoder is often not saved."""
    return "pooler." in key or key.endswith("position_ids")


def _from_object(model: nn.Module) -> Source:
    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PretrainedConfig):
        raise CompressLabError(
            f"{type(model).__name__} is not a transformers model: give a PreTrainedModel, a folder or a name"
        )
    config = type(config).from_dict(config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    tied = {k: v for k, v in getattr(model, "all_tied_weights_keys", {}).items()}
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied}
    return Source(name=type(model).__name__, folder=None, config=config, weights=MemoryWeights(tensors), tied=tied)


# ---------------------------------------------------------------------------------------------------------------------
# Opening a model as its users do
# ---------------------------------------------------------------------------------------------------------------------


def locate(model: str | Path) -> Path:
    """The folder of a model or of an artifact, by name; fetched if need be."""
    return _folder(str(model), None)[0]


def read_config(folder: Path | str) -> transformers.PretrainedConfig:
    """The configuration of a model or an artifact. CompressLabError: there is none that transformers knows."""
    folder = Path(folder)
    _plain_config(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except NO_CONFIG as error:
        raise CompressLabError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None


def reads_images(folder: Path) -> bool:
    """Whether the model of a folder, float or compressed, reads pictures."""
    return main_input(read_config(folder)) == "pixel_values"


def load(folder: Path | str, *, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The whole model of a folder, float or compressed, in eval mode; opened by plain transformers, but for our own layout."""
    from compresslab.deploy import native  # it builds on this module

    if native.is_ours(Path(folder)):
        return native.load(Path(folder), dtype=dtype)
    cls = _class_of(read_config(folder))
    with quiet_transformers():
        return cls.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def as_opened_(model: nn.Module) -> nn.Module:
    """The model with parameters that ask for gradients, as transformers hands it to its users.

    torch 2.13 picks other kernels for bfloat16 weights that ask for none: a prompt takes half as long again with these.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_inference():
            parameter.requires_grad_(True)
    return model


def materialise(source: Source) -> nn.Module:
    """The whole network of a source in float32, in eval mode, with parameters that can be trained.

    Optional parts that the checkpoint lacks (an encoder's pooler) are zero.
    """
    model = source.skeleton()
    stored = set(source.weights.names())
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = source.weights.get(name).float() if name in stored else torch.zeros(parameter.shape)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(source.weights.get(name))
    tie_weights(model)
    return model


def retrained(source: Source, model: nn.Module) -> Source:
    """The source with the tensors that a trained network has by its names, in the dtypes that they are stored in."""
    values = model.state_dict()
    tensors = {
        name: values[name].detach().to("cpu", source.weights.get(name).dtype)
        for name in source.weights.names()
        if name in values
    }
    return replace(source, weights=MemoryWeights(tensors))


def decompress_(model: nn.Module) -> None:
    """Have transformers multiply out compressed weights now that it would on the first forward; bitsandbytes' in float32."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)  # type: ignore[union-attr, operator]
        # 4-bit floats come out as bfloat16 whatever the model's dtype.
        model.to(model.dtype)  # type: ignore[arg-type]
    elif getattr(model, "is_loaded_in_4bit", False):
        # Opened for bitsandbytes, a model takes its config's dtype whatever was asked for, and refuses a cast until then.
        model.dequantize(dtype=torch.float32)  # type: ignore[operator]
        model.float()


def load_tokenizer(folder: Path | str | None, name: str) -> Any:
    if folder is None:
        raise CompressLabError(f"{name} came without a tokenizer: pass calibration batches made with yours")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompressLabError(f"'{name}' has no tokenizer that opens ({reason})") from None


def load_image_processor(folder: Path | str | None, name: str) -> Any:
    if folder is None:
        raise CompressLabError(f"{name} came without an image processor: pass calibration batches made with yours")
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompressLabError(f"'{name}' has no preprocessor_config.json that opens ({reason})") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal: ours is there."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def hub_offline() -> Iterator[None]:
    """Have other libraries ask no hub meanwhile."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers and blocks of any architecture
# ---------------------------------------------------------------------------------------------------------------------


def classes_of_texts(source: Source) -> dict[int, str]:
    """The classes that a model sorts texts into, by number. CompressLabError if it is no such model."""
    if not source.architecture.endswith("ForSequenceClassification") or source.config.problem_type == "regression":
        raise CompressLabError(
            f"{source.name} ({source.architecture}) is neither a causal language model nor a classifier of texts: to train it, "
            "give compress() a data set object whose items are dicts of what it takes, with 'labels'"
        )
    return {int(number): str(name) for number, name in (source.config.id2label or {}).items()}


def is_language_model(model: nn.Module) -> bool:
    """Whether a model predicts the next token, so that perplexity and decoding make sense of it."""
    return type(model).__name__.endswith("ForCausalLM") or type(model).__name__.endswith("LMHeadModel")


def writes(config: transformers.PretrainedConfig) -> bool:
    """Whether a model of this config writes text after a prompt: a causal or a seq2seq language model."""
    return (config.architectures or [""])[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def sorts_texts(config: transformers.PretrainedConfig) -> bool:
    """Whether a model of this config sorts texts into classes; `classes_of_texts` has them."""
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def is_image_classifier(model: nn.Module) -> bool:
    """Whether a model sorts pictures into classes, so that top-1 accuracy makes sense of it."""
    return type(model).__name__.endswith("ForImageClassification")


def classes(model: nn.Module) -> tuple[dict[str, int], int]:
    """The classes that an image classifier names, and how many it has."""
    config = model.config
    assert isinstance(config, transformers.PretrainedConfig)
    names = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    return names, len(config.id2label or ())


def is_encoder(config: transformers.PretrainedConfig) -> bool:
    """Whether a model without a head returns a hidden state for every token, so that texts can be embedded with it."""
    architecture = (config.architectures or [""])[0]
    reads_text = getattr(config, "vocab_size", None) is not None
    two_sided = getattr(config, "is_encoder_decoder", False) and not architecture.endswith("EncoderModel")
    return architecture.endswith("Model") and "Head" not in architecture and reads_text and not two_sided


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens a language model knows."""
    config = model.config
    assert isinstance(config, transformers.PretrainedConfig)
    return int(config.vocab_size)


def picture_shape(config: Any, folder: Path | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a network reads: by its config, else by its folder's
    preprocessor_config.json, else 224 x 224, as ImageNet's networks have it."""
    size = getattr(config, "image_size", None)
    if size is None and folder is not None and (settings := folder / "preprocessor_config.json").exists():
        said = json.loads(settings.read_text(encoding="utf-8"))
        size = said.get("crop_size" if said.get("do_center_crop") else "size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    height, width = size if isinstance(size, list | tuple) else (size or 224, size or 224)
    return getattr(config, "num_channels", 3), height, width


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a weight matrix: nn.Linear, transformers' transposed Conv1D, nn.Conv2d.

    A convolution multiplies the patches of its input by its weight as [out, in / groups * height * width].
    """
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept as [in, out] (GPT-2's Conv1D)."""
    return isinstance(module, Conv1D)


def groups_of(module: nn.Module) -> int:
    """Into how many groups the channels of a layer fall that never meet: 1 but for grouped convolutions."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a linear layer's weight as a matrix, as it is kept: [out, in], or [in, out] if `is_transposed`."""
    rows, *rest = weight_of(module).shape
    return rows, math.prod(rest)


def way_of_reading(module: nn.Module) -> tuple[Any, ...]:
    """What `input_rows` depends on but the input: layers that read one tensor in the same way have the same rows."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode, module.groups)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The vectors that a layer's weight matrix is multiplied with, [..., groups * in].

    Of a convolution these are the patches of x [n, channels, height, width], one for every output pixel; each holds its
    channels one after the other, so those of a group lie together.
    """
    if not isinstance(module, nn.Conv2d):
        return x
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if module.kernel_size == (1, 1):
        down, across = module.stride
        return x[:, :, ::down, ::across].permute(0, 2, 3, 1).flatten(1, 2)
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, stride=module.stride)
    return patches.transpose(1, 2)


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input with one vector for each token or pixel, [..., channels]."""
    return x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x


def place_tensor(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Put a tensor in the place of a parameter or buffer; floats in the compute dtype."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def tie_weights(model: nn.Module) -> None:
    """Have tied parameters share their tensor again after it was put in place."""
    assert isinstance(model, transformers.PreTrainedModel)
    model.tie_weights()


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as it is kept: [out, in], or [in, out] if `is_transposed`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its name, in the order of definition."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a network: members of the outermost lists that hold linear layers.

    A list is a ModuleList, or a Sequential of at least two networks: one whose members are mere layers, such as a
    classifier's, is part of something larger.

    Works on decoders, encoders, encoder-decoders, vision transformers and convolutional nets alike, because it asks how a
    network is built and not what its attributes are called. Empty if there is no such list: the network is then one piece.
    """
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        inner = [linear_layers(child) for child in module.children()]
        networks = [layers for layers in inner if layers and "" not in layers]
        if (isinstance(module, nn.ModuleList) and any(inner)) or (
            isinstance(module, nn.Sequential) and len(networks) > 1
        ):
            found.update({f"{name}.{child_name}": child for child_name, child in module.named_children()})
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The calibration forward's attention
# ---------------------------------------------------------------------------------------------------------------------

CALIBRATION_ATTENTION = "compresslab_causal"
WATCHED_ATTENTION = "compresslab_watched"
_WATCHER = "_compresslab_watcher"


def watch_attention_(model: nn.Module, watcher: Callable[[str, Tensor, Tensor], None]) -> None:
    """Have a skeleton with the calibration attention tell of every attention: the module's name, the keys and the values
    [batch, heads, tokens, d], as a cache would get them."""
    for name, module in model.named_modules():
        module.__dict__[_WATCHER] = functools.partial(watcher, name)


def _calibration_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface over numerics.causal_attention; anything but plain causal goes to sdpa."""
    if (watcher := module.__dict__.get(_WATCHER)) is not None:
        watcher(key, value)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = is_causal and attention_mask is None and query.shape[2] == key.shape[2] and query.device.type == "cpu"
    if not plain or set(kwargs) & {"position_bias", "softcap", "s_aux"}:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return causal_attention(query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5), None


@contextmanager
def attention_watched(model: nn.Module, watcher: Callable[[str, Tensor, Tensor, Tensor, bool], None]) -> Iterator[None]:
    """Have a whole network tell of every attention: the module's name, queries, keys and values [batch, heads, tokens, d], and
    whether it is causal. It computes what it did, by torch's fused attention.

    Raises:
        CompressLabError: if the architecture does not leave its attention to transformers' interface.
    """
    assert isinstance(model, transformers.PreTrainedModel)
    before = model.config._attn_implementation
    model.set_attn_implementation(WATCHED_ATTENTION)
    if model.config._attn_implementation != WATCHED_ATTENTION:
        raise CompressLabError(
            f"the attention of {type(model).__name__} cannot be watched: leave out what compares heads"
        )
    for name, module in model.named_modules():
        module.__dict__[_WATCHER] = functools.partial(watcher, name)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")
        for module in model.modules():
            module.__dict__.pop(_WATCHER, None)


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    is_causal = kwargs.get("is_causal")
    module.__dict__[_WATCHER](query, key, value, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(WATCHED_ATTENTION, _watched_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(WATCHED_ATTENTION, sdpa_mask)
ALL_ATTENTION_FUNCTIONS.register(CALIBRATION_ATTENTION, _calibration_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(CALIBRATION_ATTENTION, sdpa_mask)


PROPORTIONAL_ATTENTION = "compresslab_proportional"


def _proportional_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface over numerics.proportional_attention."""
    return proportional_attention(query, key, value), None


ALL_ATTENTION_FUNCTIONS.register(PROPORTIONAL_ATTENTION, _proportional_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROPORTIONAL_ATTENTION, sdpa_mask)
