"""A run leaves what it promises, knows its options, can be resumed, and says what is wrong."""

import dataclasses
import json
import math
import pickle
import shutil
from unittest import mock

import pytest
import torch
from conftest import tiny, write_policy
from test_stop import same_state, steps

import eval as scoring
import prlm
import retrieve
import rl


def quick(world, out, **changes):
    """A run of two steps without a judge."""
    how = dict(steps=2, save_every=1, personalization=0.0, eval_every=0, max_new_tokens=6)
    return tiny(world, out, **how | changes)


def files_of(out):
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


class TestRun:
    def test_leaves_what_the_readme_promises(self, world, finished):
        assert {path.name for path in finished.iterdir()} == {
            "config.json", "metrics.jsonl", "samples.jsonl", "scores.json",
            "predictions.json", "trainer.pt", "checkpoint", "reward", "held_out",
        }  # fmt: skip
        metrics = prlm.read_lines(finished / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        assert all(math.isfinite(v) for m in metrics for v in m.values())
        assert all(m["gap"] < 1e-4 for m in metrics)
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-6
        assert ["eval_rouge-l" in m for m in metrics] == [False, True, False, True]
        assert len(prlm.read_lines(finished / "samples.jsonl")) == 4 * 2 * 3
        others = {f"eval_{name}" for name in scoring.METRICS[1:]}
        assert metrics[-1].keys() >= rl.METRICS.keys() == metrics[-1].keys() - others
        scores = prlm.read_json(finished / "scores.json")
        keys = {m + s for m in scoring.METRICS for s in ("", "_sampled")}
        names = ("no_profile", "before", "after")
        assert {name: {*s} for name, s in scores.items()} == dict.fromkeys(names, keys)
        predictions = prlm.read_json(finished / "predictions.json")
        assert predictions["task"] == "LaMP_4"
        assert [gold["id"] for gold in predictions["golds"]] == [f"31{n}" for n in range(4)]
        trained = prlm.load_decoder(finished / "checkpoint")
        assert not torch.equal(trained.head, prlm.load_decoder(world / "policy").head)

    def test_eval_gives_the_scores_of_the_run(self, world, finished, tmp_path):
        given = dict(run=str(finished), out=str(tmp_path / "eval"), limit=4)
        scoring.main(prlm.resolve(scoring.Options, given))
        scores = prlm.read_json(tmp_path / "eval" / "scores.json")
        after = prlm.read_json(finished / "scores.json")["after"]
        assert scores == {name: after[name] for name in scores}
        for one, two in (("samples.jsonl", "held_out/after.jsonl"), ("predictions.json",) * 2):
            assert (tmp_path / "eval" / one).read_bytes() == (finished / two).read_bytes()

    @pytest.mark.parametrize("warm_start", [0, 1])
    def test_no_steps_no_judge(self, world, tmp_path, warm_start):
        """The scores are those of the warm start, or of the model that was given."""
        out = tmp_path / "run"
        rl.main(tiny(world, out, steps=0, warm_start=warm_start))
        assert not (out / "reward").exists() and not steps(out)
        scores = prlm.read_json(out / "scores.json")
        assert scores["after"] == scores["before"]
        start = out / "warm_start" if warm_start else world / "policy"
        one, two = (prlm.load_decoder(path) for path in (start, out / "checkpoint"))
        assert torch.equal(one.head, two.head)
        rl.main(tiny(world, out, steps=1, warm_start=warm_start, resume=True, force=True))
        assert steps(out) == 1 and (out / "reward").is_dir()

    def test_a_judge_of_ones_own(self, world, tmp_path):
        def judge(examples, answers):
            return [len(e.profile) + len(a) for e, a in zip(examples, answers, strict=True)]

        o = quick(world, tmp_path / "run", personalization=0.1)
        rl.main(o, judge=judge)
        written = {e.id: len(e.profile) for e in retrieve.load_examples(o, "train")}
        for row in prlm.read_lines(tmp_path / "run/samples.jsonl"):
            expected = written[row["id"]] + len(row["answer"]) if row["answer"] else -10.0
            assert row["personalization"] == expected

    def test_what_data_says_does_not_act_on_the_terminal(self, world, tmp_path, capsys):
        shutil.copytree(world / "lamp", tmp_path / "lamp")
        for file in (tmp_path / "lamp").rglob("*.json"):
            text = file.read_text().replace('"output": "', '"output": "red \\u001b[31m \\u202e ')
            text = text.replace('"id": "3', '"id": "\\u001b[2J3')
            file.write_text(text.replace("following article: ", "following article: \\u001b[2J"))
        rl.main(quick(world, tmp_path / "run", data=str(tmp_path / "lamp"), warm_start=1))
        said = capsys.readouterr().out
        assert "red \ufffd[31m \ufffd" in said and not {"\x1b", "\u202e"} & {*said}


class TestDirectory:
    @pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}, {}])
    @pytest.mark.parametrize("name", ["thesis.txt", "config.json", "model.safetensors"])
    def test_what_is_no_run_is_never_deleted(self, world, tmp_path, how, name):
        prlm.write_text(tmp_path / "out" / name, '{"out": "mine"}')
        before = files_of(tmp_path / "out")
        with pytest.raises(ValueError, match=str(tmp_path / "out")):
            rl.main(tiny(world, tmp_path / "out", **how))
        assert files_of(tmp_path / "out") == before

    def test_overwrite_starts_anew_and_nothing_else_touches_a_result(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out, steps=1))
        (out / "left.txt").touch()
        before = files_of(out)
        with pytest.raises(ValueError, match=r"holds a result.*--resume.*--overwrite"):
            rl.main(quick(world, out, temperature=0.5))
        with pytest.raises(ValueError, match="no result of this"):  # nor does another command
            scoring.main(prlm.resolve(scoring.Options, {"run": out, "out": out, "overwrite": True}))
        with pytest.raises(ValueError, match="would delete the model that it needs"):
            rl.main(quick(world, out, overwrite=True, model=str(out / "checkpoint")))
        assert files_of(out) == before
        rl.main(quick(world, out, temperature=0.5, overwrite=True, force=True))
        assert steps(out) == 2 and not (out / "left.txt").exists()
        assert prlm.read_json(out / "config.json")["temperature"] == 0.5

    def test_resume_starts_and_leaves_a_run_that_was_finished(self, world, tmp_path):
        """Also beside --overwrite."""
        o = quick(world, tmp_path / "run", steps=1, resume=True)
        rl.main(o)
        before = files_of(tmp_path / "run")
        rl.main(dataclasses.replace(o, overwrite=True))
        before.pop(tmp_path / "run/config.json")
        assert before.items() <= files_of(tmp_path / "run").items()

    def test_other_options_are_named_and_refused_but_for_free_ones(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        before = files_of(out)
        for text, changes in (("--k 2", {"k": 1}), ("--steps 2", {"steps": 1})):
            with pytest.raises(ValueError, match=f"was made with {text}"):
                rl.main(quick(world, out, resume=True, **changes))
        assert files_of(out) == before
        free = dict(tokens_per_micro_batch=50, checkpointing=True, save_every=1, eval_every=1)
        stop = mock.patch.object(prlm, "save_decoder", side_effect=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt), stop:  # behind the last step: not finished yet
            rl.main(quick(world, out, steps=4, resume=True, **free))
        rl.main(quick(world, out, steps=4, resume=True, **free))
        metrics = prlm.read_lines(out / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4] and "eval_bleu" in metrics[-1]
        assert (out / "held_out/after.jsonl").read_bytes() != before[out / "held_out/after.jsonl"]
        assert prlm.read_json(out / "config.json")["steps"] == 4

    @pytest.mark.parametrize("how", [
        {"lora_rank": 2, "beta": 0.1}, {"precision": "bfloat16", "updates_per_rollout": 2},
        {"precision": "bfloat16", "lora_rank": 2},
    ])  # fmt: skip
    def test_adapters_and_halves_are_resumed_bit_equal(self, world, tmp_path, monkeypatch, how):
        """The sampler too, which in half precision is a copy rounded at random."""
        real, sampled, dies = rl.update, [], []

        def update(o, policy, *rest):
            weights = [p.detach().flatten() for p in policy.sampler.parameters()]
            sampled.append(torch.cat([x.float() for x in weights]))
            assert (policy.sampler.head.dtype == torch.bfloat16) == ("precision" in how)
            if len(sampled) in dies:
                raise KeyboardInterrupt
            return real(o, policy, *rest)

        monkeypatch.setattr(rl, "update", update)
        one, two = tmp_path / "one", tmp_path / "two"
        rl.main(quick(world, one, **how))
        dies.append(4)
        with pytest.raises(KeyboardInterrupt):
            rl.main(quick(world, two, **how))
        rl.main(quick(world, two, resume=True, **how))
        for n, step in enumerate((0, 1, 1), 2):
            assert torch.equal(sampled[n], sampled[step]), f"the sampler before step {step + 1}"
        same_state(two, one)
        names = torch.load(one / "trainer.pt", weights_only=True)["model"].keys()
        assert "lora_rank" not in how or all(".lora_" in name for name in names)
        folders = (world / "policy", one / "checkpoint")
        base, new = (prlm.load_decoder(folder).state_dict() for folder in folders)
        changed = {name for name, x in new.items() if (x != base[name]).any()}
        projections = {name for name in base if name.endswith("proj.weight")}
        assert changed >= projections  # in half precision a frozen base is rounded
        assert changed == projections or "precision" in how

    def test_a_broken_state_is_named(self, world, tmp_path):
        o = quick(world, tmp_path / "run", resume=True)
        rl.main(o)
        (tmp_path / "run/predictions.json").unlink()
        whole = (tmp_path / "run/trainer.pt").read_bytes()
        halves = (whole[: len(whole) // n] for n in (2, 3, 4))  # torch has two errors for them
        for broken in (*halves, b"not a state", pickle.dumps(open)):
            (tmp_path / "run/trainer.pt").write_bytes(broken)
            with pytest.raises(ValueError, match=r"trainer\.pt: "):
                rl.main(o)


class TestLook:
    def test_a_base_that_never_answers_is_stopped(self, world, tmp_path, capsys):
        write_policy(tmp_path / "mute", seed=0, answers=())
        out, how = tmp_path / "run", dict(model=str(tmp_path / "mute"), format=0.0)
        with pytest.raises(ValueError, match=r"learn nothing.*--warm-start.*--force"):
            rl.main(quick(world, out, **how))
        assert "rewards differ in 0% of groups" in capsys.readouterr().out
        rl.main(quick(world, out, **how, resume=True, force=True))
        assert steps(out) == 2


class TestOptions:
    @pytest.mark.parametrize("module", [prlm, retrieve, scoring, rl])
    def test_a_number_out_of_bounds_is_refused(self, module):
        """Every numeric option has a bound, and its default is within."""
        options = module.Options
        for field in dataclasses.fields(options):
            if field.type in (int, float, float | None):
                least = field.metadata["least"]
                for wrong in (least - 1, math.nan, math.inf):
                    with pytest.raises(ValueError, match=field.name.replace("_", "-")):
                        prlm.resolve(options, {field.name: wrong})
        prlm.resolve(options, {})
        known = {field.name for field in dataclasses.fields(rl.Options)}
        assert known >= scoring.FREE.union(*prlm.PRESETS.values())

    @pytest.mark.parametrize("changes, text", [
        ({"max_prompt_tokens": 5}, "instruction"),
        ({"encoder": None}, "--encoder DIRECTORY"), ({"k": 0}, "--k 0 or --retriever none leaves"),
        ({"retriever": "none", "judge": "ratio"}, "--k 0 or --retriever none leaves"),
        ({"model": "no/where"}, "hf download no/where"), ({"data": "no"}, "no"),
        ({"encoder": "no/bert"}, "hf download no/bert"), ({"reward_model": "no/judge"}, "no/judge"),
    ])  # fmt: skip
    def test_nothing_is_written_before_what_cannot_be(self, world, tmp_path, changes, text):
        with pytest.raises((ValueError, OSError), match=text):
            rl.main(tiny(world, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    def test_a_model_whose_files_name_no_end_is_refused(self, world, tmp_path):
        model = shutil.copytree(world / "policy", tmp_path / "policy")
        for path in model.glob("*.json"):
            content = json.loads(path.read_text().replace("<|im_", "<|xx_"))
            path.write_text(json.dumps({k: v for k, v in content.items() if "eos" not in k}))
        with pytest.raises(ValueError, match="no file names an EOS id"):
            rl.main(quick(world, tmp_path / "run", model=str(model), warm_start=1))
        assert not (tmp_path / "run").exists()
