from types import SimpleNamespace
from typing import Any

import pytest

from data_owner_client.adapter.gate import Gate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.cli.options import DecodingOptions
from protocol.errors import InvalidData

GATE = Gate(weight=(1.0,), centre=(0.0,), scale=(1.0,))
CHOSEN = Interpolation(schedule="constant", lambda_max=0.4, gate=GATE, length_reward=1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"length_reward": 0.0}, CHOSEN.model_copy(update={"length_reward": 0.0})),
        ({"lambda_max": 0.2}, Interpolation(schedule="constant", lambda_max=0.2, length_reward=1.0)),
        ({"schedule": "constant"}, Interpolation(schedule="constant", lambda_max=0.4, length_reward=1.0)),
        ({"schedule": "gradual"}, Interpolation(schedule="gradual", lambda_max=0.9)),
        (
            {"schedule": "linear", "lambda_max": 0.5, "length_reward": 2.0},
            Interpolation(schedule="linear", lambda_max=0.5, length_reward=2.0),
        ),
    ],
)
def test_what_is_said_of_the_interpolation_and_what_training_chose(
    options: dict[str, Any], expected: Interpolation | None
) -> None:
    adapter: Any = SimpleNamespace(card=SimpleNamespace(interpolation=CHOSEN))
    assert DecodingOptions(**options).interpolation(adapter) == expected


@pytest.mark.parametrize("options", [{"schedule": "linear"}, {"lambda_max": 0.5}, {"length_reward": 1.0}])
def test_without_an_adapter_there_is_nothing_to_say(options: dict[str, Any]) -> None:
    assert DecodingOptions().interpolation(None) is None
    with pytest.raises(InvalidData, match="how an adapter is used"):
        DecodingOptions(**options).interpolation(None)
