"""Drafts of the client, and the acceptance rate of the server's."""

from __future__ import annotations

import pytest

from data_owner_client.decoding.client_drafts import NgramDrafter, PromptLookupDrafter
from data_owner_client.decoding.speculative import AcceptanceStats


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
