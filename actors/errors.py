"""What can go wrong while work is done, split by whose fault it is.

::

    ActorError
    +-- ProviderError                 the upstream's side; carries what the client will be told
    |   +-- UpstreamConnectionError   no connection, or it broke before an answer        502
    |   +-- UpstreamTimeoutError      connect, first byte, idle or total time ran out    504
    |   +-- UpstreamProtocolError     garbage, HTML, too large, hung up in mid-stream    502
    |   +-- UpstreamStatusError       the upstream said no: its status, type and text    its own
    |   +-- UnsupportedError          this provider cannot do what was asked             404, 400
    +-- OverloadedError               admission refused it; nothing was accepted         529
    |   +-- NoTargetError             the circuits of all targets are open               529
    +-- NoSuchModelError              no route and no provider for the model             404
    +-- JobNotFoundError              unknown, expired, or another owner's: one answer   404
    +-- BatchNotFoundError            the same of a batch                                404
    +-- JobConflictError              the job's state forbids it                         409
    +-- WebhookRefusedError           no such endpoint, or a disabled one                400
    +-- DeliveryNotFoundError         no such delivery of a webhook                      404
    +-- DeliveryConflictError         the delivery's state forbids it                    409

No error of this tree ever carries a provider key or an address: they are shown to clients as they are.
"""

from math import ceil

from events.types import Failure, Headers, Usage

# Anthropic error types by status: https://docs.anthropic.com/en/api/errors
_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STATUS_BY_TYPE = {type_: status for status, type_ in _TYPE_BY_STATUS.items()} | {"api_error": 500}


def error_type_of(status: int) -> str:
    """The Anthropic error type for an HTTP status."""
    return _TYPE_BY_STATUS.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")


def status_of(error_type: str) -> int:
    """The HTTP status for an Anthropic error type (500 for one we do not know)."""
    return _STATUS_BY_TYPE.get(error_type, 500)


class ActorError(Exception):
    """Base of everything :mod:`actors` raises on purpose. Carries what the client will be told."""

    status = 500

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        error_type: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = self.status if status is None else status
        self.error_type = error_type or error_type_of(self.status)
        self.headers = headers

    @property
    def failure(self) -> Failure:
        """The error as an event records it."""
        return Failure(self.status, self.error_type, self.message, self.headers)


class ProviderError(ActorError):
    """The upstream's side failed."""

    status = 502
    usage: Usage | None = None
    """What the call used until then, where the adapter knows better than its frames told."""


class UpstreamConnectionError(ProviderError):
    """No connection, or it broke before any answer. Trying again may help."""


class UpstreamTimeoutError(ProviderError):
    """A named time bound of the provider ran out."""

    status = 504


class UpstreamProtocolError(ProviderError):
    """The upstream's answer cannot be understood, is too large, or ended in the middle."""


class UpstreamStatusError(ProviderError):
    """The upstream answered with an error; status, type, text and retry headers are its own."""


class UnsupportedError(ProviderError):
    """The provider cannot do this: 404 for a path it does not speak, 400 for a part of a request.

    Raised before the upstream is called. Another provider may be able to.
    """

    status = 404


class OverloadedError(ActorError):
    """Not accepted: a bound of admission is reached, or the daemon drains. Nothing was recorded."""

    status = 529

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers=(("retry-after", str(retry_after_s)),))


class NoTargetError(OverloadedError):
    """The circuits of all targets of a model are open. Nothing was asked of an upstream."""

    def __init__(self, retry_in_s: float) -> None:
        super().__init__(
            "no upstream for this model can serve now; try again", retry_after_s=max(1, ceil(retry_in_s))
        )
        self.retry_in_s = retry_in_s


class NoSuchModelError(ActorError):
    """No route leads to a provider for this model."""

    status = 404


class JobNotFoundError(ActorError):
    """Unknown, expired and another owner's job: the same answer for all three."""

    status = 404

    def __init__(self) -> None:
        super().__init__("job not found, or its result has expired")


class BatchNotFoundError(ActorError):
    """Unknown, forgotten and another owner's batch: the same answer for all three."""

    status = 404

    def __init__(self) -> None:
        super().__init__("batch not found, or its results have expired")


class JobConflictError(ActorError):
    """The state of the job, or batch, does not allow it."""

    status = 409
