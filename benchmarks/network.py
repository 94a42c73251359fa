"""Processes that are joined by links as slow as a config says, on one machine.

Each process is in a network namespace of its own, with one end of a veth pair; the other ends are
ports of a bridge. `tc` limits what a process can send. Needs root, Linux, and the package iproute2.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

PORT = 12399
SUBNET = "10.203.77"


def missing() -> str:
    """Returns why namespaces can't be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "network namespaces need the commands ip and tc (package iproute2)"
    name = f"jaxdp-try-{os.getpid()}"  # Several processes may try at once.
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"ip netns add fails ({done.stderr.strip()})" if done.returncode else ""


class Network:
    """Namespaces joined by shaped links, for the length of a `with` block.

    Attributes:
      shape: what limits a link, in words.
    """

    def __init__(self, count: int, mbit: float = 0.0, delay_ms: float = 0.0):
        """Takes the number of namespaces, and what each can send.

        Args:
          count: namespaces.
          mbit: Mbit/s that a process can send; 0: no limit.
          delay_ms: milliseconds until it arrives; needs a kernel with netem, and is left out, said
            by `shape`, on another.
        """
        self._names = [f"jaxdp-{i}" for i in range(count)]
        self._mbit, self._delay = mbit, delay_ms
        self.shape = f"{mbit:g} Mbit/s" if mbit else "no limit"

    def __enter__(self) -> "Network":
        """Makes the namespaces, the bridge and the links."""
        self._remove()
        _run("ip", "netns", "add", "jaxdp-hub")
        _in("jaxdp-hub", "ip", "link", "add", "bridge", "type", "bridge")
        _in("jaxdp-hub", "ip", "link", "set", "bridge", "up")
        for i, name in enumerate(self._names):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", "eth", "netns", name, "type", "veth", "peer", "name", f"p{i}")
            _run("ip", "link", "set", f"p{i}", "netns", "jaxdp-hub")
            _in("jaxdp-hub", "ip", "link", "set", f"p{i}", "master", "bridge", "up")
            _in(name, "ip", "addr", "add", f"{self.address(i)}/24", "dev", "eth")
            _in(name, "ip", "link", "set", "lo", "up")
            _in(name, "ip", "link", "set", "eth", "up")
            # The processes find their own address by the name of the host.
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n{self.address(i)} {socket.gethostname()}\n")
        self._limit()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes all that was made."""
        self._remove()

    def address(self, i: int) -> str:
        """Returns the address of process i."""
        return f"{SUBNET}.{i + 1}"

    def start(self, i: int, *arguments: str, **options: object) -> subprocess.Popen:
        """Starts process i of a run: `jaxdp train` with these arguments."""
        count = len(self._names)
        joined = (
            f"--coordinator_address={self.address(0)}:{PORT}",
            f"--num_processes={count}",
            f"--process_id={i}",
        )
        command = (sys.executable, "-m", "jaxdp.train", *arguments, *joined)
        return subprocess.Popen(["ip", "netns", "exec", self._names[i], *command], **options)

    def connect(self, i: int, up: bool) -> None:
        """Cuts process i off from all others, or connects it again."""
        _in("jaxdp-hub", "ip", "link", "set", f"p{i}", "up" if up else "down")

    def drop(self, i: int, share: float) -> bool:
        """Drops a share of the packets that reach process i; returns whether this machine can."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", f"{share:g}")
        rule = ("iptables", "-A", "INPUT", "-i", "eth", *chance, "-j", "DROP")
        return bool(shutil.which("iptables")) and not _in(self._names[i], *rule, check=False)

    def sent(self, i: int) -> int:
        """Returns the bytes that process i has sent, with the headers of Ethernet, IP and TCP."""
        counter = ("cat", "/sys/class/net/eth/statistics/tx_bytes")
        command = ["ip", "netns", "exec", self._names[i], *counter]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    def _limit(self) -> None:
        if not self._mbit:
            return
        rate = f"{self._mbit:g}mbit"
        for name in self._names:
            bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
            _in(name, "tc", "qdisc", "add", "dev", "eth", "root", "handle", "1:", *bucket)
        if self._delay:
            delay = ("netem", "delay", f"{self._delay:g}ms", "limit", "100000")
            place = ("tc", "qdisc", "add", "dev", "eth", "parent", "1:1", *delay)
            done = [_in(name, *place, check=False) for name in self._names]
            has = not any(done)
            self.shape += f", {self._delay:g} ms" if has else "; no delay, this kernel lacks netem"

    def _remove(self) -> None:
        for name in ("jaxdp-hub", *self._names):
            _run("ip", "netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _in(name: str, *command: str, check: bool = True) -> int:
    return _run("ip", "netns", "exec", name, *command, check=check)


def _run(*command: str, check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.returncode
