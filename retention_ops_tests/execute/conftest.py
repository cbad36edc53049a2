"""The fixtures of stage.py, for every test of the response."""

from retention_ops_tests.execute.stage import database_url, engine, postgres_url, stage, template

__all__ = ["database_url", "engine", "postgres_url", "stage", "template"]
