"""Log lines: shape, level, secrets, and a stream that is gone."""

import io
import json
import logging
import threading
from typing import Any

import pytest
from hypercorn.config import Config

from service.logs import FilteringBoundLogger, hypercorn_logger, make_logger
from service.settings import LoggingSettings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fail(message: str, _local: str) -> None:
    raise ValueError(message)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logger(level: str = "debug", form: str = "json") -> tuple[FilteringBoundLogger, io.StringIO]:
    stream = io.StringIO()
    settings = LoggingSettings.model_validate({"level": level, "format": form})
    return make_logger(settings, stream), stream


def test_a_line_is_json_with_action_level_and_utc_time() -> None:
    log, stream = logger()
    log.bind(job_id="j1").info("job accepted", action="job.accepted", request_id="r1")
    log.info("something else")
    first, second = lines(stream)
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "job accepted",
        "action": "job.accepted",
        "level": "info",
        "job_id": "j1",
        "request_id": "r1",
    }
    assert second["action"] == "unnamed"


def test_levels() -> None:
    log, stream = logger("WARNING")
    log.info("no")
    log.warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_auto_is_console_on_a_terminal_only() -> None:
    settings = LoggingSettings()
    terminal, pipe = Terminal(), io.StringIO()
    make_logger(settings, terminal).info("hello", action="a.b")
    make_logger(settings, pipe).info("hello", action="a.b")
    assert not terminal.getvalue().startswith("{")
    assert "hello" in terminal.getvalue()
    assert lines(pipe)[0]["event"] == "hello"


@pytest.mark.parametrize("form", ["json", "console"])
def test_exceptions_are_rendered_without_local_variables(form: str) -> None:
    log, stream = logger(form=form)
    local_value = "local-" + "value"
    try:
        fail("boom with sk-ant-api03-abcdefgh", local_value)
    except ValueError:
        log.exception("job crashed", action="job.crashed")
    text = stream.getvalue()
    assert "Traceback" in text
    assert "ValueError: boom with ***" in text
    assert local_value not in text


def test_secrets_are_masked_by_name_and_by_look() -> None:
    log, stream = logger()
    log.info(
        "call with Bearer abcdefgh12345",
        action="x",
        authorization="abc",
        api_key="abc",
        headers={"X-Api-Key": "abc", "accept": "*/*"},
        pairs=[("x-bf-vk", "abc"), ("accept", "*/*")],
        note="use sk-bf-abcdefgh_-12 now, or whsec_abcd+/efgh==",
        body=b"sk-ant-abcdefgh",
        key_name="default",
        input_tokens=3,
        deep={"a": {"b": {"c": {"d": {"e": {"authorization": "abc"}}}}}},
    )
    (line,) = lines(stream)
    assert "abc" not in stream.getvalue()
    assert line["event"] == "call with ***"
    assert line["headers"] == {"X-Api-Key": "***", "accept": "*/*"}
    assert line["pairs"] == [["x-bf-vk", "***"], ["accept", "*/*"]]
    assert line["note"] == "use *** now, or ***"
    assert (line["key_name"], line["input_tokens"]) == ("default", 3)


def test_what_json_cannot_say_is_still_logged() -> None:
    log, stream = logger()
    log.info("odd", action="x", text="\ud800", big=1 << 80, thing=object(), table={1: 2})
    (line,) = lines(stream)
    assert line["text"] == "\ud800"
    assert line["big"] == 1 << 80
    assert line["thing"].startswith("<object object")


def test_lines_stay_whole_between_threads() -> None:
    log, stream = logger()
    threads = [
        threading.Thread(target=lambda: [log.info("x" * 500, action="a") for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(stream)) == 200


def test_a_stream_that_is_gone_stops_nothing() -> None:
    log, stream = logger()
    stream.close()
    log.info("nobody reads this", action="x")

    class Broken(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            raise BrokenPipeError

    broken = Broken()
    make_logger(LoggingSettings(), broken).info("nor this", action="x")
    assert broken.tried == 1


async def test_hypercorn_writes_to_our_log() -> None:
    log, stream = logger()
    config = Config()
    config.logger_class = hypercorn_logger(log)
    server_log = config.log
    await server_log.info("Running on %s", "http://127.0.0.1:1")
    await server_log.debug("d")
    await server_log.warning("100% odd")
    await server_log.error("e")
    await server_log.critical("c")
    await server_log.log(logging.WARNING, "w")
    try:
        fail("boom", "")
    except ValueError:
        await server_log.exception("Error in ASGI Framework")
    found = lines(stream)
    assert {line["action"] for line in found} == {"http.server"}
    assert [(line["level"], line["event"]) for line in found] == [
        ("debug", "Running on http://127.0.0.1:1"),
        ("debug", "d"),
        ("warning", "100% odd"),
        ("error", "e"),
        ("critical", "c"),
        ("warning", "w"),
        ("error", "Error in ASGI Framework"),
    ]
    assert "ValueError: boom" in found[-1]["exception"]


async def test_accesses_are_debug_lines_without_query() -> None:
    scope: Any = {"type": "http", "method": "GET", "path": "/v1/jobs", "query_string": b"key=hush"}
    for level, expected in (("debug", 2), ("info", 0)):
        log, stream = logger(level)
        server_log = hypercorn_logger(log)(Config())
        await server_log.access(scope, {"status": 200, "headers": []}, 0.25)
        await server_log.access(scope, None, 0.5)  # type: ignore[arg-type]  # hypercorn itself passes None here
        assert len(lines(stream)) == expected
        assert "hush" not in stream.getvalue()
        if expected:
            assert [line["status"] for line in lines(stream)] == [200, None]
            assert lines(stream)[0]["duration_s"] == 0.25
