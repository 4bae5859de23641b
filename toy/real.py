"""Does the policy use the profile, and does a judge make it use it more? Asked of real text.

Every training is a run of rl.py (of rule.py where a rule is the judge), every score one of eval.py;
the commands are printed. What is there already is not made again: stopped at any moment, the same
command goes on. What a judge knows, and which way it would push, judges.py tells in minutes.

    python tests/smollm2.py models/smollm2
    python toy/commits.py REPO [REPO ...] --out data
    python toy/real.py --model models/smollm2 --data data          # hours on two cores
    python toy/real.py ... --device cuda --jobs 6                  # several runs share a GPU
    python toy/real.py ... --task LaMP-5 --arms prlm,none

The headline is the profile's share: what a policy scores when it is shown the profile, minus what
the same policy scores without. Beside it, the fair rival: a policy trained without profiles."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import rl
from prlm import option
from toy import common
from toy.commits import MANNER, TASK, same_manner
from toy.rule import manner_judge

# ---- The arms: (name, the arm whose policy it starts from, options of rl.py) ---------------------

NONE, RATIO, NO_GOLD = {"k": 0}, {"judge": "ratio"}, {"accuracy": 0.0, "beta": 0.3}
ARMS = {
    "warm_none": ("warm start, trained without profiles", None, NONE),
    "warm": ("warm start, with the profile", None, {}),
    "none": ("GRPO, trained without profiles", "warm_none", NONE),
    "prlm": ("GRPO, accuracy alone", "warm", {}),
    "bert": ("… and the paper's judge, .1", "warm", {"personalization": 0.1}),
    "ratio.1": ("… and the ratio, .1", "warm", {"personalization": 0.1} | RATIO),
    "ratio.3": ("… and the ratio, .3", "warm", {"personalization": 0.3} | RATIO),
    "ratio1": ("… and the ratio, 1", "warm", {"personalization": 1.0} | RATIO),
    "rule": ("… and the rule, 1", "warm", {"personalization": 1.0}),
    "no_gold": ("ratio and KL, no gold texts", "warm", {"personalization": 1.0} | RATIO | NO_GOLD),
    "warm_quoting": ("warm start with reasoning", None, {"reasoning": True}),
    "quoting": ("GRPO with reasoning", "warm_quoting", {"reasoning": True}),
}
SAME = {"preset": "small", "k": 3, "reasoning": False, "max_new_tokens": 96, "prompts_per_step": 8}
SAME |= {"personalization": 0.0, "eval_every": 0, "held_out": 16, "force": True}


@dataclass
class Options:
    model: str = option("models/smollm2", "checkpoint directory of the released model")
    reward_model: str | None = option(
        None, "of reward.py; without it the paper's judge is left out"
    )
    data: str = option("data", "directory with the task's files")
    task: str = option(TASK, "an entry of TASKS in retrieve.py")
    limit: int = option(160, "held-out records to score", 1)
    arms: str = option(",".join(ARMS), "which trainings; what they start from comes with them")
    seeds: int = option(3, "trainings of each, from a warm start each", 1)
    warm: int = option(48, "steps of the warm start, 8 records each", 1)
    steps: int = option(16, "steps of GRPO, 8 x 8 completions each", 1)
    more: str = option("", 'options of rl.py for all runs, as --more="--precision bfloat16"')
    jobs: int = option(2, "processes at a time, each with one thread", 1)
    device: str = option("cpu", "auto, cuda, mps or cpu")
    out: str = option("runs/real", "what is there already is not made again")


def arms_of(o: Options) -> list[str]:
    wanted = {*o.arms.split(",")}
    if unknown := wanted - ARMS.keys():
        raise ValueError(f"--arms knows {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
    wanted -= {*(["rule"] if o.task != TASK else []), *([] if o.reward_model else ["bert"])}
    wanted |= {ARMS[arm][1] for arm in wanted}
    return [arm for arm in ARMS if arm in wanted]


def place(o: Options, arm: str, seed: int) -> Path:
    return Path(o.out) / o.task / f"{arm}_seed{seed}"


def chain(o: Options, arm: str, seed: int) -> list[tuple[list[str], Path]]:
    """The commands of an arm and seed, each with the file that shows it is done: the training, and
    a score with the profile and one without, answering at once."""
    out, (_, start, own) = place(o, arm, seed), ARMS[arm]
    model = place(o, start, seed) / "checkpoint" if start else o.model
    options = SAME | {"model": str(model), "data": o.data, "task": o.task, "seed": seed}
    options |= {"steps": o.steps} if start else {"steps": 0, "warm_start": o.warm}
    options |= {"device": o.device, "reward_model": o.reward_model if arm == "bert" else None}
    options |= prlm.parse_flags(rl.Options, "", shlex.split(o.more)) | own
    commands = [common.training(out, options, "toy/rule.py" if arm == "rule" else "rl.py")]
    for side in sides_of(arm):
        asked = {"run": out, "limit": o.limit, "device": o.device, "out": out / side}
        if side == "without":  # having learned to quote, it would invent quotations
            asked |= {"k": 0, "reasoning": False, "max_new_tokens": 40}
        words = common.command("eval.py", asked | {"overwrite": True})
        commands.append((words, out / side / "scores.json"))
    return commands


# ---- What comes out of it --------------------------------------------------------------------


def sides_of(arm: str) -> tuple[str, ...]:
    return ("own",) if ARMS[arm][2] is NONE else ("own", "without")


def metrics_of(task: str) -> tuple[str, ...]:
    """ROUGE, and for commits what it does not see: the author's manner, the form of the items."""
    return ("rouge-1", "rouge-l", *(*MANNER, "items") * (task == TASK))


def measure(o: Options, examples, answers: list[str]) -> list[dict]:
    """Every metric of each answer; None where the target has no such thing."""
    rows = [scoring.rouge(answer, e.target) for answer, e in zip(answers, examples, strict=True)]
    if o.task == TASK:
        items = manner_judge(rl.Options(task=TASK, k=SAME["k"]), examples, answers)
        for row, answer, e, share in zip(rows, answers, examples, items):
            row |= same_manner(answer, e.target) | {"items": share}
    return rows


def by_author(examples, values: np.ndarray) -> np.ndarray:
    """[..., records] -> [..., authors]: the mean over an author's records that have a value."""
    users = np.array([example.user_id for example in examples])
    written = (users[:, None] == np.unique(users)).astype(float)  # [records, authors]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return (np.nan_to_num(values) @ written) / (~np.isnan(values) @ written)


def collect(o: Options, examples) -> dict:
    """{arm: {metric: {side: [seeds, authors]}}}. Two more sides: "share", own minus without;
    "ended", the same where both answers end: to break down without the profile is no merit."""
    result = {}
    for arm in arms_of(o):
        sides, runs = sides_of(arm), [place(o, arm, seed) for seed in range(o.seeds)]
        said = [[prlm.read_lines(run / side / "samples.jsonl") for run in runs] for side in sides]
        rows = [[measure(o, examples, [r["answer"] for r in run]) for run in row] for row in said]
        ends = np.array([[[r["finished"] for r in run] for run in row] for row in said]).all(0)
        result[arm] = {}
        for metric in metrics_of(o.task):
            x = [[[row[metric] for row in run] for run in both] for both in rows]
            x = np.array(x, float)  # [sides, seeds, records]; None is NaN
            result[arm][metric] = found = dict(zip(sides, by_author(examples, x)))
            if len(sides) == 2:
                found["share"] = by_author(examples, x[0] - x[1])
                found["ended"] = by_author(examples, np.where(ends, x[0] - x[1], np.nan))
    return result


def scores_table(o: Options, examples, found: dict) -> str:
    """Every metric of what needs no model, the query and the nearest item, and of the arms."""
    (*_, field), metrics, rows = retrieve.task_of(o.task).fields, metrics_of(o.task), []
    nearest = [retrieve.retrieve(example, 1) for example in examples]
    copied = {
        "copying the query": [example.query for example in examples],
        "copying the nearest item": [items[0][field] if items else "" for items in nearest],
    }
    for name, answers in copied.items():
        scores = measure(o, examples, answers)
        values = (np.array([[row[metric] for row in scores]], float) for metric in metrics)
        rows.append([name, *(common.mean(by_author(examples, x)) for x in values)])
    for arm, scores in found.items():
        cells = [" / ".join(common.mean(scores[m][s]) for s in sides_of(arm)) for m in metrics]
        rows.append([ARMS[arm][0], *cells])
    return common.markdown(["with / without profile", *metrics], rows)


def differences(title: str, found: dict[str, np.ndarray]) -> str:
    """Table of how far the arms' [seeds, authors] are from 0."""
    rows = []
    for arm, values in found.items():
        by_seed = " ".join(common.cells(row)[0] for row in values)
        rows.append([ARMS[arm][0], *common.cells(values), by_seed])
    return f"\n## {title}\n\n{common.markdown(['', *common.DIFFERENCE, 'by seed'], rows)}"


def shares_picture(found: dict, metrics, path: Path) -> str:
    """The profile's share by arm: a stroke for each seed, their mean, its 95 % over authors."""
    arms = [arm for arm in found if "without" in sides_of(arm)]

    def draw(figure) -> None:
        for axis, metric in zip(figure.subplots(1, 2, sharey=True), metrics, strict=True):
            for n, arm in enumerate(arms):
                share = found[arm][metric]["share"]
                _, *ends = common.bootstrap(share)["users"]
                axis.plot(ends, [n, n], f"C{n}", linewidth=2)
                axis.plot(share.mean(), n, f"C{n}o", markersize=9)
                axis.plot(share.mean(1), [n] * len(share), "k|", markersize=12)
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set(title=f"the profile's share of {metric}")
        figure.axes[0].set_yticks(range(len(arms)), [ARMS[arm][0] for arm in arms])
        figure.axes[0].invert_yaxis()

    return common.picture(path, (10, 1 + 0.4 * len(arms)), draw)


def report(o: Options, examples) -> str:
    found, shown = collect(o, examples), ("rouge-1", "form" if o.task == TASK else "rouge-l")
    text = f"""# {o.task}: {Path(o.model).name}, {len(examples)} held-out records

Greedy answers. Each author is the mean of their records; ± is the deviation between seeds.
Intervals over users hold the trained policies fixed; those over seeds (Student's t) hold the users
fixed. The share is the score with the profile minus that of the same policy without.

{scores_table(o, examples, found)}"""
    text += shares_picture(found, shown, Path(o.out) / o.task / "shares.png")
    for metric in (*shown, *["items"] * (o.task == TASK)):
        own, share, ended = (
            {arm: x[metric][side] for arm, x in found.items() if side in x[metric]}
            for side in ("own", "share", "ended")
        )
        title = f"The profile's share of {metric}"
        text += differences(title, share) + differences(f"{title}, where both answers end", ended)
        bases = [(title, share, "warm"), (title, share, "prlm")]
        bases += [(f"The {metric}", own, base) for base in ("warm_none", "none", "prlm")]
        for what, values, base in (row for row in bases if row[-1] in found):
            above = {arm: x - values[base] for arm, x in values.items() if arm != base}
            text += differences(f"{what}, minus that of *{ARMS[base][0]}*", above)
    return text


def main(o: Options) -> None:
    examples = retrieve.load_examples(o, "dev")  # a mistake is said now
    for first in (True, False):  # the others start from the warm starts
        arms = [arm for arm in arms_of(o) if (ARMS[arm][1] is None) == first]
        runs = [(arm, seed) for seed in range(o.seeds) for arm in arms]
        work = {f"{o.task} {arm} seed {seed}": chain(o, arm, seed) for arm, seed in runs}
        common.run_jobs(work, o.jobs, Path(o.out) / "log")
    path, text = Path(o.out) / o.task / "report.md", report(o, examples)
    prlm.write_text(path, text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
