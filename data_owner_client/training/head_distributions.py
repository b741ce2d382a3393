"""Requests for the full distributions from which LM-head rows are recovered; they resume where they were stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

from torch import Tensor

from data_owner_client.data.pairs import Pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.plm.connection.in_flight import InFlightWindow, ordered_map
from data_owner_client.plm.head_recovery.distributions import DistributionRecord, Distributions
from data_owner_client.plm.head_recovery.fit import contexts_needed
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.head_contexts import Context, sample_contexts
from protocol.errors import Forbidden, Overloaded, PemaError
from protocol.messages import Limits

# Contexts in one request for representations; an interruption loses at most these.
_CONTEXTS_AT_ONCE = 16
# Bytes of a token on the wire: a log-probability in float32 and an id in int32.
_TOKEN_BYTES = 8


def fetch_distributions(
    plm: RemotePlm,
    plan: MemoryPlan,
    pairs: Sequence[Pair],
    count: int | None,
    reporter: Reporter,
    *,
    shown: Sequence[Pair] | None = None,
) -> Distributions:
    """Full distributions of a memory's contexts; those that are not on disk are requested and stored.

    Args:
        plm: PLM with a cache.
        plan: plan of the memory.
        pairs: pairs that the memory was built from.
        count: number of contexts; None for as many as an exact fit needs. Those on disk come first.
        reporter: shows what leaves this machine, what it costs, and the progress.
        shown: the pairs with surrogates, of a redacted memory; None in other memories.

    Raises:
        Forbidden, Overloaded: the owner refuses further distributions, or has no capacity. Those received are stored.
        PemaError: a call to the PLM failed.
    """
    distributions = plm.cached_distributions()
    exact_count = contexts_needed(plm.card)
    count = count or exact_count
    contexts = list(islice(sample_contexts(plm, plan, pairs, shown), max(count, exact_count)))
    # Those on disk need not be the first of the sample: a refused call may precede an admitted one.
    contexts = sorted(contexts, key=lambda context: context.key not in distributions)[:count]
    missing = [context for context in contexts if context.key not in distributions]
    if not missing:
        return distributions
    if len(contexts) < count:
        reporter.say(f"The memory has only {len(contexts):,} contexts; an exact fit needs {count:,}.")
    megabytes = len(missing) * plm.card.vocab_size * _TOKEN_BYTES / 1e6
    tokens = 2 * sum(len(context.prefix) + context.drafted for context in missing)
    reporter.say(
        "The owner gives no rows of the LM head; they are recovered from full distributions. Leaves this machine: "
        "only contexts that building the memory has shown. "
        f"Costs {len(missing):,} calls, {tokens:,} tokens, {megabytes:,.0f} MB down, and half of that on disk."
    )
    done, window = len(contexts) - len(missing), InFlightWindow()
    with (
        reporter.bar("full distributions", len(contexts), "contexts", done=done) as bar,
        plm.observed_by(window.observe),
    ):
        try:
            for chunk in _chunks(missing, plm.card.limits):
                for context, record in _fetch(plm, chunk, window):
                    distributions.store(context.key, record)
                    done += 1
                    bar.advance(1)
        except (Forbidden, Overloaded) as error:
            raise _with_progress(error, done, len(contexts)) from error
    return distributions


def _fetch(
    plm: RemotePlm, chunk: Sequence[Context], window: InFlightWindow
) -> Iterator[tuple[Context, DistributionRecord]]:
    """Yield each context with its distribution. After a refusal, yield what is in flight, then raise the refusal."""
    exact = plm.with_dtype("float32")
    decoded = exact.decode([context.prefix for context in chunk], [context.drafted for context in chunk])
    rows = decoded.rows_B.tolist()
    last_B = decoded.rows_B.long().cumsum(0) - 1
    input_N_D = decoded.cr_N_D if decoded.last_hidden_N_D is None else decoded.last_hidden_N_D
    sequences = [
        [*context.prefix, *drafts_T.tolist()[: context.drafted]]
        for context, drafts_T in zip(chunk, decoded.top1_N.split(rows), strict=True)
    ]
    refusals: list[PemaError] = []

    def distribution(sequence: list[int]) -> Tensor | None:
        try:
            return exact.distribution(sequence)
        except (Forbidden, Overloaded) as error:
            refusals.append(error)
            return None

    # A later call may be admitted before an earlier one is refused: its answer has been paid for.
    admitted = takewhile(lambda _: not refusals, sequences)
    logprobs = ordered_map(distribution, admitted, window)
    logsumexps = decoded.logsumexp_N[last_B].tolist()
    for context, input_D, logsumexp, logprob_V in zip(chunk, input_N_D[last_B], logsumexps, logprobs, strict=False):
        if logprob_V is not None:
            yield context, DistributionRecord(input_D=input_D, logsumexp=logsumexp, logprob_V=logprob_V)
    if refusals:
        raise refusals[0]


def _chunks(contexts: Sequence[Context], limits: Limits) -> Iterator[list[Context]]:
    """Yield the contexts in groups of one request each."""
    chunk, rows = list[Context](), 0
    for context in contexts:
        rows += 1 + context.drafted
        if chunk and (rows > limits.max_rows or len(chunk) == min(_CONTEXTS_AT_ONCE, limits.max_sequences)):
            yield chunk
            chunk, rows = [], 1 + context.drafted
        chunk.append(context)
    if chunk:
        yield chunk


def _with_progress(error: PemaError, done: int, count: int) -> PemaError:
    hint = "The same command goes on where this one stopped."
    if isinstance(error, Forbidden):
        hint = f"Once you may have more, {hint[0].lower()}{hint[1:]}"
        if done:
            hint += f" An estimate from what you have: --head-contexts {done}."
    return type(error)(
        f"{error.detail} Of {count:,} full distributions, {done:,} are stored.",
        hint=f"{error.hint} {hint}".lstrip(),
        retry_after_s=error.retry_after_s,
        request_id=error.request_id,
    )
