"""The prompts and the reward of this project in TRL's own trainer, for those who outgrow rl.py.
TRL tokenizes the prompts anew: control tokens spelled in a profile act, and a BOS may come twice.

pip install trl datasets
python reward.py --out runs/reward
python toy/trl_example.py --reward-model runs/reward --out runs/trl"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import retrieve
from prlm import option
from reward import Judge, RewardOptions, judge_model, make_judge, rewards


def trl_reward(examples: list[retrieve.Example], judge: Judge | None = None, begun="", **weights):
    """`rewards` as a reward function of GRPOTrainer, whose data set needs a column "id"; `begun`:
    the beginning of each completion that its prompt already holds."""
    by_id = {example.id: example for example in examples}

    def prlm_reward(completions, id, **_) -> list[float]:
        texts = [begun + (c if isinstance(c, str) else c[-1]["content"]) for c in completions]
        asked = [by_id[one] for one in id]
        return [part["reward"] for part in rewards(texts, asked, judge, **weights)]

    return prlm_reward


def columns(o: RewardOptions, tokenizer: prlm.Tokenizer, examples) -> dict[str, list[str]]:
    """The data set: each record's id and its personalized prompt as text."""
    decode, prompts = tokenizer.backend.decode, retrieve.make_prompts(o, tokenizer, examples)
    texts = [decode(ids, skip_special_tokens=False) for ids in prompts]
    return {"prompt": texts, "id": [example.id for example in examples]}


@dataclass
class Options(RewardOptions):
    steps: int = option(30, "of the trainer", 1)
    out: str = option("runs/trl", "directory of what TRL writes, and of the judge")


def main(o: Options) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    judge_model(o)
    train, held = retrieve.load_examples(o, "train"), retrieve.load_examples(o, "dev")
    policy, tokenizer = prlm.load_policy(o)
    judge = make_judge(o, policy, tokenizer, train, held, Path(o.out) / "reward")
    data = Dataset.from_dict(columns(o, tokenizer, train))
    how = GRPOConfig(o.out, max_steps=o.steps, max_completion_length=o.max_new_tokens, seed=o.seed)
    begun = tokenizer.opening if o.reasoning else retrieve.CLOSED
    GRPOTrainer(o.model, trl_reward(train, judge, begun), how, data).train()


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
