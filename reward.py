"""The reward: accuracy, format, and a personalization model trained by contrast.

A completion o with answer a for a query q whose user really wrote y earns

  R(o) = 1.0 · accuracy + 0.1 · format + 0.1 · personalization
  accuracy        = ROUGE-1 + ROUGE-2 + ROUGE-L of a against y
  format          = 1 if the reasoning block is closed, else 0
  personalization = sigmoid(s(q, a)),  s a BERT cross-encoder

The cross-encoder learns, without labels, to tell an answer that the base policy gave WITH the
user's profile (a+) from ones it gave without (a1- .. aN-). The loss is InfoNCE, which for N = 1 and
temperature 1 is -log sigmoid(s+ - s-):

  L = -log  exp(s+ / t) / (exp(s+ / t) + sum_i exp(s_i- / t))

s sees the query and the answer, never the profile: it can learn what personal answers have in
common, not whose style one is. `probe` measures exactly that, so read it beside the pair accuracy.

    python reward.py --model toy/policy --data toy/lamp --out runs/reward
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import prlm
from eval import EvalOptions, complete, extract_answer, is_placeholder, rouge
from prlm import Decoder, Encoder, Ragged, Tokenizer
from retrieve import Example, answer_block, load_lamp, make_prompts, make_ranker, task_of

# ---- The three parts -----------------------------------------------------------------------------


def format_reward(completion: str) -> float:
    """1 if the completion closes its reasoning on a line of its own, else 0.

    The opening tag is not asked for: some chat formats put it into the prompt.
    """
    return float("\n</think>" in completion)


def accuracy_reward(answer: str, target: str) -> float:
    """ROUGE-1 + ROUGE-2 + ROUGE-L, 0 to 3."""
    return sum(rouge(answer, target).values())


Judge = Callable[[Sequence[Example], Sequence[str]], list[float]]  # (examples, answers) -> values


def rewards(
    completions: Sequence[str], examples: Sequence[Example], judge: Judge | None = None,
    accuracy: float = 1.0, format: float = 0.1, personalization: float = 0.1,
) -> list[dict]:  # fmt: skip
    """For each completion its answer, the three parts, and "reward", their weighted sum.

    The numbers are the weights; the parts in the rows are unweighted. Without a judge nothing is
    earned for personalization. An answer that is empty, or an echo of the placeholder, earns no
    accuracy and is not shown to the judge; its personalization is the task's penalty (LaMP-4:
    -10), because a learned judge likes such answers and RL finds out. An example without a target
    earns no accuracy.
    """
    rows, judged = [], []
    for completion, example in zip(completions, examples, strict=True):
        answer = extract_answer(completion, example.task)
        row = {"answer": answer, "accuracy": 0.0, "format": format_reward(completion)}
        rows.append(row | {"personalization": 0.0})
        if not is_placeholder(answer, example.task):
            if example.target is not None:
                rows[-1]["accuracy"] = accuracy_reward(answer, example.target)
            judged.append((rows[-1], example, answer))
        elif judge:
            rows[-1]["personalization"] = task_of(example.task).penalty
    if judge and judged:
        earners, theirs, answers = zip(*judged, strict=True)
        for row, value in zip(earners, judge(theirs, answers), strict=True):
            row["personalization"] = value
    for row in rows:
        row["reward"] = accuracy * row["accuracy"] + format * row["format"]
        row["reward"] += personalization * row["personalization"]
    return rows


def trl_reward(task: str, judge: Judge | None = None, **weights: float):
    """`rewards` as a reward function of TRL's GRPOTrainer, for those who outgrow rl.py.

    Its data set needs the columns "query" and "target" beside "prompt".
    """

    def prlm_reward(completions, query, target, **_) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        examples = [Example("", "", task, q, [], t) for q, t in zip(query, target, strict=True)]
        return [part["reward"] for part in rewards(texts, examples, judge, **weights)]

    return prlm_reward


# ---- A judge without training: the likelihood ratio ----------------------------------------------


@torch.no_grad()
def likelihood_ratio(
    decoder: Decoder, with_profile: list[list[int]], without: list[list[int]],
    answers: list[list[list[int]]], tokens_per_batch: int = 8192,
) -> Tensor:  # fmt: skip
    """log pi(a | q, d) - log pi(a | q) of each answer, summed over its tokens: [P, G], in nats.

    with_profile and without [P] are prompts for the same query, answers [P][G] go on from either.
    Each prompt runs once for its group; an empty answer has 0. Why this is the judge to have:

      InfoNCE asks a critic s(q, d, a) to pick a+ ~ p(a | q, d) out of itself and a_i- ~ p(a | q).
      Shown {a_0 .. a_N}, the posterior that a_n is the positive is p(a_n | q, d) / p(a_n | q),
      divided by the sum of these ratios over all n. The loss is the cross-entropy of softmax(s)
      against that, so its minimum is s* = log p(a | q, d) - log p(a | q) + c(q, d)
      (van den Oord et al. 2018; Poole et al. 2019). Here p is pi: both answers are its samples.
    """
    P, G = len(answers), len(answers[0]) if answers else 0
    totals = []
    for prompts in (with_profile, without):
        pairs = zip(prompts, answers, strict=True)
        sizes = [len(prompt) + sum(map(len, group)) for prompt, group in pairs]
        total = torch.zeros(P, G)
        for rows in prlm.micro_batches(sizes, tokens_per_batch):
            groups = [answers[n] for n in rows]
            logprobs, _ = prlm.token_logprobs(decoder, [prompts[n] for n in rows], groups)
            total[rows] = logprobs.sum(-1).cpu()
        totals.append(total)
    return totals[0] - totals[1]


def ratio_judge(o: "RewardOptions", policy: Decoder, tokenizer: Tokenizer) -> Judge:
    """sigmoid of the likelihood ratio under a frozen policy: does d make this answer likelier?

    The reasoning is closed in both prompts, so what is compared are the answers alone.
    """
    rank, how = make_ranker(o), replace(o, reasoning=False)

    def judge(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        groups: dict[tuple, list[int]] = {}  # the answers of an example share its two prompts
        for n, example in enumerate(examples):
            groups.setdefault((example.id, example.query), []).append(n)
        asked = [examples[members[0]] for members in groups.values()]
        prompts = [make_prompts(replace(how, k=k), tokenizer, asked, rank) for k in (o.k, 0)]
        ids = [tokenizer.encode(answer_block(o.task, answer)) for answer in answers]
        width = max(map(len, groups.values()))
        padded = [[ids[n] for n in m] + [[]] * (width - len(m)) for m in groups.values()]
        ratios = likelihood_ratio(policy, *prompts, padded)  # [P, G]
        values = [0.0] * len(answers)
        for members, row in zip(groups.values(), ratios.sigmoid().tolist(), strict=True):
            for n, value in zip(members, row, strict=False):  # behind them is padding
                values[n] = value
        return values

    return judge


# ---- The paper's judge: a model trained by contrast ----------------------------------------------


def info_nce(positive: Tensor, negatives: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of raw scores, positive [B] against negatives [B, N], as the mean over B (in nats).

    A negative of -inf stands for a missing one.
    """
    scores = torch.cat([positive[:, None], negatives], 1) / temperature  # [B, 1+N]
    return (scores.logsumexp(1) - scores[:, 0]).mean()


class RewardModel(nn.Module):
    """s(query, answer): BERT over [CLS] query [SEP] answer [SEP], its pooler, one linear output."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        if self.tokenizer is None:
            raise ValueError("the reward model needs its encoder's tokenizer.json")
        like = encoder.norm.weight
        if encoder.pooler is None:
            encoder.pooler = nn.Linear(len(like), len(like), device=like.device, dtype=like.dtype)
        self.classifier = nn.Linear(len(like), 1, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.eval()

    def score(self, queries: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Raw scores [B], differentiable; a pair scores the same alone and in a padded batch."""
        limit = min(512, self.encoder.max_length)
        pairs = zip(queries, answers, strict=True)
        rows = [self.tokenizer.encode_pair(q.strip(), a.strip(), limit) for q, a in pairs]
        ids, types = (Ragged(part, self.classifier.weight.device) for part in zip(*rows))
        segments = types.grid(types.tokens)
        hidden = self.encoder(ids.grid(ids.tokens), ids.mask, segments)  # [B, T, H]
        pooled = torch.tanh(self.encoder.pooler(hidden[:, 0]))
        pooled = F.dropout(pooled, self.encoder.dropout[0], self.training)
        return self.classifier(pooled)[:, 0].float()

    @torch.no_grad()
    def score_all(self, queries: Sequence[str], answers: Sequence[str], batch_size=128) -> Tensor:
        """Raw scores of any number of pairs [N], without gradient, a batch at a time."""
        parts = [slice(n, n + batch_size) for n in range(0, len(queries), batch_size)]
        return torch.cat([self.score(queries[part], answers[part]).cpu() for part in parts])


def bert_judge(model: RewardModel) -> Judge:
    """sigmoid(s(q, a)), the paper's judge: it does not see the profile."""

    def judge(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        return model.score_all([e.query for e in examples], answers).sigmoid().tolist()

    return judge


def save_reward_model(model: RewardModel, directory) -> None:
    """Writes it as transformers' BertForSequenceClassification with one label."""
    model.tokenizer.save(directory)
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "personal"}}
    head["label2id"] = {"personal": 0}
    prlm.write_json(Path(directory) / "config.json", model.encoder.raw | head)
    weights = {f"bert.{name}": view for name, view in model.encoder.views().items()}
    weights |= {f"classifier.{name}": p for name, p in model.classifier.named_parameters()}
    prlm.write_safetensors(Path(directory) / "model.safetensors", weights)


def load_reward_model(directory, device="cpu") -> RewardModel:
    tensors = prlm.read_checkpoint(directory)
    missing = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} - tensors.keys()
    if missing:
        raise ValueError(f"{directory}: no reward model, it lacks {', '.join(sorted(missing))}")
    model = RewardModel(prlm.load_encoder(directory, device))
    for name, parameter in model.classifier.named_parameters():
        stored = tensors[f"classifier.{name}"]
        if stored.shape != parameter.shape:
            raise ValueError(f"{directory}: the classifier has {len(stored)} labels, not one")
        parameter.data.copy_(stored)
    return model


# ---- Its training: pairs, InfoNCE, and two honest figures ----------------------------------------


@dataclass
class RewardOptions(EvalOptions):
    judge: Literal["bert", "ratio"] = "bert"  # of personalization: a trained model or the policy
    pairs_per_query: int = 3  # reward model: positives sampled for each query
    negatives: int = 1  # reward model: negatives for each positive
    reward_epochs: int = 3  # reward model: passes over the pairs
    reward_lr: float = 1e-3  # reward model: peak learning rate; the authors' BERT-base has 5e-5


def build_pairs(o: RewardOptions, decoder, tokenizer, examples: list[Example]) -> list[dict]:
    """[{"id", "query", "positive", "negatives"}]: answers with the profile against ones without.

    Sampled at T = 0.7. Empty answers are dropped; a pair needs a positive and a negative.
    """
    answers = []
    for name, k, size in (("with", o.k, 1), ("without", 0, o.negatives)):
        prompts = make_prompts(replace(o, k=k), tokenizer, examples)
        how = size * o.pairs_per_query, 0.7, f"answers {name} profile"
        groups = zip(examples, complete(o, decoder, tokenizer, prompts, *how), strict=True)
        answers.append([[extract_answer(t, e.task) for t in group] for e, group in groups])
    pairs = []
    for example, positives, others in zip(examples, *answers, strict=True):
        for n, positive in enumerate(positives):
            negatives = [a for a in others[n * o.negatives : (n + 1) * o.negatives] if a]
            if positive and negatives:
                pair = {"id": example.id, "query": example.query.strip()}
                pairs.append(pair | {"positive": positive, "negatives": negatives})
    return pairs


def score_pairs(model: RewardModel, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores of the positives [B] and the negatives [B, N], -inf where a pair has fewer than N."""
    texts = [[pair["positive"], *pair["negatives"]] for pair in pairs]
    queries = [pair["query"] for pair, row in zip(pairs, texts, strict=True) for _ in row]
    scores = model.score(queries, [text for row in texts for text in row])
    scores = pad_sequence(scores.split([*map(len, texts)]), True, -math.inf)  # [B, 1+N]
    return scores[:, 0], scores[:, 1:]


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: list[dict]) -> float:
    """How often a positive scores above a negative of its query, ties half; chance is 0.5."""
    won = total = 0
    for start in range(0, len(pairs), 64):
        positive, negatives = score_pairs(model, pairs[start : start + 64])
        margin = (positive[:, None] - negatives)[negatives.isfinite()]
        won, total = won + ((margin.sign() + 1) / 2).sum().item(), total + len(margin)
    return won / max(total, 1)


def train_reward_model(o: RewardOptions, model: RewardModel, pairs: list[dict]) -> dict:
    """InfoNCE, AdamW, linear decay, batches of 64, on nine tenths of the queries; returns a report.

    The other tenth measures the pair accuracy: its queries were never seen.
    """
    ids = sorted({pair["id"] for pair in pairs})
    random.Random(o.seed).shuffle(ids)
    held_ids = set(ids[: max(1, len(ids) // 10)])
    held = [pair for pair in pairs if pair["id"] in held_ids]
    kept = [pair for pair in pairs if pair["id"] not in held_ids]
    if not kept:
        raise ValueError(f"{len(pairs)} pairs of answers are too few to train a reward model on")
    steps = o.reward_epochs * math.ceil(len(kept) / 64)
    optimizer = torch.optim.AdamW(model.parameters(), o.reward_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    torch.manual_seed(o.seed)  # dropout
    model.train()
    with tqdm(total=steps, desc="reward model", disable=None, leave=False) as bar:
        for epoch in range(o.reward_epochs):
            random.Random(f"{o.seed} {epoch}").shuffle(kept)
            for start in range(0, len(kept), 64):
                loss = info_nce(*score_pairs(model, kept[start : start + 64]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    model.eval()
    return {"pairs": len(pairs), "loss": loss.item(), "pair_accuracy": pair_accuracy(model, held)}


def probe(model: RewardModel, path) -> dict[str, float]:
    """How often the user's own answer outscores a rival's, by the rival's name; chance is 0.5.

    The file lists {"query", "own", and any rivals}: "other" is the same answer in another user's
    style, "plain" with a plain word for the user's. A model that is blind to the profile cannot
    beat chance by much on "other", however good its pair accuracy is.
    """
    rows = prlm.read_json(path, list)
    queries, own = ([row[key] for row in rows] for key in ("query", "own"))
    scores, shares = model.score_all(queries, own), {}
    for rival in [key for key in rows[0] if key not in ("query", "own")]:
        difference = scores - model.score_all(queries, [row[rival] for row in rows])
        shares[f"own_over_{rival}"] = ((difference.sign() + 1) / 2).mean().item()
    return shares


def obtain_reward_model(o: RewardOptions, decoder, tokenizer, examples, directory) -> RewardModel:
    """The reward model of `directory`; what is not there yet, pairs or model, is made first."""
    directory, device = Path(directory), prlm.pick_device(o.device)

    def train() -> None:
        torch.manual_seed(o.seed)
        model = RewardModel(prlm.load_encoder(o.encoder, device))
        report = train_reward_model(o, model, prlm.read_json(directory / "pairs.json", list))
        rivals = Path(o.data) / o.task.replace("-", "_") / "probe.json"
        if rivals.is_file():
            report |= probe(model, rivals)
        save_reward_model(model, directory)
        prlm.write_json(directory / "report.json", report)  # last: it says all is there

    if prlm.on_first(lambda: not (directory / "report.json").is_file()):
        directory.mkdir(parents=True, exist_ok=True)
        if prlm.on_first(lambda: not (directory / "pairs.json").is_file()):
            pairs = build_pairs(o, decoder, tokenizer, examples)  # the slow part is kept
            prlm.on_first(lambda: prlm.write_json(directory / "pairs.json", pairs))
        prlm.on_first(train)
    report = prlm.read_json(directory / "report.json")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in report.items())
    print(f"reward model: {shown} (by chance, accuracies are 0.5)")
    return load_reward_model(directory, device)


def make_judge(o: RewardOptions, policy: Decoder, tokenizer, examples, directory) -> Judge:
    """The judge that the options name; what it needs and its report lie in `directory`.

    `policy` is frozen: "bert" samples its pairs from it, "ratio" keeps it.
    """
    if o.judge == "ratio":
        return ratio_judge(o, policy, tokenizer)
    return bert_judge(obtain_reward_model(o, policy, tokenizer, examples, directory))


def obtain_judge(o, policy: Decoder, tokenizer, examples, directory) -> Judge | None:
    """`make_judge`, or None where its value would weigh nothing."""
    return make_judge(o, policy, tokenizer, examples, directory) if o.personalization else None


@dataclass
class Options(RewardOptions):
    limit: int = 0  # only the first training records; 0 takes all
    out: str = "runs/reward"  # directory of the trained model


def main(o: Options) -> None:
    examples = load_lamp(o.data, o.task, "train")[: o.limit or None]
    decoder = prlm.load_decoder(o.model, prlm.pick_device(o.device))
    make_judge(o, decoder, prlm.load_tokenizer(o.model), examples, o.out)


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
