"""Small loopback servers that behave like the real services where it matters; the real client libraries talk to them."""
