"""A server with the part of SGLang's HTTP API that the client uses, which fails on command."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import torch
from aiohttp import web
from safetensors.torch import load_file

from rlef_mega.engines.sglang.weights import SentWeights, ServedModel
from tests.rlef_mega.server_in_thread import ServerInThread


class ServerDouble(ServerInThread):
    """Samples ids that count upwards from its number times 100. `mode` is its reaction to requests:
    answer (changed by `spoil`), hang, or drop the connection. When it hangs, only the HTTP process
    answers. A paused server is not healthy."""

    def __init__(self, number: int, model: str, version: str = "3") -> None:
        super().__init__()
        self.number, self.model, self.weight_version = number, model, version
        self.sglang, self.checksums = "0.5.23", {}
        self.mode, self.spoil, self.delay_s = "answer", lambda said: None, 0.0
        self.end_of_text, self.paused, self.released = None, False, set()
        self.prompts: list[list[int]] = []
        self.under_way: dict[str, asyncio.Event] = {}  # by request id; set when it is aborted
        self.aborted: list[str] = []
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.now, self.most_at_once = 0, 0
        self.next_id = 100 * number

    def routes(self, app: web.Application) -> None:
        app.router.add_route("*", "/{path}", self.handle)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.calls[path] += 1
        self.order.append(path)
        if self.mode == "hang" and path != "model_info":
            while self.mode == "hang":
                await asyncio.sleep(0.02)
        if self.mode == "drop":
            request.transport.close()
            return web.Response()
        if path == "health" and self.paused:
            return web.Response(status=503)
        body = await request.json() if request.can_read_body else {}
        return web.json_response(await getattr(self, path)(body))

    async def server_info(self, body):
        return {
            "version": self.sglang,
            "dtype": "float32",
            "device": "cpu",
            "tp_size": 1,
            "max_req_input_len": 194,
            "model_path": self.model,
            "internal_states": [{"weight_version": self.weight_version}],
        }

    async def model_info(self, body):
        return {"weight_version": self.weight_version}

    async def health(self, body):
        return {}

    async def pause_generation(self, body):
        self.paused = True
        return {}

    async def release_memory_occupation(self, body):
        assert self.paused and not self.released & set(body["tags"])  # or a real one dies
        self.released |= set(body["tags"])
        self.order += [f"release {tag}" for tag in body["tags"]]
        return {}

    async def resume_memory_occupation(self, body):
        assert set(body["tags"]) <= self.released  # or a real one dies
        self.released -= set(body["tags"])
        self.order += [f"occupy {tag}" for tag in body["tags"]]
        return {}

    async def continue_generation(self, body):
        assert not self.released
        self.paused = False
        return {}

    async def update_weights_from_disk(self, body):
        assert "weights" not in self.released
        self.weight_version = body["weight_version"]
        (file,) = Path(body["model_path"]).glob("*.safetensors")
        model = ServedModel(Path(body["model_path"]))
        sent = SentWeights(load_file(file).items(), model, torch.float32, ranks=1)
        list(sent)
        (self.checksums,) = sent.checksums
        return {"success": True}

    async def update_weight_version(self, body):
        self.weight_version = body["new_version"]
        return {"success": True}

    async def weights_checker(self, body):
        checksums = dict(self.checksums)
        return {"ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": checksums}]}

    async def abort_request(self, body):
        self.aborted.append(body["rid"])
        if body["rid"] in self.under_way:
            self.under_way[body["rid"]].set()
        return {}

    async def generate(self, body):
        self.prompts.append(body["input_ids"])
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        aborted = self.under_way[body["rid"]] = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(aborted.wait(), self.delay_s)
        del self.under_way[body["rid"]]
        self.now -= 1
        count = body["sampling_params"]["max_new_tokens"]
        ids = list(range(self.next_id, self.next_id + count))
        reason = "length"
        if self.end_of_text in ids:  # SGLang stops there even if the request does not say so
            ids, reason = ids[: ids.index(self.end_of_text) + 1], "stop"
        self.next_id += len(ids)
        version = {"version": self.weight_version, "start": 0, "end": len(ids)}
        said = {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": reason},
                "output_token_logprobs": [[-0.5, id, None] for id in ids],
                "weight_versions": [version],
                "cached_tokens": 2,
            },
        }
        self.spoil(said)
        return said
