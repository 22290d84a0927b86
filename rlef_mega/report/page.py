"""Render `report.html`, a page that needs no other file and no network.

Style, script and drawings are inside the page, and a content security policy forbids everything
else, except that a live page may ask its own server for a newer one. Text that a model or a program
wrote passes three filters: `clip` bounds its length, `visible` replaces invisible and misleading
characters, and the template's autoescape keeps it text.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlef_mega.config import flatten
from rlef_mega.report import display
from rlef_mega.report.comparison import compare, evaluations_of
from rlef_mega.report.curves import draw_panels
from rlef_mega.report.episodes import PackedEpisodes, pack_episodes
from rlef_mega.report.run_files import (
    Json,
    RunFiles,
    iterate_episodes,
    named,
    number,
    read_runs,
    table,
    text,
)

HERE = Path(__file__).parent
SCRIPTS = ("highlight.js", "diff.js", "store.js", "dialogue.js", "browser.js")
OWN_KEYS = ("run.dir", "started")
EPISODES = 10_000  # on a page; it opens in less than two seconds


def write_report(*runs: Path, episodes: int = EPISODES) -> Path:
    """Write a page with at most `episodes` episodes into the first run's folder.

    Returns its path: `report.html`, or `against_OTHER.html` for several runs. Raises ValueError if
    a run is not a directory.
    """
    files = read_runs(runs)
    name = "_".join(["against", *list(files)[1:]]) + ".html" if len(runs) > 1 else "report.html"
    page = runs[0] / name.replace("/", "_")
    unfinished = page.with_name(f".{page.name}.{os.getpid()}")
    # `visible` has replaced lone surrogates in all that comes from data
    html = render(files, episodes=episodes)
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(page)
    return page


def render(runs: Mapping[str, RunFiles], *, episodes: int, stamp: str = "") -> str:
    """Render one page for runs by label. With a stamp it is live: it polls its server for a newer
    page."""
    notes = [named(label, note) for label, files in runs.items() for note in files.notes]
    comparison = compare(*evaluations_of(runs))
    sources = tuple(
        (named(label, stage), path, path.stat().st_mtime_ns)
        for label, files in runs.items()
        for stage, path in files.episode_files.items()
    )
    packed, more_notes = pack_files(sources, episodes)
    notes += more_notes
    script = page_script(bool(stamp))
    return (
        environment()
        .get_template("report.html")
        .render(
            title=" and ".join(label or files.path.resolve().name for label, files in runs.items()),
            runs=[view_run(label, files) for label, files in runs.items()],
            differences=differences(runs),
            comparison=comparison,
            heading="Before and after" if len(runs) == 1 else "Side by side",
            drawings=draw_panels({label: files.metrics for label, files in runs.items()}),
            index=Markup(packed.index),  # base64, as the chunks are
            chunks=[Markup(chunk) for chunk in packed.chunks],
            limit=episodes if packed.count >= episodes else None,
            notes=shortened(notes),
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            stamp=stamp,
        )
    )


@lru_cache(maxsize=1)  # a live page is rendered at each step, mostly without new episodes
def pack_files(
    sources: tuple[tuple[str, Path, int], ...], limit: int
) -> tuple[PackedEpisodes, list[str]]:
    """Pack the episodes of `sources`: stage, file, and when the file was written. Return them with
    notes on damaged files."""
    notes: list[str] = []
    stages = {stage: iterate_episodes(path, notes) for stage, path, _ in sources}
    return pack_episodes(stages, limit), notes


def view_run(label: str, files: RunFiles) -> dict[str, Any]:
    return {
        "label": label,
        "facts": run_facts(files),
        "manifest": leaves(files.manifest),
        "config_text": files.config_text,
    }


def leaves(tree: Json) -> dict[str, str]:
    """Return dotted names and values of a tree of tables, as text to show."""
    return {name: display.clip(str(value), 300) for name, value in flatten(tree).items()}


def differences(runs: Mapping[str, RunFiles]) -> dict[str, list[str]]:
    """Return the keys of recipes and manifests whose values differ between runs, with the values.
    Folder and start time always differ, so these are left out."""
    trees = [leaves(files.config) | leaves(files.manifest) for files in runs.values()]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in OWN_KEYS)
    values = {key: [tree.get(key, display.DASH) for tree in trees] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def page_script(live: bool) -> Markup:
    """Return all scripts of the page, in one scope."""
    names = (*SCRIPTS, "live.js") if live else SCRIPTS
    sources = [(HERE / name).read_text(encoding="utf-8") for name in names]
    return Markup('"use strict";\n(() => {\n' + "\n".join(sources) + "})();\n")


def environment() -> Environment:
    def finalize(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return display.visible(value) if plain else value

    page = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"percent": display.percent, "points": display.points}
    return page


def run_facts(files: RunFiles) -> list[tuple[str, str]]:
    """Return what the page's header shows of a run, such as model and device, as far as its files
    record it."""
    config, manifest = files.config, files.manifest
    layout = ", ".join(
        f"{name.removesuffix('_parallel_size').removesuffix('_model')} {value}"
        for name, value in leaves(table(manifest, "layout")).items()
        if name.endswith("parallel_size")
    )
    facts = [
        ("model", text(config, "model", "path")),
        ("problems", text(config, "data", "train")),
        ("device", text(manifest, "device")),
        ("layout", layout),
        ("seed", text(config, "run", "seed")),
        ("started", text(manifest, "started")),
        ("progress", progress(files)),
    ]
    return [(name, display.clip(value, 300)) for name, value in facts if value]


def progress(files: RunFiles) -> str:
    """Return the steps, episodes, tokens and time so far, as recorded."""
    if not files.metrics:
        return ""
    last, asked = files.metrics[-1], number(files.config, "run", "steps")
    parts = [f"step {number(last, 'step'):,.0f}" + (f" of {asked:,.0f}" if asked else "")]
    for name in ("episodes", "tokens"):
        counts = [number(record, name) for record in files.metrics]
        if any(counts):
            parts.append(f"{sum(count or 0 for count in counts):,.0f} {name}")
    seconds = sum(number(record, "time", "step") or 0 for record in files.metrics)
    if seconds:
        parts.append(str(timedelta(seconds=round(seconds))))
    return ", ".join(parts)


def shortened(notes: list[str]) -> list[str]:
    """Return the first notes and the number of others: a damaged file can add one per line."""
    return notes[:10] + [f"… and {len(notes) - 10} more like these"] * (len(notes) > 10)
