"""Commands that end with whoever started them, also where that is killed.

On Linux the kernel ends them (PR_SET_PDEATHSIG). The signal is tied to the *thread* that starts a command, which may
well end before the process does. It is requested by a few lines of Python that then become the command (exec), since
code between fork and exec can deadlock in a process with other threads, such as Ray's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_BECOME = """
import ctypes, os, signal, sys
parent, sigterm, *command = sys.argv[1:]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent died first")
if sigterm == "blocked":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execv(command[0], command)
"""


def bound(command: Sequence[str | Path], *, is_sigterm_blocked: bool = False) -> list[str]:
    """Returns the command that runs a command, given by its path, and ends it with this thread and process. A blocked
    SIGTERM stays so unless the command unblocks it."""
    sigterm = "blocked" if is_sigterm_blocked else "let through"
    return [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), sigterm, *map(str, command)]
