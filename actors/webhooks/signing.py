"""Standard Webhooks signatures: https://www.standardwebhooks.com, by the specification's own library."""

from collections.abc import Iterable
from datetime import UTC, datetime
from math import floor

from standardwebhooks.webhooks import Webhook

from events.types import Headers


class Signer:
    """Signs for one endpoint. Holds its secrets; shows none."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """``secrets``: every valid one, as ``whsec_…``."""
        self._webhooks = [Webhook(secret) for secret in secrets]

    def headers(self, message_id: str, at: float, body: str) -> Headers:
        """``webhook-id``, ``webhook-timestamp`` and ``webhook-signature`` of a try at ``at`` (Unix seconds).

        One signature for each secret: a receiver accepts a call if any of them is right.
        """
        moment = datetime.fromtimestamp(floor(at), UTC)
        signatures = [webhook.sign(message_id, moment, body) for webhook in self._webhooks]
        return (
            ("webhook-id", message_id),
            ("webhook-timestamp", str(floor(at))),
            ("webhook-signature", " ".join(signatures)),
        )
