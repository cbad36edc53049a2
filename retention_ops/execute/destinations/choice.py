"""Which destination serves which slot, and with which channel, project or spreadsheet, as the mode has it."""

from __future__ import annotations

from retention_ops.settings import REAL_MODES, TEST_MODES, TRIAL, Settings

SLOTS = ("slack", "ticket", "sheets", "webhook")
"""in the order they are served"""
RUN_SLOT, EXPORT_SLOT, WITHDRAWAL_SLOT = "run", "export", "withdrawal"
ASKED_SLOTS = (RUN_SLOT, EXPORT_SLOT, WITHDRAWAL_SLOT)
"""what somebody, or a deadline, asked for; no answer to an alert waits for it or is judged by it"""
DIGEST_SLOT, HEALTH_SLOT, HEARTBEAT_SLOT = "digest", "health", "heartbeat"
QUIET_SLOTS = (DIGEST_SLOT, HEALTH_SLOT, HEARTBEAT_SLOT)
"""what is said on quiet mornings; it answers no alert either, and uses up no alert's guardrail"""
MAIL_SLOT = "mail"
"""what a webhook's failure is told by"""
EVERY_SLOT = (*SLOTS, MAIL_SLOT, *ASKED_SLOTS, *QUIET_SLOTS)
BUILD, RESPOND, EXPORT = "build", "respond", "export"
"""kinds of runs of our own Dagster"""
WITHDRAW = "withdraw"
"""the kind that deletes worksheets we made"""
TARGET_SETTING = {
    "slack": "slack_channel", "ticket": "ticket_project", "sheets": "sheets_spreadsheet", DIGEST_SLOT: "slack_channel",
    HEALTH_SLOT: "slack_channel",
}


def chosen(slot: str, settings: Settings, mode: str) -> str:
    """The destination's name for a slot; in shadow everything stays local."""
    wanted = {
        "slack": settings.messages_to, "ticket": settings.tickets_to, "sheets": settings.lists_to,
        "webhook": settings.webhook_to if settings.webhook_to == "local" else "webhook",
        MAIL_SLOT: "mail" if settings.smtp_host and settings.mail_to else "local",
        DIGEST_SLOT: settings.messages_to,
        HEALTH_SLOT: _health(settings),
        HEARTBEAT_SLOT: "heartbeat",
    }[slot]
    if mode in TEST_MODES and (slot in ("webhook", MAIL_SLOT) or wanted == "mail"):
        return "local"  # neither has a test target: a pilot must not set a real workflow off
    if mode in TEST_MODES and slot == HEALTH_SLOT and not target_of(slot, settings, mode):
        return "local"  # health alerts need no messages_to, so there may be no test channel
    if mode == TRIAL and wanted != "local" and not target_of(slot, settings, mode):
        return "local"  # who went live without test targets need not set them up for a new rule
    return wanted if mode in REAL_MODES else "local"


def _health(settings: Settings) -> str:
    """What reaches the data owner: Slack first, since an alert's end stands in its thread there."""
    if settings.health_channel:
        return "slack"
    return "mail" if settings.smtp_host and settings.health_email else "local"


def target_of(slot: str, settings: Settings, mode: str) -> str:
    """Channel, project, spreadsheet or addresses, as the mode has them."""
    if slot == MAIL_SLOT:
        return settings.mail_to
    if slot == HEALTH_SLOT and mode not in TEST_MODES:
        return settings.health_channel or settings.health_email
    return settings.target(TARGET_SETTING[slot], mode) if slot in TARGET_SETTING else ""
