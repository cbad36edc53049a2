"""Mail over SMTP: one message per action, its Message-ID made from the key.

A mail cannot be asked for afterwards, so an answer lost after the text went out is a human's decision, never a second mail.
"""

from __future__ import annotations

import email.policy
import mimetypes
import re
import smtplib
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import ClassVar

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.seam import (
    MARKER,
    Ambiguous,
    CannotTell,
    DestinationError,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Throttled,
)
from retention_ops.settings import Secrets, Settings

NOT_REACHED_SECONDS = 60.0
LATER_SECONDS = 300.0
"""after a 4xx reply: a greylisting server wants some minutes"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = email.policy.SMTP.clone(cte_type="7bit")
"""7 bit: the message is right for servers without 8BITMIME too"""
ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Mail:
    """Kind "mail": payload subject, text and html; `action.files` are inline images, `cid:<file name>` in the html."""

    name = "mail"
    lookups: ClassVar[Mapping[str, Lookup]] = {"mail": Lookup(absent="hold")}

    def __init__(
        self, host: str, port: int, sender: str, recipients: str = "", *, security: str = "starttls", user: str = "", password: str = "",
        timeout: float = 20,
    ):
        self.host = host
        self.port = port
        self.sender = sender
        self.recipients = recipients
        self.security = security
        self.user = user
        self.timeout = timeout
        self._password = password

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: float = 20) -> Mail:
        """No connection yet. Receivers are the same in every mode. Raises SettingsError naming what is missing or unsafe."""
        receivers = "mail_to" if settings.mail_to or not settings.health_email else "health_email"
        for name in ("smtp_host", "mail_from", receivers):
            if not getattr(settings, name):
                raise SettingsError(f"RETENTION_OPS_{name.upper()} is not set: {type(settings).model_fields[name].description}")
        if settings.smtp_security == "none" and settings.smtp_host not in LOOPBACK:
            raise SettingsError("RETENTION_OPS_SMTP_SECURITY=none is for a mail server on this machine only; use starttls or tls")
        if settings.smtp_user and secrets.smtp_password is None:
            raise SettingsError("RETENTION_OPS_SMTP_PASSWORD is not set, but RETENTION_OPS_SMTP_USER is")
        for name, check in (("mail_from", _one_address), ("mail_to", _addresses), ("health_email", _addresses)):
            if not getattr(settings, name):
                continue
            try:
                check(getattr(settings, name))
            except Rejected as error:
                raise SettingsError(f"RETENTION_OPS_{name.upper()}: {error}") from None
        password = secrets.smtp_password.get_secret_value() if secrets.smtp_password else ""
        return cls(
            settings.smtp_host, settings.smtp_port, settings.mail_from, getattr(settings, receivers), security=settings.smtp_security,
            user=settings.smtp_user, password=password, timeout=timeout,
        )

    def send(self, action: Outgoing) -> Receipt:
        """Sends to whom the server accepts; `refused` in the receipt counts the others."""
        if action.kind != "mail":
            raise Rejected(f"mail cannot do {action.kind!r}, only mail")
        recipients = _addresses(action.target or self.recipients)
        message = self._message(action, recipients)
        text = message.as_bytes()
        with self._session() as smtp:
            refused = self._envelope(smtp, recipients)
            self._data(smtp, text)
        return Receipt(message["Message-ID"], None, {"accepted": len(recipients) - refused, "refused": refused})

    def update(self, action: Outgoing) -> Receipt:
        raise Rejected("a mail cannot be changed once it is sent")

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        raise CannotTell(f"mail cannot be asked; search a receiver's mailbox for the Message-ID {_message_id(action.key)}")

    def check(self) -> list[Finding]:
        """Connects, encrypts and logs in; sends no mail."""
        try:
            with self._session() as smtp:
                code, _ = smtp.noop()
        except (Throttled, Ambiguous) as error:
            return [Finding("mail server", None, str(error), "check RETENTION_OPS_SMTP_HOST and RETENTION_OPS_SMTP_PORT")]
        except DestinationError as error:
            return [Finding("mail server", False, str(error), "check RETENTION_OPS_SMTP_*")]
        except Exception as error:  # a check never raises
            return [Finding("mail server", None, f"{self.host} could not be asked ({type(error).__name__})")]
        how = {"starttls": "with STARTTLS", "tls": "over TLS", "none": "unencrypted"}[self.security]
        login = "the login works" if self.user else "no login is asked for"
        return [
            Finding("mail server", code == 250, f"{self.host}:{self.port} answers {how}; {login}"),
            Finding("mail receivers", None, "whether the server takes mail for the receivers shows only when one is sent"),
        ]

    def _message(self, action: Outgoing, recipients: Sequence[str]) -> EmailMessage:
        message = EmailMessage(policy=POLICY)
        try:
            message["From"] = _one_address(self.sender)
            message["To"] = ", ".join(recipients)
            message["Subject"] = _one_line(str(action.payload["subject"]))
            message["Date"] = format_datetime(action.first_attempt_at or datetime.now(UTC))
            message["Message-ID"] = _message_id(action.key)
            message["Auto-Submitted"] = "auto-generated"
            message.set_content(str(action.payload["text"]))
            self._add_html(message, action)
        except KeyError as error:
            raise Rejected(f"the mail has no {error.args[0]}") from None
        except (ValueError, UnicodeError) as error:
            raise Rejected(f"the mail cannot be written ({type(error).__name__})") from None
        return message

    def _add_html(self, message: EmailMessage, action: Outgoing) -> None:
        html = action.payload.get("html")
        if html:
            message.add_alternative(str(html), subtype="html")
        for name, data in action.files.items():
            if not FILE_NAME.fullmatch(name):
                raise Rejected("the mail: a file's name may hold letters, digits, dot, dash and underscore only")
            main, _, sub = (mimetypes.guess_type(name)[0] or "application/octet-stream").partition("/")
            if html:
                part = message.get_payload()[1]
                part.add_related(data, maintype=main, subtype=sub, cid=f"<{name}>", filename=name, disposition="inline")
            else:
                message.add_attachment(data, maintype=main, subtype=sub, filename=name)

    @contextmanager
    def _session(self) -> Iterator[smtplib.SMTP]:
        """Connected, encrypted and logged in. Whatever fails in here before DATA sent nothing; `_data` answers for itself."""
        smtp = None
        try:
            smtp = self._open()
            yield smtp
        except DestinationError:
            raise
        except ssl.SSLCertVerificationError:
            raise Rejected(f"{self.host}: its certificate is not trusted; nothing was sent") from None
        except smtplib.SMTPNotSupportedError:
            raise Rejected(f"{self.host}: does not offer what RETENTION_OPS_SMTP_SECURITY or RETENTION_OPS_SMTP_USER asks for") from None
        except smtplib.SMTPAuthenticationError as error:
            raise self._refused(error.smtp_code, "the login", "check RETENTION_OPS_SMTP_USER and RETENTION_OPS_SMTP_PASSWORD") from None
        except smtplib.SMTPResponseException as error:
            raise self._refused(error.smtp_code, "the connection") from None
        except (smtplib.SMTPException, OSError) as error:
            raise Throttled(f"{self.host}: could not be reached ({type(error).__name__}); nothing was sent", NOT_REACHED_SECONDS) from None
        finally:
            if smtp is not None:
                with suppress(Exception):
                    smtp.quit()
                smtp.close()

    def _open(self) -> smtplib.SMTP:
        if self.security == "tls":
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout, context=ssl.create_default_context())
        else:
            smtp = smtplib.SMTP(self.host, self.port, timeout=self.timeout)
        try:
            smtp.ehlo_or_helo_if_needed()
            if self.security == "starttls":
                smtp.starttls(context=ssl.create_default_context())
                smtp.ehlo()
            if self.user:
                smtp.login(self.user, self._password)
        except BaseException:
            smtp.close()
            raise
        return smtp

    def _envelope(self, smtp: smtplib.SMTP, recipients: Sequence[str]) -> int:
        """Names sender and receivers; returns how many receivers were refused."""
        code, _ = smtp.mail(self.sender)
        if code != 250:
            raise self._refused(code, "the sender", "check RETENTION_OPS_MAIL_FROM")
        refusals = [code for code in (smtp.rcpt(address)[0] for address in recipients) if code not in (250, 251)]
        if len(refusals) == len(recipients):
            # one receiver that may be accepted later is reason enough to try later
            raise self._refused(min(refusals), f"all {len(recipients)} receivers", "check RETENTION_OPS_MAIL_TO")
        return len(refusals)

    def _data(self, smtp: smtplib.SMTP, text: bytes) -> None:
        """A reply is an answer, also to the text; anything else from here on may have been accepted."""
        try:
            code, _ = smtp.data(text)
        except smtplib.SMTPDataError as error:
            code = error.smtp_code
        except (smtplib.SMTPException, OSError) as error:
            raise Ambiguous(f"{self.host}: the connection was lost while the mail was handed over ({type(error).__name__})") from None
        if 400 <= code < 600:
            raise self._refused(code, "the mail")
        if not 200 <= code < 300:
            raise Ambiguous(f"{self.host}: answered the mail with something that is not SMTP ({code})")

    def _refused(self, code: int, what: str, cure: str = "") -> DestinationError:
        """The server's words are not quoted: they name addresses."""
        said = f"{self.host}: refused {what} ({code})" + (f"; {cure}" if cure else "")
        return Throttled(said, LATER_SECONDS) if code < 500 else Rejected(said)


def _message_id(key: str) -> str:
    return f"<{key}@{MARKER}>"


def _addresses(text: str) -> list[str]:
    """The comma separated addresses. Raises Rejected without repeating one."""
    found = [_one_address(part.strip(" ")) for part in text.split(",") if part.strip(" ")]
    if not found:
        raise Rejected("no mail address")
    return list(dict.fromkeys(found))


def _one_address(text: str) -> str:
    if not ADDRESS.fullmatch(text):
        raise Rejected("not a plain mail address such as ops@shop.example, several separated by commas")
    return text


def _one_line(subject: str) -> str:
    if not subject.strip() or not subject.isprintable():
        raise Rejected("the mail's subject must be one line of text")
    return subject
