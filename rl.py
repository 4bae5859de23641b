"""GRPO: the policy learns to reason over the profile from reward alone. This is the main job.

One step, for P prompts with G completions each:

  1. roll out    o_1 .. o_G sampled from the policy at temperature T
  2. reward      r_i = accuracy + 0.1 format + 0.1 personalization                   (reward.py)
  3. advantage   A_i = (r_i - mean r) / (std r + 1e-4) within the group
  4. update      ratio_t = exp(log pi(o_t) - log pi_old(o_t)); the loss of a token is
                 -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + beta (exp(d) - d - 1)
                 with d = log ref(o_t) - log pi(o_t). The mean over a completion's tokens, then
                 over completions ("grpo"), or the sum of all tokens divided by their number
                 ("dapo") or by a constant ("dr_grpo")

With one update per rollout the ratio is exactly 1, and the loss is 0 up to rounding, since the
advantages of a group sum to 0. Its gradient is not 0: that of ratio A at ratio 1 is A grad log pi,
so the step is REINFORCE with the group's mean as baseline. Reward is the signal to watch.

Left out of GRPO, and why: a value network (the group's mean takes its place); a correction for
sampler and trainer rounding differently (`gap` in the log watches it); length penalties, and new
samples for groups whose rewards are all equal (both change what is compared, and the paper has
neither).

Every random choice is a function of (seed, purpose, step), so a stopped run keeps no generator
state. There is no dropout, and the policy is trained on the very ids that it sampled: no text is
tokenized a second time.

    python rl.py                                        # the toy, on a CPU, in a minute or two
    python rl.py --preset paper --model DIR --data DIR --task LaMP-5 --encoder DIR --out runs/5
    torchrun --nproc-per-node 4 rl.py ...               # four GPUs share a step's prompts
"""

import copy
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import eval as scoring
import prlm
from eval import seed_of
from prlm import FREE, Decoder, Tokenizer, option
from retrieve import answer_block, load_examples, make_prompts, make_ranker, one_line, task_of
from reward import PARTS, RewardOptions, check_judge, make_judge, rewards

Normalizer = Literal["grpo", "dapo", "dr_grpo"]

# ---- The algorithm (the paper's optimization; Shao et al. 2024) ----------------------------------


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [P, G]; "none" does not divide (Dr. GRPO).

    The standard deviation has Bessel's correction. A group whose rewards are equal up to rounding
    (8 eps of the largest), or a group of one, gets exact zeros under either scale: it does not say
    which completion was better. The result is float32, or the rewards' dtype if that is wider.
    ValueError for another scale.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale {scale!r} is neither std nor none")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = rewards - rewards.mean(1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)
    centred = centred.masked_fill(centred.abs().amax(1, keepdim=True) <= rounding, 0.0)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    return centred / (std + 1e-4)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """An estimate of each token's KL(policy | reference): exp(d) - d - 1, d = ref - policy.

    The third estimator in John Schulman's note "Approximating KL Divergence" (2020): unbiased on
    tokens that the policy sampled, and never negative.
    """
    difference = ref_logprobs - logprobs
    return difference.clamp(max=LARGEST).exp() - difference - 1


def token_weights(mask: Tensor, normalizer: str, max_new_tokens: int | None = None) -> Tensor:
    """The weight of every token of a step in its loss, [P, G, C]; 0 outside of the mask.

    "grpo": 1 / (P G tokens of the completion); "dapo": 1 / tokens of the mask; "dr_grpo":
    1 / (P G max_new_tokens). ValueError for another name, or "dr_grpo" without max_new_tokens.
    """
    if normalizer not in get_args(Normalizer):
        raise ValueError(f"normalizer {normalizer!r} is none of {', '.join(get_args(Normalizer))}")
    if normalizer == "dr_grpo" and not max_new_tokens:
        raise ValueError("dr_grpo divides by max_new_tokens, which was not given")
    mask = mask.float()
    completions = mask.shape[0] * mask.shape[1]
    if normalizer == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / completions
    return mask / (
        mask.sum().clamp(min=1) if normalizer == "dapo" else completions * max_new_tokens
    )


LARGEST = 20.0  # of a log-ratio: e^20 is far beyond any clip, and e^100 would overflow


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, clip: float = 0.2, clip_high: float | None = None,
    beta: float = 0.0, normalizer: str = "grpo", max_new_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of step 4, a scalar: log-probabilities and mask [P, G, C], advantages [P, G].

    `clip_high` widens the upper side of the clip (DAPO). What lies outside the mask never counts,
    whatever it holds, NaN included. `weights` are `token_weights` of this mask, or, for a
    micro-batch, its part of those of the whole step. ValueError: beta without ref_logprobs.
    """
    weights = token_weights(mask, normalizer, max_new_tokens) if weights is None else weights
    outside = ~mask.bool()
    logprobs = logprobs.masked_fill(outside, 0.0)
    old_logprobs = old_logprobs.masked_fill(outside, 0.0)
    ratio = (logprobs - old_logprobs).clamp(max=LARGEST).exp()  # [P, G, C]
    advantage = advantages[..., None]  # [P, G, 1]
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if beta:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        loss = loss + beta * k3(logprobs, ref_logprobs.masked_fill(outside, 0.0))
    return (loss * weights).sum()


# ---- One step ----------------------------------------------------------------------------------


@dataclass
class Options(RewardOptions):
    accuracy: float = option(
        1.0, "weight of ROUGE against the user's own text; 0 learns without", 0
    )
    format: float = option(0.1, "weight of a closed reasoning block", 0)
    personalization: float = option(0.1, "weight of the judge; 0 does without one", 0)
    warm_start: int = option(0, "supervised steps of 8 records before RL, to learn the form", 0)
    warm_start_lr: float = option(1e-4, "their peak learning rate", 1e-12)
    steps: int = option(30, "rollouts, each with its update; 0 stops after the warm start", 0)
    prompts_per_step: int = option(16, "P; the authors take 1", 1)
    group_size: int = option(8, "G; the authors take 4", 2)
    temperature: float = option(1.0, "of sampling and training; the authors take 0.7", prlm.COLDEST)
    lr: float = option(1e-3, "peak learning rate of AdamW; the authors take 1e-6", 1e-12)
    lora_rank: int = option(0, "rank of LoRA adapters, whose alpha is the same; 0: all weights", 0)
    beta: float = option(0.0, "weight of the KL to the policy before RL; the authors take 0.04", 0)
    clip: float = option(0.2, "how far the ratio may be from 1 before the gradient is cut", 1e-12)
    clip_high: float | None = option(
        None, "the same above 1, if that should be wider (DAPO)", 1e-12
    )
    normalizer: Normalizer = option(
        "grpo", "of the loss; dr_grpo does not divide advantages by std"
    )
    updates_per_rollout: int = option(1, "with one, the ratio is 1 and the clip never acts", 1)
    mask_truncated: bool = option(False, "leave completions without an end out of the loss")
    checkpointing: bool = option(False, "run each layer again in backward: less memory, slower")
    eval_every: int = option(5, "steps between scores on 64 held-out records; 0 is never", 0)
    save_every: int = option(20, "steps between saved states", 1)
    out: str = option("runs/toy", "run directory")
    resume: bool = option(False, "go on with the run in --out, or start it there")
    overwrite: bool = option(False, "delete the run in --out")
    force: bool = option(False, "train though the first look saw nothing to learn")


@dataclass
class Policy:
    """The model in training and the copies that belong to it."""

    decoder: Decoder  # what the optimizer changes: float32 weights, or adapters on a frozen base
    sampler: Decoder  # what generates: the decoder itself, or its copy in the products' precision
    tokenizer: Tokenizer
    reference: Decoder  # the policy before RL, frozen


def roll_out(o: Options, policy: Policy, judge, examples, prompts, step) -> list[dict]:
    """Steps 1 to 3: a line of samples.jsonl for each of the P G completions, group by group."""
    # 1. roll out
    G, batch = o.group_size, math.ceil(len(prompts) / prlm.world()[1]) * o.group_size
    groups = scoring.complete(
        o, policy.sampler, policy.tokenizer, prompts, G, o.temperature, ("rollout", step), batch
    )
    rows = scoring.make_records(o, policy.tokenizer, examples, prompts, groups)
    # 2. reward
    repeated = [example for example in examples for _ in range(G)]  # [P*G]
    weights = {name: getattr(o, name) for name in PARTS}
    earned = rewards([row["completion"] for row in rows], repeated, judge, **weights)
    # 3. advantage
    reward = torch.tensor([row["reward"] for row in earned]).view(-1, G)  # [P, G]
    advantages = group_advantages(reward, "none" if o.normalizer == "dr_grpo" else "std").flatten()
    return [
        {"step": step, **row, **parts, "advantage": advantage}
        for row, parts, advantage in zip(rows, earned, advantages.tolist(), strict=True)
    ]


def update(o: Options, policy: Policy, optimizer, prompts, rows: list[dict]) -> dict[str, float]:
    """Step 4: `updates_per_rollout` optimizer steps on one rollout; returns what the log needs.

    pi_old is the decoder at its first pass over the rollout, before any update, not the sampler,
    which may be a bfloat16 copy: the two differ by `gap`. Each of several processes computes its
    share of the prompts, and the optimizer's step adds their gradients up.
    """
    decoder, device = policy.decoder, policy.decoder.head.device
    groups = [rows[n : n + o.group_size] for n in range(0, len(rows), o.group_size)]
    completions = [[row["tokens"] for row in group] for group in groups]  # [P][G]
    advantages = of_groups(groups, "advantage").to(device)  # [P, G]
    mask = trained_tokens(o, groups).to(device)  # [P, G, C]
    weights = token_weights(mask, o.normalizer, o.max_new_tokens)
    old_logprobs = torch.zeros_like(weights)
    for number in range(o.updates_per_rollout):
        measured = Measured(o, groups, mask)
        for batch in my_batches(o, prompts, completions):
            asked = [prompts[n] for n in batch], [completions[n] for n in batch], o.temperature
            logprobs, real = prlm.token_logprobs(decoder, *asked)  # [p, G, c]
            part = (batch, slice(None), slice(logprobs.shape[-1]))  # of the tensors [P, G, C]
            if number == 0:
                old_logprobs[part] = logprobs.detach()
            ref_logprobs = reference_logprobs(o, policy, asked)
            loss = grpo_loss(
                logprobs, old_logprobs[part], advantages[batch], mask[part] & real, ref_logprobs,
                o.clip, o.clip_high, o.beta, weights=weights[part],
            )  # fmt: skip
            loss.backward()
            measured.add(loss, logprobs.detach(), old_logprobs[part], ref_logprobs, part)
        norm = optimizer_step(optimizer)
        log = measured.log() | {"grad_norm": norm}
        gap = log if number == 0 else gap  # noqa: F821  of the first pass
    return log | {name: gap[name] for name in ("gap", "gap_mean")}


def trained_tokens(o: Options, groups: list[list[dict]]) -> Tensor:
    """True at the tokens that the loss counts, the end-of-sequence token among them. [P, G, C]

    From lengths, never from token values: padding may have the id of the end of a sequence.
    """
    lengths = torch.tensor([[len(row["tokens"]) for row in group] for group in groups])  # [P, G]
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    if o.mask_truncated:
        mask &= of_groups(groups, "finished").bool()[..., None]
    return mask


def of_groups(groups: list[list[dict]], key: str) -> Tensor:
    """One number of each completion's line. [P, G]"""
    return torch.tensor([[float(row[key]) for row in group] for group in groups])


@torch.no_grad()
def reference_logprobs(o: Options, policy: Policy, asked) -> Tensor | None:
    return prlm.token_logprobs(policy.reference, *asked)[0] if o.beta else None


def my_batches(o: Options, prompts, completions) -> list[list[int]]:
    """This process's share of the prompts, in micro-batches; a group is never split."""
    rank, world_size = prlm.world()
    mine = range(len(prompts))[rank::world_size]
    sizes = [len(prompts[n]) + sum(map(len, completions[n])) for n in mine]
    return [
        [mine[n] for n in batch] for batch in prlm.micro_batches(sizes, o.tokens_per_micro_batch)
    ]


def optimizer_step(optimizer) -> float:
    """Sums the gradients of all processes, clips their norm to 1, steps; returns the norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is None:  # a process without a share of this step
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm}: a lower --lr, in another --out, may do")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, at least one, then a cosine to a tenth of the peak.

    The n-th of w warm-up steps has n/w of the peak, the step after them has the peak.
    """
    rising = max(1, round(0.1 * steps))
    if step < rising:
        return peak * (step + 1) / rising
    passed = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * passed)) / 2)


def set_learning_rate(optimizer, step: int, steps: int, peak: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, peak)
    return group["lr"]


def choose(count: int, step: int, size: int, seed: int, start: int = 0) -> list[int]:
    """Indices of a step's examples: each step continues where the last one stopped.

    Every epoch has a shuffle of its own; `start` examples were read before step 0.
    """
    read = range(start + step * size, start + (step + 1) * size)
    orders = {}  # of the epochs that the step reaches into
    for epoch in {n // count for n in read}:
        orders[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)
    return [orders[n // count][n % count] for n in read]


# ---- A run ---------------------------------------------------------------------------------------


def main(o: Options, judge=None) -> None:
    """The run that the options describe; `judge` takes the place of the one that they name."""
    with prlm.processes():
        prlm.check_options(o)
        if o.personalization and judge is None:
            check_judge(o)
        train, held = load_examples(o, "train"), load_examples(o, "dev")
        _, tokenizer = prlm.load_policy(o)  # a faulty file or option, before anything is written
        make_prompts(o, tokenizer, train[:1])
        out = prlm.gather(open_run(o) if prlm.world()[0] == 0 else None)[0]
        if (out / "predictions.json").is_file():
            print(f"{out} was finished before")
        else:
            run(o, out, train, held, judge)
        report(o, out)


def run(o: Options, out: Path, train, held, judge=None) -> None:
    """The stages; each keeps its result in the run directory, and is skipped if it is there."""
    start = warm_start(o, out, train)
    policy = make_policy(o, start)
    first_look(o, out, policy, train)
    if judge is None and o.personalization and o.steps:
        judge = make_judge(o, policy.reference, policy.tokenizer, train, held, out / "reward")
    score_held_out(o, out, "no_profile", policy, held, k=0)
    score_held_out(o, out, "before", policy, held)
    train_policy(o, out, policy, judge, train, held)
    refresh(policy)  # to nearest, as whoever loads the checkpoint will have it
    prlm.save_decoder(policy.decoder, policy.tokenizer, out / "checkpoint")
    records = score_held_out(o, out, "after", policy, held)
    scoring.write_predictions(
        out / "predictions.json", o.task, records
    )  # last: it says that all is there


def train_policy(o: Options, out: Path, policy: Policy, judge, train, held) -> None:
    """GRPO: steps, their lines in the logs, evaluations and saved states."""
    optimizer = make_optimizer(policy, o.lr)
    prompts = make_prompts(o, policy.tokenizer, train)

    def take(step: int) -> str:
        """One step; returns what to say of it."""
        begun = time.perf_counter()
        # On from where the warm start ended, so that RL meets records that it has not imitated.
        chosen = choose(len(train), step, o.prompts_per_step, o.seed, 8 * o.warm_start)
        asked = [prompts[n] for n in chosen]
        rows = roll_out(o, policy, judge, [train[n] for n in chosen], asked, step + 1)
        rolled = time.perf_counter()
        lr = set_learning_rate(optimizer, step, o.steps, o.lr)
        log = update(o, policy, optimizer, asked, rows)
        refresh(policy, seed_of(o.seed, "rounding", step))
        seconds = {"rollout": rolled - begun, "update": time.perf_counter() - rolled}
        metrics = {"step": step + 1, "lr": lr, **rollout_metrics(o, asked, rows, seconds), **log}
        said = f"step {step + 1} of {o.steps}: reward {metrics['reward']:.3f}"
        if o.eval_every and ((step + 1) % o.eval_every == 0 or step + 1 == o.steps):
            scores = scoring.mean_scores(
                scoring.answer_all(o, policy.sampler, policy.tokenizer, held[:64])
            )
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
            said += f", held-out ROUGE-L {scores['rouge-l']:.3f}" if scores else ""
        prlm.append(out / "samples.jsonl", scoring.to_lines(rows))
        prlm.append(out / "metrics.jsonl", [metrics])
        loud = "eval_rouge-l" in metrics or (step + 1) % max(1, o.steps // 10) == 0
        return said if loud else ""

    logs = ("samples.jsonl", "metrics.jsonl")
    keep_training(o, out, "GRPO", o.steps, policy, optimizer, take, logs)


# ==== Below: not the method =====================================================================

# ---- The policy and its copies -------------------------------------------------------------------


def make_policy(o: Options, directory) -> Policy:
    """The checkpoint of `directory`, ready to be trained as the options ask.

    AdamW needs float32 weights: at a learning rate of 1e-6 a bfloat16 weight would never move. With
    LoRA only the adapters move, so the frozen base may be as small as the products are, and the
    decoder, adapters on, samples itself.
    """
    device = prlm.pick_device(o.device)
    dtype = prlm.product_dtype(o.precision, device)
    decoder = prlm.multiply_in(prlm.load_decoder(directory, device), dtype)
    if o.lora_rank:
        torch.manual_seed(o.seed)  # LoRA's A starts random
        prlm.add_lora(prlm.for_sampling(decoder, dtype), rank=o.lora_rank, alpha=o.lora_rank)
        sampler, reference = decoder, prlm.without_lora(decoder)
    else:
        reference = prlm.for_sampling(copy.deepcopy(decoder), dtype)
        sampler = decoder if dtype == torch.float32 else copy.deepcopy(reference)
    decoder.checkpointing = o.checkpointing
    return Policy(decoder, sampler, prlm.load_tokenizer(directory), reference)


@torch.no_grad()
def refresh(policy: Policy, seed: int | None = None) -> None:
    """Copies the decoder's weights into the sampler, if that is a bfloat16 copy.

    With a seed they are rounded at random, up or down in proportion to the distance, so that the
    copy follows on average: to nearest, steps of a learning rate like 1e-6 would hardly reach it.
    """
    if policy.sampler is policy.decoder:
        return
    device = policy.decoder.head.device
    generator = torch.Generator(device).manual_seed(seed or 0)
    pairs = zip(policy.sampler.parameters(), policy.decoder.parameters(), strict=True)
    for copied, weight in pairs:
        if (
            copied.dtype == torch.bfloat16 and seed is not None
        ):  # the upper half of a float32's bits
            bits = weight.detach().view(torch.int32)
            how = {"dtype": torch.int32, "device": device, "generator": generator}
            weight = (bits + torch.randint(2**16, bits.shape, **how) & -(2**16)).view(torch.float32)
        copied.copy_(weight)


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
    # On CUDA the fused AdamW does without a second copy of its second moments during a step.
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)


# ---- The log of a step ---------------------------------------------------------------------------

METRICS = {  # the keys of a line of metrics.jsonl: means over all completions of the step
    "step": "counted from 1",
    "lr": "its learning rate",
    "reward": "what the completions earned: the signal to watch",
    "accuracy": "ROUGE-1 + ROUGE-2 + ROUGE-L of the answers, 0 to 3, before its weight",
    "format": "share that close their reasoning, before its weight",
    "personalization": "the judge's values, before their weight (an empty LaMP-4 answer: -10)",
    "spread": "standard deviation of the reward within a group, averaged: 0 teaches nothing",
    "zero_spread_groups": "share of groups in which all earned the same: they teach nothing. Near "
    "1 is success where the reward is high; else try a higher --temperature or --group-size",
    "truncated": "share cut off at --max-new-tokens; where it is high, raise that",
    "completion_tokens": "length of a completion",
    "entropy": "mean -log p of the sampled tokens, in nats: near 0 the policy no longer explores",
    "loss": "about 0 with one update per rollout and no KL, since advantages sum to 0",
    "grad_norm": "of the gradient, before it is clipped to 1",
    "kl": "k3 estimate per token, in nats: how far from the policy before RL; 0 with --beta 0",
    "clip_fraction": "share of tokens whose gradient was clipped to 0; 0 with one update",
    "gap": "largest difference of a token's log-probability between sampler and trainer: 1e-4 in "
    "float32; GAP in bfloat16. Much more: stop, the two disagree about the model",
    "gap_mean": "its mean over tokens",
    "tokens_per_second": "prompt and completion tokens, over the whole step",
    "seconds_rollout": "sampling and rewards",
    "seconds_update": "log-probabilities, gradient, optimizer",
    "eval_rouge-1": "of greedy answers to the first 64 held-out records; likewise -2, -l, bleu",
}


def rollout_metrics(o: Options, prompts, rows: list[dict], seconds: dict) -> dict[str, float]:
    """The part of METRICS that a rollout shows."""
    groups = [rows[n : n + o.group_size] for n in range(0, len(rows), o.group_size)]
    spread, count = of_groups(groups, "advantage").any(1), sum(len(row["tokens"]) for row in rows)
    metrics = {name: of_groups(groups, name).mean().item() for name in ("reward", *PARTS)}
    return metrics | {
        "spread": of_groups(groups, "reward").std(1).mean().item(),
        "zero_spread_groups": 1 - spread.float().mean().item(),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "completion_tokens": count / len(rows),
        "entropy": -sum(sum(row["logprobs"]) for row in rows) / count,
        "tokens_per_second": (count + sum(map(len, prompts))) / sum(seconds.values()),
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


class Measured:
    """Sums up what METRICS says of an update, over micro-batches and processes."""

    def __init__(self, o: Options, groups: list[list[dict]], mask: Tensor):
        self.o, self.mask, self.tokens = o, mask, max(mask.sum().item(), 1)
        self.advantages = of_groups(groups, "advantage")[..., None].to(mask.device)
        logprobs = [torch.tensor(row["logprobs"]) for group in groups for row in group]
        self.sampled = pad_sequence(logprobs, batch_first=True).to(mask.device).view_as(mask)
        self.sums = dict.fromkeys(("loss", "kl", "clip_fraction", "gap_mean"), 0.0)
        self.gap = 0.0

    def add(self, loss, logprobs, old_logprobs, ref_logprobs, part) -> None:
        """A micro-batch; `part` is its place in the tensors [P, G, C] of the step."""
        mask, advantage = self.mask[part], self.advantages[part[0]]
        ratio, high = (logprobs - old_logprobs).exp(), self.o.clip_high or self.o.clip
        # In the other direction the minimum takes the term that is not clipped.
        clipped = ((advantage > 0) & (ratio > 1 + high)) | (
            (advantage < 0) & (ratio < 1 - self.o.clip)
        )
        gap = (logprobs - self.sampled[part]).abs()[mask]
        self.gap = max(self.gap, gap.max().item() if len(gap) else 0.0)
        self.sums["loss"] += loss.item()
        self.sums["gap_mean"] += gap.sum().item() / self.tokens
        self.sums["clip_fraction"] += (clipped & mask).sum().item() / self.tokens
        if ref_logprobs is not None:
            self.sums["kl"] += k3(logprobs, ref_logprobs)[mask].sum().item() / self.tokens

    def log(self) -> dict[str, float]:
        shares = prlm.gather(self.sums | {"gap": self.gap})
        total = {name: sum(share[name] for share in shares) for name in self.sums}
        return total | {"gap": max(share["gap"] for share in shares)}


# ---- Before RL: a warm start, and a first look -------------------------------------------------

EVIDENCE = "The user wrote: {}\n"  # what the warm start puts into the reasoning block,
EVIDENCE_ITEMS, EVIDENCE_TOKENS = 3, 14  # for so many items: a title, or how a tweet begins


def warm_start_targets(o: Options, tokenizer: Tokenizer, examples) -> list[list[int]]:
    """The completion to imitate for each training record, as ids that end with the EOS id.

        <think>
        The user wrote: (the last field of a retrieved item, at most 14 tokens; so for three)
        </think>
        <answer>
        {'title': '(what the user really wrote)'}
        </answer>

    Without retrieved items the sentences are left out, with --no-reasoning the whole block. What
    the prompt has opened already is not said again.
    """
    rank = make_ranker(o)
    *_, last_field = task_of(o.task).fields
    targets = []
    for example in examples:
        form, texts = answer_block(o.task), [one_line(example.target)]
        if o.reasoning:
            items = rank(example, min(o.k, EVIDENCE_ITEMS))
            quoted = [tokenizer.cut(item[last_field].strip(), EVIDENCE_TOKENS) for item in items]
            evidence = EVIDENCE * len(quoted) or "\n"
            form = f"<think>\n{evidence}</think>\n{form}".removeprefix(tokenizer.opening)
            texts = quoted + texts
        targets.append([*tokenizer.fill(form, *texts), tokenizer.end_id])
    return targets


def warm_start(o: Options, out: Path, train) -> str | Path:
    """The directory of the policy that RL begins with: --model, or after --warm-start steps.

    A step is cross-entropy on 8 whole completions, in nats per token.
    """
    folder = out / "warm_start"
    if not o.warm_start or (folder / "model.safetensors").is_file():
        return folder if o.warm_start else o.model
    policy = make_policy(o, o.model)
    optimizer = make_optimizer(policy, o.warm_start_lr)
    prompts = make_prompts(o, policy.tokenizer, train)
    targets = warm_start_targets(o, policy.tokenizer, train)
    example = prlm.printable(policy.tokenizer.decode(targets[0])).replace("\n", "\n  ")
    print(f"warm start: {o.warm_start} steps towards, for example\n  {example}")

    def take(step: int) -> str:
        chosen = choose(len(train), step, 8, o.seed)
        asked, wanted = [prompts[n] for n in chosen], [[targets[n]] for n in chosen]
        tokens, loss_sum = sum(len(targets[n]) for n in chosen), 0.0
        for batch in my_batches(o, asked, wanted):
            logprobs, _ = prlm.token_logprobs(
                policy.decoder, [asked[n] for n in batch], [wanted[n] for n in batch]
            )
            loss = -logprobs.sum() / tokens
            loss.backward()
            loss_sum += loss.item()
        set_learning_rate(optimizer, step, o.warm_start, o.warm_start_lr)
        line = {"step": step + 1, "loss": sum(prlm.gather(loss_sum))}
        line["grad_norm"] = optimizer_step(optimizer)
        prlm.append(folder / "metrics.jsonl", [line])
        loud = (step + 1) % max(1, o.warm_start // 5) == 0
        return f"warm start, step {step + 1}: {line['loss']:.3f} nats per token" if loud else ""

    keep_training(
        o, folder, "warm start", o.warm_start, policy, optimizer, take, ("metrics.jsonl",)
    )
    prlm.save_decoder(policy.decoder, policy.tokenizer, folder)
    prlm.gather()
    return folder


def first_look(o: Options, out: Path, policy: Policy, train) -> None:
    """One rollout of eight prompts, without a judge: a run that could not learn is stopped."""
    if not policy.tokenizer.eos_ids:
        raise ValueError(f"{o.model}: no file names an EOS id, so no completion could end")
    if o.steps == 0 or (out / "look.json").is_file():
        return
    shown = [train[n] for n in choose(len(train), 0, min(8, len(train)), o.seed, 8 * o.warm_start)]
    prompts = make_prompts(o, policy.tokenizer, shown)
    rows = roll_out(o, policy, None, shown, prompts, "look")
    groups = [rows[n : n + o.group_size] for n in range(0, len(rows), o.group_size)]

    def differs(group: list[dict]) -> bool:  # its rewards, or answers that a judge would value
        answers = {r["answer"] for r in group if not scoring.is_placeholder(r["answer"], o.task)}
        return any(r["advantage"] for r in group) or (o.personalization > 0 and len(answers) > 1)

    found = {
        "answered": sum(not scoring.is_placeholder(row["answer"], o.task) for row in rows)
        / len(rows),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "groups_with_spread": sum(map(differs, groups)) / len(groups),
    }
    print(
        f"a first look: {found['answered']:.0%} of completions have an answer, "
        f"{found['truncated']:.0%} are cut off; rewards differ in "
        f"{found['groups_with_spread']:.0%} of groups"
    )
    if found["groups_with_spread"] <= 0.1 and not o.force:
        raise ValueError(
            "in nearly all groups every completion earns the same, so GRPO would learn nothing. "
            "--warm-start 125 teaches the form from the training records; where many are cut off, "
            "raise --max-new-tokens, and where most have an answer, --temperature; with "
            "--overwrite. --force trains all the same"
        )
    prlm.write_json(out / "look.json", found)


# ---- A run's directory, its saved states, its end ----------------------------------------------


def open_run(o: Options) -> Path:
    """The run directory: a new one, or with --resume what is there, if its options agree."""
    out = Path(o.out)
    config = out / "config.json"
    if not (o.resume and config.is_file()):
        return prlm.new_directory(o)
    recorded, mine = prlm.read_json(config), asdict(o)
    changed = [name for name in mine if name not in FREE and mine[name] != recorded.get(name)]
    if changed or o.steps < recorded["steps"]:
        words = ", ".join(
            f"--{n.replace('_', '-')} {recorded.get(n)}" for n in changed or ["steps"]
        )
        raise ValueError(f"{out} was made with {words}: resume it with that, or take another --out")
    if o.steps > recorded["steps"]:  # its last files are those of fewer steps
        for name in ("predictions.json", "held_out/after.jsonl"):
            (out / name).unlink(missing_ok=True)
    prlm.write_json(config, mine)
    return out


def keep_training(o: Options, folder: Path, title, count, policy, optimizer, take, logs) -> None:
    """take(step) for the steps up to `count` that are not done; saves the state every
    --save-every steps, after the last one, and when a signal has asked to stop.

    First what is saved is put back: weights, the optimizer's state, and the logs, cut to their size
    at the time. What take returns is printed, after all is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = load_state(folder, policy, optimizer, logs)
    if done:
        refresh(policy, seed_of(o.seed, "rounding", done - 1))
        print(f"{title}: on after step {done}")
    with Stop() as stop, prlm.progress(title=title, total=count, initial=done) as bar:
        for step in range(done, count):
            said = take(step)
            asked = max(prlm.gather(stop.asked))  # whichever of the processes was asked
            if (step + 1) % o.save_every == 0 or step + 1 == count or asked:
                save_state(folder, step + 1, policy, optimizer, logs)
            if asked:
                stop.leave(asked)
            if said:
                bar.write(said)
            bar.update()


def save_state(folder: Path, step: int, policy: Policy, optimizer, logs) -> None:
    """Saves all that the next step depends on, atomically."""
    trained = {n: p.detach() for n, p in policy.decoder.named_parameters() if p.requires_grad}
    sizes = {name: (folder / name).stat().st_size for name in logs}
    state = {"step": step, "model": trained, "optimizer": optimizer.state_dict(), "logs": sizes}
    with prlm.replacing(folder / "trainer.pt") as temporary:
        torch.save(state, temporary)


def load_state(folder: Path, policy: Policy, optimizer, logs) -> int:
    """Puts a saved state back, if there is one; returns the number of steps done."""
    path = folder / "trainer.pt"
    state = {"step": 0, "logs": dict.fromkeys(logs, 0)}
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            policy.decoder.load_state_dict(state["model"], strict=False)  # LoRA: no base in it
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = optimizer.defaults["fused"]  # as this device needs it
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # whatever torch makes of another file
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not a state of this run ({reason})") from None
    for name in logs if prlm.world()[0] == 0 else ():
        with open(folder / name, "ab") as file:
            file.truncate(min(state["logs"][name], file.tell()))
    return state["step"]


class Stop:
    """Ctrl-C and SIGTERM wait until the step is done and saved; a second one does not."""

    def __enter__(self) -> "Stop":
        self.asked = 0
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = number
        self.say("\nstopping after this step; again: at once")

    def leave(self, number: int) -> None:
        self.say("stopped; the same command with --resume goes on")
        sys.exit(128 + number)

    def say(self, text: str) -> None:
        try:
            print(text, file=sys.stderr, flush=True)
            sys.stdout.flush()
        except OSError:  # after Ctrl-C, `| tee` is gone before us: nobody reads
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)


def score_held_out(o: Options, out: Path, name: str, policy: Policy, held, k=None) -> list[dict]:
    """Scores held-out records into scores.json, greedy and sampled at 0.7; the greedy answers go
    to held_out/{name}.jsonl and are returned.
    """
    file, lines = out / "scores.json", out / "held_out" / f"{name}.jsonl"
    if lines.is_file():
        return prlm.read_lines(lines)
    records = scoring.answer_all(o, policy.sampler, policy.tokenizer, held, k=k)
    sampled = scoring.mean_scores(
        scoring.answer_all(o, policy.sampler, policy.tokenizer, held, 0.7, k)
    )
    scores = prlm.read_json(file) if file.is_file() else {}
    scores[name] = scoring.mean_scores(records) | {
        f"{key}_sampled": x for key, x in sampled.items()
    }
    prlm.write_json(file, scores)
    prlm.write_text(
        lines, "".join(f"{json.dumps(record)}\n" for record in scoring.to_lines(records))
    )
    return records


def report(o: Options, out: Path) -> None:
    """Prints the scores of a finished run, and one held-out user before and after."""
    if prlm.world()[0]:
        return
    scores = prlm.read_json(out / "scores.json")
    names = {"no_profile": "no profile", "before": "RAG before RL", "after": "after RL"}
    columns = ("rouge-1", "rouge-l", "rouge-1_sampled", "rouge-l_sampled")
    print(
        scoring.table(
            {names[n]: {c: x for c, x in s.items() if c in columns} for n, s in scores.items()}
        )
    )
    before, after = (prlm.read_lines(out / "held_out" / f"{n}.jsonl") for n in ("before", "after"))
    gains = [a.get("rouge-l", 0) - b.get("rouge-l", 0) for a, b in zip(after, before, strict=True)]
    n = gains.index(max(gains))
    prompt = after[n]["prompt"].rpartition("</answer>\n")[2]
    shown = {"prompt": prompt, "the user wrote": after[n]["target"]}
    shown |= {"before RL": before[n]["completion"], "after RL": after[n]["completion"]}
    print(f"\nthe held-out record that gained most, {after[n]['id']}:")
    for title, text in shown.items():
        print(f"--- {title}\n{prlm.printable(str(text)).strip()}")
    print(f"\n{out} is complete. As a page: python toy/page.py --run {out}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
