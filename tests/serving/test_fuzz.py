"""The API, by requests that are made from its own schema."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings
from schemathesis.checks import not_a_server_error

from tests.serving.collected import wait_until
from tests.serving.conftest import NAME


@pytest.mark.slow
def test_requests_of_the_schema_get_answers_or_errors(address, engine):
    """No request ends with an error of the server, and none keeps a place."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method != "post":
            continue

        @settings(
            max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @schemathesis_given(operation)
        def ask(case):
            if isinstance(case.body, dict):
                case.body = {**case.body, "model": NAME}
            response = case.call(timeout=60)
            case.validate_response(response, checks=[not_a_server_error])
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    wait_until(lambda: engine.num_running + engine.num_waiting == 0)
    assert httpx.get(f"{address}/ready").status_code == 200


def schemathesis_given(operation):
    from hypothesis import given

    return given(case=operation.as_strategy())
