"""Minutes of `train`: by a clock that only work moves."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.training.time_budget import MIN_TEXTS, TimeBudget, WorkCosts, WorkPlan, WorkWishes
from tests.profiles import scaled

COSTS = WorkCosts(training=100.0, retrieval=200.0, text=0.5, retrieved_text=2.0)
WISHES = WorkWishes(trainings=1, search=True, retrieval="if it fits", texts=100, policies=8)
SECONDS = st.floats(0, 5000)


def plan(minutes: float, **changes: Any) -> WorkPlan:
    return WorkPlan.within(60 * minutes, replace(WISHES, **changes), COSTS)


def test_a_budget_counts_this_call_and_the_work_of_earlier_ones() -> None:
    now = 1000.0
    budget = TimeBudget(60.0, lambda: now)
    assert budget.left == 60.0
    now += 20.0
    budget.charge(15.0)
    assert budget.left == 25.0
    now += 30.0
    assert budget.left == -5.0


@pytest.mark.parametrize(
    ("minutes", "retrieval", "texts", "search"),
    [
        (0.0, False, 0, False),  # the training alone
        (2.0, False, 0, False),  # 20 s are not enough for 20 texts with 8 policies
        (4.0, False, 35, False),  # 140 s: 35 texts, 4 s each
        (5.0, True, 0, False),  # 200 s: the examples, which gain most
        (10.0, True, 0, True),  # 300 s behind examples: 18 texts are too few, and a training fits
        (15.0, True, 37, False),
        (60.0, True, 100, True),
    ],
)
def test_the_most_valuable_work_comes_first(minutes: float, retrieval: bool, texts: int, search: bool) -> None:
    planned = plan(minutes)
    assert (planned.retrieval, planned.texts, planned.search_seconds > 0) == (retrieval, texts, search)


def test_wishes_of_the_user_are_done_whatever_the_time() -> None:
    assert plan(0.0, retrieval="always").retrieval
    assert not plan(60.0, retrieval="no").retrieval
    assert plan(60.0, texts=3).texts == 3
    assert plan(60.0, search=False).search_seconds == 0.0


@given(seconds=SECONDS, trainings=st.integers(0, 2), retrieval=st.sampled_from(["no", "if it fits"]))
@settings(max_examples=scaled(200))
def test_all_planned_work_fits(seconds: float, trainings: int, retrieval: Any) -> None:
    planned = WorkPlan.within(seconds, replace(WISHES, trainings=trainings, retrieval=retrieval), COSTS)
    text = COSTS.retrieved_text if planned.retrieval else COSTS.text
    work = trainings * COSTS.training + planned.search_seconds
    work += COSTS.retrieval * planned.retrieval + planned.texts * WISHES.policies * text
    assert work <= max(seconds, trainings * COSTS.training) + 1e-6
    assert planned.texts == 0 or planned.texts >= MIN_TEXTS
    assert planned.search_seconds == 0.0 or planned.search_seconds >= COSTS.training


@given(seconds=st.floats(100, 2000), used=st.floats(0, 100))
@settings(max_examples=scaled(200))
def test_the_named_minutes_include_the_work_that_was_left_out(seconds: float, used: float) -> None:
    planned = WorkPlan.within(seconds, WISHES, COSTS, used=used)
    for line in planned.left_out:
        what, minutes = line.removesuffix(")").split(" (included with --minutes ")
        more = WorkPlan.within(60 * int(minutes), WISHES, COSTS, used=used)
        included = {
            "retrieved examples": more.retrieval,
            "a search for better settings": more.search_seconds > 0,
            "a choice by decoded texts": more.texts > 0,
        }
        assert included.get(what, more.texts == WISHES.texts), line
    assert bool(planned.left_out) == (not planned.retrieval or planned.texts < 100 or not planned.search_seconds)


def test_the_plan_in_words() -> None:
    assert plan(60.0).steps == [
        "a training (2 min)",
        "a search for better settings (28 min)",
        "likelihoods behind retrieved examples (3 min)",
        "100 held-out texts decoded with up to 8 policies (27 min)",
    ]
    assert plan(2.0).left_out == [
        "retrieved examples (included with --minutes 5)",
        "a choice by decoded texts (included with --minutes 3)",
        "a search for better settings (included with --minutes 7)",
    ]
