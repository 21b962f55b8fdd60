"""Two network namespaces, joined by a cable, that act as two machines with one disk."""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from training_runs import run_environment

MARKER = "SGMIM_TEST_HOSTS"
"""Environment variable of every process on the hosts; its value is the pair's."""


class TwoHosts:
    """Hosts 0 and 1; each sees itself, the other, and nothing else, and has shared memory of its own."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.marker = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.names = tuple(f"sgmim-{self.marker}-{side}" for side in "ab")
        self._started: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        """Make both hosts and the cable between them."""
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def cut(self) -> None:
        """Pull the plug: nobody is told that the other is gone."""
        for name in self.names:
            _ip("-n", name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put it in again."""
        for name in self.names:
            _ip("-n", name, "link", "set", "eth0", "up")

    def start(self, host: int, command: list[str], **environment: str) -> "Started":
        """Run a command on a host; its output goes to a file of its own."""
        log = self.logs / f"{len(self._started)}-host{host}.log"
        own = run_environment() | {MARKER: self.marker, "GLOO_SOCKET_IFNAME": "eth0"}
        own["TORCH_EXTENSIONS_DIR"] = str(self._folder("extensions", host))
        memory = ["bash", "-c", 'mount --bind "$0" /dev/shm && exec "$@"', str(self._folder("memory", host))]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], "taskset", "-c", self._cores(host), *memory, *command],
                env=own | environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(process)
        return Started(process, log)

    def _cores(self, host: int) -> str:
        """Half of them each, so that a rank has as many threads as one of two on one machine, and the same bits."""
        all_cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(all_cores) // 2)
        return ",".join(map(str, (all_cores * 2)[host * half :][:half]))

    def _folder(self, kind: str, host: int) -> Path:
        folder = self.logs / f"{kind}-host{host}"
        folder.mkdir(exist_ok=True)
        return folder

    def left(self) -> list[str]:
        """What should be gone once the hosts are: namespaces, processes, shared memory, lock files."""
        found = [name for name in self.names if name in _ip("netns", "list").split()]
        found += [f"process {process}" for process in marked_processes(self.marker)]
        found += [str(path) for path in self.logs.glob("memory-*/*")]
        return found + [str(path) for path in self.logs.rglob("*") if path.name == "lock" or path.suffix == ".lock"]

    def rank(self, host: int) -> int:
        """Process of the one training rank on a host; launchers are others."""
        found = []
        for process in _ip("netns", "pids", self.names[host]).split():
            with suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if words[1:4] == [b"-u", b"-m", b"sgmim_fast.pretrain"]:
                    found.append(int(process))
        (rank,) = found
        return rank

    def remove(self) -> None:
        """Kill what runs on the hosts, then remove them."""
        deadline = time.monotonic() + 20
        while (left := marked_processes(self.marker)) and time.monotonic() < deadline:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for started in self._started:
                started.poll()  # else it stays a zombie
            time.sleep(0.05)
        for started in self._started:
            started.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # perhaps never made


class Started:
    """A command on one host."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, seconds: float) -> int:
        """Exit status; fails if it has not ended by itself within the time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output()}")


@contextmanager
def two_hosts(logs: Path) -> Iterator[TwoHosts]:
    """Two hosts, for the length of a block. Skips where they cannot be made, but not in CI as root on Debian."""
    why = _impossible()
    if why:
        if os.environ.get("CI") and os.geteuid() == 0 and "ID=debian\n" in _os_release():
            pytest.fail(why)
        pytest.skip(why)
    hosts = TwoHosts(logs)
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.remove()


def marked_processes(marker: str) -> list[int]:
    """Processes that have ``MARKER`` with this value in their environment; without zombies."""
    sought = f"{MARKER}={marker}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if sought in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _impossible() -> str | None:
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip") is None:
        return "no `ip` on PATH to make network namespaces with; install iproute2"
    probe = f"sgmim-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


def _os_release() -> str:
    path = Path("/etc/os-release")
    return path.read_text() if path.exists() else ""


def _ip(*words: Any) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
