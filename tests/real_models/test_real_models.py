"""The embedded models, behind a real server process, against transformers itself."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from data_owner_client import Pair, Task, TrainingSettings, build_memories, connect, load_task, train, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.stops import StopMatcher
from data_owner_client.decoding.decode_loop import GenerationConfig, GenerationRequest, generate
from data_owner_client.decoding.generation import generate as continue_texts
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from harness.processes import free_port
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.settings import ServerSettings
from protocol.errors import Unsupported
from tests import guard
from tests.basis import Basis
from tests.processes import parties as processes
from tests.reference import Reference, schedule

pytestmark = pytest.mark.timeout(600)

TEXTS = [
    "The capital of France is",
    "Schalte das Licht im Wohnzimmer",
    "Water boils at",
    "Er sagte, dass er morgen nicht kommen",
    "One, two, three,",
]
PAIRS = [
    Pair("Turn on the light", "Schalte das Licht ein"),
    Pair("The device is already configured", "Das Gerät ist bereits konfiguriert"),
    Pair("Enter your password", "Gib dein Passwort ein"),
    Pair("Failed to connect", "Verbindung fehlgeschlagen"),
    Pair("Invalid authentication", "Ungültige Authentifizierung"),
    Pair("Select the room", "Wähle den Raum aus"),
    Pair("Your account was deleted", "Dein Konto wurde gelöscht"),
    Pair("Check your connection", "Überprüfe deine Verbindung"),
    Pair("Turn off the alarm", "Schalte den Alarm aus"),
    Pair("Name of the sensor", "Name des Sensors"),
]


@dataclass(frozen=True)
class Real:
    """A served model, over both transports, and the same one in this process."""

    plm: RemotePlm
    over_grpc: RemotePlm
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    task: Task
    basis: Basis


# The one as on an owner's own machine, the other as on the internet, whatever becomes of the rest of the suite.
@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    name = request.param
    work = tmp_path_factory.mktemp("server")
    log = work / "log"
    grpc_port = free_port()
    with ExitStack() as stack:
        if name == "gemma-3-270m":
            stack.enter_context(guard.put_up(work))
        url = stack.enter_context(processes.server(log, "--model", name, grpc_port=grpc_port))
        plm, over_grpc = (
            stack.enter_context(connect(address, dtype="float32", **guard.credentials()))
            for address in (url, guard.url("grpc", grpc_port))
        )
        folder = resolve(name, ServerSettings(_env_file=None).cache_dir).folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        task = load_task("translate-en-de")
        if name == "smollm2-135m":  # an instruct model: the same task through its own chat template
            task = task.model_copy(update={"format": "chat", "stop": None})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        basis = basis_of(plm, model, tokenizer) if plm.card.rotated else Basis.own(plm.card.hidden_size)
        yield Real(plm, over_grpc, model, tokenizer, task, basis)


@torch.inference_mode()
def basis_of(plm: RemotePlm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Basis:
    """The secret one, from more positions than the model is wide."""
    sequences = [tokenizer(f"{number}. {a} {b}").input_ids for number, (a, b) in enumerate(permutations(TEXTS, 2))]
    sequences += [tokenizer(f"{pair.target}! {a} {pair.source}").input_ids for pair in PAIRS for a in TEXTS]
    true_N_D = torch.cat(
        [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0] for ids in sequences]
    )
    assert len(true_N_D) > plm.card.hidden_size
    return Basis.between(plm.encode(sequences, [0] * len(sequences)).cr_N_D, true_N_D)


def test_tokenizer_is_the_owners(real: Real) -> None:
    for text in [*TEXTS, "Zeile\nZeile", " äöü ß €", "emoji 🏠 {entity_name}"]:
        ids = real.plm.tokenizer.encode_prompt(Prompt(text))
        assert ids == real.tokenizer(text).input_ids
        assert real.plm.tokenizer.decode(ids) == real.tokenizer.decode(ids, skip_special_tokens=True)


@torch.inference_mode()
def test_encode_is_transformers_last_hidden_state(real: Real) -> None:
    sequences = [real.tokenizer(text).input_ids for text in TEXTS]
    starts = [0, 1, 0, 3, 2]
    answer = real.plm.encode(sequences, starts, with_logsumexp=True)
    assert answer.logsumexp_N is not None
    rows = answer.rows_B.tolist()
    for ids, start, cr_T_D, logsumexp_T in zip(
        sequences, starts, answer.cr_N_D.split(rows), answer.logsumexp_N.split(rows), strict=True
    ):
        out = real.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected_T_D = out.hidden_states[-1][0, start:]
        difference = (real.basis.true(cr_T_D) - expected_T_D).abs().max() / expected_T_D.abs().max()
        assert difference <= 1e-4
        torch.testing.assert_close(logsumexp_T, out.logits[0, start:].logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_decoding_without_weight_is_generate_token_for_token(real: Real) -> None:
    prompts = [real.plm.tokenizer.encode_prompt(real.task.prompt(p.source, real.plm.tokenizer)) for p in PAIRS[:4]]
    prompts += [real.tokenizer(text).input_ids for text in TEXTS]
    tokens = 24
    requests, settings = [GenerationRequest(prompt) for prompt in prompts], DecodingSettings(max_new_tokens=tokens)
    ours, usage = generate(real.plm, requests, GenerationConfig(settings=settings))
    assert usage.calls == 1
    eos = set(real.plm.card.eos_token_ids)
    for prompt, continuation in zip(prompts, ours, strict=True):
        generated = continuation.token_ids
        ids = torch.tensor([prompt])
        out = real.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        expected = out[0, len(prompt) :].tolist()
        # `generate` ends at the model's own end of text, which stops nothing here.
        assert generated[: len(expected)] == expected
        assert len(expected) == tokens or expected[-1] in eos


def test_four_beams_of_bare_texts_are_those_of_generate(real: Real) -> None:
    tokens = 16
    if real.plm.card.head_policy != "full":
        with pytest.raises(Unsupported, match="search beams with an adapter"):
            continue_texts(real.plm, TEXTS, beams=4)
        return
    ours = continue_texts(real.plm, TEXTS, beams=4, best=4, decoding=DecodingSettings(max_new_tokens=tokens))
    assert ours.stats.calls <= tokens
    for text, generated, texts in zip(TEXTS, ours.token_ids, ours.best, strict=True):
        encoded = real.tokenizer(text, return_tensors="pt")
        out = real.model.generate(
            **encoded, do_sample=False, num_beams=4, num_return_sequences=4, max_new_tokens=tokens
        )
        expected = out[:, encoded.input_ids.shape[1] :]
        assert real.tokenizer.batch_decode(expected, skip_special_tokens=True) == texts
        assert [token for token in expected[0].tolist() if token != real.tokenizer.pad_token_id] == generated


def test_bare_texts_end_at_a_stop_and_where_they_begin_to_repeat_themselves(real: Real) -> None:
    """Small models loop. Behind the cut, the model's own text has the same block at least twice more."""
    free, bounded = (
        continue_texts(real.plm, TEXTS, decoding=DecodingSettings(max_new_tokens=96, repetition_bound=bound))
        for bound in (False, True)
    )
    assert bounded.stats.repetition_ends > 0
    for ids, all_ids in zip(bounded.token_ids, free.token_ids, strict=True):
        assert ids == all_ids[: len(ids)]
        behind = all_ids[len(ids) :]
        assert not behind or any(
            behind[: 2 * period] == ids[-period:] * 2 for period in range(1, min(len(ids), len(behind) // 2) + 1)
        )
    stops = [text[8:16] for text in free.texts]  # in the middle of words
    expected = [text[: min(text.index(stop) for stop in stops if stop in text)] for text in free.texts]
    decoding = DecodingSettings(max_new_tokens=32)
    assert continue_texts(real.plm, TEXTS, stop=stops, decoding=decoding).texts == expected


def test_the_whole_of_pema_is_the_slow_reference(real: Real, tmp_path: Path) -> None:
    """Memory, adapter and decoding over HTTP against full logits in float64, one position at a time."""
    build_memories(
        real.plm,
        real.task,
        PAIRS[:8],
        tmp_path,
        validation=PAIRS[8:],
        context_mode="teacher-forced",
        share_targets=True,
    )
    settings = TrainingSettings(
        epochs=3, batch_rows=16, rank=64, ema_decay=0.0, retrieved_examples=0, selection_texts=0, minutes=0
    )
    adapter, _ = train(real.plm, tmp_path, tmp_path / "adapter", settings=settings)
    tokenizer = real.plm.tokenizer
    reference = Reference(real.model)
    try:
        pair = tokenize_pair(real.plm, real.task, PAIRS[0])
        f_D, _ = reference.teacher_forced(pair.prompt, pair.target[:1])[0]
        first = real.basis.true(real.plm.encode([pair.prompt], [len(pair.prompt) - 1]).cr_N_D)[0]
        assert (first - f_D).abs().max() / f_D.abs().max() <= 1e-4
        for interpolation in (
            Interpolation(schedule="gradual", lambda_max=0.9),
            Interpolation(schedule="constant", lambda_max=0.7),
        ):
            sources = ["Turn off the light", "Enter the name of the sensor"]
            ours = [
                translate(
                    plm,
                    sources,
                    adapter=adapter,
                    interpolation=interpolation,
                    decoding=DecodingSettings(max_new_tokens=8, look_ahead=k, batch_size=batch_size),
                ).token_ids
                for k in (0, 1, 4, 8, None)
                for plm, batch_size in ((real.plm, 7), (real.over_grpc, 1 if k in (4, None) else 7))
            ]
            alone = translate(real.plm, sources, task=real.task, decoding=DecodingSettings(max_new_tokens=8))
            expected = []
            for source in sources:
                expected_length = adapter.card.expected_length(tokenizer.count(source))
                text = reference.decode(
                    tokenizer.encode_prompt(real.task.prompt(source, tokenizer)),
                    real.basis.weights(adapter),
                    adapter.card.form,
                    adapter.candidate_ids_C.tolist(),
                    schedule(interpolation.schedule, interpolation.lambda_max, expected_length, 8),
                    StopMatcher(tokenizer, real.task.stops(tokenizer, real.plm.card.eos_token_ids)).ids,
                )
                expected.append(text)
            assert all(token_ids == expected for token_ids in ours)
            assert expected != alone.token_ids
    finally:
        real.model.float()
