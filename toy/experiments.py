"""The paper's questions, asked of the toy world by one command.

  1. Does reasoning trained by RL beat plain personalized RAG?   (three tasks, five rows)
  2. What do the reasoning and the contrastive reward each contribute?   (one change at a time)
  3. Is it robust to how many items are retrieved, and by what?   (k by retriever)
  4. What does the judge know, and what does a policy learn from it, alone too?
     (pair accuracy, swap test, rivals, correlation with ROUGE; rewards without gold texts)

Every training is a run of rl.py with the options that its row changes, so it can be stopped and
resumed (the supervised baseline is rl.py's warm start alone). One process and thread per core.
The report states, it does not judge: what the figures mean stands in the README.

    python toy/experiments.py --quick        # one seed of the main table
    python toy/experiments.py                # everything, three seeds
"""

import contextlib
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import reward
import rl

# ---- The arms: what each row of a table changes ---------------------------------------------

# Form and judge alone: what the users really wrote is not rewarded.
NO_GOLD = {"accuracy": 0.0, "personalization": 1.0, "eval_every": 10}
KL = {"beta": 0.3}  # stay near the base: a judge of style alone forgets what the query is about
ARMS = {  # key: (its name in the tables, the options of rl.py that differ)
    "prlm": ("PrLM", {}),
    "no_reasoning": ("GRPO without reasoning", {"reasoning": False}),
    "sft": ("supervised on the answers", {"reasoning": False, "personalization": 0.0}),
    "no_judge": ("without the personalization reward", {"personalization": 0.0}),
    "untrained": ("reward model untrained", {}),
    "negatives4": ("InfoNCE with 4 negatives", {"negatives": 4}),
    "ratio": ("ratio judge", {"judge": "ratio"}),
    "ratio1": ("ratio judge, weight 1", {"judge": "ratio", "personalization": 1.0}),
    "bert_no_gold": ("no gold texts, PrLM's judge", NO_GOLD),
    "ratio_no_gold": ("no gold texts, ratio judge", NO_GOLD | {"judge": "ratio"}),
    "bert_no_gold_kl": ("no gold texts, PrLM's judge, KL", NO_GOLD | KL),
    "ratio_no_gold_kl": ("no gold texts, ratio judge, KL", NO_GOLD | KL | {"judge": "ratio"}),
}
MAIN = ["sft", "no_reasoning", "prlm"]
WITHOUT_GOLD = ["bert_no_gold", "ratio_no_gold", "bert_no_gold_kl", "ratio_no_gold_kl"]
ABLATIONS = ["prlm", "no_reasoning", "no_judge", "untrained", "negatives4", "ratio", "ratio1"]
ABLATIONS += WITHOUT_GOLD
JUDGES = ["prlm", "negatives4", "untrained", "ratio"]  # arms whose judges differ
RETRIEVERS, ITEMS = ["random", "recency", "bm25", "dense"], [1, 2, 4, 8]
TASK = "LaMP-4"  # of everything but the main table


@dataclass
class Options:
    bounds = {1: "seeds steps jobs"}  # noqa: RUF012
    quick: bool = False  # one seed of the main table, and nothing else
    seeds: int = 3  # trainings of every arm
    steps: int = 60  # of every training
    jobs: int = 2  # processes at a time, each on one core
    model: str = prlm.beside("toy/policy")  # checkpoint directory of the base policy
    encoder: str = prlm.beside("toy/encoder")  # BERT checkpoint
    data: str = prlm.beside("toy/lamp")  # directory with LaMP's files
    out: str = "runs/experiments"  # what is there already is not computed again


def tasks(o: Options) -> list[str]:
    """Those that the data directory holds."""
    return [task for task in retrieve.TASKS if (Path(o.data) / task.replace("-", "_")).is_dir()]


def options_of(o: Options, task: str, arm: str, seed: int) -> rl.Options:
    """The options of an arm's training: `python rl.py` with these does the same."""
    out = str(Path(o.out) / task / arm / f"seed{seed}")
    same = {"model": o.model, "encoder": o.encoder, "data": o.data, "device": "cpu"}
    same |= {"task": task, "seed": seed, "steps": o.steps, "out": out}
    if arm == "sft":  # a warm start and nothing after it, as many records a step as RL has prompts
        same |= {"steps": 0, "warm_start": o.steps, "warm_start_batch": 16, "warm_start_lr": 1e-3}
    return rl.Options(**same, **ARMS[arm][1])


# ---- Trainings ------------------------------------------------------------------------------


def untrained_model(o: rl.Options) -> str:
    """The directory of a reward model that has learned nothing, made beside the run."""
    folder = Path(o.out).with_name(f"judge{o.seed}")
    torch.manual_seed(o.seed)
    reward.save_reward_model(reward.RewardModel(prlm.load_encoder(o.encoder)), folder)
    return str(folder)


def train(o: Options, task: str, arm: str, seed: int) -> None:
    chosen = options_of(o, task, arm, seed)
    if arm == "untrained":
        chosen = replace(chosen, reward_model=untrained_model(chosen))
    rl.main(chosen)


def read_scores(o: rl.Options) -> dict:
    return prlm.read_json(Path(o.out) / "scores.json")


# ---- Answers of any policy to any prompt ----------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One evaluation: a policy, the base (seed None) or a trained one, and how it is asked."""

    task: str
    arm: str
    seed: int | None
    k: int = 4
    retriever: str = "bm25"

    def path(self, o: Options) -> Path:
        name = f"{self.task} {self.arm} {self.seed} {self.k} {self.retriever}.json"
        return Path(o.out) / "answers" / name.replace(" ", "_")


def answer(o: Options, cell: Cell) -> None:
    """Greedy answers for the held-out users, into the cell's file, once."""
    if cell.path(o).is_file():
        return
    how = replace(
        options_of(o, cell.task, cell.arm, cell.seed or 0), k=cell.k, retriever=cell.retriever
    )
    folder = o.model if cell.seed is None else Path(how.out) / "checkpoint"
    decoder, tokenizer = prlm.load_decoder(folder), prlm.load_tokenizer(folder)
    held = retrieve.load_lamp(o.data, cell.task, "dev")
    _, answers = scoring.evaluate(decoder, tokenizer, held, how)
    cell.path(o).parent.mkdir(parents=True, exist_ok=True)
    prlm.write_json(cell.path(o), answers)


def scores_of(o: Options, cell: Cell) -> dict[str, np.ndarray]:
    """Each metric of each held-out user [N]."""
    held, answers = retrieve.load_lamp(o.data, cell.task, "dev"), prlm.read_json(cell.path(o))
    rows = [scoring.score(answers[e.id], e.target) for e in held]
    return {metric: np.array([row[metric] for row in rows]) for metric in scoring.METRICS}


# ---- Work, shared out -----------------------------------------------------------------------


def prepare() -> None:
    """A worker: one thread, no progress bar of its own, and no life after its parent's."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def quietly(o: Options, work, name: str) -> str:
    """Runs work() with what it prints in a log file."""
    log = Path(o.out) / "log" / f"{name.replace(' ', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        work()
    return name


def share_out(o: Options, work: dict, title: str) -> None:
    """All of {name: function}, --jobs at a time, under one progress bar."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(o.jobs, context, prepare) as pool:
        futures = [pool.submit(quietly, o, job, name) for name, job in work.items()]
        try:
            with tqdm(as_completed(futures), title, len(futures), disable=None) as bar:
                for future in bar:
                    bar.set_postfix_str(future.result())
        except BaseException:  # Ctrl-C too: what is under way will be resumed another time
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


# ---- What comes out of it -------------------------------------------------------------------


def bootstrap(ours: np.ndarray, theirs: np.ndarray, draws=10_000) -> tuple[float, float, float]:
    """(p, low, high) of mean(ours - theirs) over users [N], who are redrawn with replacement.

    p is two-sided: twice the smaller share of redrawn means on either side of 0. The interval is
    that of 95 %. Paired: a user brings both scores, each the mean over seeds, so what differs
    between seeds is not in it.
    """
    difference, rng = ours - theirs, np.random.default_rng(0)
    drawn = rng.integers(0, len(difference), (draws, len(difference)))
    means = difference[drawn].mean(1)  # [draws]
    tail = min((means <= 0).sum(), (means >= 0).sum()) + 1
    low, high = np.quantile(means, [0.025, 0.975])
    return min(1.0, 2 * tail / (draws + 1)), float(low), float(high)


def compare(scores: dict, task: str, rows: dict[str, list[Cell]], ours: str) -> list[dict]:
    """A line a row: mean and spread of each metric over its seeds, and `ours` against it.

    `scores` holds scores_of each cell.
    """
    users = {name: [scores[cell] for cell in cells] for name, cells in rows.items()}
    best = np.mean([scores["rouge-l"] for scores in users[ours]], 0)  # [N]
    lines = []
    for name, seeds in users.items():
        line = {"task": task, "row": name, "seeds": len(seeds), "users": len(best)}
        for metric in scoring.METRICS:
            means = [float(scores[metric].mean()) for scores in seeds]
            line[metric] = float(np.mean(means))
            line[f"{metric}_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
        if name != ours:
            theirs = np.mean([scores["rouge-l"] for scores in seeds], 0)
            line["p"], line["low"], line["high"] = bootstrap(best, theirs)
        lines.append(line)
    return lines


def correlation(path: Path) -> tuple[float, float]:
    """Pearson's r of the learned reward and ROUGE over a run's samples: all, and within groups.

    Within: both minus the mean of their prompt's group, which is all that advantages see.
    """
    samples = [line for line in prlm.read_lines(path) if line["personalization"] > 0]
    pairs = np.array([[line["personalization"], line["accuracy"]] for line in samples])
    groups = np.unique([f"{line['step']} {line['id']}" for line in samples], return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, column) for column in pairs.T], 1)
    within = pairs - (sums / np.bincount(groups)[:, None])[groups]
    return tuple(float(np.corrcoef(x.T)[0, 1]) if x.std(0).all() else 0.0 for x in (pairs, within))


def held_out_accuracy(o: rl.Options, pairs: list[dict]) -> float:
    """The pair accuracy of a run's judge on the held-out ones of these pairs."""
    decoder, tokenizer = prlm.load_decoder(o.model), prlm.load_tokenizer(o.model)
    judge = reward.make_judge(o, decoder, tokenizer, [], Path(o.out) / "reward")
    examples = {e.id: e for e in retrieve.load_lamp(o.data, o.task, "train")}
    _, held = reward.split_pairs(pairs, o.seed)
    rows = [(examples[p["id"]], p["positive"], text) for p in held for text in p["negatives"]]
    asked, better, worse = zip(*rows, strict=True)
    return reward.prefers(judge, own=(asked, better), other=(asked, worse))


def judges(o: Options, seeds: range) -> list[dict]:
    """What each arm's judge knows, and the policy that it has trained; a line an arm and seed.

    Judges that rl.py trains are asked about the held-out of their own pairs, others of PrLM's.
    """
    lines = []
    for arm in JUDGES:
        for seed in seeds:
            run = options_of(o, TASK, arm, seed)
            out, trained = Path(run.out), Path(options_of(o, TASK, "prlm", seed).out)
            if arm == "untrained":
                run = replace(run, reward_model=untrained_model(run))
            found = {}
            if arm in ("untrained", "ratio"):
                pairs = prlm.read_json(trained / "reward" / "pairs.json", list)
                found["pair_accuracy"] = held_out_accuracy(run, pairs)
            report = prlm.read_json(out / "reward" / "report.json") | found
            total, within = correlation(out / "samples.jsonl")
            report |= {"r": total, "r_group": within}
            report["rouge-l"] = read_scores(run)["after"]["rouge-l"]
            lines.append({"row": ARMS[arm][0], "seed": seed, **report})
    return lines


def efforts(o: Options, task: str, arms: list[str], seeds: range) -> list[dict]:
    """What a training cost: sampled tokens, and seconds of rollouts and updates."""
    lines = []
    for arm in arms:
        for seed in seeds:
            run = options_of(o, task, arm, seed)
            metrics, rows = prlm.read_lines(Path(run.out) / "metrics.jsonl"), run.prompts_per_step
            size = rows * run.group_size
            sampled = sum(line.get("completion_tokens", 0) * size for line in metrics)
            seconds = sum(
                line.get("seconds_rollout", 0) + line.get("seconds_update", 0) for line in metrics
            )
            cost = {"steps": run.steps, "sampled_tokens": round(sampled), "seconds": round(seconds)}
            lines.append({"task": task, "row": ARMS[arm][0], "seed": seed, **cost})
    return lines


# ---- The report -----------------------------------------------------------------------------


def markdown(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def spread(line: dict, key: str) -> str:
    deviation = line.get(f"{key}_sd")
    return f"{line[key]:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def show_rows(lines: list[dict]) -> str:
    ours = next(line for line in lines if "p" not in line)
    names = ["", *scoring.METRICS, f"{ours['row']} − this, ROUGE-L, 95 %", "p"]
    rows = []
    for line in lines:
        against = ["", ""]
        if "p" in line:
            gain = ours["rouge-l"] - line["rouge-l"]
            against = [
                f"{gain:+.3f} ({line['low']:+.3f} … {line['high']:+.3f})",
                f"{line['p']:.4f}",
            ]
        rows.append([line["row"], *(spread(line, metric) for metric in scoring.METRICS), *against])
    return markdown(names, rows)


def average(lines: list[dict], keys: list[str]) -> list[list[str]]:
    """Rows of a table: each name's mean ± standard deviation over its seeds."""
    rows = []
    for name in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == name]
        cells = [name]
        for key in keys:
            values = [line[key] for line in mine if key in line]
            deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{deviation}" if values else "–")
        rows.append(cells)
    return rows


def draw_curves(o: Options, arms: list[str], seeds: range, path: Path) -> None:
    """Held-out ROUGE-L, completion length and closed reasoning by step, the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = {
        "eval_rouge-l": "held-out ROUGE-L, greedy",
        "completion_tokens": "tokens a completion",
        "format": "reasoning closed",
    }
    for axis, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for arm in arms:
            runs = [Path(options_of(o, TASK, arm, seed).out) for seed in seeds]
            logs = [prlm.read_lines(run / "metrics.jsonl") for run in runs]
            if any(key not in line for log in logs for line in log[-1:]):
                continue
            steps = [line["step"] for line in logs[0] if key in line]
            values = np.mean([[line[key] for line in log if key in line] for log in logs], 0)
            if key == "eval_rouge-l" and arm != "sft":
                before = np.mean(
                    [read_scores(options_of(o, TASK, arm, s))["before"]["rouge-l"] for s in seeds]
                )
                steps, values = [0, *steps], [before, *values]
            axis.plot(steps, values, f"C{[*ARMS].index(arm)}", label=ARMS[arm][0])
        axis.set(title=title, xlabel="step")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_grid(grid: list[dict], path: Path) -> None:
    """Held-out ROUGE-L by k, a line a retriever, a panel a policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    names = list(dict.fromkeys(line["row"] for line in grid))
    for axis, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for retriever in RETRIEVERS:
            mine = [line for line in grid if (line["row"], line["retriever"]) == (name, retriever)]
            axis.plot(
                [line["k"] for line in mine],
                [line["rouge-l"] for line in mine],
                "o-",
                label=retriever,
            )
        axis.set(title=name, xlabel="items in the prompt", xticks=ITEMS)
    figure.axes[0].set(ylabel="held-out ROUGE-L, greedy")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def pictures(draw, *arguments) -> str:
    """The Markdown of a picture, or why there is none."""
    try:
        draw(*arguments)
    except ImportError:
        return "(no picture: matplotlib is not installed)\n"
    return f"![]({arguments[-1].name})\n"


def report(o: Options, results: dict, seeds: range) -> str:
    out, text = Path(o.out), "# The paper's questions, asked of the toy world\n"
    arms = MAIN if o.quick else list(ARMS)
    text += (
        f"\n{len(seeds)} seed(s), {o.steps} steps each; greedy answers for held-out users; mean ± "
    )
    text += (
        "standard deviation over seeds.\np: paired bootstrap over users, 10,000 draws, two-sided.\n"
    )
    for task in tasks(o):
        lines = [line for line in results["main"] if line["task"] == task]
        text += f"\n## {task}: {lines[0]['users']} held-out users\n\n{show_rows(lines)}"
    if not o.quick:
        text += f"\n## One change at a time, {TASK}\n\n" + show_rows(results["ablations"])
        text += f"\n## Other prompts than in training (k 4, bm25), {TASK}, ROUGE-L\n"
        for name in dict.fromkeys(line["row"] for line in results["grid"]):
            cells = {
                (c["retriever"], c["k"]): c["rouge-l"] for c in results["grid"] if c["row"] == name
            }
            best = max(cells.values())
            rows = [
                [r, *(f"{cells[r, k]:.3f} ({cells[r, k] - best:+.3f})" for k in ITEMS)]
                for r in RETRIEVERS
            ]
            text += f"\n{name} (in brackets: from its best cell)\n\n"
            text += markdown(["", *(f"k = {k}" for k in ITEMS)], rows)
        text += "\n" + pictures(draw_grid, results["grid"], out / "robustness.png")
        keys = ["pair_accuracy", "swap_test", "own_over_other", "own_over_plain", "r", "r_group"]
        names = ["", "pair accuracy", "swap test", "own over another user's style"]
        names += ["own over a plain one", "r with ROUGE", "r within a group", "ROUGE-L after RL"]
        keys.append("rouge-l")
        text += "\n## The judges (shares are .5 by chance)\n\n"
        text += markdown(names, average(results["judges"], keys))
    text += "\n## Learning curves, " + TASK + "\n\n"
    shown = [arm for arm in arms if arm not in WITHOUT_GOLD]
    text += pictures(draw_curves, o, shown, seeds, out / "curves.png")
    if not o.quick:
        text += "\n## Learning curves without gold texts, " + TASK + "\n\n"
        text += pictures(draw_curves, o, WITHOUT_GOLD, seeds, out / "no_gold.png")
    costs = ["steps", "sampled_tokens", "seconds"]
    rows = []
    for name in dict.fromkeys(line["row"] for line in results["efforts"]):
        mine = [line for line in results["efforts"] if line["row"] == name]
        rows.append([name, *(f"{np.mean([line[key] for line in mine]):,.0f}" for key in costs)])
    text += "\n" + markdown(["", "steps", "sampled tokens", "seconds on one core"], rows)
    return text


def main(o: Options) -> None:
    seeds = range(1 if o.quick else o.seeds)
    work = {}
    for seed in seeds:  # a whole seed first: an early look at all rows
        for task in tasks(o):
            for arm in dict.fromkeys(MAIN + (ABLATIONS if task == TASK and not o.quick else [])):
                work[f"{task} {arm} seed {seed}"] = partial(train, o, task, arm, seed)
    share_out(o, work, "trainings")

    main_rows = {}
    for task in tasks(o):
        rows = {
            "no profile": [Cell(task, "prlm", None, k=0)],
            "RAG base": [Cell(task, "prlm", None)],
            "RAG base, reasoning closed": [Cell(task, "no_reasoning", None)],
        }
        rows |= {ARMS[arm][0]: [Cell(task, arm, seed) for seed in seeds] for arm in MAIN}
        main_rows[task] = rows
    ablations = {ARMS[arm][0]: [Cell(TASK, arm, seed) for seed in seeds] for arm in ABLATIONS}
    tested = {"RAG base": [("prlm", None)]}
    tested |= {ARMS[arm][0]: [(arm, seed) for seed in seeds] for arm in ("no_reasoning", "prlm")}
    grid = {
        (name, retriever, k): [Cell(TASK, *policy, k, retriever) for policy in policies]
        for name, policies in tested.items()
        for retriever in RETRIEVERS
        for k in ITEMS
    }
    groups = [cells for rows in main_rows.values() for cells in rows.values()]
    if not o.quick:
        groups += [*ablations.values(), *grid.values()]
    cells = dict.fromkeys(cell for group in groups for cell in group)
    share_out(o, {cell.path(o).stem: partial(answer, o, cell) for cell in cells}, "answers")

    ours, scores = ARMS["prlm"][0], {cell: scores_of(o, cell) for cell in cells}
    results = {
        "main": [line for t, rows in main_rows.items() for line in compare(scores, t, rows, ours)]
    }
    results["efforts"] = efforts(o, TASK, MAIN if o.quick else list(ARMS), seeds)
    if not o.quick:
        results["ablations"] = compare(scores, TASK, ablations, ours)
        results["grid"] = [
            {"row": name, "retriever": retriever, "k": k}
            | {"rouge-l": float(np.mean([scores[cell]["rouge-l"].mean() for cell in policies]))}
            for (name, retriever, k), policies in grid.items()
        ]
        results["judges"] = judges(o, seeds)
    prlm.write_json(Path(o.out) / "results.json", results)
    prlm.write_text(Path(o.out) / "report.md", report(o, results, seeds))
    print(f"{o.out}/report.md, {o.out}/results.json")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
