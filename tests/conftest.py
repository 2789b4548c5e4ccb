"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data: $RESCOMPRESS_SHARED, or ``../shared`` beside the project; skip without it."""
    folder = Path(os.environ.get("RESCOMPRESS_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder} (set RESCOMPRESS_SHARED)")
    return folder
