"""GRPO with a judge of one's own in place of the paper's: a rule for manner, made for commits.

It needs no model and no gold text: an answer should look like the items shown. The options are
those of rl.py; --personalization is its weight.

    python toy/rule.py --preset small --model runs/warm/checkpoint --data data --task commits \\
        --personalization 1 --out runs/rule"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import retrieve
import rl
from rl import Options
from toy.commits import same_manner


def manner_judge(o: Options, examples, answers: list[str]) -> list[float]:
    """The share of the items shown whose form the answer has."""
    *_, field = retrieve.task_of(o.task).fields
    shown = [[item[field] for item in retrieve.best_items(o, example)] for example in examples]
    same = ([same_manner(a, s)["form"] for s in own] for a, own in zip(answers, shown))
    return [sum(found) / max(len(found), 1) for found in same]


if __name__ == "__main__":
    prlm.command(lambda o: rl.main(o, judge=partial(manner_judge, o)), Options, __doc__)
