"""Two hosts on this machine: network namespaces that are joined by a virtual cable, with host names of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERFACE = "wire0"
SETUP = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Process:
    """A command on a host, with its output in a file."""

    def __init__(self, command, folder, environment, output):
        self.output = output
        with open(output, "wb") as file:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
                # A shell ignores SIGINT in its background jobs, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def signal(self, number):
        """Send a signal to this process only."""
        os.kill(self.popen.pid, number)

    def wait(self, seconds=300):
        """Return the exit code; an exit by a signal has a negative one."""
        return self.popen.wait(seconds)

    def text(self):
        return self.output.read_text(errors="replace")


class Host:
    """A network namespace with a host name; commands run in a folder that only this host uses, or in a given one."""

    def __init__(self, name, address, folder, namespace):
        self.name, self.address, self.folder, self.namespace = name, address, folder, namespace
        self.started = []

    def start(self, command, folder=None, **environment):
        """Start a command and return its process."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        inside += ["sh", "-c", SETUP, "sh", self.name, str(self.folder / "hosts"), *command]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        output = self.folder / f"output-{len(self.started)}.txt"
        self.started.append(Process(inside, folder or self.folder, variables, output))
        return self.started[-1]

    def processes(self, word=""):
        """Return the process ids of the processes on this host with a word in their command."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
        found = []
        for number in map(int, listed.split()):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{number}/cmdline").read_text().replace("\0", " "):
                    found.append(number)
        return found

    def kill_all(self):
        for number in self.processes():
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        for process in self.started:
            process.popen.wait()

    def cable(self, state):
        """Set the network interface ``"up"`` or ``"down"``."""
        ip("-n", self.namespace, "link", "set", INTERFACE, state)


def reason_to_skip():
    """Return why this machine can have no network namespaces, or an empty string."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        return "needs Linux with ip, unshare and mount"
    done = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"needs network namespaces: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_hosts(folder, debian=False):
    """Yield two hosts, named em-host-a and em-host-b; with ``debian`` the name of a host means 127.0.1.1 on it."""
    names, addresses = ("em-host-a", "em-host-b"), ("10.89.77.1", "10.89.77.2")
    hosts = []
    try:
        for name, address in zip(names, addresses, strict=True):
            (folder / name).mkdir()
            hosts.append(Host(name, address, folder / name, f"{name}-{os.getpid()}"))
            lines = ["127.0.0.1 localhost"]
            for other, at in zip(names, addresses, strict=True):
                lines.append(f"{'127.0.1.1' if debian and other == name else at} {other}")
            (folder / name / "hosts").write_text("\n".join(lines) + "\n")
            ip("netns", "add", hosts[-1].namespace)
        (a, b), pair = hosts, (f"wa{os.getpid()}", f"wb{os.getpid()}")
        ip("link", "add", pair[0], "type", "veth", "peer", "name", pair[1])
        for host, end in zip((a, b), pair, strict=True):
            ip("link", "set", end, "netns", host.namespace, "name", INTERFACE)
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.cable("up")
        yield a, b
    finally:
        for host in hosts:
            host.kill_all()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def wait_until(condition, seconds):
    """Wait until a condition holds and return the seconds that it took; fail after too many."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} seconds"
        time.sleep(0.05)
    return time.monotonic() - began
