"""A run's progress in the terminal."""

import os
import pty
import re
import subprocess
import sys

from rlef_mega.run.progress import LINE_EVERY_S, StepProgress, training_line

STEPS = """
import time
from rlef_mega.run.progress import StepProgress
with StepProgress("RLEF", done=2, total=5, shown=True) as progress:
    for _ in range(3):
        progress.phase("update")
        time.sleep(0.2)
        progress.step("solved 53%  [red]not markup[/red]")
    progress.say("[bold]a line[/bold]")
"""


def test_without_a_terminal_a_step_is_a_line_with_the_remaining_time(capsys):
    progress = StepProgress("RLEF", done=2, total=5, shown=True)
    progress.started -= 90
    for _ in range(3):
        progress.step("solved 53%")
        progress.next_line -= LINE_EVERY_S
    lines = capsys.readouterr().out.splitlines()
    # 90 s for one step of three; then two of three; then no more
    assert lines == [
        "RLEF 3/5  solved 53%  ETA 0:03:00",
        "RLEF 4/5  solved 53%  ETA 0:00:45",
        "RLEF 5/5  solved 53%",
    ]


def test_fast_steps_are_lines_at_intervals_and_the_first_and_last_always(capsys):
    progress = StepProgress("RLEF", done=0, total=100, shown=True)
    for step in range(1, 101):
        progress.next_line -= LINE_EVERY_S * (step == 40)
        progress.step("solved 53%")
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1/100", "40/100", "100/100"]


def test_a_run_without_a_reference_has_no_kl_in_its_line():
    known = {"solved": 0.5, "solved_turn1": 0.25, "invalid_fraction": 0.0, "tokens": 100}
    line = "solved 50%  turn 1 25%  invalid 0.0%  {}50 tok/s"
    for kl, shown in ((0.125, "kl 0.125  "), (None, "")):
        assert training_line({**known, "kl": kl}, {"step": 2.0}) == line.format(shown)


def on_a_terminal(code: str) -> str:
    """Return what the code prints on a terminal, without control sequences."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # end of file on a terminal
            break
        if not read:
            break
        shown += read
    child.wait(10)
    os.close(ours)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())


def test_a_terminal_shows_phase_and_message_as_text():
    text = on_a_terminal(STEPS)
    assert "update" in text and "solved 53%  [red]not markup[/red]" in text
    assert re.search(r"4/5 ETA 0:00:0\d", text) and "5/5" in text
    assert "[bold]a line[/bold]" in text


def test_a_rank_that_is_not_the_writer_prints_nothing_on_a_terminal():
    assert on_a_terminal(STEPS.replace("shown=True", "shown=False")) == ""
