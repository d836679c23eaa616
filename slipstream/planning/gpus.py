"""The GPUs that a plan can be made for, and what a job of them is called: `8xH100-80GB`."""

import re
from dataclasses import dataclass

from slipstream.planning.devices import PEAK_BF16_TFLOPS


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do, by its maker's data sheet.

    Attributes:
        memory_gib: what a process can use of it, as torch reports it.
        bandwidth: of its memory, TB/s.
        link: to the others in its host, GB/s in one direction: NVLink, or PCIe where there is none.
        network: to other hosts, GB/s a GPU in one direction: the fastest card that such hosts commonly have.
        peak_tflops: dense bf16.
    """

    name: str
    memory_gib: float
    bandwidth: float
    link: float
    network: float

    @property
    def peer_access(self) -> bool:
        """Whether it reaches the memory of the others in its host: it has NVLink, by the speed of its link."""
        return self.link > 100

    @property
    def peak_tflops(self) -> float:
        return PEAK_BF16_TFLOPS[self.name.split("-")[0].replace("RTX", "RTX ")]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", 178.4, 8.0, 900, 50),
        Gpu("H200", 139.8, 4.8, 450, 50),
        Gpu("H100-80GB", 79.1, 3.35, 450, 50),
        Gpu("A100-80GB", 79.1, 2.04, 300, 25),
        Gpu("A100-40GB", 39.4, 1.56, 300, 25),
        Gpu("L40S", 44.4, 0.864, 32, 12.5),
        Gpu("RTX4090", 23.5, 1.01, 32, 12.5),
    )
}
_FAMILIES = {"H100": "H100-80GB", "A100": "A100-80GB"}
PER_HOST = 8


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """The number and the kind of `8xH100-80GB`, `8 x RTX 4090` or `H200`.

    Raises:
        ValueError: no such GPU, or no number of them.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.+)", text.strip(), re.IGNORECASE)
    assert match is not None or not text.strip()
    wanted = re.sub(r"[\s_]+", "", match[2]).upper().removeprefix("NVIDIA") if match else ""
    name = _FAMILIES.get(wanted, wanted)
    count = int(match[1] or 1) if match else 0
    if name not in GPUS or count < 1:
        raise ValueError(f"--gpus {text}: give a number and one of {', '.join(GPUS)}, such as 8xH100-80GB")
    return count, GPUS[name]


def find_gpu(device: str) -> Gpu:
    """The GPU that the driver calls `device`, such as "NVIDIA A100-SXM4-40GB".

    Raises:
        ValueError: none that a plan can be made for.
    """
    words = f" {re.sub(r'[^A-Z0-9]+', ' ', device.upper())} "
    found = [gpu for gpu in GPUS.values() if f" {gpu.name.split('-')[0].replace('RTX', 'RTX ')} " in words]
    if not found:
        raise ValueError(f"{device!r}: no GPU of this name is known; known are {', '.join(GPUS)}")
    # Of the same chip with more and with less memory, the one whose size the name has.
    return next((gpu for gpu in found if f" {gpu.name.split('-')[-1]} " in words), found[0])
