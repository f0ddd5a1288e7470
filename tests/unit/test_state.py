import copy
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import IllegalTransition
from events.state import ENDED, TRANSITIONS, JobState, next_state, project_state
from events.types import Event
from tests.unit.strategies import EVENTS, events, unhurried

# The picture of events/state.py, one line an arrow; written down a second time on purpose.
ARROWS = """
    nothing    JobAccepted    pending
    pending    JobDetached    pending
    pending    AttemptStarted processing
    pending    JobFailed      failed
    pending    JobCancelled   cancelled
    processing JobDetached    processing
    processing AttemptStarted processing
    processing FramesReceived processing
    processing AttemptFailed  processing
    processing JobCompleted   completed
    processing JobFailed      failed
    processing JobCancelled   cancelled
    completed  JobExpired     expired
    failed     JobExpired     expired
    cancelled  JobExpired     expired
"""
WANTED = {(source, event): target for source, event, target in map(str.split, ARROWS.strip().splitlines())}
STATES: list[JobState | None] = [None, *JobState]


def name(state: JobState | None) -> str:
    return "nothing" if state is None else state.value


def table() -> dict[Any, dict[Any, JobState]]:
    return copy.deepcopy({state: dict(row) for state, row in TRANSITIONS.items()})


def test_every_state_has_a_row_and_every_event_a_strategy() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert set(EVENTS) == set(get_args(Event))
    assert len(WANTED) == sum(map(len, TRANSITIONS.values()))


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("state", STATES, ids=name)
@unhurried
@given(data=st.data())
def test_every_state_meets_every_event(
    state: JobState | None, kind: type[Event], data: st.DataObject
) -> None:
    event = data.draw(EVENTS[kind])
    before = table()
    target = WANTED.get((name(state), kind.__name__))
    if target is None:
        with pytest.raises(IllegalTransition, match=f"{kind.__name__} does not follow {name(state)}"):
            next_state(state, event)
    else:
        assert next_state(state, event) is JobState(target)
    assert table() == before


@unhurried
@given(st.lists(events, max_size=8))
def test_a_history_folds_up_to_its_first_bad_step(history: list[Event]) -> None:
    state, good = "nothing", 0
    for event in history:
        target = WANTED.get((state, type(event).__name__))
        if target is None:
            break
        state, good = target, good + 1
    assert name(project_state(history[:good])) == state
    if good < len(history):
        with pytest.raises(IllegalTransition):
            project_state(history)


def test_nothing_but_expiry_follows_an_end() -> None:
    ends = {target for (_, event), target in WANTED.items() if event != "JobExpired"}
    assert {state.value for state in ENDED} == (ends - {"pending", "processing"}) | {"expired"}
    for state in ENDED:
        assert {kind.__name__ for kind in TRANSITIONS[state]} <= {"JobExpired"}


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[JobState.EXPIRED] = {}  # type: ignore[index]  # that is what is tested
