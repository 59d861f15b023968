"""Rotary frequencies from Hugging Face's rope settings, for the models Megatron builds.

Megatron fixes Llama 3.1's low_freq_factor, high_freq_factor and original context length in its code; the frequencies
are therefore computed here from the config and put into the model.
"""

import math
from typing import Any

import torch


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> torch.Tensor:
    """(head_dim / 2,) fp32: theta ** (-2i / head_dim), scaled by config.json's rope_scaling (None, linear, llama3).

    llama3: wavelengths longer than original / low_freq_factor are divided by the factor, shorter than
    original / high_freq_factor are kept, and between the two the frequency is interpolated (Llama 3.1 model card).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    assert scaling["rope_type"] == "llama3", scaling
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies
