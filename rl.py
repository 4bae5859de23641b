"""GRPO: the policy learns to reason over the profile from reward alone. This is the main job.

One step, for P prompts with G completions each:

  1. roll out    o_1 ... o_G sampled from the policy at temperature T
  2. reward      r_i = accuracy + 0.1 format + 0.1 personalization            (reward.py)
  3. advantage   A_i = (r_i - mean r) / (std r + 1e-4) within the group: no value network
  4. update      ratio_t = exp(log pi(o_t) - log pi_old(o_t)), and for every token
                 loss_t = -min(ratio A, clip(ratio, 1-c, 1+c) A) + beta (exp(d) - d - 1),  d = log ref - log pi
                 averaged over the tokens of a completion, then over completions ("grpo"),
                 or over all tokens ("dapo"), or by a constant ("dr_grpo")

The loss starts near 0 and stays small: with one update a rollout the ratio is exactly 1 and the
advantages of a group sum to 0. Reward is the signal to watch.

Every random choice is a function of (seed, step), so a stopped run needs no generator state to go on
where it was: start the same command again. No dropout anywhere; the sampled ids themselves are trained.

    python rl.py                          # the toy: held-out ROUGE-L doubles in minutes on a CPU
    python rl.py --model DIR --data DIR --task LaMP-5 --lr 1e-6 --prompts-per-step 8
"""

import copy
import dataclasses
import json
import math
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from eval import evaluate, make_prompts, table, write_predictions
from prlm import (
    Decoder,
    Tokenizer,
    command,
    generate,
    load_decoder,
    load_tokenizer,
    pick_device,
    read_json,
    replacing,
    save_decoder,
    score_completions,
    token_logprobs,
    write_json,
    write_text,
)
from retrieve import Retriever, TaskName, load_lamp, make_dense
from reward import load_reward_model, obtain_reward_model, rewards

Normalizer = Literal["grpo", "dapo", "dr_grpo"]

# ----------------------------------------------------------------------------------------------
# The algorithm
# ----------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [P, G]; "none" leaves out the division (Dr. GRPO).

    The standard deviation has Bessel's correction. Groups whose rewards are equal up to rounding, and
    groups of one, get exact zeros: they say nothing about which completion was better.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale {scale!r} is neither std nor none")
    centred = rewards - rewards.mean(1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)
    centred = centred.masked_fill(centred.abs().amax(1, keepdim=True) <= rounding, 0.0)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    return centred / (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt().add(
        1e-4
    )


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy | reference) a token: exp(d) - d - 1, d = ref - policy >= 0."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def normalizer_size(mask: Tensor, normalizer: str, max_new_tokens: int | None) -> float:
    """What the summed loss is divided by: completions, tokens, or completions x max_new_tokens."""
    if normalizer == "grpo":
        return mask.shape[0] * mask.shape[1]
    if normalizer == "dapo":
        return max(mask.sum().item(), 1)
    if normalizer != "dr_grpo":
        raise ValueError(f"normalizer {normalizer!r} is none of grpo, dapo, dr_grpo")
    if not max_new_tokens:
        raise ValueError("dr_grpo divides by max_new_tokens, which was not given")
    return mask.shape[0] * mask.shape[1] * max_new_tokens


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.0,
    normalizer: str = "grpo",
    max_new_tokens: int | None = None,
) -> Tensor:
    """The loss of step 4 above, a scalar; log-probabilities and mask [P, G, C], advantages [P, G].

    `clip_high` widens the upper side (DAPO). Values behind the mask never count.
    """
    size = normalizer_size(mask, normalizer, max_new_tokens)
    hidden = ~mask.bool()
    logprobs, old_logprobs = (x.masked_fill(hidden, 0.0) for x in (logprobs, old_logprobs))
    ratio = (logprobs - old_logprobs).exp()  # [P, G, C]
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.min(ratio * advantages[..., None], clipped * advantages[..., None])
    if beta:
        if ref_logprobs is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        loss = loss + beta * k3(logprobs, ref_logprobs.masked_fill(hidden, 0.0))
    loss = loss.masked_fill(hidden, 0.0).sum(-1)  # [P, G]
    if normalizer == "grpo":
        loss = loss / mask.sum(-1).clamp(min=1)
    return loss.sum() / size


def clip_fraction(logprobs, old_logprobs, advantages, mask, clip=0.2, clip_high=None) -> float:
    """The share of tokens whose gradient the clip has cut off."""
    ratio, up = (logprobs - old_logprobs).exp(), advantages[..., None] > 0
    high = 1 + (clip if clip_high is None else clip_high)
    cut = torch.where(up, ratio > high, ratio < 1 - clip) & mask & (advantages[..., None] != 0)
    return (cut.sum() / mask.sum().clamp(min=1)).item()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a cosine down to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - 1 - rising)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * min(progress, 1))) / 2)


# ----------------------------------------------------------------------------------------------
# One step
# ----------------------------------------------------------------------------------------------


@dataclass
class Options:
    model: str = "toy/policy"  # checkpoint directory of the policy to train
    data: str = "toy/lamp"  # directory with LaMP's files, train and dev
    task: TaskName = "LaMP-4"  # which of LaMP's generation tasks
    retriever: Retriever = "bm25"  # how profile items are ranked
    k: int = 4  # items in the prompt
    encoder: str = "toy/encoder"  # BERT checkpoint for the reward model and the dense retriever
    pooling: str = "mean"  # of the dense retriever: mean or cls
    reward_model: str | None = (
        None  # a trained one; without it one is trained into the run directory
    )
    pairs_per_query: int = 3  # reward model: positives sampled for each query
    negatives: int = 1  # reward model: negatives for each positive
    reward_epochs: int = 3  # reward model: passes over the pairs
    reward_lr: float = 1e-3  # reward model: peak learning rate; the paper's BERT-base takes 5e-5
    personalization: float = 0.1  # weight of the learned reward; 0 trains no reward model
    steps: int = 120  # optimizer rollouts to make
    prompts_per_step: int = 16  # P; the authors take 1
    group_size: int = 8  # G; the authors take 4
    max_prompt_tokens: int = 512  # longer prompts lose the ends of their items
    max_new_tokens: int = 128  # longest completion; the authors take 768
    temperature: float = 1.0  # of sampling and of every log-probability; the authors take 0.7
    lr: float = 1e-3  # peak learning rate of AdamW; the authors take 1e-6 for 1.5 B parameters
    warmup: float = 0.1  # share of the steps over which the learning rate rises
    beta: float = 0.0  # weight of the KL to the base policy; the authors take 0.04
    clip: float = 0.2  # how far the ratio may leave 1 and still earn
    clip_high: float | None = None  # its upper side, if wider than the lower
    scale: Literal["std", "none"] = "std"  # what divides the advantages
    normalizer: Normalizer = "grpo"  # what the loss is averaged over
    updates_per_rollout: int = 1  # with one, the ratio is 1 and the clip never acts
    grad_clip: float = 1.0  # largest gradient norm
    mask_truncated: bool = False  # leave completions that hit max_new_tokens out of the loss
    tokens_per_micro_batch: int = 8192  # memory against speed; the result does not depend on it
    eval_every: int = 30  # steps between greedy evaluations on held-out users; 0 is never
    eval_examples: int = 200  # held-out records to score
    save_every: int = 30  # steps between checkpoints to go on from
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cuda, mps or cpu
    out: str = "runs/toy"  # the run directory; start the same command again to continue a run
    overwrite: bool = False  # start anew where the run directory holds another run


def seed_of(*parts) -> int:
    """A 63-bit seed for one purpose at one step: independent of what was drawn before."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


def choose(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which examples a step takes: every epoch is a new permutation, read on where the last step ended."""
    chosen = []
    for place in range(step * size, (step + 1) * size):
        order = list(range(count))
        random.Random(seed_of(seed, "epoch", place // count)).shuffle(order)
        chosen.append(order[place % count])
    return chosen


def micro_batches(prompts, completions, budget: int) -> list[list[int]]:
    """Whole groups, longest first, so that the tokens of each batch stay within `budget`."""
    size = [len(p) + sum(map(len, group)) for p, group in zip(prompts, completions, strict=True)]
    batches: list[list[int]] = []
    for n in sorted(range(len(size)), key=lambda n: -size[n]):
        if not batches or sum(size[m] for m in batches[-1]) + size[n] > budget:
            batches.append([])
        batches[-1].append(n)
    return batches


def pick(tensor: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """Rows of [P, G, C'] cut to the width of a micro-batch."""
    return tensor[rows, :, : like.shape[-1]]


def update(decoder, optimizer, reference, prompts, completions, advantages, keep, sampled, options):
    """Step 4: `updates_per_rollout` optimizer steps on one rollout. Returns what the log needs.

    completions [P][G] are the sampled ids, advantages and keep [P, G], sampled [P, G, C] the sampler's
    log-probabilities. The policy before the first update is "old", so its log-probabilities are those
    of the first pass.
    """
    o, old, log = options, torch.zeros_like(sampled), {}
    lengths = torch.tensor([[len(c) for c in group] for group in completions], device=keep.device)
    everything = (torch.arange(sampled.shape[-1], device=keep.device) < lengths[..., None]) & keep[
        ..., None
    ]
    total = normalizer_size(everything, o.normalizer, o.max_new_tokens)
    for turn in range(o.updates_per_rollout):
        log = dict.fromkeys(("loss", "kl", "entropy", "clip_fraction"), 0.0) | {
            "gap": log.get("gap", 0.0)
        }
        for rows in micro_batches(prompts, completions, o.tokens_per_micro_batch):
            batch = [prompts[n] for n in rows], [completions[n] for n in rows], o.temperature
            logprobs, entropy, mask = score_completions(decoder, *batch)
            if turn == 0:
                old[rows, :, : logprobs.shape[-1]] = logprobs.detach()
                gap = (logprobs.detach() - pick(sampled, rows, logprobs)).abs()[mask].max().item()
                log["gap"] = max(log["gap"], gap)
            mask = mask & keep[rows, :, None]
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref, _ = token_logprobs(reference, *batch)
            terms = logprobs, pick(old, rows, logprobs), advantages[rows], mask
            loss = grpo_loss(
                *terms, ref, o.clip, o.clip_high, o.beta, o.normalizer, o.max_new_tokens
            )
            # grpo_loss divides by this batch's size; the step's whole size is what counts.
            loss = loss * (normalizer_size(mask, o.normalizer, o.max_new_tokens) / total)
            loss.backward()
            log["loss"] += loss.item()
            share = (mask.sum() / everything.sum().clamp(min=1)).item()
            log["entropy"] += share * (entropy[mask].mean().item() if mask.any() else 0.0)
            log["clip_fraction"] += share * clip_fraction(
                *(x.detach() for x in terms), o.clip, o.clip_high
            )
            if ref is not None and mask.any():
                log["kl"] += share * k3(logprobs.detach(), ref)[mask].mean().item()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), o.grad_clip).item()
        if not math.isfinite(norm) or not math.isfinite(log["loss"]):
            raise ValueError(
                f"the loss is {log['loss']} and the gradient norm {norm}: nothing was applied"
            )
        optimizer.step()
        optimizer.zero_grad()
        log["grad_norm"] = norm
    return log


def grpo_step(
    step: int, decoder, optimizer, reference, reward_model, tokenizer, examples, prompts, options
):
    """One rollout and its update(s): (a line of metrics, the samples it learned from)."""
    o, start = options, time.perf_counter()
    chosen = choose(len(examples), step, o.prompts_per_step, o.seed)
    batch = [prompts[n] for n in chosen]
    groups = generate(
        decoder, batch, o.group_size, o.max_new_tokens, o.temperature,
        tokenizer.eos_ids, seed_of(o.seed, "rollout", step),
    )  # fmt: skip
    flat = [completion for group in groups for completion in group]
    texts = [tokenizer.opening + tokenizer.decode(c.tokens) for c in flat]
    owners = [examples[n] for n in chosen for _ in range(o.group_size)]
    weights = {"accuracy": 1.0, "format": 0.1, "personalization": o.personalization}
    parts = rewards(texts, owners, reward_model, weights)
    device = decoder.head.device
    reward = torch.tensor([p["reward"] for p in parts]).view(-1, o.group_size)  # [P, G]
    advantages = group_advantages(reward, o.scale)
    finished = torch.tensor([c.finished for c in flat]).view_as(reward)
    keep = finished | (not o.mask_truncated)
    sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(c.logprobs) for c in flat], True)
    rolled = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, o.steps, o.lr, o.warmup)
    ids = [[completion.tokens for completion in group] for group in groups]
    log = update(
        decoder, optimizer, reference, batch, ids, advantages.to(device), keep.to(device),
        sampled.unflatten(0, reward.shape).to(device), o,
    )  # fmt: skip
    done, count = time.perf_counter(), sum(len(c.tokens) for c in flat)

    def mean(name: str) -> float:
        return sum(part[name] for part in parts) / len(parts)

    metrics = {
        "step": step + 1,
        "reward": reward.mean().item(),
        "accuracy": mean("accuracy"),
        "format": mean("format"),
        "personalization": mean("personalization"),
        "reward_spread": reward.std(1).mean().item() if o.group_size > 1 else 0.0,
        "zero_spread_groups": (advantages == 0).all(1).float().mean().item(),
        **log,
        "completion_tokens": count / len(flat),
        "truncated": 1 - finished.float().mean().item(),
        "lr": optimizer.param_groups[0]["lr"],
        "tokens_per_second": (count + sum(map(len, batch))) / (done - start),
        "seconds_rollout": rolled - start,
        "seconds_update": done - rolled,
    }
    samples = [
        {"step": step + 1, "id": owner.id, "prompt": tokenizer.decode(prompt), "completion": text, **part,
         "advantage": advantage, "tokens": len(c.tokens), "finished": c.finished}
        for prompt, owner, text, part, advantage, c in zip(
            [p for p in batch for _ in range(o.group_size)], owners, texts, parts,
            advantages.flatten().tolist(), flat, strict=True)
    ]  # fmt: skip
    return metrics, samples


# ----------------------------------------------------------------------------------------------
# A run: its directory, its checkpoints, the loop
# ----------------------------------------------------------------------------------------------


def open_run(options: Options) -> Path:
    """The run directory, made or reopened; another run's is refused, its options are named."""
    out, mine = Path(options.out), dataclasses.asdict(options)
    mine.pop("overwrite")
    config = out / "config.json"
    if options.overwrite and config.is_file():
        shutil.rmtree(out)
    if config.is_file():
        theirs = read_json(config)
        odd = [name for name in mine if mine[name] != theirs.get(name)]
        if odd:
            changes = ", ".join(f"{name} {theirs.get(name)!r} -> {mine[name]!r}" for name in odd)
            raise ValueError(
                f"{out} holds a run with other options ({changes}): choose another --out or --overwrite"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(config, mine)
    return out


def save_trainer(path: Path, step: int, decoder: Decoder, optimizer) -> None:
    with replacing(path) as temporary:
        state = {"step": step, "model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, temporary)


def load_trainer(path: Path, decoder: Decoder, optimizer) -> int:
    """Puts a saved state back; returns the number of finished steps."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    decoder.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def rewind(path: Path, steps: int) -> None:
    """Drops the lines of a .jsonl file that a run will write again, and a half-written last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
    write_text(path, "".join(whole))


def append(path: Path, records: list[dict]) -> None:
    """Adds whole lines in one write: a kill leaves all of them or none."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


class Stop:
    """Ctrl-C and SIGTERM ask the loop to finish its step, save and leave; a second one leaves at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _frame):
        if self.signal is not None:
            sys.exit(128 + number)
        self.signal = number
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)


def draw_curves(out: Path) -> None:
    """reward.png: reward and held-out ROUGE-L against steps, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, left = plt.subplots(figsize=(7, 3.5), layout="constrained")
    left.plot([m["step"] for m in lines], [m["reward"] for m in lines], color="tab:blue")
    left.set(xlabel="step", ylabel="mean reward of the rollout")
    scored = [m for m in lines if "eval_rouge-l" in m]
    right = left.twinx()
    right.plot(
        [m["step"] for m in scored], [m["eval_rouge-l"] for m in scored], "o-", color="tab:orange"
    )
    right.set(ylabel="ROUGE-L on held-out users (greedy)", ylim=(0, 1))
    figure.savefig(out / "reward.png", dpi=120)
    plt.close(figure)


def check(o: Options) -> None:
    """Refuses options that cannot work, before anything is loaded."""
    least = {"k": 0, "steps": 1, "prompts_per_step": 1, "group_size": 1, "max_new_tokens": 1, "beta": 0,
             "updates_per_rollout": 1, "tokens_per_micro_batch": 1, "eval_every": 0, "eval_examples": 1,
             "save_every": 1, "personalization": 0, "pairs_per_query": 1, "negatives": 1,
             "reward_epochs": 1, "warmup": 0}  # fmt: skip
    for name, bound in least.items():
        if getattr(o, name) < bound:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(o, name)}"
            )
    for name in ("temperature", "lr", "reward_lr", "grad_clip", "clip"):
        if not 0 < getattr(o, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(o, name)}")
    if o.group_size == 1:
        raise ValueError("--group-size 1 has no group to compare with: every advantage would be 0")


def main(options: Options) -> None:
    o = options
    check(o)
    device = pick_device(o.device)
    train, held = (load_lamp(o.data, o.task, split) for split in ("train", "dev"))
    held = held[: o.eval_examples]
    decoder, tokenizer = load_decoder(o.model, device), load_tokenizer(o.model)
    if not tokenizer.eos_ids:
        raise ValueError(f"{o.model}: no file names an EOS id, so no completion could ever end")
    out = open_run(o)
    print(
        f"{o.model} on {o.task}: {len(train)} training users, {len(held)} held out; {device}; into {out}"
    )
    dense = make_dense(o)

    def held_out(what: str, k: int) -> tuple[dict, dict]:
        """Greedy scores, the same keys with _sampled at T = 0.7, and the greedy answers."""
        scores = {}
        for suffix, temperature in (("_sampled", 0.7), ("", 0.0)):
            found, answers = evaluate(
                decoder, tokenizer, held, k, o.retriever, o.max_prompt_tokens, o.max_new_tokens,
                temperature, o.seed, dense, description=f"score {what}{suffix}",
            )  # fmt: skip
            scores = {name + suffix: value for name, value in found.items()} | scores
        return scores, answers

    reward_model = None
    if o.personalization and o.reward_model:
        reward_model = load_reward_model(o.reward_model, device)
    elif o.personalization:
        reward_model = obtain_reward_model(o, decoder, tokenizer, train, out / "reward", device)
    scores = read_json(out / "scores.json") if (out / "scores.json").is_file() else {}
    for name, k in (("no_profile", 0), ("before", o.k)):
        if name not in scores:
            scores[name], _ = held_out(name, k)
            write_json(out / "scores.json", scores)
    if "after" not in scores:
        train_policy(o, out, decoder, tokenizer, reward_model, train, held, dense)
        scores["after"], answers = held_out("after", o.k)
        save_decoder(decoder, tokenizer, out / "checkpoint")
        write_predictions(out / "predictions.json", o.task, answers)
        draw_curves(out)
        write_json(out / "scores.json", scores)  # last: it says that the run is complete
    names = {"no_profile": "no profile", "before": "RAG before RL", "after": "after RL"}
    columns = ("rouge-1", "rouge-l", "rouge-1_sampled", "rouge-l_sampled")
    print(table({names[row]: {c: scores[row][c] for c in columns} for row in names}))
    print(
        f"complete: {out}/ holds metrics.jsonl, samples.jsonl, scores.json, predictions.json, checkpoint/"
    )


def train_policy(
    o: Options, out: Path, decoder, tokenizer, reward_model, train, held, dense
) -> None:
    """The loop: grpo_step, log, save, now and then a look at held-out users."""
    reference = copy.deepcopy(decoder).requires_grad_(False) if o.beta else None
    optimizer = torch.optim.AdamW(decoder.parameters(), o.lr, weight_decay=0.0)
    trainer, first = out / "trainer.pt", 0
    if trainer.is_file():
        first = load_trainer(trainer, decoder, optimizer)
        print(f"continuing after step {first}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        rewind(out / name, first)
    prompts = make_prompts(tokenizer, train, o.k, o.retriever, o.max_prompt_tokens, o.seed, dense)
    stop = Stop()
    bar = tqdm(range(first, o.steps), "GRPO", o.steps, initial=first, disable=None)
    for step in bar:
        metrics, samples = grpo_step(
            step, decoder, optimizer, reference, reward_model, tokenizer, train, prompts, o
        )
        last = step + 1 == o.steps
        if o.eval_every and ((step + 1) % o.eval_every == 0 or last):
            found, _ = evaluate(
                decoder, tokenizer, held, o.k, o.retriever, o.max_prompt_tokens, o.max_new_tokens,
                dense=dense, description="held out",
            )  # fmt: skip
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        append(out / "samples.jsonl", samples)
        append(out / "metrics.jsonl", [metrics])
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "format", "gap")})
        if (step + 1) % o.save_every == 0 or last or stop.signal:
            save_trainer(trainer, step + 1, decoder, optimizer)
        if stop.signal and not last:
            bar.close()
            print(
                f"stopped after step {step + 1}; the same command goes on from here",
                file=sys.stderr,
            )
            sys.exit(128 + stop.signal)


if __name__ == "__main__":
    command(main, Options, __doc__)
