"""Look at what RL did: a run, finished or not, or an evaluation, as one HTML page.

First the result: without a profile, before and after RL, and the held-out score from step 0 on.
Then the same held-out prompts before and after, the largest gains and losses first. Then the
training: records followed from step to step, each completion with the parts of its reward, its
advantage, and its tokens shaded by how unlikely they were.

    python toy/page.py --run runs/toy        # writes runs/toy/report.html, which opens from disk"""

import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import reward
import rl
from eval import words
from prlm import Tokenizer, option
from retrieve import WITH_PROFILE, task_of

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
STAGES = {"no_profile": "no profile", "before": "before RL", "after": "after RL"}
SHADES = (0.9, 0.5, 0.2, 0.05)  # a token below the n-th of these probabilities has shade n
MANY = 8  # different completions of a group that are shown
LONG = 400  # characters of a query, an item or an answer that are shown
SAYS_NOTHING = """a an and are as at be by for from has have he her his i in is it its me my no not
of on or our she so that the their they this to was we were what who why will with you your"""
LEGEND = """<p class="legend">Tokens are shaded by how unlikely the policy found them. Probability:
<i>.9 and more</i> <i class="s1">.5 to .9</i> <i class="s2">.2 to .5</i> <i class="s3">.05 to .2</i>
<i class="s4">below .05</i> Tap a shaded token to see its probability. <mark>Underlined</mark> words
also occur in the user's own text; words that say nothing ("the", "of") are not marked.</p>"""
TOY = """<p>In this invented world an answer is two look-ups away: one item names the column of the
day that the query is for, another shows the motto of that column. For a fifth of the users the four
items lack one of the two, and a wrong motto leaves half of the words right, so .90 is about the
ceiling: what a perfect reader scores.</p>"""


@dataclass
class Options:
    run: str = option("runs/toy", "directory of rl.py or eval.py; the page is written into it")
    records: int = option(3, "held-out records to show: so many gains, and so many losses", 1)
    prompts: int = option(3, "training records to follow", 1)
    steps: int = option(3, "steps of each, from its first to its last", 1)
    tokens: int = option(240, "of a longer completion the middle is left out", 1)


def read(run: Path, name: str):
    """What a run's file holds; nothing where it is not there yet."""
    load, nothing = (prlm.read_lines, []) if name.endswith("l") else (prlm.read_json, {})
    return load(run / name) if (run / name).is_file() else nothing


# ---- Text and numbers ------------------------------------------------------------------------


def clean(text) -> str:
    """Text of the data, of the policy or of a run's files as HTML: nothing in it acts or hides."""
    return escape(prlm.printable(str(text)))


def shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONG else text[:LONG] + " …"


def marked(text: str, target: str | None) -> str:
    """Text as HTML, the words that the target has too underlined, unless they say nothing."""
    wanted = {*words(target or "")} - {*words(SAYS_NOTHING)}
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
    rows = "<tr><th></th><th>ROUGE-L</th><th>ROUGE-1</th></tr>"
    for name, line in scores.items():
        rows += f'<tr class="{clean(name)}"><th>{clean(STAGES.get(name, name))}</th>'
        for value in (line["rouge-l"], line["rouge-1"]):
            rows += f'<td><div class="bar" style="--share:{value:.3f}">{number(value)}</div></td>'
        rows += "</tr>"
    return f"""<h2>The result</h2>
<p>ROUGE-L is the share of words that an answer has in common with what the user really wrote, in
the same order; 1 is word for word. ROUGE-1 forgives the order. {how}</p>
<table class="result">{rows}</table>"""


def chart(title: str, curves: dict[str, list[tuple]], steps: int) -> str:
    """Named curves of (step, value) in one frame; the first one's values, if few, in numbers."""
    curves = {name: spread(points, 120) for name, points in curves.items() if points}
    values = [value for points in curves.values() for _, value in points]
    if not values:
        return ""
    low, high = min(0.0, *values), max(values) if max(values) > 0 else 1.0

    def place(step: float, value: float) -> tuple[str, str]:
        y = 168 - 152 * (value - low) / (high - low)
        return f"{36 + 314 * step / max(steps, 1):.1f}", f"{y:.1f}"

    svg, keys = "", ""
    for n, (name, points) in enumerate(curves.items()):
        line = " ".join(",".join(place(*point)) for point in points)
        svg = f'<polyline class="c{n}" points="{line}"/>{svg}'  # the first one lies on top
        sample = f'<line class="c{n}" x1="0" x2="20" y1="4" y2="4"/>'
        keys += f'<span><svg class="key" viewBox="0 0 20 8">{sample}</svg>{name}</span>'
    svg += '<text x="36" y="186">step 0</text>'
    svg += f'<text x="350" y="186" text-anchor="end">{steps}</text>'
    for value in (low, (low + high) / 2, high):
        y = place(0, value)[1]
        svg += f'<line class="grid" x1="36" x2="350" y1="{y}" y2="{y}"/>'
        svg += f'<text x="0" y="{y}" dy="4">{value:.2g}</text>'
    first = next(iter(curves.values()))
    for step, value in first if len(first) <= 8 else ():
        x, y = place(step, value)
        at = f'x="{x}" y="{y}" dy="-8" text-anchor="{"end" if step == steps else "start"}"'
        svg += f'<circle cx="{x}" cy="{y}" r="3.5"/>'
        svg += f'<text class="value" {at}>{number(value)}</text>'
    return f"""<figure><h3>{title}</h3><figcaption>{keys}</figcaption>
<svg viewBox="0 0 360 190" role="img" aria-label="{title}">{svg}</svg></figure>"""


def charts(metrics: list[dict], held: dict[str, list[dict]]) -> str:
    """Held-out scores, the reward and groups that teach nothing by step; the log's numbers."""
    steps, curves = metrics[-1]["step"], {}

    def curve(key: str) -> list[tuple]:
        return [(line["step"], line[key]) for line in metrics if key in line]

    def level(stage: str, name: str, *steps: int) -> list[tuple]:
        """The score of the same 64 records that are scored during training; none without them."""
        found = [record[name] for record in held[stage][:64] if name in record]
        return [(step, sum(found) / len(found)) for step in steps if found]

    for name in ("rouge-l", "rouge-1"):
        curves[name.upper()] = level("before", name, 0) + curve(f"eval_{name}")
    curves["ROUGE-L, no profile"] = level("no_profile", "rouge-l", 0, steps)
    rewards = {"all completions of a step": curve("reward")}
    silent = {"all rewards equal: they teach nothing": curve("zero_spread_groups")}
    figures = chart("The first 64 held-out users, greedy", curves, steps)
    figures += chart("Training: mean reward", rewards, steps)
    figures += chart("Training: share of the groups", silent, steps)
    rows = ""
    for key in (key for key in rl.METRICS if key in metrics[-1]):
        rows += f"<tr><td>{key}</td><td>{metrics[-1][key]:.4g}</td>"
        rows += f"<td>{clean(rl.METRICS[key])}</td></tr>"
    return f"""<div class="charts">{figures}</div>
<details><summary>all numbers of step {steps}, and what they mean</summary>
<table class="glossary">{rows}</table></details>"""


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


def tokens(sample: dict, tokenizer: Tokenizer, most: int) -> str:
    """A completion's tokens, the unlikely ones shaded; of more than `most` without the middle."""
    html, found, head = "", pieces(sample, tokenizer), most * 2 // 3
    gap = range(head, head + max(0, len(found) - most))
    for n, (text, logprob) in enumerate(found):
        p = math.exp(logprob)
        shown, shade = number(p) if p >= 0.0005 else "&lt;.001", sum(p < bound for bound in SHADES)
        span = f'<i class="s{shade}" data-p="{shown}" tabindex="-1">{clean(text)}</i>'
        if n not in gap:
            html += span if shade else clean(text)
        elif n == head:
            html += f'<span class="dim"> … {len(gap)} tokens are left out … </span>'
    cut_off = "" if sample["finished"] else '<div class="label">cut off: too long</div>'
    return f'<div class="tokens">{html}</div>{cut_off}'


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
    facts = {f"new {names[0]}": clean(shortened(record["query"]))}
    if target is not None:
        facts[f"the user's own {names[-1]}"] = f"<b>{clean(target)}</b>"
    facts["profile items in the prompt"] = f"<ul>{items}</ul>" if items else "none"
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f"""<dl>{rows}</dl>
<details><summary>the whole prompt</summary><pre>{clean(record["prompt"])}</pre></details>"""


def card(sample: dict, show, head: str, table="") -> str:
    """A completion: its answer, a table, its tokens."""
    text = marked(shortened(sample["answer"]), sample["target"])
    return f"""<article class="card"><header>{head}</header>
<div class="answer">{text or "<span class=dim>no answer</span>"}</div>
{table}{show(sample)}</article>"""


def compared(gain: float, row: dict[str, dict], task: str, show) -> str:
    """A record, the answers of every column side by side; `show` makes HTML of their tokens."""
    cards = ""
    for name, record in row.items():
        score = f"ROUGE-L <b>{number(record['rouge-l'])}</b>" if "rouge-l" in record else ""
        cards += card(record, show, f'<span class="label">{name}</span><span>{score}</span>')
    change = f"<span>ROUGE-L {signed(gain)}</span>" if len(row) > 1 else ""
    return f"""<section class="record"><header><b>record {clean(record["id"])}</b>
{change}</header>{asked(record, task)}
<div class="side two">{cards}</div></section>"""


def held_out(columns: dict[str, list[dict]], count: int, task: str, show) -> str:
    """The held-out prompts before and after, by the change of ROUGE-L; or one policy's answers."""
    rows = []  # (gain, {column: record})
    for records in zip(*columns.values(), strict=True):  # in the same order
        first, *others = (record.get("rouge-l", 0.0) for record in records)
        gain = round(others[-1] - first, 6) if others else first
        rows.append((gain, dict(zip(columns, records, strict=True))))
    rows.sort(key=lambda row: -row[0])
    if len(columns) == 1:
        parts = {"The best": rows[:count], "The worst": rows[count:][-count:][::-1]}
        if not rows[0][0]:  # or targets are withheld
            parts = {"Some": rows[: 2 * count]}
        html = f"<h2>{len(rows)} answers to held-out prompts</h2>{LEGEND}"
    else:
        up = [row for row in rows if row[0] > 0]
        down = [row for row in reversed(rows) if row[0] < 0]
        parts = {"The largest gains": up[:count], "The largest losses": down[:count]}
        html = f"""<h2>The same prompts, before and after</h2>
<p>Of {len(rows)} held-out records, after RL <b class="up">{len(up)} are better</b>,
{len(rows) - len(up) - len(down)} as before, <b class="down">{len(down)} worse</b>, by the ROUGE-L
of the greedy answer.</p>{LEGEND}"""
    for title, part in parts.items():
        shown = "".join(compared(*row, task, show) for row in part)
        html += f"<h3>{title}</h3>{shown or '<p>No record.</p>'}"
    return html


# ---- Training groups -------------------------------------------------------------------------


def reward_table(sample: dict, weights: dict[str, float]) -> tuple[str, float]:
    """Weight × value = contribution of each part as HTML, and the reward: their sum as shown."""
    rows, total = "", 0.0
    for name, weight in weights.items():
        total += (share := round(weight * sample[name], 3))
        rows += f"<tr><td>{name}</td><td>{weight:g} × {number(sample[name])} =</td>"
        rows += f"<td>{number(share)}</td></tr>"
    rows += f"<tr><td>reward</td><td></td><td>{number(total)}</td></tr>"
    return f'<table class="parts">{rows}</table>', total


def group(samples: list[dict], weights: dict[str, float], show) -> str:
    """A step's completions of one prompt, the best first; folded where they teach nothing."""
    size, copies, cards = len(samples), {}, ""
    for sample in sorted(samples, key=lambda sample: -sample["reward"]):
        copies.setdefault(sample["completion"], []).append(sample)
    different, left_out = [*copies.values()], max(0, len(copies) - MANY)
    for same in different[: MANY // 2] + different[MANY // 2 + left_out :]:
        table, total = reward_table(same[0], weights)
        head = f"<span>reward <b>{number(total)}</b></span>"
        head += f"<span>advantage {signed(same[0]['advantage'])}</span>"
        if len(same) > 1:
            head += f'<span class="dim">{len(same)} of {size} completions</span>'
        cards += card(same[0], show, head, table)
    silent, note = all(sample["advantage"] == 0 for sample in samples), ""
    if silent:
        note = f"teaches nothing: all {size} rewards are equal, so all advantages are 0"
    elif len({(sample["accuracy"], sample["format"]) for sample in samples}) == 1:
        note = "only the judge orders these"
    note = f'<span class="badge">{note}</span>' if note else ""
    mean = number(sum(sample["reward"] for sample in samples) / size)
    rest = f"<p>{left_out} between the best and the worst are left out.</p>" if left_out else ""
    return f"""<details class="step"{"" if silent else " open"}>
<summary><b>Step {clean(samples[0]["step"])}</b>, mean reward {mean} {note}</summary>
<div class="side">{cards}</div>{rest}</details>"""


def followed(samples: list[dict], count: int) -> dict[str, dict[int, list[dict]]]:
    """{record: {step: its group}} of the records that came up most, or are spread over the run."""
    found = {}
    for sample in samples:
        found.setdefault(sample["id"], {}).setdefault(sample["step"], []).append(sample)
    ids = sorted(found, key=lambda id: -len(found[id]))  # stable
    chosen = ids[:count] if len(found[ids[0]]) > 1 else spread(ids, count)
    return {id: found[id] for id in chosen}


def training(samples: list[dict], o: Options, options: dict, report: dict, show) -> str:
    """The section of training groups, and what its numbers mean."""
    weights = {name: options[name] for name in reward.PARTS if options[name]}
    total = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
    divided = "" if options["normalizer"] == "dr_grpo" else ", divided by the standard deviation"
    said = clean(reward.describe(report).replace("_", " "))
    judge = f"""<p>The judge {clean(options["judge"])} (.5 is chance): {said}. Pair accuracy: of
two answers, the one written with the profile scores higher. Swap test: a user's own text scores
higher with the user's own profile than with another user's.</p>"""
    html = f"""<h2>How it was trained</h2>
<p>Each completion gets a reward of {total}: the words that its answer shares with the user's own
text (ROUGE-1 + ROUGE-2 + ROUGE-L), 1 where it closes its reasoning on a line of its own, and how
personal the judge finds its answer.</p>{judge if report else ""}
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
    """What the page shows, in a few sentences."""
    first, *_, last = [*task_of(options["task"]).fields.values()] * 2
    toy = TOY if Path(str(options["data"])).parts[-2:] == ("toy", "lamp") else ""
    names = ("model", "k", "warm_start", "steps", "group_size")
    model, k, warm, steps, size = (clean(options.get(name)) for name in names)
    text = f"""<p>The language model <b>{model}</b> is to write a {last} as one certain user would:
its prompt shows up to {k} texts that this user wrote before, and a new {first}."""
    if "steps" not in options:
        return f"{text} This page shows how near it comes to what the users wrote.</p>{toy}"
    start = "Reinforcement" if warm == "0" else f"After {warm} supervised steps, reinforcement"
    return f"""{text} {start} learning (GRPO, {steps} steps) let it answer each prompt {size} times,
gave every answer a reward, and made the better ones likelier. This page shows what that changed on
held-out records, then how it came about.</p>{toy}"""


def sections(run: Path, o: Options, options: dict) -> list[str]:
    """The page's sections, of a run, complete or not or an evaluation; ValueError if of none."""
    metrics, samples = (read(run, f"{name}.jsonl") for name in ("metrics", "samples"))
    scores, task, here = read(run, "scores.json"), options["task"], run / "checkpoint"
    if not samples and not scores:
        raise ValueError(f"{run}: there is nothing to show yet, no score and no step")
    tokenizer = prlm.load_tokenizer(here if here.is_dir() else options["model"])
    show = partial(tokens, tokenizer=tokenizer, most=o.tokens)
    how = "The answers are greedy: each time the likeliest token."
    if "steps" not in options:
        if options["temperature"]:
            how = f"The answers are sampled, at temperature {clean(options['temperature'])}."
        shown = [about(options), result({"held-out users": scores}, how) if scores else ""]
        return [*shown, held_out({"it wrote": samples}, o.records, task, show) if samples else ""]
    held = {key: read(run, f"held_out/{key}.jsonl") for key in STAGES}
    columns = {STAGES[key]: held[key] for key in ("before", "after") if held[key]}
    done, wanted = metrics[-1]["step"] if metrics else 0, options["steps"]
    missing = [f"{done} of {wanted} steps are done"] if done < wanted else []
    missing += [f"no answers {name}" for key, name in STAGES.items() if key not in scores]
    return [
        about(options),
        f'<p class="note">Not there yet: {", ".join(missing)}.</p>' if missing else "",
        result(scores, how) if any(scores.values()) else "",
        charts(metrics, held) if metrics else "",
        held_out(columns, o.records, task, show) if columns else LEGEND,
        training(samples, o, options, read(run, "reward/report.json"), show) if samples else "",
    ]


def main(o: Options) -> None:
    run, file = Path(o.run), Path(o.run) / "report.html"
    options = prlm.read_json(run / "config.json")
    if missing := {"task", "model", "data", "k"} - options.keys():
        lacks = f"its config.json lacks {', '.join(sorted(missing))}"
        raise ValueError(f"{run} was not written by rl.py or eval.py: {lacks}")
    subject = "What RL changed" if "steps" in options else "An evaluation"
    title = clean(f"{subject}: {options['task']}, {run}")
    settings = clean(", ".join(f"{name} {value}" for name, value in options.items()))
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{"".join(sections(run, o, options))}
<h2>All options</h2><p class="dim">{settings}</p></body></html>
"""
    prlm.write_text(file, page)
    print(f"{file}: open it in a browser")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
