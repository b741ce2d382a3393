"""Comparison of what the owner grants with what a memory and its training will ask for, before the first request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from data_owner_client.data.label_tokens import LabelIds, longest_prefixes
from data_owner_client.memory.request_batches import ExampleSizes
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.head_recovery.fit import contexts_needed
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import Forbidden, InvalidData
from protocol.messages import ModelCard
from protocol.rate_limits import RateLimitStatus

CHOICE_TEXTS = 100
"""Validation texts on which `train` chooses the mixture by default (`--selection-texts`)."""


@dataclass
class Demand:
    """Demand on the owner of building a memory, training on it and using the adapter.

    Attributes:
        context_mode: contexts of the memory.
        examples: pairs that are still to be sent.
        tokens: tokens of the requests that send them.
        target_ids: ids of the different target tokens, whose rows of the LM head `train` requests.
        choice_tokens: tokens of the requests with which `train` chooses the mixture of a `classify` task.
    """

    context_mode: ContextMode
    examples: int = 0
    tokens: int = 0
    target_ids: set[int] = field(default_factory=set)
    choice_tokens: int = 0

    def add(self, sizes: ExampleSizes, target_ids: Set[int], *, stored: int = 0) -> None:
        """Add pairs. A call encodes a prompt and all its target but the last token, or drafts as many tokens.

        Args:
            sizes: token counts of the pairs.
            target_ids: ids of the different tokens in their targets.
            stored: number of the first pairs that the memory has already.
        """
        self.target_ids.update(target_ids)
        sequence_E = sizes.sequence[stored:]
        self.examples += len(sequence_E)
        self.tokens += sum(sequence_E) - len(sequence_E)

    def add_choice(self, sizes: ExampleSizes, label_ids: LabelIds) -> None:
        """Add the choice of the mixture of a `classify` task, on the default number of validation texts.

        With private contexts, all labels are sent behind each text. Else only those are that matter: at least one
        sequence for each token of a label.

        Args:
            sizes: token counts of the validation pairs.
            label_ids: token ids of the labels.
        """
        self.target_ids.update(token for ids in label_ids for token in ids)
        prompts = [whole - target for whole, target in zip(sizes.sequence, sizes.target, strict=True)][:CHOICE_TEXTS]
        lengths = [len(prefix) for prefix in longest_prefixes(label_ids)]
        if self.context_mode != "private":
            lengths = list(range(max(map(len, label_ids))))
        self.choice_tokens += sum(prompt * len(lengths) + sum(lengths) for prompt in prompts)


@dataclass(frozen=True)
class Shortfall:
    """Something that the owner does not grant.

    Attributes:
        detail: what is needed, and what is granted.
        hint: what to ask the owner for.
        is_final: True if waiting does not help.
    """

    detail: str
    hint: str
    is_final: bool = False


def require_granted(plm: RemotePlm, demand: Demand, reporter: Reporter) -> None:
    """Say what the owner does not grant, and refuse what can never be done. Nothing is said once all is stored.

    Args:
        plm: gives card and quotas, without a further call.
        demand: what will be asked for.
        reporter: shows what only takes longer.

    Raises:
        Forbidden: a call that is needed, or its quota, is not granted.
    """
    if not demand.examples:
        return
    shortfalls = list(shortfalls_of(plm.card, plm.rate_limits, demand, cached=cached_distributions(plm)))
    final = [each for each in shortfalls if each.is_final]
    if final:
        raise Forbidden(
            " ".join(each.detail for each in final) + " Nothing was sent.", hint=" ".join(each.hint for each in final)
        )
    for each in shortfalls:
        reporter.say(f"{each.detail} {each.hint}")


def cached_distributions(plm: RemotePlm) -> int:
    """Full distributions in the cache, from which `train` may recover rows of the LM head."""
    if plm.card.head_policy != "none":
        return 0
    try:
        return len(plm.cached_distributions().keys())
    except InvalidData:  # no cache
        return 0


def shortfalls_of(
    card: ModelCard, rate_limits: Sequence[RateLimitStatus], demand: Demand, *, cached: int = 0
) -> Iterator[Shortfall]:
    """Yield what the owner does not grant.

    Args:
        card: the server's model card.
        rate_limits: remaining quotas.
        demand: what will be asked for.
        cached: full distributions in the cache.
    """
    quotas = {status.name: status for status in rate_limits}
    yield from _of_scopes(card, demand.context_mode)
    if card.head_policy == "none":
        if (quota := quotas.get("full-distributions")) is not None:
            yield from _of_distributions(quota, contexts_needed(card), cached)
    elif (quota := quotas.get("head-rows")) is not None:
        yield from _of_head_rows(quota, len(demand.target_ids))
    tokens = tokens_needed(card, demand, cached)
    for name, unit, trivial in (("day", "days", 1), ("minute", "minutes", 10)):
        if (quota := quotas.get(name)) is not None:
            yield from _of_tokens(quota, tokens, unit, trivial)


def tokens_needed(card: ModelCard, demand: Demand, cached: int) -> int:
    """Tokens of the requests that build a memory, recover the LM head and score held-out labels.

    Texts that `train` decodes come on top.

    Args:
        card: the server's model card.
        demand: what will be asked for.
        cached: full distributions in the cache.
    """
    return demand.tokens + demand.choice_tokens + _recovery_tokens(card, demand, cached)


def needed_scopes(card: ModelCard, context_mode: ContextMode) -> dict[str, str]:
    """Scopes that building, training and translating need, each with the first command that fails without it."""
    build = "decode" if context_mode == "private" else "encode"
    scopes = {build: "build-memory"}
    if card.head_policy == "none":
        scopes |= {"distribution": "train"} | ({} if build == "decode" else {"decode": "train"})
    else:
        scopes |= {"head": "train"}
    return scopes | ({} if "decode" in scopes else {"decode": "translate"})


def _of_scopes(card: ModelCard, context_mode: ContextMode) -> Iterator[Shortfall]:
    if not card.scopes:  # no keys, or a server that does not say
        return
    for scope, verb in needed_scopes(card, context_mode).items():
        if scope not in card.scopes:
            yield Shortfall(
                f"Your key does not allow {scope}, which {verb} needs; it allows {', '.join(card.scopes)}.",
                f"Ask the owner for the scope {scope}.",
                is_final=verb != "translate",  # without training a memory is useless
            )


def _of_head_rows(quota: RateLimitStatus, needed: int) -> Iterator[Shortfall]:
    if needed > quota.quota:
        yield Shortfall(
            f"The targets have {needed:,} different tokens, and you may have {quota.quota:,} rows of the LM head.",
            f"Ask the owner for {needed:,} head rows, or build from fewer pairs.",
            is_final=True,
        )
    elif needed > quota.left:
        yield Shortfall(
            f"The targets have {needed:,} different tokens, and {quota.left:,} of {quota.quota:,} rows of the LM head "
            "are left. Rows that you had before cost nothing.",
            f"If `train` is refused, ask the owner for up to {needed - quota.left:,} more.",
        )


def _of_distributions(quota: RateLimitStatus, needed: int, cached: int) -> Iterator[Shortfall]:
    missing = max(0, needed - cached)
    if missing and not quota.quota:
        yield Shortfall(
            "The owner gives neither rows of the LM head nor full distributions to recover them from.",
            f"Ask the owner for {needed:,} full distributions.",
            is_final=True,
        )
    elif missing > quota.left:
        yield Shortfall(
            f"`train` needs {missing:,} more full distributions for exact rows of the LM head, and {quota.left:,} of "
            f"{quota.quota:,} are left.",
            f"Ask the owner for {missing - quota.left:,} more, or estimate: train --head-contexts "
            f"{cached + quota.left}.",
        )


def _recovery_tokens(card: ModelCard, demand: Demand, cached: int) -> int:
    """Tokens of the calls from which `train` recovers the LM head, if the owner gives no rows of it."""
    if card.head_policy != "none" or not demand.examples:
        return 0
    # Each context is sent twice: for its representation and for its distribution.
    return 2 * max(0, contexts_needed(card) - cached) * (demand.tokens // demand.examples)


def _of_tokens(quota: RateLimitStatus, tokens: int, unit: str, trivial: int) -> Iterator[Shortfall]:
    if tokens <= quota.left:
        return
    if not quota.quota:
        yield Shortfall(
            f"You may use no tokens in a {quota.name}, and {tokens:,} are needed.",
            f"Ask the owner for tokens in a {quota.name}.",
            is_final=True,
        )
        return
    windows = math.ceil(max(0, tokens - quota.left) / quota.quota)
    if windows < trivial:
        return
    yield Shortfall(
        f"This takes {tokens:,} tokens; you may use {quota.quota:,} in a {quota.name}, and {quota.left:,} are left: "
        f"about {windows:,} more {unit}.",
        f"Ask the owner for more tokens in a {quota.name}, or run the same command again when it was refused.",
    )
