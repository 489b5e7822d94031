"""The numeric fingerprint: what two processes must share for their bits to be promised equal."""

from __future__ import annotations

import json

import torch


def fingerprint(device: torch.device, base_digest: str) -> str:
    """Returns canonical JSON: device, instruction set, threads, torch and base model."""
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "base_model": base_digest[:16],
    }
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))
