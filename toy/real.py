"""Does the policy use the profile, and does a judge make it use it more? Asked of real text.

Every training is a run of rl.py, every further score one of eval.py; the commands are printed. What
is there already is not made again: stopped at any moment, the same command goes on. The tables go
to --out. What a judge knows, and which way it would push, judges.py tells in minutes.

    python tests/smollm2.py models/smollm2
    python toy/commits.py REPO [REPO ...] --out data
    python toy/real.py --model models/smollm2 --data data          # hours on two cores
    python toy/real.py ... --device cuda --jobs 6                  # several runs share a GPU
    python toy/real.py ... --task LaMP-7 --limit 500 --arms warm,prlm

The headline is the profile's share: what a policy scores when it is shown the profile, minus what
the same policy scores without, answering at once. Beside it: the score with the profile minus
that of a policy trained without profiles. Held-out authors are in two halves. Recipes are chosen on
one; the other is looked at once, at the end, with --half report."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import rl
from prlm import option
from toy import common
from toy.commits import same_manner

# ---- The arms: (name, options of rl.py); all but FIRST start from their seed's warm start --------

ACCURACY, RATIO = {"personalization": 0.0}, {"judge": "ratio"}
NO_GOLD = {"accuracy": 0.0, "beta": 0.3}
ARMS = {
    "warm": ("warm start", {"steps": 0} | ACCURACY),
    "none": ("GRPO without profiles", {"k": 0} | ACCURACY),
    "prlm": ("GRPO, accuracy alone", ACCURACY),
    "bert": ("… with the paper's judge, .1", {"personalization": 0.1, "pairs_per_query": 1}),
    "ratio.1": ("… with the ratio judge, .1", {"personalization": 0.1} | RATIO),
    "ratio.3": ("… with the ratio judge, .3", {"personalization": 0.3} | RATIO),
    "ratio1": ("… with the ratio judge, 1", {"personalization": 1.0} | RATIO),
    "closed": ("GRPO without reasoning", {"reasoning": False} | ACCURACY),
    "no_gold": ("ratio and KL, no gold texts", {"personalization": 1.0} | RATIO | NO_GOLD),
}
# They bring their own warm start: after another, `closed` opens <think> again.
FIRST = ("warm", "none", "closed")
SIDES = ("with", "without")  # the profile


@dataclass
class Options:
    model: str = option("models/smollm2", "checkpoint directory of the released model")
    encoder: str | None = option(None, "BERT checkpoint; without it the paper's judge is left out")
    data: str = option("data", "directory with the task's files")
    task: str = option("commits", "an entry of TASKS in retrieve.py")
    limit: int = option(0, "records of each split; 0 takes all", 0)
    arms: str = option(",".join(ARMS), "which trainings")
    seeds: int = option(3, "trainings of each, from a warm start each", 1)
    warm: int = option(60, "steps of the warm start, 8 records each", 1)
    steps: int = option(24, "steps of GRPO, 4 x 8 completions each", 1)
    more: str = option("", 'options of rl.py for all runs, as --more="--k 5 --lr 3e-5"')
    half: Literal["choose", "report", "all"] = option("choose", "held-out authors to show")
    jobs: int = option(2, "processes at a time, each with one thread", 1)
    device: str = option("cpu", "auto, cuda, mps or cpu")
    out: str = option("runs/real", "what is there already is not made again")


def arms_of(o: Options) -> list[str]:
    wanted = o.arms.split(",")
    if unknown := {*wanted} - ARMS.keys():
        raise ValueError(f"--arms knows {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
    return [arm for arm in ARMS if arm in {"warm", *wanted} and (arm != "bert" or o.encoder)]


def place(o: Options, arm: str, seed: int) -> Path:
    return Path(o.out) / o.task / f"{arm}_seed{seed}"


def options_of(o: Options, arm: str, seed: int) -> dict:
    """The options of a training, as rl.py takes them."""
    same = {"model": o.model, "preset": "small", "data": o.data, "task": o.task, "limit": o.limit}
    same |= {"k": prlm.PRESETS["small"]["k"], "encoder": o.encoder if arm == "bert" else None}
    same |= {"seed": seed, "steps": o.steps, "eval_every": 0, "force": True}
    warm = str(place(o, "warm", seed) / "checkpoint")
    same |= {"warm_start": o.warm} if arm in FIRST else {"model": warm}
    more = prlm.parse_flags(rl.Options, "", shlex.split(o.more))
    return {**same, "device": o.device, **more, **ARMS[arm][1]}


def chain(o: Options, arm: str, seed: int) -> list[tuple[list[str], Path]]:
    """The commands of an arm and seed, each with the file that shows it is done: the training, and
    the score of the side that rl.py does not ask."""
    out, options = place(o, arm, seed), options_of(o, arm, seed)
    other = {"run": out, "k": 0 if options["k"] else options_of(o, "warm", seed)["k"]}
    # Without a profile it answers at once: having learned to quote, it would invent quotations.
    other |= {"reasoning": not options["k"] and options.get("reasoning", True)}
    other |= {"limit": o.limit, "device": o.device, "out": out / "other_side", "overwrite": True}
    return [
        common.training(out, options),
        (common.command("eval.py", other), out / "other_side" / "scores.json"),
    ]


# ---- What comes out of it --------------------------------------------------------------------


def metrics_of(task: str) -> tuple[str, ...]:
    """ROUGE, and for commits what it does not see: the manner, as `same_manner` has it."""
    return ("rouge-1", "rouge-l", *(("form", "kind", "prefix") if task == "commits" else ()))


def measure(answer: str, target: str) -> dict[str, float | bool | None]:
    """ROUGE and manner; None where the target has no such thing."""
    return scoring.rouge(answer, target) | same_manner(answer, target)


def held_out(o: Options) -> list[retrieve.Example]:
    """The records of the held-out authors of one half."""
    examples = retrieve.load_examples(o, "dev")
    users = sorted({example.user_id for example in examples})
    shown = {"choose": users[::2], "report": users[1::2], "all": users}[o.half]
    return [example for example in examples if example.user_id in shown]


def by_author(examples, answers: dict[str, str], metric: str) -> np.ndarray:
    """The metric's mean over each author's records [N]; NaN for one with none that has it."""
    values = {example.user_id: [] for example in examples}
    for e in examples:
        value = measure(answers[e.id], e.target)[metric]
        values[e.user_id] += [] if value is None else [float(value)]
    return np.array([np.mean(found) if found else np.nan for found in values.values()])


def collect(o: Options, examples) -> dict:
    """{arm: {metric: {side: [seeds, authors]}}}; as a third side "share", with minus without."""
    result = {arm: {metric: {} for metric in metrics_of(o.task)} for arm in arms_of(o)}
    for arm, metrics in result.items():
        own = SIDES[options_of(o, arm, 0)["k"] == 0]  # the side that rl.py scores
        for side in SIDES:
            name = "held_out/after.jsonl" if side == own else "other_side/samples.jsonl"
            files = [place(o, arm, seed) / name for seed in range(o.seeds)]
            seeds = [{r["id"]: r["answer"] for r in prlm.read_lines(file)} for file in files]
            for metric, sides in metrics.items():
                sides[side] = np.stack([by_author(examples, said, metric) for said in seeds])
        for sides in metrics.values():
            sides["share"] = sides["with"] - sides["without"]
    return result


def scores_table(o: Options, examples, found: dict) -> str:
    """Every metric of what needs no model, the query and the nearest item, and of the arms."""
    (*_, field), metrics, rows = retrieve.task_of(o.task).fields, metrics_of(o.task), []
    nearest = {e.id: [i[field] for i in retrieve.retrieve(e, 1)] for e in examples}
    copied = {
        "copying the query": {e.id: e.query for e in examples},
        "copying the nearest item": {id: (said or [""])[0] for id, said in nearest.items()},
    }
    for name, answers in copied.items():
        rows.append([name, *(common.mean([by_author(examples, answers, m)]) for m in metrics)])
    for arm, scores in found.items():
        cells = [" / ".join(common.mean(scores[m][side]) for side in SIDES) for m in metrics]
        rows.append([ARMS[arm][0], *cells])
    return common.markdown(["with / without profile", *metrics], rows)


def differences(ours: dict, theirs: dict) -> str:
    """Table of {arm: [seeds, authors]}: by how much each arm's are above those of the same name."""
    rows = []
    for arm in (arm for arm in ours if ours[arm] is not theirs[arm]):
        by_seed = [common.mean([row]) for row in ours[arm] - theirs[arm]]
        cells = common.against(ours[arm], theirs[arm])
        rows.append([ARMS[arm][0], *cells, " ".join(by_seed)])
    return common.markdown(["", *common.AGAINST, "by seed"], rows)


def shares_picture(found: dict, path: Path, metrics) -> str:
    """The profile's share by arm: a stroke for each seed, their mean, its 95 % over authors."""

    def draw(figure) -> None:
        for axis, metric in zip(figure.subplots(1, 2, sharey=True), metrics, strict=True):
            for n, arm in enumerate(found):
                share = found[arm][metric]["share"]
                _, *ends = common.bootstrap(share, 0)["users"]
                axis.plot(ends, [n, n], f"C{n}", linewidth=2)
                axis.plot(share.mean(), n, f"C{n}o", markersize=9)
                axis.plot(share.mean(1), [n] * len(share), "k|", markersize=12)
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set(title=f"the profile's share of {metric}")
        figure.axes[0].set_yticks(range(len(found)), [ARMS[arm][0] for arm in found])
        figure.axes[0].invert_yaxis()

    return common.picture(path, (10, 1 + 0.4 * len(found)), draw)


def report(o: Options) -> str:
    examples = held_out(o)
    found, authors = collect(o, examples), len({example.user_id for example in examples})
    text = f"""# {o.task}: {Path(o.model).name}, {authors} held-out authors ({o.half})

Greedy answers. Each author is the mean of their records; ± is the deviation between seeds.
Intervals over users hold the trained policies fixed; those over seeds (Student's t) hold the users
fixed. The share is the score with the profile minus that of the same policy without.

{scores_table(o, examples, found)}"""
    metrics = ("rouge-1", "form" if o.task == "commits" else "rouge-l")
    text += shares_picture(found, Path(o.out) / o.task / f"shares_{o.half}.png", metrics)
    for metric in metrics:
        sides = (*SIDES, "share")
        shown, hidden, shares = ({arm: found[arm][metric][side] for arm in found} for side in sides)
        text += f"\n## The profile's share of {metric}\n\n{differences(shown, hidden)}"
        bases = {"prlm": ("That share", shares, shares), "none": ("The score", shown, hidden)}
        for name, (what, ours, base) in bases.items():
            if name in found:
                text += f"\n{what}, minus that of *{ARMS[name][0]}*\n\n"
                text += differences(ours, dict.fromkeys(found, base[name]))
    return text


def main(o: Options) -> None:
    retrieve.load_examples(o, "dev")  # a mistake is said now
    for first in (True, False):  # the others start from the warm starts
        arms = [arm for arm in arms_of(o) if (arm == "warm") == first]
        runs = [(arm, seed) for seed in range(o.seeds) for arm in arms]
        work = {f"{o.task} {arm} seed {seed}": chain(o, arm, seed) for arm, seed in runs}
        common.run_jobs(work, o.jobs, Path(o.out) / "log")
    path, text = Path(o.out) / o.task / f"report_{o.half}.md", report(o)
    prlm.write_text(path, text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
