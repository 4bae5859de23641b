"""A result knows what made it; a run can be followed, stopped and resumed as it says."""

import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, write_policy
from test_rl import lines, tiny
from test_stop import finish, start, state, steps, wait_for_steps

import eval as scoring
import prlm
import retrieve
import reward
import rl
from toy import experiments, make, page, real

ROOT = Path(__file__).parent.parent


def quick(world, out, **changes):
    """A run of two steps without a judge."""
    return tiny(world, out, **{"steps": 2, "personalization": 0.0, "eval_every": 0} | changes)


def evaluation(world, out, **changes):
    settings = dict(
        model=str(world / "policy"), data=str(world / "lamp"), max_new_tokens=12, k=2, device="cpu",
        max_prompt_tokens=400, out=str(out),
    )  # fmt: skip
    return scoring.Options(**settings | changes)


class TestResult:
    def test_what_does_not_change_the_result_may_change(self, world, tmp_path):
        rl.main(quick(world, tmp_path / "a", steps=4))
        rl.main(quick(world, tmp_path / "b", steps=2))
        other = dict(batch_size=2, tokens_per_micro_batch=50, checkpointing=True, save_every=1)
        rl.main(quick(world, tmp_path / "b", steps=4, **other))
        metrics = lines(tmp_path / "b" / "metrics.jsonl")
        assert [line["step"] for line in metrics] == [1, 2, 3, 4]

    def test_learning_rate_and_steps_may_change_with_a_word(self, world, tmp_path, capsys):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        capsys.readouterr()
        rl.main(quick(world, out, steps=3, lr=5e-3))
        assert "lr 0.01 -> 0.005, steps 2 -> 3" in capsys.readouterr().out
        config = json.loads((out / "config.json").read_text())
        assert config["lr"] == 5e-3 and config["steps"] == 3
        assert config["changes"] == [{"lr": [0.01, 0.005], "steps": [2, 3]}]
        assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3]
        with pytest.raises(ValueError, match="3 steps already"):
            rl.main(quick(world, out, steps=1, lr=5e-3))
        rl.main(quick(world, out, steps=3, lr=1.0))  # has nothing to do
        assert json.loads((out / "config.json").read_text()) == config

    def test_other_options_code_and_inputs_are_named(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        with pytest.raises(ValueError, match=r"k 2 -> 1, temperature 1\.0 -> 0\.5"):
            rl.main(quick(world, out, k=1, temperature=0.5))
        write_policy(tmp_path / "policy", seed=1)
        with pytest.raises(ValueError, match="--model leads to other files"):
            rl.main(quick(world, out, model=str(tmp_path / "policy")))
        config = json.loads((out / "config.json").read_text())
        config["code"]["reward.py"] = "0" * 12
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"reward\.py has been edited .* another --out"):
            rl.main(quick(world, out))
        rl.main(quick(world, out, force=True))  # has nothing to do, so it mixes nothing
        assert json.loads((out / "config.json").read_text()) == config
        rl.main(quick(world, out, steps=3, force=True))
        rl.main(quick(world, out, steps=3))  # by now the record knows of the mixture
        changes = json.loads((out / "config.json").read_text())["changes"]
        assert [[*change] for change in changes] == [["reward.py"], ["steps"]] and changes[0][
            "reward.py"
        ][0] == "0" * 12

    def test_code_that_is_edited_while_it_runs_is_not_what_runs(self, world, tmp_path, monkeypatch):
        rl.main(quick(world, tmp_path / "run"))
        before = (tmp_path / "run" / "config.json").read_text()
        monkeypatch.setattr(prlm, "fingerprint", lambda *_: "0" * 12)
        prlm.adopt(quick(world, tmp_path / "run"), prlm.CHAPTERS)
        assert (tmp_path / "run" / "config.json").read_text() == before

    def test_a_path_is_a_place_not_a_spelling(self, world, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rl.main(quick(world, "run"))
        shutil.copytree(world / "policy", tmp_path / "same")
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        for out in ("run/", "./run", str(tmp_path / "run")):
            rl.main(quick(world, out, model="./same/"))
        (tmp_path / "run").rename(tmp_path / "moved")
        rl.main(quick(world, "moved"))
        assert (tmp_path / "moved" / "metrics.jsonl").read_bytes() == before

    def test_overwrite_goes_on_with_its_own_and_deletes_only_anothers(self, world, tmp_path):
        out = tmp_path / "run"
        o = quick(world, out, overwrite=True)
        rl.main(o)
        before = (out / "metrics.jsonl").stat().st_mtime_ns
        rl.main(o)
        assert (out / "metrics.jsonl").stat().st_mtime_ns == before
        rl.main(dataclasses.replace(o, temperature=0.5))
        assert (out / "metrics.jsonl").stat().st_mtime_ns > before

    def test_overwrite_deletes_no_model(self, world, tmp_path):
        shutil.copytree(world / "policy", tmp_path / "model")
        before = sorted((tmp_path / "model").iterdir())
        with pytest.raises(ValueError, match="holds no result: choose another --out"):
            scoring.main(evaluation(world, tmp_path / "model", overwrite=True))
        assert sorted((tmp_path / "model").iterdir()) == before

    def test_overwrite_deletes_no_result_of_another_command(self, world, tmp_path):
        rl.main(quick(world, tmp_path / "run", steps=1))
        with pytest.raises(ValueError, match=r"holds a result of rl\.py: choose another --out"):
            scoring.main(evaluation(world, tmp_path / "run", overwrite=True))
        assert (tmp_path / "run" / "trainer.pt").is_file()

    def test_what_a_killed_overwrite_has_left_is_deleted(self, world, tmp_path):
        left = tmp_path / ".a.overwritten.tmp"
        left.mkdir()
        (left / "trainer.pt").touch()
        scoring.main(evaluation(world, tmp_path / "a"))
        assert not left.exists()

    def test_an_overwrite_that_cannot_write_has_deleted_the_old(self, world, tmp_path, monkeypatch):
        scoring.main(evaluation(world, tmp_path / "a"))

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device", "config.json")

        with monkeypatch.context() as patch:
            patch.setattr(prlm, "write_json", full)
            with pytest.raises(OSError, match="No space left"):
                scoring.main(evaluation(world, tmp_path / "a", k=1, overwrite=True))
        assert [p.name for p in tmp_path.iterdir() if p.name != ".a.lock"] == ["a"]
        scoring.main(evaluation(world, tmp_path / "a", k=1))

    def test_a_config_of_another_program_is_not_ours(self, world, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "config.json").write_text('{"out": 1}')
        with pytest.raises(ValueError, match="holds a result of another program"):
            scoring.main(evaluation(world, tmp_path / "a", overwrite=True))

    def test_a_volume_in_a_directory_that_is_not_ours_can_be_locked(self, tmp_path, monkeypatch):
        (tmp_path / "volume").mkdir()
        monkeypatch.setattr(os, "access", lambda *_: False)
        with prlm.alone(tmp_path / "volume"):
            assert [p.name for p in tmp_path.rglob("*")] == ["volume", ".lock"]
            with (
                pytest.raises(ValueError, match="another process is working"),
                prlm.alone(tmp_path / "volume"),
            ):
                pass

    def test_a_faulty_option_does_not_claim_the_directory(self, world, tmp_path):
        with pytest.raises(ValueError, match="the bare instruction takes"):
            rl.main(quick(world, tmp_path / "run", max_prompt_tokens=5))
        rl.main(quick(world, tmp_path / "run"))

    @pytest.mark.parametrize("text", ['{"after": 1}', '{"before": {"rouge-1": 1}}'])
    def test_scores_of_another_kind_are_named(self, world, tmp_path, text):
        rl.main(quick(world, tmp_path / "run"))
        (tmp_path / "run" / "scores.json").write_text(text)
        with pytest.raises(ValueError, match=r"scores\.json: these are not the scores of a run"):
            rl.main(quick(world, tmp_path / "run"))

    def test_overwrite_deletes_nothing_that_it_needs(self, world, tmp_path):
        rl.main(quick(world, tmp_path / "run", steps=1))
        before = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
        o = quick(world, tmp_path / "run", model=str(tmp_path / "run/checkpoint"), overwrite=True)
        with pytest.raises(ValueError, match="--overwrite would delete: choose another --out"):
            rl.main(o)
        assert {path for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    def test_a_link_leads_to_the_same_directory(self, world, tmp_path):
        rl.main(quick(world, tmp_path / "run", steps=1))
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with prlm.alone(tmp_path / "run"), pytest.raises(ValueError, match="another process"):
            rl.main(quick(world, tmp_path / "link", steps=1))
        rl.main(quick(world, tmp_path / "link", steps=1, temperature=0.9, overwrite=True))
        assert (tmp_path / "link").is_symlink()
        assert prlm.read_json(tmp_path / "run/config.json")["temperature"] == 0.9

    def test_rl_goes_on_after_a_warm_start_alone(self, world, tmp_path, capsys):
        out = tmp_path / "run"
        rl.main(quick(world, out, steps=0, warm_start=1))
        rl.main(quick(world, out, steps=2, warm_start=1, force=True))
        assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2]
        assert capsys.readouterr().out.endswith("is complete\n")

    def test_fewer_steps_leave_the_scores(self, world, tmp_path):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        before = (out / "scores.json").read_bytes()
        with pytest.raises(ValueError, match="2 steps already, more than --steps 1"):
            rl.main(quick(world, out, steps=1))
        assert (out / "scores.json").read_bytes() == before

    @pytest.mark.parametrize("split", ["train", "dev"])
    def test_an_empty_split_is_a_sentence(self, world, tmp_path, split):
        shutil.copytree(world / "lamp", tmp_path / "lamp")
        folder = tmp_path / "lamp" / "LaMP_4" / split
        (folder / f"{split}_questions.json").write_text("[]")
        (folder / f"{split}_outputs.json").write_text('{"task": "LaMP_4", "golds": []}')
        with pytest.raises(ValueError, match=f"the {split} split of LaMP-4 has no records"):
            rl.main(quick(world, tmp_path / "run", data=str(tmp_path / "lamp")))

    @pytest.mark.parametrize("options, text", [
        (scoring.Options(limit=-1), "--limit must be at least 0, not -1"),
        (scoring.Options(max_new_tokens=0), "--max-new-tokens must be at least 1"),
        (scoring.Options(seed=2**64), "--seed must be below 2^62"),
        (scoring.Options(temperature=float("nan")), "--temperature must be at least 0, not nan"),
        (retrieve.Options(show=-1), "--show must be at least 0"),
        (retrieve.Options(k=-1), "--k must be at least 0"),
        (reward.Options(probe_examples=-1), "--probe-examples must be at least 0"),
        (reward.Options(negatives=0), "--negatives must be at least 1, not 0"),
        (prlm.Options(group_size=0), "--group-size must be at least 1"),
        (page.Options(steps=0), "--steps must be at least 1"),
        (real.Options(seeds=0), "--seeds must be at least 1"),
        (make.Options(threads=0), "--threads must be at least 1"),
        (experiments.Options(jobs=0), "--jobs must be at least 1"),
        (rl.Options(clip_high=-5.0), "--clip-high must be above 0, not -5"),
        (rl.Options(lr=0.0), "--lr must be above 0, not 0.0"),
    ], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
    def test_a_number_out_of_bounds_is_refused(self, options, text, monkeypatch, capsys):
        monkeypatch.setattr(prlm, "parse_options", lambda *_: (options, False))
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        with pytest.raises(SystemExit):
            prlm.command(lambda _: pytest.fail("it was not refused"), type(options), "")
        assert capsys.readouterr().err.startswith(f"error: {text}")

    def test_every_numeric_option_has_a_bound(self):
        chapters = [prlm, retrieve, scoring, reward, rl, experiments, make, page, real]
        for options in (chapter.Options for chapter in chapters):
            bounds = [b for kind in options.__mro__ for b in vars(kind).get("bounds", {}).values()]
            bound = " ".join(bounds).split()
            for field in dataclasses.fields(options):
                if field.type in (int, float, int | None, float | None):
                    assert field.name in bound, (options, field.name)

    def test_evaluations_do_not_mix(self, world, tmp_path):
        scoring.main(evaluation(world, tmp_path / "a"))
        scoring.main(evaluation(world, tmp_path / "a", batch_size=1))
        with pytest.raises(ValueError, match="k 2 -> 1"):
            scoring.main(evaluation(world, tmp_path / "a", k=1))
        scoring.main(evaluation(world, tmp_path / "a", k=1, overwrite=True))
        assert json.loads((tmp_path / "a" / "config.json").read_text())["k"] == 1
        with pytest.raises(ValueError, match=r"holds a result of eval\.py"):
            rl.main(quick(world, tmp_path / "a"))

    def test_reward_models_do_not_mix(self, world, tmp_path):
        settings = dict(
            model=str(world / "policy"), data=str(world / "lamp"), encoder=str(world / "encoder"),
            max_new_tokens=12, max_prompt_tokens=400, pairs_per_query=6, reward_epochs=1,
            device="cpu", out=str(tmp_path / "a"),
        )  # fmt: skip
        reward.main(reward.Options(**settings))
        reward.main(reward.Options(**settings))
        reward.load_reward_model(tmp_path / "a")
        with pytest.raises(ValueError, match="negatives 1 -> 2"):
            reward.main(reward.Options(**settings, negatives=2))
        write_policy(tmp_path / "other", seed=3)
        with pytest.raises(ValueError, match="--model leads to other files"):
            reward.main(reward.Options(**settings | {"model": str(tmp_path / "other")}))

    def test_comments_are_no_edit(self, tmp_path):
        for name, text in {"a": "x = 1\n", "b": "# why\nx  =  1  # so\n", "c": "x = 2\n"}.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "m.py").write_text(text)
        a, b, c = (prlm.fingerprint(tmp_path / name / "m.py") for name in "abc")
        assert a == b != c

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_eval_gives_the_scores_of_the_run(self, world, tmp_path, precision):
        rl.main(quick(world, tmp_path / "run", precision=precision))
        o = evaluation(
            world, tmp_path / "eval", precision=precision,
            model=str(tmp_path / "run" / "checkpoint"), limit=3,
        )  # fmt: skip
        scoring.main(o)
        scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
        after = json.loads((tmp_path / "run" / "scores.json").read_text())["after"]
        assert scores == {name: after[name] for name in scores}
        one, two = (tmp_path / "eval" / "samples.jsonl", tmp_path / "run/held_out/after.jsonl")
        assert one.read_bytes() == two.read_bytes()

    def test_lost_files_are_made_again_or_missed(self, world, tmp_path, capsys):
        out = tmp_path / "run"
        rl.main(quick(world, out))
        weights = (out / "checkpoint/model.safetensors").read_bytes()
        shutil.rmtree(out / "checkpoint")
        (out / "predictions.json").unlink()
        rl.main(quick(world, out))
        assert (out / "checkpoint/model.safetensors").read_bytes() == weights
        assert (out / "predictions.json").is_file()
        (out / "samples.jsonl").unlink()
        capsys.readouterr()
        rl.main(quick(world, out))
        assert "samples.jsonl" in capsys.readouterr().out.splitlines()[-1]


class TestPicture:
    def test_it_is_drawn_as_soon_as_matplotlib_is_there(self, world, tmp_path, monkeypatch, capsys):
        pytest.importorskip("matplotlib")
        out = tmp_path / "run"
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "matplotlib.figure", None)
            rl.main(quick(world, out))
        assert "needs matplotlib" in capsys.readouterr().out
        assert not (out / "reward.png").exists()
        rl.main(quick(world, out))
        assert (out / "reward.png").read_bytes().startswith(b"\x89PNG")


class TestFiles:
    def test_a_disk_that_fills_leaves_whole_lines(self, tmp_path, monkeypatch):
        path = tmp_path / "lines.jsonl"
        prlm.append(path, [{"step": 1}])
        whole = path.read_bytes()

        class Full:
            """A file that takes three bytes and then no more."""

            def __init__(self, file):
                self.file, self.room = file, 3

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, text):
                if not self.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                count = self.file.write(text[: self.room])
                self.room -= count
                return count

        real = open
        monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)))
        with pytest.raises(OSError, match=r"lines\.jsonl"):
            prlm.append(path, [{"step": 2}])
        monkeypatch.undo()
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("line, text", [
        ("[1]", "line 2 is not a JSON object"), ("3", "line 2 is not a JSON object"),
        (b"\xff", "line 2 is not valid JSON"),
    ])  # fmt: skip
    def test_a_line_that_is_no_record_is_named(self, tmp_path, line, text):
        line = line if isinstance(line, bytes) else line.encode()
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(ValueError, match=rf"metrics\.jsonl: {text}"):
            prlm.read_lines(tmp_path / "metrics.jsonl")

    def test_half_a_last_line_is_left_out(self, tmp_path):
        for end, kept in (('{"step"', [1]), ('{"step": 2}', [1, 2]), ("", [1])):
            (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
            lines = prlm.read_lines(tmp_path / "metrics.jsonl")
            assert [line["step"] for line in lines] == kept

    def test_a_line_without_a_step_is_named(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl: a line does not say its step"):
            prlm.rewind(tmp_path / "metrics.jsonl", 3)

    def test_a_line_that_is_no_json_is_named(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhalf\n{"step": 3}\n')
        for read in (prlm.read_lines, lambda path: prlm.rewind(path, 3)):
            with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not valid JSON"):
                read(tmp_path / "metrics.jsonl")

    def test_a_state_that_cannot_fit_is_not_tried(self, tmp_path, monkeypatch):
        decoder = torch.nn.Linear(1000, 1000)
        optimizer = torch.optim.AdamW(decoder.parameters())
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
        monkeypatch.setattr(torch, "save", None)
        with pytest.raises(OSError, match=r"needs 4 MB of free disk, 2 MB .*trainer\.pt"):
            rl.save_state(tmp_path / "trainer.pt", 1, decoder, optimizer)

    def test_only_a_broken_state_asks_to_be_deleted(self, tmp_path, monkeypatch):
        decoder = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(decoder.parameters())
        path = tmp_path / "trainer.pt"
        rl.save_state(path, 1, decoder, optimizer)
        full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        for error in (
            OSError(errno.EIO, "Input/output error"), torch.OutOfMemoryError("full"), full
        ):  # fmt: skip

            def fails(*_, error=error, **__):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(torch, "load", fails)
                with pytest.raises(type(error)) as found:
                    rl.load_state(path, decoder, optimizer)
            assert "delete" not in str(found.value)
        assert rl.load_state(path, decoder, optimizer) == 1

    def test_a_state_keeps_the_kind_of_adamw_that_its_device_needs(self, tmp_path):
        decoder = torch.nn.Linear(2, 2)
        saved = torch.optim.AdamW(decoder.parameters(), fused=False)  # as on a CPU
        decoder(torch.ones(1, 2)).sum().backward()
        saved.step()
        rl.save_state(tmp_path / "trainer.pt", 1, decoder, saved)
        fused = torch.optim.AdamW(decoder.parameters(), fused=True)  # as on CUDA
        assert rl.load_state(tmp_path / "trainer.pt", decoder, fused) == 1
        assert [group["fused"] for group in fused.param_groups] == [True]
        fused.step()

    @pytest.mark.parametrize("broken", ["a list", "no optimizer", "another size"])
    def test_a_state_of_another_kind_is_named(self, tmp_path, broken):
        decoder = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(decoder.parameters())
        path = tmp_path / "trainer.pt"
        rl.save_state(path, 1, decoder, optimizer)
        state = torch.load(path, weights_only=True)
        if broken == "a list":
            state = [state]
        elif broken == "no optimizer":
            state["optimizer"] = []
        else:
            state["optimizer"]["param_groups"][0]["params"].append(2)
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"trainer\.pt: not a state of this run .* delete it"):
            rl.load_state(path, decoder, optimizer)


class TestProgress:
    def test_without_a_terminal_a_line_a_minute(self, capsys, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        bar = prlm.Progress(range(5), "GRPO", total=5)
        for _ in bar:
            now[0] += 40
            bar.set_postfix(reward="0.5")
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(said) == 2 and re.match(r"GRPO: 2 of 5, 02:00 left, reward=0\.5", said[0])

    def test_a_short_loop_says_nothing(self, capsys):
        list(prlm.Progress(range(3), "quick"))
        assert capsys.readouterr() == ("", "")

    def test_ctrl_c_while_it_is_built(self, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        ignored = []  # exceptions of __del__
        monkeypatch.setattr(sys, "unraisablehook", ignored.append)
        with monkeypatch.context() as patch:
            patch.setattr(prlm.Progress, "_get_free_pos", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prlm.Progress(range(5), "GRPO")
        gc.collect()
        assert not ignored


class TestPresets:
    def parse(self, *arguments, options=rl.Options):
        return prlm.parse_options(options, "", list(arguments))[0]

    def test_the_model_chooses(self, tmp_path, monkeypatch):
        assert self.parse().preset == "toy" and self.parse().lr == 1e-3
        for hidden, preset, lr in ((576, "small", 6e-5), (1536, "paper", 1e-6)):
            prlm.write_json(tmp_path / "config.json", {"hidden_size": hidden})
            o = self.parse("--model", str(tmp_path))
            assert (o.preset, o.lr, o.encoder) == (preset, lr, None)
            assert self.parse("--model", str(tmp_path), "--lr", "1").lr == 1.0
            o = self.parse("--model", str(tmp_path), options=scoring.Options)
            assert o.max_new_tokens > 40 and o.temperature == 0.0
        assert self.parse("--preset", "paper").max_new_tokens == 768

    def test_a_broken_config_is_one_line(self, tmp_path, capsys):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(SystemExit) as ended:
            prlm.parse_options(rl.Options, "", ["--model", str(tmp_path)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert (
            said.startswith(f"error: {tmp_path}/config.json: not valid JSON")
            and len(said.splitlines()) == 1
        )

    def test_a_policy_trained_from_the_toy_is_a_toy(self, tmp_path):
        policy = prlm.load_decoder(prlm.beside("toy/policy"))
        prlm.save_decoder(policy, prlm.load_tokenizer(prlm.beside("toy/policy")), tmp_path)
        assert self.parse("--model", str(tmp_path)).preset == "toy"

    def test_an_encoder_has_to_be_named(self, world, tmp_path):
        o = dataclasses.replace(tiny(world, tmp_path / "run"), encoder=None)
        with pytest.raises(ValueError, match="--encoder DIRECTORY"):
            rl.main(o)
        assert not (tmp_path / "run").exists()
        rl.main(quick(world, tmp_path / "run", encoder=None))  # no judge: no encoder either

    @pytest.mark.parametrize("module", ["rl.py", "eval.py", "reward.py", "retrieve.py"])
    def test_the_toy_is_found_from_anywhere(self, module, tmp_path):
        command = [sys.executable, str(ROOT / module), "--help"]
        how = dict(capture_output=True, text=True, env=os.environ | {"COLUMNS": "500"})
        done = subprocess.run(command, cwd=tmp_path, **how)
        found = re.search(r"checkpoint directory of the policy \(default: (\S+)\)", done.stdout)
        assert (tmp_path / found[1] / "config.json").is_file()


class TestLook:
    def test_a_base_that_never_answers_is_stopped(self, world, tmp_path, capsys):
        write_policy(tmp_path / "mute", seed=0, answers=())
        o = quick(world, tmp_path / "run", model=str(tmp_path / "mute"), format=0.0)
        with pytest.raises(ValueError, match="--warm-start 125") as found:
            rl.main(o)
        assert "--force" in str(found.value) and "0% of groups have" in capsys.readouterr().out
        rl.main(dataclasses.replace(o, force=True))
        assert steps(tmp_path / "run") == 2

    def test_the_way_out_works(self, world, tmp_path, capsys):
        write_policy(tmp_path / "mute", seed=0, answers=())
        same = dict(max_new_tokens=80, reasoning=False, model=str(tmp_path / "mute"), format=0.0)
        with pytest.raises(ValueError, match="each with --overwrite: --warm-start 125"):
            rl.main(quick(world, tmp_path / "run", **same))
        changes = dict(warm_start=200, warm_start_lr=1e-2, overwrite=True)
        rl.main(quick(world, tmp_path / "run", **same, **changes))
        said = capsys.readouterr().out
        assert "warm start: loss" in said
        look = json.loads((tmp_path / "run" / "look.json").read_text())
        assert look["answered"] > 0.5 and look["groups_with_spread"] > 0.1

    @pytest.mark.parametrize("answers, judge, spread", [
        (["one", "one", "two"], 0.1, True),  # the judge may value the two differently
        (["one", "one", None], 0.1, True),  # and an answer differently from none
        (["one", "one", "one"], 0.1, False),
        ([None, "generated title", None], 0.1, False),  # these are worth the same
        (["one", "one", "two"], 0.0, False),
    ])  # fmt: skip
    def test_spread_that_only_a_judge_would_see(self, world, monkeypatch, answers, judge, spread):
        o = quick(world, "unused", accuracy=0.0, personalization=judge, group_size=3)
        form = "<think>\nx\n</think>\n{}".format
        texts = [form(f"{{'title': '{a}'}}" if a else "no") for a in answers]
        tokenizer = prlm.load_tokenizer(world / "policy")
        groups = [[prlm.Completion(tokenizer.encode(t), [0.0], True) for t in texts]]
        monkeypatch.setattr(prlm, "generate", lambda _, prompts, **__: groups * len(prompts))
        examples = retrieve.load_lamp(world / "lamp", "LaMP-4", "train")
        policy = rl.Policy(None, None, tokenizer)
        assert rl.look(o, policy, examples)["groups_with_spread"] == float(spread)


class TestWarmStart:
    def test_targets(self, world):
        o = quick(world, "unused")
        tokenizer = prlm.load_tokenizer(world / "policy")
        examples = retrieve.load_lamp(world / "lamp", "LaMP-4", "train")
        for changes in ({}, {"k": 0}, {"reasoning": False}):
            asked = dataclasses.replace(o, **changes)
            for example, ids in zip(examples, rl.warm_start_targets(asked, tokenizer, examples)):
                title = retrieve.retrieve(example, 1)[0]["title"]
                thought = "" if changes else f"The user wrote: {title}"[: 16 + rl.EVIDENCE_TOKENS]
                text = f"<answer>\n{{'title': '{example.target}'}}\n</answer>"
                if asked.reasoning:
                    text = f"<think>\n{thought}\n</think>\n{text}"
                assert tokenizer.decode(ids[:-1]) == text and ids[-1] == 258

    def test_a_loss_that_is_no_number_is_a_sentence(self, world, tmp_path, monkeypatch):
        def breaks(*_):
            raise FloatingPointError("the loss is nan")

        monkeypatch.setattr(rl, "optimizer_step", breaks)
        with pytest.raises(ValueError, match=r"warm start, step 1: .* lower --warm-start-lr"):
            rl.main(quick(world, tmp_path / "run", warm_start=2))

    @pytest.mark.parametrize("names, end", [
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (("<|end_of_text|>", "<|eot_id|>"), "<|eot_id|>"),
        (("</s>",), "</s>"),
    ])  # fmt: skip
    def test_an_answer_ends_as_the_chat_ends_a_turn(self, names, end):
        backend = byte_tokenizer(names)
        tokenizer = prlm.Tokenizer(backend, {backend.token_to_id(name) for name in names})
        assert tokenizer.end_id == backend.token_to_id(end)

    def test_killed_in_the_middle_it_ends_bit_equal(self, world, tmp_path):
        how = dict(warm_start=12, save_every=3, steps=3, personalization=0.0, force=True)
        status, _, complaint = finish(start(world, tmp_path / "whole", **how))
        assert status == 0, complaint
        out = tmp_path / "killed"
        process = start(world, out, **how)
        wait_for_steps(process, out / "warm_start", 7)
        process.send_signal(signal.SIGKILL)
        finish(process)
        assert 6 <= torch.load(out / "warm_start" / "trainer.pt", weights_only=True)["step"] < 12
        process = start(world, out, **how)
        wait_for_steps(process, out / "warm_start", 10)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130
        status, _, complaint = finish(start(world, out, **how))
        assert status == 0, complaint
        assert state(out) == state(tmp_path / "whole")
        left = out / "warm_start/trainer.pt"
        left.touch()  # as if the process had been killed just before it deleted this
        rl.main(quick(world, out, **how | {"steps": 4}))
        assert not left.exists()
        one, two = (p / "warm_start/model.safetensors" for p in (out, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()

    def test_half_a_batch_at_a_time_is_the_same_step(self, world):
        """Cross-entropy over the tokens of all rows, whatever the micro-batches."""
        prompts, targets = [[5, 6, 7], [9], [4, 4]], [[1, 2], [3, 8, 258], [258]]
        found = []
        for budget in (1, 100):
            o = quick(world, "unused", tokens_per_micro_batch=budget, grad_clip=1e9)
            policy = rl.make_policy(o, o.model, "cpu")
            optimizer = torch.optim.SGD(policy.decoder.parameters(), 0.0)
            log = rl.supervised_step(o, policy, optimizer, prompts, targets)
            nats = 0.0
            for prompt, target in zip(prompts, targets):
                logits = policy.decoder(torch.tensor([prompt + target]))[0, len(prompt) - 1 : -1]
                limit = policy.decoder.vocab_limit
                nats -= logits[:, :limit].log_softmax(-1)[range(len(target)), target].sum().item()
            assert log["loss"] == pytest.approx(nats / 6, rel=1e-4)
            found.append(log)
        assert found[0] == pytest.approx(found[1], rel=1e-4)


class TestLoRA:
    def test_it_trains_adapters_stops_and_goes_on(self, world, tmp_path):
        how = dict(lora_rank=2, beta=0.1, steps=6, save_every=2, personalization=0.0)
        status, _, complaint = finish(start(world, tmp_path / "whole", **how))
        assert status == 0, complaint
        out = tmp_path / "stopped"
        process = start(world, out, **how)
        wait_for_steps(process, out, 3)
        process.send_signal(signal.SIGKILL)
        finish(process)
        finish(start(world, out, **how))
        assert state(out) == state(tmp_path / "whole")
        saved = torch.load(out / "trainer.pt", weights_only=True)["model"]
        assert saved and all(name.endswith((".A", ".B")) for name in saved)
        base, trained = (prlm.load_decoder(p) for p in (world / "policy", out / "checkpoint"))
        assert torch.equal(base.head, trained.head)
        assert not torch.equal(base.layers[0].qkv.weight, trained.layers[0].qkv.weight)
        metrics = lines(out / "metrics.jsonl")
        assert metrics[0]["kl"] == 0 < metrics[-1]["kl"] and metrics[-1]["gap"] < 1e-4

    def test_the_judge_reads_without_the_adapters(self, world, tmp_path):
        o = quick(world, tmp_path / "run", lora_rank=2, judge="ratio", personalization=1.0)
        policy = rl.make_policy(o, o.model, "cpu")
        example = retrieve.load_lamp(world / "lamp", "LaMP-4", "train")[0]
        judge = rl.obtain_judge(o, tmp_path, policy, [example])
        before = judge([example], ["tennis wins"])
        for name, parameter in policy.decoder.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter)
        assert judge([example], ["tennis wins"]) == before


class TestStopping:
    @pytest.mark.parametrize("warm_start, done", [(0, 2), (1, 0)])
    def test_a_signal_during_the_last_save_is_obeyed(
        self, world, tmp_path, monkeypatch, warm_start, done
    ):
        save = rl.save_state

        def signalled(path, step, *rest):
            save(path, step, *rest)
            if step == (warm_start or 2):
                signal.raise_signal(signal.SIGTERM)

        o = quick(world, tmp_path / "run", steps=2, warm_start=warm_start, force=True)
        with monkeypatch.context() as patch:
            patch.setattr(rl, "save_state", signalled)
            with pytest.raises(SystemExit) as left:
                rl.main(o)
        assert left.value.code == 143 and steps(tmp_path / "run") == done
        assert not (tmp_path / "run" / "checkpoint").exists()
        rl.main(o)
        assert (tmp_path / "run" / "checkpoint").exists()

    def test_what_data_says_does_not_act_on_the_terminal(self, world, tmp_path, capsys):
        shutil.copytree(world / "lamp", tmp_path / "lamp")
        for file in (tmp_path / "lamp").rglob("*_outputs.json"):
            content = json.loads(file.read_text())
            for gold in content["golds"]:
                gold["output"] = "red \x1b[31m \x07 \u202e end"
            file.write_text(json.dumps(content))
        for file in (tmp_path / "lamp").rglob("*_questions.json"):
            file.write_text(file.read_text().replace("headline for the following article: ",
                            "headline for the following article: \\u001b[2J"))  # fmt: skip
        rl.main(quick(world, tmp_path / "run", data=str(tmp_path / "lamp"), warm_start=1))
        paths = dict(data=str(tmp_path / "lamp"), model=str(world / "policy"))
        retrieve.main(retrieve.Options(**paths, split="train", show=2))
        said = capsys.readouterr().out
        assert "red \u241b[31m \u2407 \ufffd end" in said and "\u241b[2J" in said
        assert not {"\x1b", "\x07", "\u202e"} & {*said}

    def test_it_survives_a_closed_output(self, world, tmp_path):
        """As with `2>&1 | tee log`, where Ctrl-C ends tee first."""
        out = tmp_path / "run"
        process = start(world, out, steps=400)
        wait_for_steps(process, out, 2)
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert torch.load(out / "trainer.pt", weights_only=True)["step"] == steps(out) < 400

    @pytest.mark.skipif(os.name != "posix", reason="a shell's way to close a stream")
    def test_it_may_be_started_without_an_output(self, world):
        command = f"{sys.executable} {ROOT}/prlm.py --model {world}/policy --max-new-tokens 2 >&-"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""

    def test_advice_after_a_number_gone_wrong_can_be_followed(self, world, tmp_path, monkeypatch):
        out, real = tmp_path / "run", rl.update
        calls = []

        def breaks(*a, **k):
            calls.append(1)
            if len(calls) == 4:
                raise FloatingPointError("the loss is nan")
            return real(*a, **k)

        monkeypatch.setattr(rl, "update", breaks)
        o = quick(world, out, steps=4, save_every=1)
        with pytest.raises(ValueError, match="the same command with a lower --lr resumes"):
            rl.main(o)
        rl.main(dataclasses.replace(o, lr=1e-3))
        assert steps(out) == 4

    @pytest.mark.parametrize("options", [rl.Options, reward.Options, scoring.Options, prlm.Options])
    def test_advice_on_memory_names_flags_that_the_command_has_and_that_may_change(self, options):
        for flag in re.findall(r"--[\w-]+", prlm.advice_on_memory(options)):
            name = flag[2:].replace("-", "_")
            assert hasattr(options, name) and name in options.free

    @pytest.mark.parametrize("error", [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
        RuntimeError("MPS backend out of memory (allocated: 9 GB)"),
    ])  # fmt: skip
    def test_any_full_memory_gets_that_advice(self, error, monkeypatch, capsys):
        def full(_):
            raise error

        monkeypatch.setattr(sys, "argv", ["eval.py"])
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        with pytest.raises(SystemExit) as ended:
            prlm.command(full, scoring.Options, "")
        assert ended.value.code == 2
        assert capsys.readouterr().err == "error: out of memory: lower --batch-size\n"

    def test_a_device_without_numbers_is_refused(self):
        for name in ("meta", "cuda:77", "tpu"):
            with pytest.raises(ValueError, match=f"--device {name}: this machine"):
                prlm.pick_device(name)

    def test_a_judge_that_gives_no_number_is_to_blame(self, world, tmp_path):
        def judge(examples, answers):
            return [float("nan")] * len(answers)

        with pytest.raises(ValueError, match=r"the judge's values .* '30\d': nan") as found:
            rl.main(quick(world, tmp_path / "run", personalization=0.1), judge=judge)
        assert "--lr" not in str(found.value)

    def test_ten_steps_without_spread_are_worth_a_warning(self):
        said = []

        class Bar:
            write = said.append

        line = {"zero_spread_groups": 1.0, "truncated": 0.5}
        for count in range(1, 21):
            rl.warn_if_stuck([line] * count, Bar)
        rl.warn_if_stuck([line] * 9 + [line | {"zero_spread_groups": 0.9}], Bar)
        assert len(said) == 2 and all("--temperature" in text for text in said)
        rl.warn_if_stuck([line | {"truncated": 1.0, "zero_spread_groups": 0}] * 10, Bar)
        assert "--max-new-tokens" in said[2]

    def test_threads_that_wait_sleep_unless_told_otherwise(self):
        code = "import os, sys; sys.argv = ['rl.py']; import prlm; print(os.environ[NAME])"
        code = code.replace("NAME", "'OMP_WAIT_POLICY'")
        for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
            env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
            run = [sys.executable, "-c", code]
            done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=env)
            assert done.stdout.strip() == expected

    def test_ctrl_c_while_torch_is_loaded_ends_without_a_traceback(self):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "rl.py"), "--help"], stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        )  # fmt: skip
        said = b""
        while b"torch" not in said:  # the import is under way
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read() and process.wait(60) != 0
