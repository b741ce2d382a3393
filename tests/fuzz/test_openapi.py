"""The REST application does what its OpenAPI description says, whatever it is sent (schemathesis)."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    missing_required_header,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from harness.tiny_models import VOCAB_SIZE
from plm_owner_server.admission.authentication import Authenticator
from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.transports.rest_app import create_app
from tests import guard
from tests.profiles import scaled

PROBES = ("/healthz", "/readyz")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    ignored_auth,
    missing_required_header,
    unsupported_method,
]
OPERATIONS = [
    *(("GET", path) for path in (*PROBES, "/v1/model", "/v1/tokenizer", "/v1/lm-head")),
    *(("POST", path) for path in ("/v1/lm-head", "/v1/encode", "/v1/decode", "/v1/next-token-distribution")),
]


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authenticator, str]:
    return guard.one_tenant(tmp_path_factory.mktemp("tenant"))


@pytest.fixture(scope="module")
def description(tiny_service: PlmService, tenant: tuple[Authenticator, str]) -> Any:
    app = create_app(AdmissionController(ServingState(tiny_service), tenant[0]), max_body_bytes=2**20)
    document = _in_reach(app.openapi())
    schema = schemathesis.openapi.from_dict(document)
    schema.app = app
    return schema


def _in_reach(node: Any) -> Any:
    """The description with ids that the tiny model has, or hardly any call would get further than the first check."""
    if isinstance(node, list):
        return [_in_reach(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: VOCAB_SIZE - 1 if key == "maximum" and value == 2**31 - 1 else _in_reach(value)
        for key, value in node.items()
    }


def _sensible(body: Any) -> Any:
    """A body as far as the description cannot tell: one number a sequence, each written as an integer."""
    if isinstance(body, list):
        return [_sensible(item) for item in body]
    if isinstance(body, dict):
        ids = body.get("token_ids")
        one_each = {name: ([0] * len(ids) if ids else []) for name in ("from_position", "look_ahead") if name in body}
        return {name: _sensible(value) for name, value in body.items() if name != "echo"} | one_each
    return int(body) if isinstance(body, float) and body.is_integer() else body


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_a_call_is_answered_as_described(
    description: Any, tenant: tuple[Authenticator, str], method: str, path: str, mode: GenerationMode
) -> None:
    """Send calls that the description allows and others, with the key and without it."""
    if path in PROBES and mode is GenerationMode.NEGATIVE:
        return  # nothing about them can be wrong

    @settings(max_examples=scaled(40), database=None)
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def answers_as_described(case: Any) -> None:
        headers = {"Authorization": f"Bearer {tenant[1]}"}
        if mode is GenerationMode.POSITIVE:
            case.body = _sensible(case.body)
        case.validate_response(case.call(headers=headers), checks=CHECKS, headers=headers)

    answers_as_described()
