"""Settings of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Unit

from data_owner_client.adapter.types import AdapterForm
from data_owner_client.runtime.declared_settings import VARIED, require_in_bounds

Pairing = Literal["aligned", "reliable", "by_position"]
OLD_PAIRINGS: dict[str, Pairing] = {"sure": "reliable", "position": "by_position"}
"""Words of earlier versions, which flags accept and adapter cards may hold."""
_OF_CHOICE = frozenset({"retrieved_examples", "gate", "search", "members", "minutes", "selection_texts"})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training; the defaults need no tuning for memories of a thousand to some hundred thousand rows.

    Attributes:
        form: Form of the adapter's network. Default: `residual`, or `recent` for private contexts of which some are
            not reliable, or `paper` where representations are not in the LM head's space.
        rank: Rank R of the adapter's matrices, at most the model's hidden size.
        kappa: Weight κ of the reconstruction loss in the joint phase.
        learning_rate: Adam's learning rate at its peak, from which it falls to zero along a cosine.
        dropout: Probability with which a coordinate is dropped, in both phases.
        reconstruction_epochs: Passes of the first phase, reconstruction alone; 0 starts with joint training.
        epochs: Passes of the second phase, joint training, at most.
        patience: Epochs without a better validation likelihood after which the second phase ends.
        batch_rows: Rows of the memory in one step.
        ema_decay: Decay at each step of the exponential moving average of the second phase's weights, which becomes
            the adapter; 0 takes the last weights. The first steps use a smaller decay.
        pairing: Pairing of targets and contexts in private and redacted memories: all `aligned` ones, only the
            `reliable` ones, or `by_position` as in the paper. Default: of private memories the better of the first two
            on the validation memory, else `aligned`.
        retrieved_examples: Pairs of the memory, most similar to the text, that the PLM sees as examples. Default:
            chosen on the validation memory; none if the targets are private.
        gate: A learned gate, which predicts λ at each position, may replace a schedule of λ.
        search: Whole trainings with one changed setting at a time may replace the first one, while there is time;
            settings that you set yourself stay.
        members: Trainings whose distributions the adapter averages, at most: those of the search, and of both
            pairings. The validation memory decides. 1 for a single network.
        minutes: Minutes for all that is done: training, search, retrieved examples and decoded texts. What does not fit
            is left out and named. 0 for nothing but the training itself.
        selection_texts: Held-out texts that are decoded at most to choose λ by the task's headline metric; 0 chooses
            by likelihood alone.
        head_contexts: Contexts whose full distributions the LM head's rows are recovered from, if the owner's policy
            gives no rows. Default: enough to make the rows exact (a tenth more than the hidden size); fewer estimate.
        full_vocabulary: Softmax over all tokens, not only those of the targets; the adapter then holds the whole LM
            head.
        seed: Seed of initialisation, shuffling and dropout.
        device: Device to train on, such as `cpu` or `cuda:1`. Default: CUDA, in bfloat16, if there is CUDA, else the
            CPU.
    """

    form: Annotated[AdapterForm | None, VARIED] = None
    rank: Annotated[int, Ge(1), VARIED] = 512
    kappa: Annotated[float, Ge(0), Le(1), VARIED] = 0.2
    learning_rate: Annotated[float, Gt(0), VARIED] = 2e-3
    dropout: Annotated[float, Ge(0), Le(0.9), VARIED] = 0.2
    reconstruction_epochs: Annotated[int, Ge(0), Unit("epochs"), VARIED] = 2
    epochs: Annotated[int, Ge(1), Unit("epochs"), VARIED] = 12
    patience: Annotated[int, Ge(1), Unit("epochs")] = 6
    batch_rows: Annotated[int, Ge(1), Unit("rows")] = 512
    ema_decay: Annotated[float, Ge(0), Le(0.9999), VARIED] = 0.99
    pairing: Pairing | None = None
    retrieved_examples: Annotated[int, Ge(0), Unit("pairs")] | None = None
    gate: bool = True
    search: bool = True
    members: Annotated[int, Ge(1), Le(64), Unit("trainings")] = 4
    minutes: Annotated[float, Ge(0), Le(100_000), Unit("minutes")] = 15.0
    selection_texts: Annotated[int, Ge(0), Unit("texts")] = 100
    head_contexts: Annotated[int, Ge(2), Unit("contexts")] | None = None
    full_vocabulary: bool = False
    seed: Annotated[int, Ge(0), Le(2**31 - 1), VARIED] = 0
    device: str | None = None

    def __post_init__(self) -> None:
        require_in_bounds(self)

    @property
    def of_network(self) -> dict[str, bool | int | float | str | None]:
        """The settings of a single training, by name; the others say what else is tried, and how long."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_CHOICE}

    @property
    def makes_sense(self) -> bool:
        """True if form and pairing go together: reliable contexts leave nothing that recent tokens make up for."""
        return (self.form, self.pairing) != ("recent", "reliable")


DEFAULT_TRAINING = TrainingSettings()
