"""The score log: scores that asking again might not give again, on disk before they are used.

    RUN/scores/<label>/<ticket_id>-<digest of images and prompt>.json     {"scores": [...]} or {"failed": "why"}

An impure reward (an HTTP judge, votes) answers once for each ticket; so does an optional one, whose failing is not a
function of the images. A ticket that is answered again, by whomever and after whatever was killed, reads what the
first has written.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol.errors import RunDirError

FOLDER = "scores"


@dataclass(frozen=True)
class Entry:
    """What a reward gave for one group: fp32 scores, or the reason why there are none."""

    scores: np.ndarray | None
    failed: str = ""


class ScoreLog:
    """One reward's entries in a run directory. Any number of processes may write; of two answers the first stays."""

    def __init__(self, run_dir: Path, label: str) -> None:
        self._folder = run_dir / FOLDER / label

    def exists(self) -> bool:
        """True once something is written."""
        return self._folder.is_dir()

    def read(self, key: str) -> Entry | None:
        """Returns what is written under a key."""
        try:
            said = json.loads((self._folder / f"{key}.json").read_text())
        except FileNotFoundError:
            return None
        scores = said.get("scores")
        return Entry(None if scores is None else np.array(scores, np.float32), said.get("failed", ""))

    def write(self, key: str, entry: Entry) -> Entry:
        """Keeps an entry for good and returns it, or returns the one that was there before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        final, temporary = self._folder / f"{key}.json", self._folder / f".{uuid.uuid4().hex}"
        said = {"failed": entry.failed} if entry.scores is None else {"scores": entry.scores.tolist()}
        with temporary.open("w") as file:
            json.dump(said, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, final)  # Complete or not there, and never over another's.
        except FileExistsError:
            pass
        except OSError as error:
            raise RunDirError(
                f"the score log cannot be written: {error}",
                value=str(self._folder),
                expected="a file system with hard links",
                do="put the run directory on another file system",
            ) from error
        finally:
            temporary.unlink()
        _sync(self._folder)
        kept = self.read(key)
        assert kept is not None
        return kept


def score_key(ticket_id: str, images: np.ndarray, prompt: str) -> str:
    """Returns what a group's scores are kept under: a ticket made again with other last bits has other images."""
    digest = hashlib.sha256(f"{images.shape}{prompt}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return f"{ticket_id}-{digest.hexdigest()[:16]}"


def _sync(folder: Path) -> None:
    """A new name is on disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
