"""Which way would a reward push? It shows before hours of GRPO.

GRPO makes likelier what earns more than its group's mean. So the policy answers each held-out
record several times, and for each reward the table shows how much it varies within a group, and
how far its favourite is above the group's mean in ROUGE-1 and, for commits, in manner (in brackets
95 % and p over records: take one of each user). In "accuracy + x" x weighs 1, and the format .1.
The paper's judge is trained first, unless --reward-model names one; --judge ratio leaves it out.

    python toy/judges.py                                          # the toy's policy, a minute
    python toy/judges.py --preset small --model runs/warm/checkpoint --data data --task commits \\
        --limit 160 --max-new-tokens 96 --reward-model runs/reward"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import eval as scoring
import prlm
import retrieve
import reward
from prlm import option
from toy import common
from toy.commits import TASK, same_manner
from toy.rule import manner_judge


@dataclass
class Options(reward.RewardOptions):
    samples: int = option(8, "answers to a record, at T = 0.7", 2)
    out: str = option("runs/judges", "directory of the answers, the judges and the table")
    overwrite: bool = option(False, "delete the result that is there")


def row(name: str, earned: np.ndarray, found: dict[str, np.ndarray]) -> list[str]:
    """A line of the table, from what answers earn and what they share with the users' texts, each
    [records, samples]. Equal favourites count equally."""
    best = earned == earned.max(1, keepdims=True)
    gains = ((best * x).sum(1) / best.sum(1) - x.mean(1) for x in found.values())
    said = (
        f"{gain} ({over_users})" for gain, over_users, *_ in map(common.difference_cells, gains)
    )
    return [name, f"{earned.std(1, ddof=1).mean():.3f}", *said]


def main(o: Options) -> None:
    names = dict.fromkeys((o.judge, "ratio"))
    for name in names:
        reward.judge_model(replace(o, judge=name))  # only checks it
    train, held = (retrieve.load_examples(o, split) for split in ("train", "dev"))
    decoder, tokenizer = prlm.load_policy(o)
    out = scoring.run_directory(o, "options.json")
    prompts = retrieve.make_prompts(o, tokenizer, held)
    records = scoring.make_records(o, decoder, tokenizer, held, prompts, o.samples, 0.7)
    prlm.append(out / "samples.jsonl", records)
    judges = {"accuracy": None}
    ours = (decoder, tokenizer, train, held)
    judges |= {n: reward.make_judge(replace(o, judge=n), *ours, out / n) for n in names}
    judges |= {"manner": partial(manner_judge, o)} if o.task == TASK else {}

    def grid(lines: list[dict], key: str) -> np.ndarray:
        return np.array([line[key] for line in lines], float).reshape(-1, o.samples)

    texts = [(record["answer"], record["target"]) for record in records]
    found = [scoring.rouge(*both) | same_manner(*both) for both in texts]
    metrics = ("rouge-1", *("form", "kind", "prefix") * (o.task == TASK))
    found = {name: grid(found, name) for name in metrics}
    rows = [["the mean of a group", "", *(common.mean([x.mean(1)]) for x in found.values())]]
    said, asked = [r["completion"] for r in records], [e for e in held for _ in range(o.samples)]
    for name, judge in judges.items():
        earned = reward.rewards(said, asked, judge, personalization=1.0)
        rows.append(row(name, grid(earned, "personalization" if judge else "accuracy"), found))
        if judge:
            rows.append(row(f"accuracy + {name}", grid(earned, "reward"), found))
    text = common.markdown(["the favourite of", "spread", *found], rows)
    prlm.write_text(out / "table.md", text)
    print(text)


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
