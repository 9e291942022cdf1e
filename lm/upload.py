"""Small numbers from the host to where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. To a GPU it goes from pinned memory, so that the host does not wait there for
    what the GPU still computes (`unverified`: no GPU has run it).
    """
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
