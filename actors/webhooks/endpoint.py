"""An endpoint that can be called: its options, its signatures, its connections."""

import ssl
from collections.abc import Mapping, Sequence

from actors.webhooks.addresses import Resolve, resolve
from actors.webhooks.client import EndpointClient, Outcome, tls_context
from actors.webhooks.options import WebhookOptions
from actors.webhooks.signing import Signer


class Endpoint:
    """One ``[[webhooks]]`` table at work. Its URL and secrets stay in here."""

    def __init__(self, options: WebhookOptions, *, tls: ssl.SSLContext | None, resolve: Resolve) -> None:
        self.options = options
        self.name = options.name
        self._signer = Signer(secret.get_secret_value() for secret in options.secrets)
        self._client = EndpointClient(
            str(options.url),
            allow_private=options.allow_private,
            timeout_s=options.timeout_s,
            tls=tls,
            resolve=resolve,
        )

    async def post(self, message_id: str, body: str, *, at: float) -> Outcome:
        """Sign and send ``body`` at ``at`` (Unix seconds). Raises nothing; cancelling hangs up."""
        return await self._client.post(self._signer.headers(message_id, at, body), body)


def open_endpoints(
    options: Sequence[WebhookOptions], *, resolve: Resolve = resolve
) -> Mapping[str, Endpoint]:
    """The enabled endpoints by name; one TLS context for all of them."""
    enabled = [one for one in options if one.enabled]
    tls = tls_context() if any(one.url.scheme == "https" for one in enabled) else None
    return {one.name: Endpoint(one, tls=tls, resolve=resolve) for one in enabled}
