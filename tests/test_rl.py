"""GRPO equals its formulas and TRL's numbers; a run leaves what it promises and can be stopped."""

import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import byte_tokenizer, same, shorten

import prlm
import retrieve
import rl

ROOT = Path(__file__).parent.parent


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
    """The loss token by token, in plain Python."""
    sequences, tokens = [], 0
    for p in range(mask.shape[0]):
        for g in range(mask.shape[1]):
            total = 0.0
            for c in range(int(mask[p, g].sum())):
                ratio = math.exp(logprobs[p, g, c] - old[p, g, c])
                limited = min(max(ratio, 1 - clip), 1 + high)
                a = float(advantages[p, g])
                d = float(ref[p, g, c] - logprobs[p, g, c])
                total += -min(ratio * a, limited * a) + beta * (math.exp(d) - d - 1)
                tokens += 1
            sequences.append(total / (int(mask[p, g].sum()) if normalizer == "grpo" else 1))
    return (
        sum(sequences)
        / {"grpo": len(sequences), "dapo": tokens, "dr_grpo": len(sequences) * longest}[normalizer]
    )


class TestAdvantages:
    def test_equal_a_naive_loop(self):
        rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
        for row, got in zip(rewards.tolist(), rl.group_advantages(rewards), strict=True):
            mean = sum(row) / len(row)
            std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
            expected = torch.tensor([(r - mean) / (std + 1e-4) for r in row])
            same(got, expected, f"the rewards {shorten(row)}", relative=1e-6)

    def test_none_only_centres(self):
        rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
        expected = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]])
        same(rl.group_advantages(rewards, "none"), expected, f"{rewards.tolist()}, none", 1e-6)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -7.3, 1e-20])
    def test_equal_rewards_give_exact_zeros(self, value):
        wobble = torch.tensor([1.0, 1 + 6e-8, 1 - 6e-8, 1.0])
        for scale in ("std", "none"):
            found = rl.group_advantages(value * wobble[None], scale)
            same(found, torch.zeros(1, 4), f"four rewards of {value} up to rounding, {scale}")

    def test_a_small_real_difference_is_not_rounded_away(self):
        assert (rl.group_advantages(torch.tensor([[1.0, 1.001]])) != 0).all()

    @pytest.mark.parametrize("kind", ["int64", "bool", "bfloat16", "float16"])
    def test_rewards_of_few_bits(self, kind):
        rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.95]])
        rewards = rewards.to(getattr(torch, kind))
        expected = rl.group_advantages(rewards.float())
        same(rl.group_advantages(rewards), expected, f"rewards in {kind}", relative=1e-6)
        assert (expected[0] != 0).all() and (kind == "bool" or (expected[1] != 0).all())

    def test_a_tiny_spread_is_damped(self):
        gain = 5e-5 / (1e-4 / math.sqrt(2) + 1e-4)
        found = rl.group_advantages(torch.tensor([[0.0, 1e-4]]))
        same(found, torch.tensor([[-gain, gain]]), "the rewards 0 and 0.0001", relative=1e-4)

    def test_a_group_of_one_gives_zero(self):
        assert rl.group_advantages(torch.tensor([[3.0], [5.0]])).tolist() == [[0.0], [0.0]]

    def test_groups_do_not_mix(self):
        a, b = torch.randn(1, 4), torch.randn(1, 4) + 100
        together = rl.group_advantages(torch.cat([a, b]))
        same(together[:1], rl.group_advantages(a), "a group beside one with 100 more", 1e-5)

    def test_shifting_all_rewards_changes_nothing(self):
        rewards = torch.rand(3, 5)
        a, b = rl.group_advantages(rewards), rl.group_advantages(rewards + 10)
        assert torch.allclose(a, b, atol=1e-3)


class TestK3:
    def test_equals_the_formula(self):
        policy, ref = -3 * torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
        rows = zip(policy.flatten().tolist(), ref.flatten().tolist(), strict=True)
        expected = torch.tensor([math.exp(r - p) - (r - p) - 1 for p, r in rows]).view(4, 5)
        same(rl.k3(policy, ref), expected, relative=1e-6, absolute=1e-6)

    def test_its_mean_under_the_policy_is_the_kl(self):
        """And no token's value is below 0: the plain difference has the same mean."""
        logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 2
        policy, ref = logits.double().log_softmax(-1)
        expected = (policy.exp() * (policy - ref)).sum(-1)
        same((policy.exp() * rl.k3(policy, ref)).sum(-1), expected, "the mean of k3", 1e-10)
        assert (rl.k3(policy, ref) >= 0).all() and (rl.k3(policy, policy) == 0).all()


class TestLossSize:
    def test_by_hand(self):
        """Two prompts with three completions: tokens count for dapo alone, padding for none."""
        lengths, names = torch.tensor([[5, 2, 1], [3, 0, 4]]), ("grpo", "dapo", "dr_grpo")
        for width in (5, 12):
            mask = torch.arange(width) < lengths[..., None]
            found = [rl.loss_size(mask, name, 8) for name in names]
            same(found, [6, 15, 48], f"{names} of lengths {lengths.tolist()}, max_new_tokens 8")
            assert [rl.loss_size(mask[:1], name, 20) for name in names] == [3, 8, 60]
            assert [rl.loss_size(mask & False, name, 8) for name in names] == [6, 1, 48]
        for how in (("dr_grpo", None), ("mean", 8)):
            with pytest.raises(ValueError, match=how[0]):
                rl.loss_size(mask, *how)


class TestLoss:
    @pytest.mark.parametrize("normalizer", ["grpo", "dapo", "dr_grpo"])
    @pytest.mark.parametrize("beta", [0.0, 0.3])
    @pytest.mark.parametrize("high", [None, 0.5])
    def test_equals_a_naive_loop(self, normalizer, beta, high):
        logprobs, old, ref, advantages, mask = random_group()
        loss = rl.grpo_loss(
            logprobs, old, advantages, mask, ref, 0.2, high, beta, normalizer, max_new_tokens=9
        )
        expected = naive_loss(
            logprobs, old, ref, advantages, mask, 0.2, high or 0.2, beta, normalizer, 9
        )
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("clip", [0.05, 0.6])
    def test_the_clip_is_as_wide_as_asked(self, clip):
        logprobs, old, ref, advantages, mask = random_group(1)
        loss = rl.grpo_loss(logprobs, old, advantages, mask, clip=clip)
        expected = naive_loss(logprobs, old, ref, advantages, mask, clip, clip, 0, "grpo", 9)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_what_is_behind_the_mask_has_no_gradient(self):
        logprobs, old, ref, advantages, mask = random_group()
        logprobs.requires_grad_()
        rl.grpo_loss(logprobs, old, advantages, mask, ref, beta=0.1).backward()
        assert logprobs.grad.isfinite().all()
        assert (logprobs.grad[~mask] == 0).all() and (logprobs.grad[mask] != 0).any()

    def test_with_one_update_the_gradient_is_the_policy_gradient(self):
        logprobs, _, _, advantages, mask = random_group()
        logprobs.requires_grad_()
        rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask, normalizer="dapo").backward()
        expected = -(advantages[..., None] * mask) / mask.sum()
        same(logprobs.grad, expected, "the gradient where the ratio is 1", 1e-6)

    def test_the_clip_cuts_the_gradient_on_the_winning_side_only(self):
        ratio = torch.tensor([1.3, 1.3, 0.7, 0.7]).log().view(1, 4, 1).requires_grad_()
        gain = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        mask = torch.ones(1, 4, 1, dtype=torch.bool)
        rl.grpo_loss(ratio, torch.zeros(1, 4, 1), gain, mask).backward()
        moves = (ratio.grad.flatten() != 0).tolist()
        same(moves, [False, True, True, False], "has the ratio 1.3, 1.3, 0.7, 0.7 a gradient?")
        assert rl.count_clipped(ratio, torch.zeros(1, 4, 1), gain, mask) == 2

    def test_empty_completions_are_finite(self):
        zeros, mask = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool)
        for normalizer in ("grpo", "dapo", "dr_grpo"):
            loss = rl.grpo_loss(
                zeros, zeros, torch.ones(1, 2), mask, normalizer=normalizer, max_new_tokens=3
            )
            assert loss == 0

    def test_bad_calls_are_refused(self):
        logprobs, old, _, advantages, mask = random_group()
        for more in ({"normalizer": "dr_grpo"}, {"normalizer": "x"}, {"beta": 0.1}):
            with pytest.raises(ValueError):
                rl.grpo_loss(logprobs, old, advantages, mask, **more)
        with pytest.raises(ValueError):
            rl.group_advantages(torch.ones(1, 2), "x")

    @pytest.mark.parametrize("normalizer", ["grpo", "dapo", "dr_grpo"])
    def test_the_sum_is_divided_by_size_where_it_is_given(self, normalizer):
        logprobs, old, _, advantages, mask = random_group()
        how = {"normalizer": normalizer, "max_new_tokens": 9}
        whole = rl.grpo_loss(logprobs, old, advantages, mask, **how)
        expected = whole * rl.loss_size(mask, normalizer, 9) / 7
        found = rl.grpo_loss(logprobs, old, advantages, mask, **how, size=7)
        same(found, expected, f"{normalizer}, size 7", 1e-6)

    @pytest.mark.parametrize("normalizer", ["grpo", "dapo", "dr_grpo"])
    def test_equals_trl(self, normalizer):
        """TRL's own method on the same log-probabilities; its trainer is a stand-in around it."""
        trl = pytest.importorskip("trl.trainer.grpo_trainer")
        logprobs, old, ref, advantages, mask = random_group()
        logprobs, old, ref = (x.masked_fill(~mask, 0.0) for x in (logprobs, old, ref))
        flat = lambda x: x.flatten(0, 1)  # noqa: E731
        trainer = mock.MagicMock()
        trainer.model.training, trainer.loss_type, trainer.beta = False, normalizer, 0.04
        trainer.epsilon_low, trainer.epsilon_high, trainer.max_completion_length = 0.2, 0.28, 9
        trainer.importance_sampling_level, trainer.top_entropy_quantile = "token", 1.0
        trainer.off_policy_mask_threshold, trainer.use_vllm = None, False
        trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
        trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
        trainer.accelerator.num_processes = 1
        trainer.accelerator.gather = lambda x: x
        trainer._get_per_token_logps_and_entropies.return_value = (
            flat(logprobs), flat(torch.zeros_like(logprobs)), None,
        )  # fmt: skip
        inputs = dict(
            prompt_ids=torch.zeros(12, 1), prompt_mask=torch.ones(12, 1),
            completion_ids=flat(mask).long(), completion_mask=flat(mask).long(),
            advantages=flat(advantages), old_per_token_logps=flat(old),
            ref_per_token_logps=flat(ref), num_items_in_batch=mask.sum(),
        )  # fmt: skip
        theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        how = dict(clip=0.2, clip_high=0.28, beta=0.04, normalizer=normalizer, max_new_tokens=9)
        ours = rl.grpo_loss(logprobs, old, advantages, mask, ref, **how)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


class TestWarmStartTargets:
    """What the policy is to say: the best item's last field, then what the user wrote, then EOS."""

    @pytest.fixture
    def examples(self):
        long = " Warm and long" + 9 * ", so long"
        items = [("to oslo again", "Cold "), ("in paris at last", long), ("rome", "Hot")]
        items = [{"text": text, "title": title} for text, title in items]
        texts = [("a day in paris", " A  Day "), ("paris", "It's late"), ("oslo", "{night}")]
        return [retrieve.Example("1", "u", "LaMP-4", q, items, target) for q, target in texts]

    def tokenizer(self, opening):
        one = prlm.Tokenizer(byte_tokenizer(), {258, 256})  # <|im_end|>, <|endoftext|>
        one.opening = opening
        return one

    @pytest.mark.parametrize("opening", ["", "<think>\n"])
    @pytest.mark.parametrize("k", [0, 1, 4])
    def test_with_reasoning(self, examples, opening, k):
        tokenizer = self.tokenizer(opening)
        targets = rl.warm_start_targets(rl.Options(k=k), tokenizer, examples)
        cut = examples[0].profile[1]["title"].strip()[: rl.EVIDENCE_TOKENS]  # tokens here are bytes
        long = f"The user wrote: {cut}"
        said = [long, long, "The user wrote: Cold"] if k else ["", "", ""]
        for ids, thought, title in zip(
            targets, said, ["A  Day", "It's late", "{night}"], strict=True
        ):
            expected = f"<think>\n{thought}\n</think>\n<answer>\n{{'title': '{title}'}}\n</answer>"
            case = f"k {k}, the prompt has opened {opening!r}"
            same(tokenizer.decode(ids[:-1]), expected.removeprefix(opening), case)
            same(ids[-1], 258, f"{case}: the id at the end")

    def test_without_reasoning(self, examples):
        """Whatever the chat format opens: the prompt has closed it again."""
        for opening in ("", "<think>\n"):
            tokenizer = self.tokenizer(opening)
            (ids,) = rl.warm_start_targets(rl.Options(reasoning=False), tokenizer, examples[:1])
            same(tokenizer.decode(ids[:-1]), "<answer>\n{'title': 'A  Day'}\n</answer>", opening)

    def test_another_task_and_another_tokenizer(self):
        items = [{"text": "so much rain"}, {"text": "sun"}]
        e = retrieve.Example("1", "u", "LaMP-7", "rain", items, "wet")
        backend = byte_tokenizer()
        backend.add_tokens(["rain", "</think>"])
        tokenizer = prlm.Tokenizer(backend, {256})
        (ids,) = rl.warm_start_targets(rl.Options(task="LaMP-7"), tokenizer, [e])
        expected = "<think>\nThe user wrote: so much rain\n</think>\n<answer>\n{'tweet': 'wet'}"
        same(tokenizer.decode(ids[:-1]), expected + "\n</answer>", "LaMP-7")
        assert ids[-1] == 256 and 259 in ids and 260 in ids


class TestSchedule:
    def test_warm_up_then_cosine_to_a_tenth(self):
        rates = [rl.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
        assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
        assert rates[10] == pytest.approx(2.0) and rates[99] == pytest.approx(0.2)
        middle = 10 + 89 / 2
        assert (rates[54] + rates[55]) / 2 == pytest.approx(1.1, rel=1e-3), middle
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))

    def test_one_step_and_no_warm_up_are_fine(self):
        assert rl.learning_rate(0, 1, 1.0, 0.1) == 1.0
        assert rl.learning_rate(0, 10, 1.0, 0.0) == 1.0

    def test_the_share_of_the_warm_up(self):
        rates = [rl.learning_rate(2, 20, 1.0, share) for share in (0.15, 0.5)]
        assert rates == pytest.approx([1.0, 0.3])

    def test_every_example_once_an_epoch(self):
        chosen = [n for step in range(7) for n in rl.choose(10, step, 4, 0)]
        epochs = [chosen[i : i + 10] for i in (0, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
        assert rl.choose(10, 3, 4, 0) == chosen[12:16] != rl.choose(10, 3, 4, 1)
        assert rl.choose(10, 1, 4, 0, start=8) == chosen[12:16]

    def test_rl_reads_on_where_the_warm_start_stopped(self, world):
        o = tiny(world, "unused", warm_start=2, warm_start_batch=3, prompts_per_step=4)
        seen = [n for step in range(2) for n in rl.choose(10, step, 3, o.seed)]
        assert sorted(seen + rl.choose_for_step(o, 0, 10)) == [*range(10)]

    def test_micro_batches_hold_every_group_once_within_the_budget(self):
        sizes = [10, 14, 6, 35, 9]
        batches = prlm.micro_batches(sizes, 20)
        assert sorted(n for batch in batches for n in batch) == list(range(5))
        for batch in batches:
            assert len(batch) == 1 or sum(sizes[n] for n in batch) <= 20
        assert batches[0] == [3]


def tiny(world, out, **changes):
    """Options of a run that takes about a second."""
    settings = dict(
        model=str(world / "policy"), data=str(world / "lamp"), encoder=str(world / "encoder"),
        steps=4, prompts_per_step=2, group_size=3, max_new_tokens=12, max_prompt_tokens=400, k=2,
        eval_every=2, eval_examples=3, save_every=2, pairs_per_query=6, reward_epochs=1,
        lr=1e-2, device="cpu", out=str(out),
    )  # fmt: skip
    return rl.Options(**settings | changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


CLOCK = ("seconds_rollout", "seconds_update", "tokens_per_second")


def without_clock(path):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(path)]


class TestUpdate:
    def one_update(self, world, **changes):
        """The parameters after one update on a fixed rollout, and its log."""
        o = tiny(world, "unused", **changes)
        decoder = prlm.load_decoder(world / "policy")
        policy = rl.Policy(decoder, decoder, None, reference=prlm.load_decoder(world / "policy"))
        optimizer = torch.optim.SGD(decoder.parameters(), 1.0)
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (9, 3, 6)]
        groups = prlm.generate(decoder, prompts, 4, 8, 1.0, {5, 70, 200, 258}, seed=1)
        advantages = torch.randn(3, 4, generator=generator)
        rollout = rl.Rollout([], prompts, groups, [], [], advantages)
        log = rl.update(o, policy, optimizer, rollout)
        return torch.cat([p.detach().flatten() for p in decoder.parameters()]), log

    @pytest.mark.parametrize("normalizer", ["grpo", "dapo", "dr_grpo"])
    def test_micro_batches_do_not_change_the_step(self, world, normalizer):
        whole, log = self.one_update(world, normalizer=normalizer, beta=0.1, updates_per_rollout=2)
        split, other = self.one_update(
            world, normalizer=normalizer, beta=0.1, updates_per_rollout=2, tokens_per_micro_batch=1
        )
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-6)
        for name in log:
            assert log[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name

    def test_half_precision_is_close_and_the_weights_stay_whole(self, world):
        start = torch.cat(
            [p.detach().flatten() for p in prlm.load_decoder(world / "policy").parameters()]
        )
        for checkpointing in (False, True):
            how = dict(beta=0.1, updates_per_rollout=2, checkpointing=checkpointing)
            whole, log = self.one_update(world, precision="float32", **how)
            half, other = self.one_update(world, precision="bfloat16", **how)
            moved, expected = half - start, whole - start
            assert half.dtype == torch.float32 and not torch.equal(moved, expected)
            assert (moved - expected).norm() < 0.05 * expected.norm()
            assert other["entropy"] == pytest.approx(log["entropy"], rel=1e-2)
            assert log["gap"] < 1e-4 < other["gap"] < 0.2  # float32's sampler, bfloat16's update

    def test_equals_one_plain_step(self, world):
        """The same update from full rows, the naive way."""
        got, log = self.one_update(world, grad_clip=1e9)
        decoder = prlm.load_decoder(world / "policy")
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (9, 3, 6)]
        groups = prlm.generate(decoder, prompts, 4, 8, 1.0, {5, 70, 200, 258}, seed=1)
        advantages = torch.randn(3, 4, generator=generator)
        loss = 0.0
        for p, group in enumerate(groups):
            for g, c in enumerate(group):
                logits = decoder(torch.tensor([prompts[p] + c.tokens]))[0, len(prompts[p]) - 1 : -1]
                logprobs = logits[:, : decoder.vocab_limit].log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(c.tokens)[:, None])
                loss = loss - advantages[p, g] * chosen.mean() / 12
        loss.backward()
        expected = torch.cat([(p - p.grad).detach().flatten() for p in decoder.parameters()])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert log["gap"] < 1e-4 and log["clip_fraction"] == 0 and log["entropy"] > 0

    def test_masked_truncated_completions_do_not_train(self, world):
        a, _ = self.one_update(world)
        b, _ = self.one_update(world, mask_truncated=True)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("weights, share", [
    ({}, 0.0),  # ROUGE differs within both groups
    ({"accuracy": 0.0}, 1.0),
    ({"accuracy": 0.0, "format": 0.1}, 0.5),  # the second group's format differs too
    ({"format": 0.1}, 0.0),
])  # fmt: skip
def test_the_groups_that_only_the_judge_orders(world, weights, share):
    o = tiny(world, "unused", **({"format": 0.0} | weights))
    row = {"reward": 1.0, "accuracy": 0.5, "format": 1.0, "personalization": 0.3}
    other = row | {"accuracy": 0.6, "personalization": 0.4}
    rows = [row, other, row, other | {"format": 0.0}]
    groups = [[prlm.Completion([1], [0.0], True)] * 2] * 2
    rollout = rl.Rollout([], [[1], [1]], groups, [], rows, torch.tensor([[1.0, -1], [1, -1]]))
    metrics = rl.rollout_metrics(o, rollout, {"rollout": 1.0, "update": 1.0})
    assert metrics["judge_only_groups"] == share


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    rl.main(tiny(world, out))
    return out


class TestRun:
    def test_the_last_score_is_forgotten_before_the_policy_moves_on(
        self, world, tmp_path, monkeypatch
    ):
        out = tmp_path / "run"
        how = dict(personalization=0.0, eval_temperature=0.0)
        rl.main(tiny(world, out, steps=1, **how))
        old = (out / "held_out" / "after.jsonl").stat().st_mtime_ns
        real = rl.score_held_out

        def interrupted(o, out, name, *rest, **named):
            if name == "after":
                raise KeyboardInterrupt
            real(o, out, name, *rest, **named)

        monkeypatch.setattr(rl, "score_held_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rl.main(tiny(world, out, steps=2, **how))
        assert "after" not in json.loads((out / "scores.json").read_text())
        monkeypatch.setattr(rl, "score_held_out", real)
        rl.main(tiny(world, out, steps=2, **how))
        assert "after" in json.loads((out / "scores.json").read_text())
        assert (out / "held_out" / "after.jsonl").stat().st_mtime_ns > old

    def test_the_sampled_scores_can_be_left_out(self, world, tmp_path, capsys):
        rl.main(tiny(world, tmp_path / "run", steps=1, eval_temperature=0.0, personalization=0.0))
        scores = json.loads((tmp_path / "run" / "scores.json").read_text())
        keys = {"rouge-1", "rouge-2", "rouge-l", "bleu"}
        assert [set(scores[name]) for name in ("no_profile", "before", "after")] == [keys] * 3
        assert "rouge-l_sampled" not in capsys.readouterr().out

    def test_leaves_what_the_readme_promises(self, world, finished):
        names = {path.name for path in finished.iterdir()}
        assert names >= {
            "config.json", "metrics.jsonl", "samples.jsonl", "scores.json", "predictions.json",
            "trainer.pt", "checkpoint", "reward",
        }  # fmt: skip
        metrics = lines(finished / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        assert all(math.isfinite(v) for m in metrics for v in m.values())
        assert all(m["gap"] < 1e-4 for m in metrics)
        assert ["eval_rouge-l" in m for m in metrics] == [False, True, False, True]
        assert len(lines(finished / "samples.jsonl")) == 4 * 2 * 3
        scores = json.loads((finished / "scores.json").read_text())
        keys = {m + s for m in ("rouge-1", "rouge-2", "rouge-l", "bleu") for s in ("", "_sampled")}
        assert {name: set(s) for name, s in scores.items()} == dict.fromkeys(
            ("no_profile", "before", "after"), keys
        )
        predictions = json.loads((finished / "predictions.json").read_text())
        assert predictions["task"] == "LaMP_4"
        assert [gold["id"] for gold in predictions["golds"]] == ["310", "311", "312"]
        trained = prlm.load_decoder(finished / "checkpoint")
        assert not torch.equal(trained.head, prlm.load_decoder(world / "policy").head)

    def test_checkpoint_opens_in_transformers(self, finished):
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
        transformers.AutoTokenizer.from_pretrained(finished / "checkpoint")
        tokens = torch.arange(40)[None]
        with torch.no_grad():
            ours = prlm.load_decoder(finished / "checkpoint")(tokens)
            assert torch.allclose(model(tokens).logits, ours, rtol=1e-4, atol=1e-5)

    def test_a_complete_run_only_says_so(self, world, finished, capsys):
        before = (finished / "metrics.jsonl").read_bytes()
        rl.main(tiny(world, finished))
        assert "is complete" in capsys.readouterr().out
        assert (finished / "metrics.jsonl").read_bytes() == before

    def test_a_stopped_run_ends_bit_equal(self, world, finished, tmp_path, monkeypatch):
        """Killed in the fourth step: two steps were saved, what came after is done again."""
        real, calls = rl.grpo_step, []

        def dies(*args):
            calls.append(args[1])
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(rl, "grpo_step", dies)
        o = tiny(world, tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            rl.main(o)
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "rew')  # a line cut short
        monkeypatch.setattr(rl, "grpo_step", real)
        rl.main(o)
        assert calls == [0, 1, 2, 3]
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert without_clock(tmp_path / "run" / name) == without_clock(finished / name)
        for name in ("scores.json", "predictions.json", "checkpoint/model.safetensors"):
            assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()

    def test_other_options_are_refused_and_named(self, world, finished):
        with pytest.raises(ValueError, match=r"temperature 1\.0 -> 0\.5"):
            rl.main(tiny(world, finished, temperature=0.5))

    def test_a_foreign_directory_is_not_touched(self, world, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="holds no result"):
                rl.main(tiny(world, tmp_path, overwrite=overwrite))
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        "name, value",
        [("k", -1), ("group_size", 1), ("temperature", 0.0), ("steps", -1), ("lr", math.nan)],
    )
    def test_impossible_options_are_refused(self, world, tmp_path, name, value):
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            rl.main(tiny(world, tmp_path / "x", **{name: value}))
        assert not (tmp_path / "x").exists()

    def test_every_option_takes_part(self, world, tmp_path):
        rl.main(
            tiny(
                world,
                tmp_path / "run",
                steps=2,
                beta=0.04,
                updates_per_rollout=2,
                scale="none",
                normalizer="dr_grpo",
                clip_high=0.28,
                retriever="recency",
                temperature=0.7,
                personalization=0.0,
            )
        )
        assert not (tmp_path / "run" / "reward").exists()
        assert any(m["kl"] != 0 for m in lines(tmp_path / "run" / "metrics.jsonl"))

    def test_without_reasoning_the_first_two_users(self, world, tmp_path):
        changes = {"reasoning": False, "train_examples": 2, "personalization": 0.0}
        rl.main(tiny(world, tmp_path / "run", steps=1, **changes))
        samples = lines(tmp_path / "run" / "samples.jsonl")
        assert {s["id"] for s in samples} == {"300", "301"}
        assert all(s["completion"].startswith("<think>\n\n</think>\n\n") for s in samples)
        assert all(len(s["tokens"]) == len(s["logprobs"]) > 0 for s in samples)

    def test_a_saved_reward_model_is_used(self, world, finished, tmp_path):
        rl.main(tiny(world, tmp_path / "run", steps=1, reward_model=str(finished / "reward")))
        assert not (tmp_path / "run" / "reward" / "model.safetensors").exists()

    def test_half_precision_samples_from_a_copy_that_follows(self, world, tmp_path, monkeypatch):
        sampled, real = [], prlm.generate

        def generate(decoder, *how, **named):
            sampled.append(torch.cat([p.flatten() for p in decoder.parameters()]))
            return real(decoder, *how, **named)

        monkeypatch.setattr(prlm, "generate", generate)
        o = tiny(world, tmp_path, precision="bfloat16", personalization=0.0, beta=0.1)
        rl.main(o)
        assert all(weights.dtype == torch.bfloat16 for weights in sampled)
        saved = prlm.load_decoder(tmp_path / "checkpoint")
        assert saved.head.dtype == torch.float32
        last = torch.cat([p.detach().flatten() for p in saved.parameters()])
        assert torch.equal(sampled[-1], last.bfloat16()) and not torch.equal(
            sampled[0], sampled[-1]
        )
        gaps = [line["gap"] for line in lines(tmp_path / "metrics.jsonl")]
        assert all(0 < gap < 0.5 for gap in gaps)

    def test_the_command_fails_in_one_line(self, tmp_path):
        where = ["--model", str(tmp_path / "no"), "--out", str(tmp_path / "x")]
        run = [sys.executable, str(ROOT / "rl.py"), *where]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")

    def test_a_number_gone_wrong_stops_the_run_before_it_is_applied(
        self, world, tmp_path, monkeypatch
    ):
        real = rl.grpo_loss
        monkeypatch.setattr(rl, "grpo_loss", lambda *a, **k: real(*a, **k) * math.nan)
        with pytest.raises(ValueError, match=r"step 1, records 30\d, 30\d: the loss is nan"):
            rl.main(tiny(world, tmp_path / "run"))
        assert not (tmp_path / "run" / "trainer.pt").exists()

    def test_a_broken_state_is_named(self, world, tmp_path):
        o = tiny(world, tmp_path / "run", steps=2, personalization=0.0)
        rl.main(o)
        (tmp_path / "run" / "scores.json").unlink()
        whole = (tmp_path / "run" / "trainer.pt").read_bytes()
        for broken in (b"", whole[: len(whole) // 2], b"not a state", pickle.dumps(open)):
            (tmp_path / "run" / "trainer.pt").write_bytes(broken)
            with pytest.raises(ValueError, match=r"trainer\.pt: not a state"):
                rl.main(o)

    def test_a_full_disk_is_named_and_the_old_state_stays(self, tmp_path, monkeypatch):
        path, decoder = tmp_path / "trainer.pt", torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(decoder.parameters())
        rl.save_state(path, 1, decoder, optimizer)
        before = path.read_bytes()

        def full(*args):
            raise RuntimeError("PytorchStreamWriter failed writing file")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"disk full.*trainer\.pt"):
            rl.save_state(path, 2, decoder, optimizer)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
