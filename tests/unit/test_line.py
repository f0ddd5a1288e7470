"""Places and turns: never more than there are, first in first out, nothing lost."""

import trio
from hypothesis import given
from hypothesis import strategies as st

from actors.line import Line, Turn


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("jbel"), st.integers(0, 20)), max_size=60))
def test_a_walk(places: int, steps: list[tuple[str, int]]) -> None:
    """Joining (j, or b behind), entering at once (e) and leaving (l), against two plain lists."""
    line = Line(places)
    inside: list[Turn | None] = []
    queues: tuple[list[Turn], list[Turn]] = ([], [])

    def settle() -> None:
        while len(inside) < places and (queues[0] or queues[1]):
            inside.append((queues[0] or queues[1]).pop(0))

    for step, number in steps:
        if step in "jb":
            queues[step == "b"].append(line.join(later=step == "b"))
        elif step == "e":
            entered = line.try_enter()
            assert entered is (len(inside) < places)
            if entered:
                inside.append(None)
        elif everybody := [*inside, *queues[0], *queues[1]]:
            who = everybody[number % len(everybody)]
            if who in inside:
                inside.remove(who)
            for queue in queues:
                queue[:] = [turn for turn in queue if turn is not who]
            if who is None:
                line.leave()
            else:
                who.leave()
                who.leave()
        settle()
        assert line.taken == len(inside)
        assert line.waiting == len(queues[0]) + len(queues[1])
        assert all(turn.came.is_set() for turn in inside if turn is not None)
        assert not any(turn.came.is_set() for turn in (*queues[0], *queues[1]))


async def test_cancelled_in_line_it_leaves(autojump_clock: trio.abc.Clock) -> None:
    line = Line(1)
    assert line.try_enter()
    with trio.move_on_after(1):
        async with line.join():
            raise AssertionError("its turn never came")
    assert line.waiting == 0
    line.leave()
    async with line.join():
        assert line.taken == 1
    assert line.taken == 0


def test_who_is_called_is_called_in_order() -> None:
    line = Line(1)
    called: list[int] = []
    turns = [line.join(then=lambda number=number: called.append(number)) for number in range(3)]  # type: ignore[misc]  # the default binds it
    for turn in turns:
        turn.leave()
    assert called == [0, 1, 2]
