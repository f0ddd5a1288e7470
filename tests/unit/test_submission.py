"""What a job is called."""

from uuid import UUID

from actors.submission import new_job_id


def test_ids_are_uuids_in_the_order_of_their_making() -> None:
    ids = [new_job_id() for _ in range(5000)]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)
    assert {UUID(id_).version for id_ in ids} == {7}
    assert all(str(UUID(id_)) == id_ for id_ in ids)
