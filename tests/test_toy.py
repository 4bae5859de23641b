"""The page of a run is whole, escaped and alone."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import prlm

sys.path.insert(0, str(Path(__file__).parent.parent / "toy"))
import page


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "rect", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("rect", "polyline", "circle") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class TestPage:
    def make_run(self, folder, policy, target="<script>alert(1)</script>"):
        folder.mkdir()
        options = {"model": str(policy), "task": "LaMP-4", "steps": 2}
        prlm.write_json(folder / "config.json", options)
        tokenizer = prlm.load_tokenizer(policy)
        samples = []
        for step in (1, 2):
            for n, reward in enumerate((0.2, 1.5)):
                tokens = tokenizer.encode(f"<think>\nwhy {n}\n</think>\n<b>{step}")
                sample = {"step": step, "id": "7", "target": target, "prompt": "a < b & c"}
                sample |= {"tokens": tokens, "logprobs": [-0.5] * len(tokens), "finished": n == 0}
                sample |= {"completion": tokenizer.decode(tokens), "reward": reward}
                sample |= {"accuracy": reward, "format": 1.0, "personalization": 0.5}
                samples.append(sample | {"advantage": reward - 0.85})
        metrics = [{"step": s, "reward": 0.85, "completion_tokens": 9.0} for s in (1, 2)]
        metrics[1]["eval_rouge-l"] = 0.4
        for name, lines in (("samples", samples), ("metrics", metrics)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)

    def test_is_whole_escaped_and_alone(self, world, tmp_path):
        self.make_run(tmp_path / "run", world / "policy")
        page.main(page.Options(run=str(tmp_path / "run")))
        html = (tmp_path / "run" / "report.html").read_text()
        parser = Balanced()
        parser.feed(html)
        assert not parser.open and "a < b & c" in parser.text and "<b>2" in parser.text
        assert "<script" not in html and not re.search(r"(src|href|url)\s*[=(]", html)
        assert parser.text.index("reward 1.500") < parser.text.index("reward 0.200")
        assert parser.text.count("cut off") == 2

    def test_a_run_without_steps_is_an_error(self, world, tmp_path):
        self.make_run(tmp_path / "run", world / "policy")
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        with pytest.raises(ValueError, match="no step"):
            page.main(page.Options(run=str(tmp_path / "run")))
