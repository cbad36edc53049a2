"""Takes secrets and e-mail addresses out of text that is kept: errors, log lines, ledger rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PATTERNS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"xox[a-z][-.][\w.-]+|xapp-[\w-]+",
        r"whsec_[\w+/=-]+",
        r"(?<=bearer )[\w.~+/=-]{8,}",
        r"(?<=basic )[A-Za-z0-9+/=]{8,}",
        r"ya29\.[\w-]+",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"https?://hooks\.(slack|zapier)\.com/\S+",
        r"https?://hook\.[\w.-]*make\.com/\S+",
        r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
        r"[\w.%+-]+@[\w-]+\.[\w.-]*\w",
    )
]
HIDDEN = "[hidden]"


def clean(text: str) -> str:
    """Text as every database and terminal takes it: bytes that are no UTF-8 become ?, NULs go."""
    return text.replace("\x00", "").encode(errors="replace").decode()


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the given secrets and without what looks like a credential or a mail address."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(HIDDEN, text)
    return text
