"""The store of results: what is kept until when, and the bytes it answers for."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from events.projections import JobSnapshot
from events.snapshots import (
    RESERVED_RESULT_BYTES,
    STALE_DEADLINES,
    SnapshotStore,
    SnapshotStoreFullError,
)
from events.state import JobState
from events.types import Mode

ROOM = 10 * RESERVED_RESULT_BYTES


def snapshot(job_id: str, expires_at: float) -> JobSnapshot:
    return JobSnapshot(
        job_id=job_id,
        owner="",
        model="m",
        mode=Mode.ASYNC,
        state=JobState.COMPLETED,
        detached=True,
        result_ttl_s=1,
        created_at=0,
        expires_at=expires_at,
    )


def test_a_result_is_there_until_its_deadline_and_not_at_it() -> None:
    store = SnapshotStore(ROOM)
    kept = snapshot("a", 10.0)
    store.put(kept, 5)
    assert store.get("a", 9.999) is kept
    assert store.get("a", 10.0) is None
    assert store.get("b", 0.0) is None


def test_expiring_gives_what_is_due_earliest_first() -> None:
    store = SnapshotStore(ROOM)
    for job_id, at in (("c", 30.0), ("a", 10.0), ("b", 20.0)):
        store.put(snapshot(job_id, at), 5)
    assert store.next_deadline() == 10.0
    assert store.expire(9.0) == []
    assert [one.job_id for one in store.expire(20.0)] == ["a", "b"]
    assert store.next_deadline() == 30.0
    assert [one.job_id for one in store.expire(1e9)] == ["c"]
    assert store.next_deadline() is None
    assert (len(store), store.held_bytes) == (0, 0)


def test_only_an_ended_job_is_kept() -> None:
    with pytest.raises(ValueError, match="ended"):
        SnapshotStore(ROOM).put(replace(snapshot("a", 1.0), expires_at=None), 5)


def test_a_full_store_reserves_nothing_more() -> None:
    store = SnapshotStore(2 * RESERVED_RESULT_BYTES + 10)
    store.reserve("a", 10)
    with pytest.raises(SnapshotStoreFullError):
        store.reserve("b", 1)
    assert store.held_bytes == RESERVED_RESULT_BYTES + 10
    store.reserve("c", 0)
    assert store.held_bytes == 2 * RESERVED_RESULT_BYTES + 10
    store.release("a")
    store.release("a")
    store.release("never reserved")
    assert store.held_bytes == RESERVED_RESULT_BYTES


def test_what_was_promised_is_kept_whatever_its_size() -> None:
    store = SnapshotStore(RESERVED_RESULT_BYTES + 100)
    store.reserve("a", 100)
    store.put(snapshot("a", 10.0), ROOM * 100)
    assert store.held_bytes == ROOM * 100
    assert store.get("a", 0.0) is not None
    with pytest.raises(SnapshotStoreFullError):
        store.reserve("b", 0)
    store.remove("a")
    assert store.held_bytes == 0


def test_putting_again_replaces() -> None:
    store = SnapshotStore(ROOM)
    store.put(snapshot("a", 10.0), 5)
    store.put(snapshot("a", 50.0), 7)
    assert (len(store), store.held_bytes, store.next_deadline()) == (1, 7, 50.0)
    assert store.expire(10.0) == []
    assert [one.expires_at for one in store.expire(50.0)] == [50.0]


def test_removed_results_leave_no_deadlines_behind() -> None:
    store = SnapshotStore(ROOM)
    store.put(snapshot("last", 1e6), 1)
    for number in range(10_000):
        store.put(snapshot(str(number), float(number)), 1)
        store.remove(str(number))
    assert store.next_deadline() == 1e6
    assert len(store._deadlines) <= 2 * len(store) + STALE_DEADLINES


JOB_IDS = st.sampled_from("abcdef")


class StoreMachine(RuleBasedStateMachine):
    """The store beside a dict that does the same the slow way."""

    def __init__(self) -> None:
        super().__init__()
        self.store = SnapshotStore(ROOM)
        self.kept: dict[str, tuple[float, int]] = {}
        self.reserved: dict[str, int] = {}
        self.now = 0.0

    def total(self) -> int:
        return sum(size for _, size in self.kept.values()) + sum(self.reserved.values())

    @rule(job_id=JOB_IDS, size=st.integers(0, ROOM))
    def reserve(self, job_id: str, size: int) -> None:
        if job_id in self.reserved or job_id in self.kept:
            return
        if self.total() + size + RESERVED_RESULT_BYTES > ROOM:
            with pytest.raises(SnapshotStoreFullError):
                self.store.reserve(job_id, size)
        else:
            self.store.reserve(job_id, size)
            self.reserved[job_id] = size + RESERVED_RESULT_BYTES

    @rule(job_id=JOB_IDS)
    def release(self, job_id: str) -> None:
        self.store.release(job_id)
        self.reserved.pop(job_id, None)

    @rule(job_id=JOB_IDS, ttl_s=st.integers(0, 50), size=st.integers(0, ROOM))
    def put(self, job_id: str, ttl_s: int, size: int) -> None:
        self.store.put(snapshot(job_id, self.now + ttl_s), size)
        self.reserved.pop(job_id, None)
        self.kept[job_id] = (self.now + ttl_s, size)

    @precondition(lambda self: bool(self.kept))
    @rule(job_id=JOB_IDS)
    def remove(self, job_id: str) -> None:
        assert (self.store.remove(job_id) is not None) is (self.kept.pop(job_id, None) is not None)

    @rule(seconds=st.integers(0, 30))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        due = sorted(at for at, _ in self.kept.values() if at <= self.now)
        assert [one.expires_at for one in self.store.expire(self.now)] == due
        self.kept = {job_id: one for job_id, one in self.kept.items() if one[0] > self.now}

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        assert self.store.held_bytes == self.total()
        assert len(self.store) == len(self.kept)
        assert self.store.next_deadline() == min((at for at, _ in self.kept.values()), default=None)
        for job_id in "abcdef":
            readable = job_id in self.kept and self.kept[job_id][0] > self.now
            assert (self.store.get(job_id, self.now) is not None) is readable


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
