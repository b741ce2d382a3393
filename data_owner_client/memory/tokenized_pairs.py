"""Pairs as token ids, as the PLM's owner sees them and as the adapter learns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from data_owner_client.data.pairs import Pair, text_of
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.memory.surrogate_target import SurrogateTarget
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import MarkedText, PlmTokenizer, Prompt
from protocol.errors import InvalidData


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids.

    Attributes:
        prompt: token ids of the whole prompt, as the owner sees it.
        target: token ids of the target, of which the last completes a stop.
        source_tokens: length of the bare source text in tokens.
        surrogate: the target as the owner sees it in a redacted memory; None in other memories.
    """

    prompt: list[int]
    target: list[int]
    source_tokens: int
    surrogate: SurrogateTarget | None = None

    @property
    def teacher_forced(self) -> list[int]:
        """Token ids of the target that teacher-forced contexts show."""
        return self.surrogate.token_ids if self.surrogate else self.target


def tokenize_pair(plm: RemotePlm, task: Task, pair: Pair, shown: Pair | None = None) -> TokenizedPair:
    """Tokenise the prompt and the target of a pair.

    Args:
        plm: the model whose tokenizer is used.
        task: template of the prompt.
        pair: source text and target.
        shown: the pair with surrogates, of a redacted memory (`Redactor.redact_pair`); None in other memories.

    Raises:
        InvalidData: the pair has no target, an answer would end before the target does, or it would not end behind it.
            Or the pair has surrogates, and its target is more than text, or another one than the task writes.
    """
    _require_texts(pair)
    tokenizer = plm.tokenizer
    prompt, target = task.prompt_and_target(pair, tokenizer)
    prompt_ids, target_ids = _token_ids(tokenizer, task, prompt, target, pair.origin)
    stops = _stop_matcher(tokenizer, task.stops(tokenizer, plm.card.eos_token_ids))
    if not stops.ends(target_ids):
        raise InvalidText(
            "a target that does not end with a stop of this model",
            hint="Give the task another `stop`.",
            origin=pair.origin,
        )
    if not stops.ids.isdisjoint(target_ids[:-1]):
        raise InvalidText(
            "a target that has a stop of this model before its end",
            hint="Leave such answers out, or give the task another `stop`.",
            origin=pair.origin,
        )
    source_tokens = tokenizer.count(text_of(pair.question))
    if shown is None:
        return TokenizedPair(prompt_ids, target_ids, source_tokens)
    if pair.reply is not None:
        raise InvalidText(
            "an answer that is more than text, which cannot be redacted",
            hint="Leave tool calls out, or build a private memory.",
            origin=pair.origin,
        )
    redacted = with_surrogates(target, task.answer(pair), shown)
    shown_prompt = task.prompt(shown.question, tokenizer)
    shown_prompt_ids, shown_ids = _token_ids(tokenizer, task, shown_prompt, redacted, pair.origin)
    surrogate = SurrogateTarget.align(shown_ids, target_ids, tokenizer)
    return TokenizedPair(shown_prompt_ids, target_ids, source_tokens, surrogate)


def with_surrogates(target: MarkedText, answer: str, shown: Pair) -> MarkedText:
    """The target as it follows its prompt, with surrogates in its answer.

    Args:
        target: the true target with its end, as the task writes it.
        answer: the true answer in it; a chat template may have removed the white space around it.
        shown: the pair with surrogates, whose target is as long as the answer.

    Raises:
        InvalidText: the target has no such answer, or the template's own text beside it has the same.
    """
    bare, redacted = answer.strip(), shown.target or ""
    at = target.text.find(bare)
    is_ambiguous = redacted != answer and target.text.find(bare, at + 1) >= 0
    if at < 0 or is_ambiguous or len(redacted) != len(answer):
        raise InvalidText(
            "a target that the chat template writes in another way, so that it cannot be redacted",
            hint='Use a task with `format = "plain"`, or build a private memory.',
            origin=shown.origin,
        )
    start = len(answer) - len(answer.lstrip())
    redacted = redacted[start : start + len(bare)]
    return MarkedText(target.text[:at] + redacted + target.text[at + len(bare) :], target.special_spans)


def _token_ids(
    tokenizer: PlmTokenizer, task: Task, prompt: Prompt, target: MarkedText, origin: Origin | None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its target.

    Raises:
        InvalidText: a token belongs to both.
    """
    prompt_ids = tokenizer.encode_prompt(prompt)
    target_ids = (tokenizer.joint_target if task.format == "chat" else tokenizer.encode_target)(
        prompt, prompt_ids, target
    )
    if target_ids is None:
        raise InvalidText(
            "a token of the whole conversation that spans the end of the prompt and the target",
            hint="Take away space and line breaks at the beginning of the target.",
            origin=origin,
        )
    return prompt_ids, target_ids


def _require_texts(pair: Pair) -> None:
    """Refuse a pair without texts. A tool's result may be empty, and a reply may be calls alone.

    Raises:
        InvalidText: a text is missing.
    """
    if pair.target is None and pair.reply is None:
        raise InvalidText("no target", hint="A memory is made of pairs.", origin=pair.origin)
    texts = [] if pair.conversation else [("source", pair.source)]
    texts += [] if pair.reply else [("target", pair.target or "")]
    for name, text in texts:
        if not text.strip():
            raise InvalidText(f"an empty {name}", hint="Every pair needs two texts.", origin=pair.origin)


@lru_cache(maxsize=16)
def _stop_matcher(tokenizer: PlmTokenizer, stops: Stops) -> StopMatcher:
    return StopMatcher(tokenizer, stops)


def tokenize_pairs(
    plm: RemotePlm, tasks: Sequence[Task], pairs: Sequence[Pair], shown: Sequence[Pair] | None = None, *, label: str
) -> list[TokenizedPair]:
    """Tokenise pairs, each with its task, and refuse those that are too long for the server.

    Args:
        plm: the model whose tokenizer is used.
        tasks: one task for each pair.
        pairs: source texts and targets.
        shown: the pairs with surrogates, of a redacted memory; None in other memories.
        label: kind of pair in error messages; the number of the pair follows it.

    Raises:
        InvalidData: pairs have no usable target (`tokenize_pair`), or are too long.
    """
    tokenized, problems = [], Problems()
    for number, (task, pair) in enumerate(zip(tasks, pairs, strict=True), 1):
        try:
            tokens = tokenize_pair(plm, task, pair, shown[number - 1] if shown else None)
            require_fits(plm, tokens)
            tokenized.append(tokens)
        except InvalidData as error:
            problems.add(pair.origin or Origin(label, number, in_file=False), error)
    problems.settle(len(pairs), skip=False)
    return tokenized


def require_fits(plm: RemotePlm, pair: TokenizedPair, *, drafted: bool = False) -> None:
    """Refuse a pair that exceeds the server's limits.

    Args:
        plm: the model whose limits apply.
        pair: the pair as token ids.
        drafted: whether the server must also draft the target's length in one call.

    Raises:
        InvalidData: the pair is too long.
    """
    limits = plm.card.limits
    rows = max(len(pair.target), len(pair.teacher_forced))
    if len(pair.prompt) + rows > limits.max_sequence_tokens or rows > limits.max_rows:
        raise InvalidText(
            f"more than {limits.max_sequence_tokens} tokens with its prompt, or {limits.max_rows} in its target",
            hint="Shorten the texts or use fewer examples in the task.",
        )
    if drafted and len(pair.target) - 1 > limits.max_look_ahead:
        raise InvalidText(
            f"more tokens in its target than the server drafts, {limits.max_look_ahead}", hint="Shorten the texts."
        )
