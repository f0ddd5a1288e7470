"""What can go wrong when webhooks are asked for. Part of the tree in :mod:`actors.errors`."""

from actors.errors import ActorError


class WebhookRefusedError(ActorError):
    """The endpoint that was named is not configured, or disabled. Nothing was accepted."""

    status = 400


class DeliveryNotFoundError(ActorError):
    """There is no such delivery, or no longer."""

    status = 404

    def __init__(self) -> None:
        super().__init__("webhook delivery not found")


class DeliveryConflictError(ActorError):
    """The delivery's state, or the configuration, does not allow it."""

    status = 409
