"""A run can be stopped anywhere and ends bit-equal to one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_rl import CLOCK, tiny

import prlm
import rl

ROOT = Path(__file__).parent.parent


def flags_of(options) -> list[str]:
    """The options as they are written behind a command."""
    flags = []
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] * value
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def start(world, out, **changes):
    """`python rl.py` with the tiny settings, as a process of its own with one thread."""
    options = tiny(world, out, **dict(steps=24, save_every=3, eval_every=8) | changes)
    command = [sys.executable, str(ROOT / "rl.py"), *flags_of(options)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=one)


def finish(process):
    """(exit status, what it printed, what it complained about)."""
    out, complaint = process.communicate(timeout=300)
    return process.returncode, out.decode(), complaint.decode()


def steps(out) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_for_steps(process, out, count: int) -> None:
    while process.poll() is None and steps(out) < count:
        time.sleep(0.01)


def state(out) -> dict:
    """Everything that a run leaves, less what a clock has measured."""
    found = {}
    for name in ("scores.json", "predictions.json", "checkpoint/model.safetensors"):
        found[name] = (out / name).read_bytes()
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    trainer = torch.load(out / "trainer.pt", weights_only=True)
    found["weights"] = {name: x.tolist() for name, x in trainer["model"].items()}
    found["optimizer"] = str(trainer["optimizer"])
    return found


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    status, _, complaint = finish(start(world, out))
    assert status == 0, complaint
    return state(out)


def kill_and_resume(world, out, kills: int, seed: int) -> int:
    """Kills a run `kills` times at random moments, lets it end; how often it was still alive."""
    rng, done = random.Random(seed), 0
    while done < kills:
        process = start(world, out)
        if done < 2:  # in the first second: loading, the reward model, the first scores
            while process.poll() is None and not (out / "config.json").is_file():
                time.sleep(0.01)
        else:
            wait_for_steps(process, out, min(steps(out) + rng.randint(1, 3), 23))
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        if finish(process)[0] != -signal.SIGKILL:
            break  # it was complete before the signal came
        done += 1
        half_written = [p.name for p in out.rglob("*.json") if p.stat().st_size == 0]
        assert not half_written
    status, printed, complaint = finish(start(world, out))
    assert status == 0, complaint
    assert "complete" in printed
    return done


class TestStop:
    def test_killed_six_times_it_ends_bit_equal(self, world, undisturbed, tmp_path):
        assert kill_and_resume(world, tmp_path / "run", 6, seed=0) >= 5
        assert state(tmp_path / "run") == undisturbed
        left = [p.name for p in (tmp_path / "run").rglob("*") if p.name.endswith(".tmp")]
        assert not left

    @pytest.mark.slow
    def test_soak_thirty_kills(self, world, undisturbed, tmp_path):
        kills, round_ = 0, 0
        while kills < 30:
            kills += kill_and_resume(world, tmp_path / f"run{round_}", 8, seed=round_)
            assert state(tmp_path / f"run{round_}") == undisturbed
            round_ += 1

    @pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_asked_to_stop_it_saves_and_says_how_to_go_on(
        self, world, undisturbed, tmp_path, number, status
    ):
        out = tmp_path / "run"
        process = start(world, out)
        wait_for_steps(process, out, 4)
        process.send_signal(number)
        code, _, complaint = finish(process)
        assert code == status and "the same command" in complaint and "Traceback" not in complaint
        stopped = steps(out)
        assert torch.load(out / "trainer.pt", weights_only=True)["step"] == stopped
        code, printed, _ = finish(start(world, out))
        assert code == 0 and f"resuming after step {stopped}" in printed
        assert state(out) == undisturbed

    def test_asked_to_stop_before_the_first_step(self, world, tmp_path):
        process = start(world, tmp_path / "run", pairs_per_query=50)
        while process.poll() is None and not (tmp_path / "run" / "config.json").is_file():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code, _, complaint = finish(process)
        assert code == 130 and "the same command" in complaint and "Traceback" not in complaint

    def test_two_processes_do_not_share_a_run(self, world, tmp_path):
        first = start(world, tmp_path / "run", steps=1000)
        wait_for_steps(first, tmp_path / "run", 1)
        code, _, complaint = finish(start(world, tmp_path / "run", steps=1000))
        first.kill()
        finish(first)
        assert code == 2 and "another process" in complaint

    def test_a_directory_is_held_once(self, tmp_path):
        with prlm.alone(tmp_path / "run"):
            with pytest.raises(ValueError, match="another process"), prlm.alone(tmp_path / "run"):
                pass
            with prlm.alone(tmp_path / "other"):
                pass
        with prlm.alone(tmp_path / "run"):
            pass

    @pytest.mark.parametrize("in_loop, asked", [(False, 1), (True, 2)])
    def test_signals_wait_only_within_the_loop(self, in_loop, asked, capsys):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            stop = prlm.Stop()
            stop.in_loop = in_loop
            for _ in range(asked - 1):
                signal.raise_signal(signal.SIGTERM)
                assert stop.signal == signal.SIGTERM
            with pytest.raises(SystemExit) as left:
                signal.raise_signal(signal.SIGTERM)
            assert left.value.code == 143 and "the same command" in capsys.readouterr().err
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def test_overwrite_starts_anew(self, world, tmp_path):
        o = tiny(world, tmp_path / "run", steps=1, personalization=0.0)
        rl.main(o)
        changes = dict(personalization=0.0, overwrite=True, temperature=0.5)
        rl.main(tiny(world, tmp_path / "run", steps=2, **changes))
        assert steps(tmp_path / "run") == 2
        assert {p.name for p in tmp_path.iterdir()} == {"run", ".run.lock"}
