"""A report of what a redaction would replace, for the data owner's eyes."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable

from data_owner_client.data.checking.report import RedactionReport, Replacement
from data_owner_client.data.pairs import Pair, texts_of
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.redaction.rules import Redaction
from data_owner_client.plm.tokenizer import PlmTokenizer

_EXAMPLES_OF_A_KIND = 3


def report_redaction(
    redaction: Redaction, pairs: Iterable[Pair], tokenizer: PlmTokenizer | None = None
) -> RedactionReport:
    """Count the spans that surrogates would replace, and show some with surrogates of a random key.

    Args:
        redaction: the rules.
        pairs: pairs with targets.
        tokenizer: tokenizer of the PLM; None for surrogates that suit any.

    Raises:
        InvalidData: a finder gives something else than spans.
    """
    redactor = Redactor(redaction, secrets.token_bytes(32), tokenizer)
    spans, characters, total, texts_with_spans, left = Counter[str](), 0, 0, 0, 0
    examples: dict[str, dict[str, str]] = {}
    for pair in pairs:
        texts = [pair.target or "", *(texts_of(pair.question) if redaction.sources else ())]
        total += sum(map(len, texts))
        found = [(text[span.start : span.end], span.kind) for text in texts for span in redaction.spans(text)]
        texts_with_spans += bool(found)
        left += redaction.count_left(pair)
        for span, kind in found:
            spans[kind] += 1
            characters += len(span)
            some = examples.setdefault(kind, {})
            if len(some) < _EXAMPLES_OF_A_KIND:
                some[span] = redactor.surrogate(span)
    return RedactionReport(
        sources=redaction.sources,
        pairs=texts_with_spans,
        left_in_sources=left,
        spans=dict(spans.most_common()),
        share=characters / total if total else 0.0,
        examples=[
            Replacement(kind=kind, text=text, surrogate=surrogate)
            for kind in spans
            for text, surrogate in examples[kind].items()
        ],
    )
