"""LoRA: PEFT's numbers, a frozen base, and adapters that can be switched off and merged."""

import copy
import itertools

import pytest
import torch
from test_prlm import close, ragged_prompts, reference, small

import prlm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK, ALPHA = 4, 6.0


def adapted(decoder, seed=0):
    """The decoder with adapters whose B is not 0."""
    torch.manual_seed(seed)
    prlm.add_lora(decoder, RANK, ALPHA)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.3)
    return decoder


def adapters(decoder):
    return {n: p for n, p in decoder.named_parameters() if n.endswith((".A", ".B"))}


def theirs_of(decoder, model):
    """Our A and B by PEFT's names: {name: (ours, rows of it)} as views."""
    found = {}
    for number, layer in enumerate(decoder.layers):
        for own, names in prlm.DECODER_NAMES.items():
            linear = getattr(layer, own, None)
            if isinstance(linear, prlm.Linear):
                parts = zip(names.split(), *zip(*linear.blocks(torch.float32)), strict=True)
                for name, a, b in parts:
                    path = f"base_model.model.model.layers.{number}.{name}"
                    found[f"{path}.lora_A.default.weight"] = a
                    found[f"{path}.lora_B.default.weight"] = b
    return found


@pytest.fixture(params=["qwen2", "qwen3", "llama-biases"])
def pair(request, tmp_path):
    """(our adapted decoder, PEFT's model with the same weights, A and B)."""
    model = reference(request.param)
    model.save_pretrained(tmp_path)
    decoder = adapted(prlm.load_decoder(tmp_path))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    parameters = dict(model.named_parameters())
    wanted = {name for name in parameters if "lora_" in name}
    ours = theirs_of(decoder, model)
    assert ours.keys() == wanted and len(wanted) == 2 * 7 * 3
    with torch.no_grad():
        for name, tensor in ours.items():
            parameters[name].copy_(tensor)
    return decoder, model


class TestPEFT:
    def test_same_logits_merged_or_not(self, pair, tmp_path, toy_tokenizer):
        decoder, model = pair
        tokens = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
        plain = prlm.Decoder(decoder.raw).eval()
        plain.load_state_dict(prlm.merged_state(decoder))  # strictly: not a name more or less
        prlm.save_decoder(decoder, toy_tokenizer, tmp_path / "merged")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            wanted = model(tokens).logits
            close(decoder(tokens), wanted)
            close(plain(tokens), wanted)
            close(saved(tokens).logits, wanted)
            with prlm.without_lora(decoder), model.disable_adapter():
                base = model(tokens).logits
                close(decoder(tokens), base)
            assert (base - wanted).abs().max() > 0.1 * wanted.abs().max()
            close(decoder(tokens), wanted)  # they are on again

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_same_gradients_and_none_for_the_base(self, pair, checkpointing):
        decoder, model = pair
        decoder.checkpointing = checkpointing
        prompts, completions = ragged_prompts((7, 3)), [[[5, 6, 7], [8]], [[9, 10], [11, 12]]]
        weights = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
        logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
        (logprobs * weights * mask).sum().backward()
        total = 0.0
        for p, g in itertools.product(range(2), range(2)):
            row, start = torch.tensor([prompts[p] + completions[p][g]]), len(prompts[p])
            logits = model(row).logits[0, start - 1 : -1] / 0.7
            chosen = logits.log_softmax(-1).gather(1, row[0, start:, None])[:, 0]
            total = total + (chosen * weights[p, g, : len(chosen)]).sum()
        total.backward()
        for name, parameter in decoder.named_parameters():
            assert (parameter.grad is not None) == name.endswith((".A", ".B"))
        wanted = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        for parameter in adapters(decoder).values():
            parameter.data = parameter.grad  # so that theirs_of names the parts
        for name, gradient in theirs_of(decoder, model).items():
            close(gradient, wanted[name])

    def test_a_is_drawn_as_there(self):
        """Uniform within 1 / sqrt(inputs), each block of rows its own, from torch's generator."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 6)
        ours = prlm.Linear(64, [4, 2], bias=True)
        torch.manual_seed(0)
        ours.add_lora(500, 1.0)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=1000, target_modules=["0"])
        theirs = peft.get_peft_model(torch.nn.Sequential(layer), config)
        theirs = theirs.base_model.model[0].lora_A.default.weight
        assert ours.A.shape == (1000, 64) and not ours.B.any()
        assert abs(ours.A.std() / theirs.std() - 1) < 0.02 and abs(ours.A.mean()) < 1e-3
        assert ours.A.abs().max() <= 1 / 8 and theirs.abs().max() <= 1 / 8


class TestAdapters:
    def test_at_first_nothing_changes(self):
        decoder, tokens = small(), torch.arange(30)[None]
        before = decoder(tokens).detach()
        state = {name: x.clone() for name, x in decoder.state_dict().items()}
        prlm.add_lora(decoder, RANK, ALPHA)
        assert torch.equal(decoder(tokens), before)
        merged = prlm.merged_state(decoder)
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[name], state[name]) for name in state)
        trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
        assert trained == adapters(decoder).keys() and len(trained) == 4 * 2 * 3

    @pytest.mark.parametrize("rank, alpha", [(0, 1.0), (4, 0.0), (4, float("nan")), (10**6, 1.0)])
    def test_bad_sizes(self, rank, alpha):
        with pytest.raises(ValueError, match="rank"):
            prlm.add_lora(small(), rank, alpha)

    def test_sampler_and_trainer_agree_also_with_the_merged_copy(self):
        decoder = adapted(small())
        merged = small()
        merged.load_state_dict(prlm.merged_state(decoder))
        prompts = ragged_prompts()
        for sampler in (decoder, merged):
            groups = prlm.generate(sampler, prompts, 3, 12, 0.8, seed=0)
            answers = [[c.tokens for c in group] for group in groups]
            logprobs, _ = prlm.token_logprobs(decoder, prompts, answers, 0.8)
            sampled = torch.tensor([[c.logprobs for c in group] for group in groups])
            close(logprobs.detach(), sampled)

    def test_a_base_in_bfloat16_under_adapters_in_float32(self):
        """The frozen weights take half the memory; gradients are those of float32, rounded."""
        exact = adapted(small())
        half = small().bfloat16()
        base = {name: x.clone() for name, x in half.state_dict().items()}
        half = adapted(half)
        prompts, completions = ragged_prompts(), [[[1, 2, 3], [4]]] * 4
        for decoder in (exact, half):
            with torch.autocast("cpu", torch.bfloat16, decoder is half):
                logprobs, mask = prlm.token_logprobs(decoder, prompts, completions)
            (logprobs * mask).sum().backward()
        wanted = adapters(exact)
        for name, parameter in adapters(half).items():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            gradient = wanted[name].grad
            cosine = torch.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), 0)
            assert cosine > 0.9, name
        now = half.state_dict()
        assert all(torch.equal(now[name], base[name]) for name in base)
        merged = prlm.merged_state(half)
        assert {x.dtype for x in merged.values()} == {torch.bfloat16}
        linear = half.layers[0].down
        wanted = linear.weight.float() + ALPHA / RANK * linear.B @ linear.A
        assert torch.equal(merged["layers.0.down.weight"], wanted.bfloat16())

    def test_only_the_adapters_learn(self):
        decoder, prompts = adapted(small()), ragged_prompts()
        before = copy.deepcopy(decoder).state_dict()
        trained = [p for p in decoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.0)
        for _ in range(3):
            logprobs, mask = prlm.token_logprobs(decoder, prompts, [[[1, 2, 3], [4]]] * 4)
            loss = -(logprobs * mask).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = {n for n, x in decoder.state_dict().items() if not torch.equal(x, before[n])}
        assert moved == adapters(decoder).keys()
