"""Scores of structured answers: validity, exact match, F1 of fields and of values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.data.answer_schema import Schema, answer_schema
from data_owner_client.scoring.bootstrap import Statistics, StatisticsScorer, f1, mean, micro_f1
from data_owner_client.scoring.json_fields import Leaf, ParsedAnswer, parse_answer
from data_owner_client.scoring.scorer import Metric, References
from protocol.errors import InvalidData


class FieldScores(BaseModel):
    """Scores of one field.

    Attributes:
        field: path of the field, such as `slots.name`; items of an array `names` are `names[]`.
        count: number of texts whose reference has the field.
        accuracy: share of these texts whose answer has the same values there, 0 to 100.
        f1: F1 of its values over all texts, 0 to 100; a field of the answer alone lowers it.
    """

    field: str
    count: int
    accuracy: float
    f1: float


class ExtractionScorer(StatisticsScorer):
    """Validity, exact match, micro-F1 of fields (paths) and of values (paths with values).

    - `valid`: share of the answers in the form of their reference, JSON or slots, without a code fence around it, that
      obey the schema.
    - `exact`: share of the answers with the value of the reference, as JSON values: 1 is 1.0, keys and items of arrays
      are in any order, absent is not null.
    - `field_f1`: micro-F1 of the paths of leaves; items of one array share a path.
    - `value_f1`: micro-F1 of leaves, which are paths with values, as multisets. Texts are compared without differences
      of case, spaces and Unicode forms.

    An answer in a code fence is read for all but `valid`. An answer of no form has no fields. JSON Schema cannot say
    that order does not matter, so arrays are multisets whatever the schema.

    Args:
        references: right answers to each text; where there are several, the one nearest to the answer counts.
        schema: JSON schema of the answers; None for any.

    Raises:
        InvalidData: a reference is neither JSON nor slots.
    """

    metrics: Mapping[str, Metric] = MappingProxyType(
        {
            "exact": Metric("exact"),
            "valid": Metric("valid"),
            "field_f1": Metric("field F1"),
            "value_f1": Metric("value F1"),
        }
    )
    headline = "value_f1"
    signatures: Mapping[str, str] = MappingProxyType({})

    def __init__(self, references: Sequence[References], schema: Schema | None = None) -> None:
        self._references = [[parse_answer(text) for text in texts] for texts in references]
        self._schema = answer_schema(schema) if schema is not None else None
        for number, parsed in enumerate(self._references, 1):
            if any(reference.form is None for reference in parsed):
                raise InvalidData(
                    f"The reference of text {number} is neither JSON nor slots.",
                    hint="Correct it, or give the task another kind.",
                )

    def each(self, answers: Sequence[str]) -> Tensor:
        """F1 of the values of each answer [E], float64, 0 to 100."""
        counts_E_3 = [_value_counts(answer, right) for answer, right in self._parsed(answers)]
        return torch.tensor(f1(np.array(counts_E_3, np.float64)).tolist(), dtype=torch.float64)

    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        pairs = self._parsed(answers)
        return {
            "exact": mean([100.0 * (answer.identity == right.identity) for answer, right in pairs]),
            "valid": mean([100.0 * self._is_valid(answer, right) for answer, right in pairs]),
            "field_f1": micro_f1([_field_counts(answer, right) for answer, right in pairs]),
            "value_f1": micro_f1([_value_counts(answer, right) for answer, right in pairs]),
        }

    def table(self, answers: Sequence[str]) -> list[FieldScores]:
        """Scores of each field of the references, the most frequent first."""
        pairs = self._parsed(answers)
        frequency = Counter(path for _, right in pairs for path in right.paths)
        counts: dict[str, list[tuple[int, int, int]]] = {path: [] for path, _ in frequency.most_common()}
        for answer, right in pairs:
            of_answer, of_right = _by_path(answer), _by_path(right)
            for path in counts.keys() & (of_answer.keys() | of_right.keys()):
                counts[path].append(_counts(of_answer[path], of_right[path]))
        return [_field_scores(path, of_texts) for path, of_texts in counts.items()]

    def _parsed(self, answers: Sequence[str]) -> list[tuple[ParsedAnswer, ParsedAnswer]]:
        """Each answer, and the reference that is nearest to it."""
        pairs = [(parse_answer(text), rights) for text, rights in zip(answers, self._references, strict=False)]
        return [(answer, max(rights, key=lambda right: _likeness(answer, right))) for answer, rights in pairs]

    def _is_valid(self, answer: ParsedAnswer, right: ParsedAnswer) -> bool:
        if not answer.strict or answer.form != right.form:
            return False
        return self._schema is None or self._schema.violation(answer.value) is None


def _likeness(answer: ParsedAnswer, right: ParsedAnswer) -> tuple[bool, float]:
    return answer.identity == right.identity, float(f1(np.array(_value_counts(answer, right), np.float64)))


def _field_counts(answer: ParsedAnswer, right: ParsedAnswer) -> tuple[int, int, int]:
    """Fields that both have, those of the answer, and those of the reference."""
    return len(answer.paths & right.paths), len(answer.paths), len(right.paths)


def _value_counts(answer: ParsedAnswer, right: ParsedAnswer) -> tuple[int, int, int]:
    """Leaves that both have, those of the answer, and those of the reference."""
    return _counts(answer.leaves, right.leaves)


def _counts(answer: Counter[Leaf], right: Counter[Leaf]) -> tuple[int, int, int]:
    return (answer & right).total(), answer.total(), right.total()


def _field_scores(path: str, counts: Sequence[tuple[int, int, int]]) -> FieldScores:
    """Scores of a field, from the counts of its values in each text: shared, answered and right ones."""
    equal = [shared == answered == right for shared, answered, right in counts if right]
    f_score = float(f1(np.array(counts, np.float64).sum(0)))
    return FieldScores(field=path, count=len(equal), accuracy=100 * sum(equal) / len(equal), f1=f_score)


def _by_path(parsed: ParsedAnswer) -> defaultdict[str, Counter[Leaf]]:
    """The leaves at each path."""
    leaves: defaultdict[str, Counter[Leaf]] = defaultdict(Counter)
    for leaf, count in parsed.leaves.items():
        leaves[leaf[0]][leaf] = count
    return leaves
