"""Options of vLLM that are checked before it is imported."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from plm_owner_server.engines.vllm.loading import VllmSettings, load_vllm_engine
from plm_owner_server.settings import ENGINES, ServerSettings
from protocol.errors import InvalidRequest
from tests import support


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("max_model_len", "--max-sequence-tokens"),
        ("data_parallel_size", "replicas"),
        ("speculative_config", "Leave it out"),
        ("scheduler_cls", "Leave it out"),
    ],
)
def test_options_that_the_server_relies_on_are_refused(name: str, flag: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        load_vllm_engine(Path("anywhere"), VllmSettings(options={name: 1}))
    assert flag in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "vllm", "device_map": "auto"},
        {"engine": "transformers", "tensor_parallel_size": 2},
        {"engine": "transformers", "vllm_options": '{"seed": 1}'},
    ],
)
def test_flags_of_the_other_engine_are_refused(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PEMA_ENGINE", "PEMA_VLLM_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="not supported by --engine"):
        support.make_settings(**wrong)
    assert support.make_settings(engine="vllm", tensor_parallel_size=2, vllm_options="").vllm_options == {}


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="there is no engine onnx; use transformers or vllm"):
        support.make_settings(engine="onnx")


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_registered(name: str) -> None:
    entry = ENGINES[name]
    assert callable(import_module(entry.module).load)
    assert set(entry.unsupported) < set(ServerSettings.model_fields)
