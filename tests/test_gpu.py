"""The script for a machine with a GPU runs to its end on one without, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_part_of_the_gpu_script_runs_in_small_on_a_cpu(tmp_path):
    script = Path(__file__).with_name("gpu.py")
    command = [sys.executable, str(script), "--dry-run", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    parts = ["right", "toy", "decode", "update", "judge", "memory", "head", "static"]
    assert [line for line in lines if "error" in line or not line.get("ok", True)] == []
    assert list(dict.fromkeys(line["part"] for line in lines)) == parts
    assert done.returncode == 0, done.stdout + done.stderr
