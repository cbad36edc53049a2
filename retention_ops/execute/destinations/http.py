"""One HTTP call, made once: what can go wrong on the way becomes one of the seam's errors.

Nothing is repeated and no redirect is followed here. No error text holds a secret, an address's query or what was sent:
a service that repeats our words in its complaint is not quoted.
"""

from __future__ import annotations

import email.utils
import json as jsonlib
import logging
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3 import exceptions as urllib3_errors

from retention_ops import clock
from retention_ops.execute.destinations.seam import Ambiguous, DestinationError, Rejected, Throttled
from retention_ops.execute.redact import redact

NOT_REACHED_SECONDS = 30.0
RETRY_AFTER_DEFAULT = 30.0
RETRY_AFTER_CAP = 3600.0
QUOTED = 300
"""characters of the service's own words that an error may hold"""
ECHO = 24
"""as many characters in a row of what we sent, found in a complaint, make it unfit to be kept"""
NEVER_SENT = (
    requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidHeader, requests.exceptions.InvalidJSONError, urllib3_errors.LocationParseError, UnicodeError,
)

# at DEBUG urllib3 logs the path of every request, which for a webhook is the credential
logging.getLogger("urllib3.connectionpool").addFilter(lambda record: record.levelno > logging.DEBUG)


class Http:
    """Calls below `base_url`. `timeout` is (connect, read) in seconds; `secrets` are taken out of every error text.

    `name` is what errors call the other side. `auth` is what requests takes, or None where `headers` hold the credential.
    """

    def __init__(
        self,
        base_url: str,
        *,
        auth: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: tuple[float, float] = (5, 20),
        secrets: Iterable[str] = (),
        name: str = "the service",
    ):
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.name = name
        self.secrets = tuple(secrets)
        self._headers = dict(headers or {})
        # requests reads ~/.netrc and overwrites Authorization when no auth is given; a do-nothing auth stops that
        self._auth = auth if auth is not None else _leave_as_it_is

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        data: bytes | str | Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        expect: Collection[int] = (200, 201, 204),
    ) -> requests.Response:
        """The answer, if its status is in `expect`.

        Throttled: the call was not accepted (429) or never left (refused, unknown host, no connection in time).
        Rejected: any other 4xx, a redirect, or an address or credential that cannot be sent. Ambiguous: no answer, 408, 5xx, or
        a success nobody expected.
        """
        with requests.Session() as session:  # one connection per call: a kept-alive one that died looks like a lost answer
            try:
                response = session.request(
                    method, self.base_url + path, json=json, data=data, params=params, headers={**self._headers, **(headers or {})},
                    auth=self._auth, timeout=self.timeout, allow_redirects=False,
                )
            except (requests.RequestException, urllib3_errors.HTTPError, ValueError) as error:
                # `from None`: the cause's own text holds the address, which for a webhook is the credential
                raise self._not_answered(error) from None
        if response.status_code in expect:
            return response
        raise self._refused(response, jsonlib.dumps(json, ensure_ascii=False) if json is not None else data)

    def _not_answered(self, error: Exception) -> DestinationError:
        causes = list(_causes(error))
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return Rejected(f"{self.name}: its certificate is not trusted; nothing was sent")
        if isinstance(error, requests.exceptions.ProxyError):
            return Throttled(f"{self.name}: the proxy could not be reached; nothing was sent", NOT_REACHED_SECONDS)
        if any(isinstance(cause, urllib3_errors.NewConnectionError | urllib3_errors.ConnectTimeoutError) for cause in causes):
            return Throttled(f"{self.name}: could not be reached; nothing was sent", NOT_REACHED_SECONDS)
        if isinstance(error, requests.Timeout):
            return Ambiguous(f"{self.name}: no answer within {self.timeout[1]:g} s")
        if isinstance(error, NEVER_SENT):
            return Rejected(f"{self.name}: the address or the credential cannot be sent ({type(error).__name__})")
        return Ambiguous(f"{self.name}: the connection was lost before an answer ({type(error).__name__})")

    def _refused(self, response: requests.Response, sent: Any) -> DestinationError:
        status = response.status_code
        if status == 429:
            wait = retry_after(response.headers.get("Retry-After"))
            return Throttled(f"{self.name}: too many requests (429), may be asked again in {wait:g} s", wait)
        if status == 303:  # "see other" is how some servers say that a POST was done
            return Ambiguous(f"{self.name}: answered with a redirect (303)")
        if 300 <= status < 400:
            return Rejected(f"{self.name}: answered with a redirect ({status}); set the address it leads to")
        said = f"{self.name}: answered {status}{self._quote(response, sent)}"
        return Rejected(said) if 400 <= status < 500 and status != 408 else Ambiguous(said)

    def _quote(self, response: requests.Response, sent: Any) -> str:
        text = " ".join(_complaint(response).split())
        if _repeats(text, sent):
            return " (its words repeat what was sent and are not kept)"
        text = redact(text, self.secrets)
        text = text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"
        return f": {text}" if text else ""


def content(response: requests.Response, name: str = "the service") -> Any:
    """The JSON of an answer. Ambiguous when there is none: some other machine on the way may have answered."""
    try:
        return response.json()
    except ValueError:
        raise Ambiguous(f"{name}: answered {response.status_code} with something that is not JSON") from None


def fault_of_address(url: str) -> str:
    """What is wrong with an address that is itself a credential, without quoting it; empty if nothing is."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "not an address"
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        return "not an address such as https://hook.eu2.make.com/..."
    if parts.scheme == "http" and host not in ("127.0.0.1", "localhost", "::1"):
        return "must begin with https:// (http:// only on a loopback address)"
    if parts.username or parts.password or parts.fragment:
        return "must hold neither a user name nor a # part"
    return ""


def retry_after(value: str | None, now: clock.Clock = clock.system_clock) -> float:
    """Seconds named by a Retry-After header (a number, or a date), from 1 to RETRY_AFTER_CAP."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value or "")
        except (TypeError, ValueError):
            return RETRY_AFTER_DEFAULT
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - now()).total_seconds()
    if seconds != seconds:  # "nan" is a float too
        return RETRY_AFTER_DEFAULT
    return min(max(seconds, 1.0), RETRY_AFTER_CAP)


def _leave_as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and everything it wraps: requests and urllib3 hide the cause in args, `reason` or __context__."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        item = waiting.pop()
        if isinstance(item, BaseException) and not any(item is known for known in seen):
            seen.append(item)
            yield item
            waiting += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]


def _complaint(response: requests.Response) -> str:
    """The sentences in an error answer: Jira's errors, Asana's, Roundup's, or the plain text."""
    kind = response.headers.get("Content-Type", "")
    try:
        answer = response.json()
    except ValueError:
        return "" if "html" in kind.lower() else response.text[:4000]
    return "; ".join(_sentences(answer))[:4000]


def _sentences(answer: Any) -> Iterator[str]:
    if isinstance(answer, str):
        yield answer
    elif isinstance(answer, list):
        for item in answer:
            yield from _sentences(item)
    elif isinstance(answer, dict):
        for name in ("errorMessages", "error", "errors", "message", "msg", "error_description", "detail"):
            if name == "errors" and isinstance(answer.get(name), dict):  # Jira: field -> sentence
                yield from (f"{field}: {sentence}" for field, sentence in answer[name].items())
            elif name in answer:
                yield from _sentences(answer[name])


def _repeats(text: str, sent: Any) -> bool:
    """Whether `text` holds ECHO characters in a row of what was sent."""
    if not sent or len(text) < ECHO:
        return False
    if isinstance(sent, Mapping):
        sent = " ".join(str(value) for value in sent.values())
    ours = sent.decode("utf-8", "replace") if isinstance(sent, bytes) else sent
    ours = " ".join(ours.replace("\\n", " ").replace('\\"', '"').split())
    return any(text[start : start + ECHO] in ours for start in range(len(text) - ECHO + 1))
