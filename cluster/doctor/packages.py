"""What `sfumato doctor` says of packages: can they be imported together, and are they what was tested?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding

NEEDED = {
    "torch": "nn",
    "transformers": "CLIPTextModel",
    "diffusers": "StableDiffusionPipeline",
    "peft": "LoraConfig",
    "deepspeed": "",
    "ray": "",
    "redis": "",
    "safetensors": "torch",
}
"""What roles import, each with a part that is loaded only when it is asked for."""

TRY_IMPORTS = """
import importlib, json, os, sys
answers = {}
for name, part in json.loads(sys.argv[1]).items():
    try:
        module = importlib.import_module(name)
        if part and not hasattr(module, part):
            importlib.import_module(name + "." + part)
        answers[name] = ["ok", str(getattr(module, "__version__", ""))]
    except ModuleNotFoundError as error:
        answers[name] = ["missing" if error.name == name else "broken", "%s" % error]
    except BaseException as error:
        answers[name] = ["broken", "%s: %s" % (type(error).__name__, error)]
sys.stdout.flush()
os.write(1, ("\\n" + json.dumps(answers)).encode())
"""

TORCH_FACTS = """
import json, os
facts = {"torch": None, "torch_error": "", "torchvision": None, "torchvision_error": ""}
try:
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    gpus = range(torch.cuda.device_count()) if cuda else ()
    facts.update(
        cuda=torch.version.cuda,
        gpus=[torch.cuda.get_device_name(i) for i in gpus],
        capabilities=["sm_%d%d" % torch.cuda.get_device_capability(i) for i in gpus],
        kernels=torch.cuda.get_arch_list() if cuda else [],
        bf16=torch.cuda.is_bf16_supported() if cuda else None,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
        gloo=dist.is_gloo_available(),
        torch=torch.__version__,
    )
except BaseException as error:
    facts["torch_error"] = "%s: %s" % (type(error).__name__, error)
try:
    import torchvision
    facts["torchvision"] = str(torchvision.__version__)
except ModuleNotFoundError as error:
    facts["torchvision_error"] = "" if error.name == "torchvision" else str(error)
except BaseException as error:
    facts["torchvision_error"] = "%s: %s" % (type(error).__name__, error)
os.write(1, ("\\n" + json.dumps(facts)).encode())
"""

TorchFacts = dict[str, Any]
"""torch's and torchvision's versions or None, why they cannot be imported, and what torch can use."""

Answers = Mapping[str, tuple[str, str]]
"""Of each module: ok and its version, missing or broken and the reason."""


def torch_facts() -> TorchFacts:
    """Asks torch, and then torchvision, in a process of their own."""
    facts = _ask(TORCH_FACTS)
    if isinstance(facts, str):
        return {"torch": None, "torch_error": facts, "torchvision": None, "torchvision_error": ""}
    return facts


def try_imports(parts: Mapping[str, str]) -> Answers:
    """Imports modules one after the other in a process of their own, which may die of it."""
    found = _ask(TRY_IMPORTS, json.dumps(dict(parts)))
    if isinstance(found, str):
        return dict.fromkeys(parts, ("broken", found))
    return {name: (how, detail) for name, (how, detail) in found.items()}


def _ask(program: str, *arguments: str) -> dict[str, Any] | str:
    """Returns the JSON that a program writes as its last line, or how it died."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program, *arguments],
        # DeepSpeed otherwise looks for a GPU when it is imported.
        env={"DS_ACCELERATOR": "cpu", **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"the process ended with {done.returncode}: {reason}"


def check_imports(facts: TorchFacts) -> Iterator[Finding]:
    """What roles import, and torchvision, which we do not need but transformers imports where there is one."""
    answers = try_imports(NEEDED)
    yield judge_needed(answers)
    yield judge_torchvision(facts, answers)


def judge_needed(answers: Answers) -> Finding:
    """What every role imports."""
    missing = [name for name, (how, _) in answers.items() if how == "missing"]
    broken = {name: detail for name, (how, detail) in answers.items() if how == "broken"}
    if missing:
        do = "pip install --constraint constraints.txt sfumato's dependencies (`make install` does)"
        return Finding("imports", "error", f"not installed: {', '.join(missing)}", do=do)
    if broken:
        name, reason = next(iter(broken.items()))
        do = "see torch and torchvision" if "torchvision" in reason else f"install {name} again"
        return Finding("imports", "error", f"{', '.join(broken)} cannot be imported: {reason}", do=do)
    return Finding("imports", "ok", ", ".join(f"{name} {version}".strip() for name, (_, version) in answers.items()))


def judge_torchvision(facts: TorchFacts, answers: Answers) -> Finding:
    """A torchvision of another build than torch's has no operators, and takes diffusers and transformers down."""
    name, torch, torchvision = "torch and torchvision", facts["torch"], facts["torchvision"]
    if torch is None:
        return Finding(name, "error", f"torch cannot be imported: {facts['torch_error']}", do="install torch")
    if torchvision is not None:
        return Finding(name, "ok", f"torch {torch} and torchvision {torchvision}, a pair that works")
    if not facts["torchvision_error"]:
        return Finding(name, "ok", f"torch {torch} alone; no torchvision is needed")
    felled = [package for package in ("transformers", "diffusers") if answers[package][0] == "broken"]
    suffix = f", and so {' and '.join(felled)} cannot be imported" if felled else ""
    return Finding(
        name,
        "error" if felled else "warning",
        f"torch {torch} and a torchvision of another build: {facts['torchvision_error']}{suffix}",
        do="pip uninstall torchvision, which sfumato does not need; or install the one of the same index and build "
        "as torch (both from https://download.pytorch.org/whl/cpu, or both from the same .../whl/cu...)",
    )


def check_packages(constraints: Path) -> Iterator[Finding]:
    """Installed versions against the ranges that we need and the versions that were tested."""
    yield check_ranges()
    if not constraints.is_file():
        yield Finding("versions", "ok", "not compared: constraints.txt comes with the repository only")
        return
    pinned = read_pins(constraints)
    installed = {name: version for name in pinned if (version := installed_version(name))}
    other = {name: found for name, found in installed.items() if not _same(found, pinned[name])}
    found = f"{len(installed)} of constraints.txt are installed, {len(other)} in another version"
    if not other:
        yield Finding("versions", "ok", found, number=0.0)
        return
    told = ", ".join(f"{name} {version} (tested: {pinned[name]})" for name, version in sorted(other.items()))
    do = (
        "pip install --constraint constraints.txt ... to have what was tested; on a GPU, torch's local build may differ"
    )
    yield Finding("versions", "warning", f"{found}: {told}", do=do, number=float(len(other)))


def check_ranges() -> Finding:
    """Direct dependencies are there and within the ranges that pyproject.toml gives."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("sfumato") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "warning", "sfumato itself is not installed", do="pip install --editable .")
    needed = [Requirement(line) for line in lines]
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version or 'missing'}, not {requirement.specifier}")
    if wrong:
        do = "pip install --constraint constraints.txt --editable ."
        return Finding("packages", "error", "; ".join(wrong), do=do, number=float(len(wrong)))
    return Finding("packages", "ok", "every dependency is there and new enough", number=0.0)


def read_pins(constraints: Path) -> dict[str, str]:
    """Returns name -> version of a constraints file."""
    lines = [line.partition("#")[0].strip() for line in constraints.read_text().splitlines()]
    return dict(line.split("==", 1) for line in lines if "==" in line)


def installed_version(name: str) -> str | None:
    """Returns a package's version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _same(installed: str, pinned: str) -> bool:
    """A local build of a version, such as torch's +cpu, is that version."""
    from packaging.version import Version

    return Version(installed).public == Version(pinned).public
