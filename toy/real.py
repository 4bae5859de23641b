"""Does the policy use the profile, and does a judge make it use it more? Asked of real text.

Every training is a run of rl.py, every further score one of eval.py or reward.py; the commands are
printed, so that each can be pasted. What is there already is not made again: stopped at any moment,
the same command goes on. The tables go to report.md in --out.

    python tests/smollm2.py models/smollm2
    python toy/commits.py REPO [REPO ...] --out data
    python toy/real.py --model models/smollm2 --data data          # hours on two cores
    python toy/real.py ... --device cuda --jobs 6                  # several runs share a GPU
    python toy/real.py ... --task LaMP-7 --limit 500 --arms warm,prlm

The headline is the profile's share: what a policy scores when it is shown the profile, minus what
the same policy scores without. Held-out authors are in two halves. Recipes are chosen on one; the
other is looked at once, at the end, with --half report.
"""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import reward
import rl
from prlm import option
from toy import common
from toy.commits import same_manner

# ---- The arms: (name in the tables, options of rl.py). All but two start from the warm start of
# their own seed; a run of its own, so that all of them have the same.

RATIO = {"judge": "ratio"}
ARMS = {
    "warm": ("warm start", {"steps": 0, "personalization": 0.0}),
    "none": ("trained without profiles", {"k": 0, "personalization": 0.0}),
    "prlm": ("GRPO, accuracy alone", {"personalization": 0.0}),
    "bert": ("… with the paper's judge, .1", {"personalization": 0.1, "pairs_per_query": 1}),
    "ratio.1": ("… with the ratio judge, .1", {"personalization": 0.1, **RATIO}),
    "ratio.3": ("… with the ratio judge, .3", {"personalization": 0.3, **RATIO}),
    "ratio1": ("… with the ratio judge, 1", {"personalization": 1.0, **RATIO}),
    "closed": ("GRPO without reasoning", {"personalization": 0.0, "reasoning": False}),
    "no_gold": (
        "ratio and KL, no gold texts",
        {"accuracy": 0.0, "personalization": 1.0, "beta": 0.3, **RATIO},
    ),
}
FIRST = ("warm", "none")  # they bring their own warm start
ROUGE, MANNER = ("rouge-1", "rouge-l"), ("form", "kind", "prefix")
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


# ---- Commands --------------------------------------------------------------------------------


def arms_of(o: Options) -> list[str]:
    wanted = o.arms.split(",")
    if unknown := {*wanted} - ARMS.keys():
        raise ValueError(f"--arms knows {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
    return [arm for arm in ARMS if arm in {"warm", *wanted} and (arm != "bert" or o.encoder)]


def place(o: Options, arm: str, seed: int) -> Path:
    return Path(o.out) / o.task / f"{arm}_seed{seed}"


def more_of(o: Options) -> dict:
    return prlm.parse_flags(rl.Options, "", shlex.split(o.more))


def items_of(o: Options) -> int:
    """How many profile items a prompt with the profile has."""
    return more_of(o).get("k", prlm.PRESETS["small"]["k"])


def options_of(o: Options, arm: str, seed: int) -> dict:
    """The options of a training, as rl.py takes them."""
    same = {"model": o.model, "preset": "small", "data": o.data, "task": o.task, "limit": o.limit}
    same |= {"encoder": o.encoder, "seed": seed, "steps": o.steps, "eval_every": 0, "force": True}
    if arm in FIRST:
        same["warm_start"] = o.warm
    else:
        same["model"] = str(place(o, "warm", seed) / "checkpoint")
    return {**same, "device": o.device, **more_of(o), **ARMS[arm][1]}


def without(o: Options, arm: str, seed: int) -> tuple[list[str], Path]:
    """The command that scores an arm on the side that rl.py does not, and the file it leaves."""
    run = place(o, arm, seed)
    k = items_of(o) if ARMS[arm][1].get("k") == 0 else 0
    options = {"run": run, "k": k, "limit": o.limit, "device": o.device, "temperature": 0.0}
    out = run / "other_side"
    return common.command("eval.py", {**options, "overwrite": True, "out": out}), (
        out / "scores.json"
    )


def swap(o: Options, arm: str, seed: int) -> tuple[list[str], Path]:
    """The command that examines the ratio under an arm's policy, and the report that it leaves."""
    known = {field.name for field in fields(reward.Options)}
    options = {n: x for n, x in options_of(o, arm, seed).items() if n in known}
    options |= {"model": place(o, arm, seed) / "checkpoint", "judge": "ratio", "k": items_of(o)}
    out = place(o, arm, seed) / "swap_test"
    return common.command("reward.py", {**options, "overwrite": True, "out": out}), (
        out / "report.json"
    )


def chain(o: Options, arm: str, seed: int) -> list[tuple[list[str], Path]]:
    """All commands of an arm and seed, each with the file that shows it is done."""
    out, options = place(o, arm, seed), options_of(o, arm, seed)
    common.is_done(out, options)  # else ValueError, now and not after hours
    train = common.command("rl.py", {**options, "out": out, "resume": True})
    return [(train, out / "predictions.json"), without(o, arm, seed), swap(o, arm, seed)]


def tidy(o: Options, arm: str, seed: int) -> None:
    """Deletes the saved states of a finished run: 1.6 GB each for 135 M parameters."""
    for file in ("trainer.pt", "warm_start/trainer.pt", "warm_start/model.safetensors"):
        if (place(o, arm, seed) / "predictions.json").is_file():
            (place(o, arm, seed) / file).unlink(missing_ok=True)


# ---- What comes out of it --------------------------------------------------------------------


def score(task: str, answer: str, target: str) -> dict:
    """All metrics of an answer: ROUGE, and for commits what ROUGE does not see, the manner."""
    return scoring.rouge(answer, target) | (same_manner(answer, target) if manners(task) else {})


def manners(task: str) -> tuple[str, ...]:
    return MANNER if task == "commits" else ()


class Authors:
    """The held-out authors of one half, and how records become one number for each."""

    def __init__(self, o: Options):
        self.task = o.task
        self.examples = retrieve.load_lamp(o.data, o.task, "dev")[: o.limit or None]
        users = sorted({example.user_id for example in self.examples})
        shown = {"choose": users[::2], "report": users[1::2], "all": users}[o.half]
        self.rows = {user: n for n, user in enumerate(shown)}

    def means(self, answers: dict[str, str], metric: str) -> np.ndarray:
        """The metric's mean over each author's records; NaN for one with none that has it. [N]"""
        values = [[] for _ in self.rows]
        for e in self.examples:
            if e.user_id in self.rows:
                value = score(self.task, answers[e.id], e.target)[metric]
                values[self.rows[e.user_id]] += [] if value is None else [float(value)]
        return np.array([np.mean(found) if found else np.nan for found in values])


def finished(o: Options, arm: str) -> list[int]:
    return [
        seed for seed in range(o.seeds)
        if all(result.is_file() for _, result in chain(o, arm, seed)[:2])
    ]  # fmt: skip


def answers_of(o: Options, arm: str, seed: int, side: str) -> dict[str, str]:
    """{record id: answer} with or without the profile."""
    own = "without" if ARMS[arm][1].get("k") == 0 else "with"
    file = "held_out/after.jsonl" if side == own else "other_side/samples.jsonl"
    return {r["id"]: r["answer"] for r in prlm.read_lines(place(o, arm, seed) / file)}


def collect(o: Options, authors: Authors) -> dict:
    """{arm: {metric: {side: [seeds, authors]}}} of the arms that have a finished seed.

    Authors for whom a metric says nothing are left out of it, in all arms alike.
    """
    found = {}
    for arm in arms_of(o):
        if seeds := finished(o, arm):
            answers = {s: [answers_of(o, arm, n, s) for n in seeds] for s in SIDES}
            found[arm] = {"seeds": seeds}
            for metric in (*ROUGE, *manners(o.task)):
                both = {s: np.stack([authors.means(a, metric) for a in answers[s]]) for s in SIDES}
                found[arm][metric] = {s: x[:, ~np.isnan(x[0])] for s, x in both.items()}
    return found


def shares(found: dict, arm: str, metric: str, seeds: list[int]) -> np.ndarray:
    """The profile's share of a metric, with minus without, of these seeds. [seeds, authors]"""
    rows = [found[arm]["seeds"].index(seed) for seed in seeds]
    return (found[arm][metric]["with"] - found[arm][metric]["without"])[rows]


def copied(o: Options, authors: Authors) -> dict[str, dict[str, str]]:
    """Answers without any model: the query, and what the nearest item's answer was."""
    rank = retrieve.make_ranker(retrieve.PromptOptions(data=o.data, task=o.task))
    *_, field = retrieve.task_of(o.task).fields
    nearest = {e.id: next((i[field] for i in rank(e, 1)), "") for e in authors.examples}
    queries = {e.id: e.query for e in authors.examples}
    return {"copying the query": queries, "copying the nearest item": nearest}


def scores_table(o: Options, authors: Authors, found: dict) -> str:
    metrics = (*ROUGE, *manners(o.task))
    rows = [
        [name, "", *(common.mean([authors.means(answers, m)]) for m in metrics)]
        for name, answers in copied(o, authors).items()
    ]
    for arm, scores in found.items():
        row = [ARMS[arm][0], len(scores["seeds"])]
        for metric in metrics:
            row.append(" / ".join(common.mean(scores[metric][s]) for s in SIDES))
        rows.append(row)
    return common.markdown(["with / without profile", "seeds", *metrics], rows)


def shares_table(o: Options, found: dict, metric: str, base: str | None = None) -> str:
    """Each arm's share of the profile, or by how much it is above that of the arm `base`."""
    rows = []
    for arm in found:
        seeds = found[arm]["seeds"]
        if base:
            seeds = [seed for seed in seeds if seed in found[base]["seeds"]]
        if arm == base or not seeds:
            continue
        ours = shares(found, arm, metric, seeds)
        theirs = shares(found, base, metric, seeds) if base else np.zeros_like(ours)
        by_seed = " ".join(f"{x:+.3f}" for x in (ours - theirs).mean(1))
        rows.append([ARMS[arm][0], *common.against(ours, theirs), by_seed])
    return common.markdown(["", *common.AGAINST, "by seed"], rows)


def judges_table(o: Options, found: dict) -> str:
    """What the judges know: pair accuracy and swap test, before RL and, of the ratio, after."""
    rows = []
    for arm, scores in found.items():
        columns = {"pair_accuracy": [], "before": [], "after": []}
        for seed in scores["seeds"]:
            for folder, key in (("reward", "before"), ("swap_test", "after")):
                file = place(o, arm, seed) / folder / "report.json"
                report = prlm.read_json(file) if file.is_file() else {}
                columns["pair_accuracy"] += [report[k] for k in report if k == "pair_accuracy"]
                columns[key] += [report[k] for k in report if k == "swap_test" and report[k]]
        rows.append([ARMS[arm][0], *map(common.mean, columns.values())])
    names = ["", "pair accuracy of the arm's judge", "its swap test", "the ratio's under the arm"]
    return common.markdown(names, rows)


def training_table(o: Options, found: dict) -> str:
    """What the rollouts earned in the first and the last quarter of the steps."""
    keys = ["accuracy", "personalization", "spread", "zero_spread_groups", "entropy", "truncated"]
    keys += ["completion_tokens", "kl"]
    rows = []
    for arm in (arm for arm in found if arm != "warm"):
        logs = [
            prlm.read_lines(place(o, arm, s) / "metrics.jsonl") for s in found[arm]["seeds"]
        ]  # [S][steps]
        part = max(1, len(logs[0]) // 4)
        row = [ARMS[arm][0]]
        for key in keys:
            ends = (slice(part), slice(-part, None))
            row.append(" → ".join(f"{np.mean([[x[key] for x in g[e]] for g in logs]):.3g}"
                                  for e in ends))  # fmt: skip
        rows.append(row)
    return common.markdown(["", *keys], rows)


def draw_shares(figure, found: dict, metrics: tuple[str, ...]) -> None:
    """The profile's share by arm: a dot a seed, the interval over users around their mean."""
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for row, arm in enumerate(found):
            ours = shares(found, arm, metric, found[arm]["seeds"])
            _, low, high = common.bootstrap(ours, np.zeros_like(ours))["users"]
            axis.plot([low, high], [row, row], color="gray")
            axis.plot(ours.mean(1), [row] * len(ours), "o", color=f"C{row}")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=f"the profile's share of {metric}", yticks=range(len(found)))
        axis.set_yticklabels([ARMS[arm][0] for arm in found])
    axes[0].invert_yaxis()


HOW = """Greedy answers. Each author is the mean of their records; ± is the deviation between seeds.
Intervals over users hold the trained policies fixed; those over seeds (Student's t) hold the users
fixed. The share is the score with the profile minus that of the same policy without.
"""


def report(o: Options) -> str:
    authors = Authors(o)
    found = collect(o, authors)
    who = f"{len(authors.rows)} held-out authors ({o.half})"
    text = f"# {o.task}: {Path(o.model).name}, {who}\n\n{HOW}\n{scores_table(o, authors, found)}"
    shown = ("rouge-1", "form") if manners(o.task) else ROUGE
    for metric in shown:
        text += f"\n## The profile's share of {metric}\n\n{shares_table(o, found, metric)}"
        if "prlm" in found:
            text += f"\n… above that of {ARMS['prlm'][0]}\n\n"
            text += shares_table(o, found, metric, "prlm")
    path = Path(o.out) / o.task / f"shares_{o.half}.png"
    if found:
        text += "\n" + common.picture(draw_shares, path, found, shown)
    text += f"\n## The judges (.5 is chance)\n\n{judges_table(o, found)}"
    return text + f"\n## The rollouts, first and last quarter\n\n{training_table(o, found)}"


def main(o: Options) -> None:
    retrieve.load_lamp(o.data, o.task, "dev")  # a mistake is said now
    names = {(arm, n): f"{o.task} {arm} seed {n}" for n in range(o.seeds) for arm in arms_of(o)}
    work = {name: chain(o, *key) for key, name in names.items()}
    needs = {name: names["warm", seed] for (arm, seed), name in names.items() if arm not in FIRST}
    keys = {name: key for key, name in names.items()}
    logs = Path(o.out) / "log"
    failed = common.run_jobs(work, o.jobs, logs, needs, lambda job: tidy(o, *keys[job]))
    text = report(o)
    path = Path(o.out) / o.task / f"report_{o.half}.md"
    prlm.write_text(path, text)
    print(f"{text}\n{path}")
    if failed:
        raise ValueError("not all is there:\n" + "\n".join(failed))


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
