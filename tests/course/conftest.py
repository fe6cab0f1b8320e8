"""Pictures of a user's own, for the labs that learn some."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def own_pictures(tmp_path: Path) -> str:
    """60 pictures in ten classes, a folder for each."""
    for number in range(60):
        folder = tmp_path / "pictures" / f"{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        Image.new("RGB", (32, 32), (4 * number, 20 * (number % 10), 0)).save(content, "PNG")
        (folder / f"{number}.png").write_bytes(content.getvalue())
    return str(tmp_path / "pictures")
