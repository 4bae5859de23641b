"""A run leaves what it promises, knows its options, can be resumed, and says what is wrong."""

import dataclasses
import math
import pickle
import shutil
import subprocess

import pytest
import torch
from conftest import write_policy
from test_rl import lines, tiny
from test_stop import command_of, same_state, steps

import eval as scoring
import prlm
import retrieve
import reward
import rl


def quick(world, out, **changes):
    """A run of two steps without a judge."""
    return tiny(world, out, **{"steps": 2, "personalization": 0.0, "eval_every": 0} | changes)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One undisturbed run with a judge."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    rl.main(tiny(world, out, beta=0.1))
    return out


def files_of(out):
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


class TestRun:
    def test_leaves_what_the_readme_promises(self, world, finished):
        assert {path.name for path in finished.iterdir()} == {
            "config.json", "look.json", "metrics.jsonl", "samples.jsonl", "scores.json",
            "predictions.json", "trainer.pt", "checkpoint", "reward", "held_out",
        }  # fmt: skip
        metrics = lines(finished / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        assert all(math.isfinite(v) for m in metrics for v in m.values())
        assert all(m["gap"] < 1e-4 for m in metrics)
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-6
        assert ["eval_rouge-l" in m for m in metrics] == [False, True, False, True]
        assert len(lines(finished / "samples.jsonl")) == 4 * 2 * 3
        scores = prlm.read_json(finished / "scores.json")
        keys = {m + s for m in scoring.METRICS for s in ("", "_sampled")}
        names = ("no_profile", "before", "after")
        assert {name: {*s} for name, s in scores.items()} == dict.fromkeys(names, keys)
        predictions = prlm.read_json(finished / "predictions.json")
        assert predictions["task"] == "LaMP_4"
        assert [gold["id"] for gold in predictions["golds"]] == [f"31{n}" for n in range(4)]
        trained = prlm.load_decoder(finished / "checkpoint")
        assert not torch.equal(trained.head, prlm.load_decoder(world / "policy").head)

    def test_metrics_are_those_of_the_glossary(self, finished):
        last = lines(finished / "metrics.jsonl")[-1].keys()
        assert {name for name in last if not name.startswith("eval_")} == {
            name for name in rl.METRICS if not name.startswith("eval_")
        }
        assert {name.removeprefix("eval_") for name in last if "eval_" in name} == {
            *scoring.METRICS
        }

    def test_the_checkpoint_opens_in_transformers(self, finished):
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
        transformers.AutoTokenizer.from_pretrained(finished / "checkpoint")
        tokens = torch.arange(40)[None]
        with torch.no_grad():
            ours = prlm.load_decoder(finished / "checkpoint")(tokens)
            assert torch.allclose(model(tokens).logits, ours, rtol=1e-4, atol=1e-5)

    def test_eval_gives_the_scores_of_the_run(self, world, finished, tmp_path):
        given = dict(run=str(finished), out=str(tmp_path / "eval"), limit=4)
        scoring.main(prlm.resolve(scoring.Options, given))
        scores = prlm.read_json(tmp_path / "eval" / "scores.json")
        after = prlm.read_json(finished / "scores.json")["after"]
        assert scores == {name: after[name] for name in scores}
        one, two = tmp_path / "eval/samples.jsonl", finished / "held_out/after.jsonl"
        assert one.read_bytes() == two.read_bytes()

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

    def test_every_option_takes_part(self, world, tmp_path):
        changes = dict(updates_per_rollout=2, normalizer="dr_grpo", clip_high=0.28, limit=2)
        changes |= dict(retriever="recency", temperature=0.7, reasoning=False, force=True)
        rl.main(quick(world, tmp_path / "run", **changes))
        samples = lines(tmp_path / "run/samples.jsonl")
        assert {s["id"] for s in samples} == {"300", "301"}
        assert all(s["completion"].startswith("<think>\n\n</think>\n\n") for s in samples)
        assert all(len(s["tokens"]) == len(s["logprobs"]) > 0 for s in samples)
        assert not (tmp_path / "run" / "reward").exists()

    def test_a_judge_of_ones_own(self, world, tmp_path):
        asked = []

        def judge(examples, answers):
            asked.extend(examples)
            return [len(answer) for answer in answers]

        rl.main(quick(world, tmp_path / "run", personalization=0.1), judge=judge)
        assert {e.id for e in asked} <= {f"30{n}" for n in range(4)} and asked[0].profile
        for row in lines(tmp_path / "run/samples.jsonl"):
            assert row["personalization"] == (len(row["answer"]) or -10.0)
        with pytest.raises(ValueError, match=r"the judge gave .*nan.* finite numbers"):
            rl.main(
                quick(world, tmp_path / "two", personalization=0.1),
                lambda _, a: [math.nan] * len(a),
            )

    def test_a_saved_reward_model_is_used(self, world, finished, tmp_path):
        o = tiny(world, tmp_path / "run", steps=1, beta=0.1, reward_model=str(finished / "reward"))
        rl.main(o)
        assert not (tmp_path / "run" / "reward" / "model.safetensors").exists()
        first = [lines(out / "metrics.jsonl")[0]["reward"] for out in (finished, tmp_path / "run")]
        assert first[0] == first[1]

    def test_what_data_says_does_not_act_on_the_terminal(self, world, tmp_path, capsys):
        shutil.copytree(world / "lamp", tmp_path / "lamp")
        for file in (tmp_path / "lamp").rglob("*.json"):
            text = file.read_text().replace('"output": "', '"output": "red \\u001b[31m \\u202e ')
            file.write_text(text.replace("following article: ", "following article: \\u001b[2J"))
        rl.main(quick(world, tmp_path / "run", data=str(tmp_path / "lamp"), warm_start=1))
        said = capsys.readouterr().out
        assert "red \ufffd[31m \ufffd" in said and not {"\x1b", "\u202e"} & {*said}


class TestDirectory:
    def test_a_result_is_not_touched_without_a_word(self, world, finished):
        before = files_of(finished)
        for changes in ({}, {"temperature": 0.5}):
            with pytest.raises(ValueError, match=r"holds a result.*--resume.*--overwrite"):
                rl.main(tiny(world, finished, beta=0.1, **changes))
        assert files_of(finished) == before

    @pytest.mark.parametrize("how", ["resume", "overwrite", "neither"])
    @pytest.mark.parametrize("what", ["thesis.txt", "config.json", "a model"])
    def test_what_is_no_run_is_never_deleted(self, world, tmp_path, how, what):
        out = tmp_path / "out"
        if what == "a model":
            shutil.copytree(world / "policy", out)
        else:
            prlm.write_text(out / what, '{"out": "mine"}')
        before = files_of(out)
        with pytest.raises(ValueError, match=str(out)):
            rl.main(tiny(world, out, **{how: True} if how != "neither" else {}))
        assert files_of(out) == before

    def test_overwrite_starts_anew(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out, steps=1))
        (out / "left.txt").touch()
        rl.main(quick(world, out, temperature=0.5, overwrite=True, force=True))
        assert steps(out) == 2 and not (out / "left.txt").exists()
        assert prlm.read_json(out / "config.json")["temperature"] == 0.5

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_resume_starts_goes_on_and_says_that_a_run_was_finished(
        self, world, tmp_path, capsys, overwrite
    ):
        """Nothing is deleted, whatever else is said or was recorded."""
        o = quick(world, tmp_path / "run", resume=True, overwrite=overwrite)
        rl.main(o)
        before = files_of(tmp_path / "run")
        assert "finished before" not in capsys.readouterr().out
        rl.main(dataclasses.replace(o, overwrite=True))
        said = capsys.readouterr().out
        assert "was finished before" in said and "after RL" in said
        before.pop(tmp_path / "run/config.json")
        after = files_of(tmp_path / "run")
        assert {path: after[path] for path in before} == before

    def test_other_options_are_named_and_refused_but_for_free_ones(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        before = files_of(out)
        with pytest.raises(ValueError, match=r"was made with --k 2, --temperature 1\.0"):
            rl.main(quick(world, out, k=1, temperature=0.5, resume=True))
        with pytest.raises(ValueError, match="was made with --steps 2"):
            rl.main(quick(world, out, steps=1, resume=True))
        assert files_of(out) == before
        free = dict(tokens_per_micro_batch=50, checkpointing=True, save_every=1, eval_every=1)
        rl.main(quick(world, out, steps=4, resume=True, **free))
        metrics = lines(out / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4] and "eval_bleu" in metrics[-1]
        assert (out / "held_out/after.jsonl").read_bytes() != before[out / "held_out/after.jsonl"]
        assert prlm.read_json(out / "config.json")["steps"] == 4

    def test_resume_takes_the_recorded_options(self, world, tmp_path):
        """On the command line: only what is given has to agree."""
        out = str(tmp_path / "run")
        prlm.write_json(tmp_path / "run/config.json", vars(quick(world, out, lr=0.5, save_every=7)))
        for given in ({}, {"lr": 0.5, "model": str(world / "policy")}):
            o = prlm.resolve(rl.Options, {"out": out, "resume": True, **given})
            assert (o.lr, o.save_every, o.steps, o.resume) == (0.5, 7, 2, True)
        for given in ({"k": 5, "steps": 9}, {"steps": 1}):
            with pytest.raises(ValueError, match="was made with --" + next(iter(given))):
                rl.main(prlm.resolve(rl.Options, {"out": out, "resume": True, **given}))

    @pytest.mark.parametrize("how", [
        {"lora_rank": 2, "beta": 0.1}, {"precision": "bfloat16", "updates_per_rollout": 2},
        {"precision": "bfloat16", "lora_rank": 2},
    ])  # fmt: skip
    def test_adapters_and_half_precision_are_resumed_bit_equal(
        self, world, tmp_path, monkeypatch, how
    ):
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
        how |= dict(steps=4)
        rl.main(quick(world, one, **how))
        dies.append(8)
        with pytest.raises(KeyboardInterrupt):
            rl.main(quick(world, two, **how))
        rl.main(quick(world, two, resume=True, **how))
        assert len(sampled) == 4 + 4 + 2
        for n, step in enumerate((0, 1, 2, 3, 2, 3), 4):
            assert torch.equal(sampled[n], sampled[step]), f"the sampler before step {step + 1}"
        same_state(two, one)
        names = torch.load(one / "trainer.pt", weights_only=True)["model"].keys()
        base, trained = (prlm.load_decoder(d) for d in (world / "policy", one / "checkpoint"))
        changed = [n for n, x in trained.state_dict().items() if (x != base.state_dict()[n]).any()]
        if how.get("lora_rank"):
            assert all(".lora_" in name for name in names)
        if how.get("lora_rank") and "precision" not in how:
            assert all(name.endswith("proj.weight") for name in changed) and len(changed) == 14
        else:  # in half precision a frozen base is rounded
            assert {*changed} >= {n for n in base.state_dict() if n.endswith("proj.weight")}
        gaps = [line["gap"] for line in lines(one / "metrics.jsonl")]
        assert all(0 < gap < (0.5 if "precision" in how else 1e-4) for gap in gaps)

    def test_a_broken_state_is_named(self, world, tmp_path):
        o = quick(world, tmp_path / "run", resume=True)
        rl.main(o)
        (tmp_path / "run/predictions.json").unlink()
        whole = (tmp_path / "run/trainer.pt").read_bytes()
        for broken in (b"", whole[: len(whole) // 2], b"not a state", pickle.dumps(open)):
            (tmp_path / "run/trainer.pt").write_bytes(broken)
            with pytest.raises(ValueError, match=r"trainer\.pt: not a state"):
                rl.main(o)


class TestLook:
    def test_a_base_that_never_answers_is_stopped(self, world, tmp_path, capsys):
        write_policy(tmp_path / "mute", seed=0, answers=())
        out, how = tmp_path / "run", dict(model=str(tmp_path / "mute"), format=0.0)
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"learn nothing.*--warm-start.*--force"):
                rl.main(quick(world, out, **how, resume=resume))
            assert "rewards differ in 0% of groups" in capsys.readouterr().out
        rl.main(quick(world, out, **how, resume=True, force=True))
        assert steps(out) == 2

    @pytest.mark.parametrize("answers, judge, spread", [
        (["one", "one", "two"], 0.1, True),  # the judge may value the two differently
        (["one", "one", "one"], 0.1, False),
        ([None, "generated title", None], 0.1, False),  # these are worth the same
        (["one", "one", "two"], 0.0, False),
    ])  # fmt: skip
    def test_spread_that_only_a_judge_would_see(
        self, world, tmp_path, monkeypatch, answers, judge, spread
    ):
        o = quick(world, tmp_path, accuracy=0.0, personalization=judge, group_size=3, force=True)
        form = "<think>\nx\n</think>\n{}".format
        texts = [form(f"{{'title': '{a}'}}" if a else "no") for a in answers]
        tokenizer = prlm.load_tokenizer(world / "policy")
        groups = [[prlm.Completion(tokenizer.encode(t), [0.0], True) for t in texts]]
        monkeypatch.setattr(prlm, "generate", lambda _, prompts, *__, **___: groups * len(prompts))
        policy = rl.Policy(None, None, tokenizer, None)
        rl.first_look(o, tmp_path, policy, retrieve.load_examples(o, "train"))
        assert prlm.read_json(tmp_path / "look.json")["groups_with_spread"] == float(spread)


class TestOptions:
    @pytest.mark.parametrize("options", [
        prlm.Options, retrieve.Options, scoring.Options, reward.Options, rl.Options,
    ])  # fmt: skip
    def test_a_number_out_of_bounds_is_refused(self, options):
        """Every numeric option has a bound, and its default is within."""
        for field in dataclasses.fields(options):
            if field.type in (int, float, float | None):
                least = field.metadata["least"]
                for wrong in (least - 1, math.nan, math.inf):
                    with pytest.raises(ValueError, match=field.name.replace("_", "-")):
                        prlm.check_options(options(**{field.name: wrong}))
        prlm.check_options(options())

    @pytest.mark.parametrize("changes, text", [
        ({"group_size": 1}, "--group-size must"), ({"max_prompt_tokens": 5}, "instruction"),
        ({"encoder": None}, "--encoder DIRECTORY"), ({"k": 0}, "--k 0 leaves none"),
        ({"retriever": "none", "judge": "ratio"}, "--retriever none leaves none"),
        ({"model": "no/where"}, "hf download no/where"), ({"data": "no"}, "no"),
    ])  # fmt: skip
    def test_what_cannot_be_is_refused_before_anything_is_written(
        self, world, tmp_path, changes, text
    ):
        with pytest.raises((ValueError, OSError), match=text):
            rl.main(tiny(world, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    def test_a_preset_comes_between_defaults_and_flags(self, world):
        def resolve(**given):
            return prlm.resolve(rl.Options, given)

        assert resolve() == rl.Options()
        for name, lr in (("toy", 1e-3), ("small", 6e-5), ("paper", 1e-6)):
            o = resolve(model=str(world / "policy"), preset=name)
            assert (o.preset, o.lr) == (name, lr) and (o.encoder is None) == (name != "toy")
            assert resolve(model=str(world / "policy"), preset=name, lr=0.25).lr == 0.25
        assert resolve(preset="paper").max_new_tokens == 768
        assert prlm.resolve(scoring.Options, {"preset": "small"}).temperature == 0.0  # greedy
        with pytest.raises(ValueError, match="--preset small is for models like"):
            resolve(model=str(world / "policy"))
        names = {field.name for field in dataclasses.fields(rl.Options)}
        assert all(preset.keys() <= names for preset in prlm.PRESETS.values())
        assert names >= prlm.FREE

    def test_the_command_fails_in_one_line(self, world, tmp_path):
        o = tiny(world, tmp_path / "run", model=str(tmp_path / "no"))
        done = subprocess.run(**command_of(o), cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
