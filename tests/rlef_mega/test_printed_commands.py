"""Every command line in a docs page, a recipe or a Slurm script is accepted.

Nothing is run: click parses the words of `rlef`, argparse those of `python -m`, recipes are loaded
with their settings, and scripts and targets of make must exist. Words in capitals (RUN, OUT) stand
for the reader's own, `[RECIPE]` may be left out, and inline code may name a command without its
arguments.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from rlef_mega.bench import OF_A_RECIPE, OF_NO_RECIPE
from rlef_mega.cli import app
from rlef_mega.config import SFTConfig, TrainConfig, find_recipe, load_config

ROOT = Path(__file__).parents[2]
PAGES = ("docs/*.md", "README.md", "CONTRIBUTING.md", "rlef_mega/recipes/*.toml", "slurm/*.sh")
COMMAND = re.compile(r"(\w+=\S+ )*(rlef|make|sbatch|bash|srun|python3?|torchrun) ")
INLINE = re.compile(r"`((?:rlef|make|sbatch|bash|python -m|torchrun) [^`]+)`")
OPTIONAL = re.compile(r" \[[A-Za-z][^\]\"']*\]")
PLACEHOLDER = re.compile(r"[A-Z]+(\|[A-Z]+)*")
EXAMPLE_RECIPE = "llama31_8b"  # for RECIPE: it has every section that pages set


def printed_lines() -> Iterator[tuple[str, str, bool]]:
    """Yield the file, the line and whether it is inline code, of all printed command lines."""
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        name, is_markdown = str(page.relative_to(ROOT)), page.suffix == ".md"
        prose, fenced = [], False
        for line in re.sub(r"\\\n#? *", "", page.read_text()).splitlines():
            fenced ^= line.startswith("```")
            indented = line.startswith("    " if is_markdown else "#   ")
            bare = line.lstrip("#$ ")
            if (fenced or indented) and COMMAND.match(bare):
                yield name, bare, False
            elif is_markdown and not fenced:
                prose.append(line.strip())
        for line in INLINE.findall(" ".join(prose)):
            yield name, line, True


def words_of(line: str) -> list[str]:
    """Return the words of our command in a line, without comments, launchers and environment."""
    line = re.split(r"\s{2,}|\s#", OPTIONAL.sub("", line))[0]
    words = shlex.split(line)
    if words[0] == "srun" and "-c" in words:
        words = shlex.split(words[words.index("-c") + 1])
    if words[0] in ("torchrun", "srun"):
        words = ["python", *words[words.index("-m") :]]
    while "=" in words[0]:
        words = words[1:]
    return ["1" if PLACEHOLDER.fullmatch(word) else word for word in words]


def check_rlef(words: list[str], *, inline: bool) -> None:
    """Parse the words as click does, without calling the command; then load the recipe."""
    command, context = typer.main.get_command(app), None
    try:
        while hasattr(command, "resolve_command") and words != ["--help"]:
            context = command.make_context(command.name, list(words), parent=context)
            _, command, words = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
        values = command.make_context(command.name, list(words), parent=context).params
    except Exception as error:  # typer vendors click, whose classes are private there
        accepted = {"Exit", *(("MissingParameter", "BadOptionUsage") if inline else ())}
        if type(error).__name__ not in accepted:
            raise
        return
    if command.name == "bench":
        assert values["what"] in (*OF_A_RECIPE, *OF_NO_RECIPE, "compare", "1")
    if "recipe" in values and command.name != "bench":
        given = values["recipe"]
        recipe = EXAMPLE_RECIPE if given == "1" or given.endswith(".toml") else given
        config = SFTConfig if command.name == "sft" else TrainConfig
        overrides = [value for value in values.get("overrides") or () if "$(" not in value]
        load_config(find_recipe(recipe), overrides, config)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the module; where it has an argparse parser, parse the words and stop."""
    module, *arguments = words
    if module == "rlef_mega.cli":
        check_rlef(arguments, inline=False)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None and spec.origin is not None
    if not arguments or "argparse" not in Path(spec.origin).read_text(encoding="utf-8"):
        return

    class ParsedError(Exception):
        """The words were accepted."""

    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: object, **named: object) -> None:
        original(self, *given, **named)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(ParsedError):
        runpy.run_module(module, run_name="__main__")


def check(line: str, *, inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words_of(line)
    if program == "rlef":
        check_rlef(words, inline=inline)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words if "=" not in word) <= set(targets)
    elif words[0] == "-m":
        check_python(words[1:], monkeypatch)
    else:
        assert (ROOT / words[0]).is_file(), words[0]


@pytest.mark.parametrize(
    ("page", "line", "inline"), sorted(set(printed_lines())), ids=lambda value: str(value)
)
def test_a_printed_command_line_is_accepted(page, line, inline, monkeypatch):
    check(line, inline=inline, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "rlef evaluate MODEL",
        "rlef eval MODEL --data X --protocols multi_turn",
        "rlef bench nothing",
        "rlef train no_such_recipe",
        "rlef train demo --set run.step=3",
        "make no-such-target",
        "bash slurm/no_such.sh",
        "python -m rlef_mega.no_such",
        "python -m rlef_sandbox serve --no-such-option",
    ],
)
def test_a_wrong_command_line_is_found(line, monkeypatch):
    with pytest.raises((Exception, SystemExit)):
        check(line, inline=False, monkeypatch=monkeypatch)
