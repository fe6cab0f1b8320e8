"""Text and pictures for calibration and evaluation: offline data sets, local files, and data sets of the hub.

A *source* is a name of :data:`DATASETS`, a local file or folder, or a data set id of the hub (``name`` or
``name:config``). Every source has the splits ``calibration``, ``validation`` and ``test``, which never overlap:

- ``wiki`` is split by article;
- a single file (.txt by lines, .tsv, .csv and .parquet by rows) is cut at 80 % and at 90 %; ``all`` is the whole file;
- a folder holds one file per split, named train, valid and test (or what :data:`SPLIT_NAMES` lists);
- of a hub data set they are its train, validation and test.

Prompts with references and rated pairs of texts are tables too; see questions.py. Models that read pictures take a folder of
them or a parquet file; see labelled_images.py.
"""

from __future__ import annotations

from compresslab.data.catalogue import DATASETS, SPLIT_NAMES, Dataset, Kind, Labels
from compresslab.data.files import images
from compresslab.data.labelled import Labelled, examples_sha256, labelled_examples, labelled_test, labelled_texts
from compresslab.data.labelled_images import (
    Pictures,
    image_batches,
    image_calibration,
    label_ids,
    labelled_pictures,
    pictures,
)
from compresslab.data.offline import (
    LabelledImages,
    RatedDocuments,
    WordPair,
    digits,
    documents_with_similarity,
    is_cached,
    word_pairs,
)
from compresslab.data.passages import calibration_passages, encoder_texts, padded, passages, rated_documents
from compresslab.data.questions import Rated, Written
from compresslab.data.questions import read as questions
from compresslab.data.sources import Texts, texts
from compresslab.data.tokens import Calibration, calibration, windows

__all__ = [
    "DATASETS",
    "SPLIT_NAMES",
    "Calibration",
    "Dataset",
    "Kind",
    "Labelled",
    "LabelledImages",
    "Labels",
    "Pictures",
    "Rated",
    "RatedDocuments",
    "Texts",
    "WordPair",
    "Written",
    "calibration",
    "calibration_passages",
    "digits",
    "documents_with_similarity",
    "encoder_texts",
    "examples_sha256",
    "image_batches",
    "image_calibration",
    "images",
    "is_cached",
    "label_ids",
    "labelled_examples",
    "labelled_pictures",
    "labelled_test",
    "labelled_texts",
    "padded",
    "passages",
    "pictures",
    "questions",
    "rated_documents",
    "texts",
    "windows",
    "word_pairs",
]
