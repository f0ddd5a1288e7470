"""What can go wrong with the facts.

::

    EventsError
    +-- IllegalTransition     an event that the job's state does not allow; nothing was changed
    +-- BadFrameError         a stream frame that breaks the Messages streaming protocol
    +-- CodecError            bytes that are no event we can read, or an event that cannot be written
    +-- LogError
        +-- SequenceConflict  the writer has not seen the job's last event; nothing was appended
        +-- DuplicateKeyError the owner already has a job with this idempotency key; nothing was appended
        +-- TooManyEventsError  the job has all the events the log can number; nothing was appended
        +-- UnknownJobError   the log holds no such job (never did, or it was forgotten)
        +-- UnknownRecordError  the log holds no such record, for the same reasons
        +-- LogOpenError      the log cannot be opened as it is; the message says what to do
        +-- LogUnavailableError  the log cannot take writes now (disk full, I/O error, closed)
"""


class EventsError(Exception):
    """Base of every error raised by :mod:`events`."""


class IllegalTransition(EventsError):  # noqa: N818 - a standard term
    """The event does not follow from the job's state. Nothing was changed."""


class BadFrameError(EventsError):
    """An upstream frame broke the streaming protocol (not JSON, out of order, wrong shape)."""


class CodecError(EventsError):
    """No event: garbage, an unknown kind or schema version. Or one that JSON cannot hold.

    The message names places and kinds, never content.
    """


class LogError(EventsError):
    """Base of what an event log raises."""


class SequenceConflict(LogError):  # noqa: N818 - a standard term
    """``expected_seq`` is not the last ``seq`` there is: another writer was here. Nothing was appended."""

    def __init__(self, stream_id: str, *, expected: int, actual: int) -> None:
        super().__init__(f"{stream_id}: expected last seq {expected}, log has {actual}")
        self.expected = expected
        self.actual = actual


class DuplicateKeyError(LogError):
    """The owner has a job with this idempotency key, and its result is not gone. Nothing was appended."""

    def __init__(self, existing_job_id: str) -> None:
        super().__init__(f"the idempotency key belongs to job {existing_job_id}")
        self.existing_job_id = existing_job_id


class TooManyEventsError(LogError):
    """The job has as many events as the log can number, or as may be frames. Nothing was appended."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a job cannot have more than {limit} events")
        self.limit = limit


class UnknownJobError(LogError):
    """The log holds no event of this job."""


class UnknownRecordError(LogError):
    """The log holds no event of this record."""


class LogOpenError(LogError):
    """The log could not be opened, and will not be until somebody does what the message says."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"cannot open the event log {path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


class LogUnavailableError(LogError):
    """The log cannot take this write, or read, now. Nothing was appended; it may be tried again later."""
