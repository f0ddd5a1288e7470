"""The command line: ``serve``, ``check-config``, ``keys new``.

Exit codes: 0 done, 1 the daemon could not run, 2 wrong usage or configuration, 130 interrupted.
"""

import errno
import importlib.metadata
import os
import re
import resource
import secrets
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import trio

from events.errors import LogOpenError
from service.settings import Settings, SettingsError, describe, key_hash, load

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
KEY_BYTES = 32
"""Of randomness in a new key."""

_KEY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_BIND_ERRORS = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM})


def version() -> str:
    """The installed version; ``unknown`` when run from a tree that is not installed."""
    try:
        return importlib.metadata.version("messagesd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def raise_open_files_limit() -> int:
    """Raise the soft limit on open files to the hard one, where the system lets us; return the soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return soft
    return hard


def _load(config: Path | None, host: str | None = None, port: int | None = None) -> Settings:
    try:
        return load(config, os.environ, host, port)
    except SettingsError as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        raise SystemExit(EXIT_USAGE) from None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _is_bind_error(error: BaseException) -> bool:
    return isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno in _BIND_ERRORS)


_config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The TOML file. Default: MESSAGESD_CONFIG, or messagesd.toml here if there is one.",
)


@click.group()
@click.version_option(version(), prog_name="messagesd")
def main() -> None:
    """Serve the Anthropic Messages API over any model provider, every request a job."""


@main.command()
@click.option("--host", help="Address to listen on. Default: server.host.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one. Default: server.port.")
@_config_option
def serve(host: str | None, port: int | None, config: Path | None) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    settings = _load(config, host, port)
    # Late: the other commands start without the web stack.
    from service.main import serve as serve_settings  # noqa: PLC0415 - as said above

    raise_open_files_limit()
    try:
        trio.run(partial(serve_settings, settings))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except (OSError, LogOpenError, BaseExceptionGroup) as error:
        leaves = list(_leaves(error))
        if all(isinstance(leaf, LogOpenError) for leaf in leaves):
            click.echo(f"error: {leaves[0]}", err=True)
            raise SystemExit(EXIT_FAILED) from None
        if not all(_is_bind_error(leaf) for leaf in leaves):
            raise
        address = f"{settings.server.host}:{settings.server.port}"
        click.echo(f"error: cannot listen on {address}: {leaves[0]}", err=True)
        raise SystemExit(EXIT_FAILED) from None


@main.command("check-config")
@_config_option
def check_config(config: Path | None) -> None:
    """Print the effective configuration with secrets masked, or every error with its place (exit code 2)."""
    settings = _load(config)
    for notice in settings.notices:
        click.echo(f"# {notice}")
    click.echo(describe(settings), nl=False)


@main.group()
def keys() -> None:
    """Virtual keys, for callers of this gateway."""


@keys.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key sees every owner's jobs.")
def new(name: str, *, admin: bool) -> None:
    """Make a key: print it, once, and the lines for the configuration file, which hold only its hash."""
    if not re.fullmatch(_KEY_NAME, name):
        raise click.BadParameter("letters, digits, '.', '_' and '-', 64 at most", param_hint="NAME")
    key = f"sk-bf-{secrets.token_urlsafe(KEY_BYTES)}"
    click.echo(key)
    click.echo(f'\n[[keys]]\nname = "{name}"\nhash = "{key_hash(key)}"')
    if admin:
        click.echo("admin = true")
