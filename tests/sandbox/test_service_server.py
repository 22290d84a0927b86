"""The grading server, as its clients and its operator see it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.service_process import (
    JSON,
    ONE_JOB,
    SANDBOX_PATH,
    TOKEN,
    ServerProcess,
    grade_body,
    run_aside,
    sleeper,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Start a server with a token, one worker and a queue of one."""
    options = (*ONE_JOB, "--queue", "1", "--max-body-mib", "1")
    with ServerProcess(*options, token=TOKEN) as process:
        yield process


def until(condition, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def refused_start(*options: str, token: str | None = None) -> str:
    """Return what `serve` prints when it refuses to start."""
    environment = {**os.environ, "PYTHONPATH": SANDBOX_PATH}
    environment.pop("RLEF_SANDBOX_TOKEN", None)
    if token is not None:
        environment["RLEF_SANDBOX_TOKEN"] = token
    words = [sys.executable, "-m", "rlef_sandbox", "serve", "--port", "0", *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done
    return done.stderr


def test_every_endpoint_needs_the_token(server):
    for method, path in (
        ("POST", "/v1/run"),
        ("POST", "/v1/grade"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/elsewhere"),
    ):
        for wrong in (
            "",
            "Bearer",
            f"Bearer {TOKEN}x",
            f"bearer {TOKEN}",
            f"Basic {TOKEN}",
            "\xff",
        ):
            reply = server.ask(method, path, {"source": "1"}, {"Authorization": wrong})
            assert reply.status == 401 and "token" in reply.error
            assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_a_malformed_request_is_a_400_that_names_the_field(server):
    for body, field in (
        (b"{", "the body"),
        ({}, "source"),
        ({"source": "x", "tests": [{"kind": "call", "args": [{"x": 1}]}]}, "tests[0].args"),
        ({"source": "x", "tests": [{"stdin": "", "expected": ""}], "checker": "?"}, "checker"),
        ({"source": "x", "tests": [], "language": "cobol"}, "unknown language 'cobol'"),
    ):
        reply = server.grade(body)
        assert reply.status == 400 and reply.error.startswith(field), reply
    assert server.grade(grade_body("print('done')"), "an id").status == 400
    assert server.ask("POST", "/v1/grade", {}, {"Content-Type": "text/plain"}).status == 415
    assert server.ask("POST", "/v1/nothing", {}).status == 404
    assert server.ask("GET", "/v1/grade").status == 405


def test_a_body_that_is_too_large_is_a_413_with_the_bound(server):
    reply = server.grade({"source": "#" * (1 << 20), "tests": []})
    assert (
        reply.status == 413 and "1048576 bytes" in reply.error and "--max-body-mib" in reply.error
    )
    chunks = iter([b"x" * (64 << 10)] * 20)
    assert server.ask("POST", "/v1/run", chunks).status == 413  # of a length not told before
    assert server.grade(grade_body("print('done')")).status == 200
    assert server.metrics()["held_bytes"] == 0


@pytest.mark.parametrize(
    "encodings",
    [
        ["deflate"],
        ["identity", "deflate"],
        ["deflate", "identity"],
        ["identity, deflate"],
        ["", "DEFLATE"],
    ],
)
def test_an_encoded_body_is_refused(server, encodings):
    bomb = zlib.compress(b" " * (100 << 20))
    lines = [f"Content-Encoding: {encoding}" for encoding in encodings]
    with connect(server, "/v1/run", len(bomb), *lines) as sent:
        sent.sendall(bomb)
        assert sent.recv(12) == b"HTTP/1.1 415"


def connect(server: ServerProcess, path: str, size_bytes: int, *headers: str) -> socket.socket:
    """Return a connection on which the head of a request was sent."""
    head = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {size_bytes}",
        f"Authorization: Bearer {server.token}",
        *headers,
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall("\r\n".join([*head, "", ""]).encode())
    return connection


def test_an_answer_carries_bytes_and_values(server):
    reply = server.ask(
        "POST",
        "/v1/run",
        {"source": "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", "stdin": "é"},
    )
    assert reply.json["results"][0]["stdout"] == "é"
    test = {"kind": "call", "entry_point": "f", "args": [2], "expected": {"tuple": [4, 2]}}
    reply = server.grade({"source": "def f(n): return n * 2, n", "tests": [test]})
    (result,) = reply.json["results"]
    assert result["status"] == "OK" and result["returned"] == "(4, 2)"


def test_a_full_queue_is_a_429_with_the_time_to_wait(server):
    work = [run_aside(lambda: server.grade(grade_body(sleeper(1)))) for _ in range(2)]
    until(lambda: server.metrics()["queue_length"] == 1)
    reply = server.grade(grade_body("print('done')"))
    assert reply.status == 429 and "full" in reply.error
    assert 1 <= int(reply.headers["Retry-After"]) <= 30
    for thread, replies in work:
        thread.join()
        assert replies[0].json["results"][0]["status"] == "OK"


def test_an_id_stands_for_one_piece_of_work(server):
    before = server.metrics()
    body = grade_body(sleeper(0.5))
    work = [run_aside(lambda: server.grade(body, "twice")) for _ in range(4)]
    for thread, _ in work:
        thread.join()
    late = server.grade(body, "twice")
    # times are in the answer, so that equal bytes are one run's
    assert {reply.body for _, replies in work for reply in replies} == {late.body}
    after = server.metrics()
    done = 'results_total{status="OK"}'
    assert after[done] - before.get(done, 0) == 1
    assert after["joined_total"] - before["joined_total"] == 4
    conflict = server.grade(grade_body("print('other')"), "twice")
    assert conflict.status == 409 and "'twice'" in conflict.error
    assert server.ask("POST", "/v1/run", body, {"Idempotency-Key": "twice"}).status == 409


def test_clients_take_turns():
    """One that comes later, from another address, does not wait for all that came before it."""
    with ServerProcess(*ONE_JOB) as server:
        work = [run_aside(lambda: server.grade(grade_body(sleeper(0.5)))) for _ in range(8)]
        until(lambda: server.metrics()["queue_length"] == 7)
        other = http.client.HTTPConnection(
            "127.0.0.1", server.port, source_address=("127.0.0.2", 0)
        )
        other.request("POST", "/v1/grade", json.dumps(grade_body("print('done')")), JSON)
        assert json.loads(other.getresponse().read())["results"][0]["status"] == "OK"
        other.close()
        assert server.metrics()["queue_length"] >= 3
        for thread, replies in work:
            thread.join()
            assert replies[0].json["results"][0]["status"] == "OK"


def test_a_client_leaves_a_part_of_the_queue_to_others():
    with ServerProcess(*ONE_JOB, "--queue", "4") as server:
        work = [run_aside(lambda: server.grade(grade_body(sleeper(2)))) for _ in range(4)]
        until(lambda: server.metrics()["queue_length"] == 3)
        assert server.grade(grade_body("print('done')")).status == 429
        other = http.client.HTTPConnection(
            "127.0.0.1", server.port, source_address=("127.0.0.2", 0)
        )
        other.request("POST", "/v1/grade", json.dumps(grade_body("print('done')")), JSON)
        assert other.getresponse().status == 200
        other.close()
        for thread, replies in work:
            thread.join()
            assert replies[0].status == 200
        assert server.grade(grade_body("print('done')")).status == 200


@pytest.mark.slow
def test_a_connection_without_a_whole_head_is_closed():
    with ServerProcess(*ONE_JOB) as server:
        work = {**grade_body(sleeper(40)), "limits": {"wall_s": 60}}
        thread, replies = run_aside(lambda: server.grade(work))
        silent, dripping = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
        dripping.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        busy = http.client.HTTPConnection("127.0.0.1", server.port)
        for _ in range(40):
            with contextlib.suppress(OSError):
                dripping.sendall(b"-")
            busy.request("GET", "/metrics")
            assert busy.getresponse().read()
            time.sleep(1)
        for connection in (silent, dripping):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        thread.join()
        assert replies[0].json["results"][0]["status"] == "OK"


def test_a_client_that_leaves_frees_its_place_but_not_what_others_wait_for(server):
    before = server.metrics()
    thread, replies = run_aside(lambda: server.grade(grade_body(sleeper(1.5))))
    until(lambda: server.metrics()["running"] == 1)
    body = json.dumps(grade_body("print('never')")).encode()
    leaver = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {**JSON, "Authorization": f"Bearer {TOKEN}"}
    leaver.request("POST", "/v1/grade", body, headers)
    until(lambda: server.metrics()["queue_length"] == 1)
    leaver.close()
    until(lambda: server.metrics()["queue_length"] == 0)
    thread.join()
    assert replies[0].json["results"][0]["status"] == "OK"
    after = server.metrics()
    assert after["cancelled_total"] - before["cancelled_total"] == 1
    wrong = 'results_total{status="WRONG_ANSWER"}'
    assert after.get(wrong, 0) == before.get(wrong, 0)  # it was not run


def test_work_that_runs_outlives_its_client_and_answers_the_next_try(server):
    body = grade_body(sleeper(1))
    leaver = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {**JSON, "Authorization": f"Bearer {TOKEN}", "Idempotency-Key": "again"}
    before = server.metrics()
    leaver.request("POST", "/v1/grade", json.dumps(body).encode(), headers)
    until(lambda: server.metrics()["running"] == 1)
    leaver.close()
    assert server.grade(body, "again").json["results"][0]["status"] == "OK"
    after = server.metrics()
    assert sum_of(after, "results_total") - sum_of(before, "results_total") == 1


def sum_of(metrics: dict[str, float], name: str) -> float:
    return sum(value for key, value in metrics.items() if key.startswith(name + "{"))


def test_metrics_add_up():
    with ServerProcess("--workers", "2") as server:
        wrong = {"source": "print(1)", "tests": [{"stdin": "", "expected": "2"}]}
        for body in (wrong, grade_body("print('done')"), grade_body("1/0")):
            assert server.grade(body).status == 200
        three = {**grade_body("print('done')"), "tests": [{"stdin": "", "expected": "done"}] * 3}
        assert server.grade(three).status == 200
        assert server.grade({}).status == 400
        metrics = server.metrics()
        assert metrics['requests_total{endpoint="/v1/grade",code="200"}'] == 4
        assert metrics['requests_total{endpoint="/v1/grade",code="400"}'] == 1
        assert metrics['results_total{status="OK"}'] == 4
        assert metrics['results_total{status="WRONG_ANSWER"}'] == 1
        assert metrics['results_total{status="RUNTIME_ERROR"}'] == 1
        assert metrics["request_seconds_count"] == metrics["wait_seconds_count"] == 4
        assert metrics['request_seconds_bucket{le="+Inf"}'] == 4
        buckets = [v for k, v in metrics.items() if k.startswith("request_seconds_bucket")]
        assert buckets == sorted(buckets)
        assert metrics["queue_length"] == metrics["running"] == metrics["held_bytes"] == 0
        assert metrics["zygotes_started_total"] == 2
        types = re.findall(r"# TYPE (\w+)", server.ask("GET", "/metrics").body.decode())
        documented = (Path(__file__).parents[2] / "docs/sandbox_service.md").read_text()
        assert [name for name in types if f"`{name}" not in documented] == []


@pytest.mark.timing
def test_a_slow_program_or_a_large_body_does_not_stall_the_server():
    """One worker is busy with a large comparison all along; health is answered meanwhile."""
    with ServerProcess(*ONE_JOB) as server:
        numbers = "1.0 " * 1_000_000
        test = {"stdin": numbers, "expected": numbers + "1.5"}
        body = {"source": "print(input().replace('1.0', '1.00') + '1.5')", "tests": [test]}
        thread, replies = run_aside(lambda: server.grade(body))
        slowest_s, asked, started_s = 0.0, 0, time.monotonic()
        while thread.is_alive():
            began = time.monotonic()
            assert server.ask("GET", "/health").status == 200
            slowest_s, asked = max(slowest_s, time.monotonic() - began), asked + 1
            time.sleep(0.02)
        assert replies[0].json["results"][0]["status"] == "OK"
        assert asked > 10 and slowest_s < (time.monotonic() - started_s) / 2


def test_draining_refuses_new_work_and_loses_none():
    with ServerProcess(*ONE_JOB) as server:
        bodies = [grade_body(sleeper(0.3, n), str(n)) for n in range(5)]
        work = [run_aside(lambda b=body: server.grade(b)) for body in bodies]
        until(lambda: server.metrics()["queue_length"] == 4)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/health").status == 503)
        assert server.ask("GET", "/health").json["status"] == "draining"
        assert server.metrics()["draining"] == 1
        refusal = server.grade(grade_body("print('late')"))
        assert refusal.status == 503 and "draining" in refusal.error
        assert refusal.headers["Connection"] == "close"
        for thread, replies in work:
            thread.join()
            assert replies[0].json["results"][0]["status"] == "OK"
        assert server.process.wait(20) == 0


def test_a_drain_sends_large_answers_to_slow_readers_before_it_ends():
    with ServerProcess(*ONE_JOB) as server:
        body = json.dumps({"source": "import time; print('x' * 8_000_000); time.sleep(0.5)"})
        with socket.create_connection(("127.0.0.1", server.port)) as reader:
            head = f"POST /v1/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            reader.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
            until(lambda: server.metrics()["running"] == 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1.5)
            assert server.process.poll() is None
            received = b""
            while piece := reader.recv(1 << 20):
                received += piece
        answer = received.partition(b"\r\n\r\n")[2]
        assert len(json.loads(answer)["results"][0]["stdout"]) == 8_000_001
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second):
    with ServerProcess(*ONE_JOB) as server:
        thread, _ = run_aside(lambda: lost(server))
        until(lambda: server.metrics()["running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/health").status == 503)
        server.process.send_signal(second)
        assert server.process.wait(5) == 128 + second
        thread.join()


def lost(server: ServerProcess) -> None:
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        server.grade(grade_body(sleeper(30)))


def test_bodies_are_held_within_a_bound():
    with ServerProcess(*ONE_JOB, "--max-held-mib", "1") as server:
        large = {**grade_body(sleeper(1)), "language": "python", "limits": {"wall_s": 60}}
        large["source"] = f"{large['source']}  # {'x' * 700_000}"
        thread, replies = run_aside(lambda: server.grade(large))
        until(lambda: server.metrics()["held_bytes"] > 700_000)
        reply = server.grade({**large, "source": "#" * 400_000})
        assert reply.status == 429 and "too large" in reply.error and "Retry-After" in reply.headers
        assert server.grade(grade_body("print('done')")).status == 200
        thread.join()
        assert replies[0].json["results"][0]["status"] == "OK"
        assert server.metrics()["held_bytes"] == 0


def test_a_body_counts_as_it_arrives():
    """An announced body does not count, but one that would not fit now is refused with a 429."""
    with ServerProcess(*ONE_JOB, "--max-held-mib", "1", "--max-body-mib", "1") as server:
        silent = [connect(server, "/v1/run", 1 << 20) for _ in range(9)]
        silent += [connect(server, "/v1/grade", 1 << 20) for _ in range(9)]
        assert server.grade(grade_body("print('done')")).status == 200
        silent[0].sendall(b" " * 600_000)
        until(lambda: server.metrics()["held_bytes"] == 600_000)
        assert server.grade({"source": "#" * 500_000, "tests": []}).status == 429
        silent[1].sendall(b" " * 600_000)
        assert silent[1].recv(12) == b"HTTP/1.1 429"
        for connection in silent:
            connection.close()
        until(lambda: server.metrics()["held_bytes"] == 0)


@pytest.mark.slow
def test_a_body_that_does_not_come_is_a_408():
    with ServerProcess(*ONE_JOB) as server:
        silent = connect(server, "/v1/run", 100)
        dripping = connect(server, "/v1/run", 100)
        for _ in range(28):
            dripping.sendall(b" ")
            time.sleep(1)
        for connection, count in ((silent, b"0 bytes"), (dripping, b"28 bytes")):
            answer = connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 408") and count in answer
            connection.close()
        until(lambda: server.metrics()["held_bytes"] == 0)


def test_bodies_whose_clients_left_are_held_until_they_are_parsed_or_run():
    slow = b'{"source":"","tests":[{"kind":"call","entry_point":"f","args":[[%s1]]}]}' % (
        b"[1]," * 150_000
    )
    with ServerProcess(*ONE_JOB, "--max-held-mib", "2") as server:
        with connect(server, "/v1/grade", len(slow)) as leaver:
            leaver.sendall(slow)
            until(lambda: server.metrics()["held_bytes"] == len(slow))
        left = [connect(server, "/v1/grade", len(slow)) for _ in range(3)]
        for leaver in left:
            leaver.sendall(slow)
        until(lambda: server.metrics()["held_bytes"] >= 3 * len(slow))
        for leaver in left:
            leaver.close()
        time.sleep(0.05)
        assert server.metrics()["held_bytes"] >= len(slow)
        until(lambda: server.metrics()["held_bytes"] == 0, 60)
        running = json.dumps(grade_body(f"{sleeper(1)}  # {'x' * 100_000}")).encode()
        with connect(server, "/v1/grade", len(running)) as leaver:
            leaver.sendall(running)
            until(lambda: server.metrics()["running"] == 1)
        time.sleep(0.1)
        assert server.metrics()["held_bytes"] == len(running)
        until(lambda: server.metrics()["held_bytes"] == 0)


NESTED = "".join(f"{' ' * d}try: pass\n{' ' * d}finally:\n" for d in range(19)) + f"{' ' * 19}x\n"
CODE = {
    "long": "assert f(1) == 2\n" * 200_000,
    "with blocks that double": NESTED * 20,
    "with fields": "f'" + "{a}" * 100_000 + "'",
}
BRIEF = {"cpu_s": 0.5, "memory_bytes": 64 << 20}
STDIN = {"stdin": "", "expected": ""}
CHECK = {"kind": "check", "entry_point": "f"}
HEAVY: dict[str, tuple[dict[str, object], str]] = {
    **{f"a check {kind}": ({"tests": [{**CHECK, "code": CODE[kind]}]}, "ERROR") for kind in CODE},
    **{
        f"a checker {kind}": (
            {"tests": [STDIN], "checker": {"kind": "program", "source": code, "limits": BRIEF}},
            "ERROR",
        )
        for kind, code in CODE.items()
    },
    "lists": (
        {"tests": [{"kind": "call", "entry_point": "f", "args": [[[]] * 1_000_000]}]},
        "LIMIT",
    ),
    "an unknown field": ({"tests": [], "x": [[]] * 4_000_000}, "unknown field"),
}


@pytest.mark.parametrize(("fields", "answer"), HEAVY.values(), ids=HEAVY)
@pytest.mark.timing
def test_no_body_holds_up_other_requests(fields, answer):
    """Code takes Python seconds to hours to compile, and many values take it one call of seconds,
    in which no other thread runs.
    """
    body = json.dumps({"source": "def f(x): return x", "limits": BRIEF, **fields}).encode()
    with ServerProcess(*ONE_JOB) as server:
        thread, replies = run_aside(lambda: server.grade(body))
        slowest_s = 0.0
        while thread.is_alive():
            began_s = time.monotonic()
            assert server.ask("GET", "/health").status == 200
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            time.sleep(0.02)
        assert answer in replies[0].body.decode()
        assert slowest_s < 1


def test_a_server_whose_child_is_killed_refuses_work_and_ends():
    with ServerProcess(*ONE_JOB) as server:
        thread, replies = run_aside(lambda: server.grade(grade_body(sleeper(30))))
        until(lambda: server.metrics()["running"] == 1)
        os.kill(server.child, signal.SIGKILL)
        thread.join()
        assert replies[0].status == 503 and "grading process ended" in replies[0].error
        assert server.process.wait(20) == 1


def test_a_server_without_a_token_answers_only_to_loopback_names():
    with ServerProcess(*ONE_JOB) as server:
        for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "127.9.9.9:8765", "[::1]:8765"):
            assert server.ask("GET", "/health", headers={"Host": host}).status == 200
        for host in (
            *("evil.example", "localhost.evil.example", "0.0.0.0", "192.0.2.1:80", "", "["),
            *("[::1]evil", "evil@localhost", "localhost:80@evil", "localhost,evil", "127.1"),
        ):
            for method, path in (("POST", "/v1/run"), ("POST", "/v1/grade"), ("GET", "/health")):
                reply = server.ask(method, path, {"source": "1"}, {"Host": host})
                assert reply.status == 403 and "--token-file" in reply.error
        assert server.ask("GET", "/metrics", headers={"Host": "any.example"}).status == 200
    with ServerProcess(*ONE_JOB, token=TOKEN) as server:
        assert server.ask("GET", "/health", headers={"Host": "node7"}).status == 200


def test_a_server_that_others_reach_needs_a_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "node7"):
        assert "give a token" in refused_start("--host", host)
    assert "16 to 4096" in refused_start("--host", "0.0.0.0", token="short")
    with ServerProcess("--host", "localhost", *ONE_JOB) as server:
        assert server.ask("GET", "/health").status == 200
    with ServerProcess("--host", "0.0.0.0", *ONE_JOB, token=TOKEN) as server:
        assert server.ask("GET", "/health").status == 200


def test_only_its_owner_may_read_the_token_file(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o640)
    assert f"chmod 600 {file}" in refused_start("--token-file", str(file))
    file.chmod(0o600)
    with ServerProcess(*ONE_JOB, "--token-file", str(file)) as server:
        assert server.ask("GET", "/health").status == 401
        server.token = TOKEN
        assert server.ask("GET", "/health").status == 200


def test_a_start_that_fails_prints_one_message(server):
    for options, words in (
        (("--port", "99999"), "--port is 99999; it must be between 0 and 65535"),
        (("--workers", "0"), "--workers is 0"),
        (("--port", str(server.port)), f"cannot listen on 127.0.0.1 port {server.port}"),
        (("--token-file", "/nowhere"), "/nowhere"),
    ):
        said = refused_start(*options)
        assert words in said and "Traceback" not in said
