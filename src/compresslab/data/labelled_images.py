"""Pictures with class labels: batches to calibrate on, and batches to measure top-1 accuracy on.

A source is a folder with a sub-folder for each class, a folder of such folders for the splits (train, valid, test), or a
parquet file with a column ``image`` (a struct of ``bytes`` and ``path``) and a column of whole numbers ``label``.

What is not split already is shuffled, always in the same way, and cut: 20 % to calibrate on, 10 % for validation and 70 % to
measure on. Ranges settle after a few dozen pictures, while a difference of one per cent in accuracy takes hundreds to see.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab.data.catalogue import SPLIT_NAMES
from compresslab.data.files import images as folder_images
from compresslab.data.files import one_line
from compresslab.data.labelled import Example, Labelled, examples_sha256
from compresslab.data.tokens import Calibration
from compresslab.errors import CompressLabError, unknown
from compresslab.wheels import file_sha256

SHUFFLE = 0  # the seed of the order in which an unsplit source is cut
BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """One split of a source of pictures.

    Attributes:
        labels: of every picture; a number, or the name of its folder.
        open: the bytes of picture i.
    """

    name: str
    split: str
    revision: str
    labels: list[int | str]
    open: Callable[[int], bytes]


def pictures(source: str, split: str = "calibration") -> Pictures:
    """One split of a source. CompressLabError if there is no such source or split, or no picture in it."""
    if split not in (*SPLIT_NAMES, "all"):
        raise unknown("split", split, (*SPLIT_NAMES, "all"))
    path = Path(source).expanduser()
    if not path.exists():
        raise CompressLabError(
            f"{source}: no such file or folder; this model reads pictures: name a folder with a sub-folder for each class, "
            "or a parquet file with the columns image and label"
        )
    if path.is_dir():
        folders = {name: path / part for name, parts in SPLIT_NAMES.items() for part in parts if (path / part).is_dir()}
        if folders and split != "all" and split not in folders:
            raise CompressLabError(f"{path} has the splits {', '.join(folders)}: add a folder for {split}")
        found = _folder(folders[split]) if folders and split != "all" else _folder(path)
        return _part(path.name, found, split, cut=not folders)
    if path.suffix.lower() != ".parquet":
        raise CompressLabError(
            f"{path} holds no pictures: name a folder with a sub-folder for each class, or a .parquet"
        )
    return _part(path.name, _parquet(path), split, cut=True)


Found = tuple[str, list[int | str], Callable[[int], bytes]]


def _part(name: str, found: Found, split: str, *, cut: bool) -> Pictures:
    revision, labels, read = found
    order = list(range(len(labels)))
    if cut and split != "all":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SHUFFLE)).tolist()
        first, second = len(order) * 2 // 10, len(order) * 3 // 10
        bounds = {"calibration": (0, first), "validation": (first, second), "test": (second, len(order))}
        order = order[slice(*bounds[split])]
    if not order:
        raise CompressLabError(f"the {split} split of {name} holds no picture: choose another split or source")
    return Pictures(
        name=name, split=split, revision=revision, labels=[labels[i] for i in order], open=lambda i: read(order[i])
    )


def _folder(path: Path) -> Found:
    files = folder_images(path)
    digest = hashlib.sha256("\n".join(f"{f.relative_to(path)} {f.stat().st_size}" for f, _ in files).encode())
    return f"sha256:{digest.hexdigest()[:16]}", [label for _, label in files], lambda i: files[i][0].read_bytes()


def _parquet(path: Path) -> Found:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise CompressLabError(f"reading {path} needs pyarrow: pip install 'compresslab[data]'") from error
    try:
        table = pq.ParquetFile(path).read(columns=["image", "label"])
    except (pa.ArrowInvalid, KeyError) as error:
        raise CompressLabError(f"{path} is not sound parquet ({one_line(error)}): write it again") from error
    if set(table.column_names) != {"image", "label"} or not pa.types.is_struct(table.schema.field("image").type):
        raise CompressLabError(f"{path} holds no pictures: it needs the columns image (bytes and path) and label")
    labels = table.column("label").to_pylist()
    if not all(isinstance(label, int) for label in labels):
        raise CompressLabError(f"{path}: the column label must hold a whole number in every row")
    column = table.column("image")
    return f"sha256:{file_sha256(path)[:16]}", labels, lambda i: column[i].as_py()["bytes"]


def label_ids(found: Pictures, label2id: Mapping[str, int], classes: int) -> Tensor:
    """The class numbers of a model, int64 [n].

    A folder's name counts as the class of that name, if the model knows it; as the number that it is; or, where there are
    as many folders as classes, as its place among them in alphabetical order.

    Raises:
        CompressLabError: if the labels cannot be the model's.
    """
    names = sorted({str(label) for label in found.labels})
    if all(isinstance(label, int) for label in found.labels):
        ids = {name: int(name) for name in names}
    elif all(name in label2id for name in names):
        ids = {name: int(label2id[name]) for name in names}
    elif all(re.fullmatch(r"\d+", name) for name in names):
        ids = {name: int(name) for name in names}
    elif len(names) == classes:
        ids = {name: number for number, name in enumerate(names)}
    else:
        raise CompressLabError(
            f"{found.name} has {len(names)} classes such as '{names[0]}', which the model with {classes} classes does not "
            "name: call the sub-folders by the class's number or its name in config.json"
        )
    wrong = [name for name, number in ids.items() if not 0 <= number < classes]
    if wrong:
        raise CompressLabError(f"{found.name} has the label {wrong[0]}, but the model's classes are 0 to {classes - 1}")
    return torch.tensor([ids[str(label)] for label in found.labels])


def image_batches(
    found: Pictures, processor: Any, *, indices: Sequence[int] | None = None, size: int = BATCH
) -> Iterator[Tensor]:
    """pixel_values [b, channels, height, width] of these pictures, or all of them, as the model's processor makes them."""
    indices = range(len(found.labels)) if indices is None else indices
    for start in range(0, len(indices), size):
        opened = [_opened(found, i) for i in indices[start : start + size]]
        yield processor(images=opened, return_tensors="pt")["pixel_values"]


def _opened(found: Pictures, index: int) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CompressLabError("reading pictures needs pillow: pip install 'compresslab[data]'") from error
    try:
        return Image.open(io.BytesIO(found.open(index))).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CompressLabError(
            f"picture {index} of the {found.split} split of {found.name}: {one_line(error)}"
        ) from None


def _chosen(source: str, samples: int, seed: int) -> tuple[Pictures, list[int]]:
    """The calibration split, and `samples` of its pictures without repetition. CompressLabError if there are fewer."""
    found = pictures(source, "calibration")
    if len(found.labels) < samples:
        raise CompressLabError(
            f"the calibration split of {source} has {len(found.labels)} pictures: use at most --samples {len(found.labels)}"
        )
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return found, order


def labelled_pictures(
    source: str, processor: Any, *, classes: tuple[Mapping[str, int], int], samples: int, seed: int = 0
) -> Labelled:
    """`samples` pictures of the calibration split to train on, with their classes' numbers; none to measure on, as top-1 accuracy
    is measured on the whole test split.

    Args:
        classes: the model's, as `label_ids` takes them.
    """
    found, order = _chosen(source, samples, seed)
    ids = label_ids(found, *classes)
    batches = image_batches(found, processor, indices=order, size=BATCH)
    rows = [row for batch in batches for row in batch]
    made: list[Example] = [{"pixel_values": row, "labels": ids[i]} for row, i in zip(rows, order, strict=True)]
    return Labelled(
        source=source, revision=found.revision, samples=samples, test_split=f"{source}, test split",
        sha256=examples_sha256(made), train=made, test=[],
    )  # fmt: skip


def image_calibration(
    source: str, processor: Any, *, samples: int, seed: int = 0, batch_size: int = BATCH
) -> Calibration:
    """`samples` pictures of the calibration split, picked without repetition. CompressLabError if there are fewer."""
    found, order = _chosen(source, samples, seed)
    made = list(image_batches(found, processor, indices=order, size=batch_size))
    digest = hashlib.sha256()
    for batch in made:
        digest.update(batch.contiguous().numpy().tobytes())
    return Calibration(
        source=source, revision=found.revision, split="calibration", samples=samples, sequence_length=None, tokens=None,
        seed=seed, sha256=digest.hexdigest(), batches=[{"pixel_values": batch} for batch in made],
    )  # fmt: skip
