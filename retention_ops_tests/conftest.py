"""Shared by all tests: no setting, secret or proxy of the machine that runs them may leak in."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest

from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.shops import DAYS, FIRST_DAY, lake_with, small_shop

LAST_DAY = date.fromordinal(FIRST_DAY.toordinal() + DAYS - 1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("RETENTION_OPS_", "DAGSTER_")) or name.lower() in ("http_proxy", "https_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # no .env of the checkout is read, nothing is written into it


@pytest.fixture
def small_lake(tmp_path: Path) -> Lake:
    """The small shop, its planted cohort and a sample floor low enough for its alert to fire."""
    return lake_with(small_shop(), tmp_path / "home", min_sample=10, shop_name="Small shop")


def settings_for(home: Path, **overrides: object) -> Settings:
    """Settings that ignore every .env."""
    return Settings(_env_file=None, home=home, **overrides)
