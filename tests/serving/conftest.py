"""One tiny artifact for all tests of chat and serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from byte_model import compress, save_model


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    return compress(save_model(root / "model", hidden_size=64), root / "artifact", group_size=32)


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
