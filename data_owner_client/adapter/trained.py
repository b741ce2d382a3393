"""The adapter: a few low-rank matrices that turn the PLM's representation into the data owner's distribution.

P_PEMA(· | c) = softmax(head(h_pd)) over the candidate vocabulary V' ⊂ V, the tokens that occur in the memory's targets.

`paper`: h_pd = B_pd A f.
`residual`: h_pd = f + B_pd A f, which starts as the PLM itself.
`recent`: h_pd = f + B_pd (A f + E e) with e the head rows of the two previous target tokens. They inform the adapter
where f cannot: in private memories f follows the PLM's own continuation, which often ends in other words.

An adapter may be the average of several such networks (`adapter.ensemble`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import AdapterCard
from data_owner_client.adapter.ensemble import AdapterNetwork, Ensemble
from data_owner_client.adapter.network import RECENT_TOKENS, Adapter
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.data.example_retrieval import ExampleRetriever
from data_owner_client.data.pair_files import read_stored_pairs, write_pairs
from data_owner_client.data.pairs import Pair
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.atomic_files import write_atomically
from protocol.codec import load_tensors
from protocol.errors import InvalidData
from protocol.head import LMHead

_JSON, _TENSORS, _PAIRS = "adapter.json", "adapter.safetensors", "pairs.jsonl"
# Parameters that format pema-adapter-1 stores under another name.
_STORED_NAMES = {"mismatch_scale": "drifted"}
_PARAMETER_NAMES = {stored: name for name, stored in _STORED_NAMES.items()}


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with the head rows of its candidate vocabulary, ready to decode with.

    Attributes:
        card: metadata.
        adapter: the network, or the average of several.
        candidate_ids_C: int64, sorted.
        head: float32 head rows of the candidates.
        pairs: source of the retrieved examples in the PLM's prompts; empty unless `card.nearest` > 0.
    """

    card: AdapterCard
    adapter: AdapterNetwork
    candidate_ids_C: Tensor
    head: LMHead
    pairs: Sequence[Pair] = ()

    @cached_property
    def retriever(self) -> ExampleRetriever | None:
        """The retriever of examples for the PLM's prompts; None for the examples of the task."""
        return ExampleRetriever(self.pairs, self.card.nearest) if self.card.nearest else None

    @torch.inference_mode()
    def logprobs(self, cr_N_D: Tensor, previous_N_P: Tensor | None = None) -> Tensor:
        """log P_PEMA over the candidates [N, C], float32; see `CandidateDistribution.logprobs`."""
        if previous_N_P is None:
            previous_N_P = torch.full((len(cr_N_D), RECENT_TOKENS), -1)
        index_N_P = index_of(previous_N_P, self.candidate_ids_C)
        return self.adapter.eval().logprobs(self.head, cr_N_D, index_N_P)

    def save(self, folder: AnyPath) -> None:
        """Write the adapter: tensors first, the card last, so that an interrupted write leaves no adapter.

        Raises:
            InvalidData: the disk is full.
        """
        folder, parameters = to_path(folder), self.adapter.state_dict()
        tensors = {_renamed(name, _STORED_NAMES): value.contiguous() for name, value in parameters.items()}
        tensors |= {"candidate_ids_C": self.candidate_ids_C, "head.weight": self.head.weight_V_D.contiguous()}
        if self.head.bias_V is not None:
            tensors["head.bias"] = self.head.bias_V.contiguous()
        packed = safetensors.torch.save(tensors)
        card = self.card.model_copy(update={"tensors_sha256": hashlib.sha256(packed).hexdigest()})
        write_atomically(folder / _TENSORS, packed)
        if card.nearest:
            write_pairs(folder / _PAIRS, self.pairs)
        write_atomically(folder / _JSON, card.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: AnyPath) -> TrainedAdapter:
        """Read an adapter.

        Raises:
            InvalidData: the folder has no adapter, or its files are damaged.
        """
        folder = to_path(folder)
        damaged = InvalidData(f"The adapter in {folder} is damaged.", hint="Train it again: pema-client train.")
        try:
            card = AdapterCard.model_validate_json((folder / _JSON).read_bytes())
            packed = (folder / _TENSORS).read_bytes()
            if hashlib.sha256(packed).hexdigest() != card.tensors_sha256:
                raise damaged
            tensors = load_tensors(packed)
        except OSError as error:
            raise InvalidData(f"{folder} holds no adapter.", hint="Train one: pema-client train.") from error
        except ValueError as error:
            raise damaged from error
        try:
            candidate_ids_C, weight = tensors.pop("candidate_ids_C"), tensors.pop("head.weight")
            head = LMHead(weight, tensors.pop("head.bias", None), card.logit_scale, card.softcap)
            _check_vocabulary(card, candidate_ids_C, head)
            adapter = _empty_network(card, tensors)
            adapter.load_state_dict({_renamed(name, _PARAMETER_NAMES): value for name, value in tensors.items()})
        except (KeyError, RuntimeError, ValueError) as error:
            raise damaged from error
        if not all(value.isfinite().all() for value in (*tensors.values(), *head.parts())):
            raise damaged
        pairs = read_stored_pairs(folder / _PAIRS, card.pairs_digest) if card.nearest else []
        if pairs is None:
            raise damaged
        return cls(card, adapter.eval(), candidate_ids_C, head, pairs)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name of a parameter, or of a member's parameter, with its last part renamed."""
    owner, dot, last = name.rpartition(".")
    return f"{owner}{dot}{names.get(last, last)}"


def _empty_network(card: AdapterCard, tensors: Mapping[str, Tensor]) -> AdapterNetwork:
    """A network for the tensors of an adapter.

    Raises:
        KeyError: a member has no tensors.
        ValueError: the tensors have other sizes than the card says, so nothing was allocated.
    """

    def network(prefix: str, form: AdapterForm, rank: int) -> Adapter:
        if tensors[f"{prefix}A.weight"].shape != (rank, card.model.hidden_size):
            raise ValueError("the matrices have other sizes than the card says")
        return Adapter(card.model.hidden_size, rank, form)

    if not card.members:
        return network("", card.form, card.rank)
    members = [network(f"members.{k}.", member.form, member.rank) for k, member in enumerate(card.members)]
    return Ensemble(members, [member.weight for member in card.members])


def _check_vocabulary(card: AdapterCard, candidate_ids_C: Tensor, head: LMHead) -> None:
    """Require sorted candidate ids of the model, each with its row of the head.

    Raises:
        ValueError: the candidates or the rows do not match the card.
    """
    fits = (
        candidate_ids_C.dtype == torch.int64
        and candidate_ids_C.shape == (card.candidates,)
        and bool((candidate_ids_C.diff() > 0).all())
        and int(candidate_ids_C[0]) >= 0
        and int(candidate_ids_C[-1]) < card.model.vocab_size
        and head.weight_V_D.shape == (card.candidates, card.model.hidden_size)
        and (head.bias_V is None or head.bias_V.shape == (card.candidates,))
        and all(part.dtype == torch.float32 for part in head.parts())
    )
    if not fits:
        raise ValueError("the candidates are not those of the card")
