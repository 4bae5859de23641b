"""A run can be stopped anywhere and ends bit-equal to one that never was."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from conftest import tiny, without_clock

import prlm
import rl
from toy import common

FORK = multiprocessing.get_context("fork")  # such a child need not load torch again
torch.optim.SGD([torch.zeros(1)])  # nor what the first optimizer imports


def forked(o, dies_at: int) -> None:
    """What `python rl.py` does; its output goes to the file {out}.log."""
    left = dies_at

    def count(event, arguments):  # of what it does to files of the run, before it is done
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            left -= str(arguments[0]).startswith(o.out + os.sep)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at:
        sys.addaudithook(count)
    # As in a new process: torchrun's launcher, in another test, leaves handlers of its own behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(f"{o.out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout, sys.stderr = (open(os.dup2(log, number), "w") for number in (1, 2))  # noqa: SIM115
    sys.argv = common.command("rl.py", vars(o))[1:]
    prlm.command(rl.main, rl.Options, "")


def start(o, dies_at: int = 0):
    process = FORK.Process(target=forked, args=(o, dies_at))
    process.start()
    return process


def finish(process) -> int:
    process.join(120)
    return process.exitcode


def steps(out) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_for(condition, process) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.005)


def state(out) -> dict:
    """Everything that a run leaves, less what a clock has measured."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    del found["config.json"]
    for name in [name for name in found if name.endswith("trainer.pt")]:
        saved = torch.load(out / name, weights_only=True)
        found[name] = saved["step"], str(saved["optimizer"])
        found |= {f"{name} {key}": x.tolist() for key, x in saved["model"].items()}
    return found | {"metrics.jsonl": without_clock(out / "metrics.jsonl")}


def same_state(out, expected) -> None:
    out, expected = state(out), state(expected)
    assert out.keys() == expected.keys()
    assert [name for name in out if out[name] != expected[name]] == []


def place(out) -> str:
    """How far a run has come."""
    marks = {"config.json": "nothing", "warm_start/model.safetensors": "warm start",
             "reward/report.json": "judge", "held_out/before.jsonl": "scores",
             "checkpoint/model.safetensors": "GRPO"}  # fmt: skip
    return next((where for file, where in marks.items() if not (out / file).is_file()), "end")


def whole(world, out, **changes):
    """Options of a run with all that a run does: about two seconds."""
    how = dict(steps=8, save_every=2, eval_every=4, warm_start=6, beta=0.1, resume=True, force=True)
    return tiny(world, out, **how | changes)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(whole(world, out))) == 0
    return out


def test_without_a_terminal_the_log_is_plain_lines(undisturbed):
    printed = (undisturbed.parent / "run.log").read_text()
    assert printed.endswith("\n") and not {"\r", "\x1b"} & {*printed}
    assert "step 8 of 8" in printed


def test_killed_anywhere_it_ends_bit_equal(world, undisturbed, tmp_path):
    """Before some operation on its files, or at some time: with SIGKILL nothing can be tidied."""
    out, rng, places = tmp_path / "run", random.Random(0), []
    o = whole(world, out)
    for n in range(14):
        process = start(o, dies_at=rng.randint(5, 20 + 5 * n) if n else 1)
        if n % 4 == 3:
            time.sleep(rng.random() / 2)
            process.kill()
        if finish(process) == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        places.append(place(out))
        with open(out / "metrics.jsonl", "a") if steps(out) else io.StringIO() as file:
            file.write('{"step": 4, "rew')  # a line cut short
    assert {*places} >= {"nothing", "warm start", "judge", "GRPO"} and len(places) > 8
    assert finish(start(o)) == 0
    same_state(out, undisturbed)


@pytest.mark.parametrize("number, reader", [(signal.SIGTERM, "alive"), (signal.SIGINT, "dead")])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(world, undisturbed, tmp_path, number, reader):
    """A reader dies first where Ctrl-C ends all of `rl.py 2>&1 | tee log`."""
    out, log = tmp_path / "run", tmp_path / "run.log"
    if reader == "dead":
        os.mkfifo(log)
    process = start(whole(world, out, save_every=50))
    with open(log) if reader == "dead" else contextlib.nullcontext():
        wait_for(lambda: steps(out) >= 2, process)
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    done = torch.load(out / "trainer.pt", weights_only=True)["step"]
    assert 2 <= done == steps(out) < 8
    if reader == "alive":
        said = log.read_text()
        assert said.endswith("stopped; the same command with --resume goes on\n")
        assert "stopping after this step" in said and "Traceback" not in said
        assert finish(start(whole(world, out))) == 0
        assert f"GRPO: on after step {done}\n" in log.read_text()
        same_state(out, undisturbed)


@pytest.mark.parametrize("slow, asked, status", [
    ("update", 2, -signal.SIGINT), ("make_judge", 1, 130),  # the second one; outside of the steps
])  # fmt: skip
def test_some_signals_end_it_at_once(world, tmp_path, monkeypatch, slow, asked, status):
    here, log = tmp_path / "here", tmp_path / "run.log"

    def nap(*_):
        here.touch()
        for _ in range(1200):  # short ones: a signal that another thread takes does not end a sleep
            time.sleep(0.05)

    monkeypatch.setattr(rl, slow, nap)
    process = start(whole(world, tmp_path / "run", warm_start=0))
    wait_for(here.is_file, process)
    for _ in range(asked):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
    process.join(20)
    assert process.exitcode == status and "Traceback" not in log.read_text()


def test_a_signal_during_the_last_save_is_obeyed(world, tmp_path, monkeypatch):
    def signalled(folder, step, *rest):
        save(folder, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    save, out = rl.save_state, tmp_path / "run"
    o = whole(world, out, steps=2, warm_start=0, personalization=0.0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(rl, "save_state", signalled)
        rl.main(o)
    assert steps(out) == 2 and not (out / "checkpoint").exists()
    rl.main(o)
    assert (out / "predictions.json").is_file()


def test_a_full_disk_is_said(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)  # it raises a RuntimeError
    with pytest.raises(ValueError, match=r"run/trainer\.pt \(a full disk\?\): Zero"):
        rl.main(whole(world, tmp_path / "run", steps=1, warm_start=0, personalization=0.0))
