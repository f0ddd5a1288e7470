"""An actor's inbox: bounded, in order, and what it says of the end."""

import trio
from trio.testing import wait_all_tasks_blocked

from actors.commands import CancelJob, DetachJob, LastWatcherLeft, StopForShutdown
from actors.inbox import INBOX_COMMANDS, Inbox

CANCEL = CancelJob(by="me", reason="enough")
STOP = StopForShutdown(leave_unfinished=False)


async def test_the_first_command_that_ends_the_work_is_the_one() -> None:
    inbox = Inbox()
    assert inbox.drain() is None
    detach = DetachJob(1.0)
    assert all(inbox.put(command) for command in (detach, CANCEL, STOP, LastWatcherLeft()))
    assert inbox.drain() is CANCEL
    assert detach.done.is_set()
    assert inbox.put(STOP)
    assert inbox.drain() is CANCEL


async def test_it_is_bounded_and_takes_nothing_once_closed() -> None:
    inbox = Inbox()
    assert [inbox.put(STOP) for _ in range(INBOX_COMMANDS + 2)].count(True) == INBOX_COMMANDS
    inbox.drain()
    waiting = DetachJob(1.0)
    assert inbox.put(waiting)
    inbox.close()
    assert waiting.done.is_set()
    assert not inbox.put(STOP)


async def test_who_listens_carries_out_what_ends_nothing(nursery: trio.Nursery) -> None:
    inbox = Inbox()
    seen: list[DetachJob] = []
    go = trio.Event()

    async def detach(command: DetachJob) -> None:
        await go.wait()
        seen.append(command)

    first, second, third = DetachJob(1.0), DetachJob(2.0), DetachJob(3.0)
    inbox.put(first)
    nursery.start_soon(inbox.listen, detach)
    await wait_all_tasks_blocked()
    # One that comes while another is carried out is not missed.
    inbox.put(second)
    assert not first.done.is_set()
    go.set()
    await second.done.wait()
    await wait_all_tasks_blocked()
    inbox.put(third)
    inbox.put(CANCEL)
    await third.done.wait()
    await wait_all_tasks_blocked()
    assert seen == [first, second, third]
    assert inbox.drain() is CANCEL
