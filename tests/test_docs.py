"""What the README names is there: every function, option and file."""

import dataclasses
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "toy/README.md", "tests/README.md"]
CHAPTERS = ["prlm", "retrieve", "eval", "reward", "rl"]
FOREIGN = {"only", "local-dir", "index-url", "deps", "create-dirs", "nproc-per-node", "help"}


def test_every_function_that_stands_beside_its_file_is_there():
    found = re.findall(rf"`({'|'.join(CHAPTERS)})\.py: ?([\w., ]+)`", README)
    named = [(chapter, name) for chapter, names in found for name in names.split(", ")]
    assert len(named) > 20
    for chapter, name in named:
        reduce(getattr, name.split("."), importlib.import_module(chapter))


def flags_of(module: str) -> list[str]:
    options = importlib.import_module(module).Options
    return [field.name.replace("_", "-") for field in dataclasses.fields(options)]


def test_every_option_is_there():
    known = {flag for module in [*CHAPTERS, "page", "real"] for flag in flags_of(module)}
    for path in (*ROOT.glob("tests/*.py"), *ROOT.glob("toy/*.py")):  # those of argparse
        known |= set(re.findall(r'"--([a-z-]+)"', path.read_text(encoding="utf-8")))
    used = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)", README))
    assert used - FOREIGN <= known and len(used & known) > 20


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_a_file_with_options_that_it_has(page):
    """What stands in a page's blocks of commands, as somebody would copy it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"(?:python|nproc-per-node \d+) ([\w/]+\.py)([^\n#|&]*)", blocks)
    assert found
    for name, rest in found:
        source = (ROOT / name).read_text(encoding="utf-8")
        if (ROOT / name).stem in (*CHAPTERS, "judges", "rule"):  # with inherited options
            source = " ".join(flags_of((ROOT / name).stem))
        for flag in re.findall(r"--(?:no-)?([a-z][a-z-]+)", rest):
            known = flag in FOREIGN or flag in source or flag.replace("-", "_") in source
            assert known, (name, flag)


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
