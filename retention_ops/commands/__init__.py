"""The commands of `retention-ops`, one module per group. They ask plain modules and print; nothing is decided here."""
