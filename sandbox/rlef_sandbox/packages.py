"""Packages of the caller's environment that programs may import, if a Sandbox names them.

The controller looks up their files. Zygotes import the named ones before they confine themselves
(`program.load_packages`), since they may need shared libraries of the system.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import NamedTuple


class Packages(NamedTuple):
    """The packages that were named, and what is needed to import them."""

    named: list[str]
    modules: dict[str, str]  # the file of each top-level module, also of what they require
    paths: list[str]  # what becomes readable: folders of packages and shared libraries, and files


def find_packages(names: Iterable[str]) -> Packages:
    """Find the packages that `import` knows by these names, and what they require.

    Raises ValueError for one that is not installed here.
    """
    found = Packages(list(names), {}, [])
    providers = metadata.packages_distributions() if found.named else {}
    wanted = [provider for name in found.named for provider in providers.get(name, ())]
    for name in wanted:  # the loop appends requirements to it
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # needed on other platforms only, or the import fails
            continue
        for top in sorted({file.parts[0] for file in distribution.files or ()}):
            path = os.path.abspath(str(distribution.locate_file(top)))
            is_package = os.path.exists(f"{path}/__init__.py")
            if module := top if is_package else inspect.getmodulename(top):
                found.modules[module] = f"{path}/__init__.py" if is_package else path
            if module or top.endswith(".libs"):
                found.paths.append(path)
        for requirement in distribution.requires or ():
            required, _, marker = requirement.partition(";")
            required = re.findall(r"[\w.-]+", required)[0]
            if "extra" not in marker and required not in wanted:
                wanted.append(required)
    for name in found.named:
        if name not in found.modules:
            raise ValueError(
                f"package {name!r} is not installed in {sys.prefix}, or has no files there: "
                "install it there, and give the name that `import` takes"
            )
    return found
