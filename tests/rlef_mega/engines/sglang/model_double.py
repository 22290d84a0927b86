"""A server with SGLang's HTTP interface that samples from a real model, in a thread."""

import asyncio
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlef_mega.engines import GenerationRequest
from rlef_mega.engines.local import LocalEngine
from rlef_mega.engines.sglang.weights import SentWeights, ServedModel
from rlef_mega.types import Sampling
from tests.rlef_mega.engines.sglang.server_double import ServerDouble


class ModelDouble(ServerDouble):
    """Serves one request or weight update at a time, and stamps tokens with its weights'
    version."""

    longest_request = 316

    def __init__(self, number: int, model: Path) -> None:
        super().__init__(number, str(model), version="default")
        self.served = ServedModel(model)
        self.engine = LocalEngine(model, dtype="float32")
        self.busy = threading.Lock()

    async def server_info(self, body):
        return {**await super().server_info(body), "max_req_input_len": self.longest_request}

    async def update_weights_from_disk(self, body):
        (file,) = Path(body["model_path"]).glob("*.safetensors")

        def update() -> None:
            with self.busy:
                self.engine.update_weights(
                    load_file(file).items(), version=int(body["weight_version"])
                )

        await asyncio.to_thread(update)
        return await super().update_weights_from_disk(body)

    async def weights_checker(self, body):
        sent = SentWeights(
            self.engine.model.state_dict().items(), self.served, torch.float32, ranks=1
        )
        list(sent)
        (checksums,) = sent.checksums
        return {"ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": checksums}]}

    async def generate(self, body):
        asked = body["sampling_params"]
        sampling = Sampling(
            asked["max_new_tokens"], asked["temperature"], 1.0, tuple(asked["stop_token_ids"])
        )
        request = GenerationRequest(tuple(body["input_ids"]), sampling, asked["sampling_seed"])

        def answer():
            with self.busy:
                (completion,) = self.engine.generate([request])
                return completion

        completion = await asyncio.to_thread(answer)
        ids = completion.token_ids
        version = {"version": str(completion.weight_versions[0]), "start": 0, "end": len(ids)}
        logprobs = zip(completion.logprobs, ids, strict=True)
        return {
            "output_ids": list(ids),
            "meta_info": {
                "finish_reason": {"type": completion.finish_reason},
                "output_token_logprobs": [[logprob, token, None] for logprob, token in logprobs],
                "weight_versions": [version],
                "cached_tokens": 0,
            },
        }
