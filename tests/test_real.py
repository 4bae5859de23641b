"""The experiment on real text: its commands, run on a tiny world, and its tables."""

import os
import re
import runpy
import signal
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import judges
import numpy as np
import pytest
import real
from conftest import write_lamp, write_policy

import eval as scoring
import prlm
import retrieve
import reward
import rl
from toy import common

SMALL = "--max-new-tokens 12 --held-out 3 --prompts-per-step 1 --group-size 2 --k 2"


@pytest.fixture
def jobs(monkeypatch):
    """Jobs run in this process, one after the other; returns their commands and exit statuses."""
    done = SimpleNamespace(commands=[], statuses={})

    def start(words, log):
        done.commands.append(words)
        status = next((s for part, s in done.statuses.items() if part in " ".join(words)), 0)
        if status == 0:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], {}, "__main__")
        return SimpleNamespace(wait=lambda: status, terminate=lambda: None)

    pool = SimpleNamespace(submit=lambda *work: SimpleNamespace(result=partial(*work)))
    monkeypatch.setattr(common, "start", start)
    monkeypatch.setattr(common, "ThreadPoolExecutor", lambda _: nullcontext(pool))
    return done


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    answers = [f"{{'subject': '{text}'}}" for text in ("tennis wins", "golf", "oslo today")]
    write_policy(folder / "policy", answers=answers)
    for split in ("train", "dev"):
        write_lamp(folder / "lamp" / "commits", "commits", users=4, split=split)
    given = {"model": folder / "policy", "data": folder / "lamp", "out": folder / "out"}
    small = {"arms": "none,rule", "seeds": 2, "warm": 1, "steps": 1, "more": SMALL, "jobs": 1}
    return real.Options(**{name: str(path) for name, path in given.items()}, **small)


def test_the_whole_programme_in_miniature(options, jobs, capsys):
    """Each arm starts from its own seed's warm start, is scored on its sides, and done once."""
    real.main(options)
    trained = [words for words in jobs.commands if words[1] != "eval.py"]
    assert len(trained) == 8 and len(jobs.commands) == 2 * (2 + 3 + 2 + 3)
    for words in trained:
        said = prlm.parse_flags(rl.Options, "", words[2:])
        arm, _, seed = Path(said["out"]).name.partition("_seed")
        start = {"none": "warm_none", "rule": "warm"}.get(arm)
        warm = start and str(real.place(options, start, seed) / "checkpoint")
        assert said["model"] == (warm or options.model) and ("warm_start" in said) == (not warm)
        assert said["seed"] == int(seed) and (said["k"] == 0) == ("none" in arm)
        assert words[1] == ("toy/rule.py" if arm == "rule" else "rl.py")
        assert len(prlm.read_lines(Path(said["out"]) / "held_out/after.jsonl")) == 3
    run = real.place(options, "rule", 0)
    assert prlm.read_json(run / "without_160/config.json")["k"] == 0
    rows = prlm.read_lines(run / "samples.jsonl")
    assert {row["personalization"] for row in rows} <= {0, 0.5, 1}  # two items are shown
    assert not [*Path(options.out).rglob("trainer.pt")]
    text = (Path(options.out) / "commits" / "report.md").read_text()
    counts = [text.count(f"| {real.ARMS[arm][0]} |") for arm in ("rule", "none", "warm")]
    assert counts == [27, 13, 17] and "](shares.png)" in text
    real.main(options)
    assert len(jobs.commands) == 20
    with pytest.raises(ValueError, match=r"was made with lr 6e-05, not 0\.001"):
        real.main(replace(options, more=f"{SMALL} --lr 1e-3"))


def test_each_side_is_the_mean_of_its_authors(options, jobs, monkeypatch, read=prlm.read_lines):
    real.main(options)
    ends = {"own_160": [1, 1, 1, 0], "without_160": [0, 1, 1, 1]}
    monkeypatch.setattr(prlm, "read_lines", lambda path: [
        row | {"finished": end} for row, end in zip(read(path), ends[path.parent.name])
    ])  # fmt: skip
    found = real.collect(options, retrieve.load_examples(options, "dev"))
    found = found[real.ARMS["rule"][0]]["rouge-1"]
    for side in real.SIDES:
        records = read(real.place(options, "rule", 1) / f"{side}_160" / "samples.jsonl")
        assert found[side].shape == (2, 4)  # an author has one record here
        assert found[side][1].mean() == pytest.approx(np.mean([r["rouge-1"] for r in records]))
    assert np.isnan(found[real.ENDED]).tolist() == [[True, False, False, True]] * 2
    assert (found[real.ENDED] == found[real.SHARE])[:, 1:3].all()


def test_what_is_compared(options, monkeypatch):
    sides, found = ("own", real.SHARE, real.ENDED), {}
    for arm, row in {"warm": (0.5, 0.1, 0), "none": (0.3,), "accuracy": (0.9, 0.3, 0)}.items():
        values = dict(zip(sides, np.array([[row]]).T))
        found[real.ARMS[arm][0]] = dict.fromkeys(real.METRICS, values)
    monkeypatch.setattr(real, "collect", lambda *_: found)
    monkeypatch.setattr(real, "shares_picture", lambda *_: "")
    tables = dict(text.split("\n", 1) for text in real.report(options, []).split("\n## "))
    table = tables["form: the profile's share, minus that of *GRPO, accuracy alone*"]
    assert "| warm start, with the profile | -0.200 |" in table and "| GRPO, accuracy" not in table
    table = tables["rouge-1: score, minus that of *GRPO, trained without profiles*"]
    assert "with the profile | +0.200 |" in table and "alone | +0.600 |" in table


def test_authors_without_a_prefix_do_not_count_for_it(options):
    first, *rest = retrieve.load_examples(options, "dev")
    examples = [replace(first, target="http: Golf"), *(replace(e, target="golf") for e in rest)]
    examples.append(replace(first, id="x", target="BUG: golf"))  # the same author
    values = real.measure(options, examples, ["http: golf"] * 5)
    prefix, kind = (real.by_author(examples, values[name]) for name in ("prefix", "kind"))
    assert np.nanmean(prefix) == 0.5 and np.isnan(prefix).sum() == 3
    assert sorted(kind) == [0, 0, 0, 0.5]


def test_what_fails_is_named_and_the_rest_goes_on(options, jobs, tmp_path):
    jobs.statuses = {"warm_seed0 ": 2}
    o = replace(options, out=str(tmp_path), arms="accuracy")
    with pytest.raises(ValueError, match=r"commits warm seed 0: rl\.py ended with status 2, see"):
        real.main(o)
    assert (real.place(o, "warm", 1) / "predictions.json").is_file()
    with pytest.raises(ValueError, match=r"--arms knows warm_none, .*, not x"):
        real.main(replace(o, arms="accuracy,x"))


def test_other_tasks_and_judges():
    o = real.Options(model="my model", task="LaMP-7", more="--k 5", data="d")
    assert "bert" in real.arms_of(replace(o, reward_model="r")) and "bert" not in real.arms_of(o)
    assert real.arms_of(replace(o, arms="none,rule")) == ["warm_none", "warm", "none", "rule"]
    command = " ".join(real.chain(o, "no_gold", 0)[0][0])
    for option in ("--accuracy 0.0", "--beta 0.3", "--judge ratio", "--k 5", "--task LaMP-7"):
        assert option in command
    commands = real.chain(replace(o, more="--reasoning"), "warm", 0)
    assert "--reasoning" in commands[0][0] and "--no-reasoning" in commands[2][0]


def test_which_way_a_reward_would_push(options, tmp_path, monkeypatch):
    """Equal favourites count equally; the rule reads the k items shown, and no target."""
    targets, said = ("http: golf", "Golf."), ["http: golf", "golf", "", "golf", "Golf.", "Oslo."]
    shown = [{"body": "b", "subject": s} for s in ("http: a", "url: b", "C.", "D.", "E.", "f")]
    profiles = shown[:3], shown[3:]
    held = [retrieve.Example(t, t, "commits", "q", p, t) for t, p in zip(targets, profiles)]

    def answer(*given, make_records=scoring.make_records):
        assert given[-2:] == (3, 0.7)
        texts = ({"answer": text, "completion": f"'subject': '{text}'"} for text in said)
        return [record | text for record, text in zip(make_records(*given), texts, strict=True)]

    def make_judge(o, *_):
        return lambda _, answers: [5 * (o.judge == "bert") * (text == "golf") for text in answers]

    monkeypatch.setattr(retrieve, "load_examples", lambda o, split: held[: 2 * (split == "dev")])
    monkeypatch.setattr(scoring, "make_records", answer)
    monkeypatch.setattr(reward, "make_judge", make_judge)
    given = {"model": options.model, "task": "commits", "preset": "small", "samples": 3, "k": 2}
    given |= {"encoder": str(prlm.SHIPPED / "encoder"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="leaves no profile"):
        judges.main(prlm.resolve(judges.Options, given | {"k": 0}))
    judges.main(prlm.resolve(judges.Options, given | {"max_new_tokens": 12}))
    lines = (tmp_path / "out/table.md").read_text().splitlines()[2:]
    assert [re.sub(r" \(.*?\)", "", line).strip("| ") for line in lines] == [
        "the mean of a group |  | 0.611 | 0.500 | 0.667 | 0.333",
        "accuracy | 1.329 | +0.389 | +0.250 | +0.333 | +0.667",
        "bert | 2.887 | +0.222 | -0.500 | -0.167 | -0.333",
        "accuracy + bert | 3.387 | +0.222 | -0.500 | -0.167 | -0.333",
        "ratio | 0.000 | +0.000 | +0.000 | +0.000 | +0.000",
        "accuracy + ratio | 1.329 | +0.389 | +0.250 | +0.333 | +0.667",
        "manner | 0.577 | +0.139 | +0.500 | +0.333 | +0.667",
        "accuracy + manner | 1.518 | +0.389 | +0.500 | +0.333 | +0.667",
    ]


def test_sigterm_ends_the_commands_and_starts_no_more(monkeypatch, tmp_path):
    begun, ended, end = [], [], threading.Event()

    def hang(words, log):
        begun.append(words)
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        return SimpleNamespace(
            terminate=lambda: ended.append(words) or end.set(), wait=lambda: end.wait(20) and 143
        )

    monkeypatch.setattr(common, "start", hang)
    work = {name: [(["python", name], tmp_path / name)] for name in ("a", "b")}
    with pytest.raises(ValueError, match="stopped; the same command goes on"):
        common.run_jobs(work, 1, tmp_path)
    assert begun == ended == [["python", "a"]]


def test_jobs_are_processes_with_a_log(tmp_path):
    text = "import os, sys; print(sys.argv[1], os.environ['OMP_NUM_THREADS'])"
    (tmp_path / "x.py").write_text(text)
    words = common.command(str(tmp_path / "x.py"), {"a_b": True, "c": None, "d": False})
    assert words[2:] == ["--a-b", "--no-d"]
    with pytest.raises(ValueError, match=r"j: .*ended with status 0"):  # but left no file
        common.run_jobs({"j": [(words, tmp_path / "none")]}, 1, tmp_path / "log")
    assert (tmp_path / "log" / "j.txt").read_text() == "--a-b 1\n"
