"""Two hosts on one machine: network namespaces, each with an address of its own, and a wire."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface besides its loopback."""

    name: str
    interface: str
    address: str

    def start(self, argv: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a program on this host. Gloo is told which interface leads to the other."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *argv],
            env={**os.environ, **environ, "GLOO_SOCKET_IFNAME": self.interface},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"network namespaces are not permitted here: ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; gone afterwards. Skips where not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2's `ip`")
    number = os.getpid() % 50_000  # interface names may be 15 characters long
    subnet = f"10.{200 + number % 50}.{number // 200}"
    hosts = tuple(Host(f"burnish-{number}-{i}", f"burn{number}-{i}", f"{subnet}.{i + 1}") for i in range(2))
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        # A namespace takes its interface along, and that one its peer.
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
