"""Runs on two hosts: what each fault does, and that a resumed run ends where an uninterrupted one does."""

import os
import re
import signal
import subprocess
import sys
import time

import machines
import numpy
import pytest
import torch
from machines import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(machines.reason_to_skip()), reason=machines.reason_to_skip()),
]
CLI = [sys.executable, "-m", "em_lightning.cli"]
PORT = "29517"
LAST = "lightning_logs/gaussian_mixture/run/checkpoints/last.ckpt"
DDP = "--trainer.strategy=em_lightning.checkpoints.WatchedDDPStrategy"
# 50 blocks on each of two ranks in an epoch.
RUN = ["run", "gaussian_mixture", "--model.num_components=3", "--model.num_features=2", "--model.tol=0"]
RUN += ["--data.num_points=4000", "--data.num_features=2", "--data.true_components=3", "--data.held_out_points=100"]
RUN += ["--data.block_rows=40", "--report.components=[]", "--report.sklearn_rows=0", "--trainer.accelerator=cpu"]
RUN += ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.logger.version=run", "--ckpt_path=last"]
RUN += ["--trainer.max_epochs=40", "--trainer.log_every_n_steps=50"]


@pytest.fixture
def hosts(tmp_path):
    with machines.two_hosts(tmp_path) as pair:
        yield pair


def start(hosts, folder=None, arguments=(), differing=(), **environment):
    """Start the run on both hosts by MASTER_ADDR, in one folder or in one of each host, and return the processes."""
    found = []
    for rank, host in enumerate(hosts):
        command = [*CLI, *RUN, *arguments, *(differing if rank else ())]
        variables = {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": PORT, "NODE_RANK": str(rank), **environment}
        found.append(host.start(command, folder, **variables))
    return found


def finish(processes):
    for process in processes:
        assert process.wait() == 0, process.text()


def final_weights(folder):
    return torch.load(folder / LAST, weights_only=True)["state_dict"]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of an uninterrupted run on two hosts."""
    folder = tmp_path_factory.mktemp("straight")
    with machines.two_hosts(folder) as pair:
        finish(start(pair, folder))
    return final_weights(folder)


def has_begun(folder, steps=20):
    """Return whether a checkpoint with so many steps exists."""
    path = folder / LAST
    return path.exists() and torch.load(path, weights_only=True)["global_step"] >= steps


def line_of(process):
    """Return the line of the command's error."""
    (line,) = [line for line in process.text().splitlines() if line.startswith("em-lightning: ")]
    return line


def test_two_hosts_equal_one_process(straight, tmp_path):
    command = [*CLI, *RUN, "--trainer.num_nodes=1"]
    environment = {**os.environ, "PYTHONPATH": str(machines.ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    alone = final_weights(tmp_path)
    for name in straight:
        torch.testing.assert_close(alone[name], straight[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.nightly),
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
    ],
    ids=lambda number: number.name,
)
def test_a_rank_that_is_ended_by_a_signal_ends_the_other_and_the_run_resumes(number, hosts, straight, tmp_path):
    processes = start(hosts, tmp_path)
    wait_until(lambda: has_begun(tmp_path), 200)
    processes[1].signal(number)
    codes = [process.wait(60) for process in processes]
    saved = torch.load(tmp_path / LAST, weights_only=True)
    if number == signal.SIGKILL:
        assert codes == [2, -signal.SIGKILL]
        assert "host em-host-a, rank 0: lost the other ranks" in line_of(processes[0])
        assert saved["global_step"] % 16 == 0  # a periodic checkpoint
    else:
        assert codes == [1, 1] if number == signal.SIGINT else [128 + number] * 2
        assert f"{number.name}: saved" in processes[0].text()
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("results.*"))
    finish(start(hosts, tmp_path))
    assert_equal(final_weights(tmp_path), straight)


@pytest.mark.nightly
def test_a_cable_that_is_down_for_five_seconds_has_no_effect(hosts, straight, tmp_path):
    processes = start(hosts, tmp_path)
    wait_until(lambda: has_begun(tmp_path), 200)
    hosts[1].cable("down")
    time.sleep(5)
    hosts[1].cable("up")
    finish(processes)
    assert_equal(final_weights(tmp_path), straight)


@pytest.mark.nightly
def test_when_a_host_is_lost_the_other_ends_within_the_timeout(hosts, straight, tmp_path):
    timeout = [DDP, "--trainer.strategy.timeout=0:00:10"]
    processes = start(hosts, tmp_path, timeout)
    wait_until(lambda: has_begun(tmp_path), 200)
    hosts[1].cable("down")
    hosts[1].kill_all()
    assert processes[0].wait(60) == 2
    assert "lost the other ranks" in line_of(processes[0]) and "timeout" in line_of(processes[0])
    hosts[1].cable("up")
    finish(start(hosts, tmp_path))
    assert_equal(final_weights(tmp_path), straight)


@pytest.mark.nightly
def test_hosts_without_a_shared_folder_say_what_to_do_at_a_resume(hosts):
    a, b = hosts
    processes = start(hosts)
    wait_until(lambda: has_begun(a.folder), 200)
    processes[0].signal(signal.SIGTERM)
    assert [process.wait(60) for process in processes] == [143, 143]
    assert not (b.folder / LAST).exists()
    processes = start(hosts)
    assert [process.wait(200) for process in processes] == [2, 2]
    for process in processes:
        assert re.search(
            r"same checkpoint to resume from: it is \"none\" on host em-host-b \(rank 1\), but "
            r"\"last.ckpt with hash \w+\" on host em-host-a \(rank 0\)",
            line_of(process),
        )
        copy = rf"Copy \S*{LAST} from host em-host-a \(rank 0\) to the same place on all hosts"
        assert re.search(copy, line_of(process))
    (b.folder / LAST).parent.mkdir(parents=True)
    (b.folder / LAST).write_bytes((a.folder / LAST).read_bytes())
    finish(start(hosts))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "argument, words",
    [
        ("--data.block_rows=50", "same data.block_rows: it is 50 on host em-host-b"),
        ("--data.num_points=3000", "same data.num_points: it is 3000 on host em-host-b"),
        ("--model.covariance=diag", 'same model.covariance: it is "diag" on host em-host-b'),
        ("--trainer.max_epochs=3", "same trainer.max_epochs: it is 3 on host em-host-b"),
        ("--seed_everything=5", 'same seed: it is "5" on host em-host-b'),
    ],
)
def test_hosts_with_different_arguments_end_before_training(argument, words, hosts, tmp_path):
    processes = start(hosts, tmp_path, differing=[argument])
    assert [process.wait(200) for process in processes] == [2, 2]
    for process in processes:
        assert words in line_of(process)


@pytest.mark.nightly
def test_hosts_with_different_rows_end_before_training(hosts):
    """The tables have the same shape: only their content differs."""
    for number, host in enumerate(hosts):
        rows = torch.randn(4000, 2, generator=torch.Generator().manual_seed(number))
        numpy.save(host.folder / "rows.npy", rows.numpy())
    processes = start(hosts, arguments=["--data=TabularDataModule", "--data.data=rows.npy"])
    assert [process.wait(200) for process in processes] == [2, 2]
    for process in processes:
        assert re.search("same rows: .*em-host-b", line_of(process))


@pytest.mark.nightly
def test_debian_host_names_are_explained(tmp_path):
    with machines.two_hosts(tmp_path, debian=True) as hosts:
        address = hosts[0].address
        short = [DDP, "--trainer.strategy.timeout=0:00:10"]
        processes = start(hosts, tmp_path, short, MASTER_ADDR=address)
        for process, host in zip(processes, hosts, strict=True):
            wait_until(lambda: f"connecting 2 hosts through {address}:{PORT}" in process.text(), 100)  # noqa: B023
            assert "WARNING: this host resolves its own name to 127.0.1.1" in process.text()
            assert "set GLOO_SOCKET_IFNAME" in process.text(), host.name
        # One rank fails at once. The other would wait for 50 seconds if gloo had no limit.
        seconds = wait_until(lambda: all(process.popen.poll() is not None for process in processes), 40)
        print(f"hosts that cannot connect end after {seconds:.1f} s")
        assert [process.wait() for process in processes] == [2, 2]
        (late,) = [line for line in map(line_of, processes) if "a rank did not connect" in line]
        assert "within 20 seconds" in late and all("GLOO_SOCKET_IFNAME" in line_of(process) for process in processes)
        finish(start(hosts, tmp_path, MASTER_ADDR=address, GLOO_SOCKET_IFNAME=machines.INTERFACE))


def torchrun(hosts, folder, restarts=3):
    """Start the run by torchrun on the hosts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=run"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=em-host-a:{PORT}", f"--max-restarts={restarts}"]
    command += ["-m", "em_lightning.cli", *RUN, DDP, "--trainer.strategy.timeout=0:00:20"]
    # Otherwise a host that joins later waits for an address that torchrun sets in its first round only.
    return [host.start(command, folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for host in hosts]


def steps_saved(folder):
    return torch.load(folder / LAST, weights_only=True)["global_step"]


@pytest.mark.nightly
def test_torchrun_restarts_and_resumes_after_a_kill(hosts, straight, tmp_path):
    agents = torchrun(hosts, tmp_path)
    wait_until(lambda: has_begun(tmp_path), 200)
    (rank,) = set(hosts[1].processes("-m em_lightning.cli")) - set(hosts[1].processes("torch.distributed.run"))
    os.kill(rank, signal.SIGKILL)
    before = steps_saved(tmp_path)
    seconds = wait_until(lambda: steps_saved(tmp_path) > before + 16, 200)
    print(f"a killed rank: training goes on after {seconds:.1f} s")
    finish(agents)
    assert_equal(final_weights(tmp_path), straight)


@pytest.mark.nightly
def test_torchrun_resumes_when_a_lost_host_is_replaced(hosts, straight, tmp_path):
    """torchrun forgets a lost host after 15 seconds, so the timeout of the ranks must be longer."""
    agents = torchrun(hosts, tmp_path)
    wait_until(lambda: has_begun(tmp_path), 200)
    hosts[1].cable("down")
    hosts[1].kill_all()
    wait_until(lambda: "lost the other ranks" in agents[0].text(), 200)
    hosts[1].cable("up")
    before = steps_saved(tmp_path)
    (again,) = torchrun(hosts[1:], tmp_path)
    seconds = wait_until(lambda: steps_saved(tmp_path) > before + 16, 300)
    print(f"a lost and replaced host: training goes on after {seconds:.1f} s")
    finish([agents[0], again])
    assert_equal(final_weights(tmp_path), straight)
