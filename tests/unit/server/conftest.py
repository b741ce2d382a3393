"""Models, engines and services of the tests of the engine over transformers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.tiny_models import TELLING, TinyModels
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.service.plm_service import PlmService
from tests import support
from tests.support import make_service
from tests.transformers_engine import Truth


@pytest.fixture(scope="module", params=TELLING)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(architecture: str, tiny_models: TinyModels) -> PreTrainedModel:
    return load_model(tiny_models[architecture], device=support.device, dtype="float32")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> TransformersEngine:
    return TransformersEngine(model, cr_kind="last_hidden_state")


@pytest.fixture(scope="module")
def service(architecture: str, tiny_models: TinyModels) -> PlmService:
    return make_service(tiny_models[architecture])


@pytest.fixture(scope="module")
def truth(model: PreTrainedModel) -> Truth:
    """Last hidden states [T, D] and logits [T, V] of one sequence, from the whole model, on the CPU."""

    @torch.inference_mode()
    def run(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        input_ids = torch.tensor([list(ids)], device=model.device)
        output = model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1][0].cpu(), output.logits[0].cpu()

    return run
