"""The paper's questions, asked of the toy world by one command.

  1. Does reasoning trained by RL beat plain personalized RAG?   (three tasks, six rows)
  2. What do the reasoning and the contrastive reward each contribute?   (one change at a time)
  3. Is it robust to how many items are retrieved, and by what?   (k by retriever)
  4. What does the judge know, and what does a policy learn from it, without gold texts too?

Every training is a run of rl.py, whose command is printed; what is there already is not made again,
so the same command goes on after a stop. The report states, it does not judge.

    python toy/experiments.py --quick        # one seed of the main table
    python toy/experiments.py                # everything, three seeds: an hour on two cores"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import rl
from prlm import SHIPPED, option
from toy import common

# ---- The arms: what each row of a table changes ---------------------------------------------

NO_GOLD = {"accuracy": 0.0, "personalization": 1.0}  # what the users wrote is not rewarded
KL = {"beta": 0.3}  # stay near the base: a judge of style alone forgets what the query is about
ARMS = {  # key: (its name in the tables, the options of rl.py that differ)
    "base": ("RAG base", {"steps": 0, "personalization": 0.0}),
    "sft": ("supervised on the answers", {"reasoning": False, "personalization": 0.0, "steps": 0}),
    "no_reasoning": ("GRPO without reasoning", {"reasoning": False}),
    "prlm": ("PrLM", {}),
    "no_judge": ("without the personalization reward", {"personalization": 0.0}),
    "untrained": ("reward model untrained", {"reward_epochs": 0}),
    "ratio": ("ratio judge", {"judge": "ratio"}),
    "ratio1": ("ratio judge, weight 1", {"judge": "ratio", "personalization": 1.0}),
    "bert_no_gold": ("no gold texts, PrLM's judge", NO_GOLD),
    "ratio_no_gold": ("no gold texts, ratio judge", NO_GOLD | {"judge": "ratio"}),
    "bert_no_gold_kl": ("no gold texts, PrLM's judge, KL", NO_GOLD | KL),
    "ratio_no_gold_kl": ("no gold texts, ratio judge, KL", NO_GOLD | KL | {"judge": "ratio"}),
}
MAIN = ["sft", "no_reasoning", "prlm"]
WITHOUT_GOLD = [arm for arm in ARMS if "no_gold" in arm]
ABLATIONS = [arm for arm in ARMS if arm not in ("base", "sft")]
ROBUST = ["base", "no_reasoning", "prlm"]  # what is asked with other prompts than in training
RETRIEVERS, ITEMS = ["random", "recency", "bm25", "dense"], [1, 2, 4, 8]
GRID = [(name, k) for name in RETRIEVERS for k in ITEMS]
TASKS = ["LaMP-4", "LaMP-5", "LaMP-7"]
TASK = TASKS[0]  # of everything but the main table


@dataclass
class Options:
    quick: bool = option(False, "one seed of the main table, and nothing else")
    seeds: int = option(3, "trainings of every arm", 1)
    steps: int = option(rl.Options.steps, "of every training", 1)
    lr: float = option(rl.Options.lr, "of every training by GRPO", 1e-12)
    jobs: int = option(2, "processes at a time, each on one core", 1)
    model: str = option(str(SHIPPED / "policy"), "checkpoint directory of the base policy")
    encoder: str = option(str(SHIPPED / "encoder"), "BERT checkpoint")
    data: str = option(str(SHIPPED / "lamp"), "directory with LaMP's files")
    out: str = option("runs/experiments", "what is there already is not made again")


def place(o: Options, task: str, arm: str, seed: int) -> Path:
    return Path(o.out) / task / arm / f"seed{seed}"


def seeds_of(o: Options, arm: str) -> range:
    return range(1 if o.quick or arm == "base" else o.seeds)


def chain(o: Options, task: str, arm: str, seed: int) -> list[tuple[list[str], Path]]:
    """The commands of an arm and seed, each with the file that shows it is done."""
    same = {"model": o.model, "encoder": o.encoder, "data": o.data, "preset": "toy"}
    same |= {"task": task, "seed": seed, "steps": o.steps, "lr": o.lr, "device": "cpu"}
    same["eval_every"] = 5 if task == TASK else 0  # for the curves
    if arm == "sft":  # as many records as RL has prompts: 8 a step instead of 16
        same |= {"warm_start": 2 * o.steps, "warm_start_lr": 1e-3}
    out = place(o, task, arm, seed)
    commands = [common.training(out, same | ARMS[arm][1])]
    for name, k in GRID if task == TASK and arm in ROBUST and not o.quick else ():
        cell = out / f"{name}_{k}"
        other = {"run": out, "retriever": name, "k": k, "out": cell, "overwrite": True}
        commands.append((common.command("eval.py", other), cell / "scores.json"))
    return commands


# ---- What the report says -------------------------------------------------------------------


def scores_of(o: Options, task: str, arm: str, stage: str, metric="rouge-l") -> np.ndarray:
    """A metric of each held-out user, for every seed of an arm. [seeds, users]"""
    files = [place(o, task, arm, s) / "held_out" / f"{stage}.jsonl" for s in seeds_of(o, arm)]
    return np.array([[record[metric] for record in prlm.read_lines(file)] for file in files])


def compare(o: Options, task: str, rows: dict[str, tuple[str, str]]) -> str:
    """A line for each of the rows {name: (arm, stage)}: its scores, and PrLM against it."""
    ours, lines = scores_of(o, task, "prlm", "after"), []
    for name, (arm, stage) in rows.items():
        cells = [common.mean(scores_of(o, task, arm, stage, key)) for key in scoring.METRICS]
        theirs = scores_of(o, task, arm, stage)
        lines.append(
            [name, *cells, *([""] * 4 if arm == "prlm" else common.difference_cells(ours - theirs))]
        )
    return common.markdown(["", *scoring.METRICS, *common.DIFFERENCE], lines)


def judges(o: Options) -> str:
    """What each arm's judge knows of held-out pairs and users; the ratio is trained on no pairs."""
    rows = []
    for arm in ("prlm", "untrained", "ratio"):  # whose judges differ
        files = [place(o, TASK, arm, s) / "reward" / "report.json" for s in seeds_of(o, arm)]
        found = [prlm.read_json(file) for file in files]
        cells = ([x[key] for x in found if key in x] for key in ("pair_accuracy", "swap_test"))
        rows.append([ARMS[arm][0], *map(common.mean, cells)])
    return common.markdown(["", "pair accuracy", "swap test"], rows)


def grids(o: Options) -> str:
    """A table of ROUGE-L by retriever and k for each policy, the mean over seeds."""
    text = ""
    for arm in ROBUST:
        runs = [place(o, TASK, arm, seed) for seed in seeds_of(o, arm)]
        files = [[run / f"{name}_{k}" / "scores.json" for name, k in GRID] for run in runs]
        found = [[prlm.read_json(file)["rouge-l"] for file in row] for row in files]
        table = np.mean(found, 0).reshape(len(RETRIEVERS), -1)
        cells = [[f"{x:.3f} ({x - table.max():+.3f})" for x in row] for row in table]
        lines = [[retriever, *row] for retriever, row in zip(RETRIEVERS, cells, strict=True)]
        text += f"\n{ARMS[arm][0]} (in brackets: from its best cell)\n\n"
        text += common.markdown(["", *(f"k = {k}" for k in ITEMS)], lines)
    return text


def curves(o: Options, arms: list[str], file: str) -> str:
    """A picture by step, means over seeds, as Markdown."""
    panels = {"eval_rouge-l": "ROUGE-L of 64 held-out users, greedy"}
    panels |= {"completion_tokens": "tokens a completion", "format": "reasoning closed"}

    def draw(figure) -> None:
        for axis, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for n, arm in enumerate(arms):
                runs = [place(o, TASK, arm, seed) for seed in seeds_of(o, arm)]
                logs = [[x for x in prlm.read_lines(r / "metrics.jsonl") if key in x] for r in runs]
                steps = [line["step"] for line in logs[0]]
                values = np.mean([[line[key] for line in log] for log in logs], 0).tolist()
                if key == "eval_rouge-l":
                    start = scores_of(o, TASK, arm, "before")[:, :64].mean()
                    steps, values = [0, *steps], [start, *values]
                axis.plot(steps, values, f"C{n}", label=ARMS[arm][0])
            axis.set(title=title, xlabel="step")
        figure.axes[0].legend(fontsize=7)

    return common.picture(Path(o.out) / file, (10, 3.4), draw)


def report(o: Options) -> str:
    text = f"""# The paper's questions, asked of the toy

{len(seeds_of(o, "prlm"))} seed(s), {o.steps} steps. Greedy answers for held-out users; ± is the
standard deviation over seeds. The differences are PrLM minus the row in ROUGE-L: over users, the
trained policies stay (paired bootstrap); over seeds, the users stay (Student's t).
"""
    for task in TASKS:
        rows = {"no profile": ("base", "no_profile"), ARMS["base"][0]: ("base", "before")}
        rows["RAG base, reasoning closed"] = ("no_reasoning", "before")
        rows |= {ARMS[arm][0]: (arm, "after") for arm in MAIN}
        users = scores_of(o, task, "base", "before").shape[1]
        text += f"\n## {task}: {users} held-out users\n\n{compare(o, task, rows)}"
    shown = ["no_reasoning", "prlm"]
    if not o.quick:
        rows = {ARMS[arm][0]: (arm, "after") for arm in ABLATIONS}
        text += f"\n## One change at a time, {TASK}\n\n{compare(o, TASK, rows)}"
        text += f"\n## Other prompts than in training (k 4, bm25), {TASK}, ROUGE-L\n{grids(o)}"
        text += f"\n## The judges (shares are .5 by chance)\n\n{judges(o)}"
        shown = [arm for arm in ABLATIONS if arm not in WITHOUT_GOLD]
        picture = curves(o, WITHOUT_GOLD, "no_gold.png")
        text += f"\n## Learning curves without gold texts, {TASK}\n\n{picture}"
    return text + f"\n## Learning curves, {TASK}\n\n{curves(o, shown, 'curves.png')}"


def main(o: Options) -> None:
    work = {}
    for seed in range(o.seeds):  # a whole seed first: an early look at all rows
        for task in TASKS:
            more = ABLATIONS if task == TASK and not o.quick else []
            for arm in dict.fromkeys(["base", *MAIN, *more]):
                if seed in seeds_of(o, arm):
                    work[f"{task} {arm} seed {seed}"] = chain(o, task, arm, seed)
    common.run_jobs(work, o.jobs, Path(o.out) / "log")
    prlm.write_text(Path(o.out) / "report.md", report(o))
    print(f"{o.out}/report.md")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
