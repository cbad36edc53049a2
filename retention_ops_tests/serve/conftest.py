"""Fixtures of house.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retention_ops_tests.execute.stage import database_url, postgres_url
from retention_ops_tests.serve.house import House, opened, template_home

__all__ = ["database_url", "house", "postgres_url", "served"]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home to copy."""
    return template_home(tmp_path_factory.mktemp("served") / "home")


@pytest.fixture
def house(served: Path, tmp_path: Path) -> Iterator[House]:
    """A house in shadow."""
    with opened(served, tmp_path) as made:
        yield made
