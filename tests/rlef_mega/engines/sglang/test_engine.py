"""The SGLang engine with server doubles that fail on command; tests/sglang uses real servers."""

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from rlef_mega.config import ConfigError, ServersConfig
from rlef_mega.engines import EngineError, EngineLostError, GenerationRequest
from rlef_mega.engines.sglang import fleet
from rlef_mega.engines.sglang.answers import ServerError
from rlef_mega.engines.sglang.engine import SGLangEngine
from rlef_mega.engines.sglang.fleet import MOST_TRIES, Fleet
from rlef_mega.engines.sglang.members import Member
from rlef_mega.engines.sglang.processes import log_file
from rlef_mega.engines.sglang.weights import SentWeights, ServedModel
from rlef_mega.types import Completion, Sampling
from tests.rlef_mega.distributed import launch
from tests.rlef_mega.engines.sglang.server_double import ServerDouble
from tests.rlef_mega.tiny_llama import tiny_llama

SAMPLING = Sampling(3, stop_token_ids=(999,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1000).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def probe_often(monkeypatch):
    monkeypatch.setattr(fleet, "SLOWEST_PROBE_S", 0.2)
    monkeypatch.setattr(Fleet, "heartbeat_s", 0.2)


@pytest.fixture
def servers(model):
    with ServerDouble(1, str(model)) as one, ServerDouble(2, str(model)) as two:
        yield one, two


def open_engine(servers, model, **options) -> SGLangEngine:
    names = options.keys() & ServersConfig.model_fields.keys()
    asked = {"deadline_s": 10.0, **{name: options.pop(name) for name in names}}
    urls = [server.url for server in servers]
    return SGLangEngine(ServersConfig(urls=urls, **asked), model, **options)


@pytest.fixture
def engine(servers, model):
    with open_engine(servers, model) as engine:
        published_elsewhere(engine, 3)
        wait_until(lambda: engine.counts.get("returns") == 2)
        yield engine


def published_elsewhere(engine: SGLangEngine, version: int) -> None:
    """Note a publication by another process."""
    engine.update_weights(weights_of(engine.folder).items(), version)
    engine.end_update(version)


async def dialogue(engine: SGLangEngine, turns: int = 1, sampling=SAMPLING) -> list[Completion]:
    ids, answers = [1, 2], []
    async with engine.session() as session:
        for _ in range(turns):
            answers.append(await session(GenerationRequest(tuple(ids), sampling, 0)))
            ids = [*ids, *answers[-1].token_ids, 4]
    return answers


def talk(engine, count: int, turns: int = 1, sampling=SAMPLING) -> list[list[Completion]]:
    async def all_at_once():
        return await asyncio.gather(*(dialogue(engine, turns, sampling) for _ in range(count)))

    return asyncio.run(all_at_once())


def wait_until(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "the condition was not met within 10 s"
        time.sleep(0.01)


def test_dialogues_are_spread_evenly_and_stay_at_the_server_with_their_context(engine, servers):
    for server in servers:
        server.delay_s = 0.05
    answers = talk(engine, 8, turns=3)
    of_dialogue = [{a.token_ids[0] // 100 for a in dialogue} for dialogue in answers]
    assert all(len(numbers) == 1 for numbers in of_dialogue)
    assert Counter(numbers.pop() for numbers in of_dialogue) == {1: 4, 2: 4}
    counts = engine.counts
    assert counts["requests"] == 24 and counts["sampled_tokens"] == 72
    taken = engine.take_counts()
    assert all(taken[name] == count for name, count in counts.items() if count)
    assert engine.take_counts() == {}
    assert counts["cached_tokens"] == 48 and counts["context_tokens"] == 8 * (2 + 6 + 10)
    assert counts["follow_up_cached_tokens"] == 32 and counts["follow_up_tokens"] == 8 * (6 + 10)


def test_a_server_gets_no_more_requests_at_once_than_it_may(servers, model):
    with open_engine(servers, model, concurrency=3) as engine:
        published_elsewhere(engine, 3)
        wait_until(lambda: engine.counts.get("returns") == 2)
        for server in servers:
            server.delay_s = 0.02
        assert len(talk(engine, 30)) == 30
    assert all(server.most_at_once == 3 for server in servers)


@pytest.mark.parametrize("mode", ["drop", "hang"])
def test_a_server_that_fails_costs_no_request_and_returns(engine, servers, mode):
    one, _two = servers
    one.mode = mode
    answers = talk(engine, 6, turns=2)
    assert {a.token_ids[0] // 100 for dialogue in answers for a in dialogue} == {2}
    assert engine.counts["failures"] == 1
    one.mode = "answer"
    wait_until(lambda: engine.counts["returns"] == 3)
    answers = talk(engine, 6)
    assert {a.token_ids[0] // 100 for dialogue in answers for a in dialogue} == {1, 2}


def spoil_ids(said):
    said["output_ids"][1] += 1


def spoil_logprob(said):
    said["meta_info"]["output_token_logprobs"][1][0] = None  # how JSON writes NaN


def spoil_versions(said):
    said["meta_info"]["weight_versions"][0]["end"] = 2


def spoil_version(said):
    said["meta_info"]["weight_versions"][0]["version"] = "default"


def age(said):
    said["meta_info"]["weight_versions"][0]["version"] = "2"


def abort(said):
    said["meta_info"]["finish_reason"]["type"] = "abort"


def forget(said):
    del said["meta_info"]


SPOILERS = [spoil_ids, spoil_logprob, spoil_versions, spoil_version, age, abort, forget]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_request_with_an_incomplete_answer_goes_to_another_server(engine, servers, spoil):
    one, _two = servers
    one.spoil = spoil
    answers = talk(engine, 6)
    assert {a.token_ids[0] // 100 for dialogue in answers for a in dialogue} == {2}
    assert engine.counts["failures"] >= 1


def test_a_request_that_fails_everywhere_is_an_error(engine, servers):
    for server in servers:
        server.spoil = forget
    with pytest.raises(EngineError, match=f"{MOST_TRIES} tries failed.*malformed answer"):
        talk(engine, 1)
    assert sum(len(server.prompts) for server in servers) == MOST_TRIES


def test_without_a_server_the_deadline_says_why(servers, model):
    with open_engine(servers, model, deadline_s=0.5) as engine:
        published_elsewhere(engine, 3)
        for server in servers:
            server.mode = "drop"
        with pytest.raises(EngineError, match=r"within 0\.5 s.*Server disconnected"):
            talk(engine, 1)


def test_without_any_server_all_requests_fail_with_the_reason(servers, model):
    with open_engine(servers, model, lost_s=0.5) as engine:
        published_elsewhere(engine, 3)
        for server in servers:
            server.mode = "drop"
        with pytest.raises(EngineLostError, match=r"ready for 0\.5 s.*Server disconnected"):
            talk(engine, 3)
        servers[0].mode = "answer"
        wait_until(lambda: any(member.ready for member in engine.fleet.members))
        assert len(talk(engine, 2)) == 2


def test_servers_paused_by_another_process_are_not_checked(servers, model):
    """Requests wait at a paused server for longer than a heartbeat."""
    with open_engine(servers, model) as engine:
        engine.fleet.heartbeat_s = 0.1
        published_elsewhere(engine, 3)
        for server in servers:
            server.mode = "hang"
        engine.update_weights(weights_of(model).items(), 4)  # another process publishes

        async def meanwhile():
            waiting = asyncio.gather(*(dialogue(engine, 2) for _ in range(4)))
            await asyncio.sleep(0.6)
            for server in servers:
                server.mode, server.weight_version = "answer", "4"
            await asyncio.to_thread(engine.end_update, 4)
            return await waiting

        answers = asyncio.run(meanwhile())
        assert {v for turns in answers for turn in turns for v in turn.weight_versions} == {4}
        assert "failures" not in engine.counts


def test_no_server_serves_before_it_has_the_current_weights(engine, servers):
    one, two = servers
    two.weight_version = "4"
    published_elsewhere(engine, 4)
    answers = talk(engine, 6)
    assert {a.token_ids[0] // 100 for dialogue in answers for a in dialogue} == {2}
    one.weight_version = "4"
    wait_until(lambda: engine.counts["returns"] == 4)
    assert {a[0].token_ids[0] // 100 for a in talk(engine, 6)} == {1, 2}


def test_a_publication_by_another_process_costs_each_server_one_cheap_request(engine, servers):
    """No health check, which takes a second or more."""
    for server in servers:
        server.weight_version = "4"
        server.calls.clear()
    published_elsewhere(engine, 4)
    wait_until(lambda: engine.counts["returns"] == 4)
    talk(engine, 6)
    for server in servers:
        assert server.calls.keys() == {"model_info", "generate"}
        assert server.calls["model_info"] == 1


def test_a_cancelled_dialogue_frees_its_slot_and_ends_on_the_server(servers, model):
    """A server notices a closed connection only later, so it gets an explicit request."""
    (server, _) = servers

    async def cancel_some() -> None:
        tasks = [asyncio.create_task(dialogue(engine)) for _ in range(6)]
        await asyncio.to_thread(wait_until, lambda: len(server.under_way) == 1)
        (first,) = server.under_way
        for task in tasks[::2]:
            task.cancel()
        server.delay_s = 0.0  # for later requests
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(not task.cancelled() for task in tasks) == 3
        await asyncio.to_thread(wait_until, lambda: server.aborted == [first])

    with open_engine(servers[:1], model, concurrency=1) as engine:
        published_elsewhere(engine, 3)
        server.delay_s = 60.0
        asyncio.run(cancel_some())
        wait_until(lambda: engine.fleet.members[0].load == 0)
        assert len(talk(engine, 2)) == 2


def test_open_requests_end_on_the_servers_when_the_engine_closes(servers, model):
    with ThreadPoolExecutor(1) as thread:
        with open_engine(servers, model) as engine:
            published_elsewhere(engine, 3)
            for server in servers:
                server.delay_s = 60.0
            asking = thread.submit(talk, engine, 4)
            wait_until(lambda: sum(len(server.under_way) for server in servers) == 4)
        assert sum(len(server.aborted) for server in servers) == 4
        assert isinstance(asking.exception(10), asyncio.CancelledError)


def test_a_server_ends_a_response_at_the_models_own_end_of_text_too(engine, servers):
    for server in servers:
        server.end_of_text = 100 * server.number + 1
    ((answer,),) = talk(engine, 1, sampling=Sampling(6, stop_token_ids=(999,)))
    assert answer.finish_reason == "stop" and len(answer.token_ids) == 2


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([1000], r"outside \[0, 1000\)"),
        ([1] * 194, "194 tokens.*at most 193"),
    ],
)
def test_requests_that_would_crash_a_server_are_not_sent(engine, servers, prompt, reason):
    async def ask() -> None:
        async with engine.session() as session:
            await session(GenerationRequest(tuple(prompt), SAMPLING, 0))

    with pytest.raises(ValueError, match=reason):
        asyncio.run(ask())
    assert not any(server.prompts for server in servers)


def test_another_version_of_sglang_is_refused(servers, model):
    servers[1].sglang = "0.5.9"
    with (
        pytest.raises(ValueError, match=r"is SGLang 0\.5\.9; supported: 0\.5\.23"),
        open_engine(servers, model),
    ):
        pass


# ------------------------------------------------------------------ publication


@contextlib.contextmanager
def publishing(servers, model, folder, **options):
    options = {"weights_folder": folder / "weights", "publish_s": 5.0, **options}
    for server in servers:
        server.weight_version = "default"
    with open_engine(servers, model, logs=folder, **options) as engine:
        yield engine


@cache
def weights_of(model):
    return LlamaForCausalLM.from_pretrained(model).state_dict()


def test_a_publication_reaches_all_servers_and_later_those_that_were_started_again(
    servers, model, tmp_path
):
    one, two = servers
    with publishing(servers, model, tmp_path) as engine:
        engine.update_weights(weights_of(model).items(), 7)
        assert one.weight_version == two.weight_version == "7"
        assert one.calls["pause_generation"] == one.calls["continue_generation"] == 1
        one.weight_version = "default"  # as after a start
        answers = talk(engine, 6)
        assert {v for (answer,) in answers for v in answer.weight_versions} == {7}
        wait_until(lambda: engine.counts.get("restored") == 1)
        assert one.weight_version == "7"
        assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version_000007"]


def test_a_folder_that_cannot_be_written_fails_the_publication(servers, model, tmp_path):
    """As on a full disk. All ranks get the error, and the publication is retried."""
    (tmp_path / "file").touch()
    with (
        publishing(servers, model, tmp_path, weights_folder=tmp_path / "file/weights") as engine,
        pytest.raises(EngineError, match=r"cannot write .*free space"),
    ):
        engine.update_weights(weights_of(model).items(), 7)


class RestoredMember(Member):
    """The calls of a probe to a restarted server."""

    async def check_health(self, *, within_s):
        pass

    async def reported_version(self, *, within_s):
        return "default"


@pytest.mark.parametrize("outcome", ["failed", "failed later", "included it", "another"])
def test_a_probe_that_a_publication_overtook_loads_no_old_weights(outcome):
    """The probe waited for a publication, which failed or included the server, or the next
    publication came while the server loaded."""

    async def run():
        member = RestoredMember("http://restored", http=None, publish_s=1.0)
        servers = Fleet([member], ServersConfig())
        loads = []

        async def restore(one):
            loads.append(servers.version)
            if outcome == "failed later":
                await servers.withhold()
            if outcome == "another":
                servers.version = 8

        servers.version, servers.restore = 7, restore
        await servers.control.acquire()
        probe = asyncio.create_task(servers.require_current(member))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if outcome == "failed":
            await servers.withhold()
        if outcome == "included it":
            servers.bring_back(member)
        servers.control.release()
        (ended,) = await asyncio.gather(probe, return_exceptions=True)
        return ended, loads

    ended, loads = asyncio.run(run())
    if outcome == "included it":
        assert ended is None and loads == []
    else:
        assert isinstance(ended, ServerError)
        assert loads == ([] if outcome == "failed" else [7])


def test_dialogues_go_on_while_weights_are_published(servers, model, tmp_path):
    """No request fails, and versions never go back within a dialogue."""

    async def talk_until(done: threading.Event) -> list[list[Completion]]:
        held = []
        while not done.is_set():
            held += await asyncio.gather(*(dialogue(engine, 3) for _ in range(8)))
        return held

    with publishing(servers, model, tmp_path, publish_s=10.0) as engine:
        weights = weights_of(model)
        engine.update_weights(weights.items(), 0)
        done = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            talking = thread.submit(lambda: asyncio.run(talk_until(done)))
            for version in range(1, 6):
                engine.update_weights(weights.items(), version)
            done.set()
            held = talking.result(20)
    assert "failures" not in engine.fleet.counts
    versions = [[v for answer in turns for v in answer.weight_versions] for turns in held]
    assert all(of_one == sorted(of_one) for of_one in versions)
    assert len({v for of_one in versions for v in of_one}) > 2


def test_a_server_that_hangs_is_left_out_and_if_all_hang_it_is_an_error(servers, model, tmp_path):
    """Its HTTP process answers, its scheduler does not. The publication waits for one heartbeat,
    not for `publish_s`."""
    one, two = servers
    with publishing(servers, model, tmp_path, publish_s=60.0, lost_s=1.0) as engine:
        two.mode = "hang"
        engine.update_weights(weights_of(model).items(), 1)
        assert two.calls["pause_generation"] == 0
        assert {a[0].token_ids[0] // 100 for a in talk(engine, 4)} == {1}
        one.mode = "hang"
        log_file(tmp_path, one.url).write_text("loading\nout of memory, says the log\n")
        with pytest.raises(EngineLostError, match=r"(?s)no server was ready.*says the log"):
            engine.update_weights(weights_of(model).items(), 2)
        with pytest.raises(EngineLostError, match=r"(?s)no server was ready.*says the log"):
            talk(engine, 1)
        one.mode = two.mode = "answer"


def test_a_server_that_fails_within_a_publication_is_left_out_and_restored_later(
    servers, model, tmp_path
):
    """It stays paused, and so unhealthy, until it has loaded the weights."""
    one, two = servers

    async def refuse(body):
        return {"success": False, "message": "disk full"}

    with publishing(servers, model, tmp_path, publish_s=5.0) as engine:
        engine.update_weights(weights_of(model).items(), 1)
        two.update_weights_from_disk = refuse
        engine.update_weights(weights_of(model).items(), 2)
        assert two.paused and {a[0].token_ids[0] // 100 for a in talk(engine, 4)} == {1}
        one.update_weights_from_disk = refuse
        with pytest.raises(EngineError, match=r"no server loaded version 3.*disk full"):
            engine.update_weights(weights_of(model).items(), 3)
        del one.update_weights_from_disk
        engine.update_weights(weights_of(model).items(), 4)
        del two.update_weights_from_disk
        wait_until(lambda: engine.counts.get("restored") == 1)
        assert two.weight_version == "4" and not two.paused


def test_servers_release_their_memory_while_they_rest(servers, model, tmp_path):
    """They are paused, because a server without weights must not generate. They allocate memory
    for weights before an update, and for the cache after it. A server that was restarted meanwhile
    must not be asked to allocate, because a real one would exit."""
    one, two = servers
    with publishing(servers, model, tmp_path, release_memory=True, publish_s=5.0) as engine:
        engine.update_weights(weights_of(model).items(), 1)
        for server in servers:
            server.order.clear()
        engine.rest()
        assert one.released == {"weights", "kv_cache"} and one.paused
        two.weight_version, two.paused, two.released = "default", False, set()  # as after a start
        time.sleep(0.5)  # no weights are loaded on it while there is no memory for them
        assert two.order[-1] == "release weights"
        engine.update_weights(weights_of(model).items(), 2)
        assert all(len(turns) == 1 for turns in talk(engine, 4))
    steps = (
        *("pause_generation", "release kv_cache", "release weights", "occupy weights"),
        *("update_weights_from_disk", "weights_checker", "occupy kv_cache", "continue_generation"),
    )
    assert [step for step in one.order if step in steps] == [*steps[:4], steps[0], *steps[4:]]
    assert not any(step.startswith("occupy") for step in two.order)


def test_servers_make_room_before_the_networks_are_built(servers, model, tmp_path):
    """They hold memory from their start, and nothing was published to them yet."""
    with publishing(servers, model, tmp_path, release_memory=True, publish_s=5.0) as engine:
        engine.rest()
        assert all(server.released == {"weights", "kv_cache"} for server in servers)
        engine.update_weights(weights_of(model).items(), 0)
        assert not any(server.released or server.paused for server in servers)
        assert all(len(turns) == 1 for turns in talk(engine, 4))


def test_servers_that_are_not_ready_make_room_too_and_those_that_hang_are_not_waited_for(
    servers, model, tmp_path
):
    """One that failed a publication still has its weights, but not its cache; then it is restarted
    and has both."""
    one, two = servers

    async def refuse(body):
        return {"success": False, "message": "disk full"}

    with publishing(servers, model, tmp_path, release_memory=True, publish_s=60.0) as engine:
        engine.update_weights(weights_of(model).items(), 1)
        two.update_weights_from_disk = refuse
        for version in (2, 3):
            engine.rest()
            assert one.released == two.released == {"weights", "kv_cache"}
            engine.update_weights(weights_of(model).items(), version)
            assert two.released == {"kv_cache"}
        two.weight_version, two.paused, two.released = "default", False, set()  # as after a start
        engine.rest()
        assert one.released == two.released == {"weights", "kv_cache"}
        del two.update_weights_from_disk
        engine.update_weights(weights_of(model).items(), 4)
        assert {a[0].token_ids[0] // 100 for a in talk(engine, 4)} == {1, 2}
        two.mode, began = "hang", time.monotonic()
        engine.rest()
        assert time.monotonic() - began < 30 and one.released and not two.released
        engine.update_weights(weights_of(model).items(), 5)
        two.mode = "answer"


def test_a_server_that_holds_other_weights_is_left_out_and_if_all_do_it_is_an_error(
    servers, model, tmp_path
):
    one, two = servers

    def spoil(server) -> None:
        async def other_checksums(body):
            said = await ServerDouble.weights_checker(server, body)
            said["ranks"][0]["checksums"]["model.norm.weight"] = "another"
            return said

        server.weights_checker = other_checksums

    with publishing(servers, model, tmp_path) as engine:
        engine.update_weights(weights_of(model).items(), 1)
        spoil(two)
        engine.update_weights(weights_of(model).items(), 2)
        assert engine.counts["failures"] == 1
        assert {a[0].token_ids[0] // 100 for a in talk(engine, 4)} == {1}
        spoil(one)
        with pytest.raises(EngineError, match=r"other weights than were sent: model\.norm"):
            engine.update_weights(weights_of(model).items(), 3)


def test_servers_that_another_process_owns_are_refused(servers, model, tmp_path):
    """A process that publishes owns them until it ends; a resumed run takes its own back."""
    one, two = servers
    with publishing(servers, model, tmp_path) as engine:
        engine.update_weights(weights_of(model).items(), 7)
        with (
            pytest.raises(ConfigError, match=rf"{one.url} has weights of version 7.*rlef serve"),
            open_engine(servers, model, weights_folder=tmp_path / "other"),
        ):
            pass
        assert one.weight_version == two.weight_version == "7"
    assert one.weight_version == two.weight_version == "default"
    two.weight_version = "12"  # of a run that was killed
    folder = tmp_path / "weights"
    with open_engine(servers, model, take_over=True, weights_folder=folder) as engine:
        engine.update_weights(weights_of(model).items(), 9)
        assert two.weight_version == "9"


def test_versions_never_go_back_in_a_dialogue(engine, servers):
    """The first server has new weights already and fails; the other one still serves the old ones,
    but not to a dialogue that has had the new ones."""
    one, _ = servers
    one.weight_version = "4"

    async def two_turns() -> list[int]:
        request, failed = GenerationRequest((1, 2), SAMPLING, 0), None
        while failed is None:
            async with engine.session() as session:
                if (await session(request)).weight_versions[0] != 4:
                    continue  # until server `one` answers
                one.mode = "drop"
                with pytest.raises(EngineError) as failed:
                    await session(request)
        assert "serves version 3, but the dialogue already has tokens" in str(failed.value)
        return (await dialogue(engine))[0].weight_versions

    assert asyncio.run(two_turns()) == (3, 3, 3)


def test_each_rank_hashes_its_share_and_only_rank_0_asks_the_servers(model, tmp_path):
    """Two ranks publish together. A failure of rank 0 alone, before it has sent anything, and
    weights of another model end the publication on both."""
    worker = "tests.rlef_mega.engines.sglang.publish_worker"
    with ServerDouble(1, str(model), "default") as server:
        outputs = launch(worker, str(model), str(tmp_path), server.url, processes=2)
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    whole = SentWeights(weights_of(model).items(), ServedModel(model), torch.float32, ranks=2)
    list(whole)
    assert first["checksums"] == second["checksums"] == whole.checksums
    assert first["share"] + second["share"] == len(whole.mine)
    assert abs(first["share"] - second["share"]) <= 1
    for said in (first, second):
        assert "cannot write" in said["unwritable"] and "model.rotary" in said["renamed"]
        assert set(said["versions"]) == {2}
    # rank 0 asks as it opens, then before and after the only publication that reached the server
    assert server.calls["server_info"] == 3 and server.calls["generate"] == 2
    assert not server.calls["model_info"] and not server.calls["health"]
