"""Kill runs of the recipes with SIGKILL at random steps, resume them, and compare with uninterrupted runs.

    python benchmarks/kills.py                                   every case, 20 kills each
    python benchmarks/kills.py volume_control --kills 5
    python benchmarks/kills.py --kills 0                         no kills: compare two runs of each case

A kill comes at a random one of the steps that are left, or after training, while the report is written. Every second
kill then waits for the next write of a checkpoint. The same command is repeated until the run has ended. Then
weights must be bitwise equal, results.json equal except for measured times, and no partial file may remain. A start
counts as resumed if Lightning restored a checkpoint before training. A case with at least four kills fails if no start
resumed. Each run is a process forked from one that has imported the libraries.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Imported for speed, so that the forked runs do not import them again.
import lightning
import sklearn.mixture  # noqa: F401
import torch
import torch_geometric  # noqa: F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import em_lightning.callbacks  # noqa: F401
from em_lightning.cli import main as em_lightning_main

MIXTURE = ["--model.num_features=3", "--model.num_components=4", "--model.tol=0", "--data.num_features=3"]
MIXTURE += ["--data.num_points=6000", "--data.true_components=4", "--data.held_out_points=500"]
MIXTURE += ["--data.block_rows=700", "--trainer.max_epochs=12", "--report.components=[]"]
NO_FIGURES = "--report.figures=false"
CASES = {
    "gaussian_mixture": ["gaussian_mixture", *MIXTURE],
    "gaussian_mixture_stochastic": ["gaussian_mixture", "--config=stochastic", *MIXTURE],
    "volume_control": ["volume_control", "--trainer.max_epochs=12", NO_FIGURES],
    "decoder_free_sae": [
        *("decoder_free_sae", "--trainer.max_epochs=12", "--trainer.check_val_every_n_epoch=4", NO_FIGURES)
    ],
    "point_cloud_gmm": [
        "point_cloud_gmm",
        *("--model.num_components=4", "--model.num_starts=2", "--data.num_points=64", "--data.batch_size=4"),
        *("--data.train_clouds=32", "--data.val_clouds=8", "--data.test_clouds=8", "--trainer.max_epochs=8"),
    ],
    "amortized_clustering": [
        "amortized_clustering",
        *("--model.num_starts=2", "--model.num_iters=3", "--data.batch_size=4", "--data.train_batches=6"),
        *("--data.val_sets=16", "--data.test_sets=16", "--trainer.max_epochs=8", "--trainer.check_val_every_n_epoch=2"),
        *("--report.classical=false", "--data.held_out=50"),
    ],
    "swap_activations": ["swap_activations", "--trainer.max_epochs=12"],
    "point_cloud_classifier": [
        *("point_cloud_classifier", "--trainer.max_epochs=6", "--model.width=8", "--data.num_points=16"),
    ],
}
COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
COMMON += ["--trainer.logger.version=run", "--ckpt_path=last", "--trainer.callbacks+=__main__.RunRecorder"]


class RunRecorder(lightning.Callback):
    """Record the share of steps that are done, whether training resumed from a checkpoint, and the final weights."""

    def on_train_start(self, trainer, pl_module):
        if trainer.ckpt_path:
            with open("resumed", "a") as file:
                file.write("resumed\n")
        self.total = trainer.max_epochs * trainer.num_training_batches
        self.done = trainer.current_epoch * trainer.num_training_batches
        self.record()

    def on_train_batch_end(self, trainer, *args):
        self.done = trainer.current_epoch * trainer.num_training_batches + args[-1] + 1
        self.record()

    def record(self):
        Path("new").write_text(str(self.done / self.total))
        os.replace("new", "share")

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), "weights.pt")


def start_run(arguments, folder):
    """Start a run in a folder in a new process and return its process id."""
    for name in ("share", "weights.pt"):
        (folder / name).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = em_lightning_main(["run", *arguments, *COMMON])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def has_ended(pid, folder):
    """Return whether a run has ended; raise SystemExit if it failed."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        raise SystemExit(f"the run ended with status {status}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return bool(found)


def never():
    """Return False: the condition of a wait for the end of a run."""
    return False


def wait(pid, folder, until, deadline=float("inf"), pause=0.005):
    """Wait for a condition, a deadline or the end of a run; return whether the run is still alive."""
    while not has_ended(pid, folder):
        if until() or time.perf_counter() > deadline:
            return True
        time.sleep(pause)
    return False


def time_uninterrupted_run(case, folder):
    """Run once without interruption and return the seconds from the start of training to the end."""
    folder.mkdir()
    pid = start_run(CASES[case], folder)
    if wait(pid, folder, (folder / "share").exists):
        begin = time.perf_counter()
        wait(pid, folder, never)
        return time.perf_counter() - begin
    raise SystemExit(f"{case} did not start training:\n{(folder / 'output.txt').read_text()[-3000:]}")


def share(folder):
    """Return the share of the steps of a run that are done."""
    return float((folder / "share").read_text())


def find_partial_file(folder):
    """Return the partial file of a checkpoint that is being written, or None."""
    return next(folder.glob("lightning_logs/*/run/checkpoints/*.partial"), None)


def run_and_kill(case, folder, rng, seconds, in_writing):
    """Start or resume a run and kill it, with ``in_writing`` while it writes a checkpoint.

    Such a kill waits at most ``seconds`` for a write. Return whether the run was killed, and the partial file that it
    left, if any.
    """
    pid = start_run(CASES[case], folder)
    if not wait(pid, folder, (folder / "share").exists):
        return False, None
    target = rng.uniform(share(folder), 1.1)  # 1.1 (chosen): at least one kill in eleven comes after training
    if target > 1:  # a kill up to a second after training
        alive = wait(pid, folder, (folder / "weights.pt").exists)
        alive = alive and wait(pid, folder, never, time.perf_counter() + rng.random())
    else:
        alive = wait(pid, folder, lambda: share(folder) >= target)
    if alive and in_writing:
        deadline = time.perf_counter() + seconds
        alive = wait(pid, folder, lambda: find_partial_file(folder), deadline, pause=0.0005)  # a write is short
    if not alive:
        return False, None
    os.kill(pid, signal.SIGKILL)  # a process that ended meanwhile is not yet reaped, so the id is still its own
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status), find_partial_file(folder)


def load_results(folder):
    """Return the weights and results of a completed run."""
    unfinished = list(folder.rglob("*.partial"))
    if unfinished:
        raise SystemExit(f"the run left partial files: {unfinished}")
    (results,) = folder.rglob("results.json")
    return torch.load(folder / "weights.pt", weights_only=True), without_times(json.loads(results.read_text()))


def without_times(content):
    """Return results without measured times: entries named "seconds" or "ms..."."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key != "seconds" and key[:2] != "ms"}
        return {key: without_times(value) for key, value in kept.items()}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def differences(expected, found):
    """Return the names of the weights that differ between two runs, and of the results if they differ."""
    (expected_weights, expected_results), (weights, results) = expected, found
    names = {**expected_weights, **weights}
    differ = [name for name in names if not torch.equal(expected_weights[name], weights[name])]
    return differ + (["results.json"] if results != expected_results else [])


def digest(found):
    """Return a hash of weights and results for comparison between processes."""
    weights, results = found
    sums = hashlib.sha256(json.dumps(results, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        sums.update(name.encode() + value.numpy().tobytes())
    return sums.hexdigest()[:16]


def compare(case, kills, rng, root):
    """Kill runs of a case ``kills`` times and compare each completed run with an uninterrupted one."""
    seconds = time_uninterrupted_run(case, root / "alone")
    expected = load_results(root / "alone")
    folder = root / "killed"
    num_kills = num_partial_files = num_runs = num_resumes = 0
    while num_kills < kills or not num_runs:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        alive = True
        while alive and num_kills < kills:
            alive, left = run_and_kill(case, folder, rng, seconds, in_writing=num_kills % 2 == 1)
            num_kills += alive
            num_partial_files += left is not None
        if alive:
            wait(start_run(CASES[case], folder), folder, never)
        num_runs += 1
        if (folder / "resumed").exists():
            num_resumes += len((folder / "resumed").read_text().splitlines())
        differ = differences(expected, load_results(folder))
        if differ:
            message = f"{', '.join(differ)} differ from the uninterrupted run after {num_kills} kills; see {folder}"
            raise SystemExit(f"{case}: {message}")
    if kills >= 4 and not num_resumes:  # fewer kills may all come before the first checkpoint
        raise SystemExit(f"{case}: no run resumed from a checkpoint; every kill came before the first one was written")
    print(
        f"{case}: {num_kills} kills ({num_partial_files} while a checkpoint was written), {num_runs} runs of "
        f"{seconds:.1f} s, {num_resumes} resumes: results are bitwise equal, {digest(expected)}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    for case in options.cases or CASES:
        root = Path(tempfile.mkdtemp())
        compare(case, options.kills, rng, root)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
