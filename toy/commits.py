"""Your own words: git repositories as a data set in LaMP's format, task "commits".

Every author of a repository is a user. The body of a commit message is the query, its subject line
is what this user really wrote; the profile holds the same author's earlier commits, with dates.
Ticket numbers are taken out of subjects: nobody could know them, and a model invents them.

    python toy/commits.py REPO [REPO ...] --out runs/commits
    python retrieve.py --data runs/commits --task commits
    python rl.py --model DIR --data runs/commits --task commits --out runs/mine

Authors are hashed, but the texts are theirs: ask before you share them."""

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import retrieve

TASK = "commits"
LOG = ("-z", "--encoding=UTF-8", "--no-show-signature")  # whatever the user has configured
FIELDS = ("%H", "%aN", "%aE", "%at", "%as", "%s", "%b", "%(trailers)")
NOT_WRITTEN = re.compile(r"(?i)(revert|reapply)\b|merged? ")
ADDRESS = re.compile(r"<?(?<![\w.+-])[\w.+-]+@[\w-]+(\.[\w-]+)+>?")
TICKET = (
    r"(?:\b(?:fix(?:e[sd])?|close[sd]?|resolve[sd]?|this|see|refs?|for|and)\b[:\s]*)*"
    r"(?:[\w./-]*#|\b(?:issue|bug|ticket|pr|gh)s?[\s_#-]*)\d+\b"
)
TICKETS = rf"{TICKET}(?:[\s,&]*{TICKET})*"
PREFIX = r"([A-Z]{2,}(?:, ?[A-Z]{2,})+|[^\s:()]{1,30}(?:\([^():]{0,30}\))?!?):\s+"
TYPE = r"(build|chore|ci|docs|feat|fix|perf|refactor|style|test)(\(.+\))?!?"
KINDS = {"none": "", "tag": "[A-Z][A-Z0-9,/ ]+", "type": TYPE, "place": ".+"}


def manner(subject: str) -> tuple[str, bool, bool, str]:
    """How a subject line is written, which ROUGE does not see: (kind, capital, stop, prefix).
    The prefix is a word, perhaps with a scope in brackets, before a colon and a space, or "". Its
    kind: "none"; "tag", in capitals (BUG, "DOC, TST"); "type", of the Conventional Commits (fix,
    feat(core)!); or "place" (http, lib/url). The rest begins with a capital, ends with a stop."""
    found = re.match(PREFIX, subject.strip())
    prefix = found[1] if found else ""
    text = re.sub(f"^(?:{PREFIX})+", "", subject.strip())
    kind = next(kind for kind, form in KINDS.items() if re.fullmatch(form, prefix))
    return kind, text[:1].isupper(), text.endswith(".") and not text.endswith(".."), prefix


def same_manner(answer: str, target: str) -> dict[str, bool | None]:
    """Whether two subjects share the "form" (kind, capital and stop), the "kind", the "prefix",
    which is None where the target has none. An empty answer is like nothing."""
    a, b, said = manner(answer), manner(target), bool(answer.strip())
    prefix = said and a[3] == b[3] if b[3] else None
    return {"form": said and a[:3] == b[:3], "kind": said and a[0] == b[0], "prefix": prefix}


def run_git(repository: Path, *arguments: str) -> str:
    """What git prints; ValueError with git's own words where it fails."""
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR")  # would lead to another repository
    own = {name: value for name, value in os.environ.items() if name not in elsewhere}
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, env=own)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise ValueError(f"{repository}: {said.splitlines()[0] if said else 'git failed'}")
    return done.stdout.decode(errors="replace")


def without_tickets(subject: str) -> str:
    """A subject without "(#12)", "Fixed #12 -- ", "gh-12: ", "1234: " or ", closes #12";
    "" where that leaves no sentence ("Regression in #12"), or a number ("Before #12 it failed")."""
    text = re.sub(rf"(?i)\s*[(\[]{TICKETS}[)\]]", "", subject)
    mark = r"(?:[:.,–-]+(?:\s+|$)|(?-i:(?=[A-Z])))"  # "#12: text", "#12 -- text", "#12 Text"
    text = re.sub(rf"(?i)^(\S+: )?(?:{TICKETS}\s*{mark}|(?:fix\w* )?\d{{3,}}[a-z]?: )", r"\1", text)
    text = re.sub(rf"(?i)[\s,;:.–-]*{TICKETS}\.?$", "", text).strip()
    cut = text != subject and re.search(r"^\S*$|\b(a[st]|by|from|in|of|on|per|the|to|with)$", text)
    return "" if cut or re.search(f"(?i){TICKET}", text) else text


def read_commits(repository: Path, least_words: int) -> dict[str, list[dict]]:
    """{author: profile items, oldest first}; the author is a hash of the name, as in .mailmap.
    Left out are merges, reverts, what bots wrote, bodies of fewer words or with the subject in
    them, and subjects of more than 20 words. Trailers (Signed-off-by and the
    like) and e-mail addresses are no part of a body. An author's repeated subject counts once."""
    if run_git(repository, "rev-parse", "--show-prefix").strip():
        raise ValueError(f"{repository} is no repository of its own, it lies in another")
    if run_git(repository, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise ValueError(f"{repository} is a shallow clone: run `git fetch --unshallow` in it")
    text = run_git(repository, "log", "--no-merges", *LOG, "--format=" + "%x00".join(FIELDS))
    values, commits = iter(text.split("\0")), {}
    for id, name, address, time, date, subject, body, trailers in zip(*[values] * len(FIELDS)):
        body = body.strip().removesuffix(trailers.strip())
        body = re.sub(r"(?im)^[^\S\n]*[a-z-]+-by:.*$", "", body)  # those that git takes for text
        body, subject = (" ".join(ADDRESS.sub("", part).split()) for part in (body, subject))
        subject = without_tickets(subject)
        bot = re.search(r"(?i)\bbot\b|dependabot", f"{name} {address}")
        unfit = bot or NOT_WRITTEN.match(subject) or subject.lower() in body.lower()  # as "" is
        enough = len(body.split()) >= least_words and len(subject.split()) <= 20
        if enough and not unfit and time.isdigit():  # a date can be broken
            author = hashlib.sha256(name.casefold().encode()).hexdigest()[:12]
            item = {"id": id[:12], "body": body, "subject": subject, "date": date}
            commits[author, subject] = (int(time), id, author, item)  # the oldest stays
    authors = defaultdict(list)
    for _, _, author, item in sorted(commits.values(), key=lambda commit: commit[:2]):
        authors[author].append(item)
    return authors


def choose_users(found: dict[str, dict], most: int, seed: int) -> dict[str, dict]:
    """{repository: its users in an order drawn by lot}, at most `most`, in shares as equal as can
    be. Who writes in several is a user of the smallest alone: nobody is trained on and held out."""
    chosen, taken = {}, set()
    for name in sorted(found, key=lambda name: (len(found[name]), name)):
        drawn = sorted(found[name].keys() - taken)
        random.Random(f"{seed} {name}").shuffle(drawn)
        share = (most - len(taken)) // (len(found) - len(chosen))
        chosen[name] = {user: found[name][user] for user in drawn[:share]}
        taken |= chosen[name].keys()
    return chosen


def make_records(chosen: dict[str, dict], least: int, queries: int, profile: int) -> list[dict]:
    """LaMP's questions, with "output", "date" and "repository" beside.
    A user's newest commits are queries, at most `queries` of them, each with `least` - 1 earlier
    ones or more; the newest `profile` of these are its profile, oldest first. Every user's newest
    record comes first, then everybody's second newest: the first N records are of many users."""
    rounds = [[] for _ in range(queries)]  # [0]: the newest of each user
    rows = [(user, name, items) for name, users in chosen.items() for user, items in users.items()]
    for user, name, items in sorted(rows):  # by hash, which mixes the repositories
        for n in range(max(least - 1, len(items) - queries), len(items)):
            record = {"id": items[n]["id"], "user_id": user, "repository": name}
            record["input"] = retrieve.TASKS[TASK].prefix + items[n]["body"]
            record["profile"] = items[max(0, n - profile) : n]
            record |= {"output": items[n]["subject"], "date": items[n]["date"]}
            rounds[len(items) - 1 - n].append(record)
    return [record for records in rounds for record in records]


def split_records(records: list[dict], chosen: dict[str, dict], by: str, share: float) -> dict:
    """{"train", "dev"}: held out are a share of each repository's users, of two or more at least
    one and never all; or by "time" a share of all records, the newest."""
    held_out, key = set(), "id" if by == "time" else "user_id"
    if by == "time":
        ids = [id for _, id in sorted((record["date"], record["id"]) for record in records)]
        held_out.update(ids[round(len(ids) * (1 - share)) :])
    else:
        for users in chosen.values():
            count = min(max(round(len(users) * share), 1), len(users) - 1)
            held_out.update([*users][:count])
    parts = {"train": [], "dev": []}
    for record in records:
        parts["dev" if record[key] in held_out else "train"].append(record)
    for split, part in parts.items():
        if not part:
            advice = "take --split time, more authors or another --share"
            raise ValueError(f"{split} has none of the {len(records)} records: {advice}")
    return parts


def write_split(folder: Path, records: list[dict]) -> None:
    outputs = folder / f"{folder.name}_outputs.json"
    if outputs.is_file() and prlm.read_json(outputs).get("task") != TASK:
        raise ValueError(f"{outputs} holds another task: choose another --out")
    asked = ("id", "user_id", "repository", "input", "profile")
    questions = [{key: record[key] for key in asked} for record in records]
    golds = [{key: record[key] for key in ("id", "output")} for record in records]
    prlm.write_json(folder / f"{folder.name}_questions.json", questions)
    prlm.write_json(outputs, {"task": TASK, "golds": golds})
    users = Counter({r["user_id"]: r["repository"] for r in records}.values())
    print(f"{folder}: {len(records)} records of {users.total()} authors", dict(users))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=layout)
    parser.add_argument("repositories", metavar="REPO", nargs="+", type=Path)
    for name, default, help in (
        ("out", "runs/commits", "directory that gets train/ and dev/"),
        ("least", 10, "commits that an author needs; each query has one less before it, or more"),
        ("words", 15, "words that a body needs"),
        ("authors", 500, "users in all, in equal shares of the repositories"),
        ("queries", 20, "records of one author, so that the busiest do not outweigh the others"),
        ("profile", 20, "earlier commits in a record"),
        ("share", 0.2, "share of the users, or of the records by time, that is held out"),
        ("seed", 0, "draws the users and who is held out"),
    ):
        parser.add_argument(f"--{name}", default=default, type=type(default), help=help)
    help = "hold out users, or for all users what they wrote last"
    parser.add_argument("--split", choices=("user", "time"), default="user", help=help)
    o = parser.parse_args(arguments)
    if min(o.least, o.words, o.authors, o.queries, o.profile) < 1 or not 0 < o.share < 1:
        parser.error("numbers must be at least 1, and --share between 0 and 1")
    return o


def main(o: argparse.Namespace) -> None:
    found = {}
    for repository in o.repositories:
        name = Path(os.path.abspath(repository)).name.removesuffix(".git")
        if name in found:
            raise ValueError(f"two repositories are called {name}: name their folders apart")
        authors = read_commits(repository, o.words)
        found[name] = {user: items for user, items in authors.items() if len(items) >= o.least}
    chosen = choose_users(found, o.authors, o.seed)
    records = make_records(chosen, o.least, o.queries, o.profile)
    if not records:
        what = f"no author has {o.least} commits whose bodies have {o.words} words"
        raise ValueError(f"{what}: lower --least or --words")
    for split, part in split_records(records, chosen, o.split, o.share).items():
        write_split(Path(o.out, split), part)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
