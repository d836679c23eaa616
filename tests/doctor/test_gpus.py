"""What the driver prints, read back; the driver itself is a script here."""

from pathlib import Path

import pytest

from slipstream.doctor import gpus

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tNODE\t0-31\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\t\tN/A\n"
    "NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n  NV#  = Connection over NVLinks\n"
)
CARDS = "NVIDIA H200, 143771, 9.0, 512, 580.82.07\nNVIDIA H200, 143771, 9.0, [N/A], 580.82.07\n"


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_topology() -> None:
    assert gpus.parse_topology(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    assert gpus.parse_topology("") == gpus.parse_topology("\tGPU0\tCPU Affinity\nGPU0\t X \t0-31\n") == {}


def test_links_in_words() -> None:
    pairs = [
        {"gpus": [0, 1], "link": "NV18", "peer_access": True},
        {"gpus": [0, 2], "link": "SYS", "peer_access": False},
        {"gpus": [1, 2], "link": "SYS", "peer_access": False},
    ]
    assert gpus.describe_links(pairs) == [
        "GPUs 0-1: 18 NVLinks, peer access", "GPUs 0-2, 1-2: SYS, over PCIe, no peer access"
    ]  # fmt: skip
    assert gpus.describe_links([{"gpus": [0, 1], "link": None, "peer_access": None}]) == [
        "every pair: link unknown, peer access not known"
    ]
    assert gpus.describe_links([]) == []


def test_the_drivers_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cards").write_text(CARDS)
    (tmp_path / "topology").write_text(TOPOLOGY)
    driver(tmp_path, monkeypatch, f'[ "$1" = topo ] && exec cat {tmp_path}/topology\nexec cat {tmp_path}/cards')
    found = gpus.driver_gpus()
    assert [gpu["used_gib"] for gpu in found] == [0.5, None]
    assert (found[0]["name"], found[0]["memory_gib"], found[0]["driver"]) == ("NVIDIA H200", 140.4, "580.82.07")
    # torch sees none of these three GPUs.
    assert [(pair["gpus"], pair["link"], pair["peer_access"]) for pair in gpus.links()] == [
        ([0, 1], "NV18", None), ([0, 2], "SYS", None), ([1, 2], "SYS", None)
    ]  # fmt: skip


def test_a_driver_that_fails_or_hangs_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path / "fails", monkeypatch, "echo NVIDIA-SMI has failed; exit 9")
    assert gpus.driver_gpus() == gpus.links() == []
    monkeypatch.setattr(gpus, "_SECONDS", 0.2)
    driver(tmp_path / "hangs", monkeypatch, "exec sleep 60")
    assert gpus.driver_gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.driver_gpus() == []
