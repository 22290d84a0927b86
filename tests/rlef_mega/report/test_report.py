"""The report page shows what was measured, and untrusted text stays text."""

import base64
import hashlib
import json
import random
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rlef_mega.report.comparison import compare, evaluations_of
from rlef_mega.report.curves import draw_panels
from rlef_mega.report.display import clip
from rlef_mega.report.episodes import OUTCOMES, share_out
from rlef_mega.report.page import write_report
from rlef_mega.report.run_files import STEPS_SHOWN, read_run, read_runs
from tests.rlef_mega.report.runs import (
    FEW_PANELS,
    make_turn,
    metrics_of_step,
    write_episodes,
    write_evaluation,
    write_metrics,
    write_run,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}
INJECTION = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}&amp;"


class Page(HTMLParser):
    """Parse a page's elements, attributes and text; fails if its tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, str] = {}  # elements that hold data, by their id
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"duplicate attribute: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        attributes = self.elements[-1][1] if self.elements else {}
        if inside == "script" and attributes.get("type") == "text/plain":
            self.data[str(attributes["id"])] = data
        elif inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def index(self) -> Any:
        return unsqueeze(self.data["index"])

    @property
    def dialogues(self) -> list[Any]:
        names = [name for name in self.data if name != "index"]
        return [dialogue for name in names for dialogue in unsqueeze(self.data[name])]


def unsqueeze(packed: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def report(run: Path) -> tuple[str, Page]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def finished_report(finished):
    return report(finished)


@pytest.fixture
def run(tmp_path):
    """Write a small run that a test may damage."""
    return write_run(tmp_path / "run", problems=12, panels=FEW_PANELS)


def test_the_page_shows_what_was_measured(finished, finished_report):
    _, page = finished_report
    for stage in ("before", "after"):
        evaluation = json.loads((finished / "eval" / f"{stage}.json").read_text())
        for protocol in evaluation["protocols"].values():
            rate = protocol["solve_rate"]
            low, high = 100 * rate["low"], 100 * rate["high"]
            assert f"{100 * rate['value']:.1f}% [{low:.1f}, {high:.1f}]" in page.text
        for rate in evaluation["protocols"]["multi_turn"]["by_family"].values():
            assert f"{100 * rate['value']:.1f}%" in page.text
    first, *_, last = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert f"multi-turn {100 * first['solved']:.1f}% → {100 * last['solved']:.1f}%" in page.text
    for fact in (
        "CPU, 2 cores",
        "tensor 2, pipeline 1, data 1",
        "step 40 of 40",
        "seed7",
    ):
        assert fact in page.text
    assert "megatron-core" in page.text and "curriculum:train" in page.text


def test_the_page_needs_nothing_from_outside(finished_report):
    html, page = finished_report
    html = re.sub(
        '(<script type="text/plain"[^>]*>)[^<]*', r"\1", html
    )  # base64 may contain "http" by chance
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html.replace("url(#", "") and "@import" not in html
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_links_have_targets_and_the_text_of_plots_stays_text(finished_report):
    _, page = finished_report
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for tag, attributes in page.elements:
        if tag in ("a", "use"):
            target = attributes.get("href") or attributes.get("xlink:href") or ""
            assert target.removeprefix("#") in ids
    assert sum(tag == "svg" for tag, _ in page.elements) >= 14
    assert sum(tag == "text" for tag, _ in page.elements) > 100


def test_the_only_script_is_the_one_that_the_policy_allows(finished_report):
    _, page = finished_report
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv")) or ""
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_run_of_forty_steps_gives_a_page_of_less_than_three_megabytes(finished_report):
    html, _ = finished_report
    assert len(html.encode()) < 3_000_000


def test_the_same_run_gives_the_same_page(finished, finished_report):
    assert report(finished)[0] == finished_report[0]


def test_every_recorded_episode_can_be_read(finished, finished_report):
    _, page = finished_report
    index, dialogues = page.index, page.dialogues
    assert index["stages"] == ["before", "after", "step 40"] and len(index["rows"]) == 150
    for stage in (0, 1):
        assert {row[3] for row in index["rows"] if row[0] == stage} == set(range(len(OUTCOMES)))
    recorded = [
        json.loads(line)
        for path in read_run(finished).episode_files.values()
        for line in zstandard.decompress(path.read_bytes()).splitlines()
    ]
    assert [d["problem"] for d in dialogues] == [r["problem_id"] for r in recorded]
    for dialogue, record in zip(dialogues, recorded, strict=True):
        for shown, turn in zip(dialogue["turns"], record["turns"], strict=True):
            assert (shown["response"], shown["program"]) == (turn["response"], turn["program"])
            assert [test["observed"] for test in shown["tests"]] == [
                test["observed"] for test in turn["public"]
            ]
            assert shown["facts"].get("value") == (turn["value"] and round(turn["value"], 4))
            assert sum(shown["pieces"]) == len(shown["response"])
            assert shown["logprobs"] == [round(value / 10) for value in turn["logprobs"]]


def hostile_run(run: Path, text: str) -> Path:
    """Write a run with `text` in every field that holds text."""
    turn = make_turn(text, "Hi", "Hello", valid=True, last=False)
    turn |= {"response": f"{text}\n```python\n{text}\n```", "program": text}
    turn["public"] = [dict.fromkeys(("input", "expected", "observed", "status", "stderr"), text)]
    episode: dict[str, Any] = {"problem_id": text, "family": text, "tags": [text], "solved": False}
    episodes = [episode | {"turns": [turn] * 3}] * 20
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 10}
    multi_turn: dict[str, Any] = {"solve_rate": rate, "error_kinds": {"turn1": {text: 3}}}
    multi_turn |= {"by_family": {text: rate}, "by_kind": {text: rate}}
    settings = ("model", "data", "temperature", "top_p", "turns", "seed")
    evaluation: dict[str, Any] = dict.fromkeys(settings, text)
    evaluation["protocols"] = {"multi_turn": multi_turn, text: {"solve_rate": rate}}
    run.mkdir(parents=True)
    for stage in ("before", "after"):
        write_episodes(run / "eval" / f"{stage}_episodes.jsonl.zst", episodes)
        write_evaluation(run, stage, evaluation)
    manifest = {text: text, "device": text, "layout": {text: 2}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.toml").write_text(f"[model]\npath = {json.dumps(text)}\n", errors="replace")
    write_metrics(run, [metrics_of_step(1, random.Random(0), FEW_PANELS) | {text: text}])
    return run


def test_injected_markup_stays_text(tmp_path):
    _, page = report(hostile_run(tmp_path / "<b>run<script>", INJECTION))
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe"}
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count(INJECTION) > 20
    assert "<b>run<script>" in page.text
    assert page.index["problems"] == [clip(INJECTION, 80)]
    assert all(turn["program"] == INJECTION for d in page.dialogues for turn in d["turns"])


def test_invisible_and_misleading_characters_are_shown_by_name(tmp_path):
    deceit = "a\x00b\x1b[31m\u202egnp.exe\u2066\u200b\ud800\x85 שלום 😀"
    html, page = report(hostile_run(tmp_path / "run", deceit))
    unseen = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800]"
    plain = "a␀b␛[31m⟨U+202E⟩gnp.exe⟨U+2066⟩⟨U+200B⟩\ufffd⟨U+0085⟩ שלום 😀"
    assert not re.search(unseen, html) and plain in page.text
    data = json.dumps([page.index, page.dialogues], ensure_ascii=False)
    assert not re.search(unseen, data) and plain in data


def test_ten_megabytes_of_output_are_cut_to_head_and_tail(tmp_path):
    run = tmp_path / "run"
    turn = make_turn("prompt", "Hi", "Hello", valid=True, last=False)
    turn["public"] = [turn["public"][0] | {"observed": "head" + "x" * 10_000_000 + "tail"}]
    turn["response"] = "```python\n" + "print(1)\n" * 1_000_000 + "```"
    episode = {"problem_id": "p", "family": "f", "tags": [], "solved": False, "turns": [turn] * 3}
    write_episodes(run / "eval" / "after_episodes.jsonl.zst", [episode] * 2)
    html, page = report(run)
    assert len(html.encode()) < 500_000
    for dialogue in page.dialogues:
        for shown in dialogue["turns"]:
            observed = shown["tests"][0]["observed"]
            assert "9,999,008 characters left out" in observed and observed.endswith("xtail")
            assert "characters left out" in shown["response"] and "pieces" not in shown


def test_a_missing_file_leaves_the_rest_of_the_page(run, tmp_path):
    heads = {
        "manifest.json": "CPU, 2 cores",
        "metrics.jsonl": "Gradient norm",
        "episodes": "step 40",
    }
    pieces = ("config.toml", "eval", "eval/before.json", "eval/after_episodes.jsonl.zst")
    for number, missing in enumerate((*heads, *pieces)):
        copy = Path(shutil.copytree(run, tmp_path / str(number)))
        path = copy / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        _, page = report(copy)
        text = page.text + str(page.index["stages"])
        assert "Before and after" in text
        for piece, shown in heads.items():
            assert (shown in text.replace("step 40 of 40", "")) == (piece != missing)


def test_an_empty_directory_says_what_is_not_there(tmp_path):
    _, page = report(tmp_path)
    for what in ("evaluation", "step", "episodes"):
        assert re.search(f"No {what} ha(s|ve) been recorded", page.text)


def test_every_key_may_be_missing_or_null(run):
    write_metrics(run, [{"step": 1, "solved": None, "time": None}, {"step": 2, "solved": 0.25}])
    write_evaluation(run, "before", {"protocols": {"multi_turn": {"solve_rate": {"value": 0.125}}}})
    write_evaluation(run, "after", {"protocols": {"multi_turn": None, "independent": {}}})
    write_episodes(run / "eval" / "after_episodes.jsonl.zst", [{}, {"turns": [{}]}, {"turns": 3}])
    _, page = report(run)
    assert "12.5%" in page.text and "multi-turn 25.0%" in page.text


def test_numbers_that_are_not_finite_are_left_out_of_the_curves(run):
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "kl": 0.5}\n{"step": 2, "kl": NaN}\n{"step": 3, "kl": Infinity}\n'
        '{"step": 4, "kl": null}\n'
    )
    _, page = report(run)
    assert "KL 0.500" in page.text and not re.search(r"\b(nan|inf)\b", page.text.lower())


def test_a_line_cut_off_by_a_kill_is_named_and_the_rest_is_shown(run):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[:-40])
    packed = (run / "eval" / "after_episodes.jsonl.zst").read_bytes()
    (run / "eval" / "after_episodes.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    (run / "eval" / "before.json").write_text("{")
    _, page = report(run)
    assert "metrics.jsonl, line 40: left out" in page.text and "step 39 of 40" in page.text
    assert "before.json: left out" in page.text


def test_a_damaged_archive_is_named(run):
    (run / "eval" / "after_episodes.jsonl.zst").write_bytes(b"not zstandard at all")
    _, page = report(run)
    assert "after_episodes.jsonl.zst: damaged, read in part" in page.text


def test_a_step_repeated_after_a_resume_counts_once(run):
    write_metrics(run, [{"step": 1, "kl": 1}, {"step": 2, "kl": 2}, {"step": 2, "kl": 3}])
    assert [record["kl"] for record in read_run(run).metrics] == [1, 3]


def test_episodes_in_several_frames_are_all_read(run):
    path = run / "eval" / "after_episodes.jsonl.zst"
    lines = [json.dumps({"problem_id": f"frame {i}", "turns": []}) + "\n" for i in range(3)]
    path.write_bytes(b"".join(zstandard.compress(line.encode()) for line in lines))
    _, page = report(run)
    assert all(f"frame {i}" in page.index["problems"] for i in range(3))


def test_stages_share_the_limit_and_a_short_one_leaves_its_share_to_the_rest():
    stages = {"short": [{"n": 0}], "long": [{"n": n} for n in range(50)]}
    taken = [(stage, episode["n"]) for stage, episode in share_out(stages, 10)]
    assert taken == [("short", 0), *(("long", n) for n in range(9))]
    reverse = share_out(dict(reversed(stages.items())), 10)
    assert [stage for stage, _ in reverse] == ["long"] * 5 + ["short"]


def test_the_dialogues_of_an_evaluation_are_shown_by_protocol(tmp_path):
    turn = make_turn("prompt", "Hi", "Hello", valid=True, last=True)
    held = {"problem_id": "p", "family": "f", "tags": [], "solved": False, "turns": [turn]}
    lines = [{"rlef_eval": 1}, {"session": {}}, {"released": {}}]
    lines += [{"protocol": name, "number": 0, **held} for name in ("multi_turn", "independent")]
    lines += [{"protocol": "multi_turn", "problem_id": "q", "number": 0, "dropped": "why"}]
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / "model.dialogues.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"protocol": "mul')
    _, page = report(tmp_path)
    assert page.index["stages"] == ["model, multi turn", "model, independent"]
    assert len(page.dialogues) == 2


def test_of_many_recorded_steps_some_are_shown_over_the_whole_run(run):
    packed = (run / "episodes/step_000040.jsonl.zst").read_bytes()
    for step in range(1, 100):
        (run / f"episodes/step_{step:06d}.jsonl.zst").write_bytes(packed)
    stages = [stage for stage in read_run(run).episode_files if stage.startswith("step")]
    assert len(stages) == STEPS_SHOWN and (stages[0], stages[-1]) == ("step 99", "step 1")


def test_the_page_says_when_it_leaves_episodes_out(run):
    page = Page(write_report(run, episodes=20).read_text(encoding="utf-8"))
    assert len(page.dialogues) == 20 and "newest step first, at most 20." in page.text
    assert Page(write_report(run).read_text(encoding="utf-8")).text.count("at most") == 0


def token_turn(response: str, pieces: list[Any]) -> Any:
    turn = make_turn("prompt", "Hi", "Hello", valid=True, last=False)
    turn |= {"response": response, "pieces": pieces, "logprobs": [-10] * len(pieces)}
    return turn


def shown_turn(run: Path, turn: Any) -> Any:
    episode = {"problem_id": "p", "family": "f", "tags": [], "solved": False, "turns": [turn]}
    write_episodes(run / "eval" / "after_episodes.jsonl.zst", [episode])
    return Page(write_report(run).read_text(encoding="utf-8")).dialogues[0]["turns"][0]


def test_pieces_are_lengths_of_the_shown_text_in_utf16_units(tmp_path):
    shown = shown_turn(tmp_path, token_turn("a\x00\u202e😀 end", [2, 1, 1]))
    assert shown["response"] == "a␀⟨U+202E⟩😀 end"
    assert shown["pieces"] == [2, 8, 2]  # a character beyond U+FFFF is two to JavaScript


@pytest.mark.parametrize("pieces", [[1, 9], [-1, 3], [1.5], ["1"], "11", None, {}])
def test_pieces_that_do_not_fit_are_left_out(tmp_path, pieces):
    turn = token_turn("abc", [1]) | {"pieces": pieces}
    assert "pieces" not in shown_turn(tmp_path, turn)


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory) -> tuple[list[Path], Page]:
    folder = tmp_path_factory.mktemp("two")
    runs = [
        write_run(folder / name, seed=seed, steps=5, problems=30, panels=FEW_PANELS)
        for seed, name in enumerate("ab")
    ]
    config = (runs[1] / "config.toml").read_text()
    (runs[1] / "config.toml").write_text(config.replace("seed = 7", "seed = 8"))
    path = write_report(*runs)
    assert path == runs[0] / "against_b.html"
    return runs, Page(path.read_text(encoding="utf-8"))


def test_a_page_of_two_runs_lists_their_differences(side_by_side):
    _, page = side_by_side
    assert re.search(r"Differences between the runs settingab run\.seed78 Result", page.text)
    assert "a: multi-turn" in page.text and "b: multi-turn" in page.text
    assert page.text.count("Seconds of a step, ") == 2
    assert set(page.index["stages"]) == {
        f"{run}: {stage}" for run in "ab" for stage in ("before", "after", "step 5")
    }


def test_the_change_between_two_runs_is_that_of_their_last_evaluations(side_by_side):
    runs, page = side_by_side
    files = read_runs(runs)
    evaluations, pair = evaluations_of(files)
    assert pair == ("a: after", "b: after")
    (change,) = (row.change for row in compare(evaluations, pair).rows[:1])
    a, b = (
        run.evaluations["after"]["protocols"]["multi_turn"]["solve_rate"]["value"]
        for run in files.values()
    )
    assert change is not None and change.value == pytest.approx(b - a) and change.low is not None
    assert f"{100 * (b - a):+.1f}".replace("-", "−") in page.text


def test_more_runs_than_colours_are_drawn():
    (drawing,) = draw_panels({f"run {n}": ({"step": 1, "kl": 0.1},) for n in range(9)})
    assert [line.color for line in drawing.legend] == [*range(7), 0, 1]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place / "run").mkdir(parents=True)
    runs = [tmp_path / place / "run" for place in ("x", "y")]
    assert list(read_runs(runs)) == ["x/run", "y/run"]
    assert write_report(*runs).name == "against_y_run.html"
    with pytest.raises(ValueError, match="given twice"):
        write_report(runs[0], runs[0])


def test_a_path_that_is_not_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        write_report(tmp_path / "absent")
