"""Transformer Engine's layer spec and name map, with stand-ins for its modules.

The real ones need a GPU and were never run. The stand-ins compute the same in PyTorch and keep
parameters where the real ones do (the norm's weight beside the product's). So these tests cover our
part: which module replaces which, and which names weights have in files and checkpoints. They
cannot show that the real modules accept our arguments.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import megatron.core.extensions.transformer_engine as wrappers
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from transformers import LlamaConfig, Qwen3Config

from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.network import packed_llama
from rlef_mega.megatron.network.accelerations import Accelerations
from rlef_mega.megatron.network.attention import PackedAttention
from rlef_mega.megatron.parallel import Ranks
from tests.rlef_mega.megatron.megatron_worker import make_batch, make_learner, make_model, one_batch

ENGINE = Accelerations("transformer-engine", "transformer_engine", False, False)


class Norm(packed_llama.RMSNorm):
    pass


class NormedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.epsilon = config.layernorm_epsilon

    def forward(self, hidden):
        weight = self.layer_norm_weight
        return super().forward(
            torch.nn.functional.rms_norm(hidden, weight.shape, weight, self.epsilon)
        )


class PlainRowParallelLinear(RowParallelLinear):
    pass


class Attention(PackedAttention):
    def forward(self, *args, packed_seq_params, **options):
        frequencies_E = self.frequencies_E
        self.frequencies_E = torch.zeros_like(frequencies_E)  # the wrapper has turned them already
        output = super().forward(*args, packed_seq_params=packed_seq_params, **options)
        self.frequencies_E = frequencies_E
        return output


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Our module imported over the stand-ins, and chosen."""
    monkeypatch.setattr(wrappers, "TENorm", Norm)
    monkeypatch.setattr(wrappers, "TELayerNormColumnParallelLinear", NormedColumnParallelLinear)
    monkeypatch.setattr(wrappers, "TERowParallelLinear", PlainRowParallelLinear)
    monkeypatch.setattr(wrappers, "TEDotProductAttention", Attention)
    monkeypatch.delitem(sys.modules, "rlef_mega.megatron.network.transformer_engine", raising=False)
    yield monkeypatch
    sys.modules.pop("rlef_mega.megatron.network.transformer_engine", None)


def test_every_module_of_a_layer_is_the_engines(engine: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("rlef_mega.megatron.network.transformer_engine")
    for config, qk_norm in ((LlamaConfig(), IdentityOp), (Qwen3Config(), Norm)):
        layer = ours.with_transformer_engine(packed_llama.layer_spec(config)).submodules
        attention, feed_forward = layer.self_attention.submodules, layer.mlp.submodules
        assert layer.input_layernorm is layer.pre_mlp_layernorm is IdentityOp
        assert attention.linear_qkv is feed_forward.linear_fc1 is NormedColumnParallelLinear
        assert attention.linear_proj is feed_forward.linear_fc2 is PlainRowParallelLinear
        assert attention.q_layernorm is attention.k_layernorm is qk_norm
        assert issubclass(attention.core_attention, Attention)


def test_layers_of_the_engine_train_and_are_saved_as_local_ones(
    engine: pytest.MonkeyPatch, ranks: Ranks, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    batch = make_batch(8)
    local = make_learner(ranks, tmp_path / "model")
    expected = one_batch(local, batch, seed=1)
    engine.setattr(packed_llama, "choose", lambda *arguments: ENGINE)
    fused = make_learner(ranks, tmp_path / "model")
    names = [name for name, _ in fused.policy.chunks[0].named_parameters()]
    assert sum("layer_norm_weight" in name for name in names) == 8  # two a layer
    found = one_batch(fused, batch, seed=1)
    for name, value in expected["scores"].items():
        torch.testing.assert_close(found["scores"][name], value, rtol=0, atol=1e-5)
    assert found["stats"] == pytest.approx(expected["stats"], rel=1e-4, abs=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()

    # a checkpoint of either is one of the other's
    checkpoints = Checkpoints(tmp_path / "run", fused, keep=1)
    checkpoints.save(1, {})
    checkpoints.finish()
    Checkpoints(tmp_path / "run", local, keep=1).resume()
    for name, value in local.policy_weights():
        assert torch.equal(value, found["weights"][name]), name
    again, went_on = one_batch(local, batch, seed=2), one_batch(fused, batch, seed=2)
    assert went_on["stats"] == pytest.approx(again["stats"], rel=1e-4, abs=1e-6)
