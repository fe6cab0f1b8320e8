"""Data sets of the hub, through the datasets library."""

from __future__ import annotations

import difflib
import re

from compresslab.data.catalogue import DATASETS, SPLIT_NAMES, Found
from compresslab.data.files import one_line, present, table_columns
from compresslab.errors import CompressLabError, unknown


def read_split(source: str, split: str) -> Found:
    """The documents of a hub data set, ``name`` or ``name:config``."""
    served = "offline there are wiki and any local .txt, .tsv, .csv or .parquet file"
    # Without a slash it is more likely a slip in an offline name than one of the hub's few old ids.
    if difflib.get_close_matches(source, DATASETS, n=1, cutoff=0.75):
        raise unknown("data set", source, DATASETS)
    if split == "all":
        raise CompressLabError(f"the hub data set {source} has no split 'all': name one of {', '.join(SPLIT_NAMES)}")
    try:
        import datasets
    except ImportError as error:
        raise CompressLabError(
            f"{source} is no local file, and for the hub the datasets library is missing: pip install "
            f"'compresslab[data]'; {served}"
        ) from error
    name, _, config = source.partition(":")
    hub_split = {"calibration": "train", "validation": "validation", "test": "test"}[split]
    try:
        found = datasets.load_dataset(name, config or None, split=hub_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CompressLabError(
            f"cannot get the {hub_split} split of {source} from the hub ({one_line(error)}); {served}"
        ) from error
    dtypes = {column: str(getattr(feature, "dtype", "")) for column, feature in found.features.items()}
    strings = [column for column, dtype in dtypes.items() if dtype in ("string", "large_string")]
    text, label = table_columns(source, strings, [column for column, dtype in dtypes.items() if "int" in dtype])
    documents, labels = present(list(found[text]), None if label is None else list(found[label]))
    # The hub names the commit only in the addresses of the files it fetched.
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(found.info.download_checksums or {}))
    return commit[1] if commit else "unknown", documents, labels
