"""BLEU and chrF, computed by sacrebleu."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.scoring.scripts import SPACED, UNSPACED, script_of
from data_owner_client.scoring.settings import DEFAULT_SCORING, BleuTokenizer, ScoringSettings
from protocol.errors import InvalidData

log = logging.getLogger(__name__)

_TOKENIZERS: dict[str, BleuTokenizer] = {
    SPACED: "13a",
    "Chinese": "zh",
    "Japanese": "ja-mecab",
    "Korean": "ko-mecab",
    UNSPACED: "char",
}
_EXTRAS: dict[BleuTokenizer, str] = {"ja-mecab": "ja", "ko-mecab": "ko"}
# Japanese is half kana. A Chinese text may quote some.
_LEAST_KANA = 0.1


class TextScores(BaseModel):
    """Corpus scores of sacrebleu.

    Attributes:
        bleu: corpus BLEU, 0 to 100.
        chrf: corpus chrF, 0 to 100.
        bleu_signature: sacrebleu's signature of the BLEU settings; scores compare only under equal signatures.
        chrf_signature: sacrebleu's signature of the chrF settings.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def text_scores(
    hypotheses: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer | None = None
) -> TextScores:
    """Corpus BLEU and chrF of hypotheses, with one reference each.

    Args:
        hypotheses: texts to score.
        references: a reference for each of them.
        tokenizer: tokenizer of BLEU; None for the choice of `bleu_tokenizer`.
    """
    import sacrebleu  # slow to import

    bleu, chrf = sacrebleu.BLEU(tokenize=tokenizer or bleu_tokenizer(references)), sacrebleu.CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)])
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)])
    return TextScores(
        bleu=bleu_score.score,
        chrf=chrf_score.score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )


def bleu_tokenizer(references: Iterable[str], settings: ScoringSettings = DEFAULT_SCORING) -> BleuTokenizer:
    """The tokenizer of BLEU: that of the settings, or else by the script of the references.

    Chinese is split by `zh`, Japanese by `ja-mecab` and Korean by `ko-mecab`. Thai, Lao, Khmer, Burmese and Tibetan,
    which have no spaces between words, are split by `char`, and all others by `13a`. Where MeCab is not installed,
    `char` takes its place, with a warning.

    Raises:
        InvalidData: the package of the tokenizer that the settings name is not installed.
    """
    if settings.bleu_tokenize is not None:
        if not _installed(settings.bleu_tokenize):
            raise InvalidData(
                f"The tokenizer {settings.bleu_tokenize} is not installed.",
                hint=_how_to_install(settings.bleu_tokenize),
            )
        return settings.bleu_tokenize
    writing = _writing(references)
    tokenizer = _TOKENIZERS[writing]
    if _installed(tokenizer):
        return tokenizer
    log.warning(
        "The references are %s. BLEU counts characters (char), as %s is not installed. %s",
        *(writing, tokenizer, _how_to_install(tokenizer)),
    )
    return "char"


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
    """Sentence-level chrF of each hypothesis, float64, 0 to 100."""
    import sacrebleu  # slow to import

    chrf, pairs = sacrebleu.CHRF(), zip(hypotheses, references, strict=True)
    return torch.tensor([chrf.sentence_score(text, [reference]).score for text, reference in pairs]).double()


def _writing(texts: Iterable[str]) -> str:
    """The key in `_TOKENIZERS` of most words; a character counts as a word where words are not separated."""
    words = Counter[str]()
    for text in texts:
        for script, run in groupby(text, script_of):
            words[script] += 1 if script == SPACED else len([*run])
    han, kana = words["Han"], words["kana"]
    chinese_or_japanese = "Japanese" if kana > _LEAST_KANA * (han + kana) else "Chinese"
    counts = {
        SPACED: words[SPACED],
        chinese_or_japanese: han + kana,
        "Korean": words["Hangul"],
        UNSPACED: words[UNSPACED],
    }
    return max(counts, key=lambda writing: counts[writing])


def _installed(tokenizer: BleuTokenizer) -> bool:
    import sacrebleu  # slow to import

    try:
        sacrebleu.BLEU(tokenize=tokenizer)
    except RuntimeError:
        return False
    return True


def _how_to_install(tokenizer: BleuTokenizer) -> str:
    return f"Run: pip install 'sacrebleu[{_EXTRAS[tokenizer]}]'"
