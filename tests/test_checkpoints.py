"""Atomic writes of files and checkpoints, and checks of damaged ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import em_lightning
from em_lightning.checkpoints import AtomicCheckpointIO
from em_lightning.files import write_whole

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
    assert (tmp_path / "a").read_bytes() == b"old" * 1000 and (tmp_path / "a.partial").stat().st_size == 5000
    write_whole(tmp_path / "a", "next")
    assert (tmp_path / "a").read_text() == "next" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_keeps_the_old_file_and_raises(tmp_path):
    done = python(LIMITED.format("SIG_IGN"), tmp_path)
    assert done.returncode == 1 and os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old" * 1000
    assert "a cannot be written (File too large)" in done.stderr


def test_a_recipe_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(tmp_path):
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


def test_urls_are_handled_by_lightning():
    io = AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 3}, "memory://folder/last.ckpt")
    assert io.load_checkpoint("memory://folder/last.ckpt") == {"epoch": 3}
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, "last.ckpt", storage_options={"a": 1})
