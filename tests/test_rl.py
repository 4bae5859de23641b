"""GRPO equals its formulas, a naive step and TRL's numbers; a step's log is what it says."""

import copy
import itertools
import math
from unittest import mock

import pytest
import torch
from conftest import byte_tokenizer, same, shorten, small_policy, small_step, tiny, trained
from torch.nn.utils.rnn import pad_sequence

import prlm
import retrieve
import reward
import rl

NORMALIZERS = ("grpo", "dapo", "dr_grpo")


def random_group(seed=0, p=3, g=4, c=6):
    """(logprobs, old, ref, advantages, mask), with garbage behind the mask."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-torch.rand(p, g, c, generator=generator) * 3 for _ in range(3))
    lengths = torch.randint(1, c + 1, (p, g), generator=generator)
    mask = torch.arange(c) < lengths[..., None]
    for x, garbage in ((logprobs, 50.0), (old, -70.0), (ref, math.inf)):
        x[~mask] = garbage
    return logprobs, old, ref, torch.randn(p, g, generator=generator), mask


def naive_loss(logprobs, old, ref, advantages, mask, clip, high, beta, normalizer, longest):
    """The loss completion by completion, from the formulas."""
    sums, counts = [], []
    for p, g in itertools.product(*map(range, mask.shape[:2])):
        new, was = logprobs[p, g][mask[p, g]], old[p, g][mask[p, g]]
        ratio, a = torch.exp(new - was), float(advantages[p, g])
        limited = torch.clip(ratio, 1 - clip, 1 + high)
        total = -torch.minimum(ratio * a, limited * a).sum()
        if beta:
            d = ref[p, g][mask[p, g]] - new
            total = total + beta * (torch.exp(d) - d - 1).sum()
        sums.append(total)
        counts.append(len(new))
    if normalizer == "grpo":
        return sum(total / max(count, 1) for total, count in zip(sums, counts)) / len(sums)
    return sum(sums) / (sum(counts) if normalizer == "dapo" else len(sums) * longest)


class TestAdvantages:
    def test_equal_a_naive_loop(self):
        rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
        for scale in ("std", "none"):
            for row, got in zip(rewards.tolist(), rl.group_advantages(rewards, scale), strict=True):
                mean = sum(row) / len(row)
                std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
                expected = [(r - mean) / (std + 1e-4 if scale == "std" else 1) for r in row]
                same(got, torch.tensor(expected), f"{scale}, the rewards {shorten(row)}", 1e-6)
        with pytest.raises(ValueError, match="neither std nor none"):
            rl.group_advantages(rewards, "x")

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -7.3, 1e-20])
    def test_equal_rewards_give_exact_zeros(self, value):
        """And so does a group of one."""
        for scale, size in itertools.product(("std", "none"), (4, 1)):
            wobble = torch.tensor([[1.0, 1 + 6e-8, 1 - 6e-8, 1.0]])[:, :size]
            found = rl.group_advantages(value * wobble, scale)
            same(found, torch.zeros(1, size), f"{size} rewards of {value} up to rounding, {scale}")

    @pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.bfloat16, torch.float16])
    def test_rewards_of_few_bits(self, kind):
        rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.95]]).to(kind)
        expected = rl.group_advantages(rewards.float())
        same(rl.group_advantages(rewards), expected, f"rewards in {kind}", relative=1e-6)
        assert (expected[0] != 0).all() and (kind == torch.bool or (expected[1] != 0).all())

    def test_a_tiny_spread_is_damped_but_not_rounded_away(self):
        gain = 5e-5 / (1e-4 / math.sqrt(2) + 1e-4)
        found = rl.group_advantages(torch.tensor([[0.0, 1e-4]]))
        same(found, torch.tensor([[-gain, gain]]), "the rewards 0 and 0.0001", relative=1e-4)


class TestK3:
    def test_equals_the_formula_and_its_mean_is_the_kl(self):
        """And no token's value is below 0: the plain difference has the same mean."""
        logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 2
        policy, ref = logits.double().log_softmax(-1)
        rows = zip(policy.flatten().tolist(), ref.flatten().tolist(), strict=True)
        expected = torch.tensor([math.exp(r - p) - (r - p) - 1 for p, r in rows]).view(3, 50)
        same(rl.k3(policy, ref), expected, relative=1e-6, absolute=1e-6)
        expected = (policy.exp() * (policy - ref)).sum(-1)
        same((policy.exp() * rl.k3(policy, ref)).sum(-1), expected, "the mean of k3", 1e-10)
        assert (rl.k3(policy, ref) >= 0).all() and not any(rl.k3(x, x).any() for x in (policy, ref))


class TestWeights:
    def test_by_hand(self):
        """Two prompts with three completions, one of them empty: padding never counts."""
        lengths = torch.tensor([[5, 2, 1], [3, 0, 4]])
        for width, name in itertools.product((5, 12), NORMALIZERS):
            mask, expected = torch.arange(width) < lengths[..., None], torch.zeros(2, 3, width)
            for p, g in itertools.product(range(2), range(3)):
                n = int(lengths[p, g])
                size = {"grpo": 6 * n, "dapo": 15, "dr_grpo": 6 * 8}[name]
                expected[p, g, :n] = 1 / max(size, 1)
            found = rl.token_weights(mask, name, 8)
            same(found, expected, f"{name} of lengths {lengths.tolist()} in {width}", 1e-6)
            assert not rl.token_weights(mask & False, name, 8).any()  # and no NaN
        for how in (("dr_grpo", None), ("mean", 8)):
            with pytest.raises(ValueError, match=how[0]):
                rl.token_weights(mask, *how)


class TestLoss:
    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_equals_a_naive_loop(self, normalizer):
        """Value and gradient, which is exactly 0 behind the mask."""
        for clip, high, beta in itertools.product((0.2, 0.6), (None, 0.05, 0.9), (0.0, 0.3)):
            logprobs, old, ref, advantages, mask = random_group()
            one, two = (logprobs.clone().requires_grad_() for _ in range(2))
            how = dict(beta=beta, normalizer=normalizer, max_new_tokens=9)
            loss = rl.grpo_loss(one, old, advantages, mask, ref, clip, high, **how)
            rest = (clip, high or clip, beta, normalizer, 9)
            expected = naive_loss(two, old, ref, advantages, mask, *rest)
            loss.backward()
            expected.backward()
            case = f"{normalizer}, clip {clip}, clip_high {high}, beta {beta}"
            same(loss, expected, case, 1e-5)
            same(one.grad, two.grad, f"the gradient, {case}", 1e-5)
            assert not one.grad[~mask].any()

    def test_with_one_update_the_gradient_is_the_policy_gradient(self):
        logprobs, _, _, advantages, mask = random_group()
        logprobs.requires_grad_()
        rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask, normalizer="dapo").backward()
        expected = -(advantages[..., None] * mask) / mask.sum()
        same(logprobs.grad, expected, "the gradient where the ratio is 1", 1e-6)

    @pytest.mark.parametrize("old", [-100.0, -1000.0])
    def test_a_policy_that_has_moved_far_is_finite(self, old):
        """exp(100) overflows in float32, and 0 times infinity is NaN."""
        logprobs = torch.zeros(1, 3, 2, requires_grad=True)
        before = torch.full((1, 3, 2), old)
        gain, mask = torch.tensor([[1.0, 0.0, -1.0]]), torch.ones(1, 3, 2, dtype=torch.bool)
        for ref in (before, -before):
            loss = rl.grpo_loss(logprobs, before, gain, mask, ref, beta=0.1)
            loss.backward()
            assert loss.isfinite() and logprobs.grad.isfinite().all()
        rl.k3(logprobs, -before).sum().backward()  # at most as if it were 20 nats
        assert logprobs.grad.max() < 1
        same(rl.grpo_loss(logprobs, before, gain.clamp(min=0), mask), torch.tensor(-0.4), "", 1e-6)
        with pytest.raises(ValueError, match="reference"):
            rl.grpo_loss(logprobs, before, gain, mask, beta=0.1)

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_micro_batches_add_up_to_the_whole(self, normalizer):
        logprobs, old, ref, advantages, mask = random_group()
        how = {"normalizer": normalizer, "max_new_tokens": 9, "beta": 0.1}
        whole = rl.grpo_loss(logprobs, old, advantages, mask, ref, **how)
        weights, total = rl.token_weights(mask, normalizer, 9), 0.0
        for n in ([0, 2], [1]):
            part = (x[n] for x in (logprobs, old, advantages, mask, ref))
            total += rl.grpo_loss(*part, **how, weights=weights[n])
        same(total, whole, f"{normalizer}, two prompts and one", 1e-5)

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_equals_trl(self, normalizer):
        """TRL's own method on the same log-probabilities; its trainer is a stand-in around it."""
        trl = pytest.importorskip("trl.trainer.grpo_trainer")
        logprobs, old, ref, advantages, mask = random_group()
        logprobs, old, ref = (x.masked_fill(~mask, 0.0) for x in (logprobs, old, ref))
        trainer = mock.MagicMock(
            loss_type=normalizer, beta=0.04, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
            max_completion_length=9, importance_sampling_level="token", top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        )  # fmt: skip
        trainer.model.training, trainer.accelerator.num_processes = False, 1
        trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
        trainer.accelerator.gather = lambda x: x
        said = logprobs.flatten(0, 1)
        trainer._get_per_token_logps_and_entropies.return_value = said, 0 * said, None
        inputs = dict(
            prompt_ids=torch.zeros(12, 1), prompt_mask=torch.ones(12, 1),
            completion_ids=mask.flatten(0, 1).long(), completion_mask=mask.flatten(0, 1).long(),
            advantages=advantages.flatten(0, 1), old_per_token_logps=old.flatten(0, 1),
            ref_per_token_logps=ref.flatten(0, 1), num_items_in_batch=mask.sum(),
        )  # fmt: skip
        theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        how = dict(clip=0.2, clip_high=0.28, beta=0.04, normalizer=normalizer, max_new_tokens=9)
        ours = rl.grpo_loss(logprobs, old, advantages, mask, ref, **how)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


class TestWarmStartTargets:
    """What the policy is to say: the best item's last field, then what the user wrote, then EOS."""

    def tokenizer(self, opening="", tokens=()):
        backend = byte_tokenizer()
        backend.add_tokens([*tokens])
        one = prlm.Tokenizer(backend, {258, 256})  # <|im_end|>, <|endoftext|>
        one.opening = opening
        return one

    @pytest.mark.parametrize("opening", ["", "<think>\n"])
    @pytest.mark.parametrize("k", [0, 1, 4])
    def test_with_and_without_reasoning(self, opening, k):
        """What the chat format opens is not said again; without reasoning the prompt closes it."""
        long = " Warm and long" + 9 * ", so long"
        items = [("to oslo again", "Cold "), ("in paris at last", long), ("rome", "Hot"), ("", "-")]
        items = [{"text": text, "title": title} for text, title in items]
        texts = [("a day in paris", " A  Day "), ("paris", "It's late"), ("oslo", "{night}")]
        examples = [retrieve.Example("1", "u", "LaMP-4", q, items, target) for q, target in texts]
        tokenizer = self.tokenizer(opening)
        cut = long.strip()[: rl.EVIDENCE_TOKENS]  # tokens here are bytes
        said = [[cut, "Cold", "Hot"], [cut, "Cold", "Hot"], ["Cold", cut, "Hot"]]  # best first
        for reasoning in (True, False):
            o = rl.Options(k=k, reasoning=reasoning)
            targets = rl.warm_start_targets(o, tokenizer, examples)
            for ids, quoted, title in zip(targets, said, ["A  Day", "It's late", "{night}"]):
                thought = "\n".join(f"The user wrote: {text}" for text in quoted[:k])
                expected = f"<answer>\n{{'title': '{title}'}}\n</answer>"
                if reasoning:
                    expected = f"<think>\n{thought}\n</think>\n{expected}".removeprefix(opening)
                case = f"k {k}, reasoning {reasoning}, the prompt has opened {opening!r}"
                same(tokenizer.decode(ids[:-1]), expected, case)
                same(ids[-1], 258, f"{case}: the id at the end")

    def test_another_task_and_another_tokenizer(self):
        """Its <think> and </think> are tokens where the form says them, text where a user does."""
        e = retrieve.Example("1", "u", "LaMP-7", "rain", [{"text": "so much rain"}], "wet </think>")
        tokenizer = self.tokenizer(tokens=["<think>", "</think>"])
        (ids,) = rl.warm_start_targets(rl.Options(task="LaMP-7"), tokenizer, [e])
        expected = "<think>\nThe user wrote: so much rain\n</think>\n<answer>\n{'tweet': "
        same(tokenizer.decode(ids[:-1]), expected + "'wet </think>'}\n</answer>", "LaMP-7")
        assert ids[-1] == 258 and ids.count(259) == ids.count(260) == 1


class TestSchedule:
    def test_warm_up_then_cosine_to_a_tenth(self):
        rates = [rl.learning_rate(step, 100, 2.0) for step in range(100)]
        assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
        assert rates[10] == pytest.approx(2.0) and rates[99] == pytest.approx(0.2)
        assert (rates[54] + rates[55]) / 2 == pytest.approx(1.1, rel=1e-3)
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))

    def test_few_steps_are_fine(self):
        assert [rl.learning_rate(0, steps, 1.0) for steps in (1, 2, 4, 20)] == [1, 1, 1, 0.5]
        assert rl.learning_rate(2, 20, 1.0) == 1.0

    def test_every_example_once_an_epoch(self):
        chosen = [n for step in range(7) for n in rl.choose(10, 4 * step, 4, 0)]
        epochs = [chosen[i : i + 10] for i in (0, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
        assert rl.choose(10, 13, 3, 0) == chosen[13:16] != rl.choose(10, 13, 3, 1)


# ---- One step ------------------------------------------------------------------------------------


def naive_step(o, policy, optimizer, prompts, rows) -> dict[str, float]:
    """The update and its log from whole rows, padded, through the plain forward pass."""
    mask, sampled = torch.zeros(3, 4, 8, dtype=torch.bool), torch.zeros(3, 4, 8)
    for n, row in enumerate(rows):
        mask[n // 4, n % 4, : len(row["tokens"])] = row["finished"] or not o.mask_truncated
        sampled[n // 4, n % 4, : len(row["logprobs"])] = torch.tensor(row["logprobs"])
    whole = [torch.tensor(prompts[n // 4] + row["tokens"]) for n, row in enumerate(rows)]
    tokens = pad_sequence(whole, batch_first=True, padding_value=-1)

    def logprobs(decoder):
        logits = decoder(tokens.clamp(min=0), tokens >= 0)[..., :38] / o.temperature
        found = torch.zeros(3, 4, 8)
        for n, row in enumerate(rows):
            first, said = len(prompts[n // 4]), row["tokens"]
            own = logits[n, first - 1 : first - 1 + len(said)].log_softmax(-1)
            found[n // 4, n % 4, : len(said)] = own[range(len(said)), said]
        return found

    advantages = torch.tensor([row["advantage"] for row in rows]).view(3, 4)
    high = o.clip_high or o.clip
    for number in range(o.updates_per_rollout):
        new = logprobs(policy.decoder)
        if number == 0:
            old = new.detach()
        ref = logprobs(policy.reference) if o.beta else None
        rest = (o.clip, high, o.beta, o.normalizer, o.max_new_tokens)
        loss = naive_loss(new, old, ref, advantages, mask, *rest)
        optimizer.zero_grad()
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        for parameter in parameters:
            parameter.grad /= max(norm, 1)
        optimizer.step()
        gap = (old - sampled).abs()[mask]
        ratio, gain = (new.detach() - old).exp(), advantages[..., None]
        clipped = ((gain > 0) & (ratio > 1 + high)) | ((gain < 0) & (ratio < 1 - o.clip))
        kl = (ref - new).exp() - (ref - new) - 1 if o.beta else torch.zeros(3, 4, 8)
        log = {"loss": loss.item(), "grad_norm": norm, "kl": kl[mask].mean().item()}
        log |= {"clip_fraction": clipped[mask].float().mean().item()}
    return log | {"gap": gap.max().item()}


class TestStep:
    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    @pytest.mark.parametrize("lora_rank", [0, 2])
    def test_equals_a_naive_step(self, normalizer, lora_rank):
        """Weights and log, with every group in a micro-batch of its own, and with one for all."""
        for beta, updates, masked in ((0.0, 1, 0), (0.3, 2, 0), (0.3, 1, 1), (0.0, 2, 1)):
            how = dict(normalizer=normalizer, lora_rank=lora_rank, beta=beta)
            how |= dict(updates_per_rollout=updates, mask_truncated=bool(masked))
            how |= dict(clip_high=0.04 if beta else None)
            o, policy, *rest = small_step(**how)
            expected_log = naive_step(o, policy, *rest)
            expected, start = trained(policy), trained(small_policy(o))
            for budget in (1, 10_000):
                o, policy, *rest = small_step(**how, tokens_per_micro_batch=budget)
                log = rl.update(o, policy, *rest)
                same(trained(policy) - start, expected - start, f"{how}, budget {budget}", 1e-4)
                same(log, expected_log, f"the log, {how}, budget {budget}", 1e-4, 1e-6)
            assert log["gap"] > 0.05 and (log["clip_fraction"] > 0) == (updates > 1)

    def test_checkpointing_and_half_precision_are_close_and_the_weights_stay_whole(self):
        found = []
        for dtype, checkpointing in itertools.product((torch.float32, torch.bfloat16), (0, 1)):
            o, policy, *rest = small_step(beta=0.1, updates_per_rollout=2, clip=0.2)
            start = trained(policy)
            policy.decoder.checkpointing = bool(checkpointing)
            prlm.multiply_in(policy.decoder, dtype)
            rl.update(o, policy, *rest)
            found.append(trained(policy) - start)
        whole, again, half, half_again = found
        assert torch.equal(whole, again) and torch.equal(half, half_again)
        assert half.dtype == torch.float32 and 0 < (half - whole).norm() < 0.1 * whole.norm()

    def test_a_gradient_that_is_no_number_is_not_applied(self):
        o, policy, *rest, rows = small_step()
        before, rows[0]["advantage"] = trained(policy), math.nan
        with pytest.raises(ValueError, match="the gradient's norm is nan: a lower --lr"):
            rl.update(o, policy, *rest, rows)
        assert torch.equal(trained(policy), before)

    def test_a_rollout_is_what_the_policy_said_and_what_that_earns(self, world):
        """Row by row: the ids that were sampled, their reward, the advantage in their group."""
        o = tiny(world, "unused", personalization=0.3, format=0.2, temperature=0.7)
        decoder, tokenizer = prlm.load_policy(o)
        examples = retrieve.load_examples(o, "train")[:2]
        prompts = retrieve.make_prompts(o, tokenizer, examples)
        policy = rl.Policy(decoder, decoder, tokenizer, None)
        judge = lambda asked, answers: [len(e.id) / (1 + len(a)) for e, a in zip(asked, answers)]  # noqa: E731
        for normalizer in ("grpo", "dr_grpo"):
            o.normalizer = normalizer
            rows = rl.roll_out(o, policy, judge, examples, prompts, 5)
            assert [row["id"] for row in rows] == [e.id for e in examples for _ in range(3)]
            weights = {name: getattr(o, name) for name in reward.PARTS}
            for n, row in enumerate(rows):
                e, said = examples[n // 3], tokenizer.decode(row["tokens"])
                (earned,) = reward.rewards([said], [e], judge, **weights)
                expected = {"step": 5, "completion": said, "query": e.query, "target": e.target}
                expected |= earned | {"prompt": tokenizer.decode(prompts[n // 3])}
                expected |= {"finished": row["tokens"][-1] in tokenizer.eos_ids}
                same({key: row[key] for key in expected}, expected, f"row {n}")
                group = [r["reward"] for r in rows[n // 3 * 3 :][:3]]
                mean = sum(group) / 3
                std = math.sqrt(sum((r - mean) ** 2 for r in group) / 2)
                gain = (row["reward"] - mean) / (std + 1e-4 if normalizer == "grpo" else 1)
                assert row["advantage"] == pytest.approx(gain, rel=1e-4, abs=1e-6)
                own = prlm.token_logprobs(decoder, [prompts[n // 3]], [[row["tokens"]]], 0.7)[0]
                same(torch.tensor([[row["logprobs"]]]), own, f"row {n}", 1e-4)

    def test_the_log_of_a_rollout(self, world):
        """Two groups of two; the second earns the same twice."""
        o = rl.Options(group_size=2)
        table = [
            (1.0, 0.5, 1.0, 0.1, 1.0, [5], True), (0.0, 0.1, 0.0, 0.3, -1.0, [5, 6, 7], False),
            (2.0, 0.0, 1.0, -10.0, 0.0, [8], True), (2.0, 0.2, 0.0, 0.2, 0.0, [9], True),
        ]  # fmt: skip
        keys = ("reward", *reward.PARTS, "advantage", "tokens", "finished")
        rows = [dict(zip(keys, row)) for row in table]
        for row in rows:
            row["logprobs"] = [-0.5 * token for token in row["tokens"]]
        found = rl.rollout_metrics(o, [[1, 2], [3]], rows, 0.5, 1.5)
        expected = {"reward": 1.25, "accuracy": 0.2, "format": 0.5, "personalization": -2.35,
                    "spread": math.sqrt(0.5) / 2, "zero_spread_groups": 0.5, "truncated": 0.25,
                    "completion_tokens": 1.5, "entropy": 0.5 * 40 / 6, "tokens_per_second": 4.5,
                    "seconds_rollout": 0.5, "seconds_update": 1.5}  # fmt: skip
        same(found, expected, relative=1e-6)


def test_the_copy_is_rounded_up_or_down_in_proportion_and_the_same_again():
    """So that small steps arrive on average; rounded to nearest, hardly one of 1e-6 would."""
    decoder, draws = small_policy(rl.Options()).decoder, []
    sampler = prlm.for_sampling(copy.deepcopy(decoder), torch.bfloat16)
    weight, copied = (x.model.embed_tokens.weight.detach() for x in (decoder, sampler))
    weight[0] = weight[0].bfloat16().float()  # on the grid already
    for seed in (*range(400), 0):
        rl.refresh(rl.Policy(decoder, sampler, None, None), seed)
        draws.append(copied.float())
    draws = torch.stack(draws)
    assert torch.equal(draws[0], draws[-1]) and not torch.equal(draws[0], draws[1])
    assert (draws[:, 0] == weight[0]).all()
    ulp = 2.0 ** (weight.abs().log2().floor() - 7)
    assert ((draws - weight).abs() < ulp).all()  # one of the two neighbours
    error = (draws[:400].mean(0) - weight) / ulp  # a mean of 400 coins: deviation .025 at most
    assert error.abs().max() < 0.125 and error.mean().abs() < 0.005
    assert torch.equal(decoder.model.norm.weight, sampler.model.norm.weight)


class TestWarmStart:
    def test_it_is_cross_entropy_over_the_tokens_of_all_rows(self, world, tmp_path):
        """The log and the weights of two steps, whatever the micro-batches."""
        o = tiny(world, tmp_path, warm_start=2, warm_start_lr=0.01)
        train = retrieve.load_examples(o, "train")
        tokenizer = prlm.load_tokenizer(o.model)
        prompts = retrieve.make_prompts(o, tokenizer, train)
        targets = rl.warm_start_targets(o, tokenizer, train)
        decoder = prlm.load_decoder(o.model)
        optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.0)
        expected = []
        for step in range(2):
            rows = rl.choose(len(train), 8 * step, 8, o.seed)
            nats = 0.0
            for n in rows:
                ids = torch.tensor([prompts[n] + targets[n]])
                logits = decoder(ids)[0, len(prompts[n]) - 1 : -1, : decoder.vocab_limit]
                nats -= logits.log_softmax(-1)[range(len(targets[n])), targets[n]].sum()
            loss = nats / sum(len(targets[n]) for n in rows)
            optimizer.param_groups[0]["lr"] = lr = rl.learning_rate(step, 2, 0.01)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            log = {"loss": loss.item(), "grad_norm": norm.item()}
            expected.append({"step": step + 1, "lr": lr} | log)
        for budget in (1, 10_000):
            o.tokens_per_micro_batch = budget
            folder = tmp_path / str(budget) / "warm_start"
            rl.warm_start(o, folder.parent, rl.make_policy(o), train)
            same(prlm.read_lines(folder / "metrics.jsonl"), expected, f"budget {budget}", 1e-4)
            got = prlm.load_decoder(folder).state_dict()
            for name, x in decoder.state_dict().items():
                same(got[name], x, f"{name}, budget {budget}", 1e-3, 1e-4)
