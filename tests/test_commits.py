"""A git repository becomes LaMP's files: whose words, which ones, and what is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commits as module
import pytest

import retrieve

ROOT = Path(__file__).parent.parent
BODY = "Nobody has called it for a year and the test that names it tests nothing at all."


def git(folder, *arguments, author="ann", day=1):
    """Runs git there as `author`, on that day of March 2024."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    roles = {}
    for role in ("GIT_AUTHOR", "GIT_COMMITTER"):
        roles |= {f"{role}_NAME": author, f"{role}_EMAIL": f"{author}@example.org"}
        roles[f"{role}_DATE"] = f"2024-03-{day:02} 12:00 +0000"
    run = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(run, env=os.environ | roles | alone, capture_output=True)
    assert done.returncode == 0, done.stderr


def commit(folder, subject, body=BODY, author="ann", day=1):
    message = f"{subject}\n\n{body}".encode()
    (folder / "message").write_bytes(message)
    git(folder, "commit", "--allow-empty", "-q", "-F", "message", author=author, day=day)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    return folder


def read(folder, words=15):
    """{subject: body} of what qualifies."""
    return {c.item["subject"]: c.item["body"] for c in module.read_commits(folder, words)}


class TestReadCommits:
    def test_what_a_message_is_made_of(self, repository):
        commit(repository, "one", f"{BODY}\n\nOn a second\n  line: é 'quoted' \"too\".\n")
        commit(repository, "two", f"{BODY}\n\nFixes: 12345\nSigned-off-by: Ann <ann@example.org>")
        commit(repository, "three", f"{BODY}\nSuggested-by: Bo\n\nnote\n\nAcked-by: Cy <c@c.org>")
        commit(repository, "four\nin two lines", BODY)
        assert read(repository) == {
            "one": f"{BODY} On a second line: é 'quoted' \"too\".",
            "two": BODY,
            "three": f"{BODY} note",
            "four in two lines": BODY,
        }

    def test_what_is_left_out(self, repository):
        words = " ".join(["word"] * 15)
        commit(repository, "long enough", words)
        commit(
            repository, "too short", words[:-5] + "\n\nSigned-off-by: Ann Other <ann@example.org>"
        )
        commit(repository, "no body", "")
        git(repository, "checkout", "-q", "-b", "side")
        commit(repository, "on the side", "two " * 15)
        git(repository, "checkout", "-q", "main")
        commit(repository, "on main", "three " * 15)
        git(repository, "merge", "-q", "--no-ff", "-m", f"Merge side\n\n{BODY}", "side")
        assert read(repository).keys() == {"long enough", "on the side", "on main"}
        assert "too short" in read(repository, words=14)

    def test_only_the_repository_that_is_named(self, repository, tmp_path, monkeypatch):
        (repository / "folder").mkdir()
        commit(repository, "one")
        with pytest.raises(ValueError, match=r"folder is no repository of its own, .*project"):
            read(repository / "folder")
        git(tmp_path, "init", "-q", "other")
        commit(tmp_path / "other", "another")
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
        assert read(repository).keys() == {"one"}

    def test_data_of_another_task_is_not_replaced(self, repository, tmp_path):
        for day in range(1, 5):
            commit(repository, f"s{day}", f"{day} {BODY}", day=day)
        outputs = tmp_path / "data" / "train" / "train_outputs.json"
        outputs.parent.mkdir(parents=True)
        outputs.write_text('{"task": "LaMP_4", "golds": []}')
        flags = ["--least", "2", "--split", "time", "--out", str(tmp_path / "data")]
        with pytest.raises(ValueError, match=r"train_outputs\.json holds LaMP_4"):
            module.main(module.parse_arguments([str(repository), *flags]))
        assert json.loads(outputs.read_text())["golds"] == []

    def test_a_message_that_an_author_repeats_counts_once(self, repository):
        for author, day in (("ann", 1), ("ann", 2), ("bo", 3)):
            commit(repository, "again", author=author, day=day)
        found = module.read_commits(repository, 15)
        assert sorted(c.item["date"] for c in found) == ["2024-03-01", "2024-03-03"]

    def test_authors_are_hashed_whatever_their_address_looks_like(self, repository):
        for n, author in enumerate(("ann", "ANN", "bo", "old.bo")):
            commit(repository, f"number {n}", author=author)
        (repository / ".mailmap").write_text("Bo <bo@example.org> <old.bo@example.org>\n")
        found = {c.item["subject"]: c.author for c in module.read_commits(repository, 15)}
        assert found["number 0"] == found["number 1"] != found["number 2"] == found["number 3"]
        assert not any("ann" in json.dumps(vars(c)) for c in module.read_commits(repository, 15))

    def test_bytes_of_another_encoding(self, repository):
        (repository / "message").write_bytes("Größe\n\n".encode("latin-1") + BODY.encode())
        git(
            repository,
            "-c",
            "i18n.commitEncoding=latin-1",
            "commit",
            "--allow-empty",
            "-F",
            "message",
        )
        assert [*read(repository)] == ["Größe"]

    def test_a_bare_clone_says_the_same(self, repository, tmp_path):
        for n in range(3):
            commit(repository, f"number {n}", day=1 + n)
        git(tmp_path, "clone", "-q", "--bare", str(repository), "bare.git")
        assert module.read_commits(tmp_path / "bare.git", 15) == module.read_commits(repository, 15)


def written(author, count):
    """Commits of one author, a second apart."""
    names = ("id", "body", "subject", "date")
    items = [
        dict(zip(names, (f"{author}{n}", f"b{n}", f"s{n}", "2024-03-01"))) for n in range(count)
    ]
    return [module.Commit(author, n, item) for n, item in enumerate(items)]


class TestRecords:
    def test_the_newest_are_queries_and_what_came_before_is_the_profile(self):
        ten, four, three = written("a", 10), written("b", 4), written("c", 3)
        records = module.make_records([*ten[::-1], *four, *three], least=4, queries=3, profile=5)
        found = {r["id"]: [item["id"] for item in r["profile"]] for r in records}
        assert found == {
            "a7": ["a2", "a3", "a4", "a5", "a6"], "a8": ["a3", "a4", "a5", "a6", "a7"],
            "a9": ["a4", "a5", "a6", "a7", "a8"], "b3": ["b0", "b1", "b2"],
        }  # fmt: skip
        assert {r["output"] for r in records if r["user_id"] == "a"} == {"s7", "s8", "s9"}
        more = module.make_records([*ten, *four], least=4, queries=99, profile=99)
        assert [r["id"] for r in more] == ["a9", "b3", *(f"a{n}" for n in range(8, 2, -1))]

    def test_users_are_in_one_part_and_stay_there(self):
        users = {f"{n * 16**11 + 5:012x}": n for n in range(16)}  # spread evenly
        records = [{"id": f"{u}{n}", "user_id": u, "time": n} for u in users for n in range(3)]
        parts = module.split_records(records, "user", 0.25)
        assert {users[r["user_id"]] for r in parts["dev"]} == {0, 1, 2, 3}
        assert len(parts["dev"]) == 12 and len(parts["train"]) == 36
        fewer = module.split_records(records[30:], "user", 0.25)
        assert all(r in parts["train"] for r in fewer["train"])

    def test_by_time_what_is_held_out_is_newer(self):
        records = [{"id": f"{n}", "user_id": "ab", "time": n * 7 % 10} for n in range(10)]
        parts = module.split_records(records, "time", 0.3)
        assert sorted(r["time"] for r in parts["dev"]) == [7, 8, 9] and len(parts["train"]) == 7


class TestCommand:
    def test_the_files_are_lamps(self, repository, tmp_path, capsys):
        for n in range(6):
            for author in ("ann", "bo", "cy"):
                commit(repository, f"{author} {n}", f"{BODY} {n}", author=author, day=1 + n)
        out = str(tmp_path / "data")
        flags = ["--least", "3", "--queries", "2", "--split", "time", "--share", "0.5"]
        module.main(module.parse_arguments([str(repository), "--out", out, *flags]))
        assert f"{out}/train: 3 records of 3 authors" in capsys.readouterr().out
        for split, n in (("train", 4), ("dev", 5)):
            examples = retrieve.load_lamp(out, "commits", split)
            assert {e.target for e in examples} == {
                f"{author} {n}" for author in ("ann", "bo", "cy")
            }
            for e in examples:
                assert e.query == f"{BODY} {n}" and len(e.profile) == n and e.id != e.user_id
                newest = retrieve.retrieve(e, 1, "recency")[0]
                assert newest["subject"] == f"{e.target[:-1]}{n - 1}"
                assert newest["date"] == f"2024-03-{n:02}"
                shown = retrieve.build_messages(e, [newest])[1]["content"]
                assert f"'subject': '{newest['subject']}'\nBased on" in shown

    def test_signatures_and_broken_dates(self, repository):
        """What `git log` says of a signature is no part of a message; a date may be no number."""
        commit(repository, "whole")
        git(repository, "config", "log.showSignature", "true")
        gpg = repository / "gpg"
        gpg.write_text("#!/bin/sh\necho gpg: a good one >&2\necho '[GNUPG:] GOODSIG A'\n")
        gpg.chmod(0o755)
        git(repository, "config", "gpg.program", str(gpg))
        run = ["git", "-C", str(repository)]

        def write(*lines):
            text = "\n".join([*lines, "", "odd", "", BODY]).encode()
            how = ["hash-object", "-t", "commit", "-w", "--stdin", "--literally"]
            made = subprocess.run([*run, *how], input=text, capture_output=True, check=True)
            git(repository, "reset", "-q", "--soft", made.stdout.decode().strip())

        def parents():
            asked = subprocess.run([*run, "rev-parse", "HEAD^{tree}", "HEAD"], capture_output=True)
            tree, parent = asked.stdout.decode().split()
            return f"tree {tree}", f"parent {parent}"

        people = [f"{role} A <a@x> 1700000000 +0000" for role in ("author", "committer")]
        signature = ["gpgsig -----BEGIN PGP SIGNATURE-----", " ", " -----END PGP SIGNATURE-----"]
        write(*parents(), *people, *signature)
        assert read(repository) == {"whole": BODY, "odd": BODY}
        assert all(int(c.item["id"], 16) for c in module.read_commits(repository, 15))
        write(*parents(), *(line.replace("1700000000", "soon") for line in people))
        commit(repository, "after it")
        assert read(repository).keys() == {"whole", "odd", "after it"}

    @pytest.mark.parametrize(("flags", "said"), [
        (["--least", "50"], "no author has 50 commits.*lower --least"),
        (["--words", "500"], "500 words; 0 is most"),
        (["--least", "3", "--share", "1e-9"], "dev has none of the 4 records.*--split time"),
    ])  # fmt: skip
    def test_nothing_qualifies(self, repository, tmp_path, flags, said):
        for n in range(6):
            commit(repository, f"number {n}", f"{BODY} {n}", day=1 + n)
        o = module.parse_arguments([str(repository), "--out", str(tmp_path / "data"), *flags])
        with pytest.raises(ValueError, match=said):
            module.main(o)
        assert not (tmp_path / "data").exists()

    def test_what_is_no_whole_repository(self, repository, tmp_path, monkeypatch):
        for n in range(3):
            commit(repository, f"number {n}")
        shallow, plain, empty = (tmp_path / name for name in ("shallow", "plain", "empty"))
        git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", str(shallow))
        plain.mkdir()
        git(tmp_path, "init", "-q", str(empty))
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        monkeypatch.setenv("LC_ALL", "C")
        for folder, said in {
            shallow: "git fetch --unshallow", plain: "not a git repository",
            empty: "does not have any commits", tmp_path / "none": "no such directory",
        }.items():  # fmt: skip
            with pytest.raises(ValueError, match=f"{folder}.*{said}"):
                module.read_commits(folder, 15)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ValueError, match="no git on this machine"):
            module.read_commits(repository, 15)

    def test_mistakes_are_one_line(self, tmp_path):
        run = [sys.executable, str(ROOT / "toy/commits.py")]
        flags = [["--least", "1"], ["--share", "1"], ["--split", "random"], ["--words", "x"]]
        for arguments in ([], *[[str(tmp_path), *flag] for flag in flags]):
            with pytest.raises(SystemExit) as error:
                module.parse_arguments(arguments)
            assert error.value.code == 2
        done = subprocess.run([*run, str(tmp_path / "none")], capture_output=True, text=True)
        assert (
            done.returncode == 2 and done.stderr == f"error: {tmp_path}/none: no such directory\n"
        )
