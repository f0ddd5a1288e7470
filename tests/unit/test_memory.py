import os
import platform
import runpy
import sys
from collections.abc import Mapping
from typing import NoReturn

import pytest

from service import memory
from service.memory import BURST_RESULTS, BurstMemory, prefer_system_allocator


class ReplacedError(Exception):
    """The process would now be another program."""


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], Mapping[str, str]]]:
    calls: list[tuple[str, list[str], Mapping[str, str]]] = []

    def execve(path: str, arguments: list[str], environ: Mapping[str, str]) -> NoReturn:
        calls.append((path, arguments, environ))
        raise ReplacedError

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    return calls


def test_the_daemon_is_started_again_on_the_systems_allocator(
    replaced: list[tuple[str, list[str], Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "service", "serve"])
    with pytest.raises(ReplacedError):
        prefer_system_allocator({"A": "b"})
    ((path, arguments, environ),) = replaced
    assert path == sys.executable
    assert arguments == [sys.executable, "-m", "service", "serve"]
    assert environ == {"A": "b", "PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}
    # The new one finds that it is so already.
    prefer_system_allocator(environ)
    assert len(replaced) == 1


def test_the_operators_choice_and_other_libraries_stay(
    replaced: list[tuple[str, list[str], Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_system_allocator({"PYTHONMALLOC": "pymalloc"})
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    prefer_system_allocator({})
    assert replaced == []


@pytest.mark.parametrize(("arguments", "starts"), [(["serve"], True), (["--version"], False)])
def test_only_the_daemon_needs_it(
    arguments: list[str],
    starts: bool,
    replaced: list[tuple[str, list[str], Mapping[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONMALLOC", raising=False)
    monkeypatch.setattr(sys, "argv", ["messagesd", *arguments])
    with pytest.raises((ReplacedError, SystemExit)) as ended:
        runpy.run_module("service", run_name="__main__")
    assert (ended.type is ReplacedError) is starts
    assert bool(replaced) is starts


def test_memory_is_given_back_once_a_burst_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: trims.append)
    quiet = False
    burst = BurstMemory(quiet=lambda: quiet)
    burst.expired(BURST_RESULTS - 1)
    quiet = True
    burst.expired(0)
    assert trims == []
    quiet = False
    burst.expired(1)
    assert trims == []
    quiet = True
    burst.expired(0)
    assert trims == [0]
    burst.expired(BURST_RESULTS - 1)
    assert trims == [0]


def test_trimming_works_here() -> None:
    BurstMemory(quiet=lambda: True).expired(BURST_RESULTS)
