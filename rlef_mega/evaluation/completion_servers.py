"""The engine for servers that speak OpenAI's completions (`POST /v1/completions`: vLLM, SGLang,
llama.cpp and others), for evaluation: token ids in, and whatever the server tells of its answer.

Theory of operation. An event loop in a thread of its own (`openai-client`) holds the connections,
as the rollouts' loops come and go. A dialogue's requests go to one of the servers, dealt in turn;
what fails (no connection, 429, 5xx) is sent to the next one, more and more slowly, until
`deadline_s`; then the dialogue has an EngineError, is started again once, and dropped and counted.

Opening asks each server for one token, in a request with the extensions of vLLM and SGLang
(`stop_token_ids`, `return_token_ids`), and where that is refused in a plain one. What follows is
said in `facts`, which an evaluation records:

- A server that returns ids is token-in token-out. One that returns text alone is not: the text is
  encoded again, and the dialogue goes on with those ids.
- That it read the ids which were sent is checked on every answer, by its `prompt_token_ids`, or by
  its count of them, or not at all, if it says neither.
- Its weights are not known to be those of the folder, and that it obeys seed and top-p is not
  checked. Weights cannot be brought to it, so nothing is trained with it.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp
import torch

from rlef_mega.dialogues.chat import ChatFormat, encode_plain
from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.http import CONNECT_S, new_http_session, reason_of
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.types import Completion, Sampling

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
OPEN_S = 120.0
MOST_STOPS = 4  # strings, as OpenAI allows
PASSING = {408, 409, 425, 429, *range(500, 600)}  # another try may do


class RefusedError(ValueError):
    """A request that any other try would have refused too."""


class OpenAISession:
    """One dialogue's place: its turns go to one server as long as that answers."""

    def __init__(self, engine: "OpenAIEngine", place: int) -> None:
        self.engine, self.place = engine, place

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """ValueError for what the server refuses as wrong, EngineError if none answered in time."""
        if not token_ids:
            raise ValueError("the prompt is empty; give at least a begin-of-text token")
        asked = self.engine.ask(self, list(token_ids), sampling, seed)
        return await asyncio.wrap_future(self.engine.thread.submit(asked))


class OpenAIEngine(LivesInLoop):
    """Samples on the servers at `urls` (without `/v1`); a context manager, which checks them as it
    opens.

    `chat` is of the folder that the servers' model came from, `model` its name there (else the
    first that they list). `context` is the longest dialogue that will be asked for.
    """

    def __init__(
        self,
        urls: Sequence[str],
        chat: ChatFormat,
        *,
        model: str | None = None,
        api_key: str | None = None,
        context: int = 0,
        deadline_s: float = 1800.0,
    ) -> None:
        if not urls:
            raise ValueError("no completion servers given")
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.chat, self.model, self.context = chat, model, context
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.deadline_s = deadline_s
        self.weight_version = 0
        self.extended = True
        self.facts: dict[str, Any] = {}
        self.opened = count()
        super().__init__("openai-client")

    async def shut(self) -> None:
        await self.http.close()

    # -------------------------------------------------------------------- opening

    async def open(self) -> None:
        """ValueError unless every server answers, and in one way."""
        self.http: aiohttp.ClientSession = new_http_session()
        try:
            for url in self.urls:
                await self.find_model(url)
            told = [await self.try_out(url) for url in self.urls]
        except EngineError as error:
            raise ValueError(str(error)) from None
        if any(facts != told[0] for facts in told):
            raise ValueError(f"the servers {', '.join(self.urls)} answer in different ways: {told}")
        self.facts = {"model": self.model, **told[0], "seed": "sent, not checked"}

    async def find_model(self, url: str) -> None:
        """What the server lists must hold the name, and room for the dialogues."""
        listed = (await self.call(url, "/v1/models", None)).get("data") or []
        known = {str(entry.get("id")): entry for entry in listed if isinstance(entry, dict)}
        self.model = self.model or next(iter(known), None)
        if self.model not in known:
            raise ValueError(
                f"{url} has no model {self.model!r}, but {', '.join(known) or 'none'}; "
                "name one of these with --served-model"
            )
        room = known[self.model].get("max_model_len")
        if isinstance(room, int) and room < self.context:
            raise ValueError(
                f"{url} has room for {room} tokens, and dialogues may have {self.context}; "
                "lower --max-context, or start it with a longer context"
            )

    async def try_out(self, url: str) -> dict[str, Any]:
        """One token, to see what the server takes and tells."""
        prompt, one = self.chat.open("Hello"), Sampling(1, stop_token_ids=(self.chat.end_of_turn,))
        try:
            said = await self.call(url, "/v1/completions", self.body(prompt, one, 0))
        except RefusedError:
            self.extended = False
            said = await self.call(url, "/v1/completions", self.body(prompt, one, 0))
        choice = only_choice(url, said)
        ids, log_probs = choice.get("token_ids"), said_log_probs(choice)
        self.read(url, said, prompt, one)
        return {
            "token_ids": "as sampled" if ids else "its text, encoded again",
            "prompts": prompts_checked(said, choice),
            "log_probs": "as it says" if log_probs else "none",
            "weights": "not checked",
        }

    # ------------------------------------------------------------------- requests

    async def ask(
        self, session: OpenAISession, prompt: list[int], sampling: Sampling, seed: int
    ) -> Completion:
        body = self.body(prompt, sampling, seed)
        clock = asyncio.get_running_loop().time
        until_s, pause_s = clock() + self.deadline_s, FIRST_PAUSE_S
        while True:
            url = self.urls[session.place % len(self.urls)]
            try:
                said = await self.call(url, "/v1/completions", body, within_s=until_s - clock())
                return self.read(url, said, prompt, sampling)
            except EngineError as error:
                if clock() + pause_s >= until_s:
                    raise EngineError(f"no answer in {self.deadline_s:.0f} s: {error}") from None
            session.place += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def body(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        stops = list(sampling.stop_token_ids)
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**31,  # what all of them take
            "logprobs": 1,
        }
        if self.extended:
            own = {"stop_token_ids": stops, "return_token_ids": True, "skip_special_tokens": False}
            return asked | own
        return asked | {"stop": self.stop_texts(stops)}

    def stop_texts(self, stops: Sequence[int]) -> list[str]:
        return [str(self.chat.tokenizer.decode([stop])) for stop in stops][:MOST_STOPS]

    async def call(
        self, url: str, path: str, body: Mapping[str, Any] | None, *, within_s: float = OPEN_S
    ) -> dict[str, Any]:
        """The answer's object. RefusedError for a request that is wrong, EngineError for what may
        go better another time."""
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_S)
        method = "GET" if body is None else "POST"
        try:
            async with self.http.request(
                method, url + path, json=body, headers=self.headers, timeout=timeout
            ) as response:
                status, text = response.status, await response.text(errors="replace")
                if status == 200:
                    said = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise EngineError(f"{url}{path}: {reason_of(error)}") from None
        if status in PASSING:
            raise EngineError(f"{url}{path}: {status} {text[:500]}")
        if status != 200:
            raise RefusedError(f"{url}{path} refused the request: {status} {text[:500]}")
        if not isinstance(said, dict):
            raise EngineError(f"{url}{path}: no object: {text[:200]!r}")
        return said

    def read(
        self, url: str, said: Mapping[str, Any], prompt: Sequence[int], sampling: Sampling
    ) -> Completion:
        """What was sampled. ValueError where the server read another prompt; EngineError for an
        answer that is not whole."""
        choice = only_choice(url, said)
        check_prompt(url, said, choice, prompt)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise EngineError(f"{url}: a completion ended by {reason!r}")
        ids, log_probs = choice.get("token_ids"), said_log_probs(choice)
        if ids is None:
            ids, log_probs = self.encode(str(choice.get("text", "")), sampling), None
        if log_probs is None or len(log_probs) != len(ids):
            log_probs = [math.nan] * len(ids)
        if reason == "stop" and not (ids and ids[-1] in sampling.stop_token_ids):
            # some leave out what ended it; the dialogue goes on after an end of turn
            ids, log_probs = [*ids, self.chat.end_of_turn], [*log_probs, math.nan]
        if not ids:
            raise EngineError(f"{url}: a completion without a token")
        return Completion(tuple(ids), tuple(log_probs), (self.weight_version,) * len(ids), reason)

    def encode(self, text: str, sampling: Sampling) -> list[int]:
        for stop in self.stop_texts(sampling.stop_token_ids):
            text = text.removesuffix(stop)
        return encode_plain(self.chat.tokenizer, text) if text else []

    # ------------------------------------------------------------------- protocol

    @asynccontextmanager
    async def session(self) -> AsyncIterator[OpenAISession]:
        yield OpenAISession(self, next(self.opened))

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        raise EngineError("weights cannot be brought to a completion server; train with SGLang's")

    def rest(self) -> None:
        """Its servers are not ours to tell."""

    def end_update(self, version: int | None) -> None:
        """There are none."""

    def take_counts(self) -> dict[str, float]:
        return {}


def only_choice(url: str, said: Mapping[str, Any]) -> dict[str, Any]:
    choices = said.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise EngineError(f"{url}: {str(said)[:200]!r} is no answer with one choice")
    return choices[0]


def said_log_probs(choice: Mapping[str, Any]) -> list[float] | None:
    told = choice.get("logprobs")
    values = told.get("token_logprobs") if isinstance(told, dict) else None
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values]


def prompts_checked(said: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    if choice.get("prompt_token_ids"):
        return "checked, id by id"
    return "checked, by their length" if read_tokens(said) is not None else "not checked"


def read_tokens(said: Mapping[str, Any]) -> int | None:
    usage = said.get("usage")
    number = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return number if isinstance(number, int) else None


def check_prompt(
    url: str, said: Mapping[str, Any], choice: Mapping[str, Any], prompt: Sequence[int]
) -> None:
    """ValueError where the server says that it read something else than it was sent."""
    ids, number = choice.get("prompt_token_ids"), read_tokens(said)
    if (ids and list(ids) != list(prompt)) or number not in (None, len(prompt)):
        raise ValueError(
            f"{url} read {number} tokens, or others, where {len(prompt)} were sent: it adds some "
            "of its own, or takes a prompt for text; it must take token ids as they are"
        )
