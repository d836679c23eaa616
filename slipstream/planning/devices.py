"""What GPUs can do, by the name that the driver gives them."""

# Dense bf16 peak of the makers' data sheets, TFLOP/s (without sparsity). The first name found in the device's counts.
PEAK_BF16_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX PRO 6000": 503.8,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_bf16_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU in TFLOP/s, or None if this device is not in the list.

    >>> peak_bf16_tflops("NVIDIA H200")
    989.0
    """
    for name, peak in PEAK_BF16_TFLOPS.items():
        if name.lower() in device_name.lower():
            return peak
    return None
