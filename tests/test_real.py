"""The experiment on real text: its commands, run on a tiny world, and its tables."""

import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import real
from conftest import write_lamp, write_policy

import prlm
import retrieve

SMALL = (
    "--max-new-tokens 12 --max-prompt-tokens 400 --prompts-per-step 1 --group-size 2 --force "
    "--steps 1 --k 2"
)


@pytest.fixture
def o(tmp_path, monkeypatch):
    """Options for one tiny task and three arms, whose commands run in this process."""
    write_policy(tmp_path / "policy")
    for split in ("train", "dev"):
        write_lamp(tmp_path / "lamp" / "LaMP_4", split=split)
    commands = []

    def run(words, **_):
        commands.append(words[1:])
        chapter = __import__(Path(words[1]).stem)
        chapter.main(prlm.parse_options(chapter.Options, "", words[2:])[0])
        return SimpleNamespace(returncode=0, wait=lambda: None)

    pool = SimpleNamespace(map=map)  # in this thread, since a run sets signal handlers
    monkeypatch.setattr(real, "ThreadPoolExecutor", lambda jobs: nullcontext(pool))
    monkeypatch.setattr(real.subprocess, "Popen", run)
    arms = {
        "warm": ("warm start", None, SMALL.replace("--steps 1", "--steps 0") + " --warm-start 1"),
        "prlm": ("warm start + GRPO", "warm", SMALL),
        "closed": ("the same, closed", "warm", SMALL + " --no-reasoning"),
    }
    monkeypatch.setattr(real, "ARMS", arms)
    monkeypatch.setattr(real, "MAIN_TASK", "LaMP-4")
    names = dict(model=str(tmp_path / "policy"), data=str(tmp_path / "lamp"))
    o = real.Options(**names, out=str(tmp_path / "out"), users=4, records=5, seeds=2, jobs=1)
    o.arms = ",".join(arms)
    o.items = "0,2"
    o.commands = commands
    return o


def test_every_command_runs_once_and_the_report_has_all_rows(o, capsys):
    real.main(o)
    assert sum("rl.py" in words[0] for words in o.commands) == 4  # warm, prlm twice, closed
    warm = str(real.place(o, "LaMP-4", "warm") / "checkpoint")
    starts = [words[words.index("--model") + 1] for words in o.commands if "rl.py" in words[0]]
    assert starts == [o.model, warm, warm, warm]
    text = (Path(o.out) / "report.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if " | " in line]
    names = ["copying the query", "copying the nearest item", "released, no profile"]
    names += ["released, RAG", "warm start, no profile", "warm start, RAG", "warm start + GRPO"]
    assert [row for row in rows if row in names] == names
    assert "before GRPO" in rows and "after GRPO" in rows and "ratio, released" in rows

    count = len(o.commands)
    real.main(replace(o))
    assert len(o.commands) == count  # all was there


def test_scores_are_of_the_users_and_the_prompts_they_name(o):
    real.main(replace(o, seeds=1))
    cell = real.Cell("LaMP-4", "closed")
    config = prlm.read_json(cell.folder(o) / "config.json")
    assert config["reasoning"] is False and config["k"] == 3 and config["limit"] == 4
    assert len(real.scores_of(o, cell)) == 4
    scores = real.copied(o, "LaMP-4")["copying the query"]
    table = real.table(o, "LaMP-4", {"ours": [scores], "theirs": [scores]}, "ours")
    mean = sum(row["rouge-1"] for row in scores) / 4
    assert f"| theirs | 1 | {mean:.3f} |" in table and "+0.000 (+0.000 … +0.000) | 1.0000" in table


def test_what_fails_is_named_and_the_rest_is_not_started(o, monkeypatch):
    calls = []

    def fail(words, **_):
        calls.append(words)
        return SimpleNamespace(returncode=2, wait=lambda: None)

    alone = {name: (text, None, options) for name, (text, _, options) in real.ARMS.items()}
    monkeypatch.setattr(real, "ARMS", alone)
    monkeypatch.setattr(real.subprocess, "Popen", fail)
    with pytest.raises(ValueError, match=r"LaMP-4 warm 0 ended with status 2: see .*warm_0\.txt"):
        real.main(o)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="has the files of none of the tasks LaMP-5"):
        real.main(replace(o, tasks="LaMP-5"))
    with pytest.raises(ValueError, match="task 'LaMP-9' is none of"):
        real.main(replace(o, tasks="LaMP-9"))
    with pytest.raises(ValueError, match="needs warm and prlm, and knows warm, prlm, closed"):
        real.main(replace(o, arms="warm,ratio"))
    with pytest.raises(ValueError, match="holds results of other options"):
        real.main(replace(o, users=3))
    with pytest.raises(ValueError, match="--items '0,x' is not a list of numbers"):
        real.main(replace(o, items="0,x"))


def test_sigterm_ends_the_trainings_too(o, monkeypatch):
    ended = []

    def hang(words, **_):
        process = SimpleNamespace(returncode=143, terminate=lambda: ended.append(words))
        process.wait = lambda: signal.raise_signal(signal.SIGTERM)  # while the training runs
        return process

    monkeypatch.setattr(real.subprocess, "Popen", hang)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="stopped; the same command resumes"):
            real.main(o)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(ended) == 1


def test_other_tasks_get_two_arms_and_a_shorter_warm_start(monkeypatch):
    o = real.Options(model="my model", data="d", out="o")
    words = shlex.split(real.training(o, "LaMP-5", "warm", 0))
    assert words[words.index("--warm-start") + 1] == "75" and "my model" in words
    assert "--warm-start 125" in real.training(o, "LaMP-7", "warm", 0)
    assert real.arms_of(o, "LaMP-5") == real.EVERY_TASK
    assert "bert" not in real.arms_of(o, "LaMP-7")  # it needs an encoder
    assert "bert" in real.arms_of(replace(o, encoder="e"), "LaMP-7")


def test_its_help_is_there():
    command = [sys.executable, str(Path(real.__file__)), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--users" in done.stdout


def test_our_own_tweets_are_lamps():
    examples = retrieve.load_lamp(Path(real.__file__).parent / "tweets", "LaMP-7", "dev")
    assert len(examples) == 8 and all(len(e.profile) == 8 and e.target for e in examples)
