"""Drafts: as many as pay, by the side with the higher acceptance rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.decoding.client_drafts import NgramDrafter, PromptLookupDrafter
from data_owner_client.decoding.draft_planning import (
    AcceptanceStats,
    AcceptedRunPlanner,
    DraftPlan,
    FixedPlanner,
    RoundCostModel,
    plan_drafts,
)

CAUTION = 5.0  # a round trip counts for more than it was measured to take


def costs(overhead_s: float, step_s: float, row_s: float) -> RoundCostModel:
    """Costs that were learned from rounds of these."""
    learned = RoundCostModel()
    for steps, rows in itertools.product([1, 2, 5], [4, 9, 30]):
        compute_s = steps * step_s + rows * row_s
        learned.observe(round_s=overhead_s + compute_s, compute_s=compute_s, steps=steps, rows=rows)
    return learned


@pytest.mark.parametrize(("overhead_s", "step_s", "row_s"), [(0.1, 0.02, 0.004), (0.0, 0.05, 0.0), (1.0, 0.0, 0.01)])
def test_costs_are_learned(overhead_s: float, step_s: float, row_s: float) -> None:
    learned = costs(overhead_s, step_s, row_s)
    assert learned.overhead_s == pytest.approx(overhead_s, abs=1e-9)
    ours = learned.step_and_row()
    assert ours[0] == pytest.approx(step_s, abs=1e-2)
    assert ours[1] == pytest.approx(row_s, abs=5e-4)


def test_costs_are_never_negative() -> None:
    learned = RoundCostModel()
    for steps, rows, compute_s in [(1, 30, 0.1), (5, 30, 0.05), (1, 5, 0.2), (9, 60, 0.01)]:
        learned.observe(round_s=compute_s, compute_s=compute_s, steps=steps, rows=rows)
    assert min(learned.step_and_row()) >= 0


some = st.lists(st.floats(0.01, 0.99), max_size=3)
chances = st.lists(some, min_size=1, max_size=3)
seconds = st.sampled_from([0.0, 0.001, 0.02, 0.3])


@given(
    chances, st.lists(st.lists(st.floats(0.01, 0.99), max_size=3), min_size=3, max_size=3), seconds, seconds, seconds
)
def test_the_plan_expects_the_most_tokens_per_second(
    chances: list[list[float]], offers: list[list[float]], overhead_s: float, step_s: float, row_s: float
) -> None:
    known = costs(overhead_s + 1e-3, step_s, row_s)
    learned_step_s, learned_row_s = known.step_and_row()
    offers = offers[: len(chances)]

    def rate(drafts: Sequence[DraftPlan]) -> float:
        expected = sum(
            sum(math.prod(own[: j + 1]) for j in range(d.look_ahead))
            + sum(math.prod(offered[: j + 1]) for j in range(d.client_drafts))
            for own, offered, d in zip(chances, offers, drafts, strict=True)
        )
        rows = len(chances) + sum(d.look_ahead + d.client_drafts for d in drafts)
        mixed = len({d.client_drafts > 0 for d in drafts}) > 1
        steps = 1 + max(d.look_ahead for d in drafts) + mixed
        overhead_s = CAUTION * (known.overhead_s or 0)
        return (len(chances) + expected) / (overhead_s + steps * learned_step_s + rows * learned_row_s)

    options = itertools.product(
        *(
            [DraftPlan(look_ahead=k) for k in range(len(own) + 1)]
            + [DraftPlan(client_drafts=m + 1) for m in range(len(offered))]
            for own, offered in zip(chances, offers, strict=True)
        )
    )
    assert rate(plan_drafts(chances, offers, known)) == pytest.approx(max(map(rate, options)), rel=1e-6)


def test_a_slow_network_wants_more_drafts_and_costly_rows_fewer() -> None:
    chances, none = [[0.7] * 16] * 8, [list[float]()] * 8
    near, far = (
        plan_drafts(chances, none, costs(0.001, 0.02, 0.01)),
        plan_drafts(chances, none, costs(0.3, 0.02, 0.002)),
    )
    assert max(d.look_ahead for d in near) < min(d.look_ahead for d in far)


def test_the_accepted_run_is_drafted_on_the_side_where_it_is_longer() -> None:
    none = list[float]()
    server = [[0.75] * 16, [0.2] * 16, [0.5] * 16, none]
    plans = AcceptedRunPlanner().plan(server, [none, none, [0.9, 0.9], none])
    assert plans == [DraftPlan(look_ahead=3), DraftPlan(), DraftPlan(client_drafts=2), DraftPlan()]


def test_a_fixed_number_is_drafted_unless_the_clients_first_draft_is_likelier() -> None:
    none = list[float]()
    plans = FixedPlanner(4).plan([[0.5] * 4, [0.5] * 2, [0.5] * 4, none], [none, [0.4], [0.6, 0.1], none])
    assert plans == [DraftPlan(look_ahead=4), DraftPlan(look_ahead=2), DraftPlan(client_drafts=2), DraftPlan()]


def test_acceptance_starts_from_the_prior_and_follows_what_is_seen() -> None:
    acceptance = AcceptanceStats()
    assert acceptance.rate(0.0) == 1.0
    assert acceptance.rate(0.9) == pytest.approx(0.595)
    for _ in range(1000):
        acceptance.observe(0.9, accepted=False)
    assert acceptance.rate(0.9) < 0.01
    assert acceptance.rate(0.2) == pytest.approx(0.91)


def test_a_lookup_goes_on_as_its_texts_do() -> None:
    lookup = NgramDrafter([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [9, 2, 3, 8]])
    drafts = lookup.draft([], [1, 2, 3], 10)
    assert [draft.token for draft in drafts][:2] == [4, 5]
    assert lookup.draft([], [1, 2, 3], 1) == drafts[:1]
    assert lookup.draft([1, 2], [3], 10) == []  # a prompt is no target
    assert lookup.draft([], [4, 4, 4], 10) == []
    for _ in range(50):
        drafts[0].drafter.observe(drafts[0], accepted=False)
    assert lookup.draft([], [1, 2, 3], 10)[0].acceptance < 0.2 < drafts[0].acceptance


def test_copying_goes_on_as_the_same_text_did() -> None:
    copying = PromptLookupDrafter()
    prompt = [1, 2, 3, 4, 5, 9, 2, 8]
    assert [draft.token for draft in copying.draft(prompt, [7, 2, 3], 3)] == [4, 5, 9]  # two tokens match, not one
    assert [draft.token for draft in copying.draft(prompt, [2], 9)] == [8, 2]  # the last place, up to the end
    assert copying.draft(prompt, [7], 9) == []
    assert copying.draft(prompt, [], 9) == []  # what the prompt ends with is no match
    first, *rest = copying.draft(prompt, [2, 3], 4)
    assert all(later.acceptance >= first.acceptance for later in rest)  # if they agree so far, more tokens match
    for _ in range(50):
        copying.observe(first, accepted=False)
    assert copying.draft(prompt, [2, 3], 1)[0].acceptance < 0.1 < first.acceptance
