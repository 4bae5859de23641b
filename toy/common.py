"""What experiments.py and real.py share: commands as jobs, tables, how sure a difference is."""

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import prlm
from eval import FREE

ROOT = Path(prlm.__file__).parent

# ---- Commands as jobs ------------------------------------------------------------------------


def command(script: str, options: dict) -> list[str]:
    """The words that run a script of this project with these options; None is left out."""
    words = ["python", script]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def training(out: Path, options: dict, script: str = "rl.py") -> tuple[list[str], Path]:
    """(a run of rl.py, the file that it leaves); ValueError if other options made that file."""
    done = out / "predictions.json"
    recorded = prlm.read_json(out / "config.json") if done.is_file() else options
    for name in {*options} - FREE | {"steps"}:
        if recorded.get(name) != options[name]:
            made = f"{out} was made with {name} {recorded.get(name)}, not {options[name]}"
            raise ValueError(f"{made}: choose another --out")
    return command(script, {**options, "out": out, "resume": True}), done


def start(words: list[str], log: Path) -> subprocess.Popen:
    """The command as a process of one thread, which Ctrl-C does not reach; its output is logged."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    with open(log, "a") as file:
        how = {"stdout": file, "stderr": file, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        return subprocess.Popen(words, start_new_session=True, **how)


def run_jobs(work: dict, jobs: int, logs: Path) -> None:
    """Runs {job: [(command, the file that it leaves)]}, `jobs` jobs at a time; a job's commands
    one after the other, those left out whose file is there. A finished run's saved state, three
    times as large as the model, is deleted. ValueError for what failed, a line each, and after
    Ctrl-C or SIGTERM, which end the processes: rl.py saves first."""
    running = {}

    def run(job) -> str:
        """What failed, or ""."""
        for words, result in work[job]:
            if result.is_file():
                continue
            tqdm.write(shlex.join(words))
            log = logs / f"{job.replace(' ', '_')}.txt"
            running[job] = process = start(words, log)
            status = process.wait()
            if status or not result.is_file():
                return f"{job}: {words[1]} ended with status {status}, see {log}"
            for file in result.parent.rglob("trainer.pt"):
                file.unlink()
        return ""

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, job) for job in work]
        try:
            said = [future.result() for future in tqdm(futures, "jobs", disable=None)]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running.values()]:
                process.terminate()
            raise ValueError("stopped; the same command goes on") from None
    if failed := [text for text in said if text]:
        raise ValueError("\n".join(failed))


# ---- Tables, and how sure a difference is ----------------------------------------------------


def bootstrap(difference, draws=10_000) -> dict[str, tuple[float, float, float]]:
    """{what is redrawn: (p, low, high)} of the mean over seeds of paired differences [seeds, users]
    or [users]; NaN does not count, and no seed may be all NaN.

    "users": a paired bootstrap, the policies stay: what other users would say of them. "seeds", if
    there are several: Student's t of their means, users stay: what other trainings would give.
    "both": the two deviations added, draw by draw. p is two-sided, the interval 95 %."""
    difference, rng = np.atleast_2d(difference), np.random.default_rng(0)
    (S, N), by_seed = difference.shape, np.nanmean(difference, 1)
    mean, users = by_seed.mean(), rng.integers(0, N, (draws, N))
    drawn = {"users": np.mean([np.nanmean(row[users], 1) for row in difference], 0)}  # [draws]
    if S > 1:
        error = by_seed.std(ddof=1) / S**0.5
        drawn["seeds"] = mean + error * rng.standard_t(S - 1, draws)
        drawn["both"] = drawn["users"] + drawn["seeds"] - mean
    result = {}
    for unit, means in drawn.items():
        tail = min((means <= 0).sum(), (means >= 0).sum()) + 1
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        result[unit] = min(1.0, 2 * tail / (draws + 1)), low, high
    return result


def markdown(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def mean(seeds) -> str:
    """The mean of seeds, each a number or one for each user (NaN: none), ± their deviation."""
    means = [np.nanmean(row) for row in seeds if not np.isnan(row).all()]
    deviation = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{deviation}" if means else "–"


def picture(path: Path, size: tuple[float, float], draw) -> str:
    """Markdown of what draw(figure) makes, inches `size`, saved as `path`; or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(no picture: matplotlib is not installed)\n"
    draw(figure := Figure(size, layout="constrained"))
    figure.savefig(path, dpi=110)
    return f"![]({path.name})\n"


DIFFERENCE = ["difference", "over users, 95 %", "over seeds, 95 %", "over both, 95 %"]


def difference_cells(difference) -> list[str]:
    """The cells of these columns; seeds and users without a value (NaN) are left out."""
    difference = np.atleast_2d(difference)
    for axis in (0, 1):
        difference = difference.compress(~np.isnan(difference).all(axis), 1 - axis)
    if difference.size == 0:
        return ["–"] * 4
    found = bootstrap(difference)
    said = {u: f"{low:+.3f} … {high:+.3f}, p {p:.4f}" for u, (p, low, high) in found.items()}
    middle = np.nanmean(difference, 1).mean()
    return [f"{middle:+.3f}", *(said.get(u, "") for u in ("users", "seeds", "both"))]
