"""The live page follows a run, and is served to this machine only."""

import http.client
import json
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlef_mega.report.live import LiveServer
from tests.rlef_mega.report.chromium import Chromium, find_chromium
from tests.rlef_mega.report.runs import FEW_PANELS, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo", steps=3, problems=20, panels=FEW_PANELS)


@pytest.fixture
def server(run: Path) -> Iterator[LiveServer]:
    with LiveServer([run], port=0, episodes=100) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def get(server: LiveServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def add_a_step(run: Path, step: int) -> None:
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(json.loads(last) | {"step": step}) + "\n")


def test_the_page_is_rendered_again_only_when_the_run_has_changed(server, run):
    (run / "progress").write_text("update begins\n")
    first = get(server, "/")[1]
    state = json.loads(get(server, "/state")[1])
    assert f'data-stamp="{state["stamp"]}"' in first and "step 3 of 40" in first
    assert state["doing"] == "update begins" and 0 <= state["seconds"] < 60
    assert get(server, "/")[1] is not None and server.page() is server.page()
    add_a_step(run, 4)
    assert json.loads(get(server, "/state")[1])["stamp"] != state["stamp"]
    assert "step 4 of 40" in get(server, "/")[1]
    assert not (run / "report.html").exists()


def test_it_answers_only_requests_to_localhost_and_serves_no_files(server, run):
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/", f"localhost:{port}")[0] == 200
    assert get(server, "/", f"evil.example:{port}")[0] == 403  # as in DNS rebinding
    for path in ("/config.toml", "/../config.toml", "//etc/passwd", "/state/"):
        assert get(server, path)[0] == 404


def test_only_faults_of_its_own_are_printed_and_no_browser_that_leaves(server, run, capsys):
    with socket.create_connection(("127.0.0.1", server.server_port)) as browser:
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        browser.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
    assert get(server, "/state")[0] == 200  # so the thread of the first request has started
    finish_requests()
    assert capsys.readouterr().err == ""
    shutil.rmtree(run)
    with pytest.raises(http.client.RemoteDisconnected):
        get(server, "/")
    finish_requests()
    assert "is not a run directory" in capsys.readouterr().err


def finish_requests() -> None:
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            thread.join()


def test_a_path_that_is_not_a_run_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        LiveServer([tmp_path / "absent"], port=0, episodes=10)


@pytest.mark.skipif(not find_chromium(), reason="needs Chromium (Debian: chromium)")
def test_an_open_page_shows_a_new_step_and_keeps_the_chosen_episode(server, run):
    with Chromium() as browser:
        browser.open(server.address)
        browser.wait_for("document.documentElement?.dataset.openedMs")
        browser.press("j", "j")
        chosen = "document.querySelector('[aria-selected=true] b')?.textContent"
        assert browser.wait_for(chosen) == "greet-0002"
        browser.resize(1440, 500)
        browser.wait_for("document.getElementById('turn-1') !== null")
        browser.evaluate("document.getElementById('dialogue').scrollTop = 60")
        add_a_step(run, 4)
        browser.wait_for("document.body?.textContent.includes('step 4 of 40')")
        assert browser.wait_for(chosen) == "greet-0002"
        browser.wait_for("document.getElementById('dialogue').scrollTop === 60")
        assert browser.faults() == []
        assert {url.rsplit("/", 1)[1] for url in browser.requests()} <= {"", "state", "favicon.ico"}
