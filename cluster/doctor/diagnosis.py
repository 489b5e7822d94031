"""`sfumato doctor`: is this machine fit, and do sampler, learner and diffusers agree about this model?

    sfumato doctor                          the machine
    sfumato doctor runwayml/...  ./model    and a model, as a run with the usual settings would use it
    sfumato doctor recipes/tiny_prdp.yaml   and a recipe: its Redis, its roles, its model, its sampler

A finding is ok, a warning (a run can be started), or an error (it cannot, or could not be trusted).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.doctor.finding import Finding, guarded
from cluster.doctor.machine import machine_findings
from protocol import __version__
from protocol.derived import check_before_start
from protocol.errors import ModelError, RecipeError, SfumatoError
from protocol.models import check_family, predicts_flow
from protocol.paths import model_source
from protocol.recipe import Recipe
from protocol.recipe_file import apply_override, load_recipe, parse_recipe

USUAL = {
    "rounds": 1,
    "batch": {"num_groups": 2, "group_size": 4},
    "rewards": [{"name": "jpeg_compressibility"}],
    "algorithm": {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1e-4},
    "prompts": {"train": "assets/prompts_train.txt"},
}
"""What a model without a recipe is examined with: PRDP's window on Stable Diffusion 1.4 (arXiv 2402.08714)."""

FLOW_SAMPLER = {"kernel": "flow_grpo", "eta": 0.7}
"""What a flow-matching model is examined with: Flow-GRPO's SDE (arXiv 2505.05470)."""

RUN_FOLDER = Path("runs")

NOT_EXAMINED = Finding("base model", "error", "not examined: what it needs cannot be imported", do="see imports")


@dataclass(frozen=True)
class Diagnosis:
    """All findings: of the machine, then of the recipe and its model where one was named, which was examined on the
    devices of rollouts and learner."""

    subject: str
    devices: tuple[str, ...]
    findings: dict[str, list[Finding]]

    def count(self, verdict: str) -> int:
        """Returns how many findings have a verdict."""
        return sum(finding.verdict == verdict for part in self.findings.values() for finding in part)


def diagnose(
    subject: str | None, overrides: Sequence[str], device: str | None, tell: Callable[[str, Finding], None]
) -> Diagnosis:
    """Examines the machine and what is named, calling `tell(part, finding)` as findings are made.

    Raises RecipeError or ModelError where `subject` is neither a recipe nor a model.
    """
    recipe = _recipe_of(subject, overrides)
    findings = {"machine": _collect("machine", machine_findings(recipe, RUN_FOLDER), tell)}
    devices: tuple[str, ...] = ()
    if recipe is not None:
        findings["recipe"] = _collect("recipe", iter([_check_recipe(recipe)]), tell)
        if _imports_fail(findings["machine"]):
            found = iter([NOT_EXAMINED])
        else:
            devices = (device, device) if device else _devices_of(recipe)
            found = guarded("base model", lambda: _model_findings(recipe, *devices))
        findings["model"] = _collect("model", found, tell)
    return Diagnosis(subject or "", devices, findings)


def write_json(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the diagnosis for other programs: a row a finding."""
    rows = [_row(part, finding) for part, found in diagnosis.findings.items() for finding in found]
    counts = {f"num_{verdict}": diagnosis.count(verdict) for verdict in ("ok", "warning", "error")}
    document = {"sfumato": __version__, "subject": diagnosis.subject, "devices": diagnosis.devices, **counts}
    path.write_text(json.dumps({**document, "findings": rows}, indent=1, allow_nan=False) + "\n")


def _row(part: str, finding: Finding) -> dict[str, object]:
    """JSON has no numbers that are not finite: those become null."""
    number = finding.number if finding.number is not None and math.isfinite(finding.number) else None
    return {"part": part, **asdict(finding), "number": number}


def print_finding(part: str, finding: Finding) -> None:
    """Prints a finding at once: a large model takes minutes."""
    limit = f" (limit {finding.limit:.1g})" if finding.limit is not None else ""
    print(f"  {finding.verdict:<8} {part:<8} {finding.name}: {finding.found}{limit}", flush=True)
    if finding.do:
        print(f"{'':20}to do: {finding.do}", flush=True)


def _collect(part: str, found: Iterator[Finding], tell: Callable[[str, Finding], None]) -> list[Finding]:
    kept = []
    for finding in found:
        tell(part, finding)
        kept.append(finding)
    return kept


def _recipe_of(subject: str | None, overrides: Sequence[str]) -> Recipe | None:
    if subject is None:
        return None
    if Path(subject).suffix in (".yaml", ".yml"):
        return load_recipe(subject, overrides)
    try:
        source = model_source(subject)
    except ModelError as error:
        raise RecipeError(
            "this is neither a recipe nor a model",
            value=subject,
            expected="a YAML file, a model folder in diffusers layout, a hub id, or `embedded`",
        ) from error
    document = {**copy.deepcopy(USUAL), "model": {"path": subject}}
    if _is_flow(source):
        document["sampler"] = {**FLOW_SAMPLER}
    for override in overrides:
        apply_override(document, override)
    return parse_recipe(document, source=f"doctor's usual recipe for {subject}")


def _is_flow(source: str) -> bool:
    """Reads no more of a model than its index. What cannot be read, or is not supported, becomes a finding later."""
    try:
        index = Path(source) / "model_index.json"
        if not index.is_file():
            from huggingface_hub import hf_hub_download

            index = Path(hf_hub_download(source, index.name))
        return predicts_flow(check_family(json.loads(index.read_text()).get("_class_name"), source))
    except Exception:  # the hub raises many types
        return False


def _check_recipe(recipe: Recipe) -> Finding:
    try:
        check_before_start(recipe)
    except SfumatoError as error:
        return Finding("recipe", "error", str(error), do="correct the recipe")
    return Finding("recipe", "ok", f"{recipe.algorithm.name}, {recipe.sampler.num_steps} steps; its files are there")


def _imports_fail(machine: Sequence[Finding]) -> bool:
    return any(finding.name == "imports" and finding.verdict == "error" for finding in machine)


def _devices_of(recipe: Recipe) -> tuple[str, str]:
    """Returns the devices of rollouts and learner, as far as this machine has them."""
    from cluster.device import own_device

    rollouts, learner = (own_device(wants_gpu=role.num_gpus > 0) for role in (recipe.rollout_worker, recipe.learner))
    return rollouts, learner


def _model_findings(recipe: Recipe, device: str, learner_device: str) -> Iterator[Finding]:
    from cluster.doctor.model import model_findings

    return model_findings(recipe, device, learner_device)
