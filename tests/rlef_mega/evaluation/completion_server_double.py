"""A server that speaks OpenAI's completions as far as the client uses them, and samples one of some
responses by the request's seed. `mode` is what it is like:

    ids      vLLM and SGLang: it tells the ids that it read and sampled
    text     it refuses fields that OpenAI does not have, and tells its text alone
    extra    as text, but it puts a token of its own before the prompt
    flaky    as ids, but every third request fails with 503
    hang     no answer
"""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from rlef_mega.dialogues.chat import ChatFormat
from tests.rlef_mega.server_in_thread import ServerInThread

OWN_FIELDS = {"stop_token_ids", "return_token_ids", "skip_special_tokens"}


class CompletionServer(ServerInThread):
    def __init__(self, chat: ChatFormat, responses: Sequence[str], mode: str = "ids") -> None:
        super().__init__()
        self.chat, self.responses, self.mode = chat, responses, mode
        self.delay_s = 0.0
        self.requests: list[dict] = []
        self.most_tokens = 4096

    def __exit__(self, *error) -> None:
        self.mode = "gone"
        super().__exit__(*error)

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)

    @property
    def sampled(self) -> list[dict]:
        """The requests without those that try it out."""
        return [body for body in self.requests if body["max_tokens"] > 1]

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.most_tokens}]})

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        number = len(self.requests)
        while self.mode == "hang":
            await asyncio.sleep(0.02)
        await asyncio.sleep(self.delay_s)
        if self.mode == "flaky" and number % 3 == 0:
            return web.json_response({"error": "overloaded"}, status=503)
        foreign = OWN_FIELDS & body.keys()
        if self.mode in ("text", "extra") and foreign:
            error = f"Unrecognized request arguments: {', '.join(sorted(foreign))}"
            return web.json_response({"error": error}, status=400)
        said = self.responses[body["seed"] % len(self.responses)]
        ids = self.chat.respond(said)[: body["max_tokens"]]
        ended = ids[-1] == self.chat.end_of_turn
        choice = {
            "index": 0,
            "text": self.chat.decode(ids),
            "finish_reason": "stop" if ended else "length",
        }
        if self.mode in ("ids", "flaky"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
            choice["logprobs"] = {"token_logprobs": [-0.25] * len(ids)}
        read = len(body["prompt"]) + (self.mode == "extra")
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": read}})
