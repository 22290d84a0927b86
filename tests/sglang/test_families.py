"""Other layouts of weights in a real server: biases, norms of queries and keys, a tied
embedding, and two tensor-parallel ranks."""

import asyncio

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlef_mega.config import ServersConfig
from rlef_mega.dialogues.chat import CONTROLS
from rlef_mega.engines import GenerationRequest
from rlef_mega.engines.sglang.engine import SGLangEngine
from rlef_mega.engines.sglang.processes import ServerProcesses
from rlef_mega.types import Sampling
from tests.rlef_mega.dialogues.test_chat import byte_tokenizer
from tests.sglang.conftest import PYTHON, VOCABULARY, free_ports
from tests.sglang.test_servers import TOLERANCE, WAYS, change, gap

pytestmark = [pytest.mark.sglang, pytest.mark.slow]  # each starts a server
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {  # model, config, tensor-parallel ranks
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True), 1),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32), 1),
    "two ranks": (LlamaForCausalLM, LlamaConfig(**SHAPE), 2),
}


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang; `make test-sglang` makes it")
@pytest.mark.parametrize("case", CASES)
def test_weights_arrive_and_are_verified(case, tmp_path, monkeypatch):
    torch.manual_seed(0)
    kind, config, ranks = CASES[case]
    if ranks > 1:  # which cores each rank uses; SGLang requires it
        monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    model = kind(config)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(CONTROLS["chatml"]).save_pretrained(tmp_path / "model")
    asked = ServersConfig(
        python=str(PYTHON),
        port=free_ports(1),
        device="cpu",
        memory_fraction=0.05,
        tensor_parallel_size=ranks,
        arguments=("--max-total-tokens", "5000"),
        ready_s=300,
    )
    logs, prompt = tmp_path / "logs", list(range(10, 40))

    async def ask(engine: SGLangEngine):
        async with engine.session() as session:
            return await session(GenerationRequest(tuple(prompt), Sampling(40), 1))

    with ServerProcesses(
        asked, tmp_path / "model", dtype="float32", context_length=500, logs=logs
    ) as servers:
        for way in WAYS:
            change(model, seed=1)
            folder = tmp_path / "weights"
            reached = ServersConfig(urls=servers.urls, publish=way)
            with SGLangEngine(
                reached, tmp_path / "model", weights_folder=folder, logs=logs
            ) as engine:
                engine.update_weights(model.state_dict().items(), 1)
                answer = asyncio.run(ask(engine))
                assert gap(model, prompt, answer) < TOLERANCE
