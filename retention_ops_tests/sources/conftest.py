"""A real Postgres for the tests of pulls."""

from retention_ops_tests.execute.stage import postgres_url

__all__ = ["postgres_url"]
