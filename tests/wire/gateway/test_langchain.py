"""LangChain's ChatOpenAI on an adapted model, in a process of the environment of applications."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_owner_client import DecodingSettings, SamplingSettings, TrainedAdapter, translate
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.plm.remote_plm import RemotePlm
from tests.served_adapters import PAIRS, TASK, finish_reason

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
TEXTS = [pair.source for pair in PAIRS[:6]]
SEED, MAX_TOKENS = 5, 2
SCHEMA: dict[str, Any] = {
    "title": "Answer",
    "type": "object",
    "properties": {"article": {"enum": ["die", "der"]}, "count": {"enum": [1, 2]}},
    "required": ["article", "count"],
    "additionalProperties": False,
}


@pytest.fixture
def record(clients_python: Path, offline: Mapping[str, str], url: str, adapter_name: str) -> dict[str, Any]:
    """Results of LangChain's calls."""
    command = [str(clients_python), str(Path(__file__).with_name("langchain_calls.py")), f"{url}/v1", adapter_name]
    given = json.dumps({"texts": TEXTS, "schema": SCHEMA, "seed": SEED, "max_tokens": MAX_TOKENS})
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=dict(offline), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("adapter_name", ["gradual"])
def test_calls_return_the_texts_of_translate(
    record: dict[str, Any], plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    expected = translate(plm, TEXTS, adapter=adapter)
    first = expected.choices[0]
    assert record["invoke"]["text"] == expected.texts[0]
    # The task takes the last text of the user alone.
    assert record["conversation"]["text"] == expected.texts[0]
    assert [each["text"] for each in record["batch"]] == expected.texts
    assert "".join(record["pieces"]) == record["stream"]["text"] == expected.texts[0]
    usage = {
        "input_tokens": len(plm.tokenizer.encode_prompt(TASK.prompt(TEXTS[0], plm.tokenizer))),
        "output_tokens": len(first),
    }
    for name in ("invoke", "stream"):
        assert usage.items() <= record[name]["usage"].items()
        assert record[name]["metadata"]["finish_reason"] == finish_reason(plm, expected.token_ids[0])
        assert record[name]["metadata"]["model_name"] == adapter_name
    logged = record["logged"]["metadata"]["logprobs"]["content"]
    scores = [choice.logprob for choice in first]
    assert [entry["logprob"] for entry in logged] == pytest.approx(scores[: len(logged)], abs=1e-4)
    assert len(logged) >= len(scores) - 1  # perhaps without the stop


@pytest.mark.parametrize("adapter_name", ["constant"])
def test_settings_have_the_effect_that_they_have_in_translate(
    record: dict[str, Any], plm: RemotePlm, adapter: TrainedAdapter
) -> None:
    def expected(**options: Any) -> list[str]:
        return translate(plm, TEXTS[:1], adapter=adapter, **options).best[0]

    short = expected(decoding=DecodingSettings(max_new_tokens=MAX_TOKENS))
    assert [record["short"]["text"]] == short
    assert record["short"]["metadata"]["finish_reason"] == "length"
    sampling = SamplingSettings(temperature=1.0, seed=SEED, candidates_only=True)
    assert sorted(record["drawn"]) == sorted(expected(sampling=sampling, samples=3, best=3))
    # How long the adapter's own answers are says nothing about an answer in another form.
    (structured,) = expected(form=AnswerForm(SCHEMA), decoding=DecodingSettings(length_bound=False))
    assert record["structured"] == json.loads(structured)
    assert record["structured"]["article"] in SCHEMA["properties"]["article"]["enum"]
