"""Decoding of held-out texts within a budget: by a clock that only decoding moves."""

from pathlib import Path

import pytest

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.scoring.text_metrics import text_scores
from data_owner_client.training.decoded_policies import DecodedPolicies, TextStore
from data_owner_client.training.time_budget import MIN_TEXTS, TimeBudget

REFERENCES = [f"die {number} Türen" for number in range(100)]
POLICIES = [Interpolation(schedule="constant", lambda_max=number / 10) for number in range(8)]


class Server:
    """Decodes a text a second; the policy with λ = 0 gives the references."""

    def __init__(self, folder: Path, seconds: float, *, identity: str = "") -> None:
        self.now, self.calls = 0.0, list[int]()
        self.budget = TimeBudget(seconds, lambda: self.now)
        store = TextStore(folder / ".training-", identity)
        self.policies = DecodedPolicies(
            self.decode, REFERENCES, policies=len(POLICIES), budget=self.budget, store=store
        )

    def decode(self, interpolation: Interpolation, count: int) -> list[str]:
        self.calls.append(count)
        self.now += count
        return [text[: len(text) - round(10 * interpolation.lambda_max)] for text in REFERENCES[:count]]


def test_scores_are_those_of_the_texts(tmp_path: Path) -> None:
    policies = Server(tmp_path, 1e6).policies
    assert all(policies.add(each) for each in POLICIES)
    assert policies.texts == 100
    assert policies.scores(POLICIES[0]).chrf == pytest.approx(100)
    assert policies.scores(POLICIES[3]) == text_scores([text[:-3] for text in REFERENCES], REFERENCES)
    assert policies.chrf_E(POLICIES[3]).shape == (100,)
    assert policies.chrf_E(POLICIES[3]).max() < 100


def test_no_policy_is_decoded_twice(tmp_path: Path) -> None:
    server = Server(tmp_path, 1e6)
    assert server.policies.add(POLICIES[0])
    assert server.policies.add(POLICIES[0])
    assert server.calls == [100]
    assert server.policies.interpolations == POLICIES[:1]


def test_the_first_policy_shows_how_many_texts_fit(tmp_path: Path) -> None:
    server = Server(tmp_path, 100 + 7 * 40)
    assert all(server.policies.add(each) for each in POLICIES)
    assert server.calls == [100] + 7 * [40]
    assert server.policies.texts == 40
    assert server.budget.left == 0
    assert len(server.policies.chrf_E(POLICIES[0])) == 40, "the scores are of the same texts"


def test_a_policy_that_would_end_too_late_is_left_out(tmp_path: Path) -> None:
    # Time for one more policy. Fewer texts for all would be too few.
    server = Server(tmp_path, 100 + 7 * (MIN_TEXTS - 1))
    assert [server.policies.add(each) for each in POLICIES] == [True, True, *6 * [False]]
    assert server.calls == [100, 100]
    assert server.policies.refused == 6
    assert 60 * (server.policies.minutes_for_all - 1) < 8 * 100 <= 60 * server.policies.minutes_for_all
    assert server.budget.left >= 0


def test_an_interrupted_call_goes_on_with_the_minutes_that_are_left(tmp_path: Path) -> None:
    stopped = Server(tmp_path, 1000)
    for each in POLICIES[:3]:
        stopped.policies.add(each)
    again = Server(tmp_path, 1000)
    assert all(again.policies.add(each) for each in POLICIES)
    assert again.calls == 5 * [100]
    assert again.budget.left == 1000 - 800
    assert again.policies.scores(POLICIES[1]) == stopped.policies.scores(POLICIES[1])


@pytest.mark.parametrize("damage", [b"", b'{"texts": "x"}'])
def test_texts_of_other_work_or_damaged_ones_are_decoded_again(tmp_path: Path, damage: bytes) -> None:
    Server(tmp_path, 1e6).policies.add(POLICIES[0])
    other = Server(tmp_path, 1e6, identity="another adapter")
    other.policies.add(POLICIES[0])
    assert other.calls == [100]
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    again = Server(tmp_path, 1e6)
    again.policies.add(POLICIES[0])
    assert again.calls == [100]
