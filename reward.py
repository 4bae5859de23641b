"""The reward: accuracy, format, and a judge of personalization.

An answer a to a query q whose user really wrote y earns

  1.0 · accuracy + 0.1 · format + 0.1 · personalization
  accuracy        = ROUGE-1 + ROUGE-2 + ROUGE-L of a against y, 0 to 3
  format          = 1 if the reasoning block is closed, else 0
  personalization = sigmoid(s) of a judge's score s: it adds .1 at most

An empty LaMP-4 answer has -10 for sigmoid(s), as in the authors' code: that dominates its group's
std. --judge bert is the paper's, a BERT cross-encoder s(q, a). It learns, without labels, to tell
an answer given WITH the user's profile d (a+) from ones given without (a1- .. aN-):

  InfoNCE = -log  exp(s+ / t) / (exp(s+ / t) + sum_i exp(s_i- / t))

which for N = 1 and t = 1, as in the paper, is -log sigmoid(s+ - s-). It never sees the profile: it
can learn what personal answers have in common, not whose style one has. Trained once, before RL, it
knows less and less of what the policy writes. InfoNCE leaves a constant per query free in s: within
a group sigmoid(s) orders the answers, but is no probability. --judge ratio is ours: see
`likelihood_ratio`.

    python reward.py --judge bert --out runs/reward"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import prlm
from eval import PromptOptions, extract_answer, is_placeholder, make_records, rouge, run_directory
from prlm import Encoder, Ragged, option
from retrieve import Example, answer_block, load_examples, make_prompts, one_line, show, task_of

# ---- The paper's reward: its three parts ----
PARTS = ("accuracy", "format", "personalization")
BATCH = 64  # pairs in an optimizer step, as the authors have, and scored at once
Judge = Callable[[list[Example], list[str]], list[float]]  # one for each; an array will do


def format_reward(completion: str) -> float:
    """1 if a line that begins with </think> follows the last <think>, if any; else 0."""
    return float("\n</think>" in completion.rpartition("<think>")[2])


def rewards(
    completions: list[str], examples: list[Example], judge: Judge | None = None,
    accuracy: float = 1.0, format: float = 0.1, personalization: float = 0.1,
) -> list[dict]:  # fmt: skip
    """Each completion's answer, three parts, and "reward", their sum with the last arguments as
    weights. An empty answer or a placeholder earns no accuracy and, in place of the judge's value,
    the task's penalty. ValueError unless those values are finite numbers."""
    rows, judged = [], []  # `judged`: what the judge will see, (row, example)
    for completion, example in zip(completions, examples, strict=True):
        answer = extract_answer(completion, example.task)
        rows.append(row := {"answer": answer} | dict.fromkeys(PARTS, 0.0))
        row["format"] = format_reward(completion)
        if not is_placeholder(answer, example.task):
            if example.target is not None:
                row["accuracy"] = sum(rouge(answer, example.target).values())
            judged.append((row, example))
        elif judge:
            row["personalization"] = task_of(example.task).penalty
    if judge and judged:
        asked, answers = [example for _, example in judged], [row["answer"] for row, _ in judged]
        values = [*map(float, judge(asked, answers))]
        if len(values) != len(judged) or not all(map(math.isfinite, values)):
            raise ValueError(f"the judge gave {values}, not {len(judged)} finite numbers")
        for (row, _), value in zip(judged, values):
            row["personalization"] = value
    for row in rows:
        row["reward"] = accuracy * row["accuracy"] + format * row["format"]
        row["reward"] += personalization * row["personalization"]
    return rows


# ---- The paper's judge: a model trained by contrast ----
def info_nce(positive: Tensor, negatives: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of raw scores, positive [B] against negatives [B, N]: the mean over B, in nats. A
    negative of -inf, a missing one, counts for nothing and has gradient 0."""
    scores = torch.cat([positive[:, None], negatives], 1) / temperature  # [B, 1+N]
    return (scores.logsumexp(1) - scores[:, 0]).mean()


class RewardModel(nn.Module):
    """s(query, answer): BERT over [CLS] query [SEP] answer [SEP], its pooler, one linear output.
    In transformers: BertForSequenceClassification."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        if encoder.tokenizer is None:
            raise ValueError("the encoder's directory has no tokenizer.json")
        self.bert, self.tokenizer = encoder, encoder.tokenizer
        like = encoder.embeddings.LayerNorm.weight  # [H]
        if encoder.pooler is None:
            encoder.pooler = nn.ModuleDict({"dense": prlm.Linear(len(like), len(like)).to(like)})
        # float32: in bfloat16, scores closer than .4 % would tie.
        self.classifier = nn.Linear(len(like), 1).to(like.device)
        prlm.start_random(self.classifier)
        nn.init.zeros_(self.classifier.bias)
        self.limit = min(512, encoder.max_length)  # tokens of a pair
        self.eval()

    def score(self, queries: list[str], answers: list[str]) -> Tensor:
        """Raw scores [B], differentiable; a pair, cut to `limit` tokens, scores the same alone and
        in a padded batch."""
        pairs = zip(queries, answers, strict=True)
        rows = [self.tokenizer.encode_pair(q.strip(), a.strip(), self.limit) for q, a in pairs]
        ids, types = (Ragged(part, self.classifier.weight.device) for part in zip(*rows))
        segments = types.grid(types.tokens)
        hidden = self.bert(ids.grid(ids.tokens), ids.mask, segments)  # [B, T, H]
        pooled = torch.tanh(self.bert.pooler.dense(hidden[:, 0]))
        pooled = F.dropout(pooled, self.bert.config.hidden_dropout_prob, self.training)
        return self.classifier(pooled.float())[:, 0]

    @torch.no_grad()
    def judge(self, examples: list[Example], answers: list[str]) -> list[float]:
        """The paper's judge: sigmoid(s(q, a))."""
        pairs = [(e.query, answer) for e, answer in zip(examples, answers, strict=True)]
        scores = (self.score(*zip(*part)) for part in chunks(pairs, BATCH))
        return [x for part in scores for x in part.sigmoid().tolist()]


@dataclass
class RewardOptions(PromptOptions):
    judge: Literal["bert", "ratio"] = option("bert", "a trained model, or the policy itself")
    pairs_per_query: int = option(3, "judge bert: pairs sampled for each query", 1)
    reward_epochs: int = option(3, "judge bert: passes over the pairs; 0: an ablation", 0)
    reward_lr: float = option(1e-3, "judge bert: peak learning rate", 1e-12)
    reward_model: str | None = option(None, "judge bert: a trained one; else one is trained")
    tokens_per_micro_batch: int = option(8192, "memory against speed; the result is the same", 1)


def build_pairs(o: RewardOptions, decoder, tokenizer, examples: list[Example]) -> list[dict]:
    """[{"id", "query", "positive", "negatives"}]: an answer with the profile against one without,
    sampled before RL at T = 0.7 with noise of their own. Empty answers make no pair."""
    sides = []
    for purpose, k in (("answers with profile", o.k), ("answers without profile", 0)):
        prompts = make_prompts(replace(o, k=k), tokenizer, examples)
        how = (prompts, o.pairs_per_query, 0.7, (purpose,))
        sides.append(make_records(o, decoder, tokenizer, examples, *how))
    return [
        {"id": a["id"], "query": a["query"].strip(), "positive": a["answer"],
         "negatives": [b["answer"]]}
        for a, b in zip(*sides) if a["answer"] and b["answer"]
    ]  # fmt: skip


def score_pairs(model: RewardModel, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores of the positives [B] and of the N negatives that each has [B, N]."""
    rows = [(p["query"], text) for p in pairs for text in (p["positive"], *p["negatives"])]
    scores = model.score(*zip(*rows)).view(len(pairs), -1)  # [B, 1+N]
    return scores[:, 0], scores[:, 1:]


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: list[dict]) -> float:
    """How often a positive scores above a negative of its pair, ties half; chance is 0.5."""
    scores = [score_pairs(model, part) for part in chunks(pairs, BATCH)]
    margins = torch.cat([own[:, None] - other for own, other in scores])
    return ((margins.sign() + 1) / 2).double().mean().item()


def split_pairs(pairs: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """(for training, held out): held out are the pairs of a tenth of the queries, at least one."""
    ids = sorted({pair["id"] for pair in pairs})
    if len(ids) < 2:
        few = f"{len(pairs)} pairs of {len(ids)} queries are too few"
        raise ValueError(f"{few}: take --judge ratio or --personalization 0")
    random.Random(seed).shuffle(ids)
    held = set(ids[: max(1, len(ids) // 10)])
    return [p for p in pairs if p["id"] not in held], [p for p in pairs if p["id"] in held]


def info_nce_backward(o: RewardOptions, model: RewardModel, pairs: list[dict]) -> float:
    """Adds the gradient of the pairs' mean InfoNCE to the parameters' grad; returns that mean. As
    many pairs are scored at a time as o.tokens_per_micro_batch allows, padding counted."""
    texts = [p["query"] + text for p in pairs for text in (p["positive"], *p["negatives"])]
    widest = min(model.limit, max(map(len, texts)))  # hardly more tokens than characters
    count = max(1, o.tokens_per_micro_batch * len(pairs) // (widest * len(texts)))
    total = 0.0
    for part in chunks(pairs, count):
        loss = info_nce(*score_pairs(model, part)) * len(part) / len(pairs)
        loss.backward()
        total += loss.item()
    return total


def train_reward_model(o: RewardOptions, model: RewardModel, pairs: list[dict]) -> dict:
    """Trains the model in place; returns a report on the queries held out."""
    (kept, held), batches, losses = split_pairs(pairs, o.seed), [], [0.0]
    for epoch in range(o.reward_epochs):
        random.Random(f"{o.seed} {epoch}").shuffle(kept)
        batches += chunks(kept, BATCH)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(o.seed)  # dropout
    model.train()
    for number, batch in enumerate(prlm.progress(batches, "reward model")):
        optimizer.param_groups[0]["lr"] = o.reward_lr * (1 - number / len(batches))
        optimizer.zero_grad()
        losses.append(info_nce_backward(o, model, batch) * len(batch) / len(kept))
        optimizer.step()
    model.eval()
    loss = sum(losses[-math.ceil(len(kept) / BATCH) :])  # the last epoch's mean
    if not math.isfinite(loss):
        raise ValueError("the reward model's loss is not finite: a lower --reward-lr may do")
    for parameter in model.parameters() if dist.is_initialized() else ():
        dist.broadcast(parameter.data, 0)  # GPUs may round differently; all judge alike
    report = {"pairs": len(pairs), "held_out_pairs": len(held)}
    report["held_out_queries"] = len({pair["id"] for pair in held})
    return report | {"loss": loss, "pair_accuracy": pair_accuracy(model, held)}


# ---- Ours, not the paper's: a likelihood ratio as the judge ----
@torch.no_grad()
def likelihood_ratio(decoder, with_profile, without, answers, tokens_per_batch=8192) -> Tensor:
    """log pi(a | q, d) - log pi(a | q) of each answer, summed over its tokens: [P, G], in nats.
    Both lists [P] are prompts (ids) for the same queries; the answers [P][G] continue either, and
    an empty one has 0. InfoNCE is minimal at s = log p(a | q, d) - log p(a | q), with p the
    source of its answers (derived in toy/README.md); here pi, at temperature 1, is in p's place."""

    def log_likelihood(prompts) -> Tensor:
        total = torch.zeros(len(prompts), max(map(len, answers), default=0))
        for rows, *asked in micro_batches(prompts, answers, tokens_per_batch):
            logprobs, _ = prlm.token_logprobs(decoder, *asked)
            total[rows] = logprobs.sum(-1).cpu()  # 0 after an answer's end
        return total

    return log_likelihood(with_profile) - log_likelihood(without)


def ratio_judge(o: RewardOptions, decoder, tokenizer, examples, answers) -> list[float]:
    """sigmoid(log-ratio) = pi(a | q, d) / (pi(a | q, d) + pi(a | q)), of a frozen policy without
    reasoning: the probability, at even odds, that a was written with the profile. The query's
    share cancels, so an answer off the topic may earn as much: accuracy beside it prevents that, or
    --beta, which keeps the policy near its beginning."""
    # An example's answers stand together and share its two prompts.
    runs = [[*run] for _, run in groupby(range(len(answers)), lambda n: id(examples[n]))]
    asked, width = [examples[run[0]] for run in runs], max(map(len, runs), default=0)
    sides = (replace(o, reasoning=False, k=k) for k in (o.k, 0))
    prompts = (make_prompts(side, tokenizer, asked) for side in sides)
    ids = [tokenizer.fill(answer_block(o.task), one_line(answer)) for answer in answers]
    padded = [[ids[n] for n in run] + [[]] * (width - len(run)) for run in runs]
    ratios = likelihood_ratio(decoder, *prompts, padded, o.tokens_per_micro_batch)  # [P, G]
    shares = ratios.double().sigmoid().tolist()  # float32 would round those above 17 nats to 1
    return [x for row, run in zip(shares, runs) for x in row[: len(run)]]


def swap_test(judge: Judge, examples: list[Example]) -> float | None:
    """How often a user's real text is worth more with its user's profile than with another's, ties
    half: always .5 for bert. None without a second user; users who share an item are one."""
    items = {id(e): {show(item, e.task) for item in e.profile} for e in examples}
    asked, swapped = [], []
    for n, e in enumerate(examples):
        others = (x for x in (*examples[n + 1 :], *examples[:n]) if x.user_id != e.user_id)
        if other := next((x for x in others if not items[id(e)] & items[id(x)]), None):
            asked.append(e)
            swapped.append(replace(e, profile=other.profile))
    if not asked:
        return None
    texts = [e.target for e in asked]
    values = zip(judge(asked, texts), judge(swapped, texts), strict=True)
    return sum((own > other) + 0.5 * (own == other) for own, other in values) / len(asked)


# ==== Below: not the method ====
def chunks(items: list, size: int) -> list[list]:
    return [items[n : n + size] for n in range(0, len(items), size)]


def micro_batches(prompts, groups, budget: int, share: bool = False) -> list[tuple]:
    """(indices [p], prompts [p], completions [p][G]) of as many groups as stay within `budget`
    tokens, at least one, the largest first; with `share`, of this process's groups."""
    sizes = [len(p) + sum(map(len, g)) for p, g in zip(prompts, groups, strict=True)]
    rows, batches, room = range(len(sizes)), [], -1
    for n in sorted(prlm.my_share(rows) if share else rows, key=lambda n: -sizes[n]):
        if sizes[n] > room:
            batches, room = [*batches, []], budget
        batches[-1].append(n)
        room -= sizes[n]
    return [(b, [prompts[n] for n in b], [groups[n] for n in b]) for b in batches]


def save_reward_model(model: RewardModel, directory):
    raw = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    prlm.save_checkpoint(model.state_dict(), model.bert.raw | raw, model.tokenizer, directory)


def load_reward_model(directory, device="cpu") -> RewardModel:
    return prlm.load_module(directory, lambda *x: RewardModel(Encoder(*x)), {}, device)


def judge_model(o: RewardOptions, device="cpu") -> RewardModel | None:
    """The model of --judge bert, trained or made of the encoder; None for ratio. ValueError if it
    is faulty, or the judge would have nothing to tell apart."""
    if o.judge == "bert" and o.reward_model:
        return load_reward_model(o.reward_model, device)
    if o.k == 0 or o.retriever == "none":
        raise ValueError("--k 0 or --retriever none leaves no profile: take --personalization 0")
    if o.judge == "ratio":
        return None
    if o.encoder is None:
        raise ValueError("--judge bert needs --encoder DIRECTORY, a BERT")
    torch.manual_seed(o.seed)  # the classifier's first weights
    return RewardModel(prlm.load_encoder(o.encoder, device))


def make_judge(o: RewardOptions, decoder, tokenizer, train, held, directory) -> Judge:
    """`RewardModel.judge` for --judge bert, whose pairs the frozen decoder samples; `ratio_judge`,
    which keeps that decoder, for ratio. Pairs, model and report in `directory` are reused."""
    pairs, file = directory / "pairs.json", directory / "report.json"
    report = prlm.read_json(file) if file.is_file() else {}
    device, dtype = prlm.device_and_dtype(o)
    trained = o.reward_model or (directory if report else None)
    model = judge_model(replace(o, reward_model=trained), device)
    judge = partial(ratio_judge, o, decoder, tokenizer)
    if model:
        judge = prlm.multiply_in(model, dtype).judge
    if model and not trained:
        if not pairs.is_file():
            prlm.write_json(pairs, build_pairs(o, decoder, tokenizer, train))
        prlm.gather()
        report = train_reward_model(o, model, prlm.read_json(pairs, list))
        save_reward_model(model, directory)
    if "swap_test" not in report:
        report["swap_test"] = swap_test(judge, held[:200])
        prlm.write_json(file, report)
    print(f"judge {o.judge} (.5 is chance): {describe(report)}")
    return judge


def describe(report: dict) -> str:
    return ", ".join(f"{key} {round(x, 3)}" for key, x in report.items() if x is not None)


@dataclass
class Options(RewardOptions):
    out: str = option("runs/reward", "directory of the trained model and the report")
    overwrite: bool = option(False, "delete the result that is there")


def main(o: Options):
    judge_model(o)  # only checks it
    train, held = load_examples(o, "train"), load_examples(o, "dev")
    decoder, tokenizer = prlm.load_policy(o)
    out = run_directory(o, record="options.json")  # config.json will be the model's
    make_judge(o, decoder, tokenizer, train, held, out)


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
