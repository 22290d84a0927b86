"""A server with the part of SGLang's HTTP API that publishes weights, on a device, in a process of
its own: python -m tests.null_gpu.serving_process MODEL DEVICE. Prints its address; ends with stdin.

It receives as SGLang does: a folder, a broadcast over NCCL, or tensors that CUDA IPC maps. It keeps
what it received under Hugging Face's names, and reports checksums of its own copies."""

import asyncio
import base64
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d

from rlef_mega.engines.sglang.weights import SentWeights, ServedModel
from tests.rlef_mega.engines.sglang.server_double import ServerDouble

CACHE_BYTES = 2**30


class ServerOnDevice(ServerDouble):
    def __init__(self, model: str, device: torch.device) -> None:
        super().__init__(0, model, version="default")
        self.device, self.served = device, ServedModel(Path(model))
        self.weights: dict[str, torch.Tensor] = {}

        self.occupy()

    def occupy(self) -> None:
        """Allocate the cache of keys and values."""
        self.cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=self.device)

    def load(self, weights) -> None:
        self.weights |= {name: tensor.to(self.device, copy=True) for name, tensor in weights}

    async def server_info(self, body):
        return {**await super().server_info(body), "device": "cuda"}

    async def update_weights_from_disk(self, body):
        for file in Path(body["model_path"]).glob("*.safetensors"):
            self.load(load_file(file).items())
        self.weight_version = body["weight_version"]
        return {"success": True}

    async def release_memory_occupation(self, body):
        await super().release_memory_occupation(body)
        self.cache = None
        self.weights.clear()
        torch.cuda.empty_cache()
        return {}

    async def resume_memory_occupation(self, body):
        await super().resume_memory_occupation(body)
        if "kv_cache" in body["tags"]:
            self.occupy()
        return {}

    async def begin_weight_update(self, body):
        return {"success": True}

    async def end_weight_update(self, body):
        return {"success": True}

    async def flush_cache(self, body):
        return {}

    async def init_weights_update_group(self, body):
        def join() -> None:
            torch.cuda.set_device(self.device)
            store = dist.TCPStore(
                body["master_address"], body["master_port"], body["world_size"], is_master=False
            )
            name = body["group_name"]
            self.group, _ = c10d._new_process_group_helper(
                body["world_size"],
                body["rank_offset"],
                [],
                dist.Backend(body["backend"]),
                dist.PrefixStore(name, store),
                group_name=c10d.GroupName(name),
                timeout=timedelta(seconds=60),
            )
            world = range(body["world_size"])
            c10d._world.pg_group_ranks[self.group] = {rank: rank for rank in world}

        await asyncio.to_thread(join)
        return {"success": True}

    async def update_weights_from_distributed(self, body):
        def receive() -> None:
            torch.cuda.set_device(self.device)
            kinds = [getattr(torch, dtype) for dtype in body["dtypes"]]
            named = zip(body["names"], body["shapes"], kinds, strict=True)
            parts = [(name, torch.empty(shape, dtype=kind)) for name, shape, kind in named]
            data = torch.empty(
                sum(part.nbytes for _, part in parts), dtype=torch.uint8, device=self.device
            )
            dist.broadcast(data, group=self.group, group_src=0)
            torch.cuda.synchronize()
            start = 0
            for name, part in parts:
                chunk = data[start : start + part.nbytes]
                self.load([(name, chunk.view(part.dtype).view(part.shape))])
                start += part.nbytes

        await asyncio.to_thread(receive)
        return {"success": True}

    async def update_weights_from_tensor(self, body):
        (handle,) = body["serialized_named_tensors"]
        self.load(pickle.loads(base64.b64decode(handle)))
        torch.cuda.synchronize()
        return {"success": True}

    async def weights_checker(self, body):
        sent = SentWeights(self.weights.items(), self.served, torch.float32, ranks=1, device="cuda")
        list(sent)
        (checksums,) = sent.checksums
        return {"ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": checksums}]}


if __name__ == "__main__":
    with ServerOnDevice(sys.argv[1], torch.device(sys.argv[2])) as server:
        print(server.url, flush=True)
        sys.stdin.read()
