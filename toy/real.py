"""Does the policy use the profile, and does a reward make it use it more? Measured on real text.

Every training is a run of rl.py (of rule.py where a rule is the judge), every score one of eval.py;
the commands are printed. What is finished is kept: after a stop, the same command goes on.
judges.py shows in minutes what a judge knows; README.md here says how to get model and data.

    python toy/real.py --model models/smollm2 --data data          # hours on two cores
    python toy/real.py ... --device cuda --jobs 6                  # several runs share a GPU
    python toy/real.py ... --data LAMP --task LaMP-5 --arms accuracy,none

The headline is the profile's share: what a policy scores when it is shown the profile, minus what
the same policy scores without. Beside it, the fair rival: a policy trained without profiles."""

import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import reward
import rl
from prlm import option
from toy import common
from toy.commits import TASK, same_manner
from toy.rule import manner_judge

# ---- The arms: (name, the arm whose policy it starts from, options of rl.py) ---------------------

NO_PROFILE, RATIO, NO_GOLD = {"k": 0}, {"judge": "ratio"}, {"accuracy": 0.0, "beta": 0.3}
ARMS = {
    "warm_none": ("warm start, trained without profiles", None, NO_PROFILE),
    "warm": ("warm start, with the profile", None, {}),
    "none": ("GRPO, trained without profiles", "warm_none", NO_PROFILE),
    "accuracy": ("GRPO, accuracy alone", "warm", {}),
    "bert": ("… and the paper's judge, .1", "warm", {"personalization": 0.1}),
    "ratio.1": ("… and the ratio, .1", "warm", {"personalization": 0.1} | RATIO),
    "ratio.3": ("… and the ratio, .3", "warm", {"personalization": 0.3} | RATIO),
    "ratio1": ("… and the ratio, 1", "warm", {"personalization": 1.0} | RATIO),
    "rule": ("… and the rule, 1", "warm", {"personalization": 1.0}),
    "no_gold": ("ratio and KL, no gold texts", "warm", {"personalization": 1.0} | RATIO | NO_GOLD),
}
SIDES = ("own", "without")  # as it was trained, and without the profile
SAME = {"preset": "small", "k": 3, "reasoning": False, "max_new_tokens": 96, "prompts_per_step": 8}
SAME |= {"personalization": 0.0, "force": True, "eval_every": 0, "held_out": 1}  # eval.py scores


@dataclass
class Options:
    model: str = option("models/smollm2", "checkpoint directory of the released model")
    reward_model: str | None = option(None, "the paper's judge, from reward.py; else no arm bert")
    data: str = option("data", "directory with the task's files")
    task: str = option(TASK, "an entry of TASKS in retrieve.py")
    limit: int = option(160, "held-out records to score", 1)
    arms: str = option(",".join(ARMS), "what to train; the warm starts they need are added")
    seeds: int = option(3, "trainings of each arm", 1)
    warm: int = option(48, "steps of the warm start, 8 records each", 1)
    steps: int = option(16, "steps of GRPO, 8 x 8 completions each", 1)
    more: str = option("", 'options of rl.py for all runs, as --more="--precision bfloat16"')
    jobs: int = option(2, "processes at a time, each with one thread", 1)
    device: str = option("cpu", "auto, cuda, mps or cpu")
    out: str = option("runs/real", "run directories and the report")


def arms_of(o: Options) -> list[str]:
    wanted = {*o.arms.split(",")}
    if unknown := wanted - ARMS.keys():
        raise ValueError(f"--arms knows {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
    wanted = {*wanted, *(ARMS[arm][1] for arm in wanted)} - {"" if o.reward_model else "bert"}
    return [arm for arm in ARMS if arm in wanted]


def place(o: Options, arm: str, seed: int) -> Path:
    return Path(o.out) / o.task / f"{arm}_seed{seed}"


def sides_of(arm: str) -> tuple[str, ...]:
    return SIDES[: 1 if "k" in ARMS[arm][2] else 2]


def common_options(o: Options) -> dict:
    """Of all runs of rl.py."""
    given = {"data": o.data, "task": o.task, "device": o.device}
    return SAME | given | prlm.parse_flags(rl.Options, "", shlex.split(o.more))


def chain(o: Options, arm: str, seed: int) -> list[tuple[list[str], Path]]:
    """The commands of an arm and seed, each with the file that shows it is done: the training, the
    score as it was trained and, if that was with profiles, one without."""
    out, (_, start, changes) = place(o, arm, seed), ARMS[arm]
    model = place(o, start, seed) / "checkpoint" if start else o.model
    options = common_options(o) | {"model": str(model), "seed": seed}
    options |= {"steps": o.steps} if start else {"steps": 0, "warm_start": o.warm}
    options |= {"reward_model": o.reward_model} if arm == "bert" else {}
    script = "toy/rule.py" if arm == "rule" else "rl.py"
    commands = [common.training(out, options | changes, script)]
    for side in sides_of(arm):
        answers = out / f"{side}_{o.limit}"
        asked = {"run": out, "limit": o.limit, "device": o.device, "out": answers}
        # At once: what has learned to quote would invent quotations.
        asked |= {"k": 0, "reasoning": False} if side == "without" else {}
        words = common.command("eval.py", asked | {"overwrite": True})
        commands.append((words, answers / "scores.json"))
    return commands


# ---- What comes out of it --------------------------------------------------------------------

METRICS = ("rouge-1", "rouge-l", "form", "kind", "prefix", "form of items")
SHARE = "the profile's share"  # own minus without
ENDED = f"{SHARE} where both completions end"


def measure(o: Options, examples, answers: list[str]) -> dict[str, np.ndarray]:
    """{metric: [records]}; NaN where the target has no such thing."""
    options, rows = rl.Options(**common_options(o)), []
    for e, answer in zip(examples, answers, strict=True):
        row = scoring.rouge(answer, e.target) | same_manner(answer, e.target)
        rows.append(row | {"form of items": manner_judge(options, [e], [answer])[0]})
    return {metric: np.array([row[metric] for row in rows], float) for metric in METRICS}


def by_author(examples, values: np.ndarray) -> np.ndarray:
    """[..., records] -> [..., authors]: the mean over an author's records that have a value."""
    users = np.array([example.user_id for example in examples])
    written = (users[:, None] == np.unique(users)).astype(float)  # [records, authors]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return (np.nan_to_num(values) @ written) / (~np.isnan(values) @ written)


def collect(o: Options, examples) -> dict:
    """{row: {metric: {side: [seeds, authors]}}} of copies, which need no model, and of the arms;
    SHARE and ENDED are sides, too."""
    (*_, field), result = retrieve.task_of(o.task).fields, {}
    nearest = [retrieve.retrieve(example, 1) for example in examples]
    for name, answers in (
        ("copying the query", [example.query for example in examples]),
        ("copying the nearest item", [items[0][field] if items else "" for items in nearest]),
    ):
        copy = measure(o, examples, answers)
        result[name] = {m: {"own": by_author(examples, x[None])} for m, x in copy.items()}
    for arm in arms_of(o):
        values, ends, row = {}, [], {}
        for side in sides_of(arm):
            folders = [place(o, arm, seed) / f"{side}_{o.limit}" for seed in range(o.seeds)]
            runs = [prlm.read_lines(folder / "samples.jsonl") for folder in folders]
            values[side] = [measure(o, examples, [r["answer"] for r in run]) for run in runs]
            ends.append([[r["finished"] for r in run] for run in runs])
        for metric in METRICS:
            x = {side: np.stack([v[metric] for v in seeds]) for side, seeds in values.items()}
            if "without" in x:
                x[SHARE] = x["own"] - x["without"]
                x[ENDED] = np.where(np.all(ends, 0), x[SHARE], np.nan)
            row[metric] = {side: by_author(examples, v) for side, v in x.items()}
        result[ARMS[arm][0]] = row
    return result


def differences(found: dict, metric: str, side: str, base: str | None = None) -> str:
    """Table of the rows' values, or of how far they are above those of the row `base`."""
    values = {name: x[metric][side] for name, x in found.items() if side in x[metric]}
    title = f"{metric}: {side.replace('own', 'score')}"
    title += f", minus that of *{base}*" if base else ""
    below, lines = values.pop(base, 0), []
    for name, x in values.items():
        by_seed = " ".join(common.mean([seed]) for seed in x - below)
        lines.append([name, *common.difference_cells(x - below), by_seed])
    return f"\n## {title}\n\n{common.markdown(['', *common.DIFFERENCE, 'by seed'], lines)}"


def shares_picture(found: dict, metrics, path: Path) -> str:
    """The profile's share by arm: a stroke for each seed, their mean, its 95 % over authors."""
    names = [name for name in found if SHARE in found[name][metrics[0]]]

    def draw(figure) -> None:
        for axis, metric in zip(figure.subplots(1, 2, sharey=True), metrics, strict=True):
            for n, name in enumerate(names):
                share = found[name][metric][SHARE]
                _, *ends = common.bootstrap(share)["users"]
                axis.plot(ends, [n, n], f"C{n}", linewidth=2)
                axis.plot(share.mean(), n, f"C{n}o", markersize=9)
                axis.plot(share.mean(1), [n] * len(share), "k|", markersize=12)
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set(title=f"{SHARE} of {metric}")
        figure.axes[0].set_yticks(range(len(names)), names)
        figure.axes[0].invert_yaxis()

    return common.picture(path, (10, 1 + 0.4 * len(names)), draw)


def report(o: Options, examples) -> str:
    found, shown, scores = collect(o, examples), ("rouge-1", "form"), []
    for name, x in found.items():
        both = ([x[m][side] for side in SIDES if side in x[m]] for m in METRICS)
        scores.append([name, *(" / ".join(map(common.mean, sides)) for sides in both)])
    text = f"""# {o.task}: {Path(o.model).name}, {len(examples)} held-out records

Greedy answers. Each author is the mean of their records; ± is the deviation between seeds.
Intervals over users hold the trained policies fixed; those over seeds (Student's t) hold the users
fixed. The share is the score with the profile minus that of the same policy without.

{common.markdown(["as trained / without profile", *METRICS], scores)}
{shares_picture(found, shown, Path(o.out) / o.task / "shares.png")}"""
    bases = [ARMS[arm][0] for arm in ("accuracy", "warm", "none", "warm_none")]
    tables = [*product(shown, (SHARE, ENDED), (None, *bases[:2]))]
    tables += product(METRICS, ["own"], bases)
    for metric, side, base in tables:
        text += differences(found, metric, side, base) if base in (None, *found) else ""
    return text


def main(o: Options) -> None:
    prlm.load_tokenizer(o.model)  # mistakes are said now
    examples = retrieve.load_examples(o, "dev")
    if o.reward_model:
        reward.load_reward_model(o.reward_model)
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
