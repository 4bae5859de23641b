"""Git repositories become LaMP's files: whose words, which ones, and what is left out."""

import json
import os
import runpy
import subprocess
import sys

import commits as module
import pytest
from conftest import same

import retrieve

BODY = "Nobody has called it for a year and the test that names it tests nothing at all."


def git(folder, *arguments, author="ann", day=1):
    """Runs git there as `author`, on that day of March 2024; what it prints."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in ("GIT_AUTHOR", "GIT_COMMITTER"):
        alone |= {f"{role}_NAME": author, f"{role}_EMAIL": f"{author}@example.org"}
        alone[f"{role}_DATE"] = f"2024-03-{day:02} 12:00 +0000"
    run = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(run, env=os.environ | alone, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def commit(folder, subject, body=BODY, author="ann", day=1):
    (folder / "message").write_bytes(f"{subject}\n\n{body}".encode())
    git(folder, "commit", "--allow-empty", "-q", "-F", "message", author=author, day=day)


def create(folder, **authors):
    """A repository in which each author has so many commits, one a day."""
    git(folder.parent, "init", "-q", "-b", "main", folder.name)
    for author, count in authors.items():
        for n in range(count):
            commit(folder, f"{author} {n}", f"{BODY} {n}", author, 1 + n)
    return folder


@pytest.fixture
def repository(tmp_path):
    return create(tmp_path / "project")


def read(folder, words=15):
    """{subject: body} of what qualifies."""
    authors = module.read_commits(folder, words)
    return {item["subject"]: item["body"] for items in authors.values() for item in items}


def convert(out, *arguments):
    """What the command writes: {split: [examples]}."""
    module.main(module.parse_arguments([*map(str, arguments), "--out", str(out)]))
    return {split: retrieve.load_lamp(out, "commits", split) for split in ("train", "dev")}


@pytest.mark.parametrize(("subject", "expected"), [
    ("add a test.", ("none", False, True, "")), ("wait ...", ("none", False, False, "")),
    ("DOC, TST: fix it.", ("tag", False, True, "DOC, TST")),
    ("MAINT: special: Simplify", ("tag", True, False, "MAINT")),
    ("feat(core)!: It", ("type", True, False, "feat(core)!")),
    ("lib/url: Curl_open() fails", ("place", True, False, "lib/url")),
    ("Git::path(): fails", ("none", True, False, "")),
    (f"{'x' * 31}: long", ("none", False, False, "")), ("", ("none", False, False, "")),
])  # fmt: skip
def test_manner_of_a_subject(subject, expected):
    assert module.manner(subject) == expected


@pytest.mark.parametrize(("answer", "target", "expected"), [
    ("BUG: close it", "BUG: open it", [True, True, True]),
    ("DOC: close it", "BUG: open it", [True, True, False]),
    ("BUG: Close it", "BUG: open it", [False, True, True]),
    ("BUG: close it", "open it", [False, False, None]), ("", "open it", [False, False, None]),
])  # fmt: skip
def test_same_manner(answer, target, expected):
    assert [*module.same_manner(answer, target).values()] == expected


@pytest.mark.parametrize(("subject", "expected"), [
    ("ENH: add it (#1, fixes gh-2) (#3) [wheel build]", "ENH: add it [wheel build]"),
    ("Fixed #12 -- Added a test.", "Added a test."), ("gh-1234: Add a test", "Add a test"),
    ("Fixed 7564: Correct the roots", "Correct the roots"),
    ("core: fix #14 - mixed ones", "core: mixed ones"), ("Add a test #123", "Add a test"),
    ("Add a test, closes #1 and #2.", "Add a test"), ("Before #12 it failed", ""),
    ("Use SHA-256 in 3 places, not in 1234", "Use SHA-256 in 3 places, not in 1234"),
])  # fmt: skip
def test_numbers_of_tickets_are_taken_out(subject, expected):
    assert module.without_tickets(subject) == expected


class TestReadCommits:
    def test_what_a_message_is_made_of(self, repository):
        commit(repository, "one", f"{BODY}\n\nOn a second\n  line: é 'quoted' \"too\".\n")
        commit(repository, "three", f"{BODY}\n Suggested-by: Bo\n\nnote\n\nAcked-by: Cy <c@c.org>")
        commit(repository, "four\nin two lines", f"{BODY} As <c.y+z@cy.example.org> said.")
        commit(repository, "Fixed #7 -- five of them (#12)")
        assert read(repository) == {
            "one": f"{BODY} On a second line: é 'quoted' \"too\".",
            "three": f"{BODY} note",
            "four in two lines": f"{BODY} As said.",
            "five of them": BODY,
        }

    def test_what_is_left_out(self, repository):
        commit(repository, "long enough", "word " * 15)
        commit(repository, "too short", f"{'word ' * 14}\n\nSigned-off-by: Ann <ann@example.org>")
        commit(repository, "no body", "")
        commit(repository, "SAYS IT", f"{BODY} * says it")
        for subject in ("so " * 21, "Fix #12", 'Revert "it"', "Merge branch 'side'"):
            commit(repository, subject)
        for author in ("dependabot[bot]", "Abbot"):
            commit(repository, f"by {author}", author=author)
        git(repository, "checkout", "-q", "-b", "side")
        commit(repository, "on the side", "two " * 15)
        git(repository, "checkout", "-q", "main")
        commit(repository, "on main", "three " * 15)
        git(repository, "merge", "-q", "--no-ff", "-m", f"Side\n\n{BODY}", "side")
        assert read(repository).keys() == {"long enough", "by Abbot", "on the side", "on main"}
        assert "too short" in read(repository, words=14)

    def test_authors_are_hashed_and_repeat_no_subject(self, repository):
        for n, author in enumerate(("ann", "Ann", "bo", "old.bo")):
            commit(repository, f"number {n}", author=author, day=1 + n)
        commit(repository, "number 1", f"{BODY} Again.", day=9)
        (repository / ".mailmap").write_text("Bo <bo@example.org> <old.bo@example.org>\n")
        found = module.read_commits(repository, 15)
        groups = [[item["date"][-1] for item in items] for items in found.values()]
        assert groups == [["1", "2"], ["3", "4"]]
        assert "ann" not in json.dumps(found) and "example" not in json.dumps(found)

    def test_only_the_whole_repository_that_is_named(self, repository, tmp_path, monkeypatch):
        commit(repository, "one")
        shallow, plain, sub = (tmp_path / name for name in ("s", "p", "project/sub"))
        git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", str(shallow))
        plain.mkdir()
        sub.mkdir()
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        for folder, said in (
            (shallow, "git fetch --unshallow"), (plain, "git"), (sub, "no repository of its own"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{folder}.*{said}"):
                module.read_commits(folder, 15)


def written(*authors, count=1):
    """{author: as many items}, a day apart."""

    def item(id, n):
        return {"id": id, "body": f"b{n}", "subject": f"s{n}", "date": f"2024-03-{n + 1:02}"}

    return {a: [item(f"{a}{n}", n) for n in range(count)] for a in authors}


class TestRecords:
    def test_the_newest_are_queries_and_what_came_before_is_the_profile(self):
        chosen = {"p": written("b", count=4), "q": written("a", count=10)}
        records = module.make_records(chosen, least=4, queries=2, profile=3)
        found = [(r["repository"], r["output"], [i["id"] for i in r["profile"]]) for r in records]
        newest = [("q", "s9", ["a6", "a7", "a8"]), ("p", "s3", ["b0", "b1", "b2"])]
        same(found, [*newest, ("q", "s8", ["a5", "a6", "a7"])])  # of every user the newest first

    def test_repositories_give_equal_shares(self):
        many, other = ([f"{name}{n}" for n in range(30)] for name in "mo")
        found = {"many": written(*many), "few": written("x", "y", "m0"), "other": written(*other)}
        first, again, another = (module.choose_users(found, 23, seed) for seed in (0, 0, 1))
        same({name: len(users) for name, users in first.items()}, dict(few=3, many=10, other=10))
        assert "m0" in first["few"] and "m0" not in first["many"]
        assert [*first["many"]] == [*again["many"]] != [*another["many"]]

    def test_what_is_held_out(self):
        """Users by their rank in each repository; by time what is newer."""
        ten = [f"u{n}" for n in range(10)]
        chosen = {"one": written("z"), "two": written("x", "y"), "ten": written(*ten)}
        parts = module.split_records(module.make_records(chosen, 1, 2, 9), chosen, "user", 0.2)
        users = {split: sorted(r["user_id"] for r in part) for split, part in parts.items()}
        same(users, {"train": [*ten[2:], "y", "z"], "dev": ["u0", "u1", "x"]})
        chosen = {"p": written("a", "b", count=5)}
        parts = module.split_records(module.make_records(chosen, 1, 5, 9), chosen, "time", 0.4)
        days = {split: {r["date"][-1] for r in part} for split, part in parts.items()}
        same(days, {"train": {"1", "2", "3"}, "dev": {"4", "5"}})


class TestCommand:
    def test_two_repositories_of_two(self, tmp_path):
        """The newest commits of each author are asked; what came before is the profile."""
        team = create(tmp_path / "team.git", ann=5, bo=6)
        parts = convert(tmp_path / "data", team, "--least", "3", "--queries", "2")
        assert {e.target[:-2] for part in parts.values() for e in part} == {"ann", "bo"}
        for part in parts.values():
            author, last = part[0].target.split()
            for n, e in zip((int(last), int(last) - 1), part, strict=True):
                assert e.target == f"{author} {n}" and e.query == f"{BODY} {n}"
                earlier = [(f"{author} {day}", f"2024-03-0{day + 1}") for day in range(n)]
                assert [(item["subject"], item["date"]) for item in e.profile] == earlier
        big = create(tmp_path / "big", **{f"big{n}": 2 for n in range(5)})
        parts = convert(tmp_path / "both", big, team, "--least", "2", "--authors", "4")
        for part in parts.values():  # one of each
            assert {e.target.startswith("big") for e in part} == {False, True}

    def test_nothing_qualifies(self, tmp_path):
        alone, out = create(tmp_path / "project", ann=6), tmp_path / "data"
        for flags, said in (
            (("--least", "50"), "no author has 50 commits.*lower --least"),
            (("--least", "3"), "dev has none of the 4 records.*--split time"),
        ):
            with pytest.raises(ValueError, match=said):
                convert(out, alone, *flags)
        assert not out.exists()

    def test_mistakes_are_one_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["commits.py", str(tmp_path / "none")])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(module.__file__, run_name="__main__")
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "none" in said
