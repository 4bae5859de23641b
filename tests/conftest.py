"""Shared by the tests: a tiny tokenizer made on the spot."""

import pytest
import tokenizers

import prlm


def byte_tokenizer(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """Byte-level BPE without merges: every text round-trips."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


@pytest.fixture
def toy_tokenizer():
    backend = byte_tokenizer()
    return prlm.Tokenizer(backend, {256}, 256, {"tokenizer.json": backend.to_str()})
