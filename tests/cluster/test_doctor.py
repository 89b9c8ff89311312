"""What `doctor` finds, and the collectives it runs."""

import socket
import subprocess
import sys

from burnish.collectives import collective_test
from burnish.doctor import Finding, examine, examine_ranks
from burnish.runtime import Ranks


def test_two_ranks_of_this_machine_talk():
    report = collective_test(2)
    assert report.world_size == 2
    assert report.hosts == (socket.gethostname(),) * 2
    assert report.backend == "gloo"
    assert report.bandwidth_bytes_per_second > 1e6
    assert "2 ranks on 1 host over gloo" in str(report)


def test_ranks_that_cannot_meet_are_one_clear_finding(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface")
    finding = examine_ranks(Ranks(0, 0, 1), num_processes=2)
    assert finding.state == "bad"
    assert "could not work together" in finding.value
    assert "GLOO_SOCKET_IFNAME" in finding.cure


def test_this_machine_is_fit_for_training(tmp_path):
    findings = examine(tmp_path / "not" / "there" / "yet")
    assert [f for f in findings if f.state == "bad"] == []
    names = [finding.name for finding in findings]
    for name in ("system", "python", "cpu", "packages", "compiler", "disk", "network"):
        assert name in names
    assert "torch 2" in next(f.value for f in findings if f.name == "packages")


def test_a_driver_without_a_torch_that_can_use_it(tmp_path, monkeypatch):
    """The commonest trap: pip brought a CPU build onto a GPU machine."""
    import torch

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.86.10\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    bad = [finding for finding in examine(tmp_path) if finding.state == "bad"]
    assert [finding.name for finding in bad] == ["device"]
    assert "570.86.10" in bad[0].value


def test_a_finding_reads_well():
    text = str(Finding("disk", "1.0 GiB free at /data", "note", "Free some."))
    assert text.splitlines() == ["note  disk         1.0 GiB free at /data", " " * 19 + "Free some."]


def test_importing_it_needs_no_torch():
    code = "import sys, burnish.doctor, burnish.collectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
