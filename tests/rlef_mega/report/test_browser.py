"""The report page in a real browser: filters, keys and links work, untrusted text stays text, and
only the visible episodes of thousands cost time."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rlef_mega.report.display import clip
from rlef_mega.report.page import HERE, write_report
from rlef_mega.report.run_files import read_run
from tests.rlef_mega.report.chromium import Chromium, find_chromium
from tests.rlef_mega.report.runs import make_turn, write_episodes, write_run
from tests.rlef_mega.report.test_report import INJECTION, hostile_run

pytestmark = pytest.mark.skipif(not find_chromium(), reason="needs Chromium (Debian: chromium)")

OPENED = "document.documentElement?.dataset.openedMs"
TEXT = "document.getElementById('{}').textContent"
PARTS = '[...document.querySelectorAll("{}")].map((element) => element.textContent)'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def page(chromium: Chromium, finished: Path) -> Iterator[Chromium]:
    """Open the finished run's page; the test fails if the page reports a fault."""
    if not (finished / "report.html").exists():
        write_report(finished)
    chromium.open(finished / "report.html")
    chromium.wait_for(OPENED)
    yield chromium
    assert chromium.faults() == []


def records(run: Path) -> list[tuple[str, Any]]:
    return [
        (stage, json.loads(line))
        for stage, path in read_run(run).episode_files.items()
        for line in zstandard.decompress(path.read_bytes()).splitlines()
    ]


def choose(page: Chromium, **values: str) -> None:
    for name, value in values.items():
        page.evaluate(
            f"{{ const control = document.getElementById('{name.replace('_', '-')}');"
            f" control.value = {json.dumps(value)}; control.dispatchEvent(new Event('input')); }}"
        )


def count(page: Chromium) -> int:
    """Return the number of episodes that match the filters."""
    shown = page.wait_for(f"{TEXT.format('count')}.match(/^[\\d,]+(?= of)/)")[0]
    return int(shown.replace(",", ""))


def dialogue(page: Chromium) -> str:
    time.sleep(0.05)
    return page.evaluate(TEXT.format("dialogue"))


def test_the_page_requests_only_itself_and_shows_the_first_episode(page, finished):
    assert [url.partition(":")[0] for url in page.requests()] == ["file"]
    stage, first = records(finished)[0]
    assert count(page) == len(records(finished)) == 150
    shown = dialogue(page)
    assert first["problem_id"] in shown and stage in shown
    assert all(turn["response"] in shown for turn in first["turns"])


def test_filters_find_what_the_records_say(page, finished):
    known = records(finished)
    choose(page, by_stage="after", by_outcome="failed")
    assert count(page) == sum(stage == "after" and not e["solved"] for stage, e in known)
    choose(page, by_stage="", by_outcome="", by_kind="NO_VALID_CODE", by_turn="2")
    expected = [e for _, e in known if len(e["turns"]) > 1 and e["turns"][1]["program"] is None]
    assert count(page) == len(expected) > 0
    choose(page, by_kind="", by_turn="3", by_family="greet · word")
    expected = [
        e
        for _, e in known
        if len(e["turns"]) > 2 and e["family"] == "greet" and e["tags"] == ["word"]
    ]
    assert count(page) == len(expected) > 0
    page.evaluate("document.getElementById('reset').click()")
    assert count(page) == len(known)


def test_search_finds_names_and_what_dialogues_say(page, finished):
    choose(page, search="greet-0007 after")
    assert count(page) == 1 and "greet-0007" in dialogue(page)
    choose(page, search="'Dear', name")
    assert count(page) == 0
    page.evaluate("document.getElementById('deep').click()")
    said = [e for _, e in records(finished) if "'Dear', name" in json.dumps(e["turns"])]
    assert count(page) == len(said) > 0


def test_keys_move_search_and_change_what_is_shown(page):
    chosen = "document.querySelector('[aria-selected=true] b').textContent"
    page.press("j", "j", "k")
    assert page.evaluate(chosen) == "greet-0001"
    page.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.press("j")  # a letter now
    assert page.evaluate("document.getElementById('search').value") == "j"
    page.evaluate("document.getElementById('reset').click()")
    page.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.press("End")
    assert page.evaluate(chosen) == "greet-0029"
    page.press("ArrowUp", "Enter")
    assert page.evaluate(chosen) == "greet-0028"
    assert page.evaluate("document.activeElement.id") == "dialogue"
    page.press("c")
    assert page.evaluate("document.getElementById('colour').value") == "logprobs"


def test_the_url_restores_the_view_after_a_reload(page):
    choose(page, by_stage="after", by_outcome="repair", colour="versions")
    page.press("j", "j")
    before = (count(page), dialogue(page))
    page.load("Page.reload")
    page.wait_for(OPENED)
    assert (count(page), dialogue(page)) == before
    assert page.evaluate("document.getElementById('colour').value") == "versions"


def test_coloured_tokens_are_the_response_with_the_recorded_numbers(page, finished):
    choose(page, by_stage="step 40", colour="logprobs")
    _, record = next((s, e) for s, e in records(finished) if s == "step 40")
    shown = dialogue(page)
    for turn in record["turns"]:
        assert turn["response"] in shown
    tokens = page.evaluate(PARTS.format("#turn-1 .token"))
    turn = record["turns"][0]
    assert "".join(tokens) == turn["response"] and len(tokens) == len(turn["pieces"]) - 1
    tips = page.evaluate(PARTS.format("#turn-1 .token").replace(".textContent", ".title"))
    place = next(n for n, logprob in enumerate(turn["logprobs"]) if logprob < -900)
    assert tips[place].startswith(f"log-prob −{-turn['logprobs'][place] / 1000:.2f} ")
    assert "weights of version 4" in tips[0] and "weights of version 5" in tips[-1]
    page.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")  # the second one
    said = page.evaluate("document.getElementById('token').textContent")
    assert tokens[1].replace("\n", "⏎") in said and tips[1].replace("\n", " · ") in said
    assert page.evaluate(PARTS.format(".token.current")) == [tokens[1]]
    for colour in ("kl", "advantages", "versions"):
        choose(page, colour=colour)
        assert "".join(page.evaluate(PARTS.format("#turn-1 .token"))) == turn["response"]


def test_changes_since_the_previous_program_are_marked(page, finished):
    choose(page, by_stage="after", by_turn="2", by_outcome="repair")
    known = [e for stage, e in records(finished) if stage == "after" and e["solved"]]
    both = [e for e in known if len(e["turns"]) == 2 and e["turns"][0]["program"]]
    choose(page, search=both[0]["problem_id"])
    dialogue(page)
    less = page.evaluate(PARTS.format("#turn-2 .less mark"))
    more = page.evaluate(PARTS.format("#turn-2 .more mark"))
    (before, after) = (turn["program"].split("'")[1] for turn in both[0]["turns"])
    assert less and less[0] in before and more[0] in after and less != more


def test_injected_markup_creates_no_element_and_runs_no_script(chromium, tmp_path):
    run = hostile_run(tmp_path / "<b>run<script>", INJECTION)
    chromium.open(write_report(run))
    chromium.wait_for(OPENED)
    for colour in ("syntax", "logprobs"):
        choose(chromium, colour=colour)
        shown = dialogue(chromium)
        assert shown.count(INJECTION) > 10
    assert (
        chromium.evaluate("document.querySelectorAll('img, iframe, #dialogue script').length") == 0
    )
    methods = {event["method"] for event in chromium.events}
    assert chromium.faults() == [] and "Page.javascriptDialogOpening" not in methods
    assert clip(INJECTION, 80) in chromium.evaluate(TEXT.format("list"))


def test_bidirectional_overrides_are_shown_by_name(chromium, tmp_path):
    run = hostile_run(tmp_path / "run", "a\x00\u202egnp.exe\u2066 שלום 😀")
    chromium.open(write_report(run))
    chromium.wait_for(OPENED)
    assert "a␀⟨U+202E⟩gnp.exe⟨U+2066⟩ שלום 😀" in dialogue(chromium)


@pytest.mark.timing
def test_of_ten_thousand_episodes_only_visible_rows_are_created(chromium, tmp_path):
    turn = make_turn("prompt", "Hi", "Hello", valid=True, last=False)
    episodes = [
        {"problem_id": f"p-{n}", "family": "f", "tags": [], "solved": False, "turns": [turn] * 3}
        for n in range(10_000)
    ]
    write_episodes(tmp_path / "episodes" / "step_000001.jsonl.zst", episodes)
    started = time.monotonic()
    chromium.open(write_report(tmp_path))
    chromium.wait_for(OPENED)
    assert time.monotonic() - started < 60  # on a busy machine; docs/seeing.md has measured times
    assert count(chromium) == 10_000
    rows = 'document.querySelectorAll("#rows .row").length'
    assert 10 < chromium.evaluate(rows) < 60
    chromium.evaluate("document.getElementById('list').focus()")
    chromium.press("End")
    assert "p-9999" in dialogue(chromium) and 10 < chromium.evaluate(rows) < 60
    choose(chromium, search="p-4321")
    assert count(chromium) == 1 and "p-4321" in dialogue(chromium)


def test_without_scripts_the_page_says_what_it_needs(chromium, finished):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    chromium.open(write_report(finished))
    tree = chromium.call("DOMSnapshot.captureSnapshot", computedStyles=[])
    chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    assert any("episodes need JavaScript" in word for word in tree["strings"])


@pytest.fixture
def functions(chromium: Chromium) -> Chromium:
    """Open a blank page that has the report's own functions."""
    chromium.open("about:blank")
    for name in ("highlight.js", "diff.js"):
        chromium.evaluate((HERE / name).read_text())
    return chromium


def test_highlighting_changes_no_character_and_tells_code_from_prose(functions):
    alphabet = json.dumps([*"`'\"#\\ab1 \n<&def/*", "```", '"""', "'''", "//", "#in"])
    letters = len(json.loads(alphabet))
    wrong = functions.evaluate(
        f"""(() => {{
          let seed = 1;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          const letter = () => {alphabet}[random({letters})];
          const languages = [["python", false], ["python", true], ["cpp", false]];
          for (let k = 0; k < 4000; k++) {{
            const text = Array.from({{ length: random(60) }}, letter).join("");
            for (const [language, begun] of languages) {{
              const pieces = responsePieces(text, language, begun);
              if (pieces.map((piece) => piece[1]).join("") !== text) return [text, language, begun];
            }}
          }}
        }})()"""
    )
    assert wrong is None
    said = "for you:\n```python\nfor x in '<b>':  # if\n    print(2)\n```"
    pieces = functions.evaluate(f"responsePieces({json.dumps(said)}, 'python', false)")
    assert pieces[0] == ["", "for you:\n"] and ["keyword", "for"] in pieces
    assert ["string", "'<b>'"] in pieces and ["comment", "# if"] in pieces
    assert ["builtin", "print"] in pieces and ["number", "2"] in pieces
    code = '#include <map>\nint main() { /* if */ return "x"[0]; } // end'
    pieces = functions.evaluate(f"codePieces({json.dumps(code)}, 'cpp17')")
    assert ["keyword", "#include"] in pieces and ["keyword", "return"] in pieces
    assert ["comment", "/* if */"] in pieces and ["string", '"x"'] in pieces
    begun = functions.evaluate("responsePieces('return 1\\n```\\nfor you', 'python', true)")
    assert ["keyword", "return"] in begun and begun[-1] == ["", "\nfor you"]


@pytest.mark.timing
@pytest.mark.parametrize("piece", ["'", '"""', "'''\\", "`", "```", "a'", "#\n", "\\", "1.", "/*"])
def test_highlighting_takes_time_in_proportion_to_the_text(functions, piece):
    text = json.dumps("```python\n" + piece * 30_000)
    for language in ("python", "cpp"):
        started = time.monotonic()
        functions.evaluate(f"responsePieces({text}, '{language}', false).length")
        assert time.monotonic() - started < 8  # quadratic: minutes


def test_a_diff_reproduces_both_programs(functions):
    wrong = functions.evaluate(
        """(() => {
          let seed = 7;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          const line = () => "abc"[random(3)];
          const program = () => Array.from({ length: random(12) }, line).join("\\n");
          for (let k = 0; k < 3000; k++) {
            const a = program(), b = program(), lines = diffLines(a, b);
            const without = (mark) => lines.filter((line) => line[0] !== mark);
            const side = (mark) => without(mark).map((line) => line[1]).join("\\n");
            if (side("+") !== a || side("-") !== b) return [a, b, lines];
          }
        })()"""
    )
    assert wrong is None
    rows = functions.evaluate("diffRows('a\\nx = 1\\nc', 'a\\nx = 22\\nc')")
    assert rows == [
        [" ", "a", "", ""],
        ["-", "x = ", "1", ""],
        ["+", "x = ", "22", ""],
        [" ", "c", "", ""],
    ]
    long = "\\n".join(f"line {n}" for n in range(50))
    rows = functions.evaluate(f"diffRows('{long}', '{long}\\nmore')")
    assert rows[0] == ["…", "47 unchanged lines", "", ""] and rows[-1] == ["+", "more", "", ""]
    assert functions.evaluate("diffLines('a\\n'.repeat(9000), 'b\\n'.repeat(9000)).length") == 18001
