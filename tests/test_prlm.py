"""The language model equals transformers, sampling equals scoring, and the prompt runs once."""

import copy
import itertools
import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prlm

transformers = pytest.importorskip("transformers")

# fmt: off
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
ARCHITECTURES = {
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-bias": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=False)),
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama-scaled": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
}
# fmt: on


def shaken(model, seed):
    """The model with every weight drawn anew; norms are around 1."""
    with torch.no_grad():
        for n, (name, parameter) in enumerate(model.named_parameters(), 1000 * seed):
            noise = torch.randn(parameter.shape, generator=generator(n)) * 0.15
            parameter.copy_(noise + ("norm" in name))
    return model.eval()


def reference(name, seed=0, **more):
    """A random model of transformers."""
    kind, changes = ARCHITECTURES[name]
    config = getattr(transformers, kind + "Config")(**SIZES, **changes, **more)
    return shaken(getattr(transformers, kind + "ForCausalLM")(config), seed)


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tmp_path):
    model = reference(request.param)
    model.save_pretrained(tmp_path)
    return model, prlm.load_decoder(tmp_path)


def small(seed=0, **changes):
    """A decoder of our own with weights large enough for peaked distributions."""
    raw = dict(model_type="qwen2", rope_theta=10000, tie_word_embeddings=True, **SIZES) | changes
    return shaken(prlm.Decoder(raw), seed)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(noise, length, vocabulary=97):
    return torch.randint(vocabulary, (length,), generator=noise).tolist()


def ragged_prompts(lengths=(7, 1, 12, 4), seed=0):
    noise = generator(seed)
    return [random_ids(noise, n) for n in lengths]


def ids_of(groups):
    return [[c.tokens for c in group] for group in groups]


def naive_logprobs(decoder, prompt, completion, temperature=1.0):
    """Every row in full, one at a time: the definition."""
    logits = decoder(torch.tensor([prompt + completion]))[0, :, : decoder.vocab_limit] / temperature
    start = len(prompt) - 1
    logprobs = logits.log_softmax(-1)[start : start + len(completion)]
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def keeping(sizes):
    """The list gets the size of whatever autograd keeps for backward."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    return hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x)


def close(a, b, relative=1e-4, case=""):
    __tracebackhide__ = True
    same(a, b, case, relative)


def naive_attention(q, k, v, sees):
    """One query of one head at a time, [B, T, heads, D]; sees(b, t, s): may t look at s?"""
    out, share = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        places = [s for s in range(k.shape[1]) if sees(b, t, s)]
        scores = [float(q[b, t, h] @ k[b, s, h // share]) / math.sqrt(q.shape[3]) for s in places]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(places, scores, strict=True):
            out[b, t, h] += math.exp(score) / total * v[b, s, h // share]
    return out


class TestRope:
    @pytest.mark.parametrize("numbers", [[], [8.0, 1.0, 4.0, 32.0], [32.0, 2.0, 3.0, 8192.0]])
    @pytest.mark.parametrize("theta, size", [(10000.0, 8), (5e5, 64)])
    def test_frequencies_equal_the_formula(self, theta, size, numbers):
        scaling = dict(zip(list(LLAMA3)[2:], numbers))
        expected = [theta ** (-2 * i / size) for i in range(size // 2)]
        for i, frequency in enumerate(expected):
            if scaling:
                factor, low, high, context = scaling.values()
                turns = context * frequency / (2 * math.pi)
                kept = 1 if turns > high else 0 if turns < low else (turns - low) / (high - low)
                expected[i] = kept * frequency + (1 - kept) * frequency / factor
        rope = {"rope_theta": theta, "rope_type": "llama3" if scaling else "default"} | scaling
        found = prlm.rope_frequencies(SimpleNamespace(**rope, head_dim=size))
        for i, pair in enumerate(zip(found, torch.tensor(expected), strict=True)):
            same(*pair, f"theta {theta:g}, D {size}, scaling {scaling}, pair {i}", 1e-4)

    @pytest.mark.parametrize("size", [2, 8])
    def test_channels_turn_as_complex_numbers(self, size):
        """x_i + j x_{i+D/2}, times e^{j angle}."""
        noise = generator()
        x, angles = torch.randn(5, 3, size, generator=noise), torch.arange(5.0)[:, None, None]
        angles = angles * (torch.rand(size // 2, generator=noise) + 0.1)
        cos, sin = angles.cos().repeat(1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1)
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        close(prlm.rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1), 1e-5)


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_equals_a_loop_over_the_outputs(self, bias):
        """out_i = W_i x + b_i + alpha/r B_i A x."""
        noise, rank, alpha = generator(), 3, 4.5
        linear, x = prlm.Linear(6, 5, bias), torch.randn(2, 7, 6, generator=noise)
        same(linear(x), F.linear(x, linear.weight, linear.bias), "without adapters", 1e-6)
        linear.lora_A, linear.lora_B = (nn.Parameter(torch.empty(s)) for s in ((3, 6), (5, 3)))
        linear.scale = alpha / rank
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=noise)
        expected = F.linear(x, linear.weight, linear.bias).detach()
        for b, t, i in itertools.product(range(2), range(7), range(5)):
            change = linear.lora_B[i] @ (linear.lora_A @ x[b, t])
            expected[b, t, i] += alpha / rank * change.item()
        same(linear(x), expected, "with adapters", 1e-5)
        linear(x).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in (linear.lora_A, linear.lora_B))

    def test_products_in_bfloat16_of_float32_weights(self):
        linear, x = prlm.Linear(6, 5), torch.randn(7, 6, generator=generator())
        half = copy.deepcopy(linear).bfloat16()
        assert torch.equal(prlm.multiply_in(linear, torch.bfloat16)(x), half(x.bfloat16()))
        linear(x).float().sum().backward()
        assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
class TestAttention:
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_a_naive_loop(self, kv_heads, masked):
        noise, queries = generator(), 3 if masked else 7
        q = 2 * torch.randn(2, queries, 6, 4, generator=noise)
        k, v = (2 * torch.randn(2, 7, kv_heads, 4, generator=noise) for _ in "kv")
        visible = torch.rand(2, queries, 7, generator=noise) < 0.5
        visible[..., 2] = True
        found = prlm.attention(q, k, v, visible if masked else None)
        sees = (lambda b, t, s: visible[b, t, s]) if masked else lambda b, t, s: s <= t
        close(found, naive_attention(q, k, v, sees), 1e-5)


class TestDecoder:
    def test_logits_equal_transformers(self, pair):
        model, decoder = pair
        tokens = torch.randint(97, (3, 60), generator=generator(1))
        with torch.no_grad():
            close(decoder(tokens), model(tokens).logits)

    @pytest.mark.parametrize("left", [True, False])
    def test_padding_on_either_side_changes_nothing(self, left):
        decoder, prompts = small(), ragged_prompts()
        tokens, mask = torch.full((4, 12), 3), torch.zeros(4, 12)
        for row, prompt in enumerate(prompts):
            place = slice(12 - len(prompt), 12) if left else slice(0, len(prompt))
            tokens[row, place], mask[row, place] = torch.tensor(prompt), 1
        with torch.no_grad():
            batch = decoder(tokens, mask)
            assert batch.isfinite().all()
            for row, prompt in enumerate(prompts):
                alone = decoder(torch.tensor([prompt]))[0]
                case = f"row {row} of {len(prompt)} tokens, {'left' if left else 'right'}-padded"
                close(batch[row][mask[row] == 1], alone, 1e-5, case)
            tokens[mask == 0] = -1  # no id at all
            same(decoder(tokens, mask)[mask == 1], batch[mask == 1], "other ids in the padding")

    @pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 3)])
    def test_no_token_sees_the_future(self, left, right):
        decoder, mask = small(), torch.ones(2, 12)
        mask[1, :left] = mask[1, 12 - right :] = 0
        tokens = torch.randint(97, (2, 12), generator=generator(1))
        changed = tokens.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 97
        with torch.no_grad():
            for given in (mask, None) if left + right == 0 else (mask,):
                before, after = decoder(tokens, given), decoder(changed, given)
                close(after[:, :6], before[:, :6], 1e-6, "token 6 was changed; before it")
                assert (after - before)[:, 6 : 12 - right].abs().amax(-1).min() > 1e-3

    def test_old_rope_layout_and_sharding(self, tmp_path):
        model, tokens = reference("llama-scaled"), torch.arange(40)[None]
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        raw = json.loads((tmp_path / "config.json").read_text())
        scaling = raw.pop("rope_parameters")
        raw |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with torch.no_grad():
            close(prlm.load_decoder(tmp_path)(tokens), model(tokens).logits)

    def test_greedy_generate_equals_transformers(self, pair):
        """And reports log-probabilities at temperature 1; without an end it runs to the limit."""
        model, decoder = pair
        found = prlm.generate(decoder, ragged_prompts(), 1, 20, 0)
        how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        for prompt, (completion,) in zip(ragged_prompts(), found, strict=True):
            ids = torch.tensor([prompt])
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
            assert completion.tokens == expected[0, len(prompt) :].tolist()
            naive = naive_logprobs(decoder, prompt, completion.tokens)
            close(torch.tensor(completion.logprobs), naive)
            assert len(completion.tokens) == 20 and not completion.finished


class TestCache:
    @pytest.mark.parametrize("coarse", [False, True])
    @pytest.mark.parametrize("kv_heads", [1, 2, 6])
    @pytest.mark.parametrize("lengths", [(3, 1, 5), (4,)])
    def test_a_step_equals_attention_over_all_that_a_row_has_seen(self, lengths, kv_heads, coarse):
        """Two layers, prompts of unequal length with two completions each, four tokens."""
        noise, size = generator(), 8
        prompts = prlm.Ragged(ragged_prompts(lengths))
        cache = prlm.Cache(small(num_key_value_heads=kv_heads), prompts, 2, 4)

        def draw(rows):
            heads = (6, kv_heads, kv_heads)
            return [2 * torch.randn(rows, n, size, generator=noise) for n in heads]

        seen = {}  # (layer, row) -> its keys and values
        for layer in (0, 1):
            q, *both = draw(sum(lengths))
            cache.read_prompts(layer, q, *both)
            for row in range(2 * len(lengths)):
                seen[layer, row] = [x[prompts.rows == row // 2] for x in both]
        for _ in range(4):
            cache.next_slot(coarse)
            for layer in (0, 1):
                q, *both = draw(2 * len(lengths))
                found = cache.read_next(layer, q, *both)
                assert found.shape == q.shape
                for row in range(2 * len(lengths)):
                    new = [torch.cat([x, y[row : row + 1]]) for x, y in zip(seen[layer, row], both)]
                    seen[layer, row] = new
                    all_of = [x[None] for x in (q[row : row + 1], *new)]
                    expected = naive_attention(*all_of, lambda *_: True)[0, 0]  # [heads, D]
                    case = f"layer {layer}, row {row}, which sees {len(new[0])} tokens"
                    close(found[row], expected, 1e-5, case)

    def test_scores_are_not_rounded_to_bfloat16(self):
        """Real Qwen2 checkpoints have key biases of 170 in their slow rotary channels.
        They add several hundred to all scores of a query alike, which the softmax cancels, unless
        the scores were rounded before: then sampler and trainer differ by up to 1.6 nats here."""
        decoder = small(rope_theta=1e6)
        with torch.no_grad():
            for layer in decoder.model.layers:
                layer.self_attn.k_proj.bias.view(2, 2, -1)[..., 2:] += 170
        prlm.for_sampling(decoder, torch.bfloat16)
        prompts = ragged_prompts((7, 1, 12, 40))
        groups = prlm.generate(decoder, prompts, 4, 48, 0.7, seed=0)
        sampled = torch.tensor([[c.logprobs for c in group] for group in groups])
        trained, _ = prlm.token_logprobs(decoder, prompts, ids_of(groups), 0.7)
        gap = (trained - sampled).abs()
        assert gap.max() < 0.25 and gap.mean() < 0.03, (gap.max(), gap.mean())

    def test_on_cuda_the_product_itself_is_float32(self):
        """Seen on a pretended device: no copy of the keys in float32 is made."""
        with FakeTensorMode(), Recording() as seen:
            q, k = (torch.empty(4, n, 8, device="cuda", dtype=torch.bfloat16) for n in (3, 5))
            scores = prlm.exact_products(q, k)
        names = [str(function) for function, *_ in seen.calls]
        assert scores.dtype == torch.float32 and scores.shape == (4, 3, 5)
        assert "aten.bmm.dtype" in names and "aten._to_copy.default" not in names


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of a stretch, on their tensors, once more.
    Numbers that Python held meanwhile are as they were, and looking at a tensor's content fails."""

    def __init__(self):
        super().__init__()
        self.calls, self.shares = [], None

    def capture_begin(self, pool, capture_error_mode):
        self.shares = pool
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def pool(self):
        return self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "local_scalar" in str(function) or "nonzero" in str(function):
            raise RuntimeError("the host waits for the device")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            for old, fresh in zip(*(tree_leaves(x) for x in (out, new)), strict=True):
                if old is not fresh:
                    old.copy_(fresh)


class TestRecorded:
    """CUDA's pace and graphs, on a CPU."""

    @pytest.fixture
    def graphs(self, monkeypatch):
        made = []

        def record():
            made.append(Recording())
            return made[-1]

        monkeypatch.setitem(prlm.PACES, "cpu", prlm.PACES["cuda"])
        for name in ("newest", "side"):
            monkeypatch.setattr(prlm.Recorded, name, None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", record)
        for name in ("current_stream", "Stream"):
            monkeypatch.setattr(torch.cuda, name, lambda _: SimpleNamespace(wait_stream=id))
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        for name in ("synchronize", "empty_cache", "graph"):  # what costs, and who would do it
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(name))
        return made

    def test_answers_are_those_of_eager_steps(self, graphs, monkeypatch):
        """140 tokens: two windows, and rows that leave when they meet their end."""
        decoder, prompts, eager = small(), ragged_prompts((7, 1, 12, 3)), prlm.PACES["mps"]
        long = prlm.generate(decoder, prompts, 1, 140, 0.0)
        ends = {group[0].tokens[n] for group, n in zip(long, (5, 90))}
        found = prlm.generate(decoder, prompts, 2, 140, 0.0, ends)
        assert 4 <= len(graphs) < 10
        # Each graph shares the memory of the one before it, which lives as long as one that does.
        assert [graph.shares for graph in graphs] == [None, *graphs[:-1]]
        assert prlm.Recorded.newest is graphs[-1]
        logprobs, mask = prlm.token_logprobs(decoder, prompts, ids_of(found))
        sampled = [torch.tensor(c.logprobs) for group in found for c in group]
        close(logprobs[mask], torch.cat(sampled), 1e-4)
        monkeypatch.setitem(prlm.PACES, "cpu", eager)
        assert ids_of(found) == ids_of(prlm.generate(decoder, prompts, 2, 140, 0.0, ends))


class TestSample:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_counts_follow_the_softmax(self, temperature):
        logits = torch.tensor([0.3, 1.0, -1.0, 0.0, 2.0])
        ids, logprobs = prlm.sample(logits.expand(20_000, -1), temperature, generator())
        expected = (logits / temperature).log_softmax(-1)
        close(logprobs, expected[ids], 1e-5)
        counts, expected = torch.bincount(ids, minlength=5), expected.exp() * 20_000
        chi2 = ((counts - expected) ** 2 / expected).sum()
        # 4 degrees of freedom: 1 in 80,000
        assert chi2 < 28, f"counts {counts.tolist()}, expected {expected.tolist()}"

    def test_rows_have_logits_and_noise_of_their_own(self):
        logits = torch.randn(4000, 6, generator=generator()) * 2
        draws = [prlm.sample(logits, 1.0, generator(n)) for n in (1, 1, 2)]
        ids, logprobs = draws[0]
        close(logprobs, logits.log_softmax(-1)[range(4000), ids], 1e-5)
        assert torch.equal(ids, draws[1][0]) and not torch.equal(ids, draws[2][0])
        wanted = logits.softmax(-1).mean(0)  # how often each id comes, over all rows
        found = torch.bincount(ids, minlength=6) / 4000
        same(found, wanted, "how often each of six ids comes, over 4,000 rows", absolute=0.03)

    def test_zero_is_greedy(self):
        """By the logits, as in transformers: probabilities may round to a tie."""
        logits = torch.randn(50, 6, generator=generator())
        ids, logprobs = prlm.sample(logits, 0)
        assert torch.equal(ids, logits.argmax(-1))
        close(logprobs, logits.log_softmax(-1).amax(-1), 1e-5)
        logits = torch.tensor([[0.1, 0.10000001]])
        assert prlm.sample(logits, 0)[0] == 1 and len(logits.softmax(-1).unique()) == 1

    @pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
    def test_never_an_impossible_id(self, number, monkeypatch):
        """Whatever torch.rand gives: its least or its largest number."""
        monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size).fill_(number))
        logits = torch.full((1, 7), -math.inf)
        logits[0, 2:5] = torch.tensor([0.1, 0.2, 0.3])
        ids, logprobs = prlm.sample(logits, 1.0)
        assert 2 <= ids.item() <= 4 and logprobs.isfinite()


class TestTwins:
    """generate and token_logprobs: the prompt once, the completions many."""

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_sampler_and_trainer_agree(self, temperature, monkeypatch):
        decoder, prompts, left, leave = small(), ragged_prompts(), [], prlm.leave
        decoder.vocab_limit = 90
        monkeypatch.setattr(prlm, "leave", lambda *a: left.append(leave(*a)) or left[-1])
        eos = set(range(0, 90, 5))
        groups = prlm.generate(decoder, prompts, 5, 16, temperature, eos, seed=0)
        assert sum(map(bool, left)) > 1  # finished rows have left the batch more than once
        ids = ids_of(groups)
        assert len({len(i) for group in ids for i in group}) > 3  # rows end at different times
        with torch.no_grad():
            logprobs, mask = prlm.token_logprobs(decoder, prompts, ids, temperature)
        assert mask.sum(-1).tolist() == [[len(i) for i in group] for group in ids]
        for p, group in enumerate(groups):
            for g, completion in enumerate(group):
                n = len(completion.tokens)
                naive = naive_logprobs(decoder, prompts[p], completion.tokens, temperature)
                case = f"prompt {p} of {len(prompts[p])} tokens, completion {g} of {n}"
                close(torch.tensor(completion.logprobs), naive, case=f"the sampler, {case}")
                close(logprobs[p, g, :n], naive, case=f"the trainer, {case}")
                assert (logprobs[p, g, n:] == 0).all()
                assert completion.finished == (completion.tokens[-1] in eos)
                assert not eos & set(completion.tokens[:-1])
                assert completion.finished or n == 16

    def test_equal_weights_score_equally_in_bfloat16(self):
        """float32 weights under bfloat16 products, and the copy that samples: kl is exactly 0."""
        policy = small()
        copied = prlm.for_sampling(copy.deepcopy(policy), torch.bfloat16)
        prlm.multiply_in(policy, torch.bfloat16)
        assert policy.head.dtype == torch.float32 and copied.head.dtype == torch.bfloat16
        sums = set()  # what runs through the layers is float32 in both
        for decoder in (policy, copied):
            decoder.model.norm.register_forward_hook(lambda _, x, out: sums.add(x[0].dtype))
        prompts = ragged_prompts()
        groups = prlm.generate(copied, prompts, 4, 12, 0.8, seed=0)
        trained, mask = prlm.token_logprobs(policy, prompts, ids_of(groups), 0.8)
        again, _ = prlm.token_logprobs(copied, prompts, ids_of(groups), 0.8)
        assert torch.equal(trained, again) and sums == {torch.float32}
        sampled = torch.tensor([[c.logprobs for c in group] for group in groups])
        assert (trained - sampled)[mask].abs().mean() < 0.02

    @pytest.mark.parametrize(
        "changes", [{}, dict(model_type="qwen3", head_dim=16), dict(num_key_value_heads=6)]
    )
    def test_gradients_equal_the_naive_ones(self, changes):
        decoder, prompts, noise = small(**changes), ragged_prompts(), generator(5)
        decoder.vocab_limit = 91
        lengths = [(3, 9, 1), (5, 2, 8), (1, 1, 1), (4, 0, 6)]
        completions = [[random_ids(noise, n, 91) for n in group] for group in lengths]
        weights = torch.randn(4, 3, 9, generator=noise)
        logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
        (logprobs * weights * mask).sum().backward()
        shared = {name: p.grad.clone() for name, p in decoder.named_parameters()}
        decoder.zero_grad()
        for p, g in itertools.product(range(4), range(3)):
            if ids := completions[p][g]:
                naive = naive_logprobs(decoder, prompts[p], ids, 0.7)
                (naive * weights[p, g, : len(ids)]).sum().backward()
        for name, parameter in decoder.named_parameters():
            close(shared[name], parameter.grad, 1e-4, f"the gradient of {name}")

    def test_checkpointing_keeps_less_for_the_same_gradients(self):
        decoder, found = small(), []
        prompts, completions = ragged_prompts(), [[[1, 2, 3], [4]]] * 4
        for decoder.checkpointing in (False, True):
            with keeping(kept := []):
                logprobs, _ = prlm.token_logprobs(decoder, prompts, completions)
            logprobs.sum().backward()
            found.append((sum(kept), [p.grad.clone() for p in decoder.parameters()]))
            decoder.zero_grad()
        (much, plain), (little, again) = found
        assert little < much / 3
        assert all(map(torch.equal, plain, again))

    def test_chunked_head_equals_the_full_one(self, monkeypatch):
        """And keeps no logits for backward."""
        pace = prlm.PACES["cpu"]._replace(logits=1)  # 128 rows a chunk
        monkeypatch.setitem(prlm.PACES, "cpu", pace)
        decoder, noise = small(tie_word_embeddings=False), generator()
        hidden = torch.randn(300, 48, generator=noise).requires_grad_()
        targets, inputs = torch.arange(300) % 97, (hidden, decoder.head)
        with keeping(kept := []):
            logprobs = prlm.head_logprobs(decoder, hidden, targets, 0.5)
        assert max(kept, default=0) < 300 * 97
        full = (F.linear(hidden, decoder.head) / 0.5).log_softmax(-1)
        full = full.gather(1, targets[:, None])[:, 0]
        close(logprobs, full)
        up = torch.randn(300, generator=noise)
        ours, theirs = (torch.autograd.grad((x * up).sum(), inputs) for x in (logprobs, full))
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other, 1e-4)

    def test_all_completions_of_one_token(self):
        decoder = small()
        logprobs, _ = prlm.token_logprobs(decoder, [[1, 2]], [[[5], [6]]])
        expected = decoder(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1)[[5, 6]]
        close(logprobs.flatten(), expected)

    def test_ids_beyond_the_tokenizer_are_never_sampled(self):
        decoder = small()
        decoder.vocab_limit = 10
        groups = prlm.generate(decoder, [[1]], 64, 8, 5.0, seed=1)
        assert {i for c in groups[0] for i in c.tokens} == set(range(10))
        logprobs, _ = prlm.token_logprobs(decoder, [[1]], [[[4], [10]]])
        assert logprobs[0, 0, 0].isfinite() and logprobs[0, 1, 0] == -math.inf

    def test_samples_follow_the_distribution(self):
        decoder = small()
        decoder.vocab_limit = 12
        groups = prlm.generate(decoder, [[1, 2, 3]] * 2, 4000, 1, 2.0, seed=3)
        for group in groups:
            counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=12)
            with torch.no_grad():
                expected = (decoder(torch.tensor([[1, 2, 3]]))[0, -1, :12] / 2).softmax(-1) * 4000
            chi2 = ((counts - expected) ** 2 / expected).sum()
            assert chi2 < 40  # 11 degrees of freedom: 1 in 30,000

    def test_rows_are_independent_and_seeds_repeat(self):
        decoder = small()
        a, b, c = (ids_of(prlm.generate(decoder, [[1]], 16, 1, 3.0, seed=s))[0] for s in (0, 0, 1))
        assert a == b != c and len({id for (id,) in a}) > 3  # one token each

    def test_bad_calls_are_refused(self):
        generate, score = (partial(f, small()) for f in (prlm.generate, prlm.token_logprobs))
        for call in (
            partial(generate, [[]]), partial(generate, [[1]], temperature=9e-7),
            partial(generate, [[1]], group_size=0), partial(score, [[1]], [[[1]]], 0),
            partial(score, [[1], [2]], [[[1]], [[1], [2]]]),
        ):  # fmt: skip
            with pytest.raises(ValueError):
                call()
