"""What deliveries tell about themselves in numbers. The daemon's metrics implement it."""

from typing import Protocol


class WebhookTelemetry(Protocol):
    """The recording side of metrics. Returns at once, does no I/O and never raises."""

    def delivery_tried(self, endpoint: str, outcome: str) -> None:
        """A try of an ``endpoint`` (a configured name) has ended, or was not made (``skipped``).

        ``outcome`` is one of ``delivered``, ``retry``, ``failed``, ``skipped``, ``progress_sent`` and
        ``progress_failed``.
        """
        ...


class NullWebhookTelemetry:
    """Records nothing."""

    def delivery_tried(self, endpoint: str, outcome: str) -> None:
        """See :meth:`WebhookTelemetry.delivery_tried`."""
