"""Rollouts against real SGLang servers: ids, log-probs, weights, versions, and failures.

All tests share two servers. They are compared with transformers' model in this process.
"""

import asyncio
import contextlib
import copy
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from rlef_mega.config import ServersConfig
from rlef_mega.dialogues.chat import TEMPLATES, ChatFormat, declared_ends
from rlef_mega.dialogues.judge import Judge
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.engines import EngineError, EngineLostError, GenerationRequest
from rlef_mega.engines.publish import publish
from rlef_mega.engines.sglang.engine import SGLangEngine
from rlef_mega.engines.sglang.publication import DiskPublication
from rlef_mega.types import Completion, PrivateTests, Problem, Sampling
from rlef_sandbox import Test
from tests.sglang.conftest import CONTEXT, END_OF_TEXT, VOCABULARY

pytestmark = pytest.mark.sglang
TOLERANCE = 2e-4  # fp32 on both sides; the order of sums differs
PROBLEM = Problem(
    id="greet",
    statement="Greet the person whose name is given.",
    public_tests=(Test("Bob\n", "Hello Bob\n"),),
    private_tests=PrivateTests((Test("Zoe\n", "Hello Zoe\n"),)),
    template="curriculum",
)


@pytest.fixture
def model(serving) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(serving.model, dtype=torch.float32)


WAYS = ("disk", "distributed", "tensor")


@pytest.fixture(params=WAYS)
def engine(serving, request, tmp_path):
    with open_engine(serving, tmp_path, request.param) as engine:
        yield engine


@pytest.fixture
def disk_engine(serving, tmp_path):
    with open_engine(serving, tmp_path, "disk") as engine:
        yield engine


@contextlib.contextmanager
def open_engine(serving, folder, way, heartbeat_s=20, **limits):
    limits = {"publish_s": 60, "deadline_s": 200, **limits}
    with SGLangEngine(
        ServersConfig(urls=serving.urls, publish=way, **limits),
        serving.model,
        weights_folder=folder / "weights",
        logs=serving.run / "servers",
        take_over=True,
    ) as engine:
        engine.fleet.heartbeat_s = heartbeat_s
        yield engine


def wait_for(condition, engine: SGLangEngine) -> None:
    """Wait for as long as a server may take to start."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, engine.fleet.reasons()
        time.sleep(0.5)


def judge() -> Judge:
    """Return a judge that grades nothing: a model with random weights writes no program."""
    return Judge(grader=None)


@torch.no_grad()
def change(model: PreTrainedModel, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Return the log-prob of each token but the first."""
    ids = torch.tensor([ids])
    scaled = (model(ids).logits[0] / temperature).log_softmax(-1)
    return scaled[:-1].gather(1, ids[0, 1:, None])[:, 0]


def gap(model, prompt: list[int], answer: Completion, temperature: float = 1.0) -> float:
    truth = logprobs(model, [*prompt, *answer.token_ids], temperature)[len(prompt) - 1 :]
    return float((truth - torch.tensor(answer.logprobs)).abs().max())


async def one(engine: SGLangEngine, prompt: list[int], sampling: Sampling) -> Completion:
    async with engine.session() as session:
        return await session(GenerationRequest(tuple(prompt), sampling, seed=1))


def sample(engine: SGLangEngine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(one(engine, prompt, sampling) for prompt in prompts))

    return asyncio.run(all_at_once())


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, 256, (count, length), generator=generator).tolist()


def test_each_way_brings_weights_whose_logprobs_are_those_of_transformers(engine, model):
    prompts = random_prompts(12, 30)
    for version in (4, 5):
        change(model, seed=version)
        engine.update_weights(model.state_dict().items(), version)
        assert engine.weight_version == version
        for temperature in (1.0, 0.7):
            sampling = Sampling(60, temperature, stop_token_ids=(7, 8, 9))
            answers = sample(engine, prompts, sampling)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert gap(model, prompt, answer, temperature) < TOLERANCE
                assert set(answer.weight_versions) == {version}
                stopped = answer.finish_reason == "stop"
                ends = {7, 8, 9, END_OF_TEXT}  # a server ends a response at the model's own, too
                assert stopped == (answer.token_ids[-1] in ends)
                assert stopped or len(answer.token_ids) == 60
                assert not ends & set(answer.token_ids[:-1])
    greedy = sample(engine, prompts[:2], Sampling(20, 0.0))
    for prompt, answer in zip(prompts, greedy, strict=False):
        truth = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        expected = truth[0, len(prompt) :].tolist()
        if END_OF_TEXT not in expected:
            assert list(answer.token_ids) == expected


def chat_format(folder: Path, name: str) -> ChatFormat:
    """Return a format by its name: the folder's tokenizer has the control tokens of both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[name]
    return ChatFormat.for_tokenizer(tokenizer, declared_ends(folder))


@pytest.mark.parametrize("format_name", ["llama3", "chatml"])
def test_dialogues_keep_the_ids_that_were_sampled(disk_engine, serving, model, format_name):
    disk_engine.update_weights(model.state_dict().items(), 1)
    chat = chat_format(serving.model, format_name)
    sampling = Sampling(40, stop_token_ids=chat.stop_token_ids)
    rules = Rules(turns=3, sampling=sampling, max_context=CONTEXT)
    held = asyncio.run(
        DialogueLoop(disk_engine, judge(), chat, rules).run_my_share([PROBLEM] * 8, 0)
    )
    assert len(held.episodes) == 8
    for episode in held.episodes:
        assert len(episode.turns) == 3
        scored = logprobs(model, list(episode.token_ids))
        for number, turn in enumerate(episode.turns):
            start, sampled = len(episode.context(number)) - 1, turn.completion
            gaps = scored[start:][: len(sampled.logprobs)] - torch.tensor(sampled.logprobs)
            assert gaps.abs().max() < TOLERANCE
        for before, after in pairwise(episode.turns):
            ended = before.completion.finish_reason == "stop"
            header = chat.observe("", ended=ended)[: len(chat.between) + 1]
            assert list(after.observed_ids[: len(header)]) == header


def test_a_follow_up_turn_finds_its_context_in_the_servers_cache(disk_engine, model):
    disk_engine.update_weights(model.state_dict().items(), 1)

    async def hold(prompt: list[int]) -> None:
        async with disk_engine.session() as session:
            answer = await session(GenerationRequest(tuple(prompt), Sampling(40), 0))
            first.append(len(prompt))
            await asyncio.sleep(0.2)  # others come between
            follow_up = (*prompt, *answer.token_ids, *range(10, 40))
            await session(GenerationRequest(follow_up, Sampling(10), 0))

    async def hold_all() -> None:
        await asyncio.gather(*(hold(prompt) for prompt in random_prompts(16, 500)))

    first: list[int] = []
    asyncio.run(hold_all())
    counts = disk_engine.counts
    assert counts["requests"] == 32
    assert counts["follow_up_tokens"] == counts["context_tokens"] - sum(first)
    assert counts["follow_up_cached_tokens"] >= 0.9 * counts["follow_up_tokens"], counts


@pytest.mark.parametrize("way", WAYS)
def test_a_request_under_way_goes_on_with_the_new_weights(serving, model, tmp_path, way):
    (prompt,) = random_prompts(1, 20)
    with open_engine(serving, tmp_path, way) as engine:
        engine.update_weights(model.state_dict().items(), 1)
        old = LlamaForCausalLM.from_pretrained(serving.model, dtype=torch.float32)
        answers: list[Completion] = []
        sampling = Sampling(1500)
        asking = threading.Thread(target=lambda: answers.extend(sample(engine, [prompt], sampling)))
        asking.start()
        time.sleep(1.0)
        change(model, seed=2)
        engine.update_weights(model.state_dict().items(), 2)
        asking.join()
    (answer,) = answers
    switched = answer.weight_versions.index(2)
    assert 0 < switched < 1500
    assert answer.weight_versions == (1,) * switched + (2,) * (1500 - switched)
    ids, found = [*prompt, *answer.token_ids], torch.tensor(answer.logprobs)
    by_old = logprobs(old, ids)[len(prompt) - 1 :]
    by_new = logprobs(model, ids)[len(prompt) - 1 :]
    assert (by_old - found)[:switched].abs().max() < TOLERANCE
    assert (by_new - found)[switched:].abs().max() < TOLERANCE
    assert (by_old - by_new).abs().max() > 100 * TOLERANCE


def call(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        content = answer.read()
    return json.loads(content) if content.startswith(b"{") else {}


@pytest.mark.parametrize("mode", ["abort", "in_place"])
def test_other_ways_to_pause_a_server_end_requests_or_mix_weights(
    disk_engine, serving, model, tmp_path, mode
):
    """Why a publication retracts requests: `abort` ends them, and in place the new weights continue
    from the old ones' cache, which gives log-probs of neither."""
    disk_engine.update_weights(model.state_dict().items(), 1)
    old = LlamaForCausalLM.from_pretrained(serving.model, dtype=torch.float32)
    (prompt,) = random_prompts(1, 20)
    sampling = {"temperature": 1.0, "max_new_tokens": 1500, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    url = serving.urls[0]
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(call, url, "/generate", body)
        time.sleep(1.0)
        call(url, "/pause_generation", {"mode": mode})
        change(model, seed=3)
        model.save_pretrained(tmp_path / "new")
        load = {"model_path": str(tmp_path / "new"), "flush_cache": False}
        call(url, "/update_weights_from_disk", load)
        call(url, "/continue_generation", {"torch_empty_cache": False})
        about = asking.result(timeout=120)["meta_info"]
    sampled = [(logprob, token) for logprob, token, *_ in about["output_token_logprobs"]]
    if mode == "abort":
        assert about["finish_reason"]["type"] == "abort" and 0 < len(sampled) < 1500
        return
    assert len(sampled) == 1500
    ids = [*prompt, *(token for _, token in sampled)]
    found = torch.tensor([logprob for logprob, _ in sampled])
    for weights in (old, model):
        truth = logprobs(weights, ids)[len(prompt) - 1 :]
        assert (truth - found)[-100:].abs().max() > 100 * TOLERANCE


def test_requests_that_would_end_a_server_are_refused_here(disk_engine, model):
    disk_engine.update_weights(model.state_dict().items(), 1)
    for prompt, reason in (
        ([1] * CONTEXT, "2048 tokens"),
        ([1, VOCABULARY], r"outside \[0, 262\)"),
        ([-1], "outside"),
        ([], "empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(disk_engine, [prompt], Sampling(5))
    longest = random_prompts(1, disk_engine.info.longest_prompt)
    (answer,) = sample(disk_engine, longest, Sampling(500))
    assert len(answer.token_ids) == CONTEXT - len(longest[0])
    assert disk_engine.counts.get("failures", 0) == 0


def test_weights_of_another_model_are_never_sent(engine, model):
    weights = model.state_dict()
    engine.update_weights(weights.items(), 1)
    norm = "model.norm.weight"
    for wrong, reason in (
        ({**weights, "model.rotary": weights[norm]}, "no weight model.rotary"),
        ({**weights, norm: weights[norm][:-1]}, r"shape \[63\] instead of \[64\]"),
        ({name: tensor for name, tensor in weights.items() if name != norm}, "missing.*norm"),
    ):
        with pytest.raises(EngineError, match=reason):
            engine.update_weights(wrong.items(), 2)
        assert not any(member.ready for member in engine.fleet.members)
    engine.update_weights(weights.items(), 3)
    (answer,) = sample(engine, [[11, 12]], Sampling(5))
    assert gap(model, [11, 12], answer) < TOLERANCE and set(answer.weight_versions) == {3}


class BrokenDisk(DiskPublication):
    """Flips one bit of what it wrote."""

    def write(self, folder, weights):
        super().write(folder, weights)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.1.self_attn.k_proj.weight"].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, file)


def test_a_server_that_holds_other_weights_than_were_sent_is_found_out(
    disk_engine, serving, model, tmp_path
):
    disk_engine.publication = BrokenDisk(
        disk_engine.fleet, disk_engine, tmp_path / "broken", serving.model
    )
    with pytest.raises(EngineError, match=r"other weights.*layers\.1\.self_attn\.qkv_proj"):
        disk_engine.update_weights(model.state_dict().items(), 1)


@pytest.mark.parametrize("way", WAYS)
def test_dialogues_go_on_through_publications(serving, model, tmp_path, way):
    """Weights change three times under a stream of requests: none fails, versions never go back in
    an answer, and each token has the log-prob that the weights of its version give it."""
    models = {0: copy.deepcopy(model)}
    done = threading.Event()

    async def talk() -> list[tuple[list[int], Completion]]:
        held = []
        while not done.is_set():
            prompts = random_prompts(6, 12, seed=len(held))
            answers = await asyncio.gather(*(one(engine, p, Sampling(60)) for p in prompts))
            held += zip(prompts, answers, strict=True)
        return held

    with open_engine(serving, tmp_path, way) as engine, ThreadPoolExecutor(1) as thread:
        engine.update_weights(model.state_dict().items(), 0)
        talking = thread.submit(lambda: asyncio.run(talk()))
        for version in (1, 2, 3):
            time.sleep(0.7)
            change(model, seed=version)
            models[version] = copy.deepcopy(model)
            engine.update_weights(model.state_dict().items(), version)
        time.sleep(0.7)
        done.set()
        held = talking.result(120)
        assert "failures" not in engine.counts
    spans = set()
    for prompt, answer in held:
        versions = torch.tensor(answer.weight_versions)
        spans.add(tuple(versions.unique().tolist()))
        assert bool((versions.diff() >= 0).all())
        for version in versions.unique().tolist():
            truth = logprobs(models[version], [*prompt, *answer.token_ids])[len(prompt) - 1 :]
            wrong = (truth - torch.tensor(answer.logprobs)).abs()[versions == version]
            assert float(wrong.max()) < TOLERANCE, (version, answer.weight_versions)
    assert any(len(span) > 1 for span in spans), spans  # some were under way
    assert {version for span in spans for version in span} == {0, 1, 2, 3}


def test_a_server_that_hangs_costs_no_request_and_does_not_come_back_with_old_weights(
    serving, model, tmp_path
):
    """It is suspended during requests, and continues after a publication without it."""
    victim = serving.urls[0]
    process = serving.server_process(victim)
    everything = [process, *process.children(recursive=True)]
    with open_engine(serving, tmp_path, "disk", heartbeat_s=3, publish_s=5) as engine:
        engine.update_weights(model.state_dict().items(), 1)
        prompts = random_prompts(12, 10)
        try:
            with ThreadPoolExecutor(1) as thread:
                asking = thread.submit(sample, engine, prompts, Sampling(600))
                time.sleep(0.5)
                for part in everything:
                    part.suspend()
                assert not asking.done(), "there was nothing to interrupt"
                assert len(asking.result(150)) == 12 and engine.counts["failures"] >= 1
            change(model, seed=5)
            engine.update_weights(model.state_dict().items(), 2)
            assert [m.ready for m in engine.fleet.members] == [False, True]
        finally:
            for part in everything:
                part.resume()
        wait_for(lambda: engine.fleet.members[0].ready, engine)
        assert engine.counts["restored"] == 1
        for prompt in random_prompts(6, 9):
            (answer,) = sample(engine, [prompt], Sampling(20))
            assert set(answer.weight_versions) == {2}
            assert gap(model, prompt, answer) < TOLERANCE


def test_a_cancelled_dialogue_ends_its_request_on_the_server(disk_engine, serving, model):
    """A server empties its cache only when nothing runs. By itself it would notice the closed
    connection after 4 s."""

    def idle() -> bool:
        answers = []
        for url in serving.urls:
            request = urllib.request.Request(f"{url}/flush_cache", method="POST")
            with contextlib.suppress(urllib.error.HTTPError):
                answers.append(urllib.request.urlopen(request, timeout=20).status)
        return answers == [200, 200]

    async def cancel() -> None:
        asking = asyncio.create_task(one(disk_engine, [11, 12], Sampling(1900)))
        while await asyncio.to_thread(idle):
            assert not asking.done()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    disk_engine.update_weights(model.state_dict().items(), 1)
    asyncio.run(cancel())
    until = time.monotonic() + 2
    while not idle():
        assert time.monotonic() < until, "the request goes on"
        time.sleep(0.1)


@pytest.mark.slow  # servers start again
def test_a_killed_server_costs_no_episode_and_returns_with_the_current_weights(
    disk_engine, serving, model
):
    change(model, seed=3)
    disk_engine.update_weights(model.state_dict().items(), 6)
    chat = chat_format(serving.model, "chatml")
    rules = Rules(turns=3, sampling=Sampling(120), max_context=CONTEXT)
    victim = serving.urls[1]
    threading.Timer(1.0, lambda: serving.server_process(victim).kill()).start()
    held = asyncio.run(
        DialogueLoop(disk_engine, judge(), chat, rules).run_my_share([PROBLEM] * 40, 0)
    )
    assert len(held.episodes) == 40 and not held.reasons
    assert disk_engine.counts["failures"] >= 1
    for episode in held.episodes:
        assert all(set(turn.completion.weight_versions) == {6} for turn in episode.turns)
    wait_for(lambda: disk_engine.counts.get("restored"), disk_engine)
    with SGLangEngine(ServersConfig(urls=[victim]), serving.model) as only_the_victim:
        weights = model.state_dict().items()
        only_the_victim.update_weights(weights, 6)  # published by another engine
        only_the_victim.end_update(6, [victim])
        (answer,) = sample(only_the_victim, [[11, 12]], Sampling(30))
    assert gap(model, [11, 12], answer) < TOLERANCE and set(answer.weight_versions) == {6}


@pytest.mark.slow  # servers start again
def test_a_server_killed_during_a_broadcast_fails_it_and_joins_a_later_one(
    serving, model, tmp_path
):
    weights = list(model.state_dict().items())
    victim = serving.server_process(serving.urls[0])

    def with_a_death():
        yield from weights[:-1]
        victim.kill()  # the servers are paused by now and wait for the bucket
        yield weights[-1]

    with open_engine(serving, tmp_path, "distributed") as engine:
        engine.update_weights(weights, 1)
        with pytest.raises(EngineError, match=r"(?s)servers failed.*The end of"):
            engine.update_weights(with_a_death(), 2)
        assert not any(member.ready for member in engine.fleet.members)
        engine.update_weights(weights, 3)  # to the one that is left
        answers = sample(engine, random_prompts(4, 10), Sampling(5))
        assert {v for answer in answers for v in answer.weight_versions} == {3}
        wait_until_healthy(serving.urls[0])
        engine.update_weights(weights, 4)  # to both again
        serving.server_process(serving.urls[0]).kill()
        wait_until_healthy(serving.urls[0])  # nothing was asked of it meanwhile
        engine.update_weights(weights, 5)
        assert all(member.ready for member in engine.fleet.members)
        prompts = random_prompts(8, 10)
        for prompt, answer in zip(prompts, sample(engine, prompts, Sampling(9)), strict=True):
            assert gap(model, prompt, answer) < TOLERANCE
            assert set(answer.weight_versions) == {5}


class InterruptedPolicy:
    """A policy that calls `happens` in the middle of its first publication."""

    def __init__(self, model: PreTrainedModel, happens) -> None:
        self.model, self.happens, self.tries = model, happens, 0

    def policy_weights(self):
        self.tries += 1
        *most, last = self.model.state_dict().items()
        yield from most
        if self.tries == 1:
            self.happens()  # the servers are paused by now and wait for the bucket
        yield last


def test_a_scheduler_that_hangs_during_a_broadcast_is_left_out_of_the_next_try(
    serving, model, tmp_path
):
    """Its HTTP process continues, and answers what it can answer alone."""
    scheduler = serving.scheduler_process(serving.urls[0])
    policy = InterruptedPolicy(model, scheduler.suspend)
    with open_engine(serving, tmp_path, "distributed", publish_s=8, heartbeat_s=4) as engine:
        engine.update_weights(model.state_dict().items(), 1)
        change(model, seed=1)
        try:
            publish(policy.policy_weights, engine, 2)
            assert policy.tries == 2
            assert [member.ready for member in engine.fleet.members] == [False, True]
            answers = sample(engine, random_prompts(4, 10), Sampling(5))
            assert {v for answer in answers for v in answer.weight_versions} == {2}
        finally:
            scheduler.resume()
        change(model, seed=2)
        engine.publication.transfer.deadline_s = 60
        for member in engine.fleet.members:
            member.publish_s = 60
        engine.fleet.heartbeat_s = 20
        publish(policy.policy_weights, engine, 3)
        assert policy.tries == 3 and all(member.ready for member in engine.fleet.members)
        prompts = random_prompts(8, 10)
        for prompt, answer in zip(prompts, sample(engine, prompts, Sampling(9)), strict=True):
            assert gap(model, prompt, answer) < TOLERANCE
            assert set(answer.weight_versions) == {3}


def wait_until_healthy(url: str) -> None:
    """Wait for the process that replaces the one that was just killed."""
    waited_until = time.monotonic() + 300
    time.sleep(1)
    while True:
        assert time.monotonic() < waited_until, f"{url} did not come back"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


@pytest.mark.slow  # servers start again
def test_without_any_server_requests_fail_and_later_ones_find_the_restarted_servers(
    serving, model, tmp_path
):
    with open_engine(serving, tmp_path, "disk", lost_s=2) as engine:
        engine.update_weights(model.state_dict().items(), 1)
        # found before any is killed: a zombie has no command line to be found by
        for process in [serving.server_process(url) for url in serving.urls]:
            process.kill()
        with pytest.raises(EngineLostError, match=r"(?s)no server was ready for 2 s.*The end of"):
            sample(engine, [[11, 12]] * 3, Sampling(5))
        engine.fleet.limits = engine.fleet.limits.model_copy(update={"lost_s": 300})
        answers = sample(engine, [[11, 12]] * 3, Sampling(5))  # `rlef serve` starts them again
        assert {v for answer in answers for v in answer.weight_versions} == {1}
        wait_for(lambda: all(member.ready for member in engine.fleet.members), engine)
