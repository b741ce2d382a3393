"""Full fine-tuning: all weights of the PLM, the upper bound where neither weights nor resources are a limit."""

from __future__ import annotations

from pathlib import Path

from benchmarks.weights.trainee import Outcome, Trainee
from plm_owner_server.engines.transformers.engine import load_model

_RATES = (1e-5, 3e-5, 1e-4)


def prepare(folder: Path) -> Trainee:
    """The PLM, of which every weight is trained."""
    model = load_model(folder, device="cpu", dtype="float32")
    what = "all weights of the PLM trained, which needs them"
    return Trainee(model=model, rates=_RATES, outcomes={"full": Outcome(what, lambda: model)})
