"""The reward: accuracy, format, and a judge of personalization.

A completion o with answer a for a query q whose user really wrote y earns

  R(o) = 1.0 · accuracy + 0.1 · format + 0.1 · personalization
  accuracy        = ROUGE-1 + ROUGE-2 + ROUGE-L of a against y
  format          = 1 if the reasoning block is closed, else 0
  personalization = sigmoid(s), s the score of one of two judges

--judge bert is the paper's: s(q, a) of a BERT cross-encoder. It learns, without labels, to tell an
answer that the base policy gave WITH the user's profile d (a+) from ones it gave without (a1- ..
aN-). The loss is InfoNCE, which for N = 1 and temperature 1 is -log sigmoid(s+ - s-):

  L = -log  exp(s+ / t) / (exp(s+ / t) + sum_i exp(s_i- / t))

It sees the query and the answer, never the profile: it can learn what personal answers have in
common, not whose style an answer has.

--judge ratio is this project's own: the s that minimises InfoNCE has a closed form, and the base
policy pi, from which both kinds of answers come, can compute it. Nothing is trained:

  s(q, d, a) = log pi(a | q, d) - log pi(a | q)

It pays for what the profile explains, not for what the query explains. Next to accuracy that is
welcome; alone (--accuracy 0) it lets the policy forget the topic, unless --beta keeps it near pi.

`probe` measures what either judge knows about the user; read its figures with the pair accuracy.

    python reward.py --model toy/policy --data toy/lamp --out runs/reward
    python reward.py --judge ratio --out runs/ratio
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import prlm  # before torch, so that Ctrl-C ends its long import without a traceback
from eval import EvalOptions, complete, extract_answer, is_placeholder, rouge
from prlm import Decoder, Encoder, Ragged, Tokenizer
from retrieve import (
    Example,
    answer_block,
    encoder_of,
    lamp_files,
    load_examples,
    load_lamp,
    make_prompts,
    make_ranker,
    task_of,
)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# ---- The three parts -----------------------------------------------------------------------------

PARTS = ("accuracy", "format", "personalization")  # rl.py has an option for the weight of each


def format_reward(completion: str) -> float:
    """1 if the completion closes its reasoning on a line of its own, else 0.

    The opening tag is not asked for: some chat formats put it into the prompt.
    """
    return float("\n</think>" in completion)


def accuracy_reward(answer: str, target: str) -> float:
    """ROUGE-1 + ROUGE-2 + ROUGE-L, 0 to 3."""
    return sum(rouge(answer, target).values())


# (examples, answers) -> values, as a list, an array or a tensor
Judge = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]


def rewards(
    completions: Sequence[str], examples: Sequence[Example], judge: Judge | None = None,
    accuracy: float = 1.0, format: float = 0.1, personalization: float = 0.1,
) -> list[dict]:  # fmt: skip
    """For each completion its answer, the three parts, and "reward", their weighted sum.

    The last three arguments are the weights; the parts in the result are unweighted. Without a
    judge personalization is 0. An answer that is empty, or an echo of the placeholder, earns no
    accuracy and is not shown to the judge; its personalization is the task's penalty (LaMP-4:
    -10), because a learned judge likes such answers and RL finds out. An example without a target
    earns no accuracy.
    """
    rows = []
    judged = []  # (row, example, answer) of those that the judge will see
    for completion, example in zip(completions, examples, strict=True):
        answer = extract_answer(completion, example.task)
        row = {"answer": answer, "accuracy": 0.0, "format": format_reward(completion)}
        row["personalization"] = 0.0
        rows.append(row)
        if not is_placeholder(answer, example.task):
            if example.target is not None:
                row["accuracy"] = accuracy_reward(answer, example.target)
            judged.append((row, example, answer))
        elif judge:
            row["personalization"] = task_of(example.task).penalty
    if judge and judged:
        judged_rows, shown, answers = zip(*judged, strict=True)
        for row, value in zip(judged_rows, judge(shown, answers), strict=True):
            row["personalization"] = float(value)  # JSON takes no others
    for row in rows:
        row["reward"] = accuracy * row["accuracy"] + format * row["format"]
        row["reward"] += personalization * row["personalization"]
    return rows


# ---- The paper's judge: a model trained by contrast ----------------------------------------------


def info_nce(positive: Tensor, negatives: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of raw scores, positive [B] against negatives [B, N], as the mean over B (in nats).

    A negative of -inf stands for a missing one: it counts for nothing and has gradient 0. Scores of
    any size give a finite loss.
    """
    scores = torch.cat([positive[:, None], negatives], 1) / temperature  # [B, 1+N]
    return (scores.logsumexp(1) - scores[:, 0]).mean()


class RewardModel(nn.Module):
    """s(query, answer): BERT over [CLS] query [SEP] answer [SEP], its pooler, one linear output."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        if self.tokenizer is None:
            raise ValueError("the reward model needs its encoder's tokenizer.json")
        like = encoder.norm.weight  # [H]: size, device and dtype of what is added here
        if encoder.pooler is None:
            encoder.pooler = nn.Linear(len(like), len(like), device=like.device, dtype=like.dtype)
        self.classifier = nn.Linear(len(like), 1, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.eval()

    def score(self, queries: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Raw scores [B], differentiable; a pair scores the same alone and in a padded batch.

        `encode_pair` gives the ids and segments of the stripped texts, cut to the encoder's length,
        512 at most. The classifier reads tanh(pooler(hidden state of [CLS])). In training mode a
        dropout of rate `encoder.dropout[0]` comes between the two.
        """
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
        scores = [self.score(queries[part], answers[part]).cpu() for part in parts]
        return torch.cat(scores or [torch.empty(0)])


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
    config = prlm.config_with_dtype(model.encoder.raw, model.classifier.weight.dtype)
    prlm.write_json(Path(directory) / "config.json", config | head)
    weights = {f"bert.{name}": view for name, view in model.encoder.views().items()}
    weights |= {f"classifier.{name}": p for name, p in model.classifier.named_parameters()}
    prlm.write_safetensors(Path(directory) / "model.safetensors", weights)


def load_reward_model(directory, device="cpu") -> RewardModel:
    """What `save_reward_model` wrote; ValueError for a checkpoint of another kind."""
    tensors = prlm.read_checkpoint(directory)
    missing = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} - tensors.keys()
    if missing:
        raise ValueError(f"{directory}: no reward model, it lacks {', '.join(sorted(missing))}")
    model = RewardModel(prlm.load_encoder(directory, device))
    for name, parameter in model.classifier.named_parameters():
        stored = tensors[f"classifier.{name}"]
        if stored.shape != parameter.shape:
            raise ValueError(f"{directory}: the classifier has {len(stored)} labels, not one")
        if not stored.isfinite().all():
            raise ValueError(f"{directory}: classifier.{name} holds NaN or infinity")
        parameter.data.copy_(stored)
    return model


# ---- Its training: pairs, InfoNCE, and an accuracy on unseen queries ----------------------------

BATCH = 64  # pairs in an optimizer step, the authors' number; also how many are scored at once


@dataclass
class RewardOptions(EvalOptions):
    free = EvalOptions.free | {"tokens_per_micro_batch"}
    presets = {  # noqa: RUF012
        "small": {"reward_lr": 5e-5},
        # 10 pairs of each of 500 records are the authors' 5,000.
        "paper": {"pairs_per_query": 10, "reward_lr": 5e-5},
    }
    bounds = {  # noqa: RUF012
        0: "probe_examples",
        1: "pairs_per_query negatives reward_epochs tokens_per_micro_batch",
        prlm.ABOVE_0: "reward_lr",
    }
    judge: Literal["bert", "ratio"] = "bert"  # of personalization: a trained model or the policy
    pairs_per_query: int = 3  # reward model: positives sampled for each query
    negatives: int = 1  # reward model: negatives for each positive
    reward_epochs: int = 3  # reward model: passes over the pairs
    reward_lr: float = 1e-3  # reward model: peak learning rate; the authors' BERT-base has 5e-5
    reward_model: str | None = None  # a trained one; without it one is trained
    probe_examples: int = 200  # held-out records on which the judge is examined; 0 is none
    tokens_per_micro_batch: int = 8192  # memory against speed; the result is the same up to noise


def build_pairs(o: RewardOptions, decoder, tokenizer, examples: list[Example]) -> list[dict]:
    """[{"id", "query", "positive", "negatives"}]: answers with the profile against ones without.

    Sampled at T = 0.7. Empty answers are dropped; a pair needs a positive and a negative.
    """

    def answers(name: str, k: int, count: int) -> list[list[str]]:
        prompts = make_prompts(replace(o, k=k), tokenizer, examples)
        texts = complete(
            o, decoder, tokenizer, prompts, group_size=count, temperature=0.7, description=name
        )
        groups = zip(examples, texts, strict=True)
        return [[extract_answer(text, e.task) for text in group] for e, group in groups]

    with_profile = answers("answers with profile", k=o.k, count=o.pairs_per_query)
    without_profile = answers("answers without profile", k=0, count=o.negatives * o.pairs_per_query)
    pairs = []
    for example, positives, others in zip(examples, with_profile, without_profile, strict=True):
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
    by_pair = scores.split([*map(len, texts)])
    scores = pad_sequence(by_pair, batch_first=True, padding_value=-math.inf)  # [B, 1+N]
    return scores[:, 0], scores[:, 1:]


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: list[dict]) -> float:
    """How often a positive scores above a negative of its query, ties half; chance is 0.5."""
    won = total = 0
    for start in range(0, len(pairs), BATCH):
        positive, negatives = score_pairs(model, pairs[start : start + BATCH])
        margin = (positive[:, None] - negatives)[negatives.isfinite()]
        won += ((margin.sign() + 1) / 2).sum().item()
        total += len(margin)
    return won / max(total, 1)


def split_pairs(pairs: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """(for training, held out): the pairs of a tenth of the queries, at least one, are held out."""
    ids = sorted({pair["id"] for pair in pairs})
    if len(ids) < 2:
        reason = "nearly all of the policy's answers are empty, or not in the form it was asked for"
        advice = "--overwrite with a policy that keeps to the form, --judge ratio, or no judge"
        text = f"{len(pairs)} pairs of {len(ids)} queries are too few to train a reward model on"
        raise ValueError(f"{text}: {reason}; {advice}")
    random.Random(seed).shuffle(ids)
    held = set(ids[: max(1, len(ids) // 10)])
    for_training = [pair for pair in pairs if pair["id"] not in held]
    return for_training, [pair for pair in pairs if pair["id"] in held]


def info_nce_backward(o: RewardOptions, model: RewardModel, pairs: list[dict]) -> float:
    """Adds the gradient of the pairs' mean InfoNCE to the parameters' grad; returns that mean.

    The pairs are scored in micro-batches (`score_pairs`) of at most o.tokens_per_micro_batch
    tokens, padding counted: texts x the longest of them. A pair stays whole, however long it is.
    Loss and gradient are those of all pairs at once, whatever the budget, unless dropout is drawn:
    then the noise differs. Matrix products are in o.precision.
    """
    limit = min(512, model.encoder.max_length)
    device = model.classifier.weight.device
    sizes = []  # tokens of each pair
    for pair in pairs:
        texts = [pair["positive"], *pair["negatives"]]
        ids = [model.tokenizer.encode_pair(pair["query"], text, limit)[0] for text in texts]
        # Not len(texts): `padded` needs one factor for all, and negatives can be missing.
        sizes.append((1 + o.negatives) * max(map(len, ids)))
    total = 0.0
    for rows in prlm.micro_batches(sizes, o.tokens_per_micro_batch, padded=True):
        with prlm.products(o.precision, device):
            positive, negatives = score_pairs(model, [pairs[n] for n in rows])
        loss = info_nce(positive, negatives) * len(rows) / len(pairs)  # its share of the mean
        loss.backward()
        total += loss.item()
    return total


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` independent trials (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(0.5, 100)], [round(b, 3) for b in wilson(1.0, 2)]
    ([0.404, 0.596], [0.342, 1.0])
    """
    z = 1.96
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def train_reward_model(o: RewardOptions, model: RewardModel, pairs: list[dict]) -> dict:
    """InfoNCE, AdamW, linear decay, batches of 64, on nine tenths of the queries; returns a report.

    The pair accuracy is measured on the other tenth, whose queries were never seen. Its interval
    counts a query as one trial, since the pairs of a query are alike. `loss` is the last epoch's
    mean.
    """
    kept, held = split_pairs(pairs, o.seed)
    steps = o.reward_epochs * math.ceil(len(kept) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.reward_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    torch.manual_seed(o.seed)  # dropout
    model.train()
    with prlm.Progress(total=steps, desc="reward model") as bar:
        for epoch in range(o.reward_epochs):
            random.Random(f"{o.seed} {epoch}").shuffle(kept)
            mean = 0.0
            for start in range(0, len(kept), BATCH):
                batch = kept[start : start + BATCH]
                optimizer.zero_grad()
                loss = info_nce_backward(o, model, batch)
                # Nothing is clipped: only the norm is wanted.
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
                if not math.isfinite(loss + norm):
                    what = f"the reward model's loss is {loss}, its gradient's norm {norm}"
                    raise ValueError(f"{what}: a lower --reward-lr, in another --out, may do")
                optimizer.step()
                schedule.step()
                mean += loss * len(batch) / len(kept)
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
    model.eval()
    queries = len({pair["id"] for pair in held})
    accuracy = pair_accuracy(model, held)
    report = {"pairs": len(pairs), "held_out_pairs": len(held), "held_out_queries": queries}
    low, high = wilson(accuracy, queries)
    report |= {"loss": mean, "pair_accuracy": accuracy}
    return report | {"pair_accuracy_low": low, "pair_accuracy_high": high}


def load_bert(o: RewardOptions) -> RewardModel:
    """The reward model at --reward-model; without one a new, untrained one on the encoder."""
    device = prlm.pick_device(o.device)
    if o.reward_model:
        return load_reward_model(o.reward_model, device)
    torch.manual_seed(o.seed)  # for the classifier's initial weights
    return RewardModel(prlm.load_encoder(encoder_of(o), device))


def obtain_reward_model(o: RewardOptions, decoder, tokenizer, examples, directory) -> RewardModel:
    """The reward model of `directory`; what is not there yet, pairs or model, is made first."""
    directory = Path(directory)
    device = prlm.pick_device(o.device)
    pairs_file = directory / "pairs.json"
    report_file = directory / "report.json"

    def train() -> None:
        model = load_bert(o)
        found = train_reward_model(o, model, prlm.read_json(pairs_file, list))
        save_reward_model(model, directory)
        prlm.write_json(report_file, found)  # last: it says that all is there

    if prlm.on_first(lambda: not report_file.is_file()):
        directory.mkdir(parents=True, exist_ok=True)
        if prlm.on_first(lambda: not pairs_file.is_file()):
            pairs = build_pairs(o, decoder, tokenizer, examples)
            split_pairs(pairs, o.seed)  # raises ValueError for too few, before they are kept
            prlm.on_first(lambda: prlm.write_json(pairs_file, pairs))  # the slow part is kept
        prlm.on_first(train)
    return load_reward_model(directory, device)


# ---- The other judge: a likelihood ratio, without training ---------------------------------------


@torch.no_grad()
def likelihood_ratio(
    decoder: Decoder, with_profile: list[list[int]], without: list[list[int]],
    answers: list[list[list[int]]], tokens_per_batch: int = 8192,
) -> Tensor:  # fmt: skip
    """log pi(a | q, d) - log pi(a | q) of each answer, summed over its tokens: [P, G], in nats.

    Both lists [P] are prompts for the same queries; the answers [P][G] continue either. Each prompt
    runs once for its group (`prlm.token_logprobs`), no gradient is kept, and groups run together as
    long as they have at most `tokens_per_batch` tokens, prompt and answers. An empty answer has 0;
    without prompts the result has shape [0, 0]. Why this is the judge to have:

      InfoNCE asks a critic s(q, d, a) to find a+ ~ p(a | q, d) among a1- .. aN- ~ p(a | q).
      Shown all of them, the probability that a_n is the positive is w_n / (w_0 + .. + w_N) with
      w_n = p(a_n | q, d) / p(a_n | q). The loss is the cross-entropy of softmax(s) against that,
      so its minimum is at s* = log p(a | q, d) - log p(a | q) + c(q, d), where c changes no softmax
      (van den Oord et al. 2018; Poole et al. 2019). Here pi, with its reasoning closed and at
      temperature 1, takes the place of p: it has written both kinds of answers.
    """
    group_size = len(answers[0]) if answers else 0

    def score(prompts: list[list[int]]) -> Tensor:
        total = torch.zeros(len(prompts), group_size)
        pairs = zip(prompts, answers, strict=True)
        sizes = [len(prompt) + sum(map(len, group)) for prompt, group in pairs]
        for rows in prlm.micro_batches(sizes, tokens_per_batch):
            asked = [prompts[n] for n in rows]
            logprobs, _ = prlm.token_logprobs(decoder, asked, [answers[n] for n in rows])
            total[rows] = logprobs.sum(-1).cpu()  # 0 after an answer's end
        return total

    return score(with_profile) - score(without)


def ratio_judge(o: RewardOptions, decoder: Decoder, tokenizer: Tokenizer) -> Judge:
    """sigmoid(likelihood ratio) = pi(a | q, d) / (pi(a | q, d) + pi(a | q)), under a frozen policy.

    That is the probability that a was written with the profile, if both were equally likely
    beforehand; it lies in (0, 1), as the paper's does. The reasoning is closed in both prompts, so
    that the answers alone are compared, in the form that the prompt asks for.

    What the query explains cancels out: an answer on another topic is worth as much. So where no
    accuracy is rewarded beside it, keep the policy near the base with --beta. The best policy is
    then pi(a | q, d) (pi(a | q, d) / pi(a | q))^(1 / beta) up to a constant, if the ratio itself is
    the reward: more of what the profile adds, on the topic that pi would choose.
    """
    rank = make_ranker(o)
    how = replace(o, reasoning=False)

    def judge(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        # The answers of an example share its two prompts. Records may have equal ids and queries,
        # but other profiles (the swap test's do), so an example is known by its identity.
        groups: dict[int, list[int]] = {}
        for n, example in enumerate(examples):
            groups.setdefault(id(example), []).append(n)
        asked = [examples[members[0]] for members in groups.values()]
        with_profile = make_prompts(how, tokenizer, asked, rank)
        without_profile = make_prompts(replace(how, k=0), tokenizer, asked, rank)
        ids = [tokenizer.encode(answer_block(o.task, answer)) for answer in answers]
        width = max(map(len, groups.values()), default=0)
        padded = [[ids[n] for n in m] + [[]] * (width - len(m)) for m in groups.values()]
        ratios = likelihood_ratio(
            decoder,
            with_profile=with_profile,
            without=without_profile,
            answers=padded,
            tokens_per_batch=o.tokens_per_micro_batch,
        )  # [P, G]
        shares = ratios.double().sigmoid()  # float32 would round those above 17 nats to 1
        values = [0.0] * len(answers)
        for members, row in zip(groups.values(), shares.tolist(), strict=True):
            for n, value in zip(members, row, strict=False):  # the rest of a row is padding
                values[n] = value
        return values

    return judge


# ---- What a judge knows ------------------------------------------------------------------------


def prefers(judge: Judge, *, own: tuple, other: tuple) -> float:
    """How often the judge gives more to own (examples, answers) than to other; ties are a half."""
    pairs = zip(judge(*own), judge(*other), strict=True)
    won = [0.5 if a == b else float(a > b) for a, b in pairs]
    return sum(won) / len(won)


def swap_profiles(examples: Sequence[Example]) -> list[Example]:
    """Each example with the profile of the next one that is another user's, if there is one."""
    swapped = []
    for n, example in enumerate(examples):
        following = [*examples[n + 1 :], *examples[:n]]
        other = next((e for e in following if e.user_id != example.user_id), example)
        swapped.append(replace(example, profile=other.profile))
    return swapped


def probe(judge: Judge, examples: Sequence[Example], rivals: Sequence[dict] = ()) -> dict:
    """What the judge knows of users that it was not trained on: shares, .5 by chance.

    The swap test asks whether a user's real answer is worth more beside the user's own profile than
    beside another user's. A judge that does not see the profile gives both the same: exactly .5.
    Its 95 % interval counts a user as one trial.

    `rivals` are records {"query", "own", and any others} of these examples. In the toy "other" is
    the real answer in another user's style, "plain" the same with a plain word for the user's.
    """
    users = len({e.user_id for e in examples})
    report = {}
    if users > 1:
        answers = [example.target for example in examples]
        swapped = swap_profiles(examples)
        share = prefers(judge, own=(examples, answers), other=(swapped, answers))
        low, high = wilson(share, users)
        report = {"swap_test": share, "swap_test_low": low, "swap_test_high": high, "users": users}
    by_query = {example.query.strip(): example for example in examples}
    rows = [row for row in rivals if row["query"].strip() in by_query]
    asked = [by_query[row["query"].strip()] for row in rows]
    for rival in [key for key in (rows[0] if rows else ()) if key not in ("query", "own")]:
        own, theirs = ([row[key] for row in rows] for key in ("own", rival))
        report[f"own_over_{rival}"] = prefers(judge, own=(asked, own), other=(asked, theirs))
    return report


def read_rivals(o: RewardOptions) -> list[dict]:
    """The task's probe.json, if the data has one; ValueError where a record lacks a text."""
    file = Path(o.data) / o.task.replace("-", "_") / "probe.json"
    rivals = prlm.read_json(file, list) if file.is_file() else []
    for n, row in enumerate(rivals):
        good = isinstance(row, dict) and {"query", "own"} <= row.keys()
        if not good or not all(isinstance(text, str) for text in row.values()):
            raise ValueError(f"{file}: record {n} is not an object of strings with query and own")
        if row.keys() != rivals[0].keys():
            raise ValueError(f"{file}: record {n} does not have the keys of record 0")
    return rivals


FEW = 30  # held-out queries: with fewer, not even an accuracy of .68 can be told from chance


def describe(name: str, report: dict) -> str:
    """The report in words, with a warning beside a figure that says little."""

    def share(key: str) -> str:
        return f"{report[key]:.3f} ({report[key + '_low']:.2f} to {report[key + '_high']:.2f})"

    lines = [f"judge {name}; by chance each share is .5, in brackets its 95 % interval"]
    if "pair_accuracy" in report:
        queries = report["held_out_queries"]
        few = ": too few to rely on" if queries < FEW else ""
        stands_on = f"{report['held_out_pairs']} pairs of {queries} held-out queries{few}"
        lines.append(f"  {report['pairs']} pairs, loss {report['loss']:.3f} in the last epoch")
        lines.append(f"  pair accuracy {share('pair_accuracy')}, from {stands_on}")
    if "swap_test" in report:
        blind = "; exactly .5: it does not see the profile" if name == "bert" else ""
        lines.append(f"  swap test {share('swap_test')}, from {report['users']} users{blind}")
    rivals = [key for key in report if key.startswith("own_over_")]
    lines += [f"  {key.replace('_', ' ')} {report[key]:.3f}" for key in rivals]
    return "\n".join(lines)


def check_judge(o: RewardOptions) -> None:
    """ValueError for a judge that cannot work with these options, or whose files are faulty."""
    if o.judge == "ratio" and (o.k == 0 or o.retriever == "none"):
        none = "--k 0" if o.k == 0 else "--retriever none"
        advice = "take --personalization 0"
        raise ValueError(
            f"--judge ratio compares with and without a profile: {none} leaves none; {advice}"
        )
    if o.judge == "bert":
        load_bert(o)  # to learn of a faulty file now, not after the slow part
    read_rivals(o)


def make_judge(o: RewardOptions, decoder: Decoder, tokenizer, examples, directory) -> Judge:
    """The judge that the options name; its files and its report are in `directory`.

    The decoder is frozen: "bert" samples its pairs from it, "ratio" keeps it. `check_judge` has
    accepted the options.
    """
    held = load_lamp(o.data, o.task, "dev")[: o.probe_examples] if o.probe_examples else []
    if o.judge == "ratio":
        judge = ratio_judge(o, decoder, tokenizer)
    elif o.reward_model:
        judge = bert_judge(load_bert(o))
    else:
        judge = bert_judge(obtain_reward_model(o, decoder, tokenizer, examples, directory))

    def examine() -> dict:
        file = Path(directory) / "report.json"
        report = prlm.read_json(file) if file.is_file() else {}
        if held and "swap_test" not in report:
            file.parent.mkdir(parents=True, exist_ok=True)
            report |= probe(judge, held, read_rivals(o))
            prlm.write_json(file, report)
        return report

    print(describe(o.judge, prlm.on_first(examine)))
    return judge


def inputs_of(o: RewardOptions, *splits: str) -> dict[str, list]:
    """The files that a result depends on, under the names of the options that lead to them."""
    # reward.py's own command has no weights: it makes the judge in any case.
    files = {"model": [o.model], "data": lamp_files(o.data, o.task, *splits)}
    judged_by_bert = o.judge == "bert" and getattr(o, "personalization", 1.0) > 0
    if judged_by_bert and o.reward_model:
        files["reward_model"] = [o.reward_model]
    if o.retriever == "dense" or (judged_by_bert and not o.reward_model):
        files["encoder"] = [encoder_of(o)]
    return files


@dataclass
class Options(RewardOptions):
    bounds = {0: "limit"}  # noqa: RUF012
    limit: int = 0  # only the first training records; 0 takes all
    out: str = "runs/reward"  # directory of the trained model
    overwrite: bool = False  # start anew where the directory holds another model


def main(o: Options) -> None:
    check_judge(o)
    examples = load_examples(o, "train", o.limit)
    decoder, tokenizer = prlm.load_policy(o)
    inputs = inputs_of(o, *(["train", "dev"] if o.probe_examples else ["train"]))
    with prlm.alone(o.out):
        out = prlm.open_result(o, inputs, record="options.json")  # config.json will be the model's
        make_judge(o, decoder, tokenizer, examples, out)


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
