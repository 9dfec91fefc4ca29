"""Atomic writes of files and checkpoints, and checks of damaged ones."""

import concurrent.futures
import dataclasses
import enum
import os
import pydoc
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning
import pytest
import torch
import user_models as users
from torch import nn

import em_lightning
from em_lightning.callbacks import InsertEMOperator, RestoreSurgery, StepSeeds, SwapActivations
from em_lightning.checkpoints import AtomicCheckpointIO, RunCheckpoint, read_checkpoint
from em_lightning.data import Digits
from em_lightning.files import write_whole
from em_lightning.modules import GaussianMixtureModule, PointCloudGMM
from em_lightning.studies import EMClassifier, GaussianBlobs, ProceduralSurfaces
from em_lightning.surgery import read_plan, restore_surgery

ROOT = Path(em_lightning.__file__).parents[1]


def python(code, folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **options)


# Limits the size of files: the kernel then kills the process, or fails the write as a full disk does.
LIMITED = """
import resource, signal, sys
from em_lightning.files import write_whole
write_whole("a", b"old" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
signal.signal(signal.SIGXFSZ, signal.{})
write_whole("a", b"new" * 10000)
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    done = python(LIMITED.format("SIG_DFL"), tmp_path)
    assert done.returncode == -signal.SIGXFSZ
    (partial,) = tmp_path.glob("a.*.partial")
    assert (tmp_path / "a").read_bytes() == b"old" * 1000 and partial.stat().st_size == 5000
    other = tmp_path / "a.another-host-1-1.partial"
    other.touch()
    write_whole(tmp_path / "a", "next")
    assert (tmp_path / "a").read_text() == "next" and sorted(os.listdir(tmp_path)) == ["a", other.name]


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Threads and processes write the same file at the same time: it is always one of the contents."""
    contents = [bytes([number]) * 200_000 for number in range(4)]
    code = "import sys; from em_lightning.files import write_whole\n"
    code += "for _ in range(50): write_whole('a', bytes([int(sys.argv[1])]) * 200_000)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], cwd=tmp_path, env=environment)
        for number in range(2)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in (2, 3):
            pool.submit(lambda content: [write_whole(tmp_path / "a", content) for _ in range(50)], contents[number])
        while any(writer.poll() is None for writer in writers):
            if (tmp_path / "a").exists():
                assert (tmp_path / "a").read_bytes() in contents
    assert [writer.returncode for writer in writers] == [0, 0] and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_keeps_the_old_file_and_raises(tmp_path):
    done = python(LIMITED.format("SIG_IGN"), tmp_path)
    assert done.returncode == 1 and os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old" * 1000
    assert "a cannot be written (File too large)" in done.stderr


def test_a_recipe_on_a_full_disk_ends_with_one_line_and_resumes_when_there_is_space(tmp_path):
    code = """
import resource, sys
from em_lightning.cli import main
run = ["run", "volume_control", "--trainer.logger.version=v", "--ckpt_path=last"]
run += ["--trainer.enable_progress_bar=false", "--report.figures=false", "--model.num_components=600"]
assert main([*run, "--trainer.max_epochs=1"]) == 0
last = "lightning_logs/volume_control/v/checkpoints/last.ckpt"
before = open(last, "rb").read()
limit = len(before) // 2
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
assert main([*run, "--trainer.max_epochs=3"]) == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert open(last, "rb").read() == before
assert main([*run, "--trainer.max_epochs=3"]) == 0
assert open(last, "rb").read() != before
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("em-lightning: ")]
    assert "last.ckpt cannot be written (File too large)" in line
    assert not list(tmp_path.rglob("*.partial"))


def test_a_truncated_checkpoint_raises(tmp_path):
    path, io = tmp_path / "folder" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.arange(5.0)}}, path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.arange(5.0))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last.ckpt: invalid checkpoint"):
            io.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="absent.ckpt"):
        io.load_checkpoint(tmp_path / "absent.ckpt")


def test_a_damaged_pickle_is_not_taken_for_one_of_other_classes(tmp_path):
    path, damaged = tmp_path / "last.ckpt", tmp_path / "damaged.ckpt"
    torch.save({"a": torch.arange(5.0)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"\x80\x02garbage" if name.endswith("data.pkl") else source.read(name))
    for weights_only in (True, False):
        with pytest.raises(ValueError, match="damaged.ckpt: invalid checkpoint") as caught:
            read_checkpoint(damaged, weights_only)
        assert "classes" not in str(caught.value) and "run code" not in str(caught.value)
    torch.save({"a": Path("data")}, path)
    with pytest.raises(ValueError, match="last.ckpt: invalid checkpoint.*run code: .*Path"):
        read_checkpoint(path)


@dataclasses.dataclass
class Settings:
    hidden: int = 16
    folder: Path = Path("data")


class Mode(enum.Enum):
    FAST = 1


class Configured(users.MLP):
    def __init__(self, settings, mode=Mode.FAST):
        super().__init__()
        self.save_hyperparameters()


class Holder(users.MLP):
    """Has a module, which surgery changes, among its hyperparameters."""

    def __init__(self, encoder):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = encoder


def encoder():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())


@pytest.mark.filterwarnings(
    "ignore:Attribute 'encoder' is an instance of `nn.Module`",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.`",
)
@pytest.mark.parametrize("make", [lambda: Configured(Settings()), lambda: Holder(encoder())], ids=["plain", "module"])
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [SwapActivations("softmax_gated", arguments={"learnable": True}, calls="any")],
        lambda: [InsertEMOperator("encoder.0", 2), InsertEMOperator("encoder.0", 3)],
    ],
    ids=["swap", "insert"],
)
def test_trusted_hyperparameters_of_any_class_are_restored(make, callbacks, tmp_path):
    model, path = make(), str(tmp_path / "model.ckpt")
    cls, data = type(model), users.MLP.data()
    trainer = users.trainer(tmp_path, 1, callbacks())
    trainer.fit(model, data)
    trainer.save_checkpoint(path)
    expected = [model.eval()(x) for x, _ in data]
    for load in (
        lambda: restore_surgery(cls, path),
        lambda: users.trainer(tmp_path, 1, [RestoreSurgery(path)]).test(make(), data),
    ):
        with pytest.raises(ValueError, match="classes that could run code.*(Settings|em_lightning)") as caught:
            load()
        assert "torch.serialization.safe_globals" in str(caught.value) and "weights_only=False" in str(caught.value)
    restored = restore_surgery(cls, path, weights_only=False).eval()
    assert all(torch.equal(restored(x), y) for (x, _), y in zip(data, expected, strict=True))
    again = str(tmp_path / "again.ckpt")  # the plan is kept
    trainer.strategy.connect(restored)
    trainer.save_checkpoint(again)
    assert read_plan(again, weights_only=False) == read_plan(path, weights_only=False)
    fresh = make()
    tester = users.trainer(tmp_path, 1, [RestoreSurgery(path, weights_only=False)])
    found = tester.predict(fresh, data, ckpt_path=path, weights_only=False)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    if cls is Configured:
        with torch.serialization.safe_globals([Settings, Mode, type(Path()), *safe_parts(path)]):
            assert torch.equal(restore_surgery(cls, path).eval()(next(iter(data))[0]), expected[0])


def safe_parts(path):
    """Return the further classes in a pickled Path, which depend on the version of Python."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [pydoc.locate(name) for name in names if name.startswith("pathlib")]


class Signal(lightning.Callback):
    """Send a signal to this process during a batch, before the callback that saves."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


class Mixtures(GaussianMixtureModule):
    data = staticmethod(lambda: GaussianBlobs(num_points=300, num_features=2, true_components=2, block_rows=50))

    def __init__(self):
        super().__init__(2, 2, tol=0.0)


class Images(EMClassifier):
    data = staticmethod(lambda: Digits(batch_size=240))

    def __init__(self):
        super().__init__(num_components=4, num_features=64, num_classes=10)


class Clouds(PointCloudGMM):
    @staticmethod
    def data():
        sizes = {"train_clouds": 12, "val_clouds": 2, "test_clouds": 2, "batch_size": 2, "num_points": 32}
        return ProceduralSurfaces(**sizes, noise=0.01)

    def __init__(self):
        super().__init__(2, num_iters=1, exact_iters=1, schedule="constant")  # independent of the length of the run


def fit_with_checkpoints(cls, folder, max_epochs, path=None, callbacks=(), **options):
    """Fit with a checkpoint every four steps; an epoch has six."""
    torch.manual_seed(0)
    model = cls()
    keep = RunCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=4, enable_version_counter=False)
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    plugins, callbacks = [AtomicCheckpointIO()], [*callbacks, StepSeeds(0), keep]
    fit = lightning.Trainer(
        max_epochs=max_epochs, plugins=plugins, callbacks=callbacks, default_root_dir=folder, **options
    )
    fit.fit(model, cls.data(), ckpt_path=path, weights_only=True)
    return model


def assert_state(state, model):
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


QUIET = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:.*does not have many workers"
)


@QUIET
@pytest.mark.parametrize("step", [3, 12, 18])
@pytest.mark.parametrize(
    "cls, number",
    [
        (Mixtures, signal.SIGINT),
        (Mixtures, signal.SIGTERM),
        (Mixtures, signal.SIGUSR1),
        (Images, signal.SIGTERM),
        (Clouds, signal.SIGTERM),
    ],
)
def test_a_signal_saves_at_the_end_of_the_batch_and_the_run_resumes(cls, number, step, tmp_path, capsys):
    """Step 3 is within an epoch, step 12 ends one, and step 18 ends the fit."""
    straight = fit_with_checkpoints(cls, tmp_path / "straight", 3)
    last = tmp_path / "last.ckpt"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in its background jobs
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as caught:
        fit_with_checkpoints(cls, tmp_path, 3, callbacks=[Signal(number, step)])
    assert caught.value.code == (1 if number == signal.SIGINT else 128 + number)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert torch.load(last, weights_only=True)["global_step"] == step
    assert f"{number.name}: saved {last}" in capsys.readouterr().err
    resumed = fit_with_checkpoints(cls, tmp_path, 3, last)
    assert_state(straight.state_dict(), resumed)


@QUIET
@pytest.mark.parametrize("cls", [Mixtures, Images, Clouds])
def test_the_final_state_is_saved_and_a_longer_run_continues_it(cls, tmp_path):
    straight = fit_with_checkpoints(cls, tmp_path / "straight", 5)
    last = tmp_path / "last.ckpt"
    for epochs, steps in ((3, 18), (5, 30), (5, 30)):
        model = fit_with_checkpoints(cls, tmp_path, epochs, last if last.exists() else None)
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == steps
        assert_state(saved["state_dict"], model)
    assert_state(straight.state_dict(), model)


class Stop(lightning.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("stop")


@QUIET
@pytest.mark.parametrize("cls", [Mixtures, Images, Clouds])
def test_a_checkpoint_after_the_last_batch_of_a_limited_epoch_resumes_with_the_first(cls, tmp_path):
    """Four of six batches; a checkpoint is written after every fourth."""
    straight = fit_with_checkpoints(cls, tmp_path / "straight", 2, limit_train_batches=4)
    with pytest.raises(RuntimeError, match="stop"):
        fit_with_checkpoints(cls, tmp_path, 2, callbacks=[Stop()], limit_train_batches=4)
    resumed = fit_with_checkpoints(cls, tmp_path, 2, tmp_path / "last.ckpt", limit_train_batches=4)
    assert_state(straight.state_dict(), resumed)


@QUIET
def test_a_partial_file_of_an_ended_process_is_removed_even_if_no_training_is_left(tmp_path):
    fit_with_checkpoints(Mixtures, tmp_path, 1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    partial = tmp_path / f"last.ckpt.{socket.gethostname()}-{ended.pid}-1.partial"
    partial.touch()
    fit_with_checkpoints(Mixtures, tmp_path, 1, tmp_path / "last.ckpt")
    assert not partial.exists()


@QUIET
def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = """
import os, signal, sys, threading, torch, lightning
sys.path.insert(0, sys.argv[1])
import test_checkpoints as tests
class Slow(lightning.Callback):
    def on_train_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
tests.fit_with_checkpoints(tests.Mixtures, "here", 3, callbacks=[Slow()])
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -signal.SIGTERM and not list(tmp_path.rglob("*.ckpt"))


def test_urls_are_handled_by_lightning():
    io = AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 3}, "memory://folder/last.ckpt")
    assert io.load_checkpoint("memory://folder/last.ckpt") == {"epoch": 3}
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, "last.ckpt", storage_options={"a": 1})
