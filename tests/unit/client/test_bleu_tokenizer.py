"""BLEU's tokenizer by script, against sacrebleu itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import sacrebleu

from data_owner_client.evaluation.comparison.results import ComparisonRow, SystemResult, comparison_rows
from data_owner_client.scoring import bleu_tokenizer as module
from data_owner_client.scoring.bleu_tokenizer import bleu_tokenizer
from data_owner_client.scoring.rewrite import RewriteScorer
from data_owner_client.scoring.settings import BleuTokenizer, ScoringSettings
from protocol.errors import InvalidData
from tests.command_line import client, client_json

CHINESE = ["请打开卧室的灯。", "设备处于离线状态。", "连接到 Home Assistant 失败。"]
CHINESE_ANSWERS = ["打开卧室的灯。", "设备处于离线状态。", "连接到 Home Assistant 失败"]
JAPANESE = ["寝室のライトをつけてください。", "デバイスはオフラインです。", "Home Assistant に接続できません。"]
KOREAN = ["침실 전등을 켜 주세요.", "기기가 오프라인 상태입니다."]
UNSPACED = [["เปิดไฟห้องนอน", "อุปกรณ์ออฟไลน์"], ["ເປີດໄຟຫ້ອງນອນ"], ["បើកភ្លើងបន្ទប់គេង"], ["အိပ်ခန်းမီးဖွင့်ပါ"], ["བོད་ཡིག"]]
SPACED = [
    ["Schalte das Licht im Schlafzimmer ein.", "Das Gerät ist offline."],
    ["Włącz światło w sypialni."],
    ["Включи свет."],
    ["बत्ती जलाओ।"],
    ["شغل الضوء"],
    ["The word 你好 means hello in Chinese, and オン means on."],
    ["", "12:30 …", "🙂"],
    [],
]


@pytest.fixture
def without_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda tokenizer: "mecab" not in tokenizer)


@pytest.fixture
def with_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda tokenizer: True)


@pytest.mark.usefixtures("with_mecab")
@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (CHINESE, "zh"),
        (JAPANESE, "ja-mecab"),
        (["ﾗｲﾄ ｵﾝ", "コーヒーメーカー"], "ja-mecab"),
        (["日本の「の」是一个日文假名，意思相当于中文的“的”。"], "zh"),
        (KOREAN, "ko-mecab"),
        *((texts, "char") for texts in UNSPACED),
        *((texts, "13a") for texts in SPACED),
    ],
)
def test_the_script_of_the_references_decides(references: list[str], expected: BleuTokenizer) -> None:
    assert bleu_tokenizer(references) == expected
    assert bleu_tokenizer(references, ScoringSettings(bleu_tokenize="intl")) == "intl"


@pytest.mark.usefixtures("without_mecab")
@pytest.mark.parametrize(("references", "extra"), [(JAPANESE, "ja"), (KOREAN, "ko")])
def test_without_mecab_characters_count_and_that_is_said(
    references: list[str], extra: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "data_owner_client"):
        assert bleu_tokenizer(references) == "char"
    (record,) = caplog.records
    assert f"pip install 'sacrebleu[{extra}]'" in record.getMessage()
    with pytest.raises(InvalidData, match=rf"{extra}-mecab is not installed.*sacrebleu\[{extra}\]"):
        bleu_tokenizer(CHINESE, ScoringSettings(bleu_tokenize=f"{extra}-mecab"))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", ["13a", "intl", "zh", "char", "none"])
def test_scores_and_signatures_are_sacrebleus(tokenizer: BleuTokenizer) -> None:
    scorer = RewriteScorer([(text,) for text in CHINESE], ScoringSettings(bleu_tokenize=tokenizer))
    assert scorer.scores(CHINESE_ANSWERS) == {
        "bleu": sacrebleu.corpus_bleu(CHINESE_ANSWERS, [CHINESE], tokenize=tokenizer).score,
        "chrf": sacrebleu.corpus_chrf(CHINESE_ANSWERS, [CHINESE]).score,
    }
    assert f"|tok:{tokenizer}|" in scorer.signatures["bleu"]


def test_chinese_is_scored_by_its_own_tokenizer_unless_said(tmp_path: Path) -> None:
    for name, texts in (("sources", ["a", "b", "c"]), ("targets", CHINESE), ("hypotheses", CHINESE_ANSWERS)):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    files = [part for name in ("sources", "targets", "hypotheses") for part in (f"--{name}", tmp_path / name)]
    chosen = client_json(None, "evaluate", *files)
    assert chosen["scores"]["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(CHINESE_ANSWERS, [CHINESE], tokenize="zh").score
    )
    assert "tok:zh" in chosen["signatures"]["bleu"]
    said = client_json(None, "evaluate", *files, "--bleu-tokenize", "13a")
    assert said["scores"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(CHINESE_ANSWERS, [CHINESE]).score)
    assert said["scores"]["bleu"] < chosen["scores"]["bleu"]
    assert said["scores"]["chrf"] == chosen["scores"]["chrf"]
    shown = client(None, "evaluate", *files)
    assert chosen["signatures"]["bleu"] in shown.stdout
    assert client(None, "evaluate", *files, "--bleu-tokenize", "own").returncode == 2


def test_a_comparison_and_its_significance_use_the_same_tokenizer() -> None:
    references = [f"第{number}个设备在{room}，目前处于离线状态" for number in range(20) for room in ("卧室", "厨房")]
    near = [text.replace("目前", "现在") for text in references]
    far = ["设备", *("它在哪里呢" for _ in references[1:])]
    systems = [SystemResult(name=name, texts=texts) for name, texts in (("plm", far), ("best", near))]

    def rows(tokenizer: BleuTokenizer) -> list[ComparisonRow]:
        scorer = RewriteScorer([(text,) for text in references], ScoringSettings(bleu_tokenize=tokenizer))
        return comparison_rows(systems, len(references), scorer)

    plm, best = rows("zh")
    assert best.scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(near, [references], tokenize="zh").score)
    assert plm.scores["bleu"] < best.scores["bleu"]
    assert best.p_values["plm"]["bleu"] < 0.01
    # To 13a every text is one word, and all are wrong.
    assert [row.scores["bleu"] for row in rows("13a")] == [0.0, 0.0]
