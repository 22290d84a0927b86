"""How SGLang lays weights out, on examples worked by hand; against real servers: tests/sglang."""

import hashlib

import pytest
import torch
from transformers import LlamaConfig

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang import weights as sglang_weights
from rlef_mega.engines.sglang.publication import buckets
from rlef_mega.engines.sglang.weights import (
    SentWeights,
    ServedModel,
    check_same_model,
    differing_parameters,
    gpu_checksum,
    served_name,
)

CONFIG = {
    "vocab_size": 70,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "architectures": ["LlamaForCausalLM"],
}
LAYER = "model.layers.0."


@pytest.fixture
def model(tmp_path) -> ServedModel:
    LlamaConfig(**CONFIG).save_pretrained(tmp_path)
    return ServedModel(tmp_path)


def weights_of(model: ServedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in model.shapes.items()}


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_checksums_are_those_of_fused_split_and_padded_parameters(model):
    weights = weights_of(model)
    sent = SentWeights(weights.items(), model, torch.float32, ranks=2)
    list(sent)
    q, k, v = (weights[f"{LAYER}self_attn.{n}_proj.weight"] for n in "qkv")
    gate, up, down = (weights[f"{LAYER}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    o, head = weights[f"{LAYER}self_attn.o_proj.weight"], weights["lm_head.weight"]
    padded = torch.cat([head, torch.zeros(58, 8)])  # 70 rows to 2 x 64
    for rank, found in enumerate(sent.checksums):
        rows, columns = slice(4 * rank, 4 * rank + 4), slice(3 * rank, 3 * rank + 3)
        # one head of keys and values for two ranks: both have it
        assert found[f"{LAYER}self_attn.qkv_proj.weight"] == sha(torch.cat([q[rows], k, v]))
        assert found[f"{LAYER}self_attn.o_proj.weight"] == sha(o[:, rows])
        halves = torch.cat([gate[columns], up[columns]])
        assert found[f"{LAYER}mlp.gate_up_proj.weight"] == sha(halves)
        assert found[f"{LAYER}mlp.down_proj.weight"] == sha(down[:, columns])
        assert found["lm_head.weight"] == sha(padded[64 * rank : 64 * rank + 64])
        assert found["model.norm.weight"] == sha(weights["model.norm.weight"])


def test_parts_of_a_parameter_may_come_in_any_order_and_are_not_copied(model):
    weights = weights_of(model)
    straight = SentWeights(weights.items(), model, torch.float32, ranks=1)
    reversed_order = SentWeights(reversed(weights.items()), model, torch.float32, ranks=1)
    sent = {name: tensor for bucket in buckets(reversed_order, 300) for name, tensor in bucket}
    assert all(sent[n].data_ptr() == weights[n].data_ptr() for n, _ in straight)
    assert differing_parameters(straight.checksums, reversed_order.checksums) == ""


def test_buckets_keep_to_their_size(model):
    weights = weights_of(model)
    sent = SentWeights(weights.items(), model, torch.float32, ranks=1)
    sizes = [[tensor.nbytes for _, tensor in bucket] for bucket in buckets(sent, 600)]
    assert sum(map(sum, sizes)) == sum(t.nbytes for t in weights.values()) and len(sizes) > 2
    assert all(sum(bucket) <= 600 or len(bucket) == 1 for bucket in sizes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing.*model.norm.weight"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(1)}), "no weight model.extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(9)}),
            r"shape \[9\] instead of \[8\]",
        ),
    ],
)
def test_what_is_not_the_servers_model_is_not_sent(model, change, reason):
    weights = weights_of(model)
    change(weights)
    with pytest.raises(EngineError, match=reason):
        list(SentWeights(weights.items(), model, torch.float32, ranks=1))


def test_tied_weights_are_sent_once(tmp_path):
    LlamaConfig(**CONFIG, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = ServedModel(tmp_path)
    sent = SentWeights(weights_of(model).items(), model, torch.float32, ranks=1)
    assert "lm_head.weight" not in dict(sent)
    assert "lm_head.weight" not in sent.checksums[0]


GPU_HASHES = {  # by SGLang 0.5.23's kernel in Triton's interpreter, of 0, 1, 2, ...
    (torch.float32, 1): "3d93a6540b54ef2a",
    (torch.bfloat16, 7): "6acd222320afb5c2",
    (torch.float32, 8193): "a41ee57619aa30ab",
    (torch.int32, 85000): "ed36bfe30c26797a",
}


@pytest.mark.parametrize(("dtype", "count"), GPU_HASHES)
def test_a_gpus_checksum_is_that_of_sglangs_kernel(dtype, count, monkeypatch):
    tensor = torch.arange(count).to(dtype)
    assert gpu_checksum([tensor]) == GPU_HASHES[dtype, count]
    monkeypatch.setattr(sglang_weights, "WORDS_AT_ONCE", 2 * sglang_weights.TILE_WORDS)
    assert gpu_checksum(tensor.chunk(3)) == GPU_HASHES[dtype, count]
    assert gpu_checksum([torch.cat([tensor[:1], tensor])[1:]]) == GPU_HASHES[dtype, count]


def test_a_gpus_checksum_tells_an_exchanged_a_missing_and_a_changed_word():
    words = torch.arange(3 * sglang_weights.TILE_WORDS, dtype=torch.int32)
    found = {gpu_checksum([words]), gpu_checksum([words[:-1]]), gpu_checksum([words[1:]])}
    first, last = words[0].item(), words[-1].item()
    for at, word in ((0, 1), (-1, last ^ 2**30)):
        changed = words.clone()
        changed[at] = word
        found.add(gpu_checksum([changed]))
    for other in (1, sglang_weights.TILE_WORDS, -1):  # in the first tile, in other ones
        exchanged = words.clone()
        exchanged[0], exchanged[other] = words[other].item(), first
        found.add(gpu_checksum([exchanged]))
    assert len(found) == 8


def test_one_different_bit_is_named():
    ours, theirs = (
        [{"a": "0", "b": "1"}] * 2,
        [{"a": "0", "b": "1"}, {"a": "0", "b": "2", "c": "3"}],
    )
    assert differing_parameters(ours, theirs) == "b (rank 1), c (rank 1)"
    assert "1 tensor-parallel ranks instead of 2" in differing_parameters(ours, theirs[:1])


def test_a_folder_of_another_model_is_refused(tmp_path, model):
    other = tmp_path / "other"
    LlamaConfig(**{**CONFIG, "hidden_size": 16}).save_pretrained(other)
    with pytest.raises(ValueError, match="hidden_size = 16 there, 8 here"):
        check_same_model(tmp_path, other)
    with pytest.raises(ValueError, match="same path of a shared file system"):
        check_same_model(tmp_path, tmp_path / "absent")


def test_names_of_fused_parameters():
    assert served_name(f"{LAYER}self_attn.k_proj.bias") == (f"{LAYER}self_attn.qkv_proj.bias", 1, 3)
    assert served_name(f"{LAYER}mlp.up_proj.weight") == (f"{LAYER}mlp.gate_up_proj.weight", 1, 2)
    assert served_name("model.norm.weight") == ("model.norm.weight", 0, 1)
