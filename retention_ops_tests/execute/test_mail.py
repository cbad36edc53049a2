"""Mail: how the message is made, what each way of failing means, and what is refused before a connection."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.mail import Mail
from retention_ops.execute.destinations.seam import Ambiguous, CannotTell, Outgoing, Rejected, Throttled
from retention_ops.settings import Secrets, load_settings
from retention_ops_tests.execute.servers.mail import MailServer, certificate

KEY = "0123456789abcdef" * 2
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
MAIL = Outgoing(
    KEY, "mail", "ops@shop.example, Owner@shop.example",
    {"subject": "CRITICAL – Zoë", "text": "Grüße\n.\nlast line", "html": '<p>Grüße</p><img src="cid:trend.png">'},
    files={"trend.png": PNG}, first_attempt_at=datetime(2026, 11, 21, 9, 30, tzinfo=UTC),
)
PASSWORD = "canary-password"


@pytest.fixture
def server():
    with MailServer() as running:
        yield running


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


def connect(server, **changes):
    changes = {"smtp_security": "none", "smtp_port": server.port, **changes}
    settings = load_settings(smtp_host="127.0.0.1", mail_from="retention@shop.example", mail_to="team@shop.example", **changes)
    return Mail.connect(settings, Secrets(smtp_password=PASSWORD), "live", timeout=0.3)


def test_a_mail_arrives_as_text_and_html_with_its_image(server):
    receipt = connect(server).send(MAIL)
    (accepted,) = server.accepted
    message = accepted.message
    assert accepted.sender == "retention@shop.example" and accepted.recipients == ["ops@shop.example", "Owner@shop.example"]
    assert message["Subject"] == "CRITICAL – Zoë" and message["Message-ID"] == f"<{KEY}@retention-ops>" == receipt.external_id
    assert message["Date"] == "Sat, 21 Nov 2026 09:30:00 +0000" and message["Auto-Submitted"] == "auto-generated"
    assert message.get_body(("plain",)).get_content().splitlines() == ["Grüße", ".", "last line"]
    html = message.get_body(("html",))
    assert 'src="cid:trend.png"' in html.get_content()
    (image,) = [part for part in message.walk() if part.get_content_type() == "image/png"]
    assert image["Content-ID"] == "<trend.png>" and image.get_content_disposition() == "inline" and image.get_content() == PNG
    assert [part.get_content_type() for part in message.walk()] == [
        "multipart/alternative", "text/plain", "multipart/related", "text/html", "image/png",
    ]
    assert receipt.detail == {"accepted": 2, "refused": 0}


def test_text_alone_goes_to_the_receivers_of_the_settings(server):
    connect(server).send(replace(MAIL, target="", payload={"subject": "s", "text": "one\n.\n..two"}, files={}))
    assert server.accepted[0].recipients == ["team@shop.example"]
    assert server.accepted[0].message.get_content().splitlines() == ["one", ".", "..two"]


@pytest.mark.parametrize("where, reply, error, seconds", [
    ("MAIL", "451 4.7.1 greylisted", Throttled, 300),
    ("MAIL", "550 5.7.1 sender refused", Rejected, None),
    ("RCPT", "450 4.2.0 try later", Throttled, 300),
    ("RCPT", "550 5.1.1 unknown", Rejected, None),
    ("DATA", "452 4.3.1 disk full", Throttled, 300),
    ("DATA", "554 5.7.1 spam", Rejected, None),
    ("DATA", "what?", Ambiguous, None),
])
def test_a_reply_says_whether_to_try_later(server, where, reply, error, seconds):
    server.replies[where] = reply
    with pytest.raises(error) as caught:
        connect(server).send(MAIL)
    assert server.accepted == []
    assert seconds is None or caught.value.retry_after == seconds


@pytest.mark.parametrize("fault, error", [
    ("drop_at_mail", Throttled), ("drop_at_rcpt", Throttled),
    ("drop_before", Ambiguous), ("drop_after", Ambiguous), ("slow_before", Ambiguous), ("slow_after", Ambiguous),
])
def test_a_lost_connection_is_ambiguous_only_once_the_text_went_out(server, fault, error):
    server.fault = fault
    with pytest.raises(error):
        connect(server).send(MAIL)
    assert server.commands.count("DATA") == (error is Ambiguous)
    assert len(server.accepted) == fault.endswith("_after")


def test_after_a_lost_answer_only_a_human_decides():
    assert Mail.lookups["mail"].absent == "hold" and not Mail.lookups["mail"].repeatable
    with pytest.raises(CannotTell, match=KEY):
        Mail("127.0.0.1", 25, "a@b.example").find_by_key(MAIL)


def test_a_server_that_is_down_or_unknown_was_not_given_anything(server):
    for host, port in (("127.0.0.1", 9), ("no-such-host.invalid", 25)):
        with pytest.raises(Throttled) as caught:
            Mail(host, port, "a@shop.example", security="none", timeout=1).send(MAIL)
        assert caught.value.retry_after == 60


def test_who_is_refused_is_counted_and_not_named(server):
    server.replies["ops@shop.example"] = "550 5.1.1 unknown"
    receipt = connect(server).send(MAIL)
    assert server.accepted[0].recipients == ["Owner@shop.example"]
    assert receipt.detail == {"accepted": 1, "refused": 1} and "@shop" not in repr(receipt)


def test_all_refused_tries_later_when_one_may_be_accepted_later(server):
    server.replies |= {"ops@shop.example": "550 5.1.1 unknown", "Owner@shop.example": "450 4.2.0 later"}
    with pytest.raises(Throttled):
        connect(server).send(MAIL)


@pytest.mark.parametrize("change", [
    {"target": "ops@shop.example\r\nBcc: all@shop.example"}, {"target": "ops@shop.example\n"}, {"target": "Ops <ops@shop.example>"},
    {"target": "ops@shop.example> SIZE=1"}, {"target": " , "}, {"target": "öps@shop.example"},
    {"payload": {**MAIL.payload, "subject": "hello\r\nBcc: all@shop.example"}}, {"payload": {**MAIL.payload, "subject": "a\nb"}},
    {"payload": {**MAIL.payload, "subject": " "}}, {"payload": {**MAIL.payload, "subject": "a\x00\u202eb"}},
    {"payload": {"text": "t"}}, {"payload": {"subject": "s"}},
    {"key": "k\r\nBcc: all@shop.example"}, {"files": {"a\r\nb.png": b""}}, {"files": {"../a>.png": b""}}, {"kind": "post"},
])
def test_what_would_inject_a_header_or_is_no_mail_is_refused_before_connecting(server, change):
    with pytest.raises(Rejected):
        connect(server).send(replace(MAIL, **change))
    assert server.commands == []


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_login_goes_over_a_trusted_encrypted_connection(tls, security, monkeypatch):
    context, trusted = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with MailServer(user="bot", password=PASSWORD, tls=context, implicit_tls=security == "tls") as server:
        mail = connect(server, smtp_security=security, smtp_user="bot")
        mail.timeout = 3
        mail.send(MAIL)
        assert len(server.accepted) == 1
        assert mail.check()[0].ok and "login works" in mail.check()[0].sentence
        assert len(server.accepted) == 1


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_an_untrusted_certificate_gets_neither_password_nor_mail(tls, security):
    with MailServer(user="bot", password=PASSWORD, tls=tls[0], implicit_tls=security == "tls") as server:
        mail = connect(server, smtp_security=security, smtp_user="bot")
        mail.timeout = 3
        with pytest.raises(Rejected, match="certificate"):
            mail.send(MAIL)
        assert server.commands == [] and mail.check()[0].ok is False


def test_a_server_without_starttls_is_not_used_unencrypted(server):
    with pytest.raises(Rejected, match="RETENTION_OPS_SMTP_SECURITY"):
        connect(server, smtp_security="starttls").send(MAIL)
    assert server.commands == []


def test_a_wrong_password_is_rejected_without_showing_it():
    with MailServer(user="bot", password="another") as server:
        mail = connect(server, smtp_user="bot")
        with pytest.raises(Rejected, match="RETENTION_OPS_SMTP_PASSWORD") as caught:
            mail.send(MAIL)
        assert PASSWORD not in str(caught.value) + repr(mail.check()) and mail.check()[0].ok is False


def test_settings_that_cannot_work_are_named(server):
    for changes, name in (
        ({"smtp_host": ""}, "SMTP_HOST"), ({"mail_from": ""}, "MAIL_FROM"), ({"mail_to": ""}, "MAIL_TO"),
        ({"mail_from": "a@b.example\nBcc: c"}, "MAIL_FROM"), ({"mail_to": "nobody"}, "MAIL_TO"),
        ({"smtp_security": "none", "smtp_host": "mail.shop.example"}, "SMTP_SECURITY"), ({"smtp_user": "bot"}, "SMTP_PASSWORD"),
    ):
        given = {"smtp_host": "127.0.0.1", "mail_from": "a@shop.example", "mail_to": "b@shop.example", **changes}
        with pytest.raises(SettingsError, match=f"RETENTION_OPS_{name}"):
            Mail.connect(load_settings(**given), Secrets(smtp_password=None), "live")


def test_check_of_a_plain_and_of_an_absent_server(server):
    assert connect(server).check()[0].ok is True
    assert server.accepted == [] and server.commands == []
    assert Mail("127.0.0.1", 9, "a@shop.example", security="none").check()[0].ok is None


def test_no_error_holds_an_address_or_the_password(server):
    texts = []
    for where in ("MAIL", "RCPT", "DATA"):
        server.replies = {where: f"550 5.1.1 <ops@shop.example> {PASSWORD}"}
        with pytest.raises(Rejected) as caught:
            connect(server).send(MAIL)
        texts.append(str(caught.value))
    server.replies = {}
    for fault in ("drop_at_rcpt", "drop_after", "slow_after"):
        server.fault = fault
        with pytest.raises((Throttled, Ambiguous)) as caught:
            connect(server).send(MAIL)
        texts.append(str(caught.value))
    assert not [text for text in texts if "@" in text or PASSWORD in text]


def test_a_mail_is_never_changed():
    with pytest.raises(Rejected):
        Mail("127.0.0.1", 25, "a@b.example").update(MAIL)
