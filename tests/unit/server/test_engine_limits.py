"""Models that the engine refuses, values that it refuses, and placements that change nothing."""

from __future__ import annotations

import pytest
import torch

from harness.tiny_models import TinyModels
from plm_owner_server.engines.interface import EncodeBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from protocol.errors import NumericalFault, Unsupported
from protocol.messages import EncodeRequest
from tests.support import make_service, random_ids


def test_warm_up_refuses_unknown_changes_of_the_logits(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models["llama"], device="cpu", dtype="float32")
    engine = TransformersEngine(model, cr_kind="last_hidden_state")
    engine.warm_up()
    model.lm_head.register_forward_hook(lambda *args: args[2] * 1.01)
    with pytest.raises(Unsupported, match="not head"):
        engine.warm_up()


def test_a_device_map_changes_nothing_but_where_the_layers_are(tiny_models: TinyModels) -> None:
    batch = EncodeBatch(random_ids(19, [30, 90], shared=80), [0, 81])
    plain, spread = (
        TransformersEngine(
            load_model(tiny_models["gemma3"], device="cpu", dtype="float32", device_map=device_map),
            cr_kind="last_hidden_state",
        )
        for device_map in (None, "auto")
    )
    assert torch.equal(spread.encode(batch).cr_N_D, plain.encode(batch).cr_N_D)


def test_warm_up_refuses_a_model_that_is_not_finite(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models["llama"], device="cpu", dtype="float32")
    engine = TransformersEngine(model, cr_kind="last_hidden_state")
    with torch.no_grad():
        model.base_model.norm.weight[0] = torch.nan
    with pytest.raises(Unsupported):
        engine.warm_up()


def test_what_does_not_fit_the_wire_dtype_is_a_numerical_fault_with_counts(tiny_models: TinyModels) -> None:
    def enlarge(engine: TransformersEngine) -> TransformersEngine:
        with torch.no_grad():
            engine._model.base_model.norm.weight[3] = 1e9  # float16 ends at 65504
        return engine

    service = make_service(tiny_models["llama"], wrap=enlarge)
    request = {"token_ids": [[5, 6, 7]], "from_position": [1]}
    with pytest.raises(NumericalFault, match="2 of 64 values"):
        service.encode(EncodeRequest(**request, dtype="float16"))
    assert service.encode(EncodeRequest(**request, dtype="float32")).cr_N_D.abs().max() > 65504


def test_models_without_a_head_on_a_decoder_are_refused() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(Unsupported, match="decoder"):
        TransformersEngine(transformers.T5ForConditionalGeneration(config), cr_kind="last_hidden_state")
