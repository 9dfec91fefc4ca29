"""Ranks that do not connect, and a script of a user that loses one: what is printed, and how the run goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch
import user_models as users
from machines import wait_until
from test_docs import DOCS, blocks_of

from em_lightning.checkpoints import RunCheckpoint, WatchedDDPStrategy

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("address, interface", [("127.0.1.1", ""), ("10.0.0.1", ""), ("127.0.1.1", "eth0")])
@users.QUIET
def test_a_rank_says_what_it_waits_for(address, interface, tmp_path, monkeypatch, capfd):
    """The other host never starts."""
    port, folder = free_port(), None if interface else str(tmp_path / "mine")
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    fit = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=WatchedDDPStrategy(timeout=timedelta(seconds=3)),
        callbacks=[RunCheckpoint(folder)],
        logger=False,
    )
    with pytest.raises(torch.distributed.DistStoreError) as caught:
        fit.fit(users.MLP(), torch.ones(4, 6))
    host = re.escape(socket.gethostname())
    printed = capfd.readouterr().err
    assert re.search(rf"host {host}, rank 0: connecting 2 hosts through localhost:{port} within 6 seconds", printed)
    assert ("WARNING: the name of this host means 127.0.1.1" in printed) == (address == "127.0.1.1" and not interface)
    reason = r"lost the other ranks \(.*1/2 clients joined"
    resume = f"ckpt_path=last resumes the run{f' in {re.escape(folder)}' if folder else ''}$"
    assert re.search(rf"host {host}: {reason}.*{resume}", str(caught.value), re.DOTALL)
    assert not torch.distributed.is_initialized()


FIRST = """
import time
from datetime import timedelta

from lightning import LightningDataModule, Trainer
from user_models import MLP
from em_lightning.checkpoints import WatchedDDPStrategy


class Data(LightningDataModule):
    def prepare_data(self):  # around it, Lightning connects the ranks again
        time.sleep(LONGER)

    def train_dataloader(self):
        return MLP.data()


strategy = WatchedDDPStrategy(timeout=timedelta(seconds=5))
options = {"limit_train_batches": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
trainer = Trainer(max_epochs=1, num_nodes=2, accelerator="cpu", devices=1, strategy=strategy, **options)
wait_for_both()
trainer.fit(MLP(), datamodule=Data())
"""
OTHER = """
import os
import torch

wait_for_both()
torch.distributed.init_process_group("gloo", rank=1, world_size=2)
os._exit(0)
"""
WAIT = """
def wait_for_both():
    import os, pathlib, time

    pathlib.Path(os.environ["NODE_RANK"]).touch()
    while len(os.listdir()) < 2:
        time.sleep(0.01)

"""


@pytest.mark.parametrize("other, code", [(OTHER, 2), (FIRST, 0)], ids=["ended while connecting", "both connect"])
def test_a_rank_ends_if_another_does_not_connect_in_time(other, code, tmp_path):
    """The limit of 10 seconds does not count a download."""
    port, ranks = free_port(), []
    for rank, script in enumerate((FIRST, other)):
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "NODE_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", WAIT + script.replace("LONGER", "12" if code == 0 else "0")]
        options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env={**os.environ, **environment}, **options))
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [code, 0], errors
    late = rf"rank 0: a rank did not connect through localhost:{port} within 10 seconds\."
    assert bool(re.search(late, errors[0])) == (code == 2)


@pytest.mark.slow
def test_the_script_of_the_page_names_its_run_and_resumes_when_a_rank_is_killed(tmp_path):
    (code,) = [
        block.code for block in blocks_of(DOCS / "how-to" / "run-on-many-machines.md") if block.title == "train.py"
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    weights, text = [], ""
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        # The killed run is slower, so that its first checkpoint, at step 100, is some seconds before its end.
        slow = "    import time\n    Model.on_train_batch_start = lambda *_: time.sleep(0.02)\n"
        (folder / "train.py").write_text(code.replace("def main():\n", "def main():\n" + slow * (name == "killed")))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        with open(folder / "output.txt", "w") as output:
            agent = subprocess.Popen(
                [*command, "--max-restarts=1", "train.py"], cwd=folder, env=environment, stdout=output, stderr=output
            )
            if name == "killed":
                wait_until((folder / "my_run" / "last.ckpt").exists, 200)
                listed = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
                ranks = [pid for pid in listed if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
                os.kill(int(ranks[0]), signal.SIGKILL)
            assert agent.wait(300) == 0, (folder / "output.txt").read_text()
        text = (folder / "output.txt").read_text()
        assert text.endswith("320 steps\n")
        weights.append(torch.load(folder / "my_run" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    host = re.escape(socket.gethostname())
    assert re.search(rf"host {host}, rank 0: lost the other ranks .*ckpt_path=last resumes the run in .*my_run\n", text)
