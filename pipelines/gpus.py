"""What NVIDIA's data sheets say of its GPUs. Imports no torch."""

import re

# FLOP/s of bf16 matrix products without sparsity, from NVIDIA's data sheets, which print twice as much from Hopper on,
# with sparsity. The first name whose words all stand in the device's name is the one that counts.
BF16_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H200 NVL": 835e12,
    "H200": 989e12,  # SXM
    "GH200": 989e12,
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "L40S": 362e12,
}

# Bytes/s of the device's memory, from NVIDIA's data sheets, by the names of BF16_PEAKS.
BANDWIDTHS = {
    "A100": 2.0e12,  # 80 GB
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,  # SXM
    "H200 NVL": 4.8e12,
    "H200": 4.8e12,  # SXM
    "GH200": 4.0e12,  # HBM3
    "B200": 8.0e12,
    "GB200": 8.0e12,
    "L40S": 0.864e12,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16, dense, of a device by the name that torch.cuda.get_device_name() gives ("NVIDIA H100 80GB HBM3").

    None for a device that is not in BF16_PEAKS and for a slice of one (MIG).
    """
    name = named_gpu(device_name)
    return None if name is None else BF16_PEAKS[name]


def named_gpu(device_name: str) -> str | None:
    """Its name in BF16_PEAKS."""
    words = set(re.findall("[a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((name for name in BF16_PEAKS if words.issuperset(name.lower().split())), None)
