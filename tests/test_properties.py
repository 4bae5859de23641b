"""Whatever the bytes, records and words are: the right answer, or a ValueError."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

import prlm
import retrieve

quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
arrays = numpy_strategies.arrays(
    dtype=st.sampled_from([np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_]),
    shape=numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter("__metadata__".__ne__)


class TestSafetensorsProperties:
    @quick
    @given(st.dictionaries(names, arrays, max_size=5))
    def test_what_was_written_is_read(self, tmp_path, found):
        tensors = {name: torch.from_numpy(array.copy()) for name, array in found.items()}
        prlm.write_safetensors(tmp_path / "a", tensors)
        again = prlm.read_safetensors(tmp_path / "a")
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = again[name]
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert other.numpy().tobytes() == tensor.numpy().tobytes()


class TestLampProperties:
    record = st.fixed_dictionaries(
        {},
        optional={
            "id": anything,
            "input": anything | st.text(),
            "user_id": anything,
            "profile": anything
            | st.lists(
                st.fixed_dictionaries(
                    {}, optional={"text": anything, "title": anything, "id": anything}
                ),
                max_size=3,
            ),
        },
    )

    @quick
    @given(st.lists(record | anything, max_size=3), st.lists(anything, max_size=3) | anything)
    def test_any_records_and_outputs(self, tmp_path, records, golds):
        (tmp_path / "dev_questions.json").write_text(json.dumps(records))
        (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
        try:
            examples = retrieve.load_lamp(tmp_path, "LaMP-4", "dev")
        except ValueError as error:
            assert str(tmp_path) in str(error)
        else:
            assert len(examples) == len(records) == len(golds)

    @quick
    @given(anything, anything)
    def test_any_json_at_the_top(self, tmp_path, questions, outputs):
        (tmp_path / "dev_questions.json").write_text(json.dumps(questions))
        (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
        try:
            assert retrieve.load_lamp(tmp_path, "LaMP-4", "dev") == []
        except ValueError as error:
            assert str(tmp_path) in str(error)


class TestBM25Properties:
    words = st.lists(st.text(max_size=3), max_size=8)

    @quick
    @given(st.lists(words, min_size=1, max_size=6), words)
    def test_any_words_score_as_in_rank_bm25(self, corpus, query):
        library = pytest.importorskip("rank_bm25")
        scores = retrieve.BM25(corpus).scores(query)
        assert scores.shape == (len(corpus),) and np.isfinite(scores).all()
        if any(corpus):
            expected = library.BM25Okapi(corpus).get_scores(query)
            assert np.abs(scores - expected).max() < 1e-9
