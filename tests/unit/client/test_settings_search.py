from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from data_owner_client.adapter.network import Adapter
from data_owner_client.training import settings_search as module
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.settings_search import search_settings
from data_owner_client.training.trainer import Trained


class Clock:
    """Trainings that take a minute each and are the better, the nearer they are to some settings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **wanted: Any) -> None:
        self.now, self.wanted, self.tried = 0.0, wanted, list[TrainingSettings]()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def fit(self, settings: TrainingSettings) -> Trained:
        self.now += 60.0
        self.tried.append(settings)
        wrong = sum(getattr(settings, name) != value for name, value in self.wanted.items())
        return Trained(Adapter(4, 2, "paper"), [], 1.0 + wrong)


BEGIN = TrainingSettings(form="residual", search_minutes=30.0)


def test_what_is_better_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch, dropout=0.35, kappa=0.05, form="recent"), list[float]()
    best, trained = search_settings(
        [BEGIN], clock.fit, forms=["residual", "recent", "paper"], on_trial=lambda _, nll: told.append(nll)
    )
    assert best == replace(BEGIN, dropout=0.35, kappa=0.05, form="recent")
    assert trained.best_nll == min(told) == 1.0
    assert len(told) == len(clock.tried) == len(set(clock.tried))


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, dropout=0.35, rank=256, form="recent")
    begin = replace(BEGIN, rank=64, dropout=0.1)
    best, _ = search_settings([begin], clock.fit, forms=[], on_trial=lambda *_: None)
    assert best == begin
    assert {(tried.rank, tried.dropout, tried.form) for tried in clock.tried} == {(64, 0.1, "residual")}


@pytest.mark.parametrize(("minutes", "trainings"), [(0.0, 1), (0.5, 1), (2.0, 2), (3.5, 3)])
def test_no_training_is_begun_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, minutes: float, trainings: int
) -> None:
    clock = Clock(monkeypatch, dropout=0.9)
    search_settings([replace(BEGIN, search_minutes=minutes)], clock.fit, forms=["paper"], on_trial=lambda *_: None)
    assert len(clock.tried) == trainings


def test_every_candidate_is_tried_whatever_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, pairing="reliable")
    candidates = [
        replace(BEGIN, form="recent", pairing="aligned", search_minutes=0.0),
        replace(BEGIN, pairing="reliable", search_minutes=0.0),
    ]
    best, trained = search_settings(candidates, clock.fit, forms=["recent"], on_trial=lambda *_: None)
    assert clock.tried == candidates
    assert best == candidates[1]
    assert trained.best_nll == 1.0


def test_sure_contexts_are_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, pairing="reliable")
    search_settings(
        [replace(BEGIN, pairing="reliable")], clock.fit, forms=["recent", "paper"], on_trial=lambda *_: None
    )
    assert {tried.form for tried in clock.tried} == {"residual", "paper"}
