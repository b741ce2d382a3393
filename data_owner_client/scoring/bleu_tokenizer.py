"""The tokenizer of BLEU that suits a script."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

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
