"""Who calls: what upstreams are told."""

from importlib.metadata import PackageNotFoundError, version


def user_agent() -> str:
    """The ``user-agent`` of every call: ``messagesd/VERSION``."""
    try:
        return f"messagesd/{version('messagesd')}"
    except PackageNotFoundError:  # run from a checkout
        return "messagesd/0"
