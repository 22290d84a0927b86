"""Messages carry every byte and value exactly, and whatever else arrives is refused."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef_sandbox import CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test
from rlef_sandbox.service import wire
from rlef_sandbox.service.wire import WireError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=8)  # lone surrogates included
    | st.binary(max_size=8)
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
    ),
    max_leaves=8,
)
STDIN_TESTS = st.builds(Test, st.binary(), st.binary())
CALL_TESTS = st.builds(CallTest, st.text(), st.lists(VALUES, max_size=3).map(tuple), VALUES)
LIMITS = st.builds(
    Limits,
    st.floats(0.001, 3600),
    st.none() | st.floats(0.001, 3600),
    st.integers(32 << 20, 1 << 40),
    st.integers(1, 1 << 30),
    st.integers(1, 1 << 16),
)
CODE = st.sampled_from(
    ["", "def check(f):\n    assert f('é') == 1\n", "check = print  # \U0001f600"]
)
CHECK_TESTS = st.builds(CheckTest, st.text(), CODE, st.text())
NAMED_CHECKERS = st.sampled_from(
    ["tokens", "exact", "codecontests", "unordered_lines", "livecodebench"]
)
REQUESTS = st.builds(
    wire.GradeRequest,
    st.binary(),
    st.lists(STDIN_TESTS | CALL_TESTS | CHECK_TESTS, max_size=4),
    st.none() | LIMITS,
    NAMED_CHECKERS | st.builds(CheckerProgram, CODE, LIMITS),
    st.booleans(),
    st.text(),
    st.integers(0, 1000),
)
RESULTS = st.builds(
    Result,
    st.sampled_from(list(Status)),
    st.binary(),
    st.binary(),
    st.none() | st.integers(0, 255),
    st.none() | st.integers(1, 64),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.integers(0, 1 << 50),
    st.none() | st.text(),
)
TAGS = st.sampled_from(["int", "tuple", "set", "dict", "bytes", "base64"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=3)
            | st.sampled_from(["int", "tuple", "set", "dict", "bytes", "base64"]),
            inner,
            max_size=3,
        )
    ),
)


def typed(value: object) -> object:
    """Return a form that distinguishes 1 from 1.0 and True, as == does not, and in which members of
    sets and dicts are sorted."""
    if isinstance(value, dict):
        return "dict", sorted(repr((typed(key), typed(item))) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(typed(item)) for item in value)
    if isinstance(value, list | tuple):
        return type(value).__name__, [typed(item) for item in value]
    return type(value).__name__, repr(value)


@settings(max_examples=60)
@given(REQUESTS)
def test_a_request_arrives_as_it_was_sent(request):
    arrived = wire.decode_request("/v1/grade", wire.encode_request(request))
    assert arrived == request
    for test, sent in zip(arrived.tests, request.tests, strict=True):
        assert typed(list(vars(test).values())) == typed(list(vars(sent).values()))


@given(st.binary(), st.binary(), st.none() | LIMITS)
def test_a_run_arrives_as_it_was_sent(source, stdin, limits):
    request = wire.RunRequest(source, stdin, limits)
    assert wire.decode_request("/v1/run", wire.encode_request(request)) == request


@given(st.lists(RESULTS, max_size=4))
def test_results_arrive_as_they_were_sent(results):
    assert wire.decode_results(wire.encode_results(results)) == results


def test_a_body_is_what_a_person_would_write():
    """The client writes what the examples in the docs show."""
    request = wire.GradeRequest("print('é')".encode(), [CallTest("f", ([1, 2],), (3, b"\xff"))])
    written = json.loads(wire.encode_request(request))
    assert written["source"] == "print('é')"
    (test,) = written["tests"]
    assert test["args"] == [[1, 2]]
    assert test["expected"] == {"tuple": [3, {"bytes": "ff"}]}
    least = wire.decode_request(
        "/v1/grade", b'{"source": "x", "tests": [{"stdin":"","expected":""}]}'
    )
    assert least == wire.GradeRequest(b"x", [Test(b"", b"")])


def test_the_examples_of_the_documentation_are_requests():
    page = (Path(__file__).parents[2] / "docs/sandbox_service.md").read_text()
    grading, running = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    request = wire.decode_request("/v1/grade", grading.encode())
    assert [type(test) for test in request.tests] == [CallTest, CheckTest, Test]
    assert wire.decode_request("/v1/run", running.encode()).stdin == b"\xff"
    (from_curl,) = re.findall(r"-d '\n(.*?)'\n", page, re.DOTALL)
    assert len(wire.decode_request("/v1/grade", from_curl.encode()).tests) == 2


@given(st.binary())
def test_any_bytes_are_a_request_or_refused(body):
    for decode in (
        lambda: wire.decode_request("/v1/run", body),
        lambda: wire.decode_request("/v1/grade", body),
        lambda: wire.decode_results(body),
    ):
        with contextlib.suppress(WireError):
            decode()


def replaced(tree: object, place: int, by: object) -> tuple[object, int]:
    """Return the tree with its node number `place`, counted from the root, replaced."""
    if place == 0:
        return by, -1
    place -= 1
    if isinstance(tree, dict | list):
        items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
        made = []
        for key, node in items:
            if place >= 0:
                node, place = replaced(node, place, by)
            made.append((key, node))
        return (dict(made) if isinstance(tree, dict) else [node for _, node in made]), place
    return tree, place


@settings(max_examples=200)
@given(REQUESTS, st.integers(0, 40), JSON_VALUES)
def test_a_request_with_a_part_replaced_is_a_request_or_refused(request, place, by):
    """Whatever is accepted can be encoded again: a hostile value never reaches a test."""
    tree = json.loads(wire.encode_request(request))
    body = json.dumps(replaced(tree, place, by)[0]).encode()
    try:
        taken = wire.decode_request("/v1/grade", body)
    except WireError as error:
        assert str(error)
    else:
        wire.encode_request(taken)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("the body", b"[" * 20_000),
        ("the body", b'{"source": "x", "tests": []'),
        ("the body", b'{"source": "\xff"}'),
        ("the body", b"[]"),
        ("source", b"{}"),
        ("source", b'{"source": 5, "tests": []}'),
        ("source.base64", b'{"source": {"base64": "a?=="}, "tests": []}'),
        ("source.base64", b'{"source": {"base64": 3}, "tests": []}'),
        ("sauce", b'{"source": "x", "tests": [], "sauce": 1}'),
        ("tests", b'{"source": "x", "tests": {"stdin": ""}}'),
        ("tests[1].expected", b'{"source":"","tests":[{"stdin":"","expected":""},{"stdin":""}]}'),
        ("tests[0].kind", b'{"source": "x", "tests": [{"kind": "file"}]}'),
        ("tests[0].kind", b'{"source": "x", "tests": [{"kind": []}]}'),
        ("limits.cpu_s", b'{"source": "x", "tests": [], "limits": {"cpu_s": NaN}}'),
        ("limits.cpu_s", b'{"source": "x", "tests": [], "limits": {"cpu_s": true}}'),
        (
            "limits.memory_bytes",
            b'{"source":"","tests":[],"limits":{"memory_bytes":1%s}}' % (b"0" * 99),
        ),
        ("limits.cpu_s", b'{"source":"","tests":[],"limits":{"cpu_s":1%s}}' % (b"0" * 400)),
        ("limits", b'{"source": "x", "tests": [], "limits": {"output_bytes": 0}}'),
        ("checker", b'{"source": "x", "tests": [], "checker": "__import__"}'),
        ("checker.kind", b'{"source": "x", "tests": [], "checker": {"kind": "tokens"}}'),
        ("checker.source", b'{"source": "x", "tests": [], "checker": {"source": 1}}'),
        ("run_at_least", b'{"source": "x", "tests": [], "run_at_least": -1}'),
        ("stop_at_first_failure", b'{"source":"","tests":[],"stop_at_first_failure":0}'),
    ],
)
def test_a_malformed_request_is_told_which_field_and_why(field, body):
    with pytest.raises(WireError) as refusal:
        wire.decode_request("/v1/grade", body)
    assert str(refusal.value).partition(":")[0].split(" is ")[0] == field


@pytest.mark.parametrize(
    "value",
    [
        {"object": "os.system"},
        {"int": "0x"},
        {"int": 5},
        {"int": "1", "bytes": ""},
        {"bytes": "0"},
        {"set": [[1]]},
        {"dict": [1]},
        {"dict": [[1, 2, 3]]},
        {"dict": [[{"set": []}, 1]]},
        {"set": [{"int": hex(n * (2**61 - 1))} for n in range(5000)]},
        {"dict": [[{"tuple": [{"int": hex(n * (2**61 - 1))}]}, 1] for n in range(5000)]},
        {"tuple": 3},
        {},
    ],
)
def test_a_hostile_value_is_refused(value):
    test = {"kind": "call", "entry_point": "f", "args": [value], "expected": 0}
    with pytest.raises(WireError, match=r"^tests\[0\]\.args: "):
        wire.decode_request("/v1/grade", json.dumps({"source": "", "tests": [test]}).encode())


def test_a_value_nested_deeper_than_the_sandbox_takes_is_refused():
    deep = b"[" * 300 + b"]" * 300
    body = (
        b'{"source":"","tests":[{"kind":"call","entry_point":"f","args":[],"expected":%s}]}' % deep
    )
    with pytest.raises(WireError, match=r"^tests\[0\]\.expected: .*200 deep"):
        wire.decode_request("/v1/grade", body)


def test_a_test_that_is_not_plain_data_is_refused_by_the_sender():
    request = wire.GradeRequest(b"", [CallTest("f", (), object())])
    with pytest.raises(ValueError, match="of type object cannot be judged"):
        wire.encode_request(request)
