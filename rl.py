"""GRPO: the policy learns to reason over the profile from reward alone. This is the main job.

One step, for P prompts with G completions each:

  1. roll out    o_1 .. o_G sampled from the policy at temperature T
  2. reward      r_i = accuracy + 0.1 format + 0.1 personalization, see reward.py
  3. advantage   A_i = (r_i - mean r) / (std r + 1e-4) within the group
  4. update      ratio_t = exp(log pi(o_t) - log pi_old(o_t)); the loss of a token is
                 -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + beta (exp(d) - d - 1)
                 with d = log ref(o_t) - log pi(o_t); `token_weights` says what a token weighs

With one update per rollout and no KL the "grpo" loss is 0: the ratio is 1, a group's advantages sum
to 0. Its gradient is not: that of ratio A is A grad log pi there, so the step is REINFORCE with the
group's mean as baseline. The policy is trained on the very ids that it sampled. Every random choice
is a function of (seed, purpose, step), so no generator is saved.
Left out: a value network (the group's mean takes its place); a correction for sampler and trainer
rounding differently (`gap` watches it); length penalties; new samples for groups of equal rewards.

    python rl.py  # the toy, on a CPU, in minutes; on four GPUs:
    torchrun --nproc-per-node 4 rl.py --preset paper --model DIR --data DIR ..."""

import copy
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import eval as scoring
import prlm
from eval import seed_of
from prlm import Decoder, Tokenizer, option
from retrieve import answer_block, best_items, load_examples, make_prompts, one_line, task_of
from reward import PARTS, RewardOptions, chunks, judge_model, make_judge, micro_batches, rewards

Normalizer = Literal["grpo", "dapo", "dr_grpo"]
LARGEST = 20.0  # of a log-ratio: e^20 is far beyond any clip, e^100 would overflow


# ---- The paper's optimization: GRPO (Shao et al. 2024) ----
def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [P, G], std with Bessel's correction; "none" does
    not divide (Dr. GRPO). A group of one, or of rewards equal up to rounding (8 eps of the
    largest), gets exact zeros. In float32 at least. ValueError: another scale."""
    if scale not in ("std", "none"):
        raise ValueError(f"scale {scale!r} is neither std nor none")
    rewards = prlm.widen(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)
    centred = centred.masked_fill(centred.abs().amax(1, keepdim=True) <= rounding, 0.0)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    return centred / (std + 1e-4)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Each token's KL(policy | reference) as exp(d) - d - 1, d = ref - policy: unbiased on tokens
    that the policy sampled, never negative (Schulman 2020)."""
    difference = (ref_logprobs - logprobs).clamp(max=LARGEST)
    return difference.exp() - difference - 1


def token_weights(mask: Tensor, normalizer: str, max_new_tokens: int | None = None) -> Tensor:
    """Each token's weight in the loss of a step, [P, G, C], 0 off the mask. "grpo": 1 / (P G tokens
    of the completion); "dapo": 1 / tokens of the mask; "dr_grpo": 1 / (P G max_new_tokens).
    ValueError for another name, or "dr_grpo" without max_new_tokens."""
    mask, completions = mask.float(), mask.shape[0] * mask.shape[1]
    if normalizer == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / completions
    if normalizer == "dapo":
        return mask / mask.sum().clamp(min=1)
    if normalizer == "dr_grpo" and max_new_tokens:
        return mask / (completions * max_new_tokens)
    raise ValueError(f"normalizer {normalizer!r} is unknown, or lacks max_new_tokens")


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, clip: float = 0.2, clip_high: float | None = None,
    beta: float = 0.0, normalizer: str = "grpo", max_new_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of step 4, a scalar: log-probabilities and mask [P, G, C], advantages [P, G].
    `clip_high`, if any, is the clip above 1 (DAPO). What lies outside the mask never counts.
    `weights`: `token_weights` of a part of a step. `update` minimises the loss, without weight
    decay. ValueError: beta without ref_logprobs."""
    weights = token_weights(mask, normalizer, max_new_tokens) if weights is None else weights
    outside = ~mask.bool()
    logprobs, old_logprobs = (x.masked_fill(outside, 0.0) for x in (logprobs, old_logprobs))
    ratio = (logprobs - old_logprobs).clamp(max=LARGEST).exp()  # [P, G, C]
    advantage = advantages[..., None]  # [P, G, 1]
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if beta:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        loss = loss + beta * k3(logprobs, ref_logprobs.masked_fill(outside, 0.0))
    return (loss * weights).sum()


# ---- One step ----
@dataclass
class Options(RewardOptions):
    accuracy: float = option(1.0, "weight of ROUGE against the user's text", 0)
    format: float = option(0.1, "weight of a closed reasoning block", 0)
    personalization: float = option(0.1, "weight of the judge; 0: there is none", 0)
    warm_start: int = option(0, "supervised steps of 8 records before RL, to learn the form", 0)
    warm_start_lr: float = option(1e-4, "their peak learning rate", 1e-12)
    steps: int = option(20, "rollouts, each with its update; --lr's schedule spans all", 0)
    prompts_per_step: int = option(16, "P, prompts of a step", 1)
    group_size: int = option(8, "G, completions of each prompt", 2)
    temperature: float = option(1.0, "of sampling and training", prlm.COLDEST)
    lr: float = option(5e-4, "peak learning rate of AdamW", 1e-12)
    lora_rank: int = option(0, "rank and alpha of LoRA adapters; 0: all weights are trained", 0)
    beta: float = option(0.0, "weight of the KL to the policy before RL", 0)
    clip: float = option(0.2, "how far the ratio may be from 1 before the gradient is cut", 1e-12)
    clip_high: float | None = option(None, "the same above 1, where that differs (DAPO)", 1e-12)
    normalizer: Normalizer = option("grpo", "how tokens are averaged; dr_grpo: also no std")
    updates_per_rollout: int = option(1, "with one, the ratio is 1 and the clip never acts", 1)
    mask_truncated: bool = option(False, "no loss on completions without an end")
    checkpointing: bool = option(False, "run each layer again in backward: less memory, slower")
    held_out: int = option(0, "only the first held-out records; 0: all", 0)
    eval_every: int = option(5, "steps between scores of 64 held-out records; 0: never", 0)
    save_every: int = option(20, "steps between saved states", 1)
    out: str = option("runs/toy", "run directory")
    resume: bool = option(False, "go on with the run in --out, or start it there")
    overwrite: bool = option(False, "delete the run in --out")
    force: bool = option(False, "train even if nothing could be learned")


@dataclass
class Policy:
    decoder: Decoder  # is trained
    sampler: Decoder  # generates: the decoder itself, or its copy in the products' precision
    tokenizer: Tokenizer
    reference: Decoder  # the policy before RL, frozen


def roll_out(o: Options, policy: Policy, judge, examples, prompts, step) -> list[dict]:
    """Steps 1 to 3: a line of samples.jsonl for each of P G completions, group by group."""
    # 1. roll out
    G, batch = o.group_size, math.ceil(len(prompts) / prlm.world()[1]) * o.group_size
    how = (policy.sampler, policy.tokenizer, examples, prompts, G, o.temperature)
    rows = scoring.make_records(o, *how, ("rollout", step), batch)
    # 2. reward
    asked = [example for example in examples for _ in range(G)]  # [P*G]
    weights = (o.accuracy, o.format, o.personalization)
    earned = rewards([row["completion"] for row in rows], asked, judge, *weights)
    # 3. advantage
    scale = "none" if o.normalizer == "dr_grpo" else "std"
    advantages = group_advantages(by_group(o, earned, "reward"), scale).flatten().tolist()
    lines = zip(rows, earned, advantages)
    return [{"step": step, **row, **parts, "advantage": a} for row, parts, a in lines]


def update(o: Options, policy: Policy, optimizer, prompts, rows: list[dict]) -> dict[str, float]:
    """Step 4, `updates_per_rollout` times; returns the last one's log. `old` is pi_old: the decoder
    at its first pass; the sampler may be a bfloat16 copy."""
    device, tokens = policy.decoder.head.device, [row["tokens"] for row in rows]
    groups = chunks(tokens, o.group_size)  # [P][G]
    advantages = by_group(o, rows, "advantage").to(device)  # [P, G]
    # [P, G, C]; from lengths, never from ids: padding may have the id of an end.
    mask = prlm.Ragged(tokens, device).mask.unflatten(0, advantages.shape)
    if o.mask_truncated:
        mask &= by_group(o, rows, "finished").bool().to(device)[..., None]
    weights = token_weights(mask, o.normalizer, o.max_new_tokens)
    new, old, ref = (torch.zeros_like(weights) for _ in range(3))  # log-probabilities
    for number in range(o.updates_per_rollout):
        for batch, *asked in micro_batches(prompts, groups, o.tokens_per_micro_batch, share=True):
            logprobs, _ = prlm.token_logprobs(policy.decoder, *asked, o.temperature)
            part = (batch, slice(None), slice(logprobs.shape[-1]))  # of the tensors [P, G, C]
            new[part] = logprobs.detach()
            if number == 0:
                old[part] = new[part]
                if o.beta:
                    ref[part], _ = prlm.token_logprobs(policy.reference, *asked, o.temperature)
            loss = grpo_loss(
                logprobs, old[part], advantages[batch], mask[part], ref[part],
                o.clip, o.clip_high, o.beta, weights=weights[part],
            )  # fmt: skip
            loss.backward()
        norm = optimizer_step(optimizer)
    return update_metrics(o, rows, advantages, mask, new, old, ref) | {"grad_norm": norm}


def by_group(o: Options, rows: list[dict], key: str) -> Tensor:
    return torch.tensor([float(row[key]) for row in rows]).view(-1, o.group_size)  # [P, G]


def optimizer_step(optimizer) -> float:
    """Sums the gradients of all processes, clips their norm to 1, steps; returns the norm."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is None:  # a process without a share of this step
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm}: a lower --lr may do")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear to the peak over a tenth of the steps, at least one; then a cosine to .1 of it."""
    rising = max(1, round(0.1 * steps))
    if step < rising:
        return peak * (step + 1) / rising
    passed = (step - rising) / max(1, steps - 1 - rising)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * passed)) / 2)


def choose(count: int, start: int, size: int, seed: int) -> list[int]:
    """Indices of the next examples after the first `start`; every epoch has its own shuffle."""
    read, order = range(start, start + size), {}
    for epoch in {n // count for n in read}:
        order[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)
    return [order[n // count][n % count] for n in read]


# ---- A run ----
def main(o: Options, judge=None):
    """The run that `o` describes; `judge`, if any, replaces the one it names."""
    with processes():
        if o.personalization and judge is None:
            judge_model(o)  # only checks it; `run` makes it
        train, held = load_examples(o, "train"), load_examples(o, "dev")[: o.held_out or None]
        policy = make_policy(o)  # a fault is said before anything is written
        make_prompts(o, policy.tokenizer, train[:1])
        out = prlm.gather(scoring.run_directory(o) if prlm.world()[0] == 0 else None)[0]
        done = (out / "predictions.json").is_file()
        if done and len(prlm.read_lines(out / "metrics.jsonl")) == o.steps:
            print(f"{out} was finished before")
        else:
            run(o, out, policy, train, held, judge)
        if prlm.world()[0] == 0:
            report(out)


def run(o: Options, out: Path, policy: Policy, train, held, judge=None):
    """The stages. Those before `train_policy` reuse a result that exists."""
    for name in ("predictions.json", "held_out/after.jsonl"):  # perhaps those of fewer steps
        (out / name).unlink(missing_ok=True)
    if o.warm_start:
        warm_start(o, out, policy, train)
    if o.steps:
        first_look(o, out, policy, train)
    if judge is None and o.personalization and o.steps:
        judge = make_judge(o, policy.reference, policy.tokenizer, train, held, out / "reward")
    score_held_out(replace(o, k=0), out, "no_profile", policy, held)
    score_held_out(o, out, "before", policy, held)
    train_policy(o, out, policy, judge, train, held)
    refresh(policy)  # to nearest, as in the checkpoint
    prlm.save_decoder(policy.decoder, policy.tokenizer, out / "checkpoint")
    records = score_held_out(o, out, "after", policy, held)
    scoring.write_predictions(out / "predictions.json", o.task, records)  # last: all is there


def train_policy(o: Options, out: Path, policy: Policy, judge, train, held):
    prompts = make_prompts(o, policy.tokenizer, train)

    def take(step: int, optimizer) -> dict:
        begun = time.perf_counter()
        # Records that the warm start has not imitated come first.
        start = 8 * o.warm_start + step * o.prompts_per_step
        chosen = choose(len(train), start, o.prompts_per_step, o.seed)
        asked = [prompts[n] for n in chosen]
        rows = roll_out(o, policy, judge, [train[n] for n in chosen], asked, step + 1)
        rolled = time.perf_counter()
        log = update(o, policy, optimizer, asked, rows)
        refresh(policy, seed_of(o.seed, "rounding", step))
        log = rollout_metrics(o, asked, rows, rolled - begun, time.perf_counter() - rolled) | log
        if o.eval_every and ((step + 1) % o.eval_every == 0 or step + 1 == o.steps):
            scores, _ = scoring.evaluate(policy.sampler, policy.tokenizer, held[:64], o)
            log |= {f"eval_{name}": value for name, value in scores.items()}
        prlm.append(out / "samples.jsonl", rows)
        return log

    keep_training(o, out, "GRPO", o.steps, o.lr, policy, take)


def keep_training(o: Options, folder: Path, title, count, peak, policy: Policy, take):
    """Calls take(step, optimizer), which gives a line of the log, for the steps up to `count` that
    are not done. Saves every --save-every steps, at the end, and when asked to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(policy, peak)
    done = load_state(folder, policy, optimizer)
    (folder / "metrics.jsonl").touch()  # there may be no step to log
    if done:
        refresh(policy, seed_of(o.seed, "rounding", done - 1))
        print(f"{title}: on after step {done}")
    with stop_after_step() as asked, prlm.progress(title=title, total=count, initial=done) as bar:
        for step in range(done, count):
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, count, peak)
            log = {"step": step + 1, "lr": lr} | take(step, optimizer)
            prlm.append(folder / "metrics.jsonl", [log])
            if (step + 1) % o.save_every == 0 or step + 1 == count or asked():
                save_state(folder, step + 1, policy, optimizer)
                if stop := asked():  # during the save, too
                    say("stopped; the same command with --resume goes on")
                    sys.exit(128 + stop)
            if (step + 1) % max(1, count // 10) == 0 or "eval_bleu" in log:
                shown = ("reward", "loss", "eval_rouge-l")
                said = ", ".join(f"{key} {x:z.3f}" for key, x in log.items() if key in shown)
                bar.write(f"step {step + 1} of {count}: {said}")
            bar.update()


# ---- Before RL: a warm start, and a first look ----
EVIDENCE = "The user wrote: {}\n"  # a line of the reasoning that the warm start teaches
EVIDENCE_ITEMS, EVIDENCE_TOKENS = 3, 14  # tokens: of a title, or how a tweet begins


def warm_start_targets(o: Options, tokenizer: Tokenizer, examples) -> list[list[int]]:
    """The ids to imitate for each record, EOS last: what the user really wrote. Before it, with
    o.reasoning, a line EVIDENCE quotes each of the best o.k items, at most EVIDENCE_ITEMS: its last
    field, cut to EVIDENCE_TOKENS (a tight prompt may show less of it). No items: an empty line. No
    <think> if the prompt has it."""
    (*_, last_field), targets = task_of(o.task).fields, []
    for example in examples:
        form, quoted = answer_block(o.task), []
        if o.reasoning:
            texts = [item[last_field].strip() for item in best_items(o, example)]
            quoted = [tokenizer.cut(text, EVIDENCE_TOKENS) for text in texts[:EVIDENCE_ITEMS]]
            evidence = EVIDENCE * len(quoted) or "\n"
            form = f"<think>\n{evidence}</think>\n{form}".removeprefix(tokenizer.opening)
        ids = tokenizer.fill(form, *quoted, one_line(example.target))
        targets.append([*ids, tokenizer.end_id])
    return targets


def warm_start(o: Options, out: Path, policy: Policy, train):
    """Trains the policy before RL, saves it, and loads that. A step is cross-entropy on 8 whole
    completions, in nats per token."""
    folder = out / "warm_start"
    if not (folder / "model.safetensors").is_file():
        prompts = make_prompts(o, policy.tokenizer, train)
        targets = warm_start_targets(o, policy.tokenizer, train)
        example = prlm.printable(policy.tokenizer.decode(targets[0]))
        print(f"warm start: it imitates, for example,\n{example}")

        def take(step: int, optimizer) -> dict:
            chosen = choose(len(train), 8 * step, 8, o.seed)
            asked, wanted = [prompts[n] for n in chosen], [[targets[n]] for n in chosen]  # G = 1
            tokens, total = sum(len(targets[n]) for n in chosen), 0.0
            for _, *batch in micro_batches(asked, wanted, o.tokens_per_micro_batch, share=True):
                loss = -prlm.token_logprobs(policy.decoder, *batch)[0].sum() / tokens
                loss.backward()
                total += loss.item()
            return {"loss": sum(prlm.gather(total)), "grad_norm": optimizer_step(optimizer)}

        keep_training(o, folder, "warm start", o.warm_start, o.warm_start_lr, policy, take)
        prlm.save_decoder(policy.decoder, policy.tokenizer, folder)
        prlm.gather()
    # In place: else the first policy would stay alive.
    vars(policy).update(vars(make_policy(replace(o, model=str(folder)))))


def first_look(o: Options, out: Path, policy: Policy, train):
    """One rollout of eight prompts, to stop a run that could not learn. Its stand-in for the judge
    gives each different answer a value of its own."""
    if (out / "metrics.jsonl").is_file():
        return  # RL has begun
    shown = [train[n] for n in choose(len(train), 8 * o.warm_start, 8, o.seed)]
    prompts = make_prompts(o, policy.tokenizer, shown)
    rows = roll_out(o, policy, lambda _, said: [*map(said.index, said)], shown, prompts, "look")
    spread = by_group(o, rows, "advantage").any(1).float().mean().item()
    print(f"a first look: {scoring.shares(rows, o.task)}, rewards differ in {spread:.0%} of groups")
    if spread <= 0.1 and not o.force:
        raise ValueError(
            "in nearly all groups all completions earn the same: GRPO would learn nothing. With "
            "--overwrite, --warm-start 125 teaches the form; if many are truncated, raise "
            "--max-new-tokens; if most answer, --temperature. --force trains all the same"
        )


# ==== Below: not the method ====
def make_policy(o: Options) -> Policy:
    """o.model, ready to be trained: in float32, since at a learning rate of 1e-6 a bfloat16 weight
    would never move; or LoRA on a base of the products' type."""
    decoder, tokenizer = prlm.load_policy(o, train=not o.lora_rank)
    if not tokenizer.eos_ids:
        raise ValueError(f"{o.model}: no file names an EOS id, so nothing could end")
    if o.lora_rank:
        torch.manual_seed(o.seed)  # LoRA's A starts random
        sampler, reference = decoder, add_lora(decoder, rank=o.lora_rank, alpha=o.lora_rank)
    else:
        reference = prlm.for_sampling(copy.deepcopy(decoder), decoder.products)
        sampler = decoder if decoder.products == torch.float32 else copy.deepcopy(reference)
    decoder.checkpointing = o.checkpointing
    return Policy(decoder, sampler, tokenizer, reference)


def add_lora(decoder: Decoder, rank: int, alpha: float) -> Decoder:
    """Freezes the decoder and gives every matrix of its layers float32 adapters to train: A, drawn
    as in PEFT, and B, which is 0, so at first nothing changes. Returns the decoder without them, in
    the same memory."""
    decoder.requires_grad_(False)
    plain = copy.deepcopy(decoder, {id(x): x for x in decoder.parameters()})
    for module in decoder.model.layers.modules():
        if isinstance(module, prlm.Linear):
            A = torch.nn.Linear(module.in_features, rank, False, module.weight.device).weight
            B = A.new_zeros(module.out_features, rank)
            module.lora_A, module.lora_B = A, torch.nn.Parameter(B)
            module.scale = alpha / rank
    return plain


@torch.no_grad()
def refresh(policy: Policy, seed: int | None = None):
    """Copies the decoder's weights into the sampler, if that is a bfloat16 copy. With a seed,
    rounding is stochastic, so unbiased: rounding to nearest would lose small steps."""
    noise = torch.Generator(policy.decoder.head.device).manual_seed(seed or 0)
    for copied, weight in zip(policy.sampler.parameters(), policy.decoder.parameters()):
        if copied.dtype != weight.dtype and seed is not None:
            bits = weight.view(torch.int32)  # bfloat16 is the upper half of them
            bits = bits + torch.empty_like(bits).random_(2**16, generator=noise)
            weight = (bits & -(2**16)).view(torch.float32)
        copied.copy_(weight)


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
    # Fused, on CUDA, it copies no second moments during a step.
    return torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=parameters[0].is_cuda)


# ---- What a run leaves: its log, saved states, scores ----
METRICS = {  # the keys of a line of metrics.jsonl: mostly means over the step's completions
    "step": "counted from 1",
    "lr": "its learning rate",
    "reward": "what the completions earned: the signal to watch",
    "accuracy": "ROUGE-1 + -2 + -L of the answers, 0 to 3; like the next two, before its weight",
    "format": "share that close their reasoning",
    "personalization": "the judge's values; -10 for an empty LaMP-4 answer",
    "spread": "std of the reward in a group; if low, raise --temperature, --group-size",
    "zero_spread_groups": "share whose completions all earn the same: they teach nothing",
    "truncated": "share cut off at --max-new-tokens; if high, raise that",
    "completion_tokens": "length of a completion",
    "entropy": "mean -log p of the sampled tokens, in nats: near 0 nothing is explored",
    "loss": "about 0 with grpo, one update per rollout and no KL",
    "grad_norm": "before it is clipped to 1",
    "kl": "k3 per token, in nats, to the policy before RL; 0 with --beta 0",
    "clip_fraction": "share of tokens whose gradient was clipped to 0; 0 with one update",
    "gap": "largest difference of sampler and trainer in a log p: 1e-4; in bfloat16 .1 to .3",
    "tokens_per_second": "of prompts and completions, over the step",
    "seconds_rollout": "sampling and rewards",
    "seconds_update": "log-probabilities, gradient, optimizer",
    "eval_rouge-1": "of greedy answers to 64 held-out records; likewise -2, -l, bleu",
}


def rollout_metrics(o: Options, prompts, rows: list[dict], rolling, updating) -> dict[str, float]:
    means = {name: by_group(o, rows, name).mean().item() for name in ("reward", *PARTS)}
    count = sum(len(row["tokens"]) for row in rows)
    return means | {
        "spread": by_group(o, rows, "reward").std(1).mean().item(),
        "zero_spread_groups": 1 - by_group(o, rows, "advantage").any(1).float().mean().item(),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "completion_tokens": count / len(rows),
        "entropy": -sum(sum(row["logprobs"]) for row in rows) / count,
        "tokens_per_second": (count + sum(map(len, prompts))) / (rolling + updating),
        "seconds_rollout": rolling,
        "seconds_update": updating,
    }


def update_metrics(o: Options, rows, advantages, mask, new, old, ref) -> dict[str, float]:
    """new, old, ref [P, G, C]: log-probabilities of the last pass, the first, the reference."""
    for x in (new, old, ref) if dist.is_initialized() else ():
        dist.all_reduce(x)  # each process has filled its share; the rest is 0
    sampled = pad_sequence([torch.tensor(row["logprobs"]) for row in rows], batch_first=True)
    gap = (old - sampled.view_as(old).to(old.device)).abs()[mask]
    gain, ratio = advantages[..., None], (new - old).exp()
    limited = ratio.clamp(1 - o.clip, 1 + (o.clip_high or o.clip))
    clipped = limited * gain < ratio * gain  # where the minimum is the clipped one: no gradient
    how = (o.clip, o.clip_high, o.beta, o.normalizer, o.max_new_tokens)
    count = max(len(gap), 1)
    return {
        "loss": grpo_loss(new, old, advantages, mask, ref, *how).item(),
        "kl": k3(new, ref)[mask].sum().item() / count if o.beta else 0.0,
        "clip_fraction": clipped[mask].sum().item() / count,
        "gap": max(gap.tolist(), default=0.0),
    }


def save_state(folder: Path, step: int, policy: Policy, optimizer):
    """All that the next step depends on, and the logs' sizes."""
    trained = {n: p.detach() for n, p in policy.decoder.named_parameters() if p.requires_grad}
    sizes = {log.name: log.stat().st_size for log in folder.glob("*.jsonl")}
    state = {"step": step, "model": trained, "optimizer": optimizer.state_dict(), "logs": sizes}
    if prlm.world()[0] == 0:
        path = folder / "trainer.pt"
        with prlm.faults_in(f"{path} (a full disk?)"), prlm.replacing(path) as temporary:
            torch.save(state, temporary)


def load_state(folder: Path, policy: Policy, optimizer) -> int:
    """Restores a saved state, cuts the logs to its sizes, returns the steps done."""
    path, state = folder / "trainer.pt", {"step": 0, "logs": {}}
    with prlm.faults_in(path):
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            policy.decoder.load_state_dict(state["model"], strict=False)  # LoRA: no base in it
            optimizer.load_state_dict(state["optimizer"])
    for log in folder.glob("*.jsonl") if prlm.world()[0] == 0 else ():
        os.truncate(log, min(state["logs"].get(log.name, 0), log.stat().st_size))
    return state["step"]


@contextmanager
def stop_after_step():
    """Ctrl-C and SIGTERM wait for the end of the step, a second one does not. Yields a function
    that gives any process's signal, or 0."""
    came, numbers = [0], (signal.SIGINT, signal.SIGTERM)

    def ask(number, _frame):
        came.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        say("\nstopping after this step; again: at once")

    handlers = [signal.signal(number, ask) for number in numbers]
    try:
        yield lambda: max(prlm.gather(came[-1]))
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def say(text: str):
    with suppress(OSError):  # after Ctrl-C the reader may be gone
        os.write(2, f"{text}\n".encode())


@contextmanager
def processes():  # torchrun's, if any; only the first prints
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def score_held_out(o: Options, out: Path, name: str, policy: Policy, held) -> list[dict]:
    """Scores, greedy and sampled at .7, into scores.json; returns the greedy records."""
    file, lines = out / "scores.json", out / "held_out" / f"{name}.jsonl"
    if lines.is_file():
        return prlm.read_lines(lines)
    how = (o, policy.sampler, policy.tokenizer, held)
    greedy, sampled = (scoring.answer_all(*how, temperature) for temperature in (0.0, 0.7))
    scores = scoring.mean_scores(greedy)
    scores |= {f"{key}_sampled": x for key, x in scoring.mean_scores(sampled).items()}
    prlm.write_json(file, (prlm.read_json(file) if file.is_file() else {}) | {name: scores})
    prlm.write_text(lines, "".join(f"{json.dumps(record)}\n" for record in greedy))
    return greedy


def report(out: Path):
    print("held-out records, greedy answers:")
    for name, scores in prlm.read_json(out / "scores.json").items():
        print(scoring.line(name, scores))
    files = (out / "held_out" / f"{name}.jsonl" for name in ("before", "after"))
    pairs = zip(*map(prlm.read_lines, files))
    before, after = max(pairs, key=lambda two: two[1]["rouge-l"] - two[0]["rouge-l"])
    print(f"\nthe held-out record that gained most, {prlm.printable(after['id'])}:")
    prompt = after["prompt"].rpartition("</answer>\n")[2]
    texts = (prompt, after["target"], before["completion"], after["completion"])
    for title, text in zip(("prompt", "the user wrote", "before RL", "after RL"), texts):
        print(f"--- {title}\n{prlm.printable(text).strip()}")
    print(f"\n{out} is complete. As a page: python toy/page.py --run {out}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
