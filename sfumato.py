"""The front door: the command line's entry point, and the guard that makes our packages win.

Our folders are plain top-level packages with common names (`rewards`, `actors`, ...). A user's working directory
may well hold a `rewards.py` of its own. This module's name nobody else has: whoever imports it, driver or Ray worker,
gets our root first on `sys.path`, or an error; never somebody else's module in place of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("protocol", "diffusion", "rewards", "actors", "learner", "cluster")
WORKING_DIR = "SFUMATO_WORKING_DIR"
"""The variable that tells Ray's workers of the driver's working directory: those of nodes have one of their own."""


def claim_packages() -> None:
    """Puts our root first on `sys.path` and imports our packages from there, so that what comes before it later, as
    Ray puts the driver's working directory, cannot hide them.

    Raises ImportError where another module already has one of our names.
    """
    root = str(ROOT)
    sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
    for name in PACKAGES:
        origin = importlib.import_module(name).__file__
        if origin is None or Path(origin).resolve().parent != ROOT / name:
            raise ImportError(
                f"sfumato needs its own package {name!r} from {ROOT}, but this process would use {origin}. "
                f"Rename that module, or keep it out of PYTHONPATH; a custom reward can be given as ./file.py:Name."
            )


def set_up_ray_worker() -> None:
    """Runs in every Ray worker of a job before anything of ours is imported there. Where the driver's working directory
    is there too, as on one machine or a shared disk, it is the worker's too: recipes' paths are relative to it."""
    folder = os.environ.get(WORKING_DIR)
    if folder and os.path.isdir(folder):
        os.chdir(folder)
    path = [*sys.path]
    claim_packages()
    # Ours are imported by now. A reward's own environment must stay before others that ours are installed beside.
    sys.path[:] = path


def main() -> int:
    """Runs the command line. Returns the exit code."""
    claim_packages()
    from cluster.cli import run_command_line

    return run_command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
