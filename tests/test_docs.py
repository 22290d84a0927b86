"""Every link of the documentation, and every file that the design names, exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("sandbox/*.md"),
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_its_heading(page):
    for name, anchor in LINK.findall(page.read_text()):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {name}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_file_that_the_design_names_exists():
    named = re.findall(r"`([\w/]+\.(?:py|c|js|sh|txt))`", (ROOT / "docs/design.md").read_text())
    paths = [
        f"/{path.relative_to(ROOT)}"
        for folder in ("rlef_mega", "kernels", "sandbox", "slurm", "tests", "scripts")
        for path in (ROOT / folder).rglob("*.*")
    ]
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in paths)}
    assert len(named) > 100 and not missing
