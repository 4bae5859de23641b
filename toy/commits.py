"""Your own words: any git repository as a data set in LaMP's format, task "commits".

Every author is a user. The body of a commit message is the query, its subject line is what this
user really wrote; the profile holds the same author's earlier commits, with their dates.

    python toy/commits.py REPO --out runs/commits
    python retrieve.py --data runs/commits --task commits
    python rl.py --model DIR --data runs/commits --task commits --out runs/mine

Authors are hashed, but the texts are theirs: ask before you share them.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import retrieve

TASK = "commits"
LOG = ("-z", "--encoding=UTF-8", "--no-show-signature")  # whatever the user has configured
FIELDS = ("%H", "%aE", "%at", "%as", "%s", "%b", "%(trailers)")


@dataclass(frozen=True)
class Commit:
    author: str  # a hash of the address, .mailmap applied
    time: int  # seconds since 1970, when it was written
    item: dict  # {"id", "body", "subject", "date"}, as a profile holds it


def run_git(repository: Path, *arguments: str) -> str:
    """What git prints; ValueError with git's own words where it fails."""
    command = ["git", "-C", str(repository), *arguments]
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR")  # would lead to another repository
    own = {name: value for name, value in os.environ.items() if name not in elsewhere}
    try:
        done = subprocess.run(command, capture_output=True, env=own)
    except FileNotFoundError:
        raise ValueError("there is no git on this machine: install it first") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise ValueError(f"{repository}: {said.splitlines()[0] if said else 'git failed'}")
    return done.stdout.decode(errors="replace")


def read_commits(repository: Path, least_words: int) -> list[Commit]:
    """The commits with something to learn from: no merges, bodies of at least so many words.

    Trailers (Signed-off-by and the like) are no part of a body. A message that an author repeats,
    as on another branch, counts once: otherwise a profile would hold its query's target.
    """
    if not repository.is_dir():
        raise ValueError(f"{repository}: no such directory")
    if run_git(repository, "rev-parse", "--show-prefix").strip():
        top = run_git(repository, "rev-parse", "--show-toplevel").strip()
        raise ValueError(f"{repository} is no repository of its own, it lies in that of {top}")
    if run_git(repository, "rev-parse", "--is-shallow-repository").strip() == "true":
        advice = "run `git fetch --unshallow` in it first"
        raise ValueError(
            f"{repository} is a shallow clone, most of its commits are missing: {advice}"
        )
    layout = "%x00".join(FIELDS)
    text = run_git(repository, "log", "--no-merges", *LOG, f"--format={layout}")
    values = text.split("\0")
    commits = {}
    for start in range(0, len(values) - len(FIELDS) + 1, len(FIELDS)):
        id, address, time, date, subject, body, trailers = values[start : start + len(FIELDS)]
        body = body.strip().removesuffix(trailers.strip())
        body = re.sub(r"(?im)^[a-z-]+-by:.*$", "", body)  # those that git takes for text
        body, subject = (" ".join(part.split()) for part in (body, subject))  # each one line
        if subject and len(body.split()) >= least_words and time.isdigit():  # a date can be broken
            author = hashlib.sha256(address.lower().encode()).hexdigest()[:12]
            item = {"id": id[:12], "body": body, "subject": subject, "date": date}
            commits[author, body, subject] = Commit(author, int(time), item)  # the oldest stays
    return list(commits.values())


def make_records(commits: list[Commit], least: int, queries: int, profile: int) -> list[dict]:
    """LaMP's questions with "output" and "time" beside, of authors with `least` commits or more.

    An author's newest commits are queries, at most `queries` of them, each with `least` - 1 earlier
    ones or more; the newest `profile` of these are its profile, oldest first. Every author's newest
    record comes first, then everybody's second newest: the first N records are of many authors.
    """
    authors = defaultdict(list)
    for commit in sorted(commits, key=lambda commit: (commit.time, commit.item["id"])):
        authors[commit.author].append(commit)
    rounds = [[] for _ in range(queries)]  # [0]: the newest of each author
    for author, written in authors.items():
        for n in range(max(least - 1, len(written) - queries), len(written)):
            item = written[n].item
            rounds[len(written) - 1 - n].append(
                {
                    "id": item["id"],
                    "user_id": author,
                    "input": retrieve.TASKS[TASK].prefix + item["body"],
                    "profile": [earlier.item for earlier in written[max(0, n - profile) : n]],
                    "output": item["subject"],
                    "time": written[n].time,
                }
            )
    return [record for records in rounds for record in records]


def split_records(records: list[dict], by: str, share: float) -> dict[str, list[dict]]:
    """{"train", "dev"}: a share of the users is held out, by their hash, or of time, the newest."""
    if by == "time":
        records = sorted(records, key=lambda record: (record["time"], record["id"]))
        count = round(len(records) * (1 - share))
        return {"train": records[:count], "dev": records[count:]}
    parts = {"train": [], "dev": []}
    for record in records:
        held_out = int(record["user_id"], 16) / 16**12 < share  # the same users, whoever is new
        parts["dev" if held_out else "train"].append(record)
    return parts


def write_split(directory: Path, split: str, records: list[dict]) -> None:
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    golds = [{"id": record["id"], "output": record["output"]} for record in records]
    keys = ("id", "user_id", "input", "profile")
    questions = [{key: record[key] for key in keys} for record in records]
    prlm.write_json(folder / f"{split}_questions.json", questions)
    prlm.write_json(folder / f"{split}_outputs.json", {"task": TASK, "golds": golds})


# ---- The command ----------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.error = lambda text: parser.exit(2, f"error: {text} (--help lists the options)\n")
    parser.add_argument(
        "repository", metavar="REPO", type=Path, help="a git repository, bare or not"
    )
    for name, default, help in (
        ("out", "runs/commits", "directory that gets train/ and dev/"),
        ("least", 10, "commits that an author needs; each query has one less before it, or more"),
        ("words", 15, "words that a body needs"),
        ("queries", 20, "records of one author, so that the busiest do not outweigh the others"),
        ("profile", 20, "earlier commits in a record"),
        ("share", 0.2, "share of the users, or of the records by time, that is held out"),
    ):
        text = f"{help} (default: {default})"
        parser.add_argument(f"--{name}", default=default, type=type(default), help=text)
    help = "hold out users, or for all users what they wrote last (default: user)"
    parser.add_argument("--split", choices=("user", "time"), default="user", help=help)
    o = parser.parse_args(arguments)
    for name, least in {"least": 2, "words": 1, "queries": 1, "profile": 1}.items():
        if getattr(o, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not 0 < o.share < 1:
        parser.error("--share must be between 0 and 1")
    return o


def main(o: argparse.Namespace) -> None:
    commits = read_commits(o.repository, o.words)
    records = make_records(commits, o.least, o.queries, o.profile)
    if not records:
        most = max(Counter(commit.author for commit in commits).values(), default=0)
        found = f"no author has {o.least} commits whose bodies have {o.words} words; {most} is most"
        raise ValueError(f"{o.repository}: {found}: lower --least or --words")
    parts = split_records(records, o.split, o.share)
    for split, chosen in parts.items():
        if not chosen:
            found = f"{split} has none of the {len(records)} records"
            raise ValueError(f"{o.repository}: {found}: take --split time, or change --share")
        outputs = Path(o.out) / split / f"{split}_outputs.json"
        task = prlm.read_json(outputs).get("task") if outputs.is_file() else TASK
        if task != TASK:
            raise ValueError(f"{outputs} holds {task}: choose another --out")
    for split, chosen in parts.items():
        write_split(Path(o.out), split, chosen)
    for split, chosen in parts.items():
        authors = len({record["user_id"] for record in chosen})
        print(f"{Path(o.out) / split}: {len(chosen)} records of {authors} authors")
    print(f"look at one: python retrieve.py --data {o.out} --task {TASK}")


if __name__ == "__main__":
    if sys.stdout:  # a scheduler may have started it without
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have any name
    options = parse_arguments()
    try:
        main(options)
    except (ValueError, OSError) as error:
        print(prlm.in_one_line(error), file=sys.stderr)
        sys.exit(2)
