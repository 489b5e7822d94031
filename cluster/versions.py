"""What a process runs, by version. Nodes that run other things than the driver are refused before they take part."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Mapping

from protocol import __version__
from protocol.errors import TrainingError
from protocol.paths import ROOT
from sfumato import PACKAGES

LIBRARIES = ("ray", "torch", "diffusers", "transformers", "peft")
OF_REWARDS = ("sfumato", "Python", "ray")
"""What a reward must share: its own environment may have other libraries."""


@functools.cache
def own_versions() -> dict[str, str]:
    """Returns {"sfumato": "0.1.0, code 9f86d081", "Python": "3.11.9", "torch": "2.9.0", ...} as of the first call.

    Builds of one version, such as torch for CPUs on a head without GPUs, count as equal: what their bits are is in the
    fingerprint of every group.
    """
    libraries = {name: _version(name) for name in LIBRARIES}
    return {"sfumato": f"{__version__}, code {_code_digest()}", "Python": platform.python_version(), **libraries}


def refuse_others(who: str, own: Mapping[str, str], wanted: Mapping[str, str], names: Collection[str] = ()) -> None:
    """Raises TrainingError with a table of what differs, of all or only of these names."""
    others = [name for name in wanted if own.get(name) != wanted[name] and (not names or name in names)]
    if not others:
        return
    lines = [("", "here", "driver"), *((name, own.get(name, "none"), wanted[name]) for name in others)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    table = "\n".join(f"    {line}".rstrip() for line in padded)
    raise TrainingError(
        f"{who} runs other versions than the driver, and its numbers would be others:\n{table}\n",
        do="install the same on every node; restart Ray there if packages have changed since it was started",
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        code = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()[:8]
