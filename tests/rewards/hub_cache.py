"""A Hugging Face cache on disk, laid out as `hf download` does it, for code that must work without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_repository(home: Path, repository: str, files: Mapping[str, bytes]) -> Path:
    """Writes files of a repository into the cache of HF_HOME `home`. Returns their folder."""
    folder = home / "hub" / ("models--" + repository.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot
