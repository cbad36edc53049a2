"""Fixtures of house.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retention_ops_tests.serve.house import House, opened, template_home


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home to copy."""
    return template_home(tmp_path_factory.mktemp("served") / "home")


@pytest.fixture
def house(served: Path, tmp_path: Path) -> Iterator[House]:
    """A house in shadow."""
    with opened(served, tmp_path) as made:
        yield made
