"""GRPO: the policy learns to reason over the profile from reward alone. This is the main job.

One step, for P prompts with G completions each:

  1. roll out    o_1 .. o_G sampled from the policy at temperature T
  2. reward      r_i = accuracy + 0.1 format + 0.1 personalization                   (reward.py)
  3. advantage   A_i = (r_i - mean r) / (std r + 1e-4) within the group: no value network
  4. update      ratio_t = exp(log pi(o_t) - log pi_old(o_t)); the loss of a token is
                 -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + beta (exp(d) - d - 1)
                 with d = log ref(o_t) - log pi(o_t); averaged over a completion's tokens, then
                 over completions ("grpo"), or over all tokens ("dapo"), or by a constant
                 ("dr_grpo")

The loss starts at 0 and stays small: with one update a rollout the ratio is exactly 1 and the
advantages of a group sum to 0. Reward is the signal to watch.

Every random choice is a function of (seed, step), so a stopped run keeps no generator state: the
same command, started again, goes on. No dropout anywhere; the ids that were sampled are trained.

    python rl.py                       # the toy, on a CPU, in minutes
    python rl.py --model DIR --data DIR --task LaMP-5 --lr 1e-6 --prompts-per-step 8 --out runs/5
    torchrun --nproc-per-node 4 rl.py …    # four GPUs: each takes a share of a step's prompts
"""

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import prlm
from eval import evaluate, table, write_predictions
from prlm import Decoder, Tokenizer
from retrieve import Example, load_lamp, make_prompts, opening
from reward import Judge, RewardOptions, bert_judge, load_reward_model, obtain_judge, rewards

Normalizer = Literal["grpo", "dapo", "dr_grpo"]
Scale = Literal["std", "none"]
Precision = Literal["auto", "float32", "bfloat16"]

# ---- The algorithm --------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [P, G]; "none" does not divide (Dr. GRPO).

    The standard deviation has Bessel's correction. A group whose rewards are equal up to rounding
    (8 eps of the largest), or a group of one, gets exact zeros under either scale: it does not say
    which completion was better.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale {scale!r} is neither std nor none")
    centred = rewards - rewards.mean(1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)
    centred = centred.masked_fill(centred.abs().amax(1, keepdim=True) <= rounding, 0.0)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    return centred / (std + 1e-4)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """An estimate of each token's KL(policy | reference): exp(d) - d - 1, d = ref - policy."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def loss_size(mask: Tensor, normalizer: str, max_new_tokens: int | None) -> float:
    """What a summed loss is divided by: completions, tokens, or completions x max_new_tokens.

    In this order "grpo", "dapo" and "dr_grpo", of mask [P, G, C]; of tokens, those with a mask of 1
    and never less than 1. ValueError names another normalizer, or dr_grpo without max_new_tokens.
    """
    completions = mask.shape[0] * mask.shape[1]
    if normalizer not in get_args(Normalizer):
        raise ValueError(f"normalizer {normalizer!r} is none of {', '.join(get_args(Normalizer))}")
    if normalizer == "dr_grpo" and not max_new_tokens:
        raise ValueError("dr_grpo divides by max_new_tokens, which was not given")
    sizes = {"grpo": completions, "dapo": max(mask.sum().item(), 1)}
    return sizes.get(normalizer) or completions * max_new_tokens


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, clip: float = 0.2, clip_high: float | None = None,
    beta: float = 0.0, normalizer: str = "grpo", max_new_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """The loss of step 4, a scalar: log-probabilities and mask [P, G, C], advantages [P, G].

    `clip_high` widens the upper side of the clip (DAPO). Values behind the mask never count.
    """
    size, outside = loss_size(mask, normalizer, max_new_tokens), ~mask.bool()
    logprobs, old_logprobs = (x.masked_fill(outside, 0.0) for x in (logprobs, old_logprobs))
    ratio, gain = (logprobs - old_logprobs).exp(), advantages[..., None]  # [P, G, C], [P, G, 1]
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.min(ratio * gain, clipped * gain)
    if beta:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        loss = loss + beta * k3(logprobs, ref_logprobs.masked_fill(outside, 0.0))
    loss = loss.masked_fill(outside, 0.0).sum(-1)  # [P, G]
    if normalizer == "grpo":
        loss = loss / mask.sum(-1).clamp(min=1)
    return loss.sum() / size


def clip_fraction(logprobs, old_logprobs, advantages, mask, clip=0.2, clip_high=None) -> Tensor:
    """How many tokens [P, G, C] lost their gradient to the clip, as a count."""
    ratio, gain = (logprobs - old_logprobs).exp(), advantages[..., None]
    high = ratio > 1 + (clip if clip_high is None else clip_high)
    return (((gain > 0) & high | (gain < 0) & (ratio < 1 - clip)) & mask).sum()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to a tenth of the peak.

    The warm-up has round(warmup steps) steps, but at least one: the n-th of w has n/w of the peak.
    The step after it, if there is one, has the peak, and the last of all a tenth.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# ---- One step -------------------------------------------------------------------------------


# What the authors trained with (README: the paper's recipe); 10 x 500 are their 5,000 pairs.
PAPER = {
    "k": 5, "retriever": "bm25", "max_prompt_tokens": 512, "max_new_tokens": 768,
    "train_examples": 500, "steps": 2500, "prompts_per_step": 1, "group_size": 4,
    "temperature": 0.7, "lr": 1e-6, "warmup": 0.1, "beta": 0.04, "clip": 0.2, "scale": "std",
    "normalizer": "grpo", "updates_per_rollout": 1, "personalization": 0.1, "negatives": 1,
    "pairs_per_query": 10, "reward_epochs": 3, "reward_lr": 5e-5, "precision": "auto",
    "checkpointing": True, "eval_every": 500, "save_every": 100,
}  # fmt: skip


@dataclass
class Options(RewardOptions):
    presets = {"toy": {}, "paper": PAPER}  # noqa: RUF012
    preset: Literal["toy", "paper"] = "toy"  # whose values are the defaults of the other options
    train_examples: int = 0  # only the first training records; 0 takes all
    reward_model: str | None = None  # a trained one; without it one is trained into --out
    accuracy: float = 1.0  # weight of the overlap with the user's own text; 0 learns without it
    format: float = 0.1  # weight of closed reasoning
    personalization: float = 0.1  # weight of the judge; 0 does without one
    steps: int = 60  # rollouts, each with its update
    prompts_per_step: int = 16  # P; the authors take 1
    group_size: int = 8  # G; the authors take 4
    temperature: float = 1.0  # of sampling and of all log-probabilities; the authors take 0.7
    lr: float = 1e-3  # peak learning rate of AdamW; the authors take 1e-6 for 1.5 B parameters
    warmup: float = 0.1  # share of the steps over which the learning rate rises
    beta: float = 0.0  # weight of the KL to the base policy; the authors take 0.04
    clip: float = 0.2  # how far the ratio may leave 1 and still earn
    clip_high: float | None = None  # its upper side, where that is to be wider
    scale: Scale = "std"  # what divides the advantages
    normalizer: Normalizer = "grpo"  # what the loss is averaged over
    updates_per_rollout: int = 1  # with one, the ratio is 1 and the clip never acts
    grad_clip: float = 1.0  # largest gradient norm
    mask_truncated: bool = False  # leave completions that hit max_new_tokens out of the loss
    precision: Precision = "auto"  # of products; weights stay float32; auto: bfloat16 on CUDA
    tokens_per_micro_batch: int = 8192  # memory against speed; the result stays the same
    checkpointing: bool = False  # run each layer again in the backward pass: less memory, slower
    eval_every: int = 20  # steps between greedy evaluations on held-out users; 0 is never
    eval_examples: int = 200  # held-out records to score
    save_every: int = 20  # steps between states to go on from
    out: str = "runs/toy"  # run directory; the same command goes on with a stopped run
    overwrite: bool = False  # start anew where the directory holds another run


def seed_of(*parts) -> int:
    """A 63-bit seed for one purpose at one step, whatever was drawn before."""
    return random.Random(repr(parts)).getrandbits(63)


def choose(count: int, step: int, size: int, seed: int) -> list[int]:
    """The examples of a step: each epoch is a new permutation, read on from step to step."""
    chosen = []
    for place in range(step * size, (step + 1) * size):
        order = random.Random(seed_of(seed, "epoch", place // count)).sample(range(count), count)
        chosen.append(order[place % count])
    return chosen


def micro_batches(prompts, completions, budget: int) -> list[list[int]]:
    """Whole groups, longest first, as many as stay within `budget` tokens (one at least)."""
    pairs = zip(prompts, completions, strict=True)
    return prlm.micro_batches([len(prompt) + sum(map(len, g)) for prompt, g in pairs], budget)


def in_half(o: Options, device: torch.device) -> bool:
    """Whether products are computed in bfloat16: half the memory and, on a GPU, faster."""
    return o.precision == "bfloat16" or (o.precision == "auto" and device.type == "cuda")


def make_sampler(o: Options, decoder: Decoder) -> Decoder:
    """What generates: the policy itself, or a bfloat16 copy of its float32 master weights."""
    half = in_half(o, decoder.head.device)
    return copy.deepcopy(decoder).bfloat16().requires_grad_(False) if half else decoder


@torch.no_grad()
def refresh(sampler: Decoder, decoder: Decoder) -> None:
    if sampler is not decoder:
        for copied, parameter in zip(sampler.parameters(), decoder.parameters(), strict=True):
            copied.copy_(parameter)


def update(o, decoder, optimizer, reference, prompts, completions, advantages, sampled, keep):
    """Step 4: `updates_per_rollout` optimizer steps on one rollout; returns what the log needs.

    completions [P][G] are the sampled ids, advantages and keep [P, G], sampled [P, G, C] the
    sampler's log-probabilities. "Old" is the policy of the first pass, before any update.
    Of several processes each has its share of the rollout; sizes and sums are those of all.
    """
    old, answers = torch.zeros_like(sampled), [ids for group in completions for ids in group]
    trained = prlm.Ragged(answers, keep.device).mask.view_as(sampled) & keep[..., None]  # [P, G, C]
    world, tokens = prlm.place()[1], max(sum(prlm.gather(trained.sum().item())), 1)
    size = world * loss_size(trained, o.normalizer, o.max_new_tokens)
    size, gap = tokens if o.normalizer == "dapo" else size, 0.0
    device = decoder.head.device
    half = torch.autocast(device.type, torch.bfloat16, in_half(o, device))
    for turn in range(o.updates_per_rollout):
        log = dict.fromkeys(("loss", "grad_norm", "entropy", "kl", "clip_fraction"), 0.0)
        for rows in micro_batches(prompts, completions, o.tokens_per_micro_batch):
            batch = [prompts[n] for n in rows], [completions[n] for n in rows], o.temperature
            with half:
                logprobs, entropy, mask = prlm.score_completions(decoder, *batch)
            now, width, ref = logprobs.detach(), logprobs.shape[-1], None
            if turn == 0:
                old[rows, :, :width] = now
                gap = max(gap, (now - sampled[rows, :, :width])[mask].abs().max().item())
            mask = trained[rows, :, :width]
            if reference is not None:
                with torch.no_grad(), half:
                    ref, _ = prlm.token_logprobs(reference, *batch)
                log["kl"] += k3(now, ref)[mask].sum().item() / tokens
            terms = old[rows, :, :width], advantages[rows], mask
            how = o.clip, o.clip_high, o.beta, o.normalizer, o.max_new_tokens
            loss = grpo_loss(logprobs, *terms, ref, *how)
            # The size of the whole step counts, not that of this micro-batch.
            loss = loss * (loss_size(mask, o.normalizer, o.max_new_tokens) / size)
            loss.backward()
            log["loss"] += loss.item()
            log["entropy"] += entropy[mask].sum().item() / tokens
            log["clip_fraction"] += clip_fraction(now, *terms, o.clip, o.clip_high).item() / tokens
        if world > 1:
            # Once an optimizer step, after the last micro-batch: little to overlap, and unlike
            # DistributedDataParallel it needs no forward() of its own and no second copy.
            for parameter in decoder.parameters():
                dist.all_reduce(parameter.grad)
        each = prlm.gather(log)
        log = {name: sum(one[name] for one in each) for name in log}
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), o.grad_clip)
        log["grad_norm"] = norm.item()
        if not math.isfinite(log["grad_norm"] + log["loss"]):
            raise FloatingPointError(f"the loss is {log['loss']}, the gradient's norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
    return log | {"gap": max(prlm.gather(gap))}


def grpo_step(
    o: Options, step: int, decoder: Decoder, sampler: Decoder, optimizer,
    reference: Decoder | None, judge: Judge | None, tokenizer: Tokenizer,
    examples: list[Example], prompts,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Steps 1 to 4 once: (a line of metrics, the samples that were learned from).

    Of several processes each rolls out its share of the step's prompts, with noise of its own.
    """
    start, device, (rank, world) = time.perf_counter(), decoder.head.device, prlm.place()
    share = o.prompts_per_step // world
    chosen = choose(len(examples), step, o.prompts_per_step, o.seed)[rank * share :][:share]
    batch, seed = [prompts[n] for n in chosen], seed_of(o.seed, "rollout", step) + rank
    how = o.group_size, o.max_new_tokens, o.temperature, tokenizer.eos_ids, seed
    groups = prlm.generate(sampler, batch, *how)
    flat = [completion for group in groups for completion in group]  # P*G
    texts = [opening(o, tokenizer) + tokenizer.decode(c.tokens) for c in flat]
    owners = [examples[n] for n in chosen for _ in range(o.group_size)]
    parts = rewards(texts, owners, judge, o.accuracy, o.format, o.personalization)
    reward = torch.tensor([part["reward"] for part in parts]).view(-1, o.group_size)  # [P, G]
    advantages = group_advantages(reward, o.scale)
    finished = torch.tensor([c.finished for c in flat]).view_as(reward)
    sampled = [torch.tensor(c.logprobs) for c in flat]
    sampled = torch.nn.utils.rnn.pad_sequence(sampled, True).unflatten(0, reward.shape)  # [P, G, C]
    rolled = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, o.steps, o.lr, o.warmup)
    ids = [[completion.tokens for completion in group] for group in groups]
    keep = finished | (not o.mask_truncated)
    tensors = (tensor.to(device) for tensor in (advantages, sampled, keep))
    try:
        if not reward.isfinite().all():
            raise FloatingPointError(f"a reward is not finite: {reward.tolist()}")
        log = update(o, decoder, optimizer, reference, batch, ids, *tensors)
        refresh(sampler, decoder)
    except FloatingPointError as error:
        where = f"step {step + 1}, records {', '.join(examples[n].id for n in chosen)}"
        advice = "it was not applied; go on from the last state with a lower --lr"
        raise ValueError(f"{where}: {error}; {advice}") from None
    updated, count = time.perf_counter(), sum(len(c.tokens) for c in flat)
    names = ("reward", "accuracy", "format", "personalization")
    metrics = {
        **{name: sum(part[name] for part in parts) / len(parts) for name in names},
        "reward_spread": reward.std(1).mean().item(),
        "zero_spread_groups": (advantages == 0).all(1).float().mean().item(),
        **log,
        "completion_tokens": count / len(flat),
        "truncated": 1 - finished.float().mean().item(),
        "lr": optimizer.param_groups[0]["lr"],
        "tokens_per_second": world * (count + sum(map(len, batch))) / (updated - start),
        "seconds_rollout": rolled - start,
        "seconds_update": updated - rolled,
    }
    samples = []
    for n, (owner, part, c) in enumerate(zip(owners, parts, flat, strict=True)):
        line = {"step": step + 1, "id": owner.id, "target": owner.target, "completion": texts[n]}
        line |= part | {"advantage": advantages.flatten()[n].item(), "finished": c.finished}
        line |= {"tokens": c.tokens, "logprobs": [round(x, 4) for x in c.logprobs]}
        samples.append(line | {"prompt": tokenizer.decode(batch[n // o.group_size])})
    each, samples = zip(*prlm.gather((metrics, samples)), strict=True)
    metrics = {name: sum(one[name] for one in each) / world for name in metrics}
    return {"step": step + 1} | metrics, [line for part in samples for line in part]


# ---- A run: its directory, its states, the loop ---------------------------------------------


def open_run(o: Options) -> Path:
    """The run directory, made or reopened. Another run's is refused and its options are named."""
    out, mine = Path(o.out), dataclasses.asdict(o)
    mine.pop("overwrite")
    config = out / "config.json"
    if o.overwrite and config.is_file():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)  # at once, whatever happens then
        shutil.rmtree(old)
    if config.is_file():
        theirs = prlm.read_json(config)
        odd = [f"{n} {theirs.get(n)!r} -> {mine[n]!r}" for n in mine if mine[n] != theirs.get(n)]
        if odd:
            advice = "choose another --out, or --overwrite"
            raise ValueError(f"{out} holds a run with other options ({', '.join(odd)}): {advice}")
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        prlm.write_json(config, mine)
    for left in out.rglob(".*.tmp"):  # of a process that was killed while it wrote
        left.unlink()
    return out


@contextmanager
def alone(out: Path):
    """Holds the run directory for this process; however that ends, the system lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is working in {out}") from None
        yield


def save_state(path: Path, step: int, decoder: Decoder, optimizer) -> None:
    state = {"step": step, "model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
    with prlm.replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, f"not written, is the disk full? {error}") from None


def load_state(path: Path, decoder: Decoder, optimizer) -> int:
    """Puts a saved state back; the number of steps that were done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        decoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, OSError, EOFError, LookupError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        text = f"{path}: not a state of this run ({reason}); --overwrite starts anew"
        raise ValueError(text) from None


def rewind(path: Path, steps: int) -> None:
    """Drops what a run will write again: lines of later steps, and a half-written last one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [line for line in text.split("\n")[:-1] if json.loads(line)["step"] <= steps]
    prlm.write_text(path, "".join(line + "\n" for line in lines))


def append(path: Path, records: list[dict]) -> None:
    """Adds whole lines in one write: a kill leaves all of them or none."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        os.fsync(file.fileno())


class Stop:
    """Ctrl-C and SIGTERM end the process, with status 130 and 143; nothing that is saved is lost.

    Within the loop they wait for the step to be finished and saved; a second one does not.
    """

    def __init__(self):
        self.signal, self.in_loop = None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _frame) -> None:
        if self.signal is not None or not self.in_loop:
            self.leave(number)
        self.signal = number
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    def leave(self, number) -> None:
        print("\nstopped; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(128 + number)


def draw_curves(out: Path, before: float) -> None:
    """reward.png: rollout reward and held-out ROUGE-L by step, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = prlm.read_lines(out / "metrics.jsonl")
    scored = [(0, before)]
    scored += [(line["step"], line["eval_rouge-l"]) for line in lines if "eval_rouge-l" in line]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    left.plot([line["step"] for line in lines], [line["reward"] for line in lines], "tab:blue")
    left.set(xlabel="step", ylabel="mean reward of the rollout")
    right = left.twinx()
    right.plot(*zip(*scored, strict=True), "o-", color="tab:orange")
    right.set(ylabel="held-out ROUGE-L, greedy", ylim=(0, 1))
    figure.savefig(out / "reward.png", dpi=120)


def check(o: Options, world: int) -> None:
    """Refuses options that cannot work, before anything is loaded."""
    least = {
        0: "k beta eval_every accuracy format personalization warmup train_examples",
        1: "steps prompts_per_step max_new_tokens max_prompt_tokens updates_per_rollout batch_size "
        "tokens_per_micro_batch eval_examples save_every pairs_per_query negatives reward_epochs",
        2: "group_size",  # a group of one has nothing to compare with: all advantages are 0
        1e-9: "temperature lr reward_lr grad_clip clip",
    }
    for bound, names in least.items():
        for name in names.split():
            if not bound <= getattr(o, name) < math.inf:
                flag = "--" + name.replace("_", "-")
                at_least = "above 0" if bound < 1e-6 and bound else f"at least {bound}"
                raise ValueError(f"{flag} must be {at_least}, not {getattr(o, name)}")
    if o.prompts_per_step % world:
        count = f"a multiple of the {world} processes, not {o.prompts_per_step}"
        raise ValueError(f"--prompts-per-step must be {count}")


def train_policy(
    o: Options, out: Path, stop: Stop, decoder, sampler, tokenizer, judge, train, held
) -> None:  # fmt: skip
    """The loop: a step, its lines in the logs, now and then a look at held-out users and a save."""
    reference = copy.deepcopy(sampler).requires_grad_(False) if o.beta else None
    decoder.checkpointing = o.checkpointing
    optimizer = torch.optim.AdamW(decoder.parameters(), o.lr, weight_decay=0.0)
    state, first, rank = out / "trainer.pt", 0, prlm.place()[0]
    if prlm.on_first(state.is_file):
        first = load_state(state, decoder, optimizer)
        refresh(sampler, decoder)
        print(f"going on after step {first}")
    for name in ("metrics.jsonl", "samples.jsonl") if rank == 0 else ():
        rewind(out / name, first)
    prompts, stop.in_loop = make_prompts(o, tokenizer, train), True
    bar = tqdm(range(first, o.steps), "GRPO", o.steps, initial=first, disable=None)
    policy = decoder, sampler, optimizer, reference, judge
    for step in bar:
        metrics, samples = grpo_step(o, step, *policy, tokenizer, train, prompts)
        done, last = step + 1, step + 1 == o.steps
        if o.eval_every and (done % o.eval_every == 0 or last):
            scores, _ = evaluate(sampler, tokenizer, held, o, description="held-out users")
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
            found = f"reward {metrics['reward']:.3f}, held-out ROUGE-L {scores['rouge-l']:.3f}"
            bar.write(f"step {done}: {found}")
        if rank == 0:
            append(out / "samples.jsonl", samples)
            append(out / "metrics.jsonl", [metrics])
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "format")})
        asked = max(prlm.gather(stop.signal or 0))  # whoever of the processes was
        if done % o.save_every == 0 or last or asked:
            prlm.on_first(partial(save_state, state, done, decoder, optimizer))
        if asked and not last:
            bar.close()
            stop.leave(asked)
    stop.in_loop = False


def main(o: Options, judge: Judge | None = None) -> None:
    """The run that the options describe; `judge` takes the place of the one they name."""
    with prlm.processes():
        rank, world = prlm.place()
        check(o, world)
        with alone(Path(o.out)) if rank == 0 else nullcontext():
            run(o, Stop(), judge)


def run(o: Options, stop: Stop, judge: Judge | None = None) -> None:
    """Everything a run is made of, each part skipped where the run directory has it already."""
    device = prlm.pick_device(o.device)
    train = load_lamp(o.data, o.task, "train")[: o.train_examples or None]
    held = load_lamp(o.data, o.task, "dev")[: o.eval_examples]
    decoder, tokenizer = prlm.load_decoder(o.model, device), prlm.load_tokenizer(o.model)
    sampler = make_sampler(o, decoder)
    if not tokenizer.eos_ids:
        raise ValueError(f"{o.model}: no file names an EOS id, so no completion could end")
    prlm.on_first(partial(open_run, o))
    out, (rank, world) = Path(o.out), prlm.place()
    many = f"{world} x " if world > 1 else ""
    where = f"{many}{device}, {str(sampler.head.dtype).removeprefix('torch.')} products"
    print(f"{o.model} on {where}: {o.task}, {len(train)} training users, {len(held)} held out")
    if o.personalization and o.reward_model:
        judge = bert_judge(load_reward_model(o.reward_model, device))
    elif judge is None:
        frozen = copy.deepcopy(sampler).requires_grad_(False) if o.judge == "ratio" else sampler
        judge = obtain_judge(o, frozen, tokenizer, train, out / "reward")
    file = out / "scores.json"
    scores = prlm.on_first(lambda: prlm.read_json(file) if file.is_file() else {})
    for name, k in (("no_profile", 0), ("before", o.k), ("after", o.k)):
        if name in scores:
            continue
        if name == "after":
            train_policy(o, out, stop, decoder, sampler, tokenizer, judge, train, held)
        how = sampler, tokenizer, held, dataclasses.replace(o, k=k)
        sampled, _ = evaluate(*how, 0.7, f"score {name}, sampled")
        greedy, answers = evaluate(*how, 0.0, f"score {name}, greedy")
        scores[name] = greedy | {f"{key}_sampled": value for key, value in sampled.items()}
        if rank:
            continue
        if name == "after":
            prlm.save_decoder(decoder, tokenizer, out / "checkpoint")
            write_predictions(out / "predictions.json", o.task, answers)
            draw_curves(out, scores["before"]["rouge-l"])
        prlm.write_json(file, scores)  # with "after", and so last: the run is complete
    rows = {"no profile": "no_profile", "RAG before RL": "before", "after RL": "after"}
    columns = ("rouge-1", "rouge-l", "rouge-1_sampled", "rouge-l_sampled")
    print(table({row: {c: scores[key][c] for c in columns} for row, key in rows.items()}))
    print(f"{out} is complete: metrics, samples, scores, predictions, checkpoint/")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
