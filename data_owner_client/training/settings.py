"""What can be set in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_owner_client.adapter.types import AdapterForm

Pairing = Literal["aligned", "reliable", "by_position"]
OLD_PAIRINGS: dict[str, Pairing] = {"sure": "reliable", "position": "by_position"}
"""Words of earlier versions, which flags accept and adapter cards may hold."""


@dataclass(frozen=True)
class TrainingSettings:
    """What can be set; the defaults need no tuning for memories of a thousand to some hundred thousand rows.

    Attributes:
        form: of the adapter; None for what measures better: `residual`, or `recent` with private contexts of which some
            are not reliable; `paper` where the representations are not in the LM head's space.
        rank: R; at most the model's hidden size.
        kappa: κ, weight of the reconstruction loss in the joint phase.
        learning_rate: Adam's, at its peak; it falls to zero along a cosine.
        dropout: probability, on all the time.
        reconstruction_epochs: passes of phase 1.
        epochs: passes of phase 2, at most.
        patience: epochs without a better validation likelihood after which phase 2 ends.
        batch_rows: rows of a step.
        ema_decay: decay at each step of the exponential moving average of phase 2's weights, which is the adapter.
            The first steps use a smaller decay, so that short trainings forget their start. 0 for the last weights.
        pairing: of targets and contexts in private memories: `aligned` (`memory.alignment`), only the
            `reliable` ones of these, or `by_position`, as in the paper. None to train with the first two and keep that
            which finds the held-out targets of reliable contexts likelier.
        nearest: pairs of the memory, those most like the text at hand, that the PLM sees as examples in its prompt,
            while the adapter sees the task's own; None to choose between none and some on the validation memory.
        gate: whether a gate that predicts λ at each position may take the place of a schedule.
        minutes: to look for better settings than these, by whole trainings with one change at a time (form, rank, κ,
            learning rate, dropout: those that are at their defaults); 0 not to. With it, how many are tried
            depends on the machine's speed.
        decoded: held-out texts that are decoded with several interpolations, of which the one with the highest chrF is
            taken; 0 to take the likeliest interpolation.
        distributions: contexts whose full distributions the LM head's rows are worked out from, where the owner gives
            none (head policy `none`); None for as many as make the rows exact.
        full_vocabulary: let the adapter's softmax run over all of V; else over the tokens of the memory's targets.
        seed: of initialisation, shuffling and dropout.
        device: where to train; None for CUDA, in bfloat16, where there is CUDA, else the CPU.
    """

    form: AdapterForm | None = None
    rank: int = 512
    kappa: float = 0.2
    learning_rate: float = 2e-3
    dropout: float = 0.2
    reconstruction_epochs: int = 2
    epochs: int = 12
    patience: int = 3
    batch_rows: int = 512
    ema_decay: float = 0.99
    pairing: Pairing | None = None
    nearest: int | None = None
    gate: bool = True
    minutes: float = 5.0
    decoded: int = 100
    distributions: int | None = None
    full_vocabulary: bool = False
    seed: int = 0
    device: str | None = None

    @property
    def makes_sense(self) -> bool:
        """Whether form and pairing go together: reliable contexts leave nothing that recent tokens make up for."""
        return (self.form, self.pairing) != ("recent", "reliable")
