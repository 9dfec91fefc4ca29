"""Ranks that do not connect, and a script of a user that loses one: what is printed, and how the run goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
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
    assert ("WARNING: this host resolves its own name to 127.0.1.1" in printed) == (
        address == "127.0.1.1" and not interface
    )
    reason = r"lost the other ranks \(.*1/2 clients joined"
    resume = f"ckpt_path=last resumes the run{f' in {re.escape(folder)}' if folder else ''}$"
    assert re.search(rf"host {host}: {reason}.*{resume}", str(caught.value), re.DOTALL)
    assert not torch.distributed.is_initialized()


WAITS = """
import time
from datetime import timedelta
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from em_lightning.checkpoints import WatchedDDPStrategy

def new_group():
    time.sleep(60)

DDPStrategy.setup_distributed = lambda self: None
for wait in (lambda: time.sleep(2), new_group):  # a download, and a connection to a rank that is gone
    strategy = WatchedDDPStrategy(timeout=timedelta(seconds=0.5))
    Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    strategy.setup_distributed()
    wait()
    print("went on")
"""


def test_a_rank_ends_if_another_does_not_connect_in_time(tmp_path):
    """test_machines.py has the same with two hosts; the limit of one second does not count a download."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    began, options = time.monotonic(), {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-uc", WAITS], env=environment, **options)
    assert done.returncode == 2 and time.monotonic() - began < 55 and done.stdout.split("\n") == ["went on", ""]
    assert re.search(r"rank 0: a rank did not connect through localhost:29500 within 1 seconds\.", done.stderr)


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
