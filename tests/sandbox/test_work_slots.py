"""Several programs at once: whose turn it is, and that nobody waits for a sleeper."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlef_sandbox import CheckTest, Limits, Sandbox, Status, Test
from rlef_sandbox.sandbox import JOBS_PER_WORKER, most_open_programs
from rlef_sandbox.work_slots import WorkSlots

pytestmark = pytest.mark.timing
SLEEP = "import time; time.sleep(30)"


def test_a_sleeper_holds_up_nobody(sandbox: Sandbox) -> None:
    """The fixture's sandbox has one worker."""
    sleeps = Limits(cpu_s=1.0, wall_s=2.5)
    with ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        sleepers = [pool.submit(sandbox.run, SLEEP, b"", sleeps) for _ in range(6)]
        time.sleep(0.2)
        for n in range(8):
            (result,) = sandbox.grade("print(input())", [Test(str(n), str(n))])
            assert result.status is Status.OK
        assert time.monotonic() - started < 2.5, "the sleepers should still sleep"
        assert not any(sleeper.done() for sleeper in sleepers)
        assert {sleeper.result().status for sleeper in sleepers} == {Status.IDLE_LIMIT}


def test_a_sleeper_among_the_tests_of_a_program_holds_up_nobody(sandbox: Sandbox) -> None:
    source = "import time; n = input(); time.sleep(int(n)); print(n)"
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(sandbox.grade, source, [Test("0", "0"), Test("2", "2")])
        time.sleep(0.5)
        assert sandbox.run("print(1)").status is Status.OK
        assert not slow.done()
        assert [result.status for result in slow.result()] == [Status.OK] * 2


def test_a_program_that_wakes_counts_as_working_again() -> None:
    slots = WorkSlots(1, 4)
    with slots.take() as slept:
        slept.sleep()
        with slots.take() as other:
            assert not slept.wake(wait=False)  # the other is at work
            other.sleep()
            assert slept.wake()
            with ThreadPoolExecutor(1) as pool:
                third = pool.submit(lambda: slots.take().__enter__())
                time.sleep(0.1)
                assert not third.done()
                slept.sleep()
                third.result(timeout=5)


def test_programs_that_wake_take_turns_and_their_wait_is_not_charged(sandbox: Sandbox) -> None:
    """If all twelve woke together, each would exceed its wall clock limit on the shared cores."""
    source = "import time; time.sleep(0.3)\nwhile time.process_time() < 0.4: pass\nprint(1)"
    limits = Limits(cpu_s=1.0, wall_s=1.2)
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(sandbox.grade, source, [Test("", "1")], limits) for _ in range(12)]
        assert {job.result()[0].status for job in jobs} == {Status.OK}


def test_checks_that_work_take_turns_though_their_programs_wait(sandbox: Sandbox) -> None:
    """All at once would share the cores beyond their wall clock limits, or their programs'."""
    check = "import time\ndef check(f):\n    while time.process_time() < 0.4: pass\n    f()"
    limits = Limits(cpu_s=1.0, wall_s=1.2)
    with ThreadPoolExecutor(12) as pool:
        tests = [CheckTest("f", check)]
        jobs = [pool.submit(sandbox.grade, "def f(): 0", tests, limits) for _ in range(12)]
        assert {job.result()[0].status for job in jobs} == {Status.OK}


def test_the_pipes_of_all_open_programs_fit_the_quota_of_a_user() -> None:
    assert most_open_programs(1) == JOBS_PER_WORKER
    assert most_open_programs(1000) == 1000
    quota = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    if quota:
        assert most_open_programs(20) * 30 * 16 <= max(quota, 20 * 30 * 16)


def test_programs_that_work_take_turns(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=0.2, wall_s=30.0)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(sandbox.run, "while True: pass", b"", limits) for _ in range(4)]
        results = [job.result() for job in jobs]
    assert {result.status for result in results} == {Status.TIME_LIMIT}


def test_a_machine_loaded_four_times_over_gives_no_false_limit() -> None:
    """Eight workers on however few cores, each with a program that needs most of its CPU time."""
    source = "import time\nwhile time.process_time() < 0.3: pass\nprint(1)"
    with Sandbox(workers=8) as sandbox, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(sandbox.grade, source, [Test("", "1")], Limits(cpu_s=0.5)) for _ in range(8)
        ]
        assert {job.result()[0].status for job in jobs} == {Status.OK}


def test_the_threads_of_one_run_do_not_count_against_another(sandbox: Sandbox) -> None:
    """Each run's threads are counted apart, in one zygote too."""
    many = (
        "import threading, time\n"
        "for _ in range(15): threading.Thread(target=time.sleep, args=(1.5,)).start()\n"
        "print(threading.active_count())"
    )
    limits = Limits(processes=16)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(sandbox.run, many, b"", limits) for _ in range(4)]
        assert [job.result().stdout for job in jobs] == [b"16\n"] * 4


def test_public_tests_are_run_to_the_end_and_private_ones_to_the_first_failure(
    sandbox: Sandbox,
) -> None:
    source = "print(abs(int(input())))"
    passing, failing = Test("1", "1"), Test("-1", "-1")
    cases = [
        ([failing, passing, passing, passing], 2, 2),  # public failed: shown whole, no private run
        ([passing, passing, passing, passing], 2, 4),
        ([passing, passing, failing, passing], 2, 3),
        ([failing, failing, failing], 0, 1),
        ([failing, failing], 5, 2),
    ]
    for tests, at_least, run in cases:
        assert len(sandbox.grade(source, tests, run_at_least=at_least)) == run
    assert len(sandbox.grade("def f(:", [passing] * 4, run_at_least=2)) == 2


def test_turns_bound_those_that_work_and_those_that_wait() -> None:
    slots = WorkSlots(working=2, open_programs=3)
    at_work: list[int] = []
    with ThreadPoolExecutor(8) as pool:

        def job(sleeps: bool) -> None:
            with slots.take() as slot:
                if sleeps:
                    slot.sleep()
                    slot.sleep()  # once is enough
                    time.sleep(0.05)
                else:
                    at_work.append(1)
                    assert len(at_work) <= 2
                    time.sleep(0.01)
                    at_work.pop()

        for done in [pool.submit(job, bool(n % 3 == 0)) for n in range(60)]:
            done.result()
    with slots.take(), slots.take():
        pass
    assert JOBS_PER_WORKER > 1
