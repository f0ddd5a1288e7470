"""Circuits: one life in full, and what holds on every path."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.circuit import MAX_TARGETS, CircuitPolicy, Circuits, CircuitState

POLICY = CircuitPolicy(failures=3, open_s=30)
A, B = ("one", "a"), ("one", "b")


def opened() -> Circuits:
    """A's circuit has opened at 0."""
    circuits = Circuits(POLICY)
    assert [circuits.failed(A, 0, probe=False) for _ in range(3)] == [False, False, True]
    return circuits


def test_a_life() -> None:
    circuits = opened()
    assert circuits.state(A, 29.9) is CircuitState.OPEN
    assert circuits.enter(A, 29.9) is CircuitState.OPEN
    assert circuits.retry_in_s(A, 10) == 20
    assert circuits.enter(B, 0) is CircuitState.CLOSED
    assert circuits.state(A, 30) is CircuitState.HALF_OPEN
    assert circuits.enter(A, 30) is CircuitState.HALF_OPEN
    assert circuits.enter(A, 31) is CircuitState.OPEN
    assert circuits.failed(A, 32, probe=True)
    assert circuits.enter(A, 61) is CircuitState.OPEN
    assert circuits.enter(A, 62) is CircuitState.HALF_OPEN
    circuits.succeeded(A, 63)
    assert circuits.enter(A, 63) is CircuitState.CLOSED
    assert len(circuits) == 0


def test_a_success_ends_the_row() -> None:
    circuits = Circuits(POLICY)
    for _ in range(5):
        circuits.failed(A, 0, probe=False)
        circuits.failed(A, 0, probe=False)
        circuits.succeeded(A, 0)
    assert circuits.state(A, 0) is CircuitState.CLOSED


def test_a_probe_that_tells_nothing_may_be_repeated() -> None:
    circuits = opened()
    assert circuits.enter(A, 30) is CircuitState.HALF_OPEN
    circuits.said_nothing(A, probe=False)
    assert circuits.enter(A, 30) is CircuitState.OPEN
    circuits.said_nothing(A, probe=True)
    assert circuits.enter(A, 30) is CircuitState.HALF_OPEN


def test_a_long_answer_keeps_nobody_waiting() -> None:
    circuits = opened()
    circuits.enter(A, 30)
    circuits.answering(A)
    assert circuits.enter(A, 31) is CircuitState.CLOSED
    # But one more failure is enough.
    assert circuits.failed(A, 32, probe=False)
    assert circuits.state(A, 33) is CircuitState.OPEN


def test_late_failures_do_not_keep_it_open() -> None:
    circuits = opened()
    assert not circuits.failed(A, 20, probe=False)
    assert circuits.state(A, 30) is CircuitState.HALF_OPEN


def test_a_provider_is_down_while_nothing_of_it_is_known_to_answer() -> None:
    circuits = opened()
    assert circuits.down("one", 1)
    assert not circuits.down("two", 1)
    circuits.succeeded(B, 2)
    assert not circuits.down("one", 3)
    for _ in range(3):
        circuits.failed(B, 4, probe=False)
    assert not circuits.down("one", 31)


def test_reports_name_what_is_not_closed() -> None:
    circuits = opened()
    circuits.failed(B, 1, probe=False)
    (report,) = circuits.reports(10)
    assert (report.provider, report.model, report.state, report.retry_in_s) == (
        "one",
        "a",
        CircuitState.OPEN,
        20,
    )


def test_memory_is_bounded() -> None:
    circuits = Circuits(POLICY)
    for number in range(MAX_TARGETS + 50):
        circuits.failed(("one", str(number)), number, probe=False)
    assert len(circuits) == MAX_TARGETS
    circuits.said_nothing(("one", "0"), probe=True)
    circuits.answering(("one", "0"))


class CircuitWalk(RuleBasedStateMachine):
    """Calls that begin and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.circuits = Circuits(POLICY)
        self.now = 0.0
        self.out: list[bool] = []

    @rule(seconds=st.sampled_from([0.5, 10, 30]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begin(self) -> None:
        state = self.circuits.state(A, self.now)
        entered = self.circuits.enter(A, self.now)
        if entered is not CircuitState.OPEN:
            assert entered is state
            self.out.append(entered is CircuitState.HALF_OPEN)
        else:
            assert self.circuits.retry_in_s(A, self.now) > 0

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 20), how=st.sampled_from(["succeeded", "failed", "nothing"]))
    def end(self, which: int, how: str) -> None:
        probe = self.out.pop(which % len(self.out))
        if how == "succeeded":
            self.circuits.succeeded(A, self.now)
            assert self.circuits.state(A, self.now) is CircuitState.CLOSED
        elif how == "failed":
            opens = self.circuits.failed(A, self.now, probe=probe)
            if opens or probe:
                assert self.circuits.state(A, self.now) is CircuitState.OPEN
        else:
            self.circuits.said_nothing(A, probe=probe)

    @invariant()
    def no_circuit_is_stuck(self) -> None:
        if not any(self.out):
            later = self.now + POLICY.open_s
            assert self.circuits.retry_in_s(A, later) == 0


CircuitWalk.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestCircuitWalk = CircuitWalk.TestCase
