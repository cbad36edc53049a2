"""Which destination serves which slot. The libraries that talk to the outside are imported here only when they are used."""

from __future__ import annotations

from collections.abc import Callable

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.choice import SLOTS, chosen, target_of
from retention_ops.execute.destinations.local import Local
from retention_ops.execute.destinations.seam import Destination
from retention_ops.settings import Secrets, Settings


def connect(name: str, settings: Settings, secrets: Secrets, mode: str, clock: Clock = system_clock) -> Destination:
    """A destination ready to use. Raises SettingsError naming what is missing."""
    match name:
        case "local":
            return Local(settings, mode)
        case "slack":
            from retention_ops.execute.destinations.slack import Slack

            return Slack.connect(settings, secrets, mode)
        case "jira":
            from retention_ops.execute.destinations.jira import Jira

            return Jira.connect(settings, secrets, mode)
        case "asana":
            from retention_ops.execute.destinations.asana import Asana

            return Asana.connect(settings, secrets, mode)
        case "roundup":
            from retention_ops.execute.destinations.roundup import Roundup

            return Roundup.connect(settings, secrets, mode)
        case "sheets":
            from retention_ops.execute.destinations.sheets import Sheets

            return Sheets.connect(settings, secrets, mode)
        case "webhook":
            from retention_ops.execute.destinations.webhook import Webhook

            return Webhook.connect(settings, secrets, mode, clock)
        case "mail":
            from retention_ops.execute.destinations.mail import Mail

            return Mail.connect(settings, secrets, mode)
        case "heartbeat":
            from retention_ops.execute.destinations.heartbeat import Heartbeat

            return Heartbeat.connect(secrets)
        case "dagster":
            from retention_ops.execute.destinations.dagster import Dagster

            return Dagster.connect(settings)
    raise SettingsError(f"there is no destination {name!r}")


__all__ = ["SLOTS", "Destinations", "chosen", "connect", "target_of"]


class Destinations:
    """Connects each destination once, when it is first needed."""

    def __init__(
        self, settings: Settings, secrets: Secrets, clock: Clock = system_clock,
        connect: Callable[..., Destination] = connect,
    ):
        self._connect = lambda name, mode: connect(name, settings, secrets, mode, clock)
        self._known: dict[tuple[str, str], Destination] = {}

    def __call__(self, name: str, mode: str) -> Destination:
        if (name, mode) not in self._known:
            self._known[name, mode] = self._connect(name, mode)
        return self._known[name, mode]
