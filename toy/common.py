"""What the scripts of toy/ share: commands as jobs, tables, and how sure a difference is."""

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm

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


def is_done(out: Path, options: dict) -> bool:
    """Whether a run of rl.py with these options is finished; ValueError if others made it."""
    if not (out / "predictions.json").is_file():
        return False
    recorded = prlm.read_json(out / "config.json")
    for name in {*options} - prlm.FREE | {"steps"}:
        if recorded.get(name) != options[name]:
            made = f"{out} was made with {name} {recorded.get(name)}, not {options[name]}"
            raise ValueError(f"{made}: choose another --out")
    return True


def start(words: list[str], log: Path) -> subprocess.Popen:
    """The command as a process of one thread, which Ctrl-C does not reach; its output is logged."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    with open(log, "a") as file:
        how = {"stdout": file, "stderr": file, "env": os.environ | threads}
        return subprocess.Popen(words, start_new_session=True, **how)


def run_jobs(work: dict, jobs: int, logs: Path, needs: dict | None = None) -> list[str]:
    """Runs {job: [(command, the file that it leaves)]}, `jobs` jobs at a time; a job's commands
    one after the other, those left out whose file is there. A finished run's saved state is
    deleted: it is three times as large as the model.

    `needs` names the job that must be done before, which stands further up. Returns what failed, a
    sentence each. Ctrl-C and SIGTERM end the commands, which save their state; then ValueError.
    """
    needs, failed, running, stopped, futures = needs or {}, [], {}, [], {}

    def stop(*_) -> None:
        stopped.append(True)
        for process in [*running.values()]:
            process.terminate()

    def run(job) -> bool:
        if job in needs and not futures[needs[job]].result():
            failed.append(f"{job}: {needs[job]} is missing")
            return False
        for words, result in work[job]:
            if stopped:
                return False
            if result.is_file():
                continue
            tqdm.write(shlex.join(words))
            log = logs / f"{job.replace(' ', '_')}.txt"
            running[job] = process = start(words, log)
            if stopped:  # just before
                process.terminate()
            status = process.wait()
            if status or not result.is_file():
                failed.append(f"{job}: {words[1]} ended with status {status}, see {log}")
                return False
            for file in result.parent.rglob("trainer.pt"):
                file.unlink()
        return True

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for job in work:  # one by one, since a job looks for the future that it needs
                futures[job] = pool.submit(run, job)
            for future in tqdm(futures.values(), "jobs", disable=None):
                future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise ValueError("stopped; the same command goes on")
    return failed


# ---- How sure a difference is ----------------------------------------------------------------


def bootstrap(ours, theirs, draws=10_000) -> dict[str, tuple[float, float, float]]:
    """{what is redrawn: (p, low, high)} of mean(ours - theirs), arrays [seeds, users], paired.

    "users": users are redrawn, the trained policies stay: what other users would say of them. A
    paired bootstrap. "seeds": Student's t of the seeds' means, users stay: what other trainings
    would give. (A bootstrap of three values would hardly be wider than the values.) "both": the two
    deviations added, draw by draw. One seed: "users" alone. p is two-sided, the interval 95 %.
    """
    difference = np.atleast_2d(ours) - np.atleast_2d(theirs)  # [S, N]; one side may have one seed
    (S, N), rng, mean = difference.shape, np.random.default_rng(0), difference.mean()
    drawn = {"users": difference.mean(0)[rng.integers(0, N, (draws, N))].mean(1)}  # [draws]
    if S > 1:
        error = difference.mean(1).std(ddof=1) / S**0.5
        drawn["seeds"] = mean + error * rng.standard_t(S - 1, draws)
        drawn["both"] = drawn["users"] + drawn["seeds"] - mean
    result = {}
    for unit, means in drawn.items():
        tail = min((means <= 0).sum(), (means >= 0).sum()) + 1
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        result[unit] = min(1.0, 2 * tail / (draws + 1)), low, high
    return result


# ---- Tables and pictures ---------------------------------------------------------------------


def markdown(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def mean(seeds) -> str:
    """The mean of seeds, each a number or one for each user, ± the deviation between them.

    NaN is a user of whom a metric says nothing.
    """
    rows = [np.ravel(row) for row in seeds]
    means = [row[~np.isnan(row)].mean() for row in rows if not np.isnan(row).all()]
    deviation = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{deviation}" if means else "–"


AGAINST = ["difference", "over users, 95 %", "over seeds, 95 %", "over both, 95 %"]


def against(ours, theirs) -> list[str]:
    """The cells of these columns of a table; NaN is a seed or a user that does not count."""
    difference = np.atleast_2d(ours) - np.atleast_2d(theirs)
    difference = difference[:, ~np.isnan(difference).all(0)]
    difference = difference[~np.isnan(difference).any(1)]
    if difference.size == 0:
        return ["–"] * 4
    found = bootstrap(difference, 0)
    cells = {u: f"{low:+.3f} … {high:+.3f}, p {p:.4f}" for u, (p, low, high) in found.items()}
    return [f"{difference.mean():+.3f}", *(cells.get(u, "") for u in ("users", "seeds", "both"))]


def picture(draw, path: Path, *arguments) -> str:
    """Draws into a figure of matplotlib and returns its Markdown, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(no picture: matplotlib is not installed)\n"
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    draw(figure, *arguments)
    figure.savefig(path, dpi=110)
    return f"![]({path.name})\n"
