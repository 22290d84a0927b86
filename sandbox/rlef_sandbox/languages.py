"""From a program's source to what a zygote runs: a file of Python, or an executable.

To add a language that compiles to an executable, give it a class like `cpp.Cpp`, and add it to
`LANGUAGES` and `Languages`. Runs, limits, verdicts and checkers are the same for all languages.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from .cpp import STANDARDS, Cpp
from .verdict import AnyTest, Test
from .worker import Layers, memory_file

LANGUAGES = ("python", *STANDARDS)


class Languages:
    """Turns sources into programs; owns the compilers and the executables they made."""

    def __init__(
        self, accept: Callable[[Layers], None], workers: int, *, has_launcher: bool
    ) -> None:
        standards = STANDARDS if has_launcher and Cpp.compiler() else {}
        self._cpp = {name: Cpp(accept, workers, flag) for name, flag in standards.items()}
        self.available = LANGUAGES if self._cpp else LANGUAGES[:1]

    def check(self, language: str, tests: Sequence[AnyTest] = ()) -> None:
        """Raise ValueError for a language, or tests of one, that this machine cannot run."""
        if language not in LANGUAGES:
            raise ValueError(f"unknown language {language!r}; known: {', '.join(LANGUAGES)}")
        if language not in self.available:
            raise ValueError(f"language {language!r} needs g++ and a C compiler (Debian: g++)")
        if language != "python":
            for test in tests:
                if not isinstance(test, Test):
                    raise ValueError(
                        f"a {type(test).__name__} calls a Python function; {language!r} programs "
                        "take Test, with standard input and output"
                    )

    @contextlib.contextmanager
    def prepared(self, source: bytes, language: str) -> Iterator[tuple[int, bool]]:
        """Yield a descriptor of the program's file, and whether it is an executable. Raises
        CompileFailedError if there is no executable.
        """
        self.check(language)
        if language == "python":
            file = memory_file(source)
        else:
            file = self._cpp[language].executable(source)
        try:
            yield file, language != "python"
        finally:
            os.close(file)

    def close(self) -> None:
        for compilers in self._cpp.values():
            compilers.close()
