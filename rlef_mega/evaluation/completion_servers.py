"""The engine for servers with OpenAI's completions interface (`POST /v1/completions`: vLLM, SGLang,
llama.cpp and others), for evaluation.

Theory of operation. An event loop in a thread of its own (`openai-client`) holds the connections
while the rollouts' loops come and go. Dialogues are dealt to the servers in turn. A request that
fails (no connection, 429, 5xx) is retried at the next server, after growing pauses, until
`deadline_s`; then the dialogue has an EngineError, is started again once, and dropped and counted.

On opening, each server is asked for one token, in a request with the extensions of vLLM and SGLang
(`stop_token_ids`, `return_token_ids`), and if it refuses those, in a plain one. An evaluation
records in `facts` what this shows:

- A server that returns ids is token-in token-out. If it returns text alone, the text is encoded
  again, and the dialogue continues with those ids.
- Each answer is checked to have read the prompt that was sent, by its `prompt_token_ids` or their
  number, or not at all if the server reports neither.
- Nothing shows that the server has the folder's weights, or obeys seed and top-p.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp

from rlef_mega.dialogues.chat import ChatFormat, encode_plain
from rlef_mega.engines import EngineError
from rlef_mega.engines.http import ServerError, call, new_http_session
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.types import Completion, Sampling

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
OPEN_S = 120.0
MOST_STOPS = 4  # strings, as OpenAI allows
PATH = "/v1/completions"


class OpenAISession:
    """One dialogue. Its turns go to the server at `index`, until that fails."""

    def __init__(self, engine: "OpenAIEngine", index: int) -> None:
        self.engine, self.index = engine, index

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """Continue the prompt. Raises ValueError if a server refuses the request as wrong,
        EngineError if none answered in time."""
        if not token_ids:
            raise ValueError("the prompt is empty; give at least a begin-of-text token")
        asked = self.engine.ask(self, list(token_ids), sampling, seed)
        return await asyncio.wrap_future(self.engine.thread.submit(asked))


class OpenAIEngine(LivesInLoop):
    """Samples on the servers at `urls` (with or without `/v1`); a context manager, which checks
    them as it opens.

    `chat` is the chat format of the servers' model, `model` its name there (default: the first that
    they list), `context` the longest dialogue that will be sampled.
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
        self.extended = True  # requests have the extensions of vLLM and SGLang
        self.facts: dict[str, Any] = {}
        self.opened = count()
        super().__init__("openai-client")

    @asynccontextmanager
    async def session(self) -> AsyncIterator[OpenAISession]:
        yield OpenAISession(self, next(self.opened))

    async def shut(self) -> None:
        await self.http.close()

    async def open(self) -> None:
        """Connect. Raises ValueError unless every server answers, and all in the same way."""
        self.http: aiohttp.ClientSession = new_http_session()
        try:
            for url in self.urls:
                await self.find_model(url)
            found = [await self.try_out(url) for url in self.urls]
        except EngineError as error:
            raise ValueError(str(error)) from None
        if any(facts != found[0] for facts in found):
            raise ValueError(f"the servers {', '.join(self.urls)} answer differently: {found}")
        self.facts = {"model": self.model, **found[0], "seed": "sent, not checked"}

    async def find_model(self, url: str) -> None:
        """Raise ValueError unless the server lists the model, with room for the dialogues."""
        listed = (await self.call(url, "/v1/models")).get("data") or []
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
        """Sample one token; returns what that shows of the server."""
        prompt, one = self.chat.open("Hello"), Sampling(1, stop_token_ids=(self.chat.end_of_turn,))
        try:
            answer = await self.call(url, PATH, self.body(prompt, one, 0))
        except ServerError as error:
            if not error.refused:
                raise
            self.extended = False
            answer = await self.call(url, PATH, self.body(prompt, one, 0))
        choice = only_choice(url, answer)
        self.completion(url, answer, prompt, one)
        prompts = "not checked" if prompt_length(answer) is None else "checked, by their length"
        return {
            "token_ids": "as sampled" if choice.get("token_ids") else "its text, encoded again",
            "prompts": "checked, id by id" if choice.get("prompt_token_ids") else prompts,
            "log_probs": "as it says" if log_probs_of(choice) else "none",
            "weights": "not checked",
        }

    async def ask(
        self, session: OpenAISession, prompt: list[int], sampling: Sampling, seed: int
    ) -> Completion:
        """Sample at the session's server, and after a failure at the next one, until the deadline.

        Raises ValueError for a request that a retry would not cure.
        """
        body = self.body(prompt, sampling, seed)
        clock = asyncio.get_running_loop().time
        until_s, pause_s = clock() + self.deadline_s, FIRST_PAUSE_S
        while True:
            url = self.urls[session.index % len(self.urls)]
            try:
                answer = await self.call(url, PATH, body, within_s=until_s - clock())
                return self.completion(url, answer, prompt, sampling)
            except ServerError as error:
                if error.refused:
                    raise ValueError(f"the server refused the request: {error}") from None
                if clock() + pause_s >= until_s:
                    raise EngineError(f"no answer in {self.deadline_s:.0f} s: {error}") from None
            session.index += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def call(
        self, url: str, path: str, body: Any = None, *, within_s: float = OPEN_S
    ) -> dict[str, Any]:
        return await call(self.http, url, path, body, within_s=within_s, headers=self.headers)

    def body(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """Return the request for a prompt, with extensions if the servers take them."""
        stops = list(sampling.stop_token_ids)
        own = {"stop_token_ids": stops, "return_token_ids": True, "skip_special_tokens": False}
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**31,  # in the range that all servers accept
            "logprobs": 1,
            **(own if self.extended else {"stop": self.stop_texts(stops)}),
        }

    def stop_texts(self, stops: Sequence[int]) -> list[str]:
        return [str(self.chat.tokenizer.decode([stop])) for stop in stops][:MOST_STOPS]

    def completion(
        self, url: str, answer: Mapping[str, Any], prompt: Sequence[int], sampling: Sampling
    ) -> Completion:
        """Read what was sampled.

        Raises ValueError if the server read another prompt, ServerError for an incomplete answer.
        """
        choice = only_choice(url, answer)
        check_prompt(url, answer, choice, prompt)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ServerError(f"{url}: a completion ended by {reason!r}")
        ids, log_probs = choice.get("token_ids"), log_probs_of(choice)
        if ids is None:
            text = str(choice.get("text", ""))
            for stop in self.stop_texts(sampling.stop_token_ids):
                text = text.removesuffix(stop)
            ids, log_probs = encode_plain(self.chat.tokenizer, text) if text else [], None
        if log_probs is None or len(log_probs) != len(ids):
            log_probs = [math.nan] * len(ids)
        if reason == "stop" and not (ids and ids[-1] in sampling.stop_token_ids):
            # some servers omit the stop token; the dialogue continues after an end of turn
            ids, log_probs = [*ids, self.chat.end_of_turn], [*log_probs, math.nan]
        if not ids:
            raise ServerError(f"{url}: a completion without a token")
        return Completion(tuple(ids), tuple(log_probs), (0,) * len(ids), reason)


def only_choice(url: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise ServerError(f"{url}: an answer without exactly one choice: {str(answer)[:200]!r}")
    return choices[0]


def log_probs_of(choice: Mapping[str, Any]) -> list[float] | None:
    reported = choice.get("logprobs")
    values = reported.get("token_logprobs") if isinstance(reported, dict) else None
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values]


def prompt_length(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    number = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return number if isinstance(number, int) else None


def check_prompt(
    url: str, answer: Mapping[str, Any], choice: Mapping[str, Any], prompt: Sequence[int]
) -> None:
    """Raise ValueError if the server reports that it read something else than the prompt."""
    ids, number = choice.get("prompt_token_ids"), prompt_length(answer)
    if (ids and list(ids) != list(prompt)) or number not in (None, len(prompt)):
        raise ValueError(
            f"{url} read {number} tokens, or others, where {len(prompt)} were sent: it adds some "
            "of its own, or reads token ids as text; it must take token ids as they are"
        )
