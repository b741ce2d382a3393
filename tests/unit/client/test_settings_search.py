"""The search for settings: which trainings are done, and which settings stay."""

from dataclasses import replace
from typing import Any

import pytest

from data_owner_client.adapter.network import Adapter
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.settings_search import search_settings
from data_owner_client.training.trainer import Trained


class Trainer:
    """Trainings that take a minute each and are the better, the nearer they are to some settings."""

    def __init__(self, minutes: float = 30.0, **wanted: Any) -> None:
        self.left, self.wanted, self.tried = 60 * minutes, wanted, list[TrainingSettings]()

    def fit(self, settings: TrainingSettings) -> Trained:
        self.left -= 60.0
        self.tried.append(settings)
        wrong = sum(getattr(settings, name) != value for name, value in self.wanted.items())
        return Trained(settings, Adapter(4, 2, "paper"), [], 1.0 + wrong, seconds=60.0)

    def search(self, *candidates: TrainingSettings, forms: Any = ()) -> tuple[TrainingSettings, float, list[float]]:
        """The best settings, their loss, and the losses of all trials."""
        losses = list[float]()
        trainings = search_settings(
            candidates,
            self.fit,
            forms=forms,
            on_trial=lambda _, nll: losses.append(nll),
            has_time_for=lambda seconds: self.left >= seconds,
        )
        assert [trained.best_nll for trained in trainings] == sorted(losses)
        return trainings[0].settings, trainings[0].best_nll, losses


BEGIN = TrainingSettings(form="residual")


def test_a_better_change_stays() -> None:
    trainer = Trainer(dropout=0.35, kappa=0.05, form="recent")
    best, nll, losses = trainer.search(BEGIN, forms=["residual", "recent", "paper"])
    assert best == replace(BEGIN, dropout=0.35, kappa=0.05, form="recent")
    assert nll == min(losses) == 1.0
    assert len(losses) == len(trainer.tried) == len(set(trainer.tried))


def test_settings_of_the_user_stay() -> None:
    trainer = Trainer(dropout=0.35, rank=256, form="recent")
    begin = replace(BEGIN, rank=64, dropout=0.1)
    assert trainer.search(begin)[0] == begin
    assert {(tried.rank, tried.dropout, tried.form) for tried in trainer.tried} == {(64, 0.1, "residual")}


@pytest.mark.parametrize(("minutes", "trainings"), [(0.0, 1), (0.5, 1), (2.0, 2), (3.5, 3)])
def test_no_training_begins_that_would_end_too_late(minutes: float, trainings: int) -> None:
    trainer = Trainer(minutes, dropout=0.9)
    trainer.search(BEGIN, forms=["paper"])
    assert len(trainer.tried) == trainings


def test_every_candidate_is_tried_whatever_the_time() -> None:
    trainer = Trainer(0.0, pairing="reliable")
    candidates = [replace(BEGIN, form="recent", pairing="aligned"), replace(BEGIN, pairing="reliable")]
    best, nll, _ = trainer.search(*candidates, forms=["recent"])
    assert trainer.tried == candidates
    assert best == candidates[1]
    assert nll == 1.0


def test_reliable_contexts_are_not_combined_with_the_recent_form() -> None:
    trainer = Trainer(pairing="reliable")
    trainer.search(replace(BEGIN, pairing="reliable"), forms=["recent", "paper"])
    assert {tried.form for tried in trainer.tried} == {"residual", "paper"}


def test_the_search_ends_with_a_seed_for_each_further_member() -> None:
    trainer = Trainer(dropout=0.35)
    trainer.search(replace(BEGIN, seed=7, members=3))
    assert [(tried.seed, tried.dropout) for tried in trainer.tried[-2:]] == [(8, 0.35), (9, 0.35)]
    assert {tried.seed for tried in trainer.tried[:-2]} == {7}
