"""GRPO: the policy learns to reason over the profile from reward alone. This is the main job.

One step, for P prompts with G completions each:

  1. roll out    o_1 .. o_G sampled from the policy at temperature T
  2. reward      r_i = accuracy + 0.1 format + 0.1 personalization                   (reward.py)
  3. advantage   A_i = (r_i - mean r) / (std r + 1e-4) within the group: no value network
  4. update      ratio_t = exp(log pi(o_t) - log pi_old(o_t)); the loss of a token is
                 -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + beta (exp(d) - d - 1)
                 with d = log ref(o_t) - log pi(o_t). The mean over a completion's tokens, then
                 over completions ("grpo"), or the sum of all tokens divided by their number
                 ("dapo") or by a constant ("dr_grpo")

With "grpo", one update per rollout, no KL and nothing masked, the loss is 0 up to rounding: the
ratio is exactly 1 and the advantages of a group sum to 0. Reward is the signal to watch.

Before the first step, a run takes supervised steps if --warm-start asks for them, looks at a first
rollout (can anything be learned here?), makes its judge, and scores held-out users, as it does
again at the end. Each stage keeps its result in the run directory.

Every random choice is a function of (seed, step), so a stopped run keeps no generator state: the
same command resumes it. The policy has no dropout, and it is trained on the very ids that it
sampled: no text is tokenized a second time.

    python rl.py                                        # the toy, on a CPU, in minutes
    python rl.py --model DIR --data DIR --task LaMP-5 --encoder DIR --out runs/5
    torchrun --nproc-per-node 4 rl.py ...               # four GPUs share a step's prompts
"""

import copy
import errno
import math
import random
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import prlm  # before torch, so that Ctrl-C ends its long import without a traceback
from eval import evaluate, is_placeholder, mean_scores, sample_records, table, write_predictions
from prlm import Completion, Decoder, Progress, Stop, Tokenizer
from retrieve import (
    Example,
    answer_block,
    assistant_start,
    load_examples,
    make_prompts,
    make_ranker,
    task_of,
)
from reward import PARTS, RewardOptions, check_judge, inputs_of, make_judge, rewards

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Normalizer = Literal["grpo", "dapo", "dr_grpo"]
Scale = Literal["std", "none"]

# ---- The algorithm --------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [P, G]; "none" does not divide (Dr. GRPO).

    The standard deviation has Bessel's correction. A group whose rewards are equal up to rounding
    (8 eps of the largest), or a group of one, gets exact zeros under either scale: it does not say
    which completion was better. The result is float32, or the rewards' dtype if that is wider.
    ValueError for another scale.
    """
    if scale not in get_args(Scale):
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
    return difference.exp() - difference - 1


def loss_size(mask: Tensor, normalizer: str, max_new_tokens: int | None) -> float:
    """What a summed loss is divided by, for a mask [P, G, C] of the trained tokens.

    "grpo": the P G completions; "dapo": the tokens of the mask, at least 1; "dr_grpo":
    P G max_new_tokens. ValueError for another name, or "dr_grpo" without max_new_tokens.
    """
    completions = mask.shape[0] * mask.shape[1]
    if normalizer == "grpo":
        return completions
    if normalizer == "dapo":
        return max(mask.sum().item(), 1)
    if normalizer != "dr_grpo":
        raise ValueError(f"normalizer {normalizer!r} is none of {', '.join(get_args(Normalizer))}")
    if not max_new_tokens:
        raise ValueError("dr_grpo divides by max_new_tokens, which was not given")
    return completions * max_new_tokens


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, clip: float = 0.2, clip_high: float | None = None,
    beta: float = 0.0, normalizer: str = "grpo", max_new_tokens: int | None = None,
    size: float | None = None,
) -> Tensor:  # fmt: skip
    """The loss of step 4, a scalar: log-probabilities and mask [P, G, C], advantages [P, G].

    `clip_high` widens the upper side of the clip (DAPO). What lies outside the mask never counts,
    whatever it holds, NaN included. `size` is what the sum is divided by: give it to a micro-batch,
    which is a part of a larger step; by default it is `loss_size` of this mask. With "grpo" each
    completion is first averaged over its own tokens; an empty one counts as 0. ValueError: beta
    without ref_logprobs.
    """
    size = loss_size(mask, normalizer, max_new_tokens) if size is None else size
    outside = ~mask.bool()
    logprobs = logprobs.masked_fill(outside, 0.0)
    old_logprobs = old_logprobs.masked_fill(outside, 0.0)
    ratio = (logprobs - old_logprobs).exp()  # [P, G, C]
    advantage = advantages[..., None]  # [P, G, 1]
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if beta:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        loss = loss + beta * k3(logprobs, ref_logprobs.masked_fill(outside, 0.0))
    loss = loss.masked_fill(outside, 0.0).sum(-1)  # [P, G]
    if normalizer == "grpo":
        loss = loss / mask.sum(-1).clamp(min=1)
    return loss.sum() / size


def count_clipped(logprobs, old_logprobs, advantages, mask, clip=0.2, clip_high=None) -> Tensor:
    """How many of the tokens [P, G, C] lost their gradient to the clip.

    Only those that have already moved too far in the direction of their advantage. In the other
    direction the minimum takes the term that is not clipped, so its gradient still pulls back.
    """
    ratio = (logprobs - old_logprobs).exp()
    advantage = advantages[..., None]
    too_high = (advantage > 0) & (ratio > 1 + (clip if clip_high is None else clip_high))
    too_low = (advantage < 0) & (ratio < 1 - clip)
    return ((too_high | too_low) & mask).sum()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to a tenth of the peak.

    The warm-up has w = round(warmup steps) steps, but at least one; its n-th has n/w of the peak.
    The step after the warm-up, if there is one, has the peak; the last one, if later, a tenth.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# ---- One step -------------------------------------------------------------------------------


@dataclass
class Options(RewardOptions):
    # Without an annotation, a name is not an option: these four say things about the options.
    presets = {  # noqa: RUF012  what the authors trained with, and what small real models want
        "small": {
            "warm_start_batch": 4, "warm_start_lr": 3e-4, "steps": 24, "prompts_per_step": 4,
            "temperature": 0.7, "lr": 6e-5, "personalization": 0.0, "save_every": 5,
            "tokens_per_micro_batch": 4096, "eval_temperature": 0.0,
        },
        "paper": {
            "train_examples": 500, "steps": 2500, "prompts_per_step": 1, "group_size": 4,
            "temperature": 0.7, "lr": 1e-6, "beta": 0.04, "checkpointing": True,
            "eval_every": 500, "save_every": 100,
        },
    }  # fmt: skip
    # These change the result by rounding, or other noise, at most.
    free = RewardOptions.free | {"checkpointing", "save_every", "eval_every"}
    adjustable = {"lr", "steps"}  # noqa: RUF012  these may change when a run is resumed
    bounds = {  # noqa: RUF012
        0: f"{' '.join(PARTS)} beta eval_every warmup train_examples warm_start steps lora_rank "
        "eval_temperature",
        1: "prompts_per_step updates_per_rollout eval_examples save_every warm_start_batch",
        2: "group_size",  # a group of one has nothing to compare with: all advantages are 0
        prlm.COLDEST: "temperature",
        prlm.ABOVE_0: "lr warm_start_lr grad_clip clip clip_high",
    }
    train_examples: int = 0  # only the first training records; 0 takes all
    accuracy: float = 1.0  # weight of ROUGE against the user's own text; 0 learns without it
    format: float = 0.1  # weight of a closed reasoning block
    personalization: float = 0.1  # weight of the judge; 0 does without one
    warm_start: int = 0  # supervised steps before RL, for a model that does not know the form yet
    warm_start_lr: float = 1e-4  # their peak learning rate
    warm_start_batch: int = 8  # records in each of them
    steps: int = 60  # rollouts, each with its update; 0 stops after the warm start
    prompts_per_step: int = 16  # P; the authors take 1
    group_size: int = 8  # G; the authors take 4
    temperature: float = 1.0  # of sampling and log-probabilities in GRPO; the authors take 0.7
    lr: float = 1e-3  # peak learning rate of AdamW; the authors take 1e-6 for 1.5 B parameters
    warmup: float = 0.1  # share of the steps over which the learning rate rises
    lora_rank: int = 0  # rank of LoRA adapters, whose alpha is the same; 0 trains all weights
    beta: float = 0.0  # weight of the KL to the policy before RL; the authors take 0.04
    clip: float = 0.2  # how far the ratio may be from 1 before the gradient is cut
    clip_high: float | None = None  # the same above 1, if that side should be wider (DAPO)
    scale: Scale = "std"  # what divides the advantages
    normalizer: Normalizer = "grpo"  # what the loss is averaged over
    updates_per_rollout: int = 1  # with one, the ratio is 1 and the clip never acts
    grad_clip: float = 1.0  # largest gradient norm
    mask_truncated: bool = False  # leave completions that hit max_new_tokens out of the loss
    checkpointing: bool = False  # run each layer again in the backward pass: less memory, slower
    eval_every: int = 20  # steps between greedy evaluations on held-out users; 0 is never
    eval_examples: int = 200  # held-out records to score
    eval_temperature: float = 0.7  # of a second score, of sampled answers; 0 does without it
    save_every: int = 20  # steps between saved states
    out: str = "runs/toy"  # run directory; the same command resumes a stopped run
    overwrite: bool = False  # start anew where the directory holds another run
    force: bool = False  # train though the first look saw nothing to learn, or the code was edited


@dataclass
class Policy:
    """The model in training and the copies that belong to it."""

    decoder: Decoder  # what the optimizer changes: float32 weights, or adapters on a frozen base
    sampler: Decoder  # what generates: the decoder itself, or a plain copy in --precision's dtype
    tokenizer: Tokenizer
    reference: Decoder | None = None  # the policy before RL, frozen; see reference_of


@dataclass
class Rollout:
    """What one step has sampled and earned. P prompts, G completions each."""

    examples: list[Example]  # [P]
    prompts: list[list[int]]  # [P] token ids
    groups: list[list[Completion]]  # [P][G]
    texts: list[str]  # [P*G] completions as text, with what the prompt opened (<think>) in front
    rows: list[dict]  # [P*G] of reward.py's `rewards`: answer, parts of the reward, their sum
    advantages: Tensor  # [P, G]

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group]  # P*G

    def grid(self, key: str) -> Tensor:
        """One number of each completion's row. [P, G]"""
        return torch.tensor([row[key] for row in self.rows]).view(len(self.prompts), -1)


def seed_of(*parts) -> int:
    """A 63-bit seed for one purpose at one step; what was drawn before has no influence."""
    return random.Random(repr(parts)).getrandbits(63)


def choose(count: int, step: int, size: int, seed: int, start: int = 0) -> list[int]:
    """Indices of a step's examples: each step continues where the last one stopped.

    Every epoch has a shuffle of its own; `start` examples were read before step 0.
    """
    read = range(start + step * size, start + (step + 1) * size)
    orders = {}  # of the epochs that the step reaches into
    for epoch in {n // count for n in read}:
        orders[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)
    return [orders[n // count][n % count] for n in read]


def make_policy(o: Options, directory, device: str) -> Policy:
    """The checkpoint of `directory`, ready to be trained as the options ask."""
    dtype = prlm.product_dtype(o.precision, device)
    # AdamW needs float32 weights: at a learning rate of 1e-6 a bfloat16 weight would never move.
    # With LoRA only the adapters move, so the frozen base may be as small as the products are.
    decoder = prlm.load_decoder(directory, device, dtype if o.lora_rank else torch.float32)
    sampler = decoder
    if o.lora_rank or dtype != torch.float32:
        # Copied before the adapters are there: `refresh` writes them merged into plain weights.
        sampler = copy.deepcopy(decoder).to(dtype).requires_grad_(False)
    if o.lora_rank:
        torch.manual_seed(o.seed)  # LoRA's A starts random
        prlm.add_lora(decoder, rank=o.lora_rank, alpha=o.lora_rank)
    decoder.checkpointing = o.checkpointing
    return Policy(decoder, sampler, prlm.load_tokenizer(directory))


@torch.no_grad()
def refresh(policy: Policy) -> None:
    """Copies the decoder's weights, adapters merged in, into the sampler."""
    if policy.sampler is not policy.decoder:
        weights = prlm.merged_parameters(policy.decoder)
        for copied, (_, weight) in zip(policy.sampler.parameters(), weights, strict=True):
            copied.copy_(weight)


@contextmanager
def reference_of(policy: Policy):
    """The policy before RL: a copy of its own, or with LoRA the decoder without its adapters."""
    if policy.reference is not None:
        yield policy.reference
    else:
        with prlm.without_lora(policy.decoder):
            yield policy.decoder


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
    # On CUDA the fused AdamW does without a second copy of its second moments during a step.
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)


def choose_for_step(o: Options, step: int, count: int, size: int | None = None) -> list[int]:
    """Indices of a GRPO step's examples, for all processes; they go on where the warm start ended.

    So a warm start of less than an epoch leaves RL records that the policy has not imitated. `size`
    examples instead of --prompts-per-step, if given.
    """
    seen = o.warm_start * o.warm_start_batch
    return choose(count, step, size=size or o.prompts_per_step, seed=o.seed, start=seen)


def choose_share(o: Options, step: int, count: int) -> list[int]:
    """This process's share of what `choose_for_step` chooses."""
    rank, world_size = prlm.rank_and_world_size()
    share = o.prompts_per_step // world_size
    return choose_for_step(o, step, count)[rank * share : (rank + 1) * share]


def roll_out(o: Options, policy: Policy, judge, examples, prompts, seed: int) -> Rollout:
    """Steps 1 to 3: completions of every prompt [P], their rewards and advantages."""
    # 1. roll out
    groups = prlm.generate(
        policy.sampler,
        prompts,
        group_size=o.group_size,
        max_new_tokens=o.max_new_tokens,
        temperature=o.temperature,
        eos_ids=policy.tokenizer.eos_ids,
        seed=seed,
    )
    opened = assistant_start(o, policy.tokenizer)
    texts = [opened + policy.tokenizer.decode(c.tokens) for group in groups for c in group]
    # 2. reward
    repeated = [example for example in examples for _ in range(o.group_size)]  # [P*G]
    weights = {name: getattr(o, name) for name in PARTS}
    rows = rewards(texts, repeated, judge, **weights)
    reward = torch.tensor([row["reward"] for row in rows]).view(-1, o.group_size)  # [P, G]
    if not reward.isfinite().all():
        values = ((e.id, row["personalization"]) for e, row in zip(repeated, rows, strict=True))
        broken = {id: value for id, value in values if not math.isfinite(value)}
        raise ValueError(f"the judge's values of some records are not finite numbers: {broken}")
    # 3. advantage
    advantages = group_advantages(reward, o.scale)
    return Rollout(
        examples=examples, prompts=prompts, groups=groups, texts=texts, rows=rows,
        advantages=advantages,
    )  # fmt: skip


def trained_tokens(o: Options, rollout: Rollout, device) -> Tensor:
    """True at the tokens that the loss counts, the end-of-sequence token among them. [P, G, C]

    From lengths, never from token values: padding may have the id of the end of a sequence.
    """
    flat = rollout.completions
    lengths = torch.tensor([len(c.tokens) for c in flat], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # [P*G, C]
    if o.mask_truncated:
        mask &= torch.tensor([c.finished for c in flat], device=device)[:, None]
    return mask.unflatten(0, rollout.advantages.shape)


def update(o: Options, policy: Policy, optimizer, rollout: Rollout) -> dict[str, float]:
    """Step 4: `updates_per_rollout` optimizer steps on one rollout; returns what the log needs.

    pi_old is the policy of the first pass, before any update. The sampler's log-probabilities do
    not stand in for it, since they may come from a bfloat16 copy: only `gap`, the largest
    difference of the two, uses them. Each of several processes has its share of the rollout; sizes
    and sums are those of all. The log is that of the last pass, `gap` that of the first.
    """
    decoder, device = policy.decoder, policy.decoder.head.device
    completions = [[c.tokens for c in group] for group in rollout.groups]  # [P][G]
    advantages = rollout.advantages.to(device)  # [P, G]
    trained = trained_tokens(o, rollout, device)  # [P, G, C]
    sampler_logprobs = pad_sequence(
        [torch.tensor(c.logprobs) for c in rollout.completions], batch_first=True
    )
    sampler_logprobs = sampler_logprobs.to(device).view_as(trained)  # [P, G, C]
    old_logprobs = torch.zeros_like(sampler_logprobs)  # filled in the first pass

    # Every micro-batch is divided by the size of the whole step, not by its own. Processes can
    # differ in their numbers of tokens ("dapo"), not in the other sizes.
    world_size = prlm.rank_and_world_size()[1]
    tokens = max(sum(prlm.gather(trained.sum().item())), 1)
    size = tokens
    if o.normalizer != "dapo":
        size = world_size * loss_size(trained, o.normalizer, o.max_new_tokens)
    lengths = [len(p) + sum(map(len, g)) for p, g in zip(rollout.prompts, completions, strict=True)]
    batches = prlm.micro_batches(lengths, o.tokens_per_micro_batch)
    clip = {"clip": o.clip, "clip_high": o.clip_high}
    gap, gap_mean = 0.0, 0.0
    for number in range(o.updates_per_rollout):
        log = dict.fromkeys(("loss", "entropy", "kl", "clip_fraction"), 0.0)
        for chosen in batches:
            prompts = [rollout.prompts[n] for n in chosen]
            groups = [completions[n] for n in chosen]
            with prlm.products(o.precision, device):
                logprobs, entropy, real = prlm.score_completions(
                    decoder, prompts, groups, o.temperature
                )
            width = logprobs.shape[-1]  # of this micro-batch: C or less
            now = logprobs.detach()
            mask = trained[chosen, :, :width]  # `real`, less what --mask-truncated leaves out
            if number == 0:
                old_logprobs[chosen, :, :width] = now
                difference = (now - sampler_logprobs[chosen, :, :width]).abs()
                gap = max(gap, difference[real].max().item())
                gap_mean += difference[mask].sum().item() / tokens
            terms = {
                "old_logprobs": old_logprobs[chosen, :, :width],
                "advantages": advantages[chosen],
                "mask": mask,
            }
            ref_logprobs = None
            if o.beta:
                with (
                    torch.no_grad(),
                    prlm.products(o.precision, device),
                    reference_of(policy) as reference,
                ):
                    ref_logprobs, _ = prlm.token_logprobs(reference, prompts, groups, o.temperature)
                log["kl"] += k3(now, ref_logprobs)[mask].sum().item() / tokens
            loss = grpo_loss(
                logprobs,
                **terms,
                ref_logprobs=ref_logprobs,
                **clip,
                beta=o.beta,
                normalizer=o.normalizer,
                max_new_tokens=o.max_new_tokens,
                size=size,
            )
            loss.backward()
            log["loss"] += loss.item()
            log["entropy"] += entropy[mask].sum().item() / tokens
            log["clip_fraction"] += count_clipped(now, **terms, **clip).item() / tokens
        each = prlm.gather(log)
        log = {name: sum(one[name] for one in each) for name in log}
        log["grad_norm"] = optimizer_step(o, optimizer, log["loss"])
    return log | {"gap": max(prlm.gather(gap)), "gap_mean": sum(prlm.gather(gap_mean))}


def optimizer_step(o: Options, optimizer, loss: float) -> float:
    """Sums the gradients of all processes, clips and applies them; returns the unclipped norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if prlm.rank_and_world_size()[1] > 1:
        # Once per optimizer step, after the last micro-batch: little to overlap, and unlike
        # DistributedDataParallel it needs no forward() of its own and no second copy.
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip).item()
    if not math.isfinite(norm + loss):
        raise FloatingPointError(f"the loss is {loss}, the gradient's norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def grpo_step(
    o: Options, step: int, policy: Policy, optimizer, judge, examples: list[Example], prompts
) -> tuple[dict, list[dict]]:
    """Steps 1 to 4 once: (a line of metrics, the samples that were learned from)."""
    start = time.perf_counter()
    try:
        chosen = choose_share(o, step, len(examples))
        rollout = roll_out(
            o,
            policy,
            judge,
            [examples[n] for n in chosen],
            [prompts[n] for n in chosen],
            # Processes need noise of their own: with equal noise they would explore the same.
            seed=seed_of(o.seed, "rollout", step) + prlm.rank_and_world_size()[0],
        )
        rolled = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o.steps, peak=o.lr, warmup=o.warmup)
        log = update(o, policy, optimizer, rollout)
        refresh(policy)
    except FloatingPointError as error:
        chosen = choose_for_step(o, step, len(examples))
        where = f"step {step + 1}, records {', '.join(examples[n].id for n in chosen)}"
        advice = (
            "it was not applied; the same command with a lower --lr resumes from what is saved; if "
            "that ends in the same step, --overwrite with a lower --lr starts anew"
        )
        raise ValueError(f"{where}: {error}; {advice}") from None
    seconds = {"rollout": rolled - start, "update": time.perf_counter() - rolled}
    metrics = log | rollout_metrics(o, rollout, seconds) | {"lr": optimizer.param_groups[0]["lr"]}
    each = prlm.gather((metrics, sample_lines(rollout, step, policy.tokenizer)))
    world_size = len(each)
    metrics = {name: sum(one[name] for one, _ in each) / world_size for name in metrics}
    metrics["tokens_per_second"] *= world_size  # of all processes: the sum, not the mean
    return {"step": step + 1} | metrics, [line for _, part in each for line in part]


# ---- The log of a step ----------------------------------------------------------------------


def rollout_metrics(o: Options, rollout: Rollout, seconds: dict[str, float]) -> dict[str, float]:
    """What metrics.jsonl says of a rollout; README.md explains each name."""
    flat = rollout.completions
    count = sum(len(c.tokens) for c in flat)
    metrics = {}
    for name in ("reward", *PARTS):
        grid = rollout.grid(name)
        metrics[name] = grid.mean().item()
        # Only what differs within a group can teach: a part without spread teaches nothing.
        metrics[f"spread_{name}"] = grid.std(1).mean().item()
    learning = (rollout.advantages != 0).any(1)
    # Groups that earn the same by every part but the judge's: if they learn, it alone orders them.
    alike = torch.ones_like(learning)  # [P]
    for name in PARTS:
        if name != "personalization" and getattr(o, name):
            grid = rollout.grid(name)
            alike &= (grid == grid[:, :1]).all(1)
    return metrics | {
        "zero_spread_groups": 1 - learning.float().mean().item(),
        "judge_only_groups": (learning & alike).float().mean().item(),
        "completion_tokens": count / len(flat),
        "truncated": sum(not c.finished for c in flat) / len(flat),
        "tokens_per_second": (count + sum(map(len, rollout.prompts))) / sum(seconds.values()),
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def sample_lines(rollout: Rollout, step: int, tokenizer: Tokenizer) -> list[dict]:
    """A line of samples.jsonl for each completion of a rollout."""
    lines = []
    for n, completion in enumerate(rollout.completions):
        index = n // len(rollout.groups[0])  # of its prompt
        example = rollout.examples[index]
        lines.append(
            {
                "step": step + 1,
                "id": example.id,
                "query": example.query,
                "target": example.target,
                "completion": rollout.texts[n],
                **rollout.rows[n],
                "advantage": rollout.advantages.flatten()[n].item(),
                "finished": completion.finished,
                "tokens": completion.tokens,
                "logprobs": [round(x, 4) for x in completion.logprobs],
                "prompt": tokenizer.decode(rollout.prompts[index]),
            }
        )
    return lines


def warn_if_stuck(lines: list[dict], bar) -> None:
    """A warning after every ten steps in a row that taught nothing or finished no completion."""
    advice = {
        "zero_spread_groups": "all completions of each prompt earned the same, so nothing was "
        "learned: try a higher --temperature or a larger --group-size, with another --out",
        "truncated": "every completion was cut off at --max-new-tokens: raise it, with another "
        "--out",
    }
    for name, text in advice.items():
        streak = 0
        while streak < len(lines) and lines[-1 - streak][name] == 1:
            streak += 1
        if streak and streak % 10 == 0:
            bar.write(f"warning: for {streak} steps, {text}")


# ---- Before RL: a first look, and a warm start ----------------------------------------------


def look(o: Options, policy: Policy, examples: list[Example]) -> dict[str, float]:
    """One rollout of eight prompts: shares of extracted answers, of closed reasoning, of truncated
    completions and of groups with spread; and the mean tokens of a completion.

    A group has spread if its rewards differ, or if a judge would value its answers differently.
    Without spread all advantages are 0 and GRPO learns nothing.
    """
    chosen = choose_for_step(o, step=0, count=len(examples), size=min(8, len(examples)))
    shown = [examples[n] for n in chosen]
    prompts = make_prompts(o, policy.tokenizer, shown)
    seed = seed_of(o.seed, "look")
    rollout = roll_out(o, policy, judge=None, examples=shown, prompts=prompts, seed=seed)
    answered = [not is_placeholder(row["answer"], o.task) for row in rollout.rows]
    spread = []
    for n in range(len(shown)):
        group = slice(n * o.group_size, (n + 1) * o.group_size)
        # Answers that are worth nothing all earn the same, so they count as one.
        pairs = zip(rollout.rows[group], answered[group], strict=True)
        answers = {row["answer"] if counts else "" for row, counts in pairs}
        judged = o.personalization > 0 and len(answers) > 1
        spread.append(judged or bool((rollout.advantages[n] != 0).any()))
    flat = rollout.completions
    return {
        "answered": sum(answered) / len(answered),
        "closed": rollout.grid("format").mean().item(),
        "groups_with_spread": sum(spread) / len(spread),
        "completion_tokens": sum(len(c.tokens) for c in flat) / len(flat),
        "truncated": sum(not c.finished for c in flat) / len(flat),
    }


def take_a_look(o: Options, out: Path, policy: Policy, examples: list[Example]) -> None:
    """Looks once, says what was seen, and stops a run that could not learn; --force trains it."""
    file = out / "look.json"
    if o.steps == 0 or prlm.on_first(file.is_file):
        return
    found = prlm.on_first(partial(look, o, policy, examples))
    print(
        f"a first look: {found['answered']:.0%} of completions have an answer, "
        f"{found['closed']:.0%} close their reasoning, {found['truncated']:.0%} are cut off; "
        f"{found['completion_tokens']:.0f} of {o.max_new_tokens} tokens; "
        f"{found['groups_with_spread']:.0%} of groups have rewards that differ"
    )
    if found["groups_with_spread"] <= 0.1 and not o.force:
        ways = ["--warm-start 125 (it teaches the form from the training records)"]
        if found["truncated"] > 0.5:
            ways.append(f"--max-new-tokens above {o.max_new_tokens}")
        if found["answered"] > 0.5:
            ways.append("a higher --temperature")
        raise ValueError(
            "in nearly all groups every completion earns the same, so GRPO would learn nothing. "
            f"Ways out, each with --overwrite: {'; '.join(ways)}. --force trains all the same"
        )
    prlm.on_first(partial(prlm.write_json, file, found))


EVIDENCE = "The user wrote: {}"  # what the warm start puts into the reasoning block
EVIDENCE_TOKENS = 14  # a title, or the beginning of a tweet


def warm_start_targets(
    o: Options, tokenizer: Tokenizer, examples: list[Example]
) -> list[list[int]]:
    """The completion to imitate for each training record, as ids that end with the EOS id.

        <think>
        The user wrote: (the last field of the best retrieved item, at most 14 tokens)
        </think>
        <answer>
        {'title': '(what the user really wrote)'}
        </answer>

    Without retrieved items the sentence is left out, with --no-reasoning the whole block. What the
    prompt has opened already (`tokenizer.opening`) is not said again. Texts are stripped, and
    `tokenizer.end_id` ends a target. (`make_ranker` finds the item, `EVIDENCE` is the sentence,
    `answer_block` the last three lines.)
    """
    rank = make_ranker(o)
    targets = []
    for example in examples:
        thought = ""
        *_, last_field = task_of(example.task).fields
        for item in rank(example, min(o.k, 1)):  # the best one, if there is any
            shown = item[last_field].strip()
            thought = EVIDENCE.format(tokenizer.cut(shown, EVIDENCE_TOKENS))
        text = answer_block(example.task, example.target.strip())
        if o.reasoning:
            text = f"<think>\n{thought}\n</think>\n{text}".removeprefix(tokenizer.opening)
        targets.append([*tokenizer.encode(text), tokenizer.end_id])
    return targets


def supervised_step(o: Options, policy: Policy, optimizer, prompts, targets) -> dict[str, float]:
    """One step of cross-entropy on whole completions, in nats per token."""
    device = policy.decoder.head.device
    world_size = prlm.rank_and_world_size()[1]
    tokens = sum(map(len, targets))
    sizes = [len(p) + len(t) for p, t in zip(prompts, targets, strict=True)]
    total = 0.0
    for rows in prlm.micro_batches(sizes, o.tokens_per_micro_batch):
        with prlm.products(o.precision, device):
            logprobs, _ = prlm.token_logprobs(
                policy.decoder, [prompts[n] for n in rows], [[targets[n]] for n in rows]
            )
        # Every process computes the same, and `optimizer_step` adds their gradients up.
        loss = -logprobs.sum() / tokens / world_size
        loss.backward()
        total += loss.item()
    loss = sum(prlm.gather(total))
    return {"loss": loss, "grad_norm": optimizer_step(o, optimizer, loss)}


def obtain_warm_start(o: Options, out: Path, stop: Stop, examples: list[Example]) -> Path:
    """The directory of a policy after --warm-start supervised steps, made first if need be.

    It takes the model's place from then on: "before" is its score, the judge's pairs are its
    answers, and the KL is measured from it.
    """
    folder = out / "warm_start"
    state = folder / "trainer.pt"
    if prlm.on_first((folder / "report.json").is_file):
        prlm.on_first(partial(state.unlink, missing_ok=True))  # if `keep` was killed just before
        return folder
    prlm.on_first(partial(folder.mkdir, exist_ok=True))
    policy = make_policy(o, o.model, prlm.pick_device(o.device))
    optimizer = make_optimizer(policy, o.warm_start_lr)
    prompts = make_prompts(o, policy.tokenizer, examples)
    targets = warm_start_targets(o, policy.tokenizer, examples)
    print(
        f"warm start: {o.warm_start} steps towards, for example\n{show_target(policy, targets[0])}"
    )
    first, lines = resume(folder, policy, optimizer)
    for step, bar in saved_steps(
        o, "warm start", folder, stop, first=first, count=o.warm_start, policy=policy,
        optimizer=optimizer,
    ):  # fmt: skip
        chosen = choose(len(examples), step, size=o.warm_start_batch, seed=o.seed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o.warm_start, peak=o.warm_start_lr, warmup=o.warmup)
        batch = {"prompts": [prompts[n] for n in chosen], "targets": [targets[n] for n in chosen]}
        try:
            line = {"step": step + 1} | supervised_step(o, policy, optimizer, **batch)
        except FloatingPointError as error:
            advice = "--overwrite with a lower --warm-start-lr starts anew"
            raise ValueError(f"warm start, step {step + 1}: {error}; {advice}") from None
        lines.append(line)
        prlm.on_first(partial(prlm.append, folder / "metrics.jsonl", [line]))
        bar.set_postfix(loss=f"{line['loss']:.3f}")
    losses = [line["loss"] for line in lines]
    if losses:  # the log may have been lost
        print(f"warm start: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")

    def keep() -> None:
        prlm.save_decoder(policy.decoder, policy.tokenizer, folder)
        loss = losses[-1] if losses else None
        prlm.write_json(folder / "report.json", {"steps": o.warm_start, "loss": loss})
        state.unlink()  # not needed once the report says that all is there

    prlm.on_first(keep)
    return folder


def show_target(policy: Policy, target: list[int]) -> str:
    return "  " + prlm.printable(policy.tokenizer.decode(target)).replace("\n", "\n  ")


# ---- Saved states ---------------------------------------------------------------------------


def trained_state(decoder: Decoder) -> dict[str, Tensor]:
    """What the optimizer changes: all weights, or with LoRA the adapters alone."""
    return {name: p.detach() for name, p in decoder.named_parameters() if p.requires_grad}


def save_state(path: Path, step: int, decoder: Decoder, optimizer) -> None:
    """Saves all that the next step depends on, atomically; OSError if the disk has no room."""
    state = {"step": step, "model": trained_state(decoder), "optimizer": optimizer.state_dict()}
    moments = [x for moment in state["optimizer"]["state"].values() for x in moment.values()]
    tensors = [x for x in (*state["model"].values(), *moments) if torch.is_tensor(x)]
    prlm.check_room(path, sum(x.numel() * x.element_size() for x in tensors))
    with prlm.replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, f"not written, is the disk full? {error}") from None


def load_state(path: Path, decoder: Decoder, optimizer) -> int:
    """Puts a saved state back; returns the number of steps done. ValueError for another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["model"].keys() != trained_state(decoder).keys():
            raise LookupError("it holds other weights")
        decoder.load_state_dict(state["model"], strict=False)  # with LoRA the base is not in it
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # as this device needs it
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except Exception as error:  # whatever torch makes of another file
        # torch reports some broken files as EINVAL; any other OSError is the disk's.
        of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL
        if of_disk or prlm.is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        text = f"{path}: not a state of this run ({reason}); delete it to train from the start"
        raise ValueError(text) from None


def resume(folder: Path, policy: Policy, optimizer) -> tuple[int, list[dict]]:
    """(steps done, their metrics) of the training in `folder`; later lines are dropped."""
    done = 0
    if prlm.on_first((folder / "trainer.pt").is_file):
        done = load_state(folder / "trainer.pt", policy.decoder, optimizer)
        refresh(policy)
        print(f"resuming after step {done}")
    lines = prlm.on_first(partial(prlm.rewind, folder / "metrics.jsonl", done))
    if len(lines) < done:
        print(f"{folder}/metrics.jsonl has {len(lines)} of the {done} steps: the others were lost")
    return done, lines


def saved_steps(
    o: Options, title: str, folder: Path, stop: Stop, first: int, count: int, policy, optimizer
):
    """Yields (step, bar) for the steps from `first` on, up to `count` in all.

    A generator: what stands after the `yield` runs when the loop's body is done with the step. It
    saves the state every --save-every steps, after the last one, and when a signal has asked to
    stop, which then ends the command.
    """
    bar = Progress(range(first, count), title, total=count, initial=first)
    stop.in_loop = True  # from here on a signal waits until the step is saved
    for step in bar:
        yield step, bar
        done = step + 1
        asked = max(prlm.gather(stop.signal or 0))  # whichever of the processes was asked
        if done % o.save_every == 0 or done == count or asked:
            state = partial(save_state, folder / "trainer.pt", done, policy.decoder, optimizer)
            prlm.on_first(state)
        if asked:
            bar.close()
            stop.leave(asked)
    stop.in_loop = False
    if asked := max(prlm.gather(stop.signal or 0)):  # during the last save
        stop.leave(asked)


# ---- A run ----------------------------------------------------------------------------------


def check(o: Options, world_size: int) -> None:
    """Refuses options that cannot work, before anything is loaded."""
    prlm.check_bounds(o)
    if o.prompts_per_step % world_size:
        count = f"a multiple of the {world_size} processes, not {o.prompts_per_step}"
        raise ValueError(f"--prompts-per-step must be {count}")


def train_policy(
    o: Options, out: Path, stop: Stop, policy: Policy, judge, train: list[Example], held
) -> None:  # fmt: skip
    """GRPO: steps, their lines in the logs, evaluations and saved states."""
    optimizer = make_optimizer(policy, o.lr)
    done, lines = resume(out, policy, optimizer)
    prlm.on_first(partial(prlm.rewind, out / "samples.jsonl", done))
    if done > o.steps:
        raise ValueError(f"{out} has done {done} steps already, more than --steps {o.steps}")
    # With no step left a new --lr is never used, so it is not recorded.
    prlm.on_first(partial(prlm.adopt, o, o.adjustable if done < o.steps else {"steps"}))
    prompts = make_prompts(o, policy.tokenizer, train)
    for step, bar in saved_steps(
        o, "GRPO", out, stop, first=done, count=o.steps, policy=policy, optimizer=optimizer
    ):
        metrics, samples = grpo_step(o, step, policy, optimizer, judge, train, prompts)
        if o.eval_every and ((step + 1) % o.eval_every == 0 or step + 1 == o.steps):
            scores, _ = evaluate(policy.sampler, policy.tokenizer, held, o)
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
            found = f"reward {metrics['reward']:.3f}, held-out ROUGE-L {scores['rouge-l']:.3f}"
            bar.write(f"step {step + 1}: {found}")
        prlm.on_first(partial(prlm.append, out / "samples.jsonl", samples))
        prlm.on_first(partial(prlm.append, out / "metrics.jsonl", [metrics]))
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", format=f"{metrics['format']:.3f}")
        lines.append(metrics)
        warn_if_stuck(lines, bar)


def main(o: Options, judge=None) -> None:
    """The run that the options describe; `judge` takes the place of the one that they name.

    A directory does not record which `judge` it was: give each of yours an --out of its own.
    """
    with prlm.processes():
        rank, world_size = prlm.rank_and_world_size()
        check(o, world_size)
        if o.personalization and judge is None:
            check_judge(o)
        with prlm.alone(o.out) if rank == 0 else nullcontext():
            run(o, Stop(), judge)


def run(o: Options, stop: Stop, judge=None) -> None:
    """Everything a run is made of, each part skipped where the run directory has it already."""
    device = prlm.pick_device(o.device)
    train = load_examples(o, "train", o.train_examples)
    held = load_examples(o, "dev", o.eval_examples)
    policy = make_policy(o, o.model, device)
    if not policy.tokenizer.eos_ids:
        raise ValueError(f"{o.model}: no file names an EOS id, so no completion could end")
    make_prompts(o, policy.tokenizer, train[:1])  # refuses faulty options before they are recorded
    # A judge from outside needs none of our judges' files.
    ours = o if judge is None else replace(o, personalization=0.0)
    out = prlm.on_first(partial(prlm.open_result, o, inputs_of(ours, "train", "dev")))
    say_what_runs(o, policy, len(train), len(held))

    if not prlm.on_first(partial(is_complete, o, out)):
        prlm.on_first(partial(prlm.adopt, o, prlm.CHAPTERS))  # code that --force has accepted
        if o.warm_start:
            policy = None  # its memory goes before the warm start takes its own
            policy = make_policy(o, obtain_warm_start(o, out, stop, train), device)
        take_a_look(o, out, policy, train)
        if (o.beta or (ours.personalization and o.judge == "ratio")) and not o.lora_rank:
            # A copy, since the policy will move. Made before a saved state is put back, so that a
            # resumed run has the same one. Of the sampler: it has the products' precision already.
            policy.reference = copy.deepcopy(policy.sampler).requires_grad_(False)
        if judge is None:
            judge = obtain_judge(o, out, policy, train)
        score_held_out(o, out, "no_profile", policy, held, k=0)
        score_held_out(o, out, "before", policy, held, k=o.k)
        prlm.on_first(partial(forget_last_score, out))
        train_policy(o, out, stop, policy, judge, train, held)
        prlm.on_first(
            partial(prlm.save_decoder, policy.decoder, policy.tokenizer, out / "checkpoint")
        )
        score_held_out(o, out, "after", policy, held, k=o.k)  # last: it marks the run complete
    prlm.on_first(partial(report, o, out))


def say_what_runs(o: Options, policy: Policy, train_count: int, held_count: int) -> None:
    """The first line of a run: device, precision, preset, task, numbers of records."""
    device = policy.decoder.head.device
    dtype = str(prlm.product_dtype(o.precision, device)).removeprefix("torch.")
    world_size = prlm.rank_and_world_size()[1]
    many = f"{world_size} x " if world_size > 1 else ""
    print(
        f"{o.model} on {many}{device}, {dtype} products, preset {o.preset}: "
        f"{o.task}, {train_count} training records, {held_count} held out"
    )


def obtain_judge(o: Options, out: Path, policy: Policy, train: list[Example]):
    """The judge that the options name, of the policy as it is before RL; None if its weight is 0.

    `policy.sampler` samples the pairs that the BERT judge is trained on; the ratio asks the
    reference.
    """
    if not o.personalization:
        return None
    base = policy.sampler
    if o.judge == "ratio":
        base = policy.reference or policy.decoder
    judge = make_judge(o, base, policy.tokenizer, train, out / "reward")
    if o.judge == "bert":
        return judge

    def judge_by_base(examples, answers) -> list[float]:
        with reference_of(policy):  # with LoRA, the adapters are off while the judge reads
            return judge(examples, answers)

    return judge_by_base


def score_held_out(
    o: Options, out: Path, name: str, policy: Policy, held: list[Example], k: int
) -> None:  # fmt: skip
    """Scores held-out users into scores.json; the greedy answers go to held_out/{name}.jsonl."""
    file = out / "scores.json"
    scores = prlm.on_first(lambda: prlm.read_json(file) if file.is_file() else {})
    if name in scores:
        return
    sample = partial(sample_records, policy.sampler, policy.tokenizer, held, replace(o, k=k))
    records = sample(description=f"{name}, greedy")
    scores[name] = mean_scores(records)
    if o.eval_temperature:
        sampled = sample(temperature=o.eval_temperature, description=f"{name}, sampled")
        scores[name] |= {f"{key}_sampled": value for key, value in mean_scores(sampled).items()}

    def keep() -> None:
        (out / "held_out").mkdir(exist_ok=True)
        prlm.write_lines(out / "held_out" / f"{name}.jsonl", records)
        if name == "after":
            answers = {record["id"]: record["answer"] for record in records}
            write_predictions(out / "predictions.json", o.task, answers)
        prlm.write_json(file, scores)

    prlm.on_first(keep)


def forget_last_score(out: Path) -> None:
    """Drops the "after" score: the policy is about to move on from it."""
    scores = prlm.read_json(out / "scores.json")
    if scores.pop("after", None) is not None:
        prlm.write_json(out / "scores.json", scores)


# What a complete run holds besides its scores.
LAST_FILES = ("checkpoint/model.safetensors", "predictions.json", "held_out/after.jsonl")


def is_complete(o: Options, out: Path) -> bool:
    """Whether the last score holds: not if --steps has grown since or one of its files is gone.

    Without trainer.pt it could not be made again, so then it holds.
    """
    file = out / "scores.json"
    scores = prlm.read_json(file) if file.is_file() else {}
    if any(not isinstance(found, dict) or "rouge-l" not in found for found in scores.values()):
        again = (out / "trainer.pt").is_file()
        advice = "delete it to score again" if again else "choose another --out"
        raise ValueError(f"{file}: these are not the scores of a run; {advice}")
    if "after" not in scores:
        return False
    metrics = out / "metrics.jsonl"
    lines = prlm.read_steps(metrics) if metrics.is_file() else []
    done = lines[-1]["step"] if lines else 0  # a warm start without RL has written no line
    if done > o.steps:
        raise ValueError(f"{out} has done {done} steps already, more than --steps {o.steps}")
    stale = metrics.is_file() and done < o.steps  # without a log, `done` says nothing
    lost = not all((out / name).is_file() for name in LAST_FILES)
    stateless = done > 0 and not (out / "trainer.pt").is_file()
    return stateless or not (stale or lost)


def report(o: Options, out: Path) -> None:
    """Prints the table of a finished run, and which of its files are missing."""
    scores = prlm.read_json(out / "scores.json")
    rows = {"no profile": "no_profile", "RAG before RL": "before", "after RL": "after"}
    columns = ["rouge-1", "rouge-l", "rouge-1_sampled", "rouge-l_sampled"]
    columns = [column for column in columns if column in scores["after"]]
    shown = {row: scores[key] for row, key in rows.items() if key in scores}
    print(table({row: {c: line[c] for c in columns if c in line} for row, line in shown.items()}))
    files = ["metrics.jsonl", "samples.jsonl", "scores.json", *LAST_FILES]
    lost = [name for name in files if not (out / name).is_file()]
    if "metrics.jsonl" not in lost:
        count = len(prlm.read_lines(out / "metrics.jsonl"))
        if count < o.steps:
            lost.append(f"{o.steps - count} of the {o.steps} lines of metrics.jsonl")
    try:
        from toy.page import draw_curves

        draw_curves(out)  # reward.png
    except ImportError:
        print("no picture of the curves: that needs matplotlib. With it, this command draws one")
    print(f"{out} is complete" + (f"; missing: {', '.join(lost)}" if lost else ""))


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
