"""Completions that echo their prompts with log-probabilities, as lm-evaluation-harness scores answers.

The harness counts from the front and drops the last entry, without a check. So there is one entry for each token that
was sent and one for the generated token, also where that is an end of text. Its greedy flag compares floats: the entry
of the most probable token is the token's own number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.decoding.answer_border import text_to_score
from data_owner_client.decoding.prompt_scores import PromptScorer, ScoredPosition, TextToScore
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.gateway.explanation import EXPLAINED_ALTERNATIVES, explain
from data_owner_client.gateway.openai.errors import api_error
from data_owner_client.gateway.openai.logprobs import LoggedToken, TextOffsets, completion_logprobs, logged_token
from data_owner_client.gateway.openai.requests import CompletionRequest, GenerationSettings
from data_owner_client.gateway.openai.responses import Choice, Usage
from data_owner_client.gateway.prompt_ids import missing_start, prompt_ids
from data_owner_client.gateway.special_texts import spelled_text
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.token_logprobs import HeadRowCache
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt with the scores of its tokens.

    Attributes:
        token_ids: ids of the prompt as it was sent, without a start of the sequence that the gateway put before it.
        text: text of the prompt.
        tokens: its tokens. The first has no log-probability, unless the gateway put a start before it.
        positions: scores of the tokens that have one, and of the token behind the prompt.
    """

    token_ids: Sequence[int]
    text: str
    tokens: list[LoggedToken]
    positions: list[ScoredPosition]

    def logprobs(self, following: Sequence[LoggedToken] = ()) -> dict[str, Any]:
        """Log-probabilities of the prompt's tokens and of those that follow, in the form of completions."""
        tokens = [*self.tokens, *following]
        # The first token of some tokenizers has a space that a text's beginning loses.
        written = "".join(token.text for token in self.tokens)
        start = len(self.text) - len(written) if self.text and written.endswith(self.text) else 0
        body = completion_logprobs(tokens, TextOffsets(start))
        return body | {"text_offset": [max(0, offset) for offset in body["text_offset"]]}


class EchoScorer:
    """Answers completions that echo their prompts with log-probabilities. Any thread may use it.

    Args:
        plm: the PLM, whose owner sees the prompts.
    """

    def __init__(self, plm: RemotePlm) -> None:
        self._plm = plm
        self._head_rows = HeadRowCache(plm)
        self._has_warned = False

    def answer(
        self, request: CompletionRequest, adapter: CandidateDistribution | None, interpolation: Interpolation
    ) -> tuple[list[Choice], Usage]:
        """The choices of a request that `is_scoring` accepts, and its tokens.

        Args:
            request: the request.
            adapter: the data owner's adapter; None for the PLM alone.
            interpolation: mixture of both.

        Raises:
            ApiError: a prompt cannot be scored.
            PemaError: a call to the PLM failed.
        """
        prompts = self.echoes(request, adapter, interpolation)
        generated = request.settings.max_tokens
        choices = [self._choice(index, prompt, request.settings) for index, prompt in enumerate(prompts)]
        return choices, Usage(sum(len(prompt.token_ids) for prompt in prompts), generated * len(prompts))

    def echoes(
        self, request: CompletionRequest, adapter: CandidateDistribution | None, interpolation: Interpolation
    ) -> list[EchoedPrompt]:
        """The scored prompts of a request, in their order.

        Raises:
            ApiError: a prompt cannot be scored.
            PemaError: a call to the PLM failed.
        """
        self._warn()
        settings, tokenizer = request.settings, self._plm.tokenizer
        prompts = [prompt_ids(self._plm, prompt) for prompt in request.prompts]
        starts = [missing_start(tokenizer, ids) for ids in prompts]
        try:
            texts = [
                _behind(text_to_score(tokenizer, ids, adapter, interpolation, settings.pema.prompt_tokens), start)
                for ids, start in zip(prompts, starts, strict=True)
            ]
        except InvalidData as error:
            raise api_error(error, "pema.prompt_tokens") from error
        count = settings.logprobs or 0
        scorer = PromptScorer(
            self._plm,
            self._head_rows,
            adapter=adapter,
            interpolation=interpolation,
            stop_ids=self._stop_ids(settings, adapter, interpolation),
            alternatives=EXPLAINED_ALTERNATIVES if settings.pema.explain else count,
        )
        scored = scorer.score(texts)
        return [
            self._echoed(prompt, ids, positions[max(0, len(start) - 1) :], count)
            for prompt, ids, start, positions in zip(request.prompts, prompts, starts, scored, strict=True)
        ]

    def _warn(self) -> None:
        """Say once that scored texts are shown to the owner."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning("Texts whose tokens are scored (echo with logprobs) are shown to the PLM's owner as a whole.")

    def _stop_ids(
        self, settings: GenerationSettings, adapter: CandidateDistribution | None, interpolation: Interpolation
    ) -> frozenset[int]:
        """Tokens that end an answer of the adapter's task, whose length reward applies to them."""
        if adapter is None or not interpolation.length_reward:
            return frozenset()
        stops = adapter.card.task.stops(self._plm.tokenizer, self._plm.card.eos_token_ids)
        return StopMatcher(self._plm.tokenizer, stops.with_texts(settings.stop)).ids

    def _echoed(
        self, prompt: str | Sequence[int], ids: Sequence[int], positions: list[ScoredPosition], count: int
    ) -> EchoedPrompt:
        tokenizer = self._plm.tokenizer
        first = len(ids) + 1 - len(positions)  # 0 where the gateway put a start before the prompt, else 1
        unscored = [logged_token(tokenizer, token, None) for token in ids[:first]]
        scored = [_logged(tokenizer, each, count) for each in positions[:-1]]
        text = prompt if isinstance(prompt, str) else spelled_text(ids, tokenizer)
        return EchoedPrompt(ids, text, [*unscored, *scored], positions)

    def _choice(self, index: int, prompt: EchoedPrompt, settings: GenerationSettings) -> Choice:
        """The prompt, and the most probable token behind it if one was asked for."""
        positions = prompt.positions if settings.max_tokens else prompt.positions[:-1]
        following, text, ended = list[LoggedToken](), prompt.text, False
        if settings.max_tokens:
            newest = prompt.positions[-1]
            following.append(_logged(self._plm.tokenizer, newest, settings.logprobs or 0))
            stops = Stops(settings.stop, frozenset(self._plm.card.eos_token_ids))
            matcher = StopMatcher(self._plm.tokenizer, stops)
            text, ended = text + matcher.text([newest.choice.token]), matcher.ends([newest.choice.token])
        pema = None
        if settings.pema.explain:
            pema = {"tokens": explain(self._plm.tokenizer, [_with_alternatives(each) for each in positions])}
        return Choice(index, text, "stop" if ended else "length", prompt.logprobs(following), pema)


def is_scoring(request: CompletionRequest) -> bool:
    """True for a request that `EchoScorer.answer` answers: an echo with log-probabilities and at most one token more.

    A longer or drawn answer is generated, behind `EchoScorer.echoes`.
    """
    settings = request.settings
    is_short = settings.max_tokens <= 1 and settings.sampling is None and settings.form is None
    return request.echo and settings.logprobs is not None and is_short and not settings.pema.prefix


def _behind(text: TextToScore, start: Sequence[int]) -> TextToScore:
    """The text behind further tokens, which belong to its prompt."""
    return replace(text, token_ids=[*start, *text.token_ids], border=text.border + len(start))


def _logged(tokenizer: PlmTokenizer, position: ScoredPosition, count: int) -> LoggedToken:
    """The token at a position, with the `count` most probable ones in decoding."""
    token = position.own or position.choice
    logged = logged_token(tokenizer, token.token, position.logprob, position.most_probable(count))
    return replace(logged, listed=position.ranked_logprob)


def _with_alternatives(position: ScoredPosition) -> TokenChoice:
    return replace(position.own or position.choice, alternatives=position.choice.alternatives)
