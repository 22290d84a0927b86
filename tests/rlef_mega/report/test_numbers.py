"""How the report computes and formats numbers: paired intervals, tables, curves, clipped text."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlef_mega.report.comparison import compare
from rlef_mega.report.curves import MAX_POINTS, binned, phase_seconds
from rlef_mega.report.display import clip, significant
from rlef_mega.report.run_files import read_run
from rlef_mega.report.tables import print_comparison
from tests.rlef_mega.report.runs import write_evaluation, write_run


def printed(run, width=80):
    output = io.StringIO()
    print_comparison(run, console=Console(file=output, width=width))
    return output.getvalue()


def evaluation(outcomes, **setting):
    solve_rate = {"value": sum(outcomes) / len(outcomes)}
    protocols = {"multi_turn": {"solve_rate": solve_rate, "outcomes": outcomes}}
    return {"data": "test", "problems": len(outcomes), "seed": 0, "protocols": protocols} | setting


def test_a_change_on_the_same_problems_has_a_paired_interval():
    before = [True] * 50 + [False] * 50
    after = [True] * 60 + [False] * 40  # ten more, none lost
    change = compare({"before": evaluation(before), "after": evaluation(after)}).rows[0].change
    assert change is not None and change.value == pytest.approx(0.1)
    # ten ones among a hundred: 95% of resamples draw between 5 and 16 of them
    assert (change.low, change.high) == pytest.approx((0.05, 0.16), abs=0.011)


def test_only_problems_with_both_outcomes_are_paired():
    """The one problem with both outcomes has not changed."""
    sides = {name: {**evaluation([True, False]), "problems": 3} for name in ("before", "after")}
    for name, outcomes in (("before", [None, True, False]), ("after", [True, None, False])):
        sides[name]["protocols"]["multi_turn"]["outcomes"] = outcomes
    change = compare(sides).rows[0].change
    assert change is not None and (change.value, change.low, change.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("setting", ["seed", "data", "problems"])
def test_a_change_over_other_problems_has_no_paired_interval_and_a_warning(setting):
    before, after = evaluation([True, False]), evaluation([True, True], **{setting: 9})
    found = compare({"before": before, "after": after})
    change = found.rows[0].change
    assert change is not None and change.value == pytest.approx(0.5) and change.low is None
    assert any(setting in warning for warning in found.warnings)


def test_the_console_table_shows_the_measured_numbers_within_eighty_columns(tmp_path):
    run = write_run(tmp_path / "run")
    shown = printed(run)
    assert max(map(len, shown.splitlines())) <= 80
    for row in compare(read_run(run).evaluations).rows:
        numbers = [f"{100 * rate.value:.1f}" for rate in row.cells if rate]
        line = next(line for line in shown.splitlines() if row.label in line)
        assert all(number in line for number in numbers)
    assert "greet" in shown and "vague" in shown


def test_names_in_the_console_table_are_not_markup(tmp_path):
    (tmp_path / "eval").mkdir()
    rate = {"value": 0.5}
    protocols = {"multi_turn": {"solve_rate": rate, "by_family": {"[red]x\x1b[2J": rate}}}
    write_evaluation(tmp_path, "after", {"protocols": protocols})
    assert "[red]x␛[2J" in printed(tmp_path)


def test_a_run_without_evaluations_says_so(tmp_path):
    assert "No evaluation" in printed(tmp_path, width=200)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=1500))
def test_binning_bounds_the_points_and_keeps_the_mean(values):
    steps, means = binned(([float(i) for i in range(len(values))], values))
    assert len(means) == len(steps) <= MAX_POINTS
    size = -(-len(values) // MAX_POINTS)
    sizes = [size] * (len(means) - 1) + [len(values) - size * (len(means) - 1)]
    assert np.dot(means, sizes) == pytest.approx(sum(values), abs=1e-6)


def test_phases_add_up_to_the_step():
    times = {"rollout": 2.0, "score": 1.0, "update": 4.0, "step": 7.5}
    stack = phase_seconds([{"step": 1, "time": times}])
    assert stack == {"rollout": [2.0], "score": [1.0], "update": [4.0], "other": [0.5]}


def test_a_clipped_text_keeps_head_and_tail_and_says_how_much_is_gone():
    assert clip("abcdef", 6) == "abcdef"
    assert clip("a" * 4 + "-" * 100 + "zz", 6) == "aaaa\n… 100 characters left out …\nzz"


def test_numbers_are_rounded_for_display():
    assert [significant(v) for v in (0.0, 1.5, -0.01234, 12345.6, 3e-6)] == [
        "0.00",
        "1.50",
        "−0.0123",
        "12,346",
        "3.0e−06",
    ]


def test_evaluations_are_ordered_before_then_steps_then_after(tmp_path):
    for name in ("after", "step_20", "before"):
        write_evaluation(tmp_path, name, evaluation([True]))
    assert list(read_run(tmp_path).evaluations) == ["before", "step_20", "after"]
