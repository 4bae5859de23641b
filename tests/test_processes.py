"""Two processes under torchrun make the update of one, lose a peer in one line, and resume."""

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_rl import lines, tiny, without_clock
from test_stop import flags_of, steps

import prlm
import rl

ROOT, HERE = Path(__file__).parent.parent, Path(__file__).parent
NORMALIZERS = "grpo", "dapo", "dr_grpo"


def torchrun(*command, **more):
    """Two processes of `command`, with one thread each."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*start, *map(str, command)], env=environment, **pipes)


def noise_by_prompt(real):
    """`generate` with noise by prompt alone: any number of processes samples the same."""

    def generate(decoder, prompts, *how, **named):
        bound = inspect.signature(real).bind(decoder, prompts, *how, **named).arguments
        calls = (bound | {"prompts": [prompt], "seed": sum(prompt)} for prompt in prompts)
        return [real(**call)[0] for call in calls]

    return generate


def parameters_after_update(world, normalizer, share=slice(None)):
    """(parameters, log) after two updates on `share` of a fixed rollout of four prompts."""
    changes = dict(beta=0.1, updates_per_rollout=2, tokens_per_micro_batch=40, mask_truncated=True)
    o = tiny(Path(world), "unused", normalizer=normalizer, grad_clip=0.5, **changes)
    decoder, reference = (prlm.load_decoder(Path(world) / "policy") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (9, 3, 20, 6)]
    groups = prlm.generate(decoder, prompts, 3, 8, 1.0, {5, 70, 200, 258}, seed=1)
    advantages = torch.randn(4, 3, generator=generator)
    rollout = rl.Rollout([], prompts[share], groups[share], [], [], advantages[share])
    policy = rl.Policy(decoder, decoder, None, reference)
    log = rl.update(o, policy, torch.optim.SGD(decoder.parameters(), 1.0), rollout)
    return torch.cat([p.detach().flatten() for p in decoder.parameters()]), log


def parameters_after_warm_up(world):
    """(parameters, log) after one supervised step whose gradient is clipped."""
    o = tiny(Path(world), "unused", grad_clip=0.5, tokens_per_micro_batch=20)
    decoder = prlm.load_decoder(Path(world) / "policy")
    optimizer = torch.optim.SGD(decoder.parameters(), 1.0)
    prompts, targets = [[9, 3, 20, 6], [7]], [[5, 70, 258], [200, 258]]
    log = rl.supervised_step(o, rl.Policy(decoder, decoder, None), optimizer, prompts, targets)
    return torch.cat([p.detach().flatten() for p in decoder.parameters()]), log


def test_the_update_is_that_of_one_process(world, tmp_path):
    process = torchrun(__file__, "update", world, tmp_path)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    for normalizer in NORMALIZERS:
        expected, log = parameters_after_update(world, normalizer)
        for rank in range(2):
            got, found = torch.load(tmp_path / f"{normalizer}{rank}")
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
            for name, value in log.items():
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        assert log["grad_norm"] > 0.5 and log["clip_fraction"] > 0  # both acted
    expected, log = parameters_after_warm_up(world)
    for rank in range(2):
        got, found = torch.load(tmp_path / f"warm{rank}")
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        assert found == pytest.approx(log, rel=1e-4)


def test_stopped_and_killed_it_ends_like_a_run_of_one_process(world, tmp_path, monkeypatch):
    how = dict(prompts_per_step=4, steps=6, save_every=1, normalizer="dapo", batch_size=4)
    monkeypatch.setattr(prlm, "generate", noise_by_prompt(prlm.generate))
    rl.main(tiny(world, tmp_path / "one", **how))
    out = tmp_path / "two"
    command = __file__, "run", *flags_of(tiny(world, out, **how))

    process = torchrun(*command)  # asked to stop: all stop after the same step, which is saved
    while process.poll() is None and steps(out) < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode != 0 and "the same command resumes" in complaint
    done = steps(out)
    assert 1 <= done < 5 and torch.load(out / "trainer.pt")["step"] == done

    process = torchrun(*command, DIES="1 4")  # a process is lost in the fifth step
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode != 0 and printed.count(f"resuming after step {done}") == 1
    assert "error: another process of the run has ended; the same command resumes" in complaint
    assert steps(out) == 4

    process = torchrun(*command)
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert printed.count("is complete") == 1 and printed.startswith(f"{world}/policy on 2 x cpu")
    for one, two in zip(*(without_clock(tmp_path / n / "metrics.jsonl") for n in ("one", "two"))):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    keys = "step", "id", "completion", "reward", "finished", "prompt"
    one, two = (
        [[line[key] for key in keys] for line in lines(tmp_path / n / "samples.jsonl")]
        for n in ("one", "two")
    )
    assert one == two
    assert (out / "reward/pairs.json").read_bytes() == (
        tmp_path / "one/reward/pairs.json"
    ).read_bytes()
    assert prlm.read_json(out / "scores.json") == prlm.read_json(tmp_path / "one/scores.json")
    one, two = (torch.load(tmp_path / n / "trainer.pt")["model"] for n in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4), name


def test_processes_sample_different_noise(world, tmp_path):
    with pytest.raises(ValueError, match="a multiple of the 3 processes, not 4"):
        rl.check(tiny(world, tmp_path, prompts_per_step=4), 3)


def main() -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    if sys.argv[1] == "update":
        with prlm.processes():
            rank = prlm.rank_and_world_size()[0]
            for normalizer in NORMALIZERS:
                share = slice(2 * rank, 2 * rank + 2)
                found = parameters_after_update(sys.argv[2], normalizer, share)
                torch.save(found, Path(sys.argv[3]) / f"{normalizer}{rank}")
            torch.save(parameters_after_warm_up(sys.argv[2]), Path(sys.argv[3]) / f"warm{rank}")
        os._exit(0)  # as `prlm.command` leaves
    real = rl.grpo_step

    def step(o, number, *rest):
        if os.environ.get("DIES") == f"{prlm.rank_and_world_size()[0]} {number}":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(o, number, *rest)

    rl.grpo_step, prlm.generate = step, noise_by_prompt(prlm.generate)
    del sys.argv[1]
    prlm.command(rl.main, rl.Options, "")


if __name__ == "__main__":
    main()
