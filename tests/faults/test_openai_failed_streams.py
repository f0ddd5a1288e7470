"""What the record of a failed stream over Chat Completions tells."""

import pytest

from service.main import open_gateway
from tests.fake_openai import chunk, event
from tests.fake_upstream import STREAM_HEAD, open_upstream
from tests.faults.upstream import chunk as piece
from tests.faults.upstream import sends
from tests.support.gateway import BODY, request, settings_of


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        (None, {"output_tokens": 2}),
        ({"prompt_tokens": 40, "completion_tokens": 7}, {"input_tokens": 40, "output_tokens": 7}),
    ],
)
@pytest.mark.parametrize("end", [b"", piece(event(error={"message": "busy", "code": 529}))])
async def test_a_failed_streams_job_records_what_was_received(
    end: bytes, told: dict[str, int] | None, usage: dict[str, int]
) -> None:
    """Those upstreams tell usage at the end only, which does not come; one told on the way is kept."""
    sent = STREAM_HEAD + piece(chunk({"content": "eight ch"}, usage=told)) + end
    async with open_upstream(sends(sent)) as upstream:
        providers = [{"name": "fake", "kind": "openai", "base_url": f"{upstream.url}/v1"}]
        settings = settings_of(providers=providers, retries={"max_attempts": 1})
        async with open_gateway(settings) as gateway:
            answer = await request(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True})
            record = (await request(gateway.url, "GET", f"/v1/jobs/{answer.job_id}")).json
            assert record["status"] == "failed"
            assert {name: record["usage"][name] for name in usage} == usage
            assert record["usage"]["input_tokens"] > 3
            text = (await request(gateway.url, "GET", "/metrics")).body.decode()
            output = float(usage["output_tokens"])
            assert f'messagesd_tokens_total{{direction="output"}} {output}' in text
