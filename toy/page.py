"""Look at what RL did: a run, or an evaluation, as one HTML page that opens from disk.

First the result: without a profile, before and after RL, and the held-out score from step 0 on.
Then the same held-out prompts before and after, the largest gains and losses first. Then the
training: records followed from step to step, each completion with the parts of its reward, its
advantage, and its tokens shaded by how unlikely they were.

    python toy/page.py --run runs/toy        # writes runs/toy/report.html, and reward.png
"""

import contextlib
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
from eval import words
from prlm import Tokenizer
from retrieve import WITH_PROFILE, task_of

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
STAGES = {"no_profile": "no profile", "before": "before RL", "after": "after RL"}
MEANING = {  # of the reward: the weight where config.json names none, and what it is
    "accuracy": (1.0, "ROUGE-1 + ROUGE-2 + ROUGE-L of its answer"),
    "format": (0.1, "1 where it closes its reasoning on a line of its own, else 0"),
    "personalization": (0.1, "how personal the judge finds its answer"),
}
SHADES = (0.9, 0.5, 0.2, 0.05)  # a token below the n-th of these probabilities has shade n
MANY = 8  # different completions of a group that are shown
LONG = 400  # characters of a query, an item or an answer that are shown

LEGEND = """<p class="legend">Tokens are shaded by how unlikely the policy found them. Probability:
<i>.9 and more</i> <i class="s1">.5 to .9</i> <i class="s2">.2 to .5</i> <i class="s3">.05 to .2</i>
<i class="s4">below .05</i> A tap on a shaded token shows its own. <mark>Underlined</mark> words
are in the user's own text, too.</p>"""


@dataclass
class Options:
    bounds = {1: "records prompts steps tokens"}  # noqa: RUF012
    run: str = "runs/toy"  # directory of rl.py or eval.py; the page is written into it
    records: int = 3  # held-out records to show: so many gains, and so many losses
    prompts: int = 3  # training records to follow
    steps: int = 3  # steps of each, from its first to its last
    tokens: int = 240  # of a longer completion the middle is left out


def read(run: Path, name: str, missing):
    """What a run's file holds, or `missing` where it is not there yet."""
    path = run / name
    if not path.is_file():
        return missing
    if name == "metrics.jsonl":
        return prlm.read_steps(path)
    return prlm.read_lines(path) if path.suffix == ".jsonl" else prlm.read_json(path)


# ---- Text and numbers ------------------------------------------------------------------------


def clean(text) -> str:
    """Text of the data, of the policy or of a run's files as HTML: nothing in it acts or hides."""
    return escape(prlm.printable(str(text)))


def shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONG else text[:LONG] + " …"


def marked(text: str, target: str | None) -> str:
    """Text as HTML, the words that the target has too underlined."""
    wanted = set(words(target or ""))
    html = ""
    for part in re.split(r"([A-Za-z0-9]+)", text):
        html += f"<mark>{clean(part)}</mark>" if part.lower() in wanted else clean(part)
    return html


def number(value: float) -> str:
    """Three digits, without the zero in front: .423, −.017, 1.000."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}").replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign, in the sign's colour."""
    kind = "up" if value > 0 else "down" if value < 0 else "dim"
    return f'<b class="{kind}">{"+" if value > 0 else ""}{number(value)}</b>'


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(n * (len(items) - 1) / max(1, count - 1))] for n in range(count)]


# ---- The result ------------------------------------------------------------------------------


def result(scores: dict[str, dict], how: str) -> str:
    """The scores as a table of bars."""
    metrics = ("rouge-l", "rouge-1")
    rows = "<tr><th></th>" + "".join(f"<th>{metric.upper()}</th>" for metric in metrics) + "</tr>"
    for name, line in scores.items():
        if not isinstance(line, dict) or not {*metrics} <= line.keys():
            raise ValueError(f"scores.json: {name!r} holds no scores")
        cells = ""
        for metric in metrics:
            share = line[metric]
            cells += f'<td><div class="bar" style="--share:{share:.3f}">{number(share)}</div></td>'
        rows += f'<tr class="{clean(name)}"><th>{clean(STAGES.get(name, name))}</th>{cells}</tr>'
    return f"""<h2>The result</h2>
<p>ROUGE-L is the share of words that an answer has in common with what the user really wrote, in
the same order; 1 is word for word. ROUGE-1 forgives the order. {how}</p>
<table class="result">{rows}</table>"""


def held_out_curve(metrics: list[dict], scores: dict, name: str) -> list[tuple[float, float]]:
    """(step, score) of the held-out users, from step 0: the score before any training."""
    curve = [(0, scores["before"][name])] if "before" in scores else []
    key = f"eval_{name}"
    return curve + [(line["step"], line[key]) for line in metrics if key in line]


def block_means(points: list[tuple], most: int = 120) -> list[tuple[float, float]]:
    """The points; where they are too many to tell apart, the means of at most `most` blocks."""
    size = max(1, math.ceil(len(points) / most))
    blocks = [points[n : n + size] for n in range(0, len(points), size)]
    return [tuple(sum(axis) / len(block) for axis in zip(*block, strict=True)) for block in blocks]


def round_up(value: float) -> float:
    """The next number that looks well at an axis: 1, 1.5, 2, 3 … 8 times a power of 10."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(n for n in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if n * power >= value * 0.999)


def chart(title: str, curves: dict[str, list[tuple]], steps: int) -> str:
    """Named curves of (step, value) in one frame; the first one's values, if few, in numbers."""
    curves = {name: block_means(points) for name, points in curves.items() if points}
    if not curves:
        return ""
    width, height, left, right, top, bottom = 360, 190, 36, 10, 16, 22
    values = [value for points in curves.values() for _, value in points]
    low, high = 0.0 - round_up(-min(values)), round_up(max(values)) or 1.0

    def x(step: float) -> float:
        return left + (width - left - right) * step / max(steps, 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = []
    for value in (low, (low + high) / 2, high):
        line = f'x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line class="grid" {line}/>')
        parts.append(f'<text x="0" y="{y(value) + 4:.1f}">{value:.2g}</text>')
    parts.append(f'<text x="{left}" y="{height - 4}">step 0</text>')
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">{steps}</text>')
    for n, points in reversed([*enumerate(curves.values())]):  # the first one lies on top
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline class="c{n}" points="{places}"/>')
    points = next(iter(curves.values()))
    for n, (step, value) in enumerate(points if len(points) <= 8 else ()):
        parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"/>')
        rises = n == 0 and value < points[-1][1]  # then the line goes where the number would be
        place = f'x="{x(step) + 5 * rises:.1f}" y="{y(value) + (14 if rises else -8):.1f}"'
        place += ' text-anchor="end"' if step == steps else ""
        parts.append(f'<text class="value" {place}>{number(value)}</text>')
    keys = ""
    for n, name in enumerate(curves):
        line = f'<line class="c{n}" x1="0" x2="20" y1="4" y2="4"/>'
        keys += f'<span><svg class="key" viewBox="0 0 20 8">{line}</svg>{name}</span>'
    return f"""<figure><h3>{title}</h3><figcaption>{keys}</figcaption>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>
</figure>"""


def charts(metrics: list[dict], scores: dict) -> str:
    """Over the steps: held-out scores, the reward, and how many groups teach nothing."""
    steps = metrics[-1]["step"]

    def curve(key: str) -> list[tuple]:
        return [(line["step"], line[key]) for line in metrics if key in line]

    held = {name.upper(): held_out_curve(metrics, scores, name) for name in ("rouge-l", "rouge-1")}
    if "no_profile" in scores:
        level = scores["no_profile"]["rouge-l"]
        held["ROUGE-L, no profile"] = [(0, level), (steps, level)]
    groups = {
        "all rewards equal: they teach nothing": curve("zero_spread_groups"),
        "only the judge orders them": curve("judge_only_groups"),
    }
    reward = {"all completions of a step": curve("reward")}
    return f"""<div class="charts">{chart("Held-out users: greedy answers", held, steps)}
{chart("Training: mean reward", reward, steps)}
{chart("Training: share of the groups", groups, steps)}</div>"""


def draw_curves(run) -> None:
    """RUN/reward.png: reward and held-out ROUGE-L by step. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    metrics, scores = read(Path(run), "metrics.jsonl", []), read(Path(run), "scores.json", {})
    if not metrics:
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    steps, rewards = [line["step"] for line in metrics], [line["reward"] for line in metrics]
    left.plot(steps, rewards, "tab:blue", label="mean reward of what was sampled (left)")
    left.set(xlabel="step", ylabel="reward", xlim=(0, None), ylim=(min(0, *rewards), None))
    right, curve = left.twinx(), held_out_curve(metrics, scores, "rouge-l")
    label = "ROUGE-L of held-out users, greedy (right)"
    right.plot(
        [step for step, _ in curve], [y for _, y in curve], "o-", c="tab:orange", label=label
    )
    right.set(ylabel="ROUGE-L", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(Path(run) / "reward.png", dpi=120)


# ---- A completion's tokens -------------------------------------------------------------------


def pieces(sample: dict, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(text, log-probability) of each token; tokens that share a character come as one piece."""
    decode = partial(tokenizer.backend.decode, skip_special_tokens=False)
    found, held, before = [], [], []
    for id, logprob in zip(sample["tokens"], sample["logprobs"], strict=True):
        held.append((id, logprob))
        ids = [i for i, _ in held]
        # A token's text may depend on the one before: some tokenizers drop the first space.
        text = decode(before + ids)[len(decode(before)) :]
        if not text.endswith("\ufffd"):  # else the rest of a character's bytes is to come
            found.append((text, sum(x for _, x in held)))
            before, held = ids, []
    return [*found, ("\ufffd", sum(x for _, x in held))] if held else found


def shaded(found: list[tuple[str, float]], most: int) -> str:
    """Pieces as HTML, the unlikely ones in a shade; of more than `most` the middle is left out."""
    gap = len(found) - most
    if gap > 0:
        head = most * 2 // 3
        rest = f'<span class="dim"> … {gap} tokens are left out … </span>'
        return shaded(found[:head], most) + rest + shaded(found[head + gap :], most)
    html = ""
    for text, logprob in found:
        p = math.exp(logprob)
        shade = sum(p < bound for bound in SHADES)
        shown = number(p) if p >= 0.0005 else "&lt;.001"
        span = f'<i class="s{shade}" data-p="{shown}" tabindex="-1">{clean(text)}</i>'
        html += span if shade else clean(text)
    return html


def tokens(sample: dict, tokenizer: Tokenizer, most: int) -> str:
    """A completion's tokens, the reasoning apart from the answer."""
    found = pieces(sample, tokenizer)
    text, end = "".join(piece for piece, _ in found), 0
    if "</think>" in text:
        lengths = [*accumulate(len(piece) for piece, _ in found)]
        end = 1 + bisect_left(lengths, text.rindex("</think>") + len("</think>"))
        while end < len(found) and not found[end][0].strip():
            end += 1  # the line breaks between the two
    elif "<think>" in sample["completion"].rpartition("</think>")[2]:
        end = len(found)  # never closed; otherwise never opened, or closed by the prompt
    html = ""
    for name, part in (("reasoning", found[:end]), ("answer", found[end:])):
        if part:
            html += f'<div class="label">{name}</div><div class="tokens">{shaded(part, most)}</div>'
    return html + ("" if sample["finished"] else '<div class="label">cut off: too long</div>')


Show = Callable[[dict], str]  # `tokens` of the page's tokenizer


# ---- Held-out records ------------------------------------------------------------------------


def items_of(prompt: str, task: str) -> list[tuple[str, str]]:
    """The profile items in a prompt: (its first field, its last), the latter "" in one of one."""
    names = list(task_of(task).fields.values())
    start, above = f"'{names[0]}': '", prompt.rpartition(WITH_PROFILE)[0]
    if start not in above:
        return []
    found = []
    for text in re.split(f"\n(?={re.escape(start)})", above[above.index(start) :].strip()):
        given, _, made = text.removeprefix(start).partition(f"' '{names[-1]}': '")
        found.append((given.removesuffix("'"), made.removesuffix("'")))
    return found


def asked(record: dict, task: str) -> str:
    """What a record asks for: the query, what the user wrote, and the profile items shown."""
    target, names = record["target"], list(task_of(task).fields.values())
    items = ""
    for given, made in items_of(record["prompt"], task):
        arrow = f' <span class="dim">→</span> {marked(made, target)}' if made else ""
        items += f"<li>{marked(shortened(given), target)}{arrow}</li>"
    facts = {"profile items in the prompt": f"<ul>{items}</ul>" if items else "none"}
    if target is not None:
        facts = {f"the user's own {names[-1]}": f"<b>{clean(target)}</b>"} | facts
    if "query" in record:
        facts = {f"new {names[0]}": clean(shortened(record["query"]))} | facts
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f"""<dl>{rows}</dl>
<details><summary>the whole prompt</summary><pre>{clean(record["prompt"])}</pre></details>"""


def answer_of(sample: dict) -> str:
    text = (
        marked(shortened(sample["answer"]), sample["target"])
        or '<span class="dim">no answer</span>'
    )
    return f'<div class="answer">{text}</div>'


def changes(columns: dict[str, list[dict]]) -> list[tuple[float, dict[str, dict]]]:
    """(gain, {column: record}) of every record, the largest gain first.

    The gain is ROUGE-L in the last column minus that in the first; of a single column, ROUGE-L.
    """
    by_id = {name: {r["id"]: r for r in records} for name, records in columns.items()}
    rows = []
    for id in set.intersection(*map(set, by_id.values())):
        row = {name: found[id] for name, found in by_id.items()}
        first, *others = (record.get("rouge-l", 0.0) for record in row.values())
        rows.append((round(others[-1] - first, 6) if others else first, row))
    return sorted(rows, key=lambda row: (-row[0], next(iter(row[1].values()))["id"]))


def compared(rows, task: str, show: Show) -> str:
    """Records, the answers of every column side by side."""
    html = ""
    for gain, row in rows:
        cards = ""
        for name, record in row.items():
            score = f"ROUGE-L <b>{number(record['rouge-l'])}</b>" if "rouge-l" in record else ""
            cards += f"""<article class="card"><header><span class="label">{name}</span>
<span>{score}</span></header>{answer_of(record)}{show(record)}</article>"""
        html += f"""<section class="record"><header><b>record {clean(record["id"])}</b>
{f"<span>ROUGE-L {signed(gain)}</span>" if len(row) > 1 else ""}</header>{asked(record, task)}
<div class="side two">{cards}</div></section>"""
    return html


def before_and_after(columns: dict[str, list[dict]], count: int, task: str, show: Show) -> str:
    """The section of the same held-out prompts before and after."""
    rows = changes(columns)
    up = [row for row in rows if row[0] > 0]
    down = [row for row in reversed(rows) if row[0] < 0]
    counts = {"up": len(up), "same": len(rows) - len(up) - len(down), "down": len(down)}
    bar = "".join(f'<span class="{kind}" style="flex:{n}"></span>' for kind, n in counts.items())
    return f"""<h2>The same prompts, before and after</h2>
<p>Of {len(rows)} held-out records, after RL <b class="up">{len(up)} are better</b>,
{counts["same"]} as before, <b class="down">{len(down)} worse</b>, by the ROUGE-L of the greedy
answer.</p><div class="split">{bar}</div>{LEGEND}
<h3>The largest gains</h3>{compared(up[:count], task, show) or "<p>No record gained.</p>"}
<h3>The largest losses</h3>{compared(down[:count], task, show) or "<p>No record lost.</p>"}"""


def answers(name: str, records: list[dict], count: int, task: str, show: Show) -> str:
    """The section of one policy's answers, where there is nothing to compare them with."""
    rows = changes({name: records})
    best, worst = rows[:count], rows[count:][-count:][::-1]
    names = ("The best", "The worst") if "rouge-l" in records[0] else ("Some", "Some more")
    return f"""<h2>{len(rows)} answers to held-out prompts</h2>{LEGEND}
<h3>{names[0]}</h3>{compared(best, task, show)}<h3>{names[1]}</h3>{compared(worst, task, show)}"""


# ---- Training groups -------------------------------------------------------------------------


def reward_table(sample: dict, weights: dict[str, float]) -> tuple[str, float]:
    """Weight × value = contribution of each part as HTML, and the reward: their sum as shown."""
    rows, reward = "", 0.0
    for name, weight in weights.items():
        if weight:
            share = round(weight * sample[name], 3)
            reward += share
            rows += f"<tr><td>{name}</td><td>{weight:g} × {number(sample[name])} =</td>"
            rows += f"<td>{number(share)}</td></tr>"
    total = f"<tr><td>reward</td><td></td><td>{number(reward)}</td></tr>"
    return f'<table class="parts">{rows}{total}</table>', reward


def group(samples: list[dict], weights: dict[str, float], show: Show) -> str:
    """A step's completions of one prompt, the best first; folded where they teach nothing."""
    size, copies = len(samples), {}
    for sample in sorted(samples, key=lambda sample: -sample["reward"]):
        copies.setdefault(sample["completion"], []).append(sample)
    different = [*copies.values()]
    left_out = max(0, len(different) - MANY)
    if left_out:
        different = different[: MANY // 2] + different[-MANY // 2 :]
    cards = ""
    for same in different:
        table, reward = reward_table(same[0], weights)
        often = f'<span class="dim">{len(same)} of {size}</span>' if len(same) > 1 else ""
        cards += f"""<article class="card"><header><span>reward <b>{number(reward)}</b></span>
<span>advantage {signed(same[0]["advantage"])}</span>{often}</header>
{answer_of(same[0])}{table}{show(same[0])}</article>"""
    silent, note = all(sample["advantage"] == 0 for sample in samples), ""
    if silent:
        note = f"teaches nothing: all {size} rewards are equal, so all advantages are 0"
    elif len({(sample["accuracy"], sample["format"]) for sample in samples}) == 1:
        note = "only the judge orders these"
    note = f'<span class="badge">{note}</span>' if note else ""
    mean = number(sum(sample["reward"] for sample in samples) / size)
    rest = f"<p>{left_out} between the best and the worst are left out.</p>"
    return f"""<details class="step"{"" if silent else " open"}>
<summary><b>Step {clean(samples[0]["step"])}</b>, mean reward {mean} {note}</summary>
<div class="side">{cards}</div>{rest if left_out else ""}</details>"""


def followed(samples: list[dict], count: int) -> dict[str, dict[int, list[dict]]]:
    """{record: {step: its group}} of the records that came up most often, the earliest first.

    Where none came up twice, they are spread over the run.
    """
    found = {}
    for sample in samples:
        found.setdefault(sample["id"], {}).setdefault(sample["step"], []).append(sample)
    ids = sorted(found, key=lambda id: -len(found[id]))  # stable
    chosen = ids[:count] if len(found[ids[0]]) > 1 else spread(ids, count)
    return {id: found[id] for id in chosen}


def training(samples: list[dict], o: Options, options: dict, show: Show) -> str:
    """The section of training groups, and what its numbers mean."""
    weights = {name: options.get(name, default) for name, (default, _) in MEANING.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    total = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
    meaning = "; ".join(f"<i>{name}</i> is {MEANING[name][1]}" for name in weights)
    divided = "" if options.get("scale") == "none" else ", divided by the standard deviation"
    html = f"""<h2>How it was trained</h2>
<p>Each completion gets a reward of {total}: {meaning}.</p>
<p>The <b>advantage</b> says how much better a completion is than the others of its group, which
answer the same prompt: its reward minus the group's mean{divided}. The update makes what is above 0
likelier, and what is below 0 less likely.</p>"""
    for id, steps in followed(samples, o.prompts).items():
        groups = [group(steps[step], weights, show) for step in spread(sorted(steps), o.steps)]
        again = f"came up {len(steps)} times" if len(steps) > 1 else "came up once"
        html += f"""<section class="record"><header><b>record {clean(id)}</b>
<span class="dim">{again}</span></header>
{asked(next(iter(steps.values()))[0], options["task"])}{"".join(groups)}</section>"""
    return html


# ---- The page --------------------------------------------------------------------------------


def about(options: dict) -> str:
    """What the page shows, in three sentences."""
    names = list(task_of(options["task"]).fields.values())
    k = clean(options["k"])
    profile = f"its prompt shows up to {k} texts that this user wrote before, and a new"
    text = f"""The language model <b>{clean(options["model"])}</b> is to write a {names[-1]} as one
certain user would: {profile} {names[0]}."""
    if "steps" not in options:
        return f"<p>{text} This page shows how near it comes to what the users wrote.</p>"
    warm = options.get("warm_start")
    learning = f"After {clean(warm)} supervised steps, reinforcement" if warm else "Reinforcement"
    steps, size = clean(options["steps"]), clean(options["group_size"])
    return f"""<p>{text} {learning} learning (GRPO, {steps} steps) let it answer each prompt {size}
times, gave every answer a reward, and made the better ones likelier.
This page shows what that changed for users whom training never saw, then how it came about.</p>"""


def not_there_yet(options: dict, metrics: list, scores: dict, columns: dict) -> str:
    """What an unfinished or an older run lacks, as a sentence; "" if it is whole."""
    done = metrics[-1]["step"] if metrics else 0
    missing = [f"{done} of {options['steps']} steps are done"] if done < options["steps"] else []
    missing += [f"no score {name}" for key, name in STAGES.items() if key not in scores]
    for name in (STAGES["before"], STAGES["after"]):
        missing += [f"no held-out answers {name}"] if name not in columns else []
    return f'<p class="note">Not there yet: {", ".join(missing)}.</p>' if missing else ""


def sections(run: Path, o: Options, options: dict) -> list[str]:
    """The page's sections, of a run that is complete or not, or of an evaluation."""
    metrics, samples = read(run, "metrics.jsonl", []), read(run, "samples.jsonl", [])
    scores, task = read(run, "scores.json", {}), options["task"]
    if not samples and not scores:
        raise ValueError(f"{run}: there is nothing to show yet, no score and no step")
    here = run / "checkpoint"  # has the same tokenizer, should the model have been moved
    moved = here.is_dir() and not Path(options["model"]).is_dir()
    tokenizer = prlm.load_tokenizer(here if moved else options["model"])
    show = partial(tokens, tokenizer=tokenizer, most=o.tokens)
    how = "The answers are greedy: each time the likeliest token."
    if "steps" not in options:
        if options.get("temperature"):
            how = f"The answers are sampled, at temperature {clean(options['temperature'])}."
        shown = [about(options), result({"held-out users": scores}, how) if scores else ""]
        return [*shown, answers("it wrote", samples, o.records, task, show) if samples else ""]
    held = {name: read(run, f"held_out/{key}.jsonl", []) for key, name in STAGES.items()}
    held = {name: lines for name, lines in held.items() if lines and name != "no profile"}
    shown = [about(options), not_there_yet(options, metrics, scores, held)]
    shown.append(result(scores, how) if scores else "")
    shown.append(charts(metrics, scores) if metrics else "")
    if len(held) == 2:
        shown.append(before_and_after(held, o.records, task, show))
    elif held:
        shown += [answers(name, lines, o.records, task, show) for name, lines in held.items()]
    else:
        shown.append(LEGEND)
    return [*shown, training(samples, o, options, show) if samples else ""]


def render(run: Path, o: Options) -> str:
    """The page; ValueError if there is nothing to show yet."""
    options = prlm.read_json(run / "config.json")
    missing = {"task", "model", "k"} - options.keys()
    if missing:
        lacks = f"its config.json lacks {', '.join(sorted(missing))}"
        raise ValueError(f"{run} was not written by rl.py or eval.py: {lacks}")
    subject = "What RL changed" if "steps" in options else "An evaluation"
    title = clean(f"{subject}: {options['task']}, {run}")
    settings = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{"".join(sections(run, o, options))}
<h2>All options</h2><p class="dim">{clean(settings)}</p></body></html>
"""


def main(o: Options) -> None:
    run = Path(o.run)
    html = render(run, o)
    size = len(html.encode()) / 1e6
    if size > 5:
        less = "--records, --prompts, --steps or --tokens"
        print(f"the page has {size:.0f} MB: lower {less}", file=sys.stderr)
    prlm.write_text(run / "report.html", html)
    with contextlib.suppress(ImportError):  # the page has its own curves
        draw_curves(run)
    print(f"{run / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
