"""A folder of small packages, which pip installs from without a network."""

from __future__ import annotations

import zipfile
from pathlib import Path


def add_package(folder: Path, name: str, number: str, code: str, requires: str = "") -> None:
    """Writes a wheel of one module."""
    information = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
    files = {
        f"{name}.py": code,
        f"{name}-{number}.dist-info/METADATA": information + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{name}-{number}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{number}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
