"""The method on a released model and on what people wrote: hours on two cores, no GPU.

Every training is a run of rl.py and every score one of eval.py. Their commands are printed, so that
each can be pasted, stopped and resumed. Results that are there already are kept, even if the code
has changed since. The tables go to report.md in --out.

    python tests/smollm2.py models/smollm2
    python toy/commits.py REPO --out data/commits          # any git repository
    python toy/real.py --model models/smollm2 --data data

A task is taken if --data has its files, as load_lamp finds them.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
from toy.experiments import bootstrap, markdown, pictures

# ---- The trainings: (their name in the tables, the training they start from, options of rl.py) --
#
# Each is a run of its own, so GRPO meets records that the warm start has seen; in one run, with
# --warm-start, it would read on after them. Its steps, 24 of 4 prompts x 8 completions, and its
# learning rate are those of --preset small.

NO_GOLD = "--accuracy 0 --personalization 1 --judge ratio --beta 0.3"
ARMS = {
    "warm": ("warm start", None, "--warm-start 125 --steps 0"),
    "prlm": ("warm start + GRPO", "warm", ""),
    "no_reasoning": ("… without reasoning", "warm", "--no-reasoning"),
    # As many steps as fit in the time of GRPO's 24.
    "supervised": ("warm start + more of it", "warm", "--warm-start 100 --steps 0"),
    "cold": ("GRPO without a warm start", None, "--force"),  # whatever the first look sees
    "ratio": ("… with the ratio judge", "warm", "--personalization 0.1 --judge ratio"),
    "bert": ("… with the paper's judge", "warm", "--personalization 0.1 --judge bert"),
    "no_gold": ("… ratio, KL, no gold texts", "warm", NO_GOLD),
}
EVERY_TASK = ["warm", "prlm"]
SEEDED = ["prlm"]  # trained --seeds times, from the same warm start
PROFILES = {"no profile": 0, "RAG": 3}  # k, which is 3 in training
MAIN_TASK = "LaMP-7"  # the only task of all other arms


@dataclass
class Options:
    bounds = {0: "records", 1: "users seeds jobs"}  # noqa: RUF012
    model: str = "models/smollm2"  # checkpoint directory of the released model
    encoder: str = ""  # BERT checkpoint of the paper's judge; without one that arm is left out
    data: str = "data"  # directory with LaMP's files
    tasks: str = ",".join(retrieve.TASKS)  # those of them that --data has are taken
    arms: str = ",".join(ARMS)  # which of the trainings above
    items: str = "0,1,2,4,8"  # numbers of items with which warm start and GRPO are scored
    users: int = 200  # held-out records to score
    records: int = 500  # training records; 0 takes all
    seeds: int = 3  # trainings of the main arm
    jobs: int = 2  # processes at a time, each with one thread
    out: str = "runs/real"  # what is there already is not computed again


@dataclass(frozen=True)
class Cell:
    """One evaluation: the policy of an arm ("released" is the model itself), and its prompts."""

    task: str
    arm: str
    seed: int = 0
    k: int = PROFILES["RAG"]

    def folder(self, o: Options) -> Path:
        return Path(o.out) / self.task / "scores" / f"{self.arm}_seed{self.seed}_k{self.k}"


def tasks_of(o: Options) -> list[str]:
    """Those of --tasks of which --data has both splits; ValueError for an unknown one."""
    found = []
    for task in o.tasks.split(","):
        retrieve.task_of(task)
        with contextlib.suppress(FileNotFoundError):
            retrieve.lamp_files(o.data, task, "train", "dev")
            found.append(task)
    return found


def arms_of(o: Options, task: str) -> list[str]:
    wanted = o.arms.split(",") if task == MAIN_TASK else EVERY_TASK
    return [arm for arm in ARMS if arm in wanted and (arm != "bert" or o.encoder)]


def seeds_of(o: Options, task: str, arm: str) -> range:
    return range(o.seeds if arm in SEEDED and task == MAIN_TASK else 1)


# ---- Commands -------------------------------------------------------------------------------


def place(o: Options, task: str, arm: str, seed: int = 0) -> Path:
    return Path(o.out) / task / f"{arm}_seed{seed}"


def policy_of(o: Options, task: str, arm: str | None, seed: int = 0) -> str:
    return str(place(o, task, arm, seed) / "checkpoint") if arm else o.model


def common(o: Options, task: str) -> str:
    return f"--preset small --data {shlex.quote(o.data)} --task {task} --device cpu"


def training(o: Options, task: str, arm: str, seed: int) -> str:
    """The command; its own table is of 8 users, since eval.py scores them all afterwards."""
    _, start, options = ARMS[arm]
    if task != MAIN_TASK:
        options = options.replace("--warm-start 125", "--warm-start 75")  # to save time
    if arm == "bert":  # one pair per query: even so, sampling them takes as long as GRPO
        options += f" --pairs-per-query 1 --encoder {shlex.quote(o.encoder)}"
    return (
        f"rl.py --model {shlex.quote(policy_of(o, task, start))} {common(o, task)} {options} "
        f"--seed {seed} --train-examples {o.records} --eval-every 0 --eval-examples 8 "
        f"--out {shlex.quote(str(place(o, task, arm, seed)))}"
    )


def evaluation(o: Options, cell: Cell) -> str:
    arm = None if cell.arm == "released" else cell.arm
    reasoning = " --no-reasoning" if arm and "--no-reasoning" in ARMS[arm][2] else ""
    return (
        f"eval.py --model {shlex.quote(policy_of(o, cell.task, arm, cell.seed))} "
        f"{common(o, cell.task)} --k {cell.k}{reasoning} --limit {o.users} --batch-size 16 "
        f"--out {shlex.quote(str(cell.folder(o)))}"
    )


def examination(o: Options, arm: str | None) -> tuple[str, Path]:
    """The command that examines the ratio under a policy, and the report that it leaves."""
    folder = Path(o.out) / MAIN_TASK / f"judge_{arm or 'released'}"
    command = (
        f"reward.py --model {shlex.quote(policy_of(o, MAIN_TASK, arm))} {common(o, MAIN_TASK)} "
        f"--judge ratio --probe-examples {o.users} --out {shlex.quote(str(folder))}"
    )
    return command, folder / "report.json"


def run_all(o: Options, work: dict[str, tuple[str, Path]], title: str) -> None:
    """Runs {name: (command, the file that shows it is done)}, --jobs at a time."""
    failures = []
    running = []

    def stop(*_) -> None:  # else the trainings would go on without us
        failures.append("stopped; the same command resumes")
        for process in running:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)

    def run(name: str) -> None:
        command, result = work[name]
        if result.is_file() or failures:
            return
        log = Path(o.out) / "log" / f"{name.replace(' ', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            words = [sys.executable, *shlex.split(command)]
            words[1] = prlm.beside(words[1])  # wherever this was started
            tqdm.write("OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 " + shlex.join(["python", *words[1:]]))
            process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | threads)
            running.append(process)
            if failures:  # stopped just before
                process.terminate()
            process.wait()
        if process.returncode:
            failures.append(f"{name} ended with status {process.returncode}: see {log}")

    with ThreadPoolExecutor(o.jobs) as pool:
        for _ in tqdm(pool.map(run, work), title, len(work), disable=None):
            pass
    signal.signal(signal.SIGTERM, before)
    if failures:
        raise ValueError(failures[0])


# ---- What comes out of it -------------------------------------------------------------------


def scores_of(o: Options, cell: Cell) -> list[dict]:
    return prlm.read_lines(cell.folder(o) / "samples.jsonl")


@cache
def held_out(data: str, task: str, users: int) -> list[retrieve.Example]:
    """The records that are scored. Read once, since a file can be many megabytes."""
    return retrieve.load_lamp(data, task, "dev")[:users]


def copied(o: Options, task: str) -> dict[str, list[dict]]:
    """Scores without any model: the query as the answer, and what the nearest item's answer was."""
    held = held_out(o.data, task, o.users)
    rank = retrieve.make_ranker(retrieve.PromptOptions(data=o.data, task=task, k=1))
    field = list(retrieve.task_of(task).fields)[-1]
    nearest = [next((item[field] for item in rank(e, 1)), "") for e in held]
    return {
        "copying the query": [scoring.score(e.query, e.target) for e in held],
        "copying the nearest item": [
            scoring.score(text, e.target) for text, e in zip(nearest, held, strict=True)
        ],
    }


def by_user(o: Options, task: str, rows: list[dict], metric: str) -> np.ndarray:
    """The metric's mean for each held-out user, in one order for all rows. [users]"""
    held = held_out(o.data, task, o.users)
    users: dict[str, list[float]] = {}
    for example, row in zip(held, rows, strict=True):
        users.setdefault(example.user_id, []).append(row[metric])
    return np.array([np.mean(values) for values in users.values()])


def table(o: Options, task: str, rows: dict[str, list[list[dict]]], ours: str) -> str:
    """A line for each of the rows {name: [seed][record]}.

    Its last columns: the row `ours` minus this one in ROUGE-1, the 95 % interval, and p.
    """
    our_scores = np.mean([by_user(o, task, seed, "rouge-1") for seed in rows[ours]], 0)
    lines = []
    for name, seeds in rows.items():
        line = [name, len(seeds)]
        for metric in scoring.METRICS:
            means = [np.mean([record[metric] for record in records]) for records in seeds]
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            line.append(f"{np.mean(means):.3f}{spread}")
        words = [len(r["answer"].split()) for records in seeds for r in records if "answer" in r]
        line.append(f"{np.mean(words):.1f}" if words else "")
        if name == ours:
            line += ["", ""]
        else:
            theirs = np.mean([by_user(o, task, seed, "rouge-1") for seed in seeds], 0)
            p, low, high = bootstrap(our_scores, theirs)
            line += [f"{np.mean(our_scores - theirs):+.3f} ({low:+.3f} … {high:+.3f})", f"{p:.4f}"]
        lines.append(line)
    against = f"{ours} − this, ROUGE-1, 95 %"
    return markdown(["", "seeds", *scoring.METRICS, "words", against, "p"], lines)


def judges(o: Options) -> str:
    """What the judges know of the held-out users: pair accuracy and swap test, .5 by chance."""
    reports = {f"ratio, {arm or 'released'}": examination(o, arm)[1] for arm in (None, "warm")}
    if "bert" in arms_of(o, MAIN_TASK):
        reports["the paper's, warm"] = place(o, MAIN_TASK, "bert") / "reward" / "report.json"
    lines = []
    for name, file in reports.items():
        report = prlm.read_json(file)
        line = [name]
        for key in ("pair_accuracy", "swap_test"):
            low, high = (report.get(f"{key}_{end}", 0) for end in ("low", "high"))
            line.append(f"{report[key]:.3f} ({low:.2f} to {high:.2f})" if key in report else "")
        lines.append(line)
    return markdown(["", "pair accuracy (95 %)", "swap test (95 %)"], lines)


def over_copying(o: Options, task: str, arm: str, seed: int) -> np.ndarray:
    """By step: the completions' mean accuracy (ROUGE-1 + -2 + -L) minus that of their queries."""
    steps: dict[int, list[float]] = {}
    for line in prlm.read_lines(place(o, task, arm, seed) / "samples.jsonl"):
        of_query = scoring.rouge(line["query"], line["target"])
        steps.setdefault(line["step"], []).append(line["accuracy"] - sum(of_query.values()))
    return np.array([np.mean(gains) for gains in steps.values()])


def draw_curves(o: Options, path: Path) -> None:
    """What the completions of each step of GRPO earn, above or below copying the query."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    colors = iter(f"C{n}" for n in range(10))
    for arm in arms_of(o, MAIN_TASK):
        name, _, options = ARMS[arm]
        if "--steps 0" in options:
            continue
        color = next(colors)
        for seed in seeds_of(o, MAIN_TASK, arm):
            gains = over_copying(o, MAIN_TASK, arm, seed)
            smooth = [gains[max(0, n - 3) : n + 1].mean() for n in range(len(gains))]
            label = name if seed == 0 else None
            axis.plot(range(1, len(gains) + 1), smooth, color=color, label=label)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set(xlabel="step of GRPO (mean of the last 4)", ylabel="accuracy above copying the query")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def rows_of(o: Options, task: str) -> dict[str, list[Cell]]:
    """The rows of a task's table."""
    rows = {f"released, {name}": [Cell(task, "released", k=k)] for name, k in PROFILES.items()}
    rows |= {f"warm start, {name}": [Cell(task, "warm", k=k)] for name, k in PROFILES.items()}
    for arm in arms_of(o, task):
        if arm != "warm":
            rows[ARMS[arm][0]] = [Cell(task, arm, seed=seed) for seed in seeds_of(o, task, arm)]
    return rows


def robustness(o: Options) -> dict[str, list[Cell]]:
    """The cells of the table by number of items, before and after GRPO."""
    named = {"before GRPO": "warm", "after GRPO": "prlm"}
    if not re.fullmatch(r"\d+(,\d+)*", o.items):
        raise ValueError(f"--items {o.items!r} is not a list of numbers like 0,1,2")
    items = [int(k) for k in o.items.split(",")]
    return {name: [Cell(MAIN_TASK, arm, k=k) for k in items] for name, arm in named.items()}


HOW = """Greedy answers. Differences and p (paired bootstrap) are over users, each the mean of its
records and seeds: p does not cover the variation between seeds.
"""


def report(o: Options, tasks: list[str]) -> str:
    text = f"# {o.model} on what people wrote\n\n{HOW}"
    for task in tasks:
        scores = {name: [records] for name, records in copied(o, task).items()}
        for name, cells in rows_of(o, task).items():
            scores[name] = [scores_of(o, cell) for cell in cells]
        text += f"\n## {task}\n\n" + table(o, task, scores, ARMS["prlm"][0])
    if MAIN_TASK in tasks:
        lines = []
        for name, cells in robustness(o).items():
            means = [np.mean([r["rouge-1"] for r in scores_of(o, cell)]) for cell in cells]
            lines.append([name, *(f"{mean:.3f}" for mean in means)])
        text += f"\n## {MAIN_TASK}: ROUGE-1 by number of items (3 in training)\n\n"
        text += markdown(["", *o.items.split(",")], lines)
        text += f"\n## {MAIN_TASK}: the judges\n\n{judges(o)}"
        text += "\n## The completions of each step\n\n"
        text += pictures(draw_curves, o, Path(o.out) / "curves.png")
    return text


def main(o: Options) -> None:
    tasks = tasks_of(o)
    if not tasks:
        raise ValueError(f"{o.data} has the files of none of the tasks {o.tasks}")
    if not {"warm", "prlm"} <= {*o.arms.split(",")} <= ARMS.keys():
        raise ValueError(f"--arms needs warm and prlm, and knows {', '.join(ARMS)}")
    robustness(o)  # so that a faulty --items fails now, not after hours
    settings = {name: getattr(o, name) for name in ("model", "encoder", "data", "users", "records")}
    file = Path(o.out) / "settings.json"
    if file.is_file() and prlm.read_json(file) != settings:
        raise ValueError(f"{o.out} holds results of other options ({file}): choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    prlm.write_json(file, settings)
    for first in (True, False):  # the trainings that others start from come first
        work = {}
        for task in tasks:
            for arm in arms_of(o, task):
                if (ARMS[arm][1] is None) == first:
                    for seed in seeds_of(o, task, arm):
                        done = place(o, task, arm, seed) / "checkpoint" / "model.safetensors"
                        work[f"{task} {arm} {seed}"] = training(o, task, arm, seed), done
        run_all(o, work, "first trainings" if first else "trainings")

    cells = [cell for task in tasks for cells in rows_of(o, task).values() for cell in cells]
    work = {}
    if MAIN_TASK in tasks:
        cells += [cell for cells in robustness(o).values() for cell in cells]
        work |= {f"judge {arm or 'released'}": examination(o, arm) for arm in (None, "warm")}
    for c in cells:
        name = f"score {c.task} {c.arm} {c.seed} {c.k}"
        work[name] = evaluation(o, c), c.folder(o) / "scores.json"
    run_all(o, work, "scores")
    text = report(o, tasks)
    prlm.write_text(Path(o.out) / "report.md", text)
    print(f"{text}\n{o.out}/report.md")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
