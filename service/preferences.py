"""The control headers of the Messages route: async, detach, webhook, time to live, ``Prefer: wait``."""

from dataclasses import dataclass
from math import isfinite

from service.errors import InvalidRequestError, NotFoundError
from service.http import RequestHeaders
from service.settings_sections import JobsSettings

ASYNC = "x-bf-async"
ASYNC_ID = "x-bf-async-id"
RESULT_TTL = "x-bf-async-job-result-ttl"
DETACH = "x-bf-detach"
RETRY = "x-bf-async-retry"
WEBHOOK = "x-bf-async-webhook"
IDEMPOTENCY_KEY = "idempotency-key"
MAX_KEY_CHARS = 255
MAX_NUMBER_CHARS = 16
"""Longer numerals than any bound of ours are refused unread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """How the caller wants a message made."""

    asynchronous: bool
    detached: bool
    result_ttl_s: float
    wait_s: float | None
    may_rerun: bool
    idempotency_key: str | None
    """With one the job is detached: its submitter means to be able to ask again."""
    webhook: str | None = None
    """The name of the endpoint that is told how the job ended."""


def preferences_of(headers: RequestHeaders, jobs: JobsSettings) -> Preferences:
    """Read the control headers. Raises InvalidRequestError for any value the contract does not name."""
    asynchronous = _flag(headers, ASYNC)
    detached = _flag(headers, DETACH) or IDEMPOTENCY_KEY in headers
    webhook = headers.single(WEBHOOK)
    if webhook is not None and not (asynchronous or detached):
        # Whoever waits for the answer has it, or is gone and has stopped the job.
        raise InvalidRequestError(f"{WEBHOOK}: only a job that outlives its connection has a webhook")
    return Preferences(
        asynchronous=asynchronous,
        detached=detached,
        result_ttl_s=_result_ttl_s(headers, jobs),
        wait_s=wait_s(headers, jobs),
        may_rerun=may_rerun(headers),
        idempotency_key=_idempotency_key(headers),
        webhook=webhook,
    )


def _flag(headers: RequestHeaders, name: str) -> bool:
    match headers.single(name):
        case None | "false":
            return False
        case "true":
            return True
        case _:
            raise InvalidRequestError(f"{name}: expected true or false")


def may_rerun(headers: RequestHeaders) -> bool:
    """``x-bf-async-retry``: whether a job may be run again after a restart."""
    match headers.single(RETRY):
        case None:
            return True
        case "never":
            return False
        case _:
            raise InvalidRequestError(f"{RETRY}: expected never")


def _idempotency_key(headers: RequestHeaders) -> str | None:
    key = headers.single(IDEMPOTENCY_KEY)
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise InvalidRequestError(f"{IDEMPOTENCY_KEY}: expected 1 to {MAX_KEY_CHARS} characters")
    return key


def _result_ttl_s(headers: RequestHeaders, jobs: JobsSettings) -> float:
    text = headers.single(RESULT_TTL)
    if text is None:
        return jobs.result_ttl_s
    whole = text.isascii() and text.isdigit() and len(text) <= MAX_NUMBER_CHARS
    ttl_s = int(text) if whole else 0
    if not 1 <= ttl_s <= jobs.max_result_ttl_s:
        raise InvalidRequestError(
            f"{RESULT_TTL}: expected whole seconds from 1 to {jobs.max_result_ttl_s:.0f}"
        )
    return float(ttl_s)


def wait_s(headers: RequestHeaders, jobs: JobsSettings) -> float | None:
    """``Prefer: wait=S`` (RFC 7240, 4.3), at most ``jobs.max_wait_s``; None without it.

    Preferences we do not know, or cannot read, are ignored, as the RFC asks.
    """
    for value in headers.getlist("prefer"):
        for preference in value.split(","):
            name, _, seconds = preference.partition(";")[0].partition("=")
            if name.strip().lower() != "wait":
                continue
            try:
                wanted = float(seconds.strip().strip('"')[:MAX_NUMBER_CHARS])
            except ValueError:
                continue
            if isfinite(wanted) and wanted >= 0:
                return min(wanted, jobs.max_wait_s)
    return None


def applied(seconds: float) -> tuple[str, str]:
    """The header that says which wait was honoured."""
    return ("preference-applied", f"wait={seconds:g}")


def refuse_job_headers(headers: RequestHeaders) -> None:
    """Raise for a header that means something on the Messages route alone."""
    if ASYNC in headers:
        raise InvalidRequestError(f"{ASYNC}: only POST /v1/messages runs as an async job")
    if ASYNC_ID in headers:
        raise NotFoundError(f"{ASYNC_ID}: jobs are polled at POST /v1/messages")
    if WEBHOOK in headers:
        raise InvalidRequestError(f"{WEBHOOK}: only POST /v1/messages takes a webhook")
