"""The reward: accuracy, format, and a personalization model trained by contrast.

A completion o with answer a for a query q whose user really wrote y earns

  R(o) = 1.0 · accuracy + 0.1 · format + 0.1 · personalization
  accuracy        = ROUGE-1 + ROUGE-2 + ROUGE-L of a against y
  format          = 1 if the reasoning block is closed, else 0
  personalization = sigmoid(s(q, a)),  s a BERT cross-encoder

The cross-encoder learns, without labels, to tell an answer that the base policy gave WITH the user's
profile (a+) from one it gave without (a1- ... aN-). The loss is InfoNCE; with N = 1 and temperature 1 it
is -log sigmoid(s+ - s-):

  L = -log  exp(s+ / t) / (exp(s+ / t) + sum_i exp(s_i- / t))

s sees the query and the answer, never the profile: it can learn what personal answers have in common,
not whose style one is. `probe` measures exactly that, so read it beside the pair accuracy.

    python reward.py --model toy/policy --data toy/lamp --out runs/reward
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eval import complete, extract_answer, is_placeholder, make_prompts, rouge
from prlm import (
    Decoder,
    Encoder,
    Tokenizer,
    command,
    load_decoder,
    load_encoder,
    load_tokenizer,
    pick_device,
    read_checkpoint,
    read_json,
    write_json,
    write_safetensors,
    write_text,
)
from retrieve import Dense, Example, Retriever, TaskName, load_lamp, make_dense

__all__ = ["RewardModel", "extract_answer", "format_reward", "info_nce", "rewards"]

WEIGHTS = {"accuracy": 1.0, "format": 0.1, "personalization": 0.1}

# ----------------------------------------------------------------------------------------------
# The three parts
# ----------------------------------------------------------------------------------------------


def format_reward(completion: str) -> float:
    """1 if the completion closes its reasoning on a line of its own, else 0.

    The opening tag is not asked for: some chat formats put it into the prompt.
    """
    return float("\n</think>" in completion)


def accuracy_reward(answer: str, target: str) -> float:
    """ROUGE-1 + ROUGE-2 + ROUGE-L, 0 to 3."""
    return sum(rouge(answer, target).values())


def rewards(
    completions: Sequence[str],
    examples: Sequence[Example],
    reward_model: "RewardModel | None" = None,
    weights: dict[str, float] = WEIGHTS,
) -> list[dict]:
    """For each completion its answer, the three parts, and their weighted sum as "reward".

    An empty answer, or one that echoes the placeholder, earns no accuracy and no personalization; in
    LaMP-4 it costs 10 points of the latter (a learned reward likes empty answers, and RL finds that).
    """
    scored = []
    for completion, example in zip(completions, examples, strict=True):
        answer = extract_answer(completion, example.task)
        void = is_placeholder(answer, example.task)
        accuracy = 0.0 if void else accuracy_reward(answer, example.target)
        personalization = -10.0 if void and example.task == "LaMP-4" else 0.0
        parts = {"accuracy": accuracy, "format": format_reward(completion)}
        scored.append({"answer": answer, "void": void, **parts, "personalization": personalization})
    judged = [n for n, part in enumerate(scored) if not part["void"]]
    if reward_model is not None and judged:
        queries, answers = (
            [examples[n].query for n in judged],
            [scored[n]["answer"] for n in judged],
        )
        for n, raw in zip(judged, reward_model.score_all(queries, answers).tolist(), strict=True):
            scored[n]["personalization"] = 1 / (1 + math.exp(-raw))
    for part in scored:
        if reward_model is None:
            part["personalization"] = 0.0
        part["reward"] = sum(weight * part[name] for name, weight in weights.items())
    return scored


# ----------------------------------------------------------------------------------------------
# The personalization model
# ----------------------------------------------------------------------------------------------


def info_nce(positive: Tensor, negatives: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of raw scores, positive [B] against negatives [B, N], as the mean over B (in nats).

    A negative of -inf stands for a missing one.
    """
    scores = torch.cat([positive[:, None], negatives], 1) / temperature  # [B, 1+N]
    return (scores.logsumexp(1) - scores[:, 0]).mean()


class RewardModel(nn.Module):
    """s(query, answer): BERT over [CLS] query [SEP] answer [SEP], its pooler, one linear output."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer or encoder.tokenizer
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
        limit = min(512, self.encoder.places.num_embeddings)
        pairs = zip(queries, answers, strict=True)
        rows = [self.tokenizer.encode_pair(q.strip(), a.strip(), limit) for q, a in pairs]
        width, device = max(len(ids) for ids, _ in rows), self.classifier.weight.device
        tokens, segments = torch.zeros(2, len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (ids, types) in enumerate(rows):
            tokens[n, : len(ids)], segments[n, : len(ids)] = torch.tensor([ids, types])
            mask[n, : len(ids)] = True
        hidden = self.encoder(tokens.to(device), mask.to(device), segments.to(device))  # [B, T, H]
        pooled = torch.tanh(self.encoder.pooler(hidden[:, 0]))
        pooled = F.dropout(pooled, self.encoder.dropout, self.training)
        return self.classifier(pooled)[:, 0].float()

    @torch.no_grad()
    def score_all(self, queries: Sequence[str], answers: Sequence[str], batch_size=128) -> Tensor:
        """Raw scores of any number of pairs [N], without gradient, a batch at a time."""
        parts = [slice(n, n + batch_size) for n in range(0, len(queries), batch_size)]
        return torch.cat([self.score(queries[part], answers[part]).cpu() for part in parts])


def save_reward_model(model: RewardModel, directory) -> None:
    """Writes it as transformers' BertForSequenceClassification with one label."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in model.tokenizer.files.items():
        write_text(directory / name, content)
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "personal"}}
    write_json(directory / "config.json", model.encoder.raw | head | {"label2id": {"personal": 0}})
    weights = {f"bert.{name}": view for name, view in model.encoder.views().items()}
    weights |= {f"classifier.{name}": p for name, p in model.classifier.named_parameters()}
    write_safetensors(directory / "model.safetensors", weights)  # last: it completes the directory


def load_reward_model(directory, device="cpu") -> RewardModel:
    tensors = read_checkpoint(directory)
    missing = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} - tensors.keys()
    if missing:
        raise ValueError(f"{directory}: no reward model, it lacks {', '.join(sorted(missing))}")
    model = RewardModel(load_encoder(directory, device))
    for name, parameter in model.classifier.named_parameters():
        stored = tensors[f"classifier.{name}"]
        if stored.shape != parameter.shape:
            raise ValueError(f"{directory}: the classifier has {len(stored)} labels, not one")
        parameter.data.copy_(stored)
    return model


# ----------------------------------------------------------------------------------------------
# Its training: pairs, InfoNCE, and two honest figures
# ----------------------------------------------------------------------------------------------


def build_pairs(
    decoder: Decoder,
    tokenizer: Tokenizer,
    examples: list[Example],
    k: int,
    retriever: str,
    samples: int = 1,
    negatives: int = 1,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    dense: Dense | None = None,
) -> list[dict]:
    """[{"id", "query", "positive", "negatives"}]: answers with the profile against answers without.

    Each query gives `samples` pairs of one positive and `negatives` negatives; empty answers are
    dropped, and a pair without a positive or any negative with them.
    """
    answers = []
    for name, items, size in (("with", k, samples), ("without", 0, samples * negatives)):
        prompts = make_prompts(
            tokenizer, examples, items, retriever, max_prompt_tokens, seed, dense
        )
        texts = complete(
            decoder,
            tokenizer,
            prompts,
            size,
            max_new_tokens,
            temperature,
            seed,
            description=f"answers {name} profile",
        )
        answers.append(
            [
                [extract_answer(t, e.task) for t in group]
                for e, group in zip(examples, texts, strict=True)
            ]
        )
    pairs = []
    for example, positives, others in zip(examples, *answers, strict=True):
        for n, positive in enumerate(positives):
            rest = [a for a in others[n * negatives : (n + 1) * negatives] if a]
            if positive and rest:
                entry = {"id": example.id, "query": example.query.strip()}
                pairs.append(entry | {"positive": positive, "negatives": rest})
    return pairs


def score_pairs(model: RewardModel, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores of the positives [B] and the negatives [B, N], -inf where a pair has fewer than N."""
    rows = [
        (pair["query"], text) for pair in pairs for text in (pair["positive"], *pair["negatives"])
    ]
    scores = iter(model.score(*zip(*rows, strict=True)).unbind())
    width = max(len(pair["negatives"]) for pair in pairs)
    positive, negatives = [], []
    for pair in pairs:
        positive.append(next(scores))
        found = [next(scores) for _ in pair["negatives"]]
        missing = [positive[0].new_tensor(-math.inf)] * (width - len(found))
        negatives.append(torch.stack(found + missing))
    return torch.stack(positive), torch.stack(negatives)


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: list[dict]) -> float:
    """How often a positive scores above a negative of its query; chance is 0.5."""
    won = total = 0
    for start in range(0, len(pairs), 64):
        positive, negatives = score_pairs(model, pairs[start : start + 64])
        won += (positive[:, None] > negatives)[negatives.isfinite()].sum().item()
        total += negatives.isfinite().sum().item()
    return won / max(total, 1)


def train_reward_model(
    model: RewardModel,
    pairs: list[dict],
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 5e-5,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict:
    """InfoNCE with AdamW and a linear decay, on nine tenths of the queries; the rest measure it."""
    ids = sorted({pair["id"] for pair in pairs})
    random.Random(seed).shuffle(ids)
    held_ids = set(ids[: max(1, len(ids) // 10)])
    held = [pair for pair in pairs if pair["id"] in held_ids]
    kept = [pair for pair in pairs if pair["id"] not in held_ids]
    if not kept:
        raise ValueError(f"{len(pairs)} answer pairs are too few to train a reward model on")
    steps = epochs * math.ceil(len(kept) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    torch.manual_seed(seed)  # dropout
    model.train()
    losses = []
    with tqdm(total=steps, desc="reward model", disable=None, leave=False) as bar:
        for epoch in range(epochs):
            random.Random(f"{seed} {epoch}").shuffle(kept)
            for start in range(0, len(kept), batch_size):
                positive, negatives = score_pairs(model, kept[start : start + batch_size])
                loss = info_nce(positive, negatives, temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    accuracy = pair_accuracy(model, held)
    last = losses[-max(1, len(losses) // 10) :]
    return {"pairs": len(pairs), "loss": sum(last) / len(last), "pair_accuracy": accuracy}


def probe(model: RewardModel, path) -> float:
    """How often the user's own answer scores above the same answer in another user's style.

    The file is a list of {"query", "own", "other"}. A model that is blind to the profile cannot beat
    0.5 by much, however good its pair accuracy is.
    """
    triples = read_json(path, list)
    queries = [triple["query"] for triple in triples]
    own = model.score_all(queries, [triple["own"] for triple in triples])
    other = model.score_all(queries, [triple["other"] for triple in triples])
    return ((own > other).float().mean() + (own == other).float().mean() / 2).item()


def obtain_reward_model(options, decoder, tokenizer, examples, directory, device) -> RewardModel:
    """The trained reward model of `directory`; trained into it first if it is not there yet.

    What is finished is kept: the pairs (the slow part) in pairs.json, then the model, then its report.
    """
    directory = Path(directory)
    if (directory / "report.json").is_file():
        return load_reward_model(directory, device)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "pairs.json").is_file():
        pairs = build_pairs(
            decoder,
            tokenizer,
            examples,
            options.k,
            options.retriever,
            options.pairs_per_query,
            options.negatives,
            options.max_prompt_tokens,
            options.max_new_tokens,
            seed=options.seed,
            dense=make_dense(options),
        )
        write_json(directory / "pairs.json", pairs)
    torch.manual_seed(options.seed)
    model = RewardModel(load_encoder(options.encoder, device))
    pairs = read_json(directory / "pairs.json", list)
    report = train_reward_model(
        model, pairs, options.reward_epochs, lr=options.reward_lr, seed=options.seed
    )
    if (Path(options.data) / "probe.json").is_file():
        report["own_over_other_user"] = probe(model, Path(options.data) / "probe.json")
    save_reward_model(model, directory)
    write_json(directory / "report.json", report)
    print(f"reward model: {json.dumps(report)} (chance 0.5 for both)")
    return model


@dataclass
class Options:
    model: str = "toy/policy"  # checkpoint of the base policy, whose answers are contrasted
    encoder: str = "toy/encoder"  # BERT checkpoint that becomes the reward model
    pooling: str = "mean"  # of the dense retriever: mean or cls
    data: str = "toy/lamp"  # directory with LaMP's files
    task: TaskName = "LaMP-4"  # which of LaMP's generation tasks
    retriever: Retriever = "bm25"  # how profile items are ranked
    k: int = 4  # items in the prompt of a positive
    pairs_per_query: int = 3  # positives sampled for each query
    negatives: int = 1  # negatives for each positive
    reward_epochs: int = 3  # passes over the pairs
    reward_lr: float = 1e-3  # peak learning rate; the paper's BERT-base takes 5e-5
    max_prompt_tokens: int = 512  # longer prompts lose the ends of their items
    max_new_tokens: int = 128  # longest completion
    limit: int = 0  # only the first records; 0 takes all
    seed: int = 0  # of sampling, initialisation and order
    device: str = "auto"  # auto, cuda, mps or cpu
    out: str = "runs/reward"  # directory of the trained model


def main(options: Options) -> None:
    device = pick_device(options.device)
    examples = load_lamp(options.data, options.task, "train")[: options.limit or None]
    decoder, tokenizer = load_decoder(options.model, device), load_tokenizer(options.model)
    obtain_reward_model(options, decoder, tokenizer, examples, options.out, device)
    print(f"{options.out}: {(Path(options.out) / 'report.json').read_text()}")


if __name__ == "__main__":
    command(main, Options, __doc__)
