"""Rows in CodeContests' published format."""

import json
from collections import Counter

import pytest
from torch.utils.data import Subset

from rlef_mega.dialogues.inspect import inspect
from rlef_mega.problems import load_problems, named, read_data_set
from rlef_sandbox import Limits, Test


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


NONE = {"input": [], "output": []}
ROW = {
    "name": "1_A. Double",
    "description": "Print 2n.",
    "public_tests": {"input": ["2\n"], "output": ["4\n"]},
    "private_tests": {"input": ["3\n"], "output": ["6\n"]},
    "generated_tests": {"input": ["5\n", "7\n"], "output": ["10\n", "14\n"]},
    "solutions": {"language": [3], "solution": ["print(2*int(input()))"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "memory_limit_bytes": 256_000_000,
    "input_file": "",
    "output_file": "",
    "source": 2,
    "cf_tags": ["math", ""],
}


def write(tmp_path, *rows) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_private_and_generated_tests_decide_and_public_ones_are_shown(tmp_path):
    (problem,) = load_problems("codecontests:" + write(tmp_path, ROW))
    assert problem.public_tests == (Test("2\n", "4\n"),)
    assert [t.stdin for t in problem.private_tests.tests] == [b"3\n", b"5\n", b"7\n"]
    assert problem.limits == Limits(cpu_s=1.5, memory_bytes=256_000_000)
    assert problem.tags == ("math",)
    assert "solution" not in problem.statement


@pytest.mark.parametrize(
    "given",
    [{"time_limit": None, "memory_limit_bytes": 0}, {"time_limit": {"seconds": 0, "nanos": 0}}],
)
def test_limits_that_are_not_given_are_the_papers(tmp_path, given):
    row = {k: v for k, v in ROW.items() if k != "memory_limit_bytes"} | given
    (problem,) = load_problems("codecontests:" + write(tmp_path, row))
    assert problem.limits == Limits(cpu_s=10.0, memory_bytes=1 << 30)


def test_problems_that_cannot_be_graded_are_dropped_and_counted(tmp_path):
    empty = dict.fromkeys(("public_tests", "private_tests", "generated_tests"), NONE)
    rows = [
        ROW,
        {**ROW, **empty, "name": "none"},
        {**ROW, **empty, "name": "none either"},
        {**ROW, "name": "file", "input_file": "in.txt"},
        {**ROW, "name": "public only", "private_tests": NONE, "generated_tests": NONE},
    ]
    store = load_problems("codecontests:" + write(tmp_path, *rows))
    assert [p.id for p in store] == ["1_A. Double", "public only"]
    assert list(Counter(drop.reason for drop in store.drops).values()) == [2, 1]
    assert [d.location[-6:] for d in store.drops] == ["line 2", "line 3", "line 4"]


def test_a_file_without_gradable_problems_is_refused(tmp_path):
    empty = dict.fromkeys(("public_tests", "private_tests", "generated_tests"), NONE)
    with pytest.raises(ValueError, match=r"no problem that can be graded.*no tests"):
        load_problems("codecontests:" + write(tmp_path, {**ROW, **empty}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"public_tests": {"input": ["1"], "output": []}}, "public_tests: 1 inputs but 0 outputs"),
        ({"generated_tests": ["1"]}, "generated_tests: .* is not an object"),
        (
            {"private_tests": {"input": [1], "output": ["1"]}},
            "private_tests.input: .*not a list",
        ),
        ({"name": ""}, "name: empty"),
        ({"time_limit": 3}, "time_limit: 3 is not an object"),
        ({"time_limit": {"seconds": -1}}, "time_limit: .*-1"),
        ({"time_limit": {"seconds": "1"}}, "seconds: '1' is not a whole number"),
    ],
)
def test_a_wrong_row_is_named_with_file_line_and_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: {message}"):
        load_problems("codecontests:" + write(tmp_path, ROW, {**ROW, "name": "other", **change}))


def test_a_missing_column_is_named(tmp_path):
    row = {k: v for k, v in ROW.items() if k != "generated_tests"}
    with pytest.raises(ValueError, match="line 1: generated_tests: missing"):
        load_problems("codecontests:" + write(tmp_path, row))


# The columns of the Hugging Face copy that matter here, in its types.
SCHEMA = {"source": ["UNKNOWN_SOURCE", "CODECHEF", "CODEFORCES", "HACKEREARTH", "CODEJAM"]}
SCHEMA["source"] += ["ATCODER", "AIZU"]


def write_parquet(path, rows, names=SCHEMA["source"]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    text, number = pyarrow.string(), pyarrow.int64()
    tests = pyarrow.struct({"input": pyarrow.list_(text), "output": pyarrow.list_(text)})
    programs = pyarrow.struct({"language": pyarrow.list_(number), "solution": pyarrow.list_(text)})
    columns = {
        "name": text,
        "description": text,
        **dict.fromkeys(("public_tests", "private_tests", "generated_tests"), tests),
        "source": number,
        "incorrect_solutions": programs,
        "solutions": programs,
        "cf_rating": number,
        "cf_tags": pyarrow.list_(text),
        "time_limit": pyarrow.struct({"seconds": number, "nanos": number}),
        "memory_limit_bytes": number,
        "input_file": text,
        "output_file": text,
    }
    about = {"info": {"features": {"source": {"names": names, "_type": "ClassLabel"}}}}
    schema = pyarrow.schema(columns, metadata={"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def test_parquet_as_published_gives_the_same_problems_as_its_rows_in_jsonl(tmp_path):
    rows = [
        ROW,
        {**ROW, "name": "none", "time_limit": None, "memory_limit_bytes": 0, "source": 5},
        {**ROW, "name": "Ä", "description": "Print <image>. If there are several, print any."},
    ]
    write_parquet(tmp_path / "cc/data/train-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "cc/data/train-00001-of-00002.parquet", rows[2:])
    write_parquet(tmp_path / "cc/data/valid-00000-of-00001.parquet", rows[:1])
    from_parquet = load_problems(f"codecontests:{tmp_path}/cc?split=train")
    assert list(from_parquet) == list(load_problems("codecontests:" + write(tmp_path, *rows)))
    assert [p.family for p in from_parquet] == ["codeforces", "atcoder", "codeforces"]
    assert from_parquet[2].tags == ("math", "image", "multiple answers")
    assert from_parquet[-1] == from_parquet[1:][1]
    with pytest.raises(ValueError, match="train, valid; choose one"):
        load_problems(f"codecontests:{tmp_path}/cc")
    for split in ("train", "test"):
        (tmp_path / f"lines/{split}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"lines/{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(ValueError, match="test, train; choose one"):
        load_problems(f"codecontests:{tmp_path}/lines")
    with pytest.raises(ValueError, match=r"no data files test\*.*train-00000"):
        load_problems(f"codecontests:{tmp_path}/cc?split=test")


def test_the_hubs_copy_is_taken_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="downloading it failed"):
        load_problems("codecontests:deepmind/code_contests?split=valid")


def test_a_files_own_names_for_numbers_come_before_ours(tmp_path):
    proto = ["UNKNOWN_SOURCE", "CODECHEF", "CODEFORCES", "HACKEREARTH", "CODEJAM", "", "ATCODER"]
    write_parquet(tmp_path / "own.parquet", [{**ROW, "source": 6}], proto)
    assert load_problems(f"codecontests:{tmp_path}/own.parquet")[0].family == "atcoder"
    path = write(tmp_path, {**ROW, "source": 6})
    assert load_problems(f"codecontests:{path}")[0].family == "aizu"
    assert load_problems(f"codecontests:{path}?enums=proto")[0].family == "atcoder"
    with pytest.raises(ValueError, match=r"line 1: source: 7 .*set enums=proto"):
        load_problems("codecontests:" + write(tmp_path, {**ROW, "source": 7}))


def test_a_cached_source_is_not_read_again_until_its_file_changes(tmp_path):
    path = write(tmp_path, ROW)
    (first,) = load_problems(f"codecontests:{path}")
    (store,) = (tmp_path / "cache").rglob("*.zst")
    written = store.stat().st_mtime_ns
    assert load_problems(f"codecontests:{path}")[0] == first
    assert store.stat().st_mtime_ns == written
    write(tmp_path, {**ROW, "description": "Print 2n!"})
    assert load_problems(f"codecontests:{path}")[0].statement == "Print 2n!"
    assert len(load_problems(f"codecontests:{path}?max_tests=1")[0].private_tests.tests) == 1


def test_options_leave_rows_out_and_count_them(tmp_path):
    rows = [
        {**ROW, "cf_rating": 900},
        {**ROW, "name": "hard", "cf_rating": 3000},
        {**ROW, "name": "other", "source": 1},
        {**ROW, "name": "unclear", "cf_rating": 900, "description": "Print any of them."},
        {
            **ROW,
            "name": "big",
            "cf_rating": 900,
            "generated_tests": {"input": ["1" * 99], "output": ["1"]},
        },
    ]
    options = "sources=codeforces&max_rating=1000&without=multiple answers&max_test_bytes=50"
    store = load_problems(f"codecontests:{write(tmp_path, *rows)}?{options}")
    assert [p.id for p in store] == ["1_A. Double", "big"]
    assert len(store[1].private_tests.tests) == 1
    reasons = ["left out: rating", "left out: source codechef", "left out: multiple answers"]
    assert [drop.reason for drop in store.drops[:3]] == reasons
    assert "1 private or generated tests, of up to 100 bytes" in store.drops[3].detail
    for wrong_option in ("max_test=3", "max_tests=x", "enums=hubs"):
        with pytest.raises(ValueError, match=wrong_option.partition("=")[0]):
            load_problems(f"codecontests:{write(tmp_path, ROW)}?{wrong_option}")


def test_names_that_agree_between_sources_stay_two_problems(tmp_path):
    rows = [ROW, {**ROW, "description": "Another."}, ROW]
    store = load_problems("codecontests:" + write(tmp_path, *rows))
    assert [p.id for p in store] == ["1_A. Double", "1_A. Double (2)"]
    assert store.drops[0].reason == "repeats another row"


def test_problems_are_found_by_id_and_ids_are_unique_over_all_files(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    for number, words in enumerate(("Print 2n.", "Another.", "Print 2n.")):
        row = json.dumps({**ROW, "description": words})
        (tmp_path / f"shards/train-{number}.jsonl").write_text(row)
    store = load_problems(f"codecontests:{tmp_path}/shards")
    assert [p.id for p in store] == ["1_A. Double", "1_A. Double (2)"]
    first, second = store
    assert named([first, second], {first.id}) == {first.id: first}
    read, get = [], type(store).__getitem__
    monkeypatch.setattr(type(store), "__getitem__", lambda *at: read.append(at[1]) or get(*at))
    for problems in (store, Subset(store, [0, 1])):  # of a run that leaves some out
        assert named(problems, [second.id]) == {second.id: second}
    assert read == [1, 1]


def test_inspection_prints_counts_drops_with_their_rows_and_what_two_sets_share(tmp_path, capsys):
    long = "Given " + " ".join(f"word{n}" for n in range(40))
    path = write(
        tmp_path,
        ROW,
        {**ROW, "name": "bad", "time_limit": 3},
        {**ROW, "name": "long", "description": long},
    )
    held_out = tmp_path / "held_out.jsonl"
    tests = [{"stdin": "1", "expected": "2"}]
    seventh = {"stdin": "7\n", "expected": "14\n"}
    held_out.write_text(
        "".join(
            json.dumps({"id": f"e{n}", "statement": text, "public_tests": tests}) + "\n"
            for n, text in enumerate(("PRINT  2n", long + " and one more word", "Something else."))
        )
        + json.dumps({"id": "half", "statement": "Print 2n", "private_tests": [seventh, *tests]})
        + "\n"
        + json.dumps({"id": "twin", "statement": "print 2n.", "private_tests": [seventh]})
    )
    inspect(f"codecontests:{path}", tokenizer=None, against=str(held_out))
    told = capsys.readouterr().out
    assert "problems" in told and "dropped: malformed" in told
    wrong = f"{path}, line 2 'bad': malformed time_limit: 3 is not an object"
    assert wrong in told.replace("\n", "")
    told = " ".join(told.split())
    assert "of 5 problems, 1 have the same statement and tests as one of these, 1 the same" in told
    assert "some of the tests, 1 the same statement but other tests; 1 more share 50%" in told
    twin, half, other = (
        told.index(f"- {name!r}: the statement of") for name in ("twin", "half", "e0")
    )
    assert twin < half < other and "'1_A. Double', and 50% of its tests" in told
    with pytest.raises(ValueError, match=r"line 2: time_limit: .*1 malformed rows in all"):
        load_problems(f"codecontests:{path}")
    assert len(read_data_set(f"codecontests:{path}")) == 2


def test_a_large_file_streams(tmp_path):
    """40 MB of tests, of which a few rows are Python objects at a time (Arrow's are not traced)."""
    import tracemalloc

    pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    big = {"input": ["7\n" * 100_000] * 4, "output": ["1\n"] * 4}
    rows = [{**ROW, "name": f"p{n}", "generated_tests": big} for n in range(50)]
    write_parquet(tmp_path / "big.parquet", rows)
    del rows
    tracemalloc.start()
    assert len(load_problems(f"codecontests:{tmp_path}/big.parquet")) == 50
    assert tracemalloc.get_traced_memory()[1] < 12 << 20
    tracemalloc.stop()
