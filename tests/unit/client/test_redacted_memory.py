"""Redacted memories: true labels, contexts with surrogates, and builds that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_owner_client import Redaction, RedactionRules, TrainingSettings, build_memories, train
from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.redaction.key import KEY_FILE
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import ngram_drafter_for
from data_owner_client.memory import build
from data_owner_client.memory import request_batches as planning
from data_owner_client.memory.build import build_memory
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from harness.tiny_models import TinyModels, save_model
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import ConnectionFailed, InvalidData
from protocol.messages import DecodeRequest, EncodeRequest
from tests import support
from tests.unit.client.test_memory import Recorder, files

TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an", "target": "on 77"},))
PAIRS = [Pair(f"the {i} thin", f"die {i * 37} Tür{'en' * (i % 4)} theon") for i in range(11)]
RULES = RedactionRules(builtin=("numbers",), words=("theon", "Türen"))
KEY = b"k" * 32


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_EXAMPLES_PER_SHARD", 4)
    monkeypatch.setattr(planning, "EXAMPLES_PER_REQUEST", 3)


@pytest.fixture
def recorder(tiny_service: PlmService) -> Recorder:
    return Recorder(tiny_service)


@pytest.fixture
def plm(recorder: Recorder) -> RemotePlm:
    return RemotePlm(recorder, dtype="float32", cache=None)


def build_redacted(plm: RemotePlm, folder: Path, *, rules: RedactionRules = RULES, **options: Any) -> ExternalMemory:
    redactor = Redactor(Redaction.from_rules(rules), KEY, plm.tokenizer)
    return build_memory(plm, TASK, PAIRS, folder, context_mode="redacted", redactor=redactor, **options)


def build_both(plm: RemotePlm, folder: Path, *, rules: RedactionRules = RULES, **options: Any) -> Any:
    redaction = Redaction.from_rules(rules)
    return build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:5], redaction=redaction, **options)


def test_labels_are_true_and_contexts_have_surrogates(plm: RemotePlm, recorder: Recorder, tmp_path: Path) -> None:
    memory = build_redacted(plm, tmp_path, held_out=True)
    rows, shown = memory.load(), memory.shown_pairs()
    assert shown is not None
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, plm.card.eos_token_ids))
    targets = [part.tolist() for part in rows.target_N.split(rows.rows_E.tolist())]
    assert [stops.text(ids).strip() for ids in targets] == [pair.target for pair in PAIRS]
    task = memory.manifest.plan.task
    assert task.examples[0].target != TASK.examples[0].target

    sent = [ids for request in recorder.sent for ids in request.token_ids]
    # Calls in flight at the same time reach the server in any order.
    order = [pair.source for pair in PAIRS]
    sent.sort(key=lambda ids: order.index(plm.tokenizer.decode(ids).rpartition("In: ")[2].partition("\n")[0]))
    assert all(isinstance(request, EncodeRequest) for request in recorder.sent)
    cr = list(rows.cr_N_D.split(rows.rows_E.tolist()))
    assert rows.logsumexp_N is not None
    assert rows.reliable_N is not None
    reliable = [part.tolist() for part in rows.reliable_N.split(rows.rows_E.tolist())]
    differing = 0
    for number, (pair, shown_pair) in enumerate(zip(PAIRS, shown, strict=True)):
        assert (len(shown_pair.target or ""), shown_pair.source) == (len(pair.target or ""), pair.source)
        assert "theon" not in (shown_pair.target or "")
        prompt_text = task.prompt(pair.source, plm.tokenizer)
        prompt = plm.tokenizer.encode_prompt(prompt_text)
        assert plm.tokenizer.decode(sent[number]) == f"{prompt_text.text} {shown_pair.target}"
        # Of each true token: the longest context that was sent and is no longer than the true text before it.
        for i in range(len(targets[number])):
            before = plm.tokenizer.decode_continuation(targets[number][:i])
            k = max(
                k
                for k in range(len(sent[number]) - len(prompt) + 1)
                if len(plm.tokenizer.decode_continuation(sent[number][len(prompt) :][:k])) <= len(before)
                and "\ufffd" not in plm.tokenizer.decode_continuation(sent[number][len(prompt) :][:k])
            )
            if "\ufffd" in before:
                continue  # inside of a character
            context = sent[number][: len(prompt) + k]
            expected = plm.encode([context], [len(context) - 1]).cr_N_D[0]
            torch.testing.assert_close(cr[number][i], expected, rtol=1e-4, atol=1e-4)
            if reliable[number][i] and i:
                assert context[-1] == targets[number][i - 1]
            differing += not reliable[number][i]
    assert differing >= len(PAIRS)
    assert torch.equal(rows.aligned().cr_N_D, rows.cr_N_D)


def test_the_validation_memory_has_surrogates_of_its_own(plm: RemotePlm, tmp_path: Path) -> None:
    build_both(plm, tmp_path)
    train_memory, validation = (ExternalMemory(tmp_path / name) for name in ("train", "validation"))
    assert train_memory.manifest.plan.task == validation.manifest.plan.task  # with the same examples
    shown, held_out = train_memory.shown_pairs(), validation.shown_pairs()
    assert shown is not None
    assert held_out is not None
    targets = [[pair.target or "" for pair in part[:5]] for part in (shown, held_out)]
    for one, other in zip(*targets, strict=True):
        assert one[:4] == other[:4] == "die "
        assert one[-5:] != other[-5:]  # for theon
        assert "theon" not in one + other


def test_texts_without_spans_have_the_teacher_forced_rows(plm: RemotePlm, tmp_path: Path) -> None:
    rows = build_redacted(plm, tmp_path / "a", rules=RedactionRules(words=("nowhere",))).load()
    expected = build_memory(plm, TASK, PAIRS, tmp_path / "b", context_mode="teacher-forced", share_targets=True).load()
    assert torch.equal(rows.cr_N_D, expected.cr_N_D)
    assert torch.equal(rows.target_N, expected.target_N)
    assert rows.reliable_N is not None
    assert rows.reliable_N.all()


def test_one_training_takes_all_rows(plm: RemotePlm, tmp_path: Path) -> None:
    build_both(plm, tmp_path)
    settings = TrainingSettings(rank=4, epochs=1, batch_rows=16, minutes=0)
    _, report = train(plm, tmp_path, tmp_path / "adapter", settings=settings)
    assert [(trial.settings["form"], trial.settings["pairing"]) for trial in report.trials] == [("residual", "aligned")]
    settings = TrainingSettings(rank=4, epochs=1, batch_rows=16, minutes=0, pairing="reliable")
    adapter, _ = train(plm, tmp_path, tmp_path / "other", settings=settings)
    assert adapter.card.settings["pairing"] == "reliable"


@pytest.mark.parametrize("cut", range(5))
def test_an_interrupted_build_goes_on_and_ends_in_the_same_files(
    plm: RemotePlm, recorder: Recorder, tiny_service: PlmService, tmp_path: Path, cut: int
) -> None:
    build_both(plm, tmp_path / "undisturbed")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / KEY_FILE).write_bytes((tmp_path / "undisturbed" / KEY_FILE).read_bytes())
    recorder.sent.clear()
    recorder.fail_after = cut
    with pytest.raises(ConnectionFailed):
        build_both(plm, tmp_path / "cut")
    # Calls of the cut build may still be in flight, so the next one has a connection of its own.
    report = build_both(RemotePlm(Recorder(tiny_service), dtype="float32", cache=None), tmp_path / "cut")
    assert report.context_mode == "redacted"
    assert report.replaced["number"] == len(PAIRS) + 5
    for name in ("train", "validation"):
        assert files(tmp_path / "cut" / name) == files(tmp_path / "undisturbed" / name)


def test_other_rules_another_key_and_other_contexts_are_refused(plm: RemotePlm, tmp_path: Path) -> None:
    build_both(plm, tmp_path)
    with pytest.raises(InvalidData, match="another redaction_rules"):
        build_both(plm, tmp_path, rules=RedactionRules(builtin=("numbers",)))
    with pytest.raises(InvalidData, match="Redacted contexts need rules"):
        build_both(plm, tmp_path, context_mode="teacher-forced", share_targets=True)
    with pytest.raises(InvalidData, match="Redacted contexts need rules"):
        build_memories(plm, TASK, PAIRS, tmp_path, context_mode="redacted")
    key = (tmp_path / KEY_FILE).read_bytes()
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(InvalidData, match=r"redaction\.key is missing"):
        build_both(plm, tmp_path)
    (tmp_path / KEY_FILE).write_bytes(KEY)
    with pytest.raises(InvalidData, match="another task, shown_digest"):
        build_both(plm, tmp_path)
    (tmp_path / KEY_FILE).write_bytes(key)
    build_both(plm, tmp_path)
    with pytest.raises(InvalidData, match="Redacted contexts need rules"):
        build_both(plm, tmp_path, context_mode="private", overwrite=True)
    assert (tmp_path / KEY_FILE).read_bytes() == key
    build_both(plm, tmp_path, overwrite=True)
    assert (tmp_path / KEY_FILE).read_bytes() != key


def test_labels_tool_calls_and_drafts_are_refused(plm: RemotePlm, tmp_path: Path) -> None:
    redaction = Redaction.from_rules(RULES)
    labels = [Pair(str(i), label) for i, label in enumerate(["good", "bad"] * 4)]
    with pytest.raises(InvalidData, match="surrogates would hide nothing"):
        build_memories(plm, Task(name="c", kind="classify"), labels, tmp_path / "c", redaction=redaction)
    reply = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool_calls = [Pair(f"a {i}", reply=reply) for i in range(8)]
    with pytest.raises(InvalidData, match="more than text"):
        build_memories(plm, TASK, tool_calls, tmp_path / "t", redaction=redaction)
    build_both(plm, tmp_path / "m")
    with pytest.raises(InvalidData, match="never shown"):
        ngram_drafter_for(tmp_path / "m")


def test_json_with_surrogates_need_not_obey_its_schema(plm: RemotePlm, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"who": {"enum": ["theon", "her"]}, "n": {"type": "integer"}}}
    task = Task(name="e", kind="extract", answer_schema=schema)
    pairs = [Pair(f"in {i}", f'{{"n": {i}, "who": "theon"}}') for i in range(8)]
    redaction = Redaction.from_rules(RULES)
    build_memories(plm, task, pairs, tmp_path, validation=pairs[:2], redaction=redaction)
    memory = ExternalMemory(tmp_path / "train")
    shown = memory.shown_pairs()
    assert shown is not None
    assert all("theon" not in (pair.target or "") for pair in shown)
    tokens = tokenize_pair(plm, task, pairs[0], shown[0])
    # As the adapter learns it: with the keys in the schema's order.
    assert plm.tokenizer.decode_continuation(tokens.target).strip() == '{"who": "theon", "n": 0}'
    settings = TrainingSettings(rank=4, epochs=1, batch_rows=8, minutes=0, retrieved_examples=2)
    with pytest.raises(InvalidData, match="redacted JSON"):
        train(plm, tmp_path, tmp_path / "adapter", settings=settings)


def test_answers_of_a_chat_template_are_redacted_in_place(tiny_models: TinyModels, tmp_path: Path) -> None:
    plm = RemotePlm(InProcessConnection(support.make_service(tiny_models["llama"])), dtype="float32", cache=None)
    task = Task(name="c", kind="chat", stop="\n")
    pair = Pair("in", " theon 12 ")
    redactor = Redactor(Redaction.from_rules(RULES), KEY, plm.tokenizer)
    shown = redactor.redact_pairs(task, [pair], Reporter())[0]
    tokens = tokenize_pair(plm, task, pair, shown)
    assert "theon 12" in plm.tokenizer.decode_continuation(tokens.target)
    text = plm.tokenizer.decode_continuation(tokens.teacher_forced)
    assert (shown.target or "").strip() in text
    assert "theon" not in text
    assert "12" not in text


def test_no_span_of_a_conversation_is_sent(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% for call in message.tool_calls or [] %}{{ call.function.arguments }}"
        "{% endfor %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    recorder = Recorder(support.make_service(save_model("llama", tmp_path / "model", chat_template=template)))
    plm = RemotePlm(recorder, dtype="float32", cache=None)
    call = {"type": "function", "function": {"name": "f", "arguments": {"theon": "an", "type": "theon"}}}
    pairs = [
        Pair(
            f"the {i}",
            f" theon {str(i) * 9}",  # so long that no surrogate is another one of them
            conversation=Conversation(
                (
                    {"role": "user", "content": "the theon"},
                    {"role": "assistant", "content": f"die Türen {i} theon", "tool_calls": [call]},
                    {"role": "user", "content": f"the {i}"},
                )
            ),
        )
        for i in range(8)
    ]
    task = Task(name="c", kind="chat", stop="\n")
    redaction = Redaction.from_rules(RULES.model_copy(update={"sources": True}))
    for _ in range(2):  # the second time nothing is left to do
        build_memories(plm, task, pairs, tmp_path / "m", validation=pairs[:3], redaction=redaction)
    texts = [plm.tokenizer.decode(ids) for request in recorder.sent for ids in request.token_ids]
    assert len(texts) == len(pairs) + 3
    assert all("die " in text and "': '" in text for text in texts)
    assert not any(secret in text for text in texts for secret in ("theon", "Türen", "7" * 9))
    settings = TrainingSettings(rank=4, epochs=1, batch_rows=16, minutes=30, retrieved_examples=0, search=False)
    train(plm, tmp_path / "m", tmp_path / "adapter", settings=settings)
    requests = [request for request in recorder.sent if isinstance(request, (EncodeRequest, DecodeRequest))]
    sent = [plm.tokenizer.decode(ids) for request in requests for ids in request.token_ids]
    assert len(sent) > len(texts)
    assert not any("theon" in text for text in sent)
