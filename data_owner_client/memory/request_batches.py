"""Which examples go into one request: as many as break no limit of the server and do not fill our memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.messages import DTYPES, ModelCard
from protocol.types import WireDtype

# A couple of forward passes on a CPU: enough to keep the server busy, and several requests for a window to work with.
EXAMPLES_PER_REQUEST = 64
# Tokens of one request: a few forward passes, and a small part of what may wait on the server.
_TOKENS_PER_REQUEST = 2**15
# Bytes of one answer. Several are in memory at a time.
_ANSWER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ExampleSizes:
    """Tokens of every example's whole sequence and of its target; eight bytes an example."""

    sequence: array[int] = field(default_factory=lambda: array("I"))
    target: array[int] = field(default_factory=lambda: array("I"))

    def append(self, sequence: int, target: int) -> None:
        """One more example."""
        self.sequence.append(sequence)
        self.target.append(target)


def split_into_requests(
    sizes: ExampleSizes, card: ModelCard, dtype: WireDtype, *, done: int, examples_per_shard: int
) -> Iterator[range]:
    """Runs of examples, in order, one for each request.

    No run goes on beyond the end of a shard, so an interrupted build sends the same requests as an undisturbed one.

    Args:
        sizes: of all examples.
        card: of the server's model, with its limits.
        dtype: in which representations travel.
        done: examples that are stored already.
        examples_per_shard: examples in a file.
    """
    limits = card.limits
    most_sequences = min(EXAMPLES_PER_REQUEST, limits.max_sequences)
    # int32 ids, and room for everything else.
    most_tokens = min(_TOKENS_PER_REQUEST, limits.max_body_bytes // 8)
    most_rows = min(limits.max_rows, _ANSWER_BYTES // (card.hidden_size * DTYPES[dtype].itemsize))
    start = done
    while start < len(sizes.sequence):
        tokens, rows, stop = sizes.sequence[start], sizes.target[start], start + 1
        shard_end = min(len(sizes.sequence), (start // examples_per_shard + 1) * examples_per_shard)
        while stop < min(shard_end, start + most_sequences):
            tokens, rows = tokens + sizes.sequence[stop], rows + sizes.target[stop]
            if tokens > most_tokens or rows > most_rows:
                break
            stop += 1
        yield range(start, stop)
        start = stop
