"""The image, built once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox import image


@pytest.fixture(scope="session")
def archive() -> Path:
    return image.archive()
