"""Asynchronous training on simulated servers, in virtual time: what it gains, and that what it
trains on is what synchronous training does. Nothing here depends on the machine's speed."""

import asyncio
from dataclasses import replace

import pytest

from rlef_mega.bench import leaders, virtual_time
from rlef_mega.bench.dialogues import curriculum_chat
from rlef_mega.bench.overlap import GOAL, Workload, alone_s, simulate
from rlef_mega.bench.simulated import (
    Lengths,
    Server,
    ServerSpeed,
    SimulatedEngine,
    Writer,
)
from rlef_mega.dialogues.templates import extract_program
from rlef_mega.types import Sampling

LOAD = Workload(batch=32, servers=1, warmup=4, steps=6)
SPEED = ServerSpeed(step_s=0.1, step_per_request_s=0.01, prefill_token_s=0.001, most_running=2)


@pytest.fixture(scope="module")
def chat():
    return curriculum_chat()


def test_async_is_as_fast_as_its_slower_half_and_trains_on_the_same_lengths(chat):
    generation_s = alone_s(chat, LOAD)
    load = replace(LOAD, train_s=generation_s)
    sync, one_off, asynchronous = (simulate(chat, load, staleness) for staleness in (0, 1, 2))
    assert sync.step_s == pytest.approx(2 * generation_s + load.publish_s, rel=0.1)
    assert sync.step_s / asynchronous.step_s >= GOAL
    assert sync.step_s / one_off.step_s >= 1.5
    assert asynchronous.step_s >= generation_s + load.publish_s - 1e-6  # the trainer's own time
    for run, oldest in ((sync, 0), (one_off, 1), (asynchronous, 2)):
        assert run.oldest <= oldest
        assert abs(run.tokens - sync.tokens) <= 3 * run.tokens_error
    # where servers are what there is too little of, batches close without the long dialogues, and
    # these are trained on all the same
    busy = replace(LOAD, train_s=generation_s / 4)
    overtaken = simulate(chat, busy, 2)
    assert overtaken.staleness > 0 and overtaken.oldest <= 2
    assert abs(overtaken.tokens - sync.tokens) <= 3 * overtaken.tokens_error


def test_a_simulation_repeats_to_the_last_digit(chat):
    load = replace(LOAD, batch=8, train_s=10.0, steps=3)
    assert simulate(chat, load, 2) == simulate(chat, load, 2)


def test_a_server_takes_the_time_worked_out_by_hand():
    """Two requests at once, of 10 and 20 tokens, 100 of context each: 0.2 s of prefill, 10 steps
    of 0.12 s together, then 10 of 0.11 s. The third waits for the first to end."""

    async def serve() -> list[float]:
        server, loop = Server(SPEED, 0), asyncio.get_running_loop()

        async def one(length: int, context: int) -> float:
            await server.serve(context, context, length)
            return loop.time()

        return await asyncio.gather(one(10, 100), one(20, 100), one(5, 0))

    first, second, third = virtual_time.run(serve())
    assert first == pytest.approx(0.2 + 10 * 0.12)
    assert third == pytest.approx(first + 5 * 0.12)
    assert second == pytest.approx(third + 5 * 0.11)


def test_a_publication_stops_servers_and_shows_in_the_tokens_versions():
    async def serve() -> tuple[list[int], float]:
        server, loop = Server(SPEED, 3), asyncio.get_running_loop()
        serving = asyncio.ensure_future(server.serve(0, 0, 10))
        await asyncio.sleep(4 * 0.11)  # 4 tokens
        server.publish(7.0, 4)
        return await serving, loop.time()

    versions, ended = virtual_time.run(serve())
    assert versions == [3] * 4 + [4] * 6
    assert ended == pytest.approx(10 * 0.11 + 7.0 + 4 * 0.001)  # and 4 tokens of context again


def test_follow_up_turns_find_their_context_unless_weights_have_changed(chat):
    async def turns() -> list[int]:
        engine = SimulatedEngine(chat, servers=2, speed=SPEED, lengths=Lengths(), max_new_tokens=64)
        cached = []
        async with engine.session() as session:
            for publish in (False, False, True):
                if publish:
                    await engine.publish(1)
                await session.generate([0] * 500, Sampling(64), 1)
                cached.append(engine.take_counts()["cached_tokens"])
        return cached

    assert virtual_time.run(turns()) == [0, 564, 0]


@pytest.mark.parametrize("length", [1, 60, 200, 1999])
@pytest.mark.parametrize("solved", [True, False])
def test_a_response_has_its_length_and_a_program_that_parses(chat, length, solved):
    written = Writer(chat, 2048).write(length, solved)
    assert len(written) == max(length, len(Writer(chat, 2048).write(1, solved)))
    program = extract_program(chat.decode(written))
    assert program is not None and program.startswith(f"solved = {solved}")


def test_in_virtual_time_nothing_to_wait_for_is_an_error():
    with pytest.raises(RuntimeError, match="wait for each other"):
        virtual_time.run(asyncio.Event().wait())


def test_each_process_drives_its_share_and_all_hold_all_episodes():
    """The benchmark's own processes; it raises unless all hold the same episodes."""
    figures = {f.name: f.samples for f in leaders.benchmark(processes=2, episodes=20).figures}
    assert figures["dialogues a process drove"] == (10, 10)
    assert figures["episodes a process holds"] == (20, 20)
