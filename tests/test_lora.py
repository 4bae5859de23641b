"""LoRA: PEFT's numbers, a frozen base, and adapters that can be left out and merged."""

import copy
import itertools

import pytest
import torch
from test_prlm import close, ids_of, ragged_prompts, reference, small
from tokenizers import Tokenizer as Backend
from tokenizers import models

import prlm
import rl

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK, ALPHA = 4, 6.0
TOKENIZER = prlm.Tokenizer(Backend(models.WordLevel({str(n): n for n in range(97)}, unk_token="0")))


def adapted(decoder, std=0.3):
    """The decoder with adapters whose B is not 0; its plain[0] is what `add_lora` returns."""
    torch.manual_seed(0)
    decoder.plain = [rl.add_lora(decoder, RANK, ALPHA)]  # in a list: no module of the decoder
    with torch.no_grad():
        for name, parameter in adapters(decoder).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=std)
    return decoder


def adapters(decoder):
    return {name: p for name, p in decoder.named_parameters() if ".lora_" in name}


@pytest.fixture(params=["qwen2", "qwen3", "llama-biases"])
def pair(request, tmp_path):
    """(our adapted decoder, PEFT's model with the same weights, A and B, {our name: theirs})."""
    model = reference(request.param)
    model.save_pretrained(tmp_path)
    decoder = adapted(prlm.load_decoder(tmp_path))
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=kinds, lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    theirs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    names = {name: f"base_model.model.{name}.default.weight" for name in adapters(decoder)}
    assert {*names.values()} == theirs.keys() and len(names) == 2 * 7 * 3
    with torch.no_grad():
        for name, tensor in adapters(decoder).items():
            theirs[names[name]].copy_(tensor)
    return decoder, model, {name: theirs[names[name]] for name in names}


class TestPEFT:
    def test_same_logits_merged_or_not(self, pair, tmp_path):
        decoder, model, _ = pair
        tokens = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
        prlm.save_decoder(decoder, TOKENIZER, tmp_path / "merged")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            wanted = model(tokens).logits
            close(decoder(tokens), wanted)
            close(prlm.load_decoder(tmp_path / "merged")(tokens), wanted)
            close(saved(tokens).logits, wanted)
            with model.disable_adapter():
                base = model(tokens).logits
            close(decoder.plain[0](tokens), base)
            assert (base - wanted).abs().max() > 0.1 * wanted.abs().max()
        weight = decoder.model.layers[0].mlp.up_proj.weight
        assert decoder.plain[0].model.layers[0].mlp.up_proj.weight.data_ptr() == weight.data_ptr()

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_same_gradients_and_none_for_the_base(self, pair, checkpointing):
        decoder, model, theirs = pair
        decoder.checkpointing = checkpointing
        prompts, completions = ragged_prompts((7, 3)), [[[5, 6, 7], [8]], [[9, 10], [11, 12]]]
        weights = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
        logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
        (logprobs * weights * mask).sum().backward()
        for p, g in itertools.product(range(2), range(2)):
            row, start = torch.tensor([prompts[p] + completions[p][g]]), len(prompts[p])
            logits = model(row).logits[0, start - 1 : -1] / 0.7
            chosen = logits.log_softmax(-1).gather(1, row[0, start:, None])[:, 0]
            (chosen * weights[p, g, : len(chosen)]).sum().backward()
        for name, parameter in decoder.named_parameters():
            assert (parameter.grad is not None) == (name in theirs)
            if name in theirs:
                close(parameter.grad, theirs[name].grad, case=name)

    def test_a_is_drawn_as_there(self):
        """Uniform within 1 / sqrt(inputs), from torch's generator."""
        decoder = small(hidden_size=96)
        torch.manual_seed(0)
        rl.add_lora(decoder, 90, 1.0)
        linear = decoder.model.layers[0].self_attn.q_proj
        torch.manual_seed(0)
        config = peft.LoraConfig(r=90, target_modules=["0"])
        theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(96, 96)), config)
        theirs = theirs.base_model.model[0].lora_A.default.weight
        assert linear.lora_A.shape == theirs.shape == (90, 96) and not linear.lora_B.any()
        assert abs(linear.lora_A.std() / theirs.std() - 1) < 0.02
        assert linear.lora_A.abs().max() <= 96**-0.5


class TestAdapters:
    def test_sampler_and_trainer_agree(self):
        decoder, prompts = adapted(small()), ragged_prompts()
        groups = prlm.generate(decoder, prompts, 3, 12, 0.8, seed=0)
        logprobs, _ = prlm.token_logprobs(decoder, prompts, ids_of(groups), 0.8)
        sampled = torch.tensor([[c.logprobs for c in group] for group in groups])
        close(logprobs.detach(), sampled)

    def test_on_a_base_in_bfloat16_all_of_the_change_arrives(self, tmp_path):
        """BA is smaller than a step of bfloat16's grid, on which W lies.
        What is sampled, trained and saved is W + BA none the less, measured against float32."""
        base = small().bfloat16().float()
        exact = adapted(copy.deepcopy(base), std=1e-3)
        half = adapted(prlm.for_sampling(copy.deepcopy(base), torch.bfloat16), std=1e-3)
        prlm.save_decoder(half, TOKENIZER, tmp_path)
        saved, linear = prlm.load_decoder(tmp_path), half.model.layers[0].mlp.down_proj
        wanted = linear.weight.float() + ALPHA / RANK * linear.lora_B @ linear.lora_A
        close(saved.model.layers[0].mlp.down_proj.weight, wanted, 1e-7)
        assert (wanted.bfloat16() == linear.weight).float().mean() > 0.5  # what the grid would lose
        prompts = ragged_prompts()
        groups = prlm.generate(half, prompts, 32, 40, 1.0, seed=0)
        sampled = torch.tensor([[c.logprobs for c in group] for group in groups])

        @torch.no_grad()
        def score(decoder):
            return prlm.token_logprobs(decoder, prompts, ids_of(groups))[0]

        change, before = score(exact) - score(base), score(half.plain[0])
        for found, most in ((sampled - before, 0.15), (score(half) - before, 0.15),
                            (score(saved) - score(base), 0.01)):  # fmt: skip
            share = (found * change).sum() / change.square().sum()
            assert abs(share - 1) < most, share

    def test_gradients_on_a_base_in_bfloat16_are_those_of_float32_rounded(self):
        exact, half = adapted(small()), adapted(prlm.for_sampling(small(), torch.bfloat16))
        for decoder in (exact, half):
            logprobs, mask = prlm.token_logprobs(decoder, ragged_prompts(), [[[1, 2, 3], [4]]] * 4)
            (logprobs * mask).sum().backward()
        for parameter, wanted in zip(adapters(half).values(), adapters(exact).values()):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            pair = parameter.grad.flatten(), wanted.grad.flatten()
            assert torch.cosine_similarity(*pair, 0) > 0.9
