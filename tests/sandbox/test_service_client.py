"""The client against real servers that are full, slow, refusing, draining, killed and restarted:
every call is answered exactly once, as the embedded sandbox would answer it."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rlef_sandbox import CallTest, CheckerProgram, CheckTest, Limits, Result, Sandbox, Status, Test
from rlef_sandbox.service import wire
from rlef_sandbox.service.client import RequestRefusedError, SandboxClient, ServiceError
from tests.sandbox.service_process import (
    ADD,
    ADD_PROGRAM,
    ONE_JOB,
    PATIENT,
    TOKEN,
    ServerProcess,
    sleeper,
)
from tests.sandbox.test_lifetime import descendants, kill_all

ECHO = """\
import sys
sys.stdout.buffer.write(sys.stdin.buffer.read())
sys.stderr.buffer.write(b'\\xfe')
"""
NOT_EMPTY = "def check(stdin, expected, actual): return actual != b''"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--workers", "2", token=TOKEN) as process:
        yield process


def within(*urls: str, work, token: str | None = TOKEN, **options: Any) -> Any:
    """Return what `work`, a coroutine function of a client, returns."""

    async def use() -> Any:
        async with SandboxClient(urls, token, **options) as client:
            return await work(client)

    return asyncio.run(use())


def results_of(*servers: ServerProcess) -> float:
    """Return how many programs these servers have run."""
    samples = (sample for server in servers for sample in server.metrics().items())
    return sum(value for name, value in samples if name.startswith("results_total"))


def judged(result: Result) -> Result:
    """Remove from a result what differs between two runs of one program."""
    return dataclasses.replace(result, cpu_s=0, wall_s=0, max_rss_bytes=0)


def test_a_client_answers_as_the_sandbox_does(server):
    every_byte = bytes(range(256))
    calls: list[tuple[str, list[Any], dict[str, Any]]] = [
        (ADD_PROGRAM, [ADD], {}),
        (ADD_PROGRAM, [ADD, Test(b"1 1", b"3"), ADD], {}),
        (ADD_PROGRAM, [ADD, Test(b"1 1", b"3"), ADD], {"stop_at_first_failure": False}),
        (ECHO, [Test(every_byte, every_byte)], {"checker": "exact"}),
        (ECHO, [Test(b"b\na", b"a\nb")], {"checker": "unordered_lines"}),
        ("def f(x): return x", [CallTest("f", ((1, {2: {3}}),), (1, {2: {3}}))], {}),
        ("def f(x): return [x]", [CallTest("f", (b"\xff",), [b"\xff"])], {}),
        ("def f(x): return 10**30", [CallTest("f", (0,), 10**30)], {}),
        ("def f(x): return x + 1", [CheckTest("f", "def check(f): assert f(1) == 2")], {}),
        ("def f(x): return x - 1", [CheckTest("f", "def check(f): assert f(1) == 2")], {}),
        (
            ADD_PROGRAM,
            [ADD],
            {"checker": CheckerProgram("def check(i, e, a): return a == b'3\\n'")},
        ),
        (ADD_PROGRAM, [Test(b"1", b"2")] * 3, {"run_at_least": 2}),
        ("x = ", [ADD], {}),
        ("raise SystemExit(3)", [ADD], {}),
        ("while True: pass", [ADD], {"limits": Limits(cpu_s=0.1)}),
        ("print('x' * 99)", [ADD], {"limits": Limits(output_bytes=10)}),
        ("", [], {}),
    ]

    async def ask(client: SandboxClient) -> list[list[Result]]:
        return [await client.grade(source, tests, **more) for source, tests, more in calls]

    with Sandbox(workers=1) as sandbox:
        embedded = [sandbox.grade(source, tests, **more) for source, tests, more in calls]
        run = sandbox.run(ECHO, every_byte)
    remote = within(server.url, work=ask)
    for call, here, there in zip(calls, embedded, remote, strict=True):
        assert list(map(judged, there)) == list(map(judged, here)), call
    there = within(server.url, work=lambda client: client.run(ECHO, every_byte))
    assert judged(there) == judged(run) and there.stdout == every_byte


def test_a_wrong_request_raises_as_the_sandbox_does_and_is_not_tried_again(server):
    def refused(call, token: str | None = TOKEN) -> RequestRefusedError:
        before = sum(v for k, v in server.metrics().items() if "/v1/" in k)
        with pytest.raises(RequestRefusedError) as refusal:
            within(server.url, work=call, token=token, deadline_s=20)
        assert sum(v for k, v in server.metrics().items() if "/v1/" in k) == before + 1
        return refusal.value

    error = refused(lambda client: client.run("1", language="cobol"))
    assert error.status == 400 and "unknown language 'cobol'" in str(error)
    error = refused(lambda client: client.grade("1", [ADD], checker="?"))
    assert error.status == 400 and "unknown checker '?'" in str(error)
    for token in (None, "another-wrong-token"):
        error = refused(lambda client: client.run("1"), token)
        assert error.status == 401 and "token" in str(error) and server.url in str(error)


ALL_OK = Result(Status.OK)
FAILED = Result(Status.WRONG_ANSWER)


@pytest.mark.parametrize(
    ("results", "options"),
    [
        ([], {}),
        ([ALL_OK, ALL_OK], {}),
        ([ALL_OK] * 4, {}),
        ([FAILED], {"run_at_least": 2}),
        ([ALL_OK, FAILED], {"stop_at_first_failure": False}),
    ],
)
def test_an_answer_that_lacks_results_is_no_verdict(results, options):
    """Whatever answers on a server's port: a list in which nothing failed would be a success."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/health":
            return web.json_response({"isolation": {}})
        return web.Response(body=wire.encode_results(results))

    async def ask() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        async with (
            TestServer(application) as server,
            SandboxClient([str(server.make_url(""))], deadline_s=0.5) as client,
        ):
            await client.grade("", [ADD] * 3, **options)

    with pytest.raises(ServiceError, match=f"answered with {len(results)} results"):
        asyncio.run(ask())


def test_a_full_queue_is_waited_for_and_each_request_done_once():
    with ServerProcess(*ONE_JOB, "--queue", "1") as server:

        async def ask(client: SandboxClient) -> list[Result]:
            runs = [client.run(sleeper(0.05, n), limits=PATIENT) for n in range(8)]
            return await asyncio.gather(*runs)

        results = within(server.url, work=ask, token=None, connections=6)
        assert [result.stdout for result in results] == [b"%d\n" % n for n in range(8)]
        assert server.metrics()['requests_total{endpoint="/v1/run",code="429"}'] > 0
        assert results_of(server) == 8


def test_a_killed_servers_work_goes_to_the_other_and_each_request_is_answered_once():
    calls = 60
    with ServerProcess(*ONE_JOB) as doomed, ServerProcess(*ONE_JOB) as other:
        answered: Counter[int] = Counter()

        async def call(client: SandboxClient, n: int) -> None:
            tests = [Test(b"%d" % n, b"%d" % (n * n))]
            source = "import time; time.sleep(0.05); print(int(input()) ** 2)"
            (result,) = await client.grade(source, tests, PATIENT)
            assert result.status is Status.OK
            answered[n] += 1
            if sum(answered.values()) == calls // 3:
                doomed.process.send_signal(signal.SIGKILL)

        async def ask(client: SandboxClient) -> None:
            await asyncio.gather(*(call(client, n) for n in range(calls)))

        within(doomed.url, other.url, work=ask, token=None, connections=8)
        assert answered == Counter(range(calls))
        assert doomed.process.wait(5) == -signal.SIGKILL
        assert calls // 3 < results_of(other) < calls  # both had their share


def test_a_draining_servers_work_goes_to_the_other():
    with ServerProcess(*ONE_JOB) as leaving, ServerProcess(*ONE_JOB) as other:

        async def ask(client: SandboxClient) -> list[Result]:
            runs = [
                asyncio.create_task(client.run(sleeper(0.05, n), limits=PATIENT)) for n in range(30)
            ]
            await runs[4]
            leaving.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*runs)

        results = within(leaving.url, other.url, work=ask, token=None, connections=4)
        assert [result.stdout for result in results] == [b"%d\n" % n for n in range(30)]
        assert leaving.process.wait(20) == 0
        assert results_of(other) < 30


def test_a_server_that_hangs_is_given_up_and_one_that_is_slow_is_not():
    with ServerProcess(*ONE_JOB) as hangs, ServerProcess(*ONE_JOB) as slow:

        async def ask(client: SandboxClient) -> list[Result]:
            runs = [
                asyncio.create_task(client.run(sleeper(0.5, n), limits=PATIENT)) for n in range(6)
            ]
            await runs[0]
            hangs.process.send_signal(signal.SIGSTOP)
            return await asyncio.gather(*runs)

        options = {"connections": 3, "heartbeat_s": 0.3}
        results = within(hangs.url, slow.url, work=ask, token=None, **options)
        assert [result.stdout for result in results] == [b"%d\n" % n for n in range(6)]
        assert results_of(slow) <= 6  # none of them twice


NONSENSE = (
    b"",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"results":[{"status":"PASS"}]}',
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
    b"HTTP/1.1 408 Request Timeout\r\nRetry-After: soon\r\nContent-Length: 0\r\n\r\n",
)


def test_a_peer_that_talks_nonsense_is_not_a_grading_server():
    """Whatever it says to a grading request, it seems healthy, so that it is asked again and
    again; every call is answered by the real server."""
    about = b'{"status": "ready", "isolation": {}}'
    healthy = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(about), about)
    said: Counter[bytes] = Counter()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        words = healthy if b"/health" in head else NONSENSE[said.total() % len(NONSENSE)]
        if words != healthy:
            said[words] += 1
        writer.write(words)
        await writer.drain()
        writer.close()

    async def ask(client: SandboxClient) -> list[Result]:
        return [await client.run(f"print({n})") for n in range(80)]

    async def use(real: ServerProcess) -> list[Result]:
        peer = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{peer.sockets[0].getsockname()[1]}"
        async with peer, SandboxClient([url, real.url], connections=1) as client:
            return await ask(client)

    with ServerProcess(*ONE_JOB) as real:
        results = asyncio.run(use(real))
        assert [result.stdout for result in results] == [b"%d\n" % n for n in range(80)]
        assert results_of(real) == 80
    assert said.total() >= len(NONSENSE)


def test_requests_wait_for_a_server_that_comes_back():
    with ServerProcess(*ONE_JOB) as first:
        port = first.port

    async def ask(client: SandboxClient) -> Result:
        call = asyncio.create_task(client.run("print('back')"))
        await asyncio.sleep(0.5)
        assert not call.done()
        server = await asyncio.to_thread(ServerProcess, *ONE_JOB, port=port)
        with server:
            return await call

    assert within(first.url, work=ask, token=None).stdout == b"back\n"


def test_work_is_spread_over_the_servers():
    with ServerProcess(*ONE_JOB) as one, ServerProcess(*ONE_JOB) as two:

        async def ask(client: SandboxClient) -> None:
            await asyncio.gather(*(client.run(sleeper(0.02), limits=PATIENT) for _ in range(40)))

        within(one.url, two.url, work=ask, token=None, connections=4)
        assert results_of(one, two) == 40
        assert min(results_of(one), results_of(two)) >= 10


def test_past_the_deadline_an_error_names_the_servers_and_their_last_failures():
    with ServerProcess(*ONE_JOB) as gone, ServerProcess(*ONE_JOB) as stays:
        gone.process.kill()
        gone.process.wait()
        with pytest.raises(ServiceError) as failure:
            work = lambda client: client.run(sleeper(30), limits=PATIENT)  # noqa: E731
            within(gone.url, stays.url, work=work, token=None, deadline_s=1.5)
    assert "within 1.5 s" in str(failure.value)
    assert gone.url in str(failure.value) and stays.url in str(failure.value)
    with pytest.raises(ServiceError, match="cannot connect") as failure:
        within(gone.url, work=lambda client: client.run("1"), token=None, deadline_s=0.5)
    assert gone.url in str(failure.value)


def test_a_cancelled_call_frees_its_place_in_the_queue():
    with ServerProcess(*ONE_JOB) as server:

        async def ask(client: SandboxClient) -> None:
            first = asyncio.create_task(client.run(sleeper(1), limits=PATIENT))
            await asyncio.sleep(0.3)
            second = asyncio.create_task(client.run("print(2)"))
            await asyncio.sleep(0.3)
            second.cancel()
            assert (await first).status is Status.OK

        within(server.url, work=ask, token=None)
        assert results_of(server) == 1 and server.metrics()["cancelled_total"] == 1


def test_health_names_every_server_that_is_not_ready(server):
    health = within(server.url, work=SandboxClient.health)
    assert health[server.url]["isolation"]["seccomp"] is True
    assert health[server.url]["versions"]["api"] == 1
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(ServiceError, match=f"{nowhere}: .*") as failure:
        within(nowhere, server.url, work=SandboxClient.health)
    assert server.url not in str(failure.value)
    with pytest.raises(ServiceError, match=f"{server.url}: 401 the token"):
        within(server.url, work=SandboxClient.health, token="another-wrong-token")


def test_a_fault_of_the_sandbox_is_never_a_verdict():
    """Its processes are killed all the time: that is an error or a late answer, not a failure."""
    with ServerProcess(*ONE_JOB) as server:

        async def ask(client: SandboxClient) -> Result:
            call = asyncio.create_task(client.run(sleeper(0.5, 1), limits=PATIENT))
            until = time.monotonic() + 6
            while not call.done() and time.monotonic() < until:
                await asyncio.sleep(0.1)
                kill_all(descendants(server.child))
            return await call

        result = within(server.url, work=ask, token=None)
        assert result.status in (Status.SANDBOX_ERROR, Status.OK)
        faults = sum(v for k, v in server.metrics().items() if k.startswith("faults_total"))
        assert faults >= 1


@pytest.mark.parametrize(
    "url", ["node7:8765", "ftp://node7", "http://", "http://node7/v1", "http://a b"]
)
def test_a_malformed_address_is_refused(url):
    with pytest.raises(ValueError, match="write it like http://node7:8765"):
        SandboxClient([url])


def test_a_client_takes_sensible_settings_only():
    one = "http://127.0.0.1:1"
    for urls, options in (
        ([], {}),
        ([one, one], {}),
        ([one], {"deadline_s": 0}),
        ([one], {"heartbeat_s": float("nan")}),
        ([one], {"connections": 0}),
    ):
        with pytest.raises(ValueError):
            SandboxClient(urls, **options)
