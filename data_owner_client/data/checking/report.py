"""The report of `pema-client data check`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, computed_field

from data_owner_client.data.reading.problems import ProblemKind
from data_owner_client.runtime.path_text import PathText


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as `1 pair` and `2 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Lengths(BaseModel):
    """Distribution of lengths.

    Attributes:
        median: half of the texts are at most as long.
        most: 95 % of the texts are at most as long.
        longest: length of the longest text.
    """

    median: int
    most: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths | None:
        """The distribution of some lengths; None if there are none."""
        import numpy as np

        if not len(lengths):
            return None
        median, most, longest = np.percentile(lengths, (50, 95, 100), method="inverted_cdf")
        return cls(median=int(median), most=int(most), longest=int(longest))


class Repeated(BaseModel):
    """Pairs that occur again.

    Attributes:
        count: number of such pairs.
        lines: lines of the first ones.
    """

    count: int = 0
    lines: list[int] = []


class LabelCounts(BaseModel):
    """Labels of a part.

    Attributes:
        labels: number of different labels.
        largest: pairs of each of the most frequent labels.
        single: labels that occur once, the first ones.
        singles: number of labels that occur once.
    """

    labels: int
    largest: dict[str, int]
    single: list[str]
    singles: int


class PartReport(BaseModel):
    """One file of pairs.

    Attributes:
        name: name of the file.
        form: name of the form of its records.
        container: name of its container.
        records: number of its records.
        record_noun: noun for one of its records.
        pairs: number of pairs that were read from them.
        unlearned: answers that the file excludes from learning.
        late_answers: pairs whose prompts show earlier answers.
        duplicates: pairs that are there before, source and target alike.
        contradictions: pairs whose source is there before with another target.
        unit: unit of the lengths, `characters` or `tokens`.
        sources: lengths of the sources; in tokens, of the whole prompts.
        targets: lengths of the targets.
        labels: the labels, if the targets are labels.
    """

    name: PathText
    form: str
    container: str
    records: int
    record_noun: str
    pairs: int
    unlearned: int = 0
    late_answers: int = 0
    duplicates: Repeated = Repeated()
    contradictions: Repeated = Repeated()
    unit: str = "characters"
    sources: Lengths | None = None
    targets: Lengths | None = None
    labels: LabelCounts | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def recognised(self) -> str:
        """One line that says what the file is."""
        of_records = self.record_noun == "record"
        records = "" if of_records else f"{counted(self.records, self.record_noun)}, "
        left_out = f" ({self.unlearned:,} with weight 0 left out)" if self.unlearned else ""
        answers = counted(self.pairs, "pair" if of_records else "answer")
        parts = [f"{self.form} in {self.container}: {records}{answers}{left_out}"]
        parts += [counted(self.duplicates.count, "duplicate")] if self.duplicates.count else []
        if self.sources and self.targets:
            parts.append(f"longest {self.sources.longest:,} + {self.targets.longest:,} {self.unit}")
        return ", ".join(parts)


class Overlap(BaseModel):
    """Sources of one part that are in another, too.

    Attributes:
        first: name of the part with fewer pairs.
        second: name of the other part.
        count: pairs of the first whose source is in the second.
        lines: lines of the first ones.
    """

    first: PathText
    second: PathText
    count: int
    lines: list[int]


class Example(BaseModel):
    """A pair as the model gets it.

    Attributes:
        prompt: the prompt, with its special tokens; without a server, the source.
        target: texts of the target's tokens; without a server, the whole target alone.
    """

    prompt: str
    target: list[str]


class Cost(BaseModel):
    """Demand on the owner of building a memory and training on it.

    Attributes:
        context: contexts of the memory.
        examples: pairs that are sent.
        left_out: answers whose prompts would show earlier answers.
        tokens: tokens of the requests.
        share_of_day: share of the quota of a day; None without such a quota.
        money: price of the tokens; None without a price.
        target_tokens: different tokens in the targets, whose rows of the LM head are needed.
        shortfalls: lines about what the owner does not grant.
        refused: whether the owner would refuse the work for good.
    """

    context: str
    examples: int
    left_out: int
    tokens: int
    share_of_day: float | None
    money: float | None
    target_tokens: int
    shortfalls: list[str]
    refused: bool


class Replacement(BaseModel):
    """A span and its surrogate.

    Attributes:
        kind: kind of the span.
        text: the span.
        surrogate: a text of the same shape, drawn with a key that is not that of any memory.
    """

    kind: str
    text: str
    surrogate: str


class RedactionReport(BaseModel):
    """Counts and examples of what a redaction would replace.

    Attributes:
        sources: whether source texts are redacted, too.
        pairs: pairs in which something is replaced.
        left_in_sources: number of spans in sources that are not replaced, as the rules leave sources alone.
        spans: number of replaced spans by kind.
        share: share of the characters that are replaced, 0 to 1.
        examples: the first spans of each kind.
    """

    sources: bool
    pairs: int
    left_in_sources: int
    spans: dict[str, int]
    share: float
    examples: list[Replacement]


class DataReport(BaseModel):
    """Everything that a check found.

    Attributes:
        parts: the files.
        overlaps: sources that several files have.
        problems: texts that cannot be used.
        warnings: lines about what may be meant otherwise.
        skip_invalid: whether texts that cannot be used are to be left out.
        task: name of the task of prompts and targets; None without a server.
        examples: some pairs as the model gets them.
        cost: what the work asks of the owner; None without a server.
        redaction: what surrogates would replace; None without rules.
    """

    parts: list[PartReport]
    overlaps: list[Overlap]
    problems: list[ProblemKind]
    warnings: list[str]
    skip_invalid: bool = False
    task: str | None = None
    examples: list[Example] = []
    cost: Cost | None = None
    redaction: RedactionReport | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def usable(self) -> bool:
        """False if something must be mended before the work."""
        unusable = bool(self.problems) and not self.skip_invalid
        return not unusable and all(part.pairs for part in self.parts) and not (self.cost and self.cost.refused)
