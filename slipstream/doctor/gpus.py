"""The GPUs of a machine, as torch and as the driver see them, and the links between them."""

import importlib.util
import re
import shutil
import subprocess
from typing import Any

_QUERY = "name,memory.total,compute_cap,memory.used,driver_version"
_SECONDS = 30  # a driver in trouble answers late or never


def torch_gpus() -> tuple[str | None, list[dict[str, Any]]]:
    """The CUDA version of torch, and name, memory and capability of each GPU that it can use."""
    if importlib.util.find_spec("torch") is None:
        return None, []
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = round(device.total_memory / 2**30, 1)
        found.append({"name": device.name, "memory_gib": memory, "capability": f"{device.major}.{device.minor}"})
    return torch.version.cuda, found


def driver_gpus() -> list[dict[str, Any]]:
    """What NVIDIA's driver lists: name, `memory_gib`, capability, `used_gib` and `driver`, its version."""
    text = _nvidia_smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    found = []
    for line in text.splitlines():
        fields = line.split(", ")
        if len(fields) != len(_QUERY.split(",")):
            continue
        name, total, capability, used, driver = fields
        found.append({"name": name, "memory_gib": _gib(total), "capability": capability, "used_gib": _gib(used),
                      "driver": driver})  # fmt: skip
    return found


def links() -> list[dict[str, Any]]:
    """Each pair of GPUs: `gpus`, `link` by the driver's name for it (None: not told), and `peer_access`.

    Peer access is None where torch and the driver count GPUs differently, as under CUDA_VISIBLE_DEVICES.
    """
    kinds = parse_topology(_nvidia_smi("topo", "-m"))
    peers = _peer_access()
    ends = {end for pair in kinds for end in pair}
    same = not kinds or len(ends) == len({end for pair in peers for end in pair})
    return [
        {"gpus": list(pair), "link": kinds.get(pair), "peer_access": peers.get(pair) if same else None}
        for pair in sorted(kinds or peers)
    ]


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """The link of each pair of GPUs in the table of `nvidia-smi topo -m`.

    NV18: 18 NVLinks. PIX, PXB, PHB, NODE, SYS: PCIe, through a switch, several, the CPU, its other bridge, another CPU.
    """
    rows = [[cell.strip() for cell in line.split("\t")] for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    head = next((row for row in rows if "GPU0" in row and row[0] != "GPU0"), [])
    found = {}
    for row in rows:
        if not (one := re.fullmatch(r"GPU(\d+)", row[0])):
            continue
        for name, cell in zip(head, row, strict=False):
            other = re.fullmatch(r"GPU(\d+)", name)
            if other and int(one[1]) < int(other[1]):
                found[int(one[1]), int(other[1])] = cell
    return found


def describe_links(found: list[dict[str, Any]]) -> list[str]:
    """One line for each kind of link, with the pairs that have it unless all have."""
    kinds: dict[tuple[str, bool | None], list[str]] = {}
    for pair in found:
        kinds.setdefault((pair["link"] or "unknown", pair["peer_access"]), []).append("-".join(map(str, pair["gpus"])))
    lines = []
    for (link, peer), pairs in kinds.items():
        wires = f"{link[2:]} NVLinks" if re.fullmatch(r"NV\d+", link) else f"{link}, over PCIe"
        access = {True: "peer access", False: "no peer access", None: "peer access not known"}[peer]
        who = "every pair" if len(kinds) == 1 else f"GPUs {', '.join(pairs)}"
        lines.append(f"{who}: {'link unknown' if link == 'unknown' else wires}, {access}")
    return lines


def _peer_access() -> dict[tuple[int, int], bool]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    count = torch.cuda.device_count()
    return {
        (one, other): torch.cuda.can_device_access_peer(one, other)
        for one in range(count)
        for other in range(one + 1, count)
    }


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where it is missing, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _gib(mib: str) -> float | None:
    """None where the driver does not tell, as for some in vGPU or MIG mode."""
    return round(float(mib) / 1024, 1) if re.fullmatch(r"[\d.]+", mib) else None
