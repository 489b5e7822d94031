"""The memory of this process's device: the most that it has held (of a GPU what torch allocated, of a CPU all that was
resident), and giving back what is not in use."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """Returns the peak since the process began; what is measured never enters a digest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's, which a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def release_unused(device: torch.device) -> None:
    """Gives a GPU's memory that torch keeps for later to whoever shares the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
