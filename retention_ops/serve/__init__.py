"""Doors for others onto the same tables, packs and response: the MCP server. Nothing is decided here a second time."""
