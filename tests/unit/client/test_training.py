"""Training against the formulas in float64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.runtime.progress import Bar, Reporter
from data_owner_client.training import trainer as loop
from data_owner_client.training.batches import Batch, MemoryStats, ReliableRows, RowStream
from data_owner_client.training.loss import cross_entropy
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.trainer import Trained, train_adapter
from data_owner_client.training.validation import ValidationData, likeliest_interpolations, target_logprobs
from protocol.errors import InvalidData, InvalidRequest, NumericalFault
from protocol.head import LMHead
from tests import reference

D, C, N = 12, 7, 90
SETTINGS = TrainingSettings(rank=5, epochs=3, reconstruction_epochs=2, batch_rows=32, dropout=0.0, patience=99)


def make_rows(seed: int, rows: int = N, examples: int = 9) -> MemoryRows:
    """Rows whose targets follow from their representations."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(C, D, generator=torch.Generator().manual_seed(1))
    cr_N_D = 3 * torch.randn(rows, D, generator=generator)
    return MemoryRows(
        cr_N_D=cr_N_D,
        target_N=((cr_N_D @ truth.T).argmax(-1) * 2).int(),
        rows_E=torch.full((examples,), rows // examples, dtype=torch.int32),
        source_tokens_E=torch.full((examples,), 6, dtype=torch.int32),
    )


CANDIDATES = torch.arange(C) * 2


class InMemory:
    """Rows that are there already, in shards of so many examples."""

    def __init__(self, rows: MemoryRows, shards: int = 1) -> None:
        size = math.ceil(len(rows.rows_E) / shards)
        examples = rows.rows_E.split(size)
        self.shard_rows = [int(rows_E.sum()) for rows_E in examples]
        ends = list(accumulate(self.shard_rows))
        self._shards = [
            replace(
                rows,
                cr_N_D=rows.cr_N_D[end - count : end],
                target_N=rows.target_N[end - count : end],
                rows_E=rows_E,
                source_tokens_E=rows.source_tokens_E[: len(rows_E)],
            )
            for count, end, rows_E in zip(self.shard_rows, ends, examples, strict=True)
        ]

    def shard(self, number: int) -> MemoryRows:
        return self._shards[number]


def fit(rows: MemoryRows, settings: TrainingSettings, *, shards: int = 1, **options: Any) -> Trained:
    memory = InMemory(rows, shards)
    stats = replace(MemoryStats.from_memory(memory), candidate_ids_C=CANDIDATES)
    return train_adapter(memory, stats, make_head(), make_validation(), settings, **options)


def make_head() -> LMHead:
    return LMHead(torch.randn(C, D, generator=torch.Generator().manual_seed(2)))


def numbers_of(cr_B_D: Tensor, cr_N_D: Tensor) -> Tensor:
    """Indices of these rows in the memory."""
    return (cr_B_D[:, None] == cr_N_D).all(dim=-1).int().argmax(dim=1)


def make_validation(plm_probability: float = 0.2) -> ValidationData:
    rows = make_rows(5)
    return ValidationData.from_rows(
        rows, CANDIDATES, torch.full((N,), plm_probability).log().double(), length_ratio=1.5
    )


@pytest.mark.parametrize("form", ["paper", "residual"])
def test_both_phases_are_the_formulas(form: Any) -> None:
    settings = replace(SETTINGS, form=form, ema_decay=0.0)
    rows, head = make_rows(3), make_head()
    trained = fit(rows, settings)
    assert trained.best_nll == trained.history[-1].validation_nll, "the last epoch is the best, so its weights are kept"

    rms = rows.cr_N_D.square().mean().sqrt().item()
    torch.manual_seed(settings.seed)
    initial = Adapter(D, settings.rank, form, rms=rms).state_dict()
    stream = RowStream(InMemory(rows), CANDIDATES, batch_rows=settings.batch_rows, seed=settings.seed)
    batches = [[numbers_of(batch.cr_N_D, rows.cr_N_D) for batch in stream.epoch(epoch)] for epoch in range(5)]
    steps = settings.epochs * math.ceil(N / settings.batch_rows)
    rates = [settings.learning_rate * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
    axes_D_D = MemoryStats.from_memory(InMemory(rows)).axes_D_D
    expected = reference.train(
        rows.cr_N_D @ axes_D_D.T,
        Batch.from_rows(rows, CANDIDATES).label_N,
        head.weight_V_D @ axes_D_D.T,
        initial,
        batches,
        form=form,
        rms=rms,
        kappa=settings.kappa,
        learning_rates=rates,
        reconstruction_epochs=settings.reconstruction_epochs,
    )
    for name, weight in expected.items():
        assert (weight - initial[name]).abs().max() > 1e-4, f"{name} was trained"
        own = weight @ axes_D_D.double() if name == "A.weight" else axes_D_D.double().T @ weight
        torch.testing.assert_close(trained.adapter.state_dict()[name].double(), own, rtol=1e-3, atol=1e-5)


def test_of_private_rows_only_the_sure_ones_are_streamed() -> None:
    generator = torch.Generator().manual_seed(4)
    matches_N = torch.rand(N, generator=generator) < 0.7
    reliable_N = matches_N & (torch.rand(N, generator=generator) < 0.5)
    reliable_N[:10] = False  # an example without any
    rows = replace(make_rows(3), matches_N=matches_N.byte(), reliable_N=reliable_N.byte())
    memory = ReliableRows(InMemory(rows))
    kept = memory.shard(0)
    assert memory.shard_rows == [int(reliable_N.sum())]
    assert torch.equal(kept.cr_N_D, rows.cr_N_D[reliable_N])
    assert torch.equal(kept.target_N, rows.target_N[reliable_N])
    assert kept.rows_E.tolist() == [int(own_T.sum()) for own_T in reliable_N.split(10)]
    stream = RowStream(memory, CANDIDATES, batch_rows=16, seed=2)
    streamed_N_D = torch.cat([batch.cr_N_D for batch in stream.epoch(0)])
    assert sorted(numbers_of(streamed_N_D, rows.cr_N_D).tolist()) == reliable_N.nonzero()[:, 0].tolist()
    teacher_forced = InMemory(make_rows(3))
    assert ReliableRows(teacher_forced).shard(0) is teacher_forced.shard(0)


@pytest.mark.parametrize("form", ["paper", "residual", "recent"])
def test_the_same_adapter_comes_out_in_every_basis(form: Any) -> None:
    """A secret basis costs nothing in training, as the principal axes turn with the rows."""
    settings = replace(SETTINGS, form=form, rank=6, epochs=4, learning_rate=1e-2)
    scales_D = torch.logspace(0, -2, D)  # as in real models: a few directions have most of the length
    q_D_D = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(8)))[0]
    rows, held_out, head = make_rows(3, rows=900), make_validation(), make_head()
    trained = []
    for basis_D_D in (torch.eye(D), q_D_D):
        memory = InMemory(replace(rows, cr_N_D=(rows.cr_N_D + 0.5) * scales_D @ basis_D_D.T), 3)
        data = replace(held_out.data, cr_N_D=(held_out.data.cr_N_D + 0.5) * scales_D @ basis_D_D.T)
        seen = replace(head, weight_V_D=head.weight_V_D @ basis_D_D.T)
        stats = replace(MemoryStats.from_memory(memory), candidate_ids_C=CANDIDATES)
        axes_D_D = stats.axes_D_D
        torch.testing.assert_close(axes_D_D @ axes_D_D.T, torch.eye(D), rtol=0, atol=1e-5)
        trained.append(train_adapter(memory, stats, seen, replace(held_out, data=data), settings))
    plain, turned = trained
    nlls = [[epoch.validation_nll for epoch in one.history if epoch.phase == "joint"] for one in trained]
    assert nlls[0] == pytest.approx(nlls[1], abs=1e-3)
    torch.testing.assert_close(turned.adapter.A.weight, plain.adapter.A.weight @ q_D_D.T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(turned.adapter.B_pd.weight, q_D_D @ plain.adapter.B_pd.weight, rtol=1e-2, atol=1e-2)


def test_the_principal_axes_are_the_same_in_every_basis() -> None:
    """As in real models: one direction a hundred times as long as most, eigenvalues side by side, rows in float16."""
    size, rng = 96, torch.Generator().manual_seed(1)
    scales_D = torch.cat([torch.logspace(-0.6, 1.1, size - 1), torch.tensor([118.0])]).double()
    cr_N_D = (torch.randn(16 * size, size, generator=rng, dtype=torch.float64) + 0.3) * scales_D
    q_D_D = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0]
    rows = make_rows(3, rows=16 * size, examples=16)
    plain_D_D, turned_D_D = (
        MemoryStats.from_memory(InMemory(replace(rows, cr_N_D=basis_N_D.half()), 4)).axes_D_D.double()
        for basis_N_D in (cr_N_D, cr_N_D @ q_D_D.T)
    )
    cosine_D = (turned_D_D @ q_D_D * plain_D_D).sum(dim=1)
    assert cosine_D.min() > 0.99


def test_training_learns_and_is_repeatable() -> None:
    settings = replace(SETTINGS, rank=12, epochs=20, learning_rate=1e-2, dropout=0.1)
    rows = make_rows(3, rows=900)
    first, again, other = fit(rows, settings), fit(rows, settings), fit(rows, replace(settings, seed=1))
    assert first.best_nll < -math.log(0.2) - 0.3
    assert first.history == again.history
    assert all(torch.equal(a, b) for a, b in zip(first.adapter.parameters(), again.adapter.parameters(), strict=True))
    assert first.history != other.history
    reconstruction = [epoch.reconstruction_loss for epoch in first.history if epoch.phase == "reconstruction"]
    assert reconstruction[-1] < reconstruction[0]


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_the_best_epoch_is_kept_and_patience_ends_training(ema_decay: float) -> None:
    settings = replace(SETTINGS, epochs=60, patience=2, learning_rate=0.1, ema_decay=ema_decay)
    memory, head, validation = InMemory(make_rows(3, rows=18)), make_head(), make_validation()
    # Not rotated, so that the kept adapter scores exactly what it scored in training.
    stats = replace(MemoryStats.from_memory(memory), candidate_ids_C=CANDIDATES, axes_D_D=torch.eye(D))
    trained = train_adapter(memory, stats, head, validation, settings)
    nlls = [epoch.validation_nll for epoch in trained.history if epoch.validation_nll is not None]
    assert len(nlls) < 60
    assert trained.best_nll == min(nlls) == nlls[-3]
    _, kept = validation.best(target_logprobs(trained.adapter, head, validation.data), "constant")
    assert kept == trained.best_nll


class Stopped(Exception):
    pass


class StoppingReporter(Reporter):
    """Stops a training after so many steps."""

    def __init__(self, after: int) -> None:
        self._after = after

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        reporter = self

        class StoppingBar:
            def advance(self, steps: int = 1, note: str | None = None) -> None:
                reporter._after -= steps
                if reporter._after <= 0:
                    raise Stopped

        yield StoppingBar()


@pytest.mark.parametrize("form", ["paper", "residual"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
@pytest.mark.parametrize("every_s", [0.0, 1e9])
def test_a_training_that_is_stopped_anywhere_ends_in_the_same_adapter(
    form: Any, ema_decay: float, every_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_EVERY_SECONDS", every_s)
    settings = replace(SETTINGS, form=form, dropout=0.3, epochs=4, ema_decay=ema_decay)
    rows, checkpoint = make_rows(3), tmp_path / "checkpoint"
    whole = fit(rows, settings, shards=3)
    for after in (1, 2, 4, 1, 5, 4):
        with pytest.raises(Stopped):
            fit(rows, settings, shards=3, checkpoint=checkpoint, reporter=StoppingReporter(after))
    resumed = fit(rows, settings, shards=3, checkpoint=checkpoint)
    assert resumed.history == whole.history
    for name, weight in whole.adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], weight), name
    # Not what another training has left, and not half of a file.
    other = fit(rows, replace(settings, seed=4), shards=3, checkpoint=checkpoint)
    assert other.history == fit(rows, replace(settings, seed=4), shards=3).history
    fit(rows, settings, shards=3, checkpoint=checkpoint)
    kept = checkpoint.read_bytes()
    flipped = bytearray(kept)
    flipped[-30] ^= 64
    for damaged in (kept[:-9], bytes(flipped), b"", b"\xff" * 64):
        checkpoint.write_bytes(damaged)
        assert fit(rows, settings, shards=3, checkpoint=checkpoint).history == whole.history


@pytest.mark.parametrize("shards", [1, 2, 9])
@pytest.mark.parametrize("pool_bytes", [1, 3_000, 2**20])
@pytest.mark.parametrize("batch_rows", [1, 32, 45, 1000])
def test_every_epoch_has_every_row_once(shards: int, pool_bytes: int, batch_rows: int) -> None:
    rows = make_rows(3)
    stream = RowStream(InMemory(rows, shards), CANDIDATES, batch_rows=batch_rows, seed=2, pool_bytes=pool_bytes)
    orders = []
    for epoch in (0, 1):
        batches = list(stream.epoch(epoch))
        assert len(batches) == stream.steps
        assert all(len(batch) == batch_rows for batch in batches[:-1])
        whole = Batch.concatenate(batches)
        orders.append(numbers_of(whole.cr_N_D, rows.cr_N_D))
        assert sorted(orders[-1].tolist()) == list(range(N))
        assert torch.equal(whole.label_N, Batch.from_rows(rows, CANDIDATES).label_N[orders[-1]])
        later = list(stream.epoch(epoch, start=1))
        assert len(later) == len(batches) - 1
        assert all(torch.equal(a.cr_N_D, b.cr_N_D) for a, b in zip(later, batches[1:], strict=True))
    assert not torch.equal(*orders)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_cross_entropy_in_chunks_is_cross_entropy(softcap: float | None, chunk_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(4)
    weight_C_D, bias_C = torch.randn(C, D, generator=generator), torch.randn(C, generator=generator)
    head, label_N = LMHead(weight_C_D, bias_C, 0.7, softcap), torch.randint(C, (N,), generator=generator)
    ours_N_D = torch.randn(N, D, generator=generator).requires_grad_()
    ours = cross_entropy(ours_N_D, head, label_N, chunk_rows=chunk_rows)
    (3 * ours).backward()
    theirs_N_D = ours_N_D.detach().double().requires_grad_()
    logits_N_C = (theirs_N_D @ weight_C_D.double().T + bias_C.double()) * 0.7
    logits_N_C = logits_N_C if softcap is None else softcap * torch.tanh(logits_N_C / softcap)
    loss = -logits_N_C.log_softmax(-1)[torch.arange(N), label_N].mean()
    (3 * loss).backward()
    torch.testing.assert_close(ours, loss.float())
    torch.testing.assert_close(ours_N_D.grad, theirs_N_D.grad, check_dtype=False)


@pytest.mark.parametrize("ema_decay", [0.1, 0.4, 0.99])
def test_the_average_is_that_of_the_weights_after_every_step(ema_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = make_rows(3), list[list[Tensor]]()
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, *arguments: Any) -> Any:
        result = step(self, *arguments)
        seen.append([weight.detach().clone() for weight in self.param_groups[0]["params"]])
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    settings = replace(SETTINGS, epochs=1, batch_rows=8, ema_decay=ema_decay)
    averaged = fit(rows, settings).adapter
    joint = seen[-math.ceil(N / settings.batch_rows) :]
    mean = joint[0]
    for step_number, weights in enumerate(joint[1:], 1):
        decay = min(ema_decay, (1 + step_number) / (10 + step_number))
        mean = [decay * before + (1 - decay) * after for before, after in zip(mean, weights, strict=True)]
    (a_R_D, b_D_R), axes_D_D = mean, MemoryStats.from_memory(InMemory(rows)).axes_D_D
    torch.testing.assert_close(averaged.A.weight, a_R_D @ axes_D_D)
    torch.testing.assert_close(averaged.B_pd.weight, axes_D_D.T @ b_D_R)


def test_training_refuses_what_it_cannot_learn_from() -> None:
    rows = make_rows(3)
    with pytest.raises(InvalidData, match="no rows"):
        MemoryStats.from_memory(InMemory(replace(rows, cr_N_D=rows.cr_N_D[:0], rows_E=rows.rows_E[:0])))
    with pytest.raises(NumericalFault, match="not finite"):
        fit(replace(rows, cr_N_D=rows.cr_N_D * float("nan")), SETTINGS)
    for device in ("abacus", "xpu:7", "meta"):
        with pytest.raises(InvalidRequest, match="no device"):
            fit(rows, replace(SETTINGS, device=device))


def test_targets_outside_the_candidates_have_probability_zero() -> None:
    rows = replace(make_rows(3), target_N=torch.arange(N, dtype=torch.int32))
    data = Batch.from_rows(rows, CANDIDATES)
    assert data.label_N[:14].tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1]
    adapter, head = Adapter(D, 4, "residual"), make_head()
    logprob_N = target_logprobs(adapter, head, data)
    expected = (rows.cr_N_D[:14:2] @ head.weight_V_D.T).log_softmax(-1).diagonal()
    torch.testing.assert_close(logprob_N[:14:2].float(), expected)
    assert logprob_N[1].item() == -math.inf


def test_mixture_likelihood_by_hand() -> None:
    validation = replace(
        make_validation(), position_N=torch.arange(N) % 3, expected_length_N=torch.full((N,), 3.0).double()
    )
    pema = torch.full((N,), 0.8).log().double()
    weights = [0.9, 0.36, 0.09]
    expected = -sum(math.log((1 - w) * 0.2 + w * 0.8) for w in weights) / 3
    assert validation.mixture_nll(pema, Interpolation(schedule="gradual", lambda_max=0.9)) == pytest.approx(expected)
    assert validation.mixture_nll(pema, Interpolation(schedule="none")) == pytest.approx(-math.log(0.2))


def test_the_chosen_interpolation_is_the_likeliest_of_the_grid() -> None:
    validation = make_validation()
    sure_late = torch.where(validation.position_N < 3, math.log(0.01), math.log(0.9)).double()

    def likeliest(pema_logprob_N: Tensor) -> Interpolation:
        found = likeliest_interpolations(validation, pema_logprob_N)
        assert {interpolation.schedule for interpolation in found} == {"constant", "linear", "gradual"}
        nll = {each: validation.mixture_nll(pema_logprob_N, each) for each in found}
        for each in found:
            others = [each.model_copy(update={"lambda_max": value}) for value in (0.05, 0.3, 0.6, 0.9, 0.95)]
            assert nll[each] <= min(validation.mixture_nll(pema_logprob_N, other) for other in others)
        return min(found, key=lambda each: nll[each])

    assert likeliest(sure_late).schedule == "constant"
    sure_early = torch.where(validation.position_N < 3, math.log(0.9), -math.inf).double()
    assert likeliest(sure_early).schedule == "gradual"
