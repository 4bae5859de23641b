"""A released model, made from a wheel's GGUF, against transformers; the model tests are slow."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

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
    "  two  spaces", "line\n\n\nbreaks\r\n\ttab ", "12345 3.14 x86 2²", "don't WON'T",
    "naïve café — “quotes” …", "日本語のテキスト", "🙂👩\u200d👩\u200d👧 emoji", "x\x00y",
    "<|im_end|> inside <|im_start|>user", "<think>\nhm\n</think>", "\u00a0\u200b\ufeff", "Ġ is",
]  # fmt: skip
CHATS = [
    [{"role": "system", "content": "SYS"}, {"role": "user", "content": "USR"}],
    [{"role": "user", "content": "USR"}],
    [{"role": "system", "content": "  SYS \n"}, {"role": "user", "content": "  USR \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\nc"},
     {"role": "user", "content": "9 + 10?"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the command writes, as we and as transformers load it; `original`: it reads the GGUF."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    line = [sys.executable, smollm2.__file__, str(folder)]
    assert "135 million" in subprocess.run(line, check=True, capture_output=True, text=True).stdout
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    return SimpleNamespace(
        tokenizer=prlm.load_tokenizer(folder), decoder=prlm.load_decoder(folder),
        theirs=transformers.AutoTokenizer.from_pretrained(folder), reference=load(folder).eval(),
        original=load(GGUF.parent, gguf_file=GGUF.name).eval(),
    )  # fmt: skip


def test_half_split_undoes_the_interleaved_order():
    rows = torch.arange(12)[:, None]  # two heads of D = 6, channel pairs side by side
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert smollm2.half_split(rows, heads=2)[:, 0].tolist() == expected


@pytest.mark.slow
class TestWeights:
    def test_every_weight_is_that_of_transformers_own_reading(self, made):
        mine, theirs = made.reference.state_dict(), made.original.state_dict()
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name

    @torch.no_grad()
    def test_logits(self, made):
        tokens = torch.randint(0, 49152, (3, 20), generator=torch.Generator().manual_seed(0))
        logits = made.decoder(tokens)
        for model in (made.reference, made.original):
            expected = model(tokens).logits
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_greedy_text(self, made):
        prompt = made.tokenizer.chat([{"role": "user", "content": "Name the capital of France."}])
        mine = prlm.generate(made.decoder, [prompt], 1, 40, 0.0, made.tokenizer.eos_ids)[0][0]
        how = dict(do_sample=False, max_new_tokens=40, eos_token_id=2)
        theirs = made.original.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
        assert mine.tokens == theirs
        assert mine.finished and "Paris" in made.tokenizer.decode(mine.tokens)


@pytest.mark.slow
class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_ids_and_text(self, made, text):
        ids = made.tokenizer.encode(text)
        as_text = made.theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == as_text.input_ids
        if "<|" not in text:
            assert made.tokenizer.decode(ids) == text

    def test_special_ids(self, made):
        assert made.tokenizer.eos_ids == {2} and made.tokenizer.end_id == 2
        assert made.tokenizer.size == 49152 and made.tokenizer.opening == ""

    @pytest.mark.parametrize("messages", CHATS)
    def test_chat(self, made, messages):
        """With the GGUF's own template, which has a default system message."""
        field = pytest.importorskip("gguf").GGUFReader(GGUF).fields["tokenizer.chat_template"]
        assert made.theirs.chat_template == field.contents()
        how = dict(add_generation_prompt=True, return_dict=False)
        assert made.tokenizer.chat(messages) == made.theirs.apply_chat_template(messages, **how)
