"""Two processes that torchrun starts make the update of one, stop together, and resume."""

import signal
from dataclasses import replace

import pytest
import torch
from conftest import same, small_step, tiny, trained, without_clock
from test_rl import NORMALIZERS
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import prlm
import rl

torch.optim.SGD([torch.zeros(1)])  # what the first optimizer imports is imported before the fork


def torchrun(function, *arguments):
    """[what function(*arguments) returns in each of two processes], by torchrun's own code."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", monitor_interval=0.05,
    )  # fmt: skip
    found = elastic_launch(config, function)(*arguments)
    return [found[rank] for rank in range(2)]


def updates():
    """(weights, log) after two updates for each normalizer; of 3 prompts, one process has 2."""
    found = []
    with rl.processes():
        for n, normalizer in enumerate(NORMALIZERS):
            how = dict(beta=0.1, updates_per_rollout=2, tokens_per_micro_batch=40)
            step = small_step(normalizer=normalizer, mask_truncated=True, lora_rank=n, **how)
            log = rl.update(*step)
            found.append((trained(step[1]).tolist(), log))
    return found


def test_the_update_is_that_of_one_process():
    expected = updates()
    assert all(log["clip_fraction"] > 0 for _, log in expected)
    for rank, found in enumerate(torchrun(updates)):
        for normalizer, got, wanted in zip(NORMALIZERS, found, expected, strict=True):
            case = f"{normalizer}, process {rank}"
            same(torch.tensor(got[0]), torch.tensor(wanted[0]), case, 1e-5)
            same(got[1], wanted[1], case, 1e-4, 1e-7)


def test_more_processes_than_prompts(world, tmp_path):
    """One of them has no share of the step, and no gradient of its own."""
    torchrun(rl.main, tiny(world, tmp_path / "run", prompts_per_step=1, personalization=0.0))
    assert len(prlm.read_lines(tmp_path / "run/metrics.jsonl")) == 4


def test_stopped_and_resumed_they_end_like_one_process(world, tmp_path, monkeypatch, capfd):
    """One process is asked to stop; all stop after the same step, and only the first writes."""
    sample = prlm.generate

    def by_prompt(decoder, prompts, *how):  # any number of processes samples the same
        return [sample(decoder, [prompt], *how[:-1], sum(prompt))[0] for prompt in prompts]

    monkeypatch.setattr(prlm, "generate", by_prompt)
    how = dict(prompts_per_step=3, normalizer="dapo", save_every=10, warm_start=2, force=True)
    one, two = tmp_path / "one", tmp_path / "two"
    o = tiny(world, two, **how)
    rl.main(replace(o, out=str(one)))
    real, calls = rl.update, []

    def update(*arguments):
        calls.append(1)
        if prlm.world()[0] == 1 and len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    capfd.readouterr()
    with monkeypatch.context() as patch, pytest.raises(ChildFailedError):
        patch.setattr(rl, "update", update)
        torchrun(rl.main, o)
    assert len(prlm.read_lines(two / "metrics.jsonl")) == 2
    assert torch.load(two / "trainer.pt", weights_only=True)["step"] == 2
    torchrun(rl.main, replace(o, resume=True))
    assert capfd.readouterr().out.count("is complete") == 1
    logs = [without_clock(out / "metrics.jsonl") for out in (one, two)]
    same(logs[1], logs[0], "metrics.jsonl", 1e-3, 1e-5)
    samples = (prlm.read_lines(out / "samples.jsonl") for out in (one, two))
    for mine, other in zip(*samples, strict=True):
        for key in ("step", "id", "completion", "reward", "finished", "prompt"):
            assert mine[key] == other[key]
    assert prlm.read_json(one / "scores.json") == prlm.read_json(two / "scores.json")
    for name in ("reward", "warm_start", "checkpoint"):
        files = (out / name / "model.safetensors" for out in (two, one))
        same(*map(prlm.read_safetensors, files), name, 1e-3, 1e-4)
    assert (one / "reward/pairs.json").read_bytes() == (two / "reward/pairs.json").read_bytes()
