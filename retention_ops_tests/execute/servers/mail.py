"""A mail server (aiosmtpd) that keeps what it accepted and misbehaves on order."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

FAULTS = ("drop_at_mail", "drop_at_rcpt", "drop_before", "drop_after", "slow_before", "slow_after")


@dataclass
class Accepted:
    sender: str
    recipients: list[str]
    message: EmailMessage


class MailServer:
    """`replies["MAIL"|"RCPT"|"DATA"|<address>]` are answers instead of 250; `fault` is one of FAULTS, until it is taken back.

    drop_before / drop_after: the connection is cut when the text has come in, without or after keeping the mail. slow likewise.
    """

    delay = 0.6

    def __init__(self, *, user: str = "", password: str = "", tls: ssl.SSLContext | None = None, implicit_tls: bool = False):
        self.accepted: list[Accepted] = []
        self.replies: dict[str, str] = {}
        self.fault = ""
        self.commands: list[str] = []
        self.port = _free_port()
        options: dict[str, Any] = {"auth_require_tls": tls is not None}
        if user:
            options |= {"auth_required": True, "authenticator": _Login(user, password)}
        if tls and not implicit_tls:
            options |= {"tls_context": tls, "require_starttls": True}
        self._controller = Controller(
            self, hostname="127.0.0.1", port=self.port, ready_timeout=10, ssl_context=tls if implicit_tls else None,
            server_kwargs=options if not implicit_tls else {**options, "auth_require_tls": False},
        )

    def __enter__(self) -> MailServer:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        self.commands.append("MAIL")
        if self.fault == "drop_at_mail":
            server.transport.abort()
        if "MAIL" in self.replies:
            return self.replies["MAIL"]
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        self.commands.append("RCPT")
        if self.fault == "drop_at_rcpt":
            server.transport.abort()
        reply = self.replies.get(address) or self.replies.get("RCPT")
        if reply:
            return reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.commands.append("DATA")
        if "DATA" in self.replies:
            return self.replies["DATA"]
        if self.fault not in ("drop_before", "slow_before"):
            message = message_from_bytes(envelope.content, policy=policy.default)
            self.accepted.append(Accepted(envelope.mail_from, list(envelope.rcpt_tos), message))
        if self.fault.startswith("drop"):
            server.transport.abort()
        if self.fault.startswith("slow"):
            await asyncio.sleep(self.delay)
        return "250 OK"


class _Login:
    def __init__(self, user: str, password: str):
        self._right = (user.encode(), password.encode())

    def __call__(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=(data.login, data.password) == self._right, handled=False)


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A context for 127.0.0.1 and the file of its certificate, for the client to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted = folder / "certificate.pem"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = folder / "key.pem"
    private.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption(),
    ))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return context, trusted


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
