"""What NVIDIA's data sheets say of its GPUs. Imports no torch."""

import re

# FLOP/s of bf16 matrix products without sparsity, from NVIDIA's data sheets, which print twice as much from Hopper on,
# with sparsity. The first name whose words all stand in the device's name is the one that counts.
BF16_PEAKS = {
    "A100 40GB": 312e12,
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
    "A100 40GB": 1.555e12,
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

# Bytes of the device's memory, from NVIDIA's data sheets, in GB of 10^9: the driver gives a little more.
MEMORY = {
    "A100 40GB": 40e9,
    "A100": 80e9,
    "H100 PCIe": 80e9,
    "H100 NVL": 94e9,
    "H100": 80e9,
    "H200 NVL": 141e9,
    "H200": 141e9,
    "GH200": 96e9,  # HBM3
    "B200": 180e9,  # of DGX B200: 1,440 GB of eight
    "GB200": 186e9,  # of GB200 NVL72: 13.4 TB of 72
    "L40S": 48e9,
}

# Bytes/s that a device sends to others of its machine, one direction: half of what the data sheets print for NVLink
# (600 GB/s of A100 and of the bridges, 900 of Hopper, 1,800 of Blackwell), half of PCIe 4.0's 64 GB/s for the L40S.
LINKS = {
    "A100 40GB": 300e9,
    "A100": 300e9,
    "H100 PCIe": 300e9,  # with the bridge, to one other; without it 64 GB/s of PCIe 5.0
    "H100 NVL": 300e9,
    "H100": 450e9,
    "H200 NVL": 450e9,
    "H200": 450e9,
    "GH200": 450e9,
    "B200": 900e9,
    "GB200": 900e9,
    "L40S": 32e9,
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
