"""Decoding of held-out texts within a budget: by a clock that only decoding moves."""

from pathlib import Path

import pytest
import sacrebleu

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.scoring.rewrite import RewriteScorer
from data_owner_client.training.decoded_policies import DecodedPolicies, ScoredPolicy, TextStore
from data_owner_client.training.time_budget import MIN_TEXTS, TimeBudget

REFERENCES = [f"die {number} Türen" for number in range(100)]
POLICIES = [Interpolation(schedule="constant", lambda_max=number / 10) for number in range(8)]


class Server:
    """Decodes a text a second; the policy with λ = 0 gives the references."""

    def __init__(self, folder: Path, seconds: float, *, identity: str = "") -> None:
        self.now, self.calls = 0.0, list[int]()
        self.budget = TimeBudget(seconds, lambda: self.now)
        store = TextStore(folder / ".training-", identity)
        scorer = RewriteScorer([(text,) for text in REFERENCES])
        self.policies = DecodedPolicies(
            self.decode, scorer, len(REFERENCES), policies=len(POLICIES), budget=self.budget, store=store
        )

    def decode(self, interpolation: Interpolation, count: int) -> list[str]:
        self.calls.append(count)
        self.now += count
        cut = round(10 * interpolation.lambda_max)
        return [text[: len(text) - cut] for text in REFERENCES[:count]]

    def score(self, interpolation: Interpolation) -> ScoredPolicy:
        scored = self.policies.score(interpolation)
        assert scored is not None
        return scored


def test_scores_are_those_of_the_texts(tmp_path: Path) -> None:
    server = Server(tmp_path, 1e6)
    scored = [server.score(each) for each in POLICIES]
    assert server.policies.texts == 100
    assert scored[0].scores["chrf"] == pytest.approx(100)
    cut, chrf = [text[:-3] for text in REFERENCES], sacrebleu.CHRF()
    assert scored[3].scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(cut, [REFERENCES]).score)
    assert scored[3].scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(cut, [REFERENCES]).score)
    assert scored[3].score_E.tolist() == pytest.approx(
        [chrf.sentence_score(text, [reference]).score for text, reference in zip(cut, REFERENCES, strict=True)]
    )


def test_no_policy_is_decoded_twice(tmp_path: Path) -> None:
    server = Server(tmp_path, 1e6)
    assert server.score(POLICIES[0]) is server.score(POLICIES[0])
    assert server.calls == [100]


def test_the_first_policy_shows_how_many_texts_fit(tmp_path: Path) -> None:
    server = Server(tmp_path, 100 + 7 * 40)
    lengths = [len(server.score(each).score_E) for each in POLICIES]
    assert server.calls == [100] + 7 * [40]
    assert server.policies.texts == 40
    assert server.budget.left == 0
    assert lengths == 8 * [40], "the scores are of the same texts"


def test_a_policy_that_would_end_too_late_is_left_out(tmp_path: Path) -> None:
    # Time for one more policy. Fewer texts for all would be too few.
    server = Server(tmp_path, 100 + 7 * (MIN_TEXTS - 1))
    assert [server.policies.score(each) is not None for each in POLICIES] == [True, True, *6 * [False]]
    assert server.calls == [100, 100]
    assert server.policies.refused == 6
    assert 60 * (server.policies.minutes_for_all - 1) < 8 * 100 <= 60 * server.policies.minutes_for_all
    assert server.budget.left >= 0


def test_an_interrupted_call_goes_on_with_the_minutes_that_are_left(tmp_path: Path) -> None:
    stopped = Server(tmp_path, 1000)
    for each in POLICIES[:3]:
        stopped.score(each)
    again = Server(tmp_path, 1000)
    assert all(again.score(each) for each in POLICIES)
    assert again.calls == 5 * [100]
    assert again.budget.left == 1000 - 800
    assert again.score(POLICIES[1]).scores == stopped.score(POLICIES[1]).scores


@pytest.mark.parametrize("damage", [b"", b'{"texts": "x"}'])
def test_texts_of_other_work_or_damaged_ones_are_decoded_again(tmp_path: Path, damage: bytes) -> None:
    Server(tmp_path, 1e6).score(POLICIES[0])
    other = Server(tmp_path, 1e6, identity="another adapter")
    other.score(POLICIES[0])
    assert other.calls == [100]
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    again = Server(tmp_path, 1e6)
    again.score(POLICIES[0])
    assert again.calls == [100]
