"""Checks of the way from this machine to a server, reported in plain words."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from pydantic import BaseModel, computed_field

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.memory.grants import needed_scopes
from data_owner_client.memory.store import MANIFEST, ExternalMemory
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.head_recovery.fit import contexts_needed
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import Forbidden, InvalidData, PemaError, Unauthenticated

_TRIPS = 5
_PROBE = "The quick brown fox jumps over the lazy dog."
_BULK_SEQUENCES, _BULK_TOKENS = 32, 64
# Below this, in milliseconds, nobody notices a network or a queue.
_UNNOTICED_MS = 5.0


class Finding(BaseModel):
    """The result of one check.

    Attributes:
        advice: what to do about it; empty if there is nothing to do.
    """

    check: str
    ok: bool
    detail: str
    advice: str = ""


class RoundTrip(BaseModel):
    """Milliseconds of a small request; the server counted all but the network. Medians of a few."""

    total_ms: float
    network_ms: float
    queue_ms: float
    compute_ms: float
    serialise_ms: float


class Diagnosis(BaseModel):
    """All findings; where the server tells them, the times, and its speed with a larger request."""

    findings: list[Finding]
    round_trip: RoundTrip | None = None
    tokens_per_s: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def healthy(self) -> bool:
        """True if every check passed."""
        return all(finding.ok for finding in self.findings)


def diagnose(
    connect: Callable[[], RemotePlm], memories: Sequence[Path] = (), adapters: Sequence[Path] = ()
) -> Diagnosis:
    """Check everything between this machine and a server, as far as it goes.

    Args:
        connect: makes the connection.
        memories: folders of memories, or of a training and a validation memory, that should belong to the server.
        adapters: folders of adapters that should.
    """
    try:
        plm = connect()
    except PemaError as error:
        return Diagnosis(findings=[_unreachable(error)])
    with plm:
        card = plm.card
        diagnosis = Diagnosis(
            findings=[
                Finding(
                    check="server",
                    ok=True,
                    detail=f"{card.name} ({card.digest[:12]}), {card.cr_kind} of width {card.hidden_size}, "
                    f"{card.vocab_size:,} tokens, {card.dtype}",
                )
            ]
        )
        checks: list[tuple[str, Callable[[], Finding]]] = [
            ("tokenizer", partial(_tokenizer, plm)),
            ("grants", partial(_grants, plm)),
            ("round trip", partial(_round_trip, plm, diagnosis)),
            ("LM head", partial(_head, plm)),
            *((f"memory {path}", partial(_memory, plm, path)) for path in memories),
            *((f"adapter {path}", partial(_adapter, plm, path)) for path in adapters),
        ]
        for name, check in checks:
            try:
                finding = check()
            except PemaError as error:
                finding = Finding(check=name, ok=False, detail=error.detail, advice=error.hint)
            diagnosis.findings.append(finding)
    return diagnosis


def _unreachable(error: PemaError) -> Finding:
    check = "key" if isinstance(error, (Unauthenticated, Forbidden)) else "server"
    return Finding(check=check, ok=False, detail=error.detail, advice=error.hint)


def _tokenizer(plm: RemotePlm) -> Finding:
    tokens = plm.tokenizer.count(_PROBE)
    return Finding(
        check="tokenizer", ok=True, detail=f"{plm.card.tokenizer_digest[:12]}, a short sentence has {tokens}"
    )


def _grants(plm: RemotePlm) -> Finding:
    """Scopes and quotas; those that a private and a shared memory need alike must be there."""
    card = plm.card
    allowed = f"your key allows {', '.join(card.scopes)}" if card.scopes else "every call is allowed"
    quotas = "; left: " + ", ".join(map(str, plm.rate_limits)) if plm.rate_limits else ", without quotas"
    needed = needed_scopes(card, "private") if card.scopes else {}
    missing = [scope for scope in needed if scope not in card.scopes]
    advice = f"To build, train and translate, ask the owner for the scope {', '.join(missing)}." if missing else ""
    return Finding(check="grants", ok=not missing, detail=f"{allowed}{quotas}", advice=advice)


def _round_trip(plm: RemotePlm, diagnosis: Diagnosis) -> Finding:
    exchanges, seconds = list[Attempt](), list[float]()
    ids = [i % plm.card.vocab_size for i in range(1, min(16, plm.card.limits.max_sequence_tokens))]
    with plm.observed_by(exchanges.append):
        for _ in range(_TRIPS + 1):
            started = time.perf_counter()
            plm.encode([ids], [len(ids) - 1])
            seconds.append(time.perf_counter() - started)
    # The first one may have opened the connection.
    trips = [(exchange, exchange.timing) for exchange in exchanges[1:] if exchange.timing is not None]
    if not trips:
        total_ms = 1000 * median(seconds[1:])
        return Finding(
            check="round trip",
            ok=True,
            detail=f"{total_ms:.1f} ms; the server does not say more",
            advice="A proxy may remove Server-Timing; the window of build-memory then stays at its default.",
        )
    trip = RoundTrip(
        total_ms=median(1000 * exchange.seconds for exchange, _ in trips),
        network_ms=median(max(0.0, 1000 * exchange.seconds - timing.total_ms) for exchange, timing in trips),
        queue_ms=median(timing.queue_ms for _, timing in trips),
        compute_ms=median(timing.compute_ms for _, timing in trips),
        serialise_ms=median(timing.serialise_ms for _, timing in trips),
    )
    diagnosis.round_trip = trip
    diagnosis.tokens_per_s = _tokens_per_s(plm)
    return Finding(
        check="round trip",
        ok=True,
        detail=f"{trip.total_ms:.1f} ms = {trip.network_ms:.1f} network + {trip.queue_ms:.1f} queue + "
        f"{trip.compute_ms:.1f} compute + {trip.serialise_ms:.1f} serialisation; "
        f"{diagnosis.tokens_per_s:,.0f} tokens/s in a larger request",
        advice=_advice(trip),
    )


def _advice(trip: RoundTrip) -> str:
    if trip.network_ms > max(_UNNOTICED_MS, trip.compute_ms):
        return "The network takes longer than the model: translate with a larger --look-ahead."
    if trip.queue_ms > max(_UNNOTICED_MS, trip.compute_ms):
        return "Others use the server at the moment: everything takes longer, nothing is wrong."
    return ""


def _tokens_per_s(plm: RemotePlm) -> float:
    limits = plm.card.limits
    sequences = min(_BULK_SEQUENCES, limits.max_sequences, limits.max_rows)
    tokens = min(_BULK_TOKENS, limits.max_sequence_tokens)
    # No two begin alike, or the server would know some of them.
    ids = [[(1 + i + sequences * j) % plm.card.vocab_size for j in range(tokens)] for i in range(sequences)]
    started = time.perf_counter()
    plm.encode(ids, [tokens - 1] * sequences)
    return sequences * tokens / (time.perf_counter() - started)


def _head(plm: RemotePlm) -> Finding:
    head, needed = plm.cached_head(), "Training needs only the candidates' rows."
    if head.complete:
        head.verify()
        how = "rotated, so without a digest of its rows" if plm.card.rotated else "as the server's digest says"
        return Finding(check="LM head", ok=True, detail=f"in {head.folder}, {how}")
    if plm.card.head_policy == "none":
        have, wanted = len(plm.cached_distributions().keys()), contexts_needed(plm.card)
        return Finding(
            check="LM head",
            ok=True,
            detail=f"the owner gives no rows; {have:,} full distributions to work them out from are in the cache",
            advice="" if have >= wanted else f"pema-client train asks for {wanted:,}, unless told --head-contexts.",
        )
    if plm.card.head_policy != "full":
        return Finding(check="LM head", ok=True, detail=f"the owner's policy is {plm.card.head_policy}", advice=needed)
    detail = f"{head.rows:,} of {plm.card.vocab_size:,} rows in the cache" if head.rows else "not in the cache"
    return Finding(check="LM head", ok=True, detail=detail, advice=f"{needed} For all of them: pema-client fetch-head.")


def _memory(plm: RemotePlm, path: Path) -> Finding:
    folders = [path] if (path / MANIFEST).exists() else sorted(path.glob(f"*/{MANIFEST}"))
    memories = [ExternalMemory(folder.parent if folder.name == MANIFEST else folder) for folder in folders]
    if not memories:
        raise InvalidData(f"{path} holds no memory.", hint="Build one: pema-client build-memory.")
    for memory in memories:
        memory.manifest.plan.model.require(
            ModelIdentity.from_card(plm.card), f"The memory in {memory.folder}", "the server"
        )
    counts = [f"{memory.folder.name}: {memory.manifest.rows:,} rows" for memory in memories]
    unfinished = [memory for memory in memories if not memory.complete]
    for memory in memories:
        memory.require_shards()
    return Finding(
        check=f"memory {path}",
        ok=not unfinished,
        detail=f"of this very model; {', '.join(counts)}",
        advice="It is not complete: run the same build-memory command again." if unfinished else "",
    )


def _adapter(plm: RemotePlm, path: Path) -> Finding:
    card = TrainedAdapter.load(path).card
    card.model.require(ModelIdentity.from_card(plm.card), f"The adapter in {path}", "the server")
    detail = f"of this very model; {card.form}, rank {card.rank}"
    if card.members:
        detail += f", the average of {len(card.members)} networks"
    return Finding(check=f"adapter {path}", ok=True, detail=detail)
