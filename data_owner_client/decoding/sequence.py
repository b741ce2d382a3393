"""One growing text: its tokens so far, and the rules by which it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.data.repetition import RepetitionDetector
from data_owner_client.data.stops import StopMatcher
from data_owner_client.decoding.held.grammar import AnswerState
from data_owner_client.decoding.sampling import Noise
from data_owner_client.decoding.stats import CallCounts
from data_owner_client.decoding.token_choice import DecodePosition, TokenChoice
from data_owner_client.decoding.token_selection import TokenSelector
from protocol.errors import InvalidData


class PrefixEndsAnswer(InvalidData):
    """An answer would end within the tokens with which it is to begin."""


class End(StrEnum):
    """Reasons for the end of a text."""

    STOP = "stop"
    """A stop text or a stop token."""
    MAX_TOKENS = "max-new-tokens"
    """The longest answer that the settings or the server allow."""
    LENGTH_BOUND = "length-bound"
    """The longest answer that the adapter's memory makes plausible for its source."""
    REPETITION = "repetition"
    """The text repeated itself, and ends where that began."""


@dataclass(frozen=True)
class EndRules:
    """Rules by which all texts of a generation end, each a function of the tokens alone.

    Attributes:
        stops: finds the stops.
        repetition_limit: repeated tokens (`data.repetition`) at which a text ends; None for any number.
    """

    stops: StopMatcher
    repetition_limit: int | None = None


OnChoices = Callable[[list[TokenChoice]], None]
"""Called with the tokens of a text that have become final since the last call."""


@dataclass
class SequenceState:
    """One growing text.

    Attributes:
        selector: selects its tokens.
        prompt: token ids behind which the PLM's distribution is taken.
        lambdas: λ_t of every token that it may have.
        plm_only_from: position from which λ is 0 to the end.
        rules: rules by which it ends.
        end_at_full_length: reason for its end when it has all its tokens.
        adapter_prompt: token ids behind which the adapter's representations are taken; None for `prompt`.
        noise: noise of its draws; None to take the most probable tokens.
        answer: state of the grammar that holds it; None for a free text.
        alternatives: number of alternatives to record at each position; 0 for none.
        on_choices: called when tokens have become final; None for no call.
        choices: its tokens so far, with their scores.
        expected_accepts: expected number of positions so far at which mixture and PLM choose the same token.
        accepts: number of positions so far at which mixture and PLM chose the same token.
        calls: the calls that it took part in.
        end: reason for its end; None while it grows.
    """

    selector: TokenSelector
    prompt: list[int]
    lambdas: list[float]
    plm_only_from: int
    rules: EndRules
    end_at_full_length: End = End.MAX_TOKENS
    adapter_prompt: list[int] | None = None
    noise: Noise | None = None
    answer: AnswerState | None = None
    alternatives: int = 0
    on_choices: OnChoices | None = None
    choices: list[TokenChoice] = field(default_factory=list)
    expected_accepts: float = 0.0
    accepts: int = 0
    calls: CallCounts = field(default_factory=CallCounts)
    end: End | None = None
    _repetition: RepetitionDetector = field(default_factory=RepetitionDetector)
    _reported: int = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.choices)

    @property
    def generated(self) -> list[int]:
        """Ids of the tokens so far."""
        return [choice.token for choice in self.choices]

    @property
    def is_plm_only(self) -> bool:
        """True if λ is 0 from here to the end."""
        return self.length >= self.plm_only_from

    @property
    def context(self) -> list[int]:
        """Token ids of the prompt and the tokens so far."""
        return self.prompt + self.generated

    def positions(self, drafts: Sequence[int]) -> list[DecodePosition]:
        """The positions of the next token and of those behind each draft, if the drafts are accepted."""
        recent = [choice.token for choice in self.choices[-RECENT_TOKENS:]]
        # Only draws and held answers look at the whole context.
        context = self.context if self.noise or self.answer else None
        allowed = [None] * (len(drafts) + 1) if self.answer is None else self.answer.allowed_along(drafts)
        return [
            DecodePosition(
                self.lambdas[self.length + step],
                self.length + step,
                self.noise,
                [*recent, *drafts[:step]],
                () if context is None else [*context, *drafts[:step]],
                allowed_V,
                self.alternatives,
            )
            for step, allowed_V in enumerate(allowed)
        ]

    @property
    def max_new_drafts(self) -> int:
        """Tokens that may still be drafted before the last one; negative at full length."""
        return len(self.lambdas) - self.length - 1

    def begin_with(self, prefix: Sequence[int]) -> None:
        """Let the text begin with these tokens, which nobody chose.

        Raises:
            PrefixEndsAnswer: the text would end within them.
        """
        for token in prefix:
            if self.end is not None:
                break
            self.append(TokenChoice(token, self.lambdas[self.length], 0.0, None, token, None))
        if self.end is not None:
            raise PrefixEndsAnswer("The prefix ends the answer.", hint="Give a shorter one, or more tokens.")
        self._reported = self.length

    def fork(self) -> SequenceState:
        """A copy that grows on its own. Both count their calls together."""
        return replace(self, choices=[*self.choices], _repetition=self._repetition.copy())

    def append(self, choice: TokenChoice) -> None:
        """Append a token, and end the text if a rule says so. A repetition is removed up to its first occurrence."""
        self.choices.append(choice)
        if self.rules.stops.ends(self.generated):
            self.end = End.STOP
            return
        if self.rules.repetition_limit is not None:
            repeated = self._repetition.append(choice.token)
            if repeated >= self.rules.repetition_limit:
                del self.choices[-repeated:]
                self.end = End.REPETITION
                return
        if self.max_new_drafts < 0:
            self.end = self.end_at_full_length
        elif self.answer is not None:
            self.answer.append(choice.token)

    def report(self) -> None:
        """Call `on_choices` with the tokens that have become final since the last report.

        Tokens that repeat earlier ones are not final before the repetition breaks off, as they may be removed.
        """
        final = self.length if self.end else self.length - self._repetition.longest_run
        if self.on_choices is not None and final > self._reported:
            self.on_choices(self.choices[self._reported : final])
        self._reported = final
