"""Fuzz test of surgery plans in checkpoints: no import outside the allowed packages, no code, bounded memory.

    python tests/fuzz_plans.py [--count 10000] [--seed 0]

Every second file is a checkpoint whose plan has hostile entries; the others are valid archives with one to three
faults. Restoring a model from a file must succeed or raise ValueError, or RuntimeError if weights are missing. It may
not import a module outside torch.nn and em_lightning, start a process, open a file for writing, or use two GiB.
"""

import argparse
import collections
import io
import pkgutil
import random
import resource
import sys
import tempfile
import warnings
from pathlib import Path

import fuzz_readers
import lightning
import torch
import user_models  # noqa: F401  # a module of a user, imported already
from torch import nn

from em_lightning import surgery

BYTES = 2**31
HARMLESS = ["SiLU", "GELU", "PReLU", "Linear", "LSTM", "MultiheadAttention", "Embedding", "Sequential", "BatchNorm1d"]
VALUES = [*fuzz_readers.EXTREMES, True, None, -1.5, 1e300, "", "signed", [], [3] * 5, {}, "x" * 10**5, [[[[0]]]]]
NAMES = ["num_parameters", "in_features", "out_features", "hidden_size", "input_size", "num_layers", "embed_dim"]
NAMES += ["num_heads", "num_embeddings", "embedding_dim", "num_features", "num_components", "kernel", "activation"]
NAMES += ["inplace", "dim", "seed", "__class__", "device", "dtype", "", "num_iters", "competition", "args"]


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def importable():
    """Return classes that a plan could name: of the library, torch, modules not imported yet and modules that act."""
    names = [module.name for module in pkgutil.iter_modules() if module.name not in sys.modules]
    names += [
        f"{name}.__main__" for name in ("venv", "unittest", "json.tool", "pip", "torch.distributed.run", "idlelib")
    ]
    names += [
        "em_lightning.cli.__main__",
        "em_lightning.cli.__main__.x",
        "torch.nn.utils.rnn.__main__",
        "antigravity",
        "this",
        "turtle",
        "pty",
        "lib2to3.main",
        "http.server",
    ]
    paths = [f"{name}.Module" for name in names]
    paths += ["torch._inductor", "scipy.optimize", "sklearn.svm", "sklearn.Pipeline"] * 5  # lazy attributes
    paths += ["subprocess.Popen", "os.system", "builtins.exec", "torch.load", "torch.hub.load", "runpy.run_path"]
    paths += [f"torch.nn.{name}" for name in HARMLESS] * 30 + ["em_lightning.operators.EMOperator"] * 50
    paths += ["em_lightning.surgery.refinement.SetRefinement", "em_lightning.activations.SignedActivation"] * 30
    return paths + [
        "",
        ".",
        "..x",
        "torch.nn.",
        "torch.nn.no",
        "em_lightning.no.X",
        3,
        None,
        ["torch"],
        "\x00.x",
        "é.x",
    ]


def hostile_entry(draw, paths):
    arguments = {draw.choice(NAMES): draw.choice(VALUES) for _ in range(draw.randrange(4))}
    if draw.random() < 0.2:
        arguments["kernel"] = {"class_path": draw.choice(paths), "init_args": {"args": ["true"]}}
    entry = {
        "operation": draw.choice(["replace", "insert_after", "functional"]),
        "path": draw.choice(["layers.1", "layers.3", "layers", "*", "", "layers.9", "a" * 10**4, "[", 7]),
        "class_path": draw.choice(paths),
        "init_args": arguments,
        "calls": draw.choice([None, 1, "any", 10**20, []]),
        "target": draw.choice([[], ["ReLU"], ["__class__"], ["Module"], [3], "ReLU"]),
        "by": "SwapActivations",
    }
    if draw.random() < 0.1:
        entry[draw.choice(list(entry))] = draw.choice(VALUES)
    return entry


class Watch:
    """An audit hook, active between ``start`` and ``stop``, that records what a file must not do."""

    def __init__(self):
        self.active, self.found = False, collections.Counter()
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.active:
            return
        if event == "import" and not str(arguments[0]).startswith(("torch.nn", "em_lightning")):
            self.found[f"import {arguments[0]}"] += 1
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.remove", "socket.connect", "os.rename"):
            self.found[event] += 1
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.found[f"write {arguments[0]}"] += 1


def warm_up(path):
    """Restore one valid checkpoint, and import what torch and Lightning import at the first use."""
    import encodings.cp437  # noqa: F401

    import torch._dynamo  # noqa: F401

    path.write_bytes(valid(Model()))
    surgery.restore_surgery(Model, path)


def valid(model):
    surgery.replace_modules(model, nn.ReLU, nn.SiLU)
    return saved(model, surgery.recorded_plan(model))


def saved(model, plan):
    file = io.BytesIO()
    content = {"state_dict": model.state_dict(), "em_lightning": {"surgery": plan}, "epoch": 0, "global_step": 0}
    torch.save({**content, "pytorch-lightning_version": lightning.__version__, "loops": {}}, file)
    return file.getvalue()


def fuzz(count, seed, folder, watch):
    """Restore from ``count`` hostile files; return how they ended, what they did, and the growth of memory in bytes."""
    draw, paths, path = random.Random(seed), importable(), Path(folder) / "x.ckpt"
    warm_up(path)
    good, ends = path.read_bytes(), collections.Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, limits[1]))  # ends a file that is not refused
    try:
        for number in range(count):
            if number % 2:
                path.write_bytes(
                    fuzz_readers.repacked(good, draw) if number % 8 == 1 else fuzz_readers.mutated(good, draw)
                )
            else:
                path.write_bytes(saved(Model(), [hostile_entry(draw, paths) for _ in range(draw.randrange(1, 4))]))
            watch.active = True
            try:
                surgery.restore_surgery(Model, path)
                end = "restored"
            except ValueError:
                end = "ValueError"
            except RuntimeError as error:
                end = "wrong weights" if "in loading state_dict" in str(error) else f"RuntimeError: {str(error)[:80]}"
            except Exception as error:
                end = f"{type(error).__name__}: {str(error)[:80]}"
            watch.active = False
            ends[end] += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return ends, watch.found, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ends, found, growth = fuzz(options.count, options.seed, folder, Watch())
    print(f"{options.count} files: {dict(ends)}; forbidden: {dict(found)}; memory grew by {growth / 2**20:.0f} MiB")
    sys.exit(bool(found) or bool(set(ends) - {"restored", "ValueError", "wrong weights"}) or growth > BYTES)


if __name__ == "__main__":
    main()
