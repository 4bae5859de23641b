"""What the README names is there: every metric, function, option and file."""

import dataclasses
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
from test_rl import lines, tiny

import rl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "toy/README.md", "tests/README.md"]
CHAPTERS = ["prlm", "retrieve", "eval", "reward", "rl"]
FOREIGN = {
    "local-dir",
    "index-url",
    "deps",
    "create-dirs",
    "nproc-per-node",
    "help",
}  # of other programs


def test_the_glossary_has_every_metric_of_a_run_and_no_other(world, tmp_path):
    rl.main(tiny(world, tmp_path / "run", steps=1, eval_every=1, save_every=1))
    written = {key for line in lines(tmp_path / "run" / "metrics.jsonl") for key in line}
    glossary = README.split("## What the log says")[1].split("\n## ")[0]
    named = re.findall(r"^\| (`.+?`) \|", glossary, re.MULTILINE)  # one key a row, or several
    assert sorted(re.findall("`(.+?)`", " ".join(named))) == sorted(written)


def test_every_function_that_stands_beside_its_file_is_there():
    found = re.findall(rf"`({'|'.join(CHAPTERS)})\.py: ([\w., ]+)`", README)
    assert len(found) > 15
    for chapter, names in found:
        for name in names.split(", "):
            reduce(getattr, name.split("."), importlib.import_module(chapter))


def test_every_option_is_there():
    known = {
        field.name.replace("_", "-")
        for chapter in [*CHAPTERS, "page", "real"]
        for field in dataclasses.fields(importlib.import_module(chapter).Options)
    }
    used = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)", README))
    assert used - FOREIGN - {"debug"} <= known and len(used & known) > 20


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
