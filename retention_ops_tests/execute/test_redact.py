"""What must never be kept in text: secrets by value, whatever looks like a credential, mail addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_ops.execute.redact import HIDDEN, redact

PRIVATE_KEY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQ\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(("text", "gone"), [
    ("token xoxb-123-abcDEF was refused", "xoxb-123-abcDEF"),
    ("token xoxe.xoxp-1-Mi0yLTQz", "Mi0yLTQz"),
    ("secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8G"),
    ("Authorization: Bearer abc.def-123456", "abc.def-123456"),
    ("authorization: basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNz"),
    ("ya29.a0AfH6SMBx-y_z expired", "a0AfH6SMBx"),
    (f"key {PRIVATE_KEY} is invalid", "kqhkiG9w0BAQ"),
    ("key -----BEGIN RSA PRIVATE KEY-----\nMIIE\ncut off", "cut off"),
    ("POST https://hooks.slack.com/services/T0/B0/xyz failed", "services"),
    ("POST https://hooks.zapier.com/hooks/catch/1/abc failed", "catch"),
    ("POST https://hook.eu1.make.com/abcdefgh failed", "abcdefgh"),
    ("postgresql://ops:hunter2@db/ops", "hunter2"),
    ("cannot mail jane.doe+shop@example.co.uk", "jane.doe"),
])
def test_what_looks_like_a_credential_or_an_address_is_hidden(text, gone):
    assert gone not in redact(text) and HIDDEN in redact(text)


@pytest.mark.parametrize("text", [
    "the list of 2024-02-19 changed", "P1 12, P2 40 (5 new)", "slack refused: channel_not_found", "https://tickets.example/browse/OPS-1",
    "attempt 3 at 06:30", "customer c17",
])
def test_plain_words_stay(text):
    assert redact(text) == text


def test_a_known_secret_is_hidden_wherever_it_stands():
    assert redact("x=s3cret&y=s3crets3cret", ["s3cret"]) == f"x={HIDDEN}&y={HIDDEN}{HIDDEN}"


def test_a_text_is_not_made_unreadable_by_an_absurdly_short_secret():
    assert redact("a cat", ["a", ""]) == "a cat"


@given(st.text("ABCDEF0123456789", min_size=6), st.text("abc =/&"), st.text("abc =/&"))
def test_no_known_secret_survives(secret, before, after):
    assert secret not in redact(f"{before}{secret}{after}", [secret])
