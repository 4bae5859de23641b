"""Look into the reasoning: a run's samples as one HTML page that opens from disk.

Above, the reward of every step and ROUGE-L of held-out users. Below, for a few steps, prompts with
their whole group of completions side by side, the best first: reasoning apart from answer, the
parts of the reward, the advantage, and each token shaded by how unlikely it was when sampled.

    python toy/page.py --run runs/toy        # writes runs/toy/report.html
"""

import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
from prlm import Tokenizer

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #16833b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } svg { width: 100%; max-width: 46rem; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
svg .left { fill: #2a6fdb; text-anchor: end; } svg .right { fill: #e07b00; text-anchor: end; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .7rem; }
.prompt { border-top: 1px solid var(--line); padding: .7rem 0; }
.group { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: .7rem; margin-top: .5rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; min-width: 0; }
.card header { display: flex; flex-wrap: wrap; gap: 0 .8rem; font-variant-numeric: tabular-nums; }
.up { color: var(--good); font-weight: 600; } .down { color: var(--bad); font-weight: 600; }
.parts, .meta { font-size: .85rem; opacity: .75; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace;
  margin-top: .4rem; padding: .4rem; border-left: 3px solid var(--line); }
.tokens.answer { border-left-color: #2a6fdb; background: var(--soft); }
.tokens span { border-radius: 2px; }
"""


def curves(metrics: list[dict]) -> str:
    """The two curves as inline SVG: reward left, held-out ROUGE-L right."""
    width, height, left, right, top, bottom = 720, 260, 44, 44, 14, 30
    steps = max(line["step"] for line in metrics)
    rewards = [line["reward"] for line in metrics]
    low, high = min(0.0, *rewards), max(0.1, *rewards)

    def path(points: list[tuple], start: float, end: float) -> str:
        places = []
        for step, value in points:
            x = left + (width - left - right) * step / steps
            y = top + (height - top - bottom) * (end - value) / (end - start)
            places.append(f"{x:.1f},{y:.1f}")
        return " ".join(places)

    reward = path([(line["step"], line["reward"]) for line in metrics], low, high)
    scored = [line for line in metrics if "eval_rouge-l" in line]
    rouge = path([(line["step"], line["eval_rouge-l"]) for line in scored], 0, 1)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3" fill="#e07b00"/>'
        for x, y in (place.split(",") for place in rouge.split())
    )
    base = height - bottom
    inner, edge = width - left - right, width - right
    return f"""<svg viewBox="0 0 {width} {height}" role="img" aria-label="reward, ROUGE-L by step">
<rect x="{left}" y="{top}" width="{inner}" height="{base - top}" fill="none" stroke="#8886"/>
<polyline points="{reward}" fill="none" stroke="#2a6fdb" stroke-width="1.5"/>
<polyline points="{rouge}" fill="none" stroke="#e07b00" stroke-width="1.5"/>{dots}
<text x="4" y="{top + 8}">{high:.2f}</text><text x="4" y="{base}">{low:.2f}</text>
<text x="{edge + 6}" y="{top + 8}">1</text><text x="{edge + 6}" y="{base}">0</text>
<text x="{left}" y="{height - 8}">step 0</text>
<text x="{edge}" y="{height - 8}" text-anchor="end">{steps}</text>
<text x="{edge - 8}" y="{base - 24}" class="left">mean reward (left)</text>
<text x="{edge - 8}" y="{base - 8}" class="right">held-out ROUGE-L (right)</text>
</svg>"""


def shade(piece: str, logprob: float) -> str:
    """A token as a span, the redder the less likely: full at a probability of 1 in 20."""
    color = f"rgba(230,80,40,{min(1.0, -logprob / 3) * 0.6:.2f})"
    what = f"probability {math.exp(logprob):.3f}"
    return f'<span style="background:{color}" title="{what}">{escape(piece)}</span>'


def card(sample: dict, tokenizer: Tokenizer) -> str:
    """One completion: its reward and parts, then its tokens."""
    pieces = [tokenizer.backend.decode([i], skip_special_tokens=False) for i in sample["tokens"]]
    spans = [shade(p, x) for p, x in zip(pieces, sample["logprobs"], strict=True)]
    if "</think>" in pieces:
        end = len(pieces) - pieces[::-1].index("</think>")
        end += pieces[end : end + 1] == ["\n"]
    else:  # never closed; or never opened, or closed by the prompt
        is_open = "<think>" in sample["completion"].rpartition("</think>")[2]
        end = len(pieces) if is_open else 0
    advantage = sample["advantage"]
    side = "up" if advantage > 0 else "down" if advantage < 0 else ""
    names = ("accuracy", "format", "personalization")
    parts = " · ".join(f"{name} {sample[name]:.3f}" for name in names)
    cut = "" if sample["finished"] else " · cut off"
    reasoning, answer = "".join(spans[:end]), "".join(spans[end:])
    return f"""<article class="card">
<header><b>reward {sample["reward"]:.3f}</b>
<span class="{side}">advantage {advantage:+.2f}</span></header>
<div class="parts">{parts}{cut}</div>
{f'<div class="tokens">{reasoning}</div>' if reasoning else ""}
{f'<div class="tokens answer">{answer}</div>' if answer else ""}
</article>"""


def groups(samples: list[dict], tokenizer: Tokenizer, prompts: int) -> str:
    """The first prompts of one step, each with its group, the best completion first."""
    text = ""
    for id in list(dict.fromkeys(sample["id"] for sample in samples))[:prompts]:
        group = [sample for sample in samples if sample["id"] == id]
        group.sort(key=lambda sample: -sample["reward"])
        cards = "".join(card(sample, tokenizer) for sample in group)
        text += f"""<section class="prompt"><p>record {escape(id)}, the user wrote
<b>{escape(group[0]["target"])}</b></p>
<details><summary>the prompt</summary><pre>{escape(group[0]["prompt"])}</pre></details>
<div class="group">{cards}</div></section>"""
    return text


def render(run: Path, shown: int, prompts: int) -> str:
    """The page of a run, complete or not; ValueError if it has no step yet."""
    metrics, samples = (prlm.read_lines(run / f"{name}.jsonl") for name in ("metrics", "samples"))
    if not metrics:
        raise ValueError(f"{run}: no step is done yet")
    options = prlm.read_json(run / "config.json")
    tokenizer = prlm.load_tokenizer(options["model"])
    last, title = metrics[-1]["step"], escape(f"{options['task']}, {run}")
    count = min(shown, last)
    steps = sorted({1 + round((last - 1) * n / max(1, count - 1)) for n in range(count)})
    body = ""
    for step in steps:
        mine, line = [s for s in samples if s["step"] == step], metrics[step - 1]
        body += f"<h2>Step {step}: mean reward {line['reward']:.3f}, "
        body += f"{line['completion_tokens']:.0f} tokens a completion</h2>"
        body += groups(mine, tokenizer, prompts)
    settings = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
<p>{last} of {options["steps"]} steps; {escape(options["model"])}; each token is shaded by how
unlikely it was when it was sampled (hover for its probability).</p>
<details><summary class="meta">all options</summary><p class="meta">{escape(settings)}</p></details>
{curves(metrics)}
{body}</body></html>
"""


@dataclass
class Options:
    run: str = "runs/toy"  # run directory of rl.py; the page is written into it
    steps: int = 4  # steps to show, from the first to the last
    prompts: int = 4  # prompts of each, with their whole groups


def main(o: Options) -> None:
    run = Path(o.run)
    if min(o.steps, o.prompts) < 1:
        raise ValueError("--steps and --prompts must be at least 1")
    prlm.write_text(run / "report.html", render(run, o.steps, o.prompts))
    print(f"{run / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
