"""The easy functions: their own solutions pass, wrong programs fail, half of the statements
withhold what the public tests tell, splits share nothing, and JSONL can store them."""

import ast
import contextlib
import copy
import itertools
from collections import defaultdict

from rlef_mega.dialogues import templates
from rlef_mega.problems import load_problems
from rlef_mega.problems.contamination import compare
from rlef_mega.problems.functions import expand, read_templates, solved, withholds
from rlef_mega.problems.jsonl import parse_problem, to_row
from rlef_mega.problems.splits import SPLITS
from rlef_sandbox import Sandbox, Status

PROBLEMS = {split: load_problems(f"functions:{split}") for split in SPLITS}
EVERY = [problem for problems in PROBLEMS.values() for problem in problems]
TEMPLATES = read_templates()


def test_there_are_enough_of_each_kind_in_each_split():
    assert len({problem.id for problem in EVERY}) == len(EVERY) >= 300
    assert len({problem.family for problem in EVERY}) == len(TEMPLATES) >= 40
    assert 0.4 < sum(map(withholds, TEMPLATES.values())) / len(TEMPLATES) < 0.6
    for split, problems in PROBLEMS.items():
        withheld = [withholds(TEMPLATES[problem.family]) for problem in problems]
        assert 0.4 < sum(withheld) / len(withheld) < (0.85 if split == "train" else 0.75), split


def test_splits_share_no_template_statement_or_solution():
    families = {split: {p.family for p in problems} for split, problems in PROBLEMS.items()}
    where = defaultdict(set)
    for split in SPLITS:
        for problem, solution, _ in solved(split):
            assert problem.family in families[split]
            where[without_names(solution)].add(split)
    assert not [solution for solution, splits in where.items() if len(splits) > 1]
    for one, other in itertools.permutations(SPLITS, 2):
        overlaps = compare(PROBLEMS[one], PROBLEMS[other])
        assert not [overlap for overlap in overlaps if overlap.suspicious]


def without_names(program):
    """Return a program's tree with its own names numbered in the order of their appearance."""
    tree, names = ast.parse(program), {}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                node.name = ""
            case ast.arg():
                node.arg = names.setdefault(node.arg, str(len(names)))
            case ast.comprehension(target=ast.Name(id=name)):
                names.setdefault(name, str(len(names)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.dump(tree)


def test_public_tests_tell_what_a_statement_withholds():
    """No two functions of such a template give the same answers to them."""
    for template in filter(withholds, TEMPLATES.values()):
        functions = [problem for problem, _, _ in expand(template)]
        assert len({problem.statement for problem in functions}) == 1
        shown = {repr([test.expected for test in p.public_tests]) for p in functions}
        assert len(shown) == len(functions) >= 4, template["name"]


def test_constant_and_wrong_programs_fail_every_problem():
    for problem, _, wrong_programs in itertools.chain(*map(solved, SPLITS)):
        public, *_ = problem.public_tests
        hard_coded = f"def {problem.family}(*_): return {public.expected!r}"
        assert wrong_programs
        for wrong in (hard_coded, *wrong_programs):
            names = {}
            exec(wrong, names)  # the package's own text
            assert not passes(names[problem.family], problem), wrong


def passes(function, problem):
    with contextlib.suppress(Exception):
        tests = problem.public_tests + problem.private_tests.tests
        return all(function(*copy.deepcopy(test.args)) == test.expected for test in tests)


def test_the_own_solution_passes_in_the_sandbox_and_a_wrong_program_does_not():
    with Sandbox(workers=1) as sandbox:
        for problem, solution, wrong_programs in solved("train")[::10]:
            tests = problem.public_tests + problem.private_tests.tests
            right = sandbox.grade(solution, tests, limits=problem.limits)
            assert {result.status for result in right} == {Status.OK}, problem.id
            wrong = sandbox.grade(wrong_programs[0], tests, limits=problem.limits)
            assert wrong[-1].status is not Status.OK, problem.id


def test_private_arguments_differ_from_public_ones():
    for problem in EVERY:
        shown = [test.args for test in problem.public_tests]
        assert not any(test.args in shown for test in problem.private_tests.tests), problem.id


def test_the_prompt_quotes_no_test():
    for problem in EVERY:
        prompt = templates.first_prompt(problem.statement, problem.template, problem.public_tests)
        assert f"def {problem.entry_point}(" in prompt
        assert not any(templates.assertion(test) in prompt for test in problem.public_tests)


def test_jsonl_can_store_them():
    assert [parse_problem(to_row(problem)) for problem in EVERY] == EVERY
