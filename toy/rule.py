"""GRPO with your own judge instead of the paper's: here a rule, made for commits.

The rule needs no model and no gold text: an answer should look like the items shown. Options are
rl.py's; --personalization is the rule's weight, 0 with --preset small unless said. To go on, call
this script with --resume: rl.py would go on with a judge of its own.

    python toy/rule.py --preset small --model runs/warm/checkpoint --data data --task commits \\
        --no-reasoning --max-new-tokens 96 --personalization 1 --out runs/rule"""

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
    """For each answer the share of the items shown whose form it has."""
    (*_, field), shares = retrieve.task_of(o.task).fields, []
    for example, answer in zip(examples, answers, strict=True):
        texts = [item[field] for item in retrieve.best_items(o, example)]
        same = [same_manner(answer, text)["form"] for text in texts]
        shares.append(sum(same) / max(len(same), 1))
    return shares


if __name__ == "__main__":
    prlm.command(lambda o: rl.main(o, judge=partial(manner_judge, o)), Options, __doc__)
