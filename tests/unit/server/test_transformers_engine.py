"""The engine against transformers' own forward pass, one sequence at a time, without padding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.tiny_models import EOS, TELLING, VOCAB_SIZE, WINDOW, TinyModels
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.engines.transformers.model_runner import ModelRunner
from plm_owner_server.service.plm_service import PlmService
from protocol.integrity import token_crc32
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest
from tests.support import ARCHITECTURES_IN_CI, make_service, random_ids
from tests.transformers_engine import TOLERANCE, Truth, assert_near, drafted, drafts, every_architecture, greedy

COMPOSITIONS = {
    "one": random_ids(1, [7]),
    "one token": random_ids(2, [1]),
    "mixed": random_ids(3, [3, 40, 1, 17]),
    "equal": random_ids(4, [12, 12, 12]),
    "beyond the window": random_ids(5, [50, 33, 61]),
    "shared prefix": random_ids(6, [15, 20, 31], shared=12),
    "shared prefix within the window": random_ids(7, [9, 7, 30], shared=5),
    "shared prefix as long as the window": random_ids(7, [9, 12, 30], shared=WINDOW),
    "shared prefix beyond the window": random_ids(8, [40, 31, 33, 60], shared=30),
    "one is the prefix of all": random_ids(9, [11, 30, 19], shared=11),
    "identical": random_ids(10, [21, 21], shared=21),
}


@every_architecture
@pytest.mark.parametrize("cache_bytes", [2**28, 2000, 0])  # roomy, evicting all the time, off
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_encode_is_transformers_own_hidden_state(
    model: PreTrainedModel, truth: Truth, composition: str, cache_bytes: int
) -> None:
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=cache_bytes)
    sequences = COMPOSITIONS[composition]
    chooser = random.Random(composition)
    for starts in (
        [0] * len(sequences),
        [len(ids) - 1 for ids in sequences],
        [chooser.randrange(len(ids)) for ids in sequences],
    ):
        encoded = engine.encode(EncodeBatch(sequences, starts, with_logsumexp=True))
        assert encoded.rows == [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        assert encoded.echo == [token_crc32(ids) for ids in sequences]
        assert encoded.last_hidden_N_D is None
        assert encoded.logsumexp_N is not None
        parts = zip(encoded.cr_N_D.split(encoded.rows), encoded.logsumexp_N.split(encoded.rows), strict=True)
        for ids, start, (cr_T_D, logsumexp_T) in zip(sequences, starts, parts, strict=True):
            hidden_T_D, logits_T_V = truth(ids)
            assert_near(cr_T_D, hidden_T_D[start:])
            torch.testing.assert_close(logsumexp_T, logits_T_V[start:].logsumexp(-1), rtol=TOLERANCE, atol=TOLERANCE)


def test_encode_through_the_service_in_several_batches(
    architecture: str, tiny_models: TinyModels, truth: Truth
) -> None:
    service = make_service(tiny_models[architecture], max_batch_tokens=64)  # the 70 tokens are over the budget alone
    sequences = random_ids(11, [5, 70, 20, 21, 5, 60, 1], shared=4)
    starts = [0, 50, 3, 20, 4, 0, 0]
    answer = service.encode(EncodeRequest(token_ids=sequences, from_position=starts, dtype="float32"))
    assert answer.rows_B.tolist() == [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
    assert answer.echo == [token_crc32(ids) for ids in sequences]
    for ids, start, cr_T_D in zip(sequences, starts, answer.cr_N_D.split(answer.rows_B.tolist()), strict=True):
        assert_near(cr_T_D, truth(ids)[0][start:])


@every_architecture
def test_head_of_the_last_hidden_state_is_the_models_logits(engine: TransformersEngine, truth: Truth) -> None:
    hidden_T_D, logits_T_V = truth(random_ids(12, [30])[0])
    head = engine.head.to(torch.device("cpu"))
    assert_near(head.logits(hidden_T_D), logits_T_V)
    chosen = torch.tensor([5, 3, VOCAB_SIZE - 1, 5])
    assert_near(head.rows(chosen).logits(hidden_T_D), logits_T_V[:, chosen])
    assert_near(head.rows(slice(2, 9)).logits(hidden_T_D), logits_T_V[:, 2:9])


@every_architecture
def test_what_acts_after_the_head_is_really_tried(architecture: str, engine: TransformersEngine) -> None:
    expected = {"gemma2": (1.0, 3.0), "cohere": (0.25, None), "granite": (0.25, None)}
    assert (engine.head.logit_scale, engine.head.softcap) == expected.get(architecture, (1.0, None))


@every_architecture
@pytest.mark.parametrize(
    ("lengths", "shared", "look_ahead"),
    [
        ([6], 0, [24]),
        ([1, 1], 0, [10, 3]),
        ([3, 40, 1, 17, 3], 0, [20, 9, 0, 20, 20]),  # two of them equally long
        ([12, 12, 12], 0, [20, 5, 11]),
        ([50, 33, 61, 33], 0, [16, 16, 16, 16]),
        ([15, 20, 31, 20], 12, [12, 12, 1, 12]),
        ([9, 12, 30], WINDOW, [12, 12, 12]),
        ([21, 21, 21], 21, [9, 9, 9]),
        ([2, 5, 4], 2, [3, 2, 3]),  # prompts and drafts stay within the window: padded together
        ([4, 7], 0, [4, 0]),  # only just beyond it
    ],
)
def test_decode_is_greedy_generation(
    model: PreTrainedModel,
    service: PlmService,
    truth: Truth,
    lengths: list[int],
    shared: int,
    look_ahead: list[int],
) -> None:
    sequences = random_ids(sum(lengths), lengths, shared=shared)
    request = DecodeRequest(token_ids=sequences, look_ahead=look_ahead, stop_token_ids=[EOS], dtype="float32")
    answer = service.decode(request)
    assert answer.echo == [token_crc32(ids) for ids in sequences]
    expected = [greedy(model, ids, k + 1) for ids, k in zip(sequences, look_ahead, strict=True)]
    assert drafts(answer) == expected
    rows = answer.rows_B.tolist()
    cr, logsumexp, logprob = (x.split(rows) for x in (answer.cr_N_D, answer.logsumexp_N, answer.top1_logprob_N))
    for i, (ids, tokens) in enumerate(zip(sequences, expected, strict=True)):
        hidden_T_D, logits_T_V = (x[len(ids) - 1 :] for x in truth([*ids, *tokens[:-1]]))
        assert_near(cr[i], hidden_T_D)
        torch.testing.assert_close(logsumexp[i], logits_T_V.logsumexp(-1), rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(
            logprob[i], logits_T_V.log_softmax(-1).max(-1).values, rtol=TOLERANCE, atol=TOLERANCE
        )
        assert logits_T_V.argmax(-1).tolist() == tokens


def test_a_sequence_that_ended_does_not_run_past_the_models_last_position(
    model: PreTrainedModel, service: PlmService
) -> None:
    limit = service.model_card().limits.max_sequence_tokens
    sequences, look_ahead = random_ids(15, [limit - 1, limit - 9, limit - 8]), [1, 9, 8]
    answer = service.decode(DecodeRequest(token_ids=sequences, look_ahead=look_ahead, stop_token_ids=[EOS]))
    # `generate` needs a position for every token it returns, so it goes one less far.
    expected = [greedy(model, ids, k) for ids, k in zip(sequences, look_ahead, strict=True)]
    assert [tokens[:-1] if EOS not in tokens else tokens for tokens in drafts(answer)] == expected


# Besides, heads with a bias and with a scale, and layers that cannot be packed.
@pytest.mark.parametrize(
    "architecture",
    [one for one in ARCHITECTURES_IN_CI if one.values[0] in (*TELLING, "phi", "granite", "gpt2")],
    indirect=True,
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [(1, 7), (5, 64), (512, 10**6)])
def test_the_vocabulary_in_blocks_is_the_whole_vocabulary(
    architecture: str,
    tiny_models: TinyModels,
    truth: Truth,
    monkeypatch: pytest.MonkeyPatch,
    block: tuple[int, int],
    *,
    packed: bool,
) -> None:
    for name in ("_CPU_BLOCK", "_PACKED_BLOCK"):
        monkeypatch.setattr(f"plm_owner_server.engines.ops.vocab_reduction.{name}", block)
    model = load_model(tiny_models[architecture], device="cpu", dtype="float32")
    engine = TransformersEngine(model, cr_kind="last_hidden_state", pack_weights=packed)
    linear = [module for module in model.base_model.modules() if type(module) is nn.Linear]
    assert bool(linear) == (not packed and architecture != "gpt2"), "GPT-2 has layers of its own"
    engine.warm_up()
    ids = random_ids(20, [18])[0]
    logits_T_V = truth(ids)[1]
    encoded = engine.encode(EncodeBatch([ids], [0], with_logsumexp=True))
    assert encoded.logsumexp_N is not None
    torch.testing.assert_close(encoded.logsumexp_N, logits_T_V.logsumexp(-1), rtol=TOLERANCE, atol=TOLERANCE)
    decoded = drafted(engine, [ids], [0], frozenset())
    assert decoded.top1_N.item() == logits_T_V[-1].argmax()
    assert_near(decoded.top1_logprob_N, logits_T_V[-1:].log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("cache_bytes", [2**28, 3000, 0])  # roomy, evicting all the time, off
def test_texts_that_go_on_branch_and_return_are_the_models_own(
    model: PreTrainedModel, truth: Truth, cache_bytes: int
) -> None:
    """Calls as a decoding client makes them: drafts kept in part, a token of its own, other texts in between."""
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=cache_bytes)
    chooser = random.Random(7)
    texts = random_ids(19, [9, 4, 21, 9, 2], shared=2)
    for _ in range(12):
        batch = chooser.sample(range(len(texts)), chooser.randint(1, len(texts)))
        look_ahead = [chooser.randint(0, 4) for _ in batch]
        decoded = drafted(engine, [texts[i] for i in batch], look_ahead, frozenset())
        assert decoded.echo == [token_crc32(texts[i]) for i in batch]
        parts = zip(batch, decoded.top1_N.split(decoded.rows), decoded.cr_N_D.split(decoded.rows), strict=True)
        for i, top1_K, cr_K_D in parts:
            ran = [*texts[i], *top1_K.tolist()[:-1]]
            hidden_T_D, logits_T_V = (x[len(texts[i]) - 1 :] for x in truth(ran))
            assert_near(cr_K_D, hidden_T_D)
            assert top1_K.tolist() == logits_T_V.argmax(-1).tolist()
            kept = ran[: len(texts[i]) + chooser.randint(0, len(top1_K) - 1)]
            texts[i] = [*kept, chooser.randrange(3, VOCAB_SIZE)]
        encoded = engine.encode(EncodeBatch(texts, [len(ids) - 1 for ids in texts]))
        for ids, cr_1_D in zip(texts, encoded.cr_N_D.split(1), strict=True):
            assert_near(cr_1_D, truth(ids)[0][-1:])


@pytest.mark.parametrize("cache_bytes", [0, 2**28])
def test_drafts_of_the_clients_are_checked_in_one_pass(model: PreTrainedModel, truth: Truth, cache_bytes: int) -> None:
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=cache_bytes)
    texts = random_ids(31, [7, 4, 5], shared=2)
    starts, look_ahead = [3, 3, 0], [2, 0, 1]
    for _ in range(2):  # the second time from cached states
        decoded = drafted(engine, texts, look_ahead, frozenset(), starts)
        assert decoded.rows == [4 + 2, 1, 5 + 1]
        parts = zip(texts, starts, decoded.top1_N.split(decoded.rows), decoded.cr_N_D.split(decoded.rows), strict=True)
        for ids, start, top1_K, cr_K_D in parts:
            given = len(ids) - start
            hidden_T_D, logits_T_V = (x[start:] for x in truth([*ids, *top1_K.tolist()[given - 1 : -1]]))
            assert_near(cr_K_D, hidden_T_D)
            assert top1_K.tolist() == logits_T_V.argmax(-1).tolist()


@pytest.mark.parametrize("cache_bytes", [2**28, 3000, 0])  # roomy, evicting all the time, off
def test_batches_join_and_leave_at_any_step(model: PreTrainedModel, truth: Truth, cache_bytes: int) -> None:
    """Requests of two tenants come, go on, end and are given up in any order: each gets what the model says."""
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=cache_bytes)
    drafting, chooser = engine.drafting(batch_tokens=64), random.Random(5)
    texts = random_ids(41, [9, 30, 21, 2, 1, 40, 12, 9], shared=2)
    waiting: dict[DraftBatch, list[int]] = {}  # and the numbers of their texts
    answered = 0
    for turn in range(60):
        busy = {number for numbers in waiting.values() for number in numbers}
        idle = [number for number in range(len(texts)) if number not in busy]
        joining: list[DraftBatch] = []
        for _ in range(chooser.randint(0, 2) if turn < 45 else 0):
            numbers = chooser.sample(idle, min(len(idle), chooser.randint(1, 3)))
            if numbers:
                idle = [number for number in idle if number not in numbers]
                ids = [texts[number] for number in numbers]
                starts = [len(own) - chooser.randint(1, min(4, len(own))) for own in ids]
                look_ahead = [chooser.randint(0, 6) for _ in ids]
                stops = frozenset([EOS, *chooser.sample(range(VOCAB_SIZE), 40)])
                joining.append(DraftBatch(ids, starts, look_ahead, stops, chooser.choice("ab")))
                waiting[joining[-1]] = numbers
        drafting.join(joining)
        if waiting and turn < 45 and chooser.random() < 0.1:
            given_up = chooser.choice(list(waiting))
            drafting.leave(given_up)
            del waiting[given_up]
        for batch, decoded in drafting.step():
            answered += 1
            assert decoded.echo == [token_crc32(ids) for ids in batch.token_ids]
            parts = zip(decoded.top1_N.split(decoded.rows), decoded.cr_N_D.split(decoded.rows), strict=True)
            for i, (number, (top1_K, cr_K_D)) in enumerate(zip(waiting.pop(batch), parts, strict=True)):
                text, start, stops = batch.token_ids[i], batch.from_position[i], batch.stop_token_ids
                tokens = top1_K.tolist()[len(text) - 1 - start :]
                hidden_T_D, logits_T_V = (x[start:] for x in truth([*text, *tokens[:-1]]))
                assert_near(cr_K_D, hidden_T_D)
                assert top1_K.tolist() == logits_T_V.argmax(-1).tolist()
                assert len(tokens) == batch.look_ahead[i] + 1 or tokens[-1] in stops
                assert not stops & set(tokens[:-1])
                kept = chooser.randint(1, len(text) + len(tokens) - 1)
                texts[number] = [*[*text, *tokens[:-1]][:kept][:60], chooser.randrange(3, VOCAB_SIZE)]
    assert not waiting
    assert answered > 15


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass from now on, padding included."""
    passes, inner = list[int](), ModelRunner.forward

    def counted(self: ModelRunner, ids_B_T: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        passes.append(ids_B_T.numel())
        return inner(self, ids_B_T, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return passes


def test_what_is_known_is_not_computed_again(model: PreTrainedModel, computed: list[int]) -> None:
    engine = TransformersEngine(model, cr_kind="last_hidden_state")
    texts = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11, 12]]  # with their drafts, within the narrowest window
    decoded = drafted(engine, texts, [1, 1], frozenset())
    assert computed == [12, 2]
    for tenant in ("", "another"):
        drafting = engine.drafting(4096)
        run = drafting.join([DraftBatch(texts, [5, 5], [1, 1], tenant=tenant)])
        assert run == (0 if tenant == "" else 12)
    del computed[2:]
    longer = [[*ids, int(draft), 13] for ids, draft in zip(texts, decoded.top1_N[::2], strict=True)]
    drafted(engine, longer, [0, 0], frozenset())
    assert computed[2:] == [2]


@pytest.mark.parametrize("cache_bytes", [2**28, 3000])  # roomy, evicting all the time
@pytest.mark.parametrize("tail", [[], [8, 9]])  # draws; labels, whose first tokens differ
def test_prompts_of_several_sequences_are_computed_once(
    model: PreTrainedModel, truth: Truth, computed: list[int], cache_bytes: int, tail: list[int]
) -> None:
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=cache_bytes)
    first, second = random_ids(23, [41, 38], shared=0)
    texts = [[*ids, token, *tail] for token in (5, 6, 7) for ids in (first, second)]
    drafting, done = engine.drafting(batch_tokens=4096), list[tuple[DraftBatch, Decoded]]()
    ran = drafting.join([DraftBatch(texts, [len(ids) - 1 for ids in texts], [0] * 6)])
    while not done:
        done = drafting.step()
    ((_, decoded),) = done
    prompts, tails = 2 * 41, 6 * (1 + len(tail))  # both in one pass, the second with three tokens of padding
    assert ran == prompts + (tails if tail else 0)
    assert sum(computed) == prompts + tails
    for ids, cr_1_D, top1 in zip(texts, decoded.cr_N_D.split(1), decoded.top1_N.tolist(), strict=True):
        hidden_T_D, logits_T_V = truth(ids)
        assert_near(cr_1_D, hidden_T_D[-1:])
        assert top1 == int(logits_T_V[-1].argmax())


@every_architecture
def test_greedy_texts_vary_enough_to_tell_a_mistake(model: PreTrainedModel) -> None:
    tokens = {token for ids in random_ids(13, [5, 20, 40]) for token in greedy(model, ids, 20)}
    assert len(tokens) >= 8


def test_a_stop_token_ends_drafting_of_its_sequence_alone(service: PlmService, model: PreTrainedModel) -> None:
    sequences = random_ids(14, [10, 10, 4])
    free = [greedy(model, ids, 12) for ids in sequences]
    stop = next(token for token in free[0][2:] if token not in free[1])
    request = DecodeRequest(token_ids=sequences, look_ahead=[11, 11, 11], stop_token_ids=[stop, EOS])
    stopped = drafts(service.decode(request))
    for ours, theirs in zip(stopped, free, strict=True):
        end = theirs.index(stop) + 1 if stop in theirs else len(theirs)
        assert ours == theirs[:end]
    assert len(stopped[0]) < 12
    assert len(stopped[1]) == len(free[1])


def test_without_stop_tokens_drafting_goes_on_past_the_end_of_text(service: PlmService, truth: Truth) -> None:
    sequence = random_ids(15, [6])[0]
    answer = service.decode(DecodeRequest(token_ids=[sequence], look_ahead=[20]))
    tokens = answer.top1_N.tolist()
    assert len(tokens) == 21
    assert truth([*sequence, *tokens[:-1]])[1][len(sequence) - 1 :].argmax(-1).tolist() == tokens


def test_distribution_is_the_models_own(service: PlmService, truth: Truth) -> None:
    sequence = random_ids(16, [25])[0]
    expected_V = truth(sequence)[1][-1].log_softmax(-1)
    full = service.distribution(DistributionRequest(token_ids=sequence, top_k=0))
    assert full.token_ids_K.tolist() == list(range(VOCAB_SIZE))
    torch.testing.assert_close(full.logprob_K, expected_V, rtol=TOLERANCE, atol=TOLERANCE)
    top = service.distribution(DistributionRequest(token_ids=sequence, top_k=4))
    assert top.token_ids_K.tolist() == expected_V.topk(4).indices.tolist()
    torch.testing.assert_close(top.logprob_K, expected_V.topk(4).values, rtol=TOLERANCE, atol=TOLERANCE)
