"""Malformed or malicious checkpoints, configs and meshes: they are read or raise a clear error, and run no code."""

import os
import resource
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import fuzz_readers
import lightning
import pytest
import torch
from torch import nn

import em_lightning
from em_lightning import ACTIVATIONS, KERNELS, cli, surgery
from em_lightning.checkpoints import read_checkpoint
from em_lightning.cli.recipes import read_config
from em_lightning.modules import PointCloudGMM

RAN = []


def run_something(*_, **__):
    RAN.append(True)
    return nn.Identity()


class Runs:
    """Not a module: if it is built, a file has run code."""

    def __init__(self, **_):
        run_something()


class RunsWhenLoaded:
    def __reduce__(self):
        return (run_something, ())


@pytest.fixture(autouse=True)
def nothing_runs():
    RAN.clear()
    yield
    assert not RAN


@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_mutated_files_are_read_or_raise_a_documented_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends, _, _ = fuzz_readers.fuzz(name, 10 if name == "config" else 100, tmp_path, seed=1)
    assert set(ends) <= {"ValueError", "read"} and ends["ValueError"] > 5, ends


# Checkpoints.


def saved(path, content):
    torch.save(content, path)
    return path


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def flipped(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((64,), 2.0).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    return path


DAMAGED = {
    "pickle": (
        lambda p: saved(p, {"hyper_parameters": {"network": RunsWhenLoaded()}}),
        "classes that could run code",
    ),
    "list": (lambda p: saved(p, [1, 2]), "list"),
    "text": (lambda p: p.write_text("no archive"), "10 bytes"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "cut": (lambda p: p.write_bytes(saved(p, {"w": torch.ones(99)}).read_bytes()[:-30]), "not a zip"),
    "flipped": (
        lambda p: flipped(saved(p, {"w": torch.full((64,), 2.0)})),
        "CRC.*'bad/data/0'",
    ),
    "bomb": (
        lambda p: rewritten(saved(p, {"w": torch.zeros(10**5)}), lambda m: None, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "short": (
        lambda p: rewritten(saved(p, {"w": torch.zeros(9)}), lambda m: m.update({"bad/data/0": b"1234"})),
        "record|storage|size",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint_raises_with_its_name_and_runs_no_code(name, tmp_path):
    make, words = DAMAGED[name]
    path = tmp_path / "bad.ckpt"
    make(path)
    with pytest.raises(ValueError, match=f"bad.ckpt: invalid checkpoint .*({words})") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="bad.ckpt: invalid checkpoint"):
        surgery.read_plan(path)
    with pytest.raises(ValueError, match="bad.ckpt: invalid checkpoint"):
        surgery.restore_surgery(lightning.LightningModule, path)
    with pytest.raises(ValueError, match="bad.ckpt: invalid checkpoint"):
        PointCloudGMM.load_from_checkpoint(path)


def test_flipped_bit_in_a_checkpoint_raises(tmp_path):
    module = PointCloudGMM(2, num_iters=1)
    with torch.no_grad():
        module.operator.correction.describe[0].weight.fill_(2.0)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert PointCloudGMM.load_from_checkpoint(tmp_path / "bad.ckpt").operator.num_iters == 1
    flipped(tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="bad.ckpt: invalid checkpoint .*CRC"):
        PointCloudGMM.load_from_checkpoint(tmp_path / "bad.ckpt")


def test_missing_checkpoint_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt"):
        read_checkpoint(tmp_path / "gone.ckpt")


def entry(**changes):
    kept = {"operation": "replace", "path": "1", "class_path": "torch.nn.modules.activation.SiLU", "init_args": {}}
    return {**kept, "calls": None, "target": [], "by": "them", **changes}


def test_plan_of_a_checkpoint_builds_only_modules(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    swapped = model()
    surgery.apply_plan(swapped, [entry()])
    assert isinstance(swapped[1], nn.SiLU)
    for path in (
        f"{__name__}.Runs",
        f"{__name__}.run_something",
        "subprocess.Popen",
        "builtins.exec",
        "nowhere.X",
        ".x",
    ):
        with pytest.raises(
            ValueError, match=f"class_path='{path}' (is (no|in a module not imported)|cannot be imported)"
        ):
            surgery.apply_plan(model(), [entry(class_path=path)])


def test_a_plan_runs_no_command_and_no_lazy_import(monkeypatch):
    """Importing a submodule imports its parents, and a module may import others when an attribute is read."""
    monkeypatch.setattr(em_lightning.cli, "main", lambda: pytest.fail("a plan ran the command line"))
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: pytest.fail("a plan made a module import another one")
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    for path in ("em_lightning.cli.__main__.x.Y", "lazy.Y"):
        with pytest.raises(ValueError, match=f"class_path='{path}'"):
            surgery.apply_plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [entry(class_path=path)])


@pytest.mark.slow
def test_hostile_plans_import_and_run_nothing(tmp_path):
    """In a process of its own, as an audit hook cannot be removed; benchmarks run 10,000 files."""
    script = Path(fuzz_readers.__file__).with_name("fuzz_plans.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(em_lightning.__file__).parents[1])}
    command = [sys.executable, script, "--count=400", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("Linear", {"in_features": 10**6, "out_features": 10**6}),
        ("PReLU", {"num_parameters": 2**31}),
        ("MultiheadAttention", {"embed_dim": 10**5, "num_heads": 1}),
        ("LSTM", {"input_size": 1, "hidden_size": 1, "num_layers": 10**8}),
    ],
)
def test_a_plan_cannot_fill_the_memory(name, arguments):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the plan "):
        surgery.apply_plan(
            nn.Sequential(nn.ReLU(), nn.ReLU()), [entry(class_path=f"torch.nn.{name}", init_args=arguments)]
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    "plan", [3, {"surgery": 3}, {"surgery": [3]}, {"surgery": [{}]}, {"surgery": [entry(operation="rm")]}]
)
def test_invalid_plan_raises(plan, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\['em_lightning'\] holds no plan of a surgery"):
        surgery.read_plan(saved(tmp_path / "x.ckpt", {"em_lightning": plan}))


def test_class_path_builds_only_modules():
    spec = {"class_path": f"{__name__}.Runs", "init_args": {"args": ["rm"]}}
    for build in (
        KERNELS.build,
        ACTIVATIONS.build,
        lambda spec: surgery.swap_activations(nn.Sequential(nn.ReLU()), spec),
    ):
        with pytest.raises(ValueError, match="class_path='.*Runs'.*torch.nn.modules.module.Module"):
            build(spec)


def test_the_command_line_reads_a_checkpoint_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(Path("bad.ckpt"), {"state_dict": RunsWhenLoaded()})
    assert cli.main(["run", "gaussian_mixture", "--ckpt_path=bad.ckpt"]) == 2
    error = "bad.ckpt: invalid checkpoint (it contains classes that could run code"
    assert error in capsys.readouterr().err.splitlines()[-1]


# Configs.

CONFIGS = {
    "deep": "[" * 10**5 + "]" * 10**5,
    "python": "a: 1\nb: !!python/object/apply:os.system [ls]\n",
    "own": "a: !mine 3\n",
    "unknown": "a: *b\n",
    "date": "a: 2001-99-99\n",
    "broken": "a: [1\n",
    "bytes": "a: \x00\n",
    "list": "- 1\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_unreadable_config_raises_with_its_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(CONFIGS[name])
    start = time.process_time()
    for args in (["--config", "bad.yaml"], ["--config=bad.yaml"], ["-c", "bad.yaml"]):
        assert cli.main(["run", "gaussian_mixture", *args]) == 2
        assert "em-lightning: bad.yaml" in capsys.readouterr().err
    assert time.process_time() - start < 10


def test_a_plain_config_is_read_with_its_aliases(tmp_path):
    (tmp_path / "good.yaml").write_text("a: &a {x: 1, y: [!!str 2, ! 3]}\nb: {<<: *a, y: *a}\nc: 1e400\n")
    assert read_config(tmp_path / "good.yaml")["b"] == {"x": 1, "y": {"x": 1, "y": ["2", 3]}}


def test_npy_files_with_an_invalid_header_raise(tmp_path):
    for header in (
        b"{'descr': (((",
        b"(" * 3000,
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,",
        b"\xff" * 50,
    ):
        file = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
        (tmp_path / "a.npy").write_bytes(file)
        for read in (fuzz_readers.read_table, fuzz_readers.READERS["npy"][2]):
            with pytest.raises(ValueError, match="not a plain NumPy array"):
                read(tmp_path / "a.npy")
