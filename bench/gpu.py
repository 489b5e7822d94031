"""Base models of real size on this machine's GPU: `python -m bench.gpu [--models sd15,sdxl] [KEY=VALUE ...]`.

rounds     whole rounds of every algorithm: seconds, images, memory, parity (bench/rounds.py)
kernels    what other kernels would do to sampling: speed, and how far log-probabilities move

Without a GPU, and with `--size small` anywhere, the same code runs on small models. Every case has a process of its
own, so that one that fails, or runs out of memory, costs its row alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.models import make_sd15, make_sdxl
from bench.rounds import be_a_gang_of_one, measure
from cluster.device import own_device
from cluster.doctor.model import Patient, draw_groups
from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.batching import stack_groups
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe
from tests.models import make_tiny_model, make_tiny_xl_model

RESULTS = Path(__file__).with_name("gpu.json")
KERNELS = "kernels"
ALGORITHMS = (
    *("prdp", "policy_gradient", "ddpo", "spin_exact", "sft", "dpo", "cpo", "spin"),
    *("ncp_sft", "ncp_dpo", "ncp_cpo", "sharpening_sft", "sharpening_rlhf"),
)
"""Each as `recipes/tiny_<algorithm>.yaml` has it: its source, its settings; model and sizes are this page's."""


CUDNN: Any = torch.backends.cudnn
FP32_WORK, FP32_PLACES = ("fp32_matmul", "fp32_convolution"), (torch.backends.cuda.matmul, CUDNN.conv)
"""What torch may do in TF32 when it is asked for fp32. By itself it does so with convolutions."""


@dataclass(frozen=True)
class Size:
    """How much is computed. A micro-batch is a group, whose log-probabilities then agree best with the sampler's."""

    num_groups: int
    group_size: int
    num_steps: int
    forgets_activations: bool = False


@dataclass(frozen=True)
class BaseModel:
    """A base model: who makes it at real size and small, and what is trained of it at what size."""

    make: Callable[[Path], Path]
    make_small: Callable[[Path], Path]
    size: Size
    trains: tuple[str, ...] = ("lora",)


SMALL = Size(2, 2, 3)
MODELS = {
    "sd15": BaseModel(make_sd15, make_tiny_model, Size(4, 8, 20), ("lora", "full")),
    "sdxl": BaseModel(make_sdxl, make_tiny_xl_model, Size(2, 4, 20, forgets_activations=True)),
}


@dataclass(frozen=True)
class Case:
    """One row: Case("sdxl", "dpo", "lora", "bf16"), or of other kernels Case("sd15", "kernels", "lora", "fp32")."""

    model: str
    algorithm: str
    trains: str
    precision: str

    def recipe(self, folder: Path, size: Size, overrides: Sequence[str] = ()) -> Recipe:
        """Returns the algorithm's tiny recipe with this model, at this size. Raises RecipeError."""
        path = f"recipes/tiny_{'prdp' if self.algorithm == KERNELS else self.algorithm}.yaml"
        own = load_recipe(path)
        num_groups, group_size = size.num_groups, size.group_size
        if own.batch.group_size == 1:  # One image of a dataset, or one pair, a group.
            num_groups, group_size = num_groups * group_size, 1
        changes = [
            f"model={{path: {folder}, trainable: {{form: {self.trains}}}}}",
            f"batch={{num_groups: {num_groups}, group_size: {group_size}}}",
            f"sampler.num_steps={size.num_steps}",
            "sampler.guidance_scale=5.0",
            "algorithm.num_updates=1",
            *["algorithm.iterations.0.learning_rate=1e-5"] * bool(own.iterations),
            *["rewards=[{name: jpeg_compressibility}]"] * bool(own.rewards),
            f"learner={{precision: {self.precision}, micro_batch_size: {size.group_size}, learning_rate: 1e-5, "
            # Gaps are measured here, and stop nothing.
            f"gradient_checkpointing: {str(size.forgets_activations).lower()}, parity_tolerance: 1e9}}",
            "evaluation={}",
        ]
        return load_recipe(path, [*changes, *overrides])


def cases(models: Sequence[str], algorithms: Sequence[str]) -> Iterator[Case]:
    """Yields all rows. NCP is fp32: its encoder refuses bf16, which rounds away what it is to tell apart."""
    for model in models:
        for algorithm in algorithms:
            if algorithm == KERNELS:
                yield from (Case(model, KERNELS, "lora", precision) for precision in ("bf16", "fp32"))
                continue
            precision = "fp32" if algorithm.startswith("ncp_") else "bf16"
            yield from (Case(model, algorithm, trains, precision) for trains in MODELS[model].trains)


def run(case: Case, folder: Path, size: Size, overrides: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Returns a case's row, measured in this process."""
    recipe = case.recipe(folder, size, overrides)
    learner = recipe.learner
    settings = {
        **recipe.batch.model_dump(),
        **recipe.sampler.model_dump(include={"kernel", "num_steps", "eta", "guidance_scale"}),
        **learner.model_dump(include={"precision", "micro_batch_size", "gradient_checkpointing", "offload_optimizer"}),
        "zero_stage": learner.sharded_stage,
    }
    if case.algorithm == KERNELS:
        return {**vars(case), "settings": settings, **kernels(recipe, device)}
    with tempfile.TemporaryDirectory() as run_dir:
        return {**vars(case), "settings": settings, **measure(recipe, Path(run_dir), device)}


# --- other kernels ----------------------------------------------------------------------------------------------------


@contextmanager
def as_it_is(policy: Policy) -> Iterator[None]:  # noqa: ARG001
    """What a run does."""
    yield


@contextmanager
def channels_last(policy: Policy) -> Iterator[None]:
    """Convolutions' weights with their channels innermost."""
    policy.denoiser.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        policy.denoiser.to(memory_format=torch.contiguous_format)


@contextmanager
def fp32_as(precision: str, policy: Policy) -> Iterator[None]:  # noqa: ARG001
    """Products of fp32 matrices and convolutions in TF32, 10 bits of mantissa, or in IEEE's fp32."""
    before = [place.fp32_precision for place in FP32_PLACES]
    for place in FP32_PLACES:
        place.fp32_precision = precision
    try:
        yield
    finally:
        for place, own in zip(FP32_PLACES, before, strict=True):
            place.fp32_precision = own


@contextmanager
def attention_by(backend: SDPBackend, policy: Policy) -> Iterator[None]:  # noqa: ARG001
    """One kernel for every attention."""
    with sdpa_kernel(backend):
        yield


@contextmanager
def fastest_convolutions(policy: Policy) -> Iterator[None]:  # noqa: ARG001
    """cuDNN tries its algorithms and keeps the fastest, which may be another one in the next process."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def compiled(policy: Policy) -> Iterator[None]:
    """torch.compile, for the shapes that come."""
    policy.denoiser.compile(dynamic=False)
    try:
        yield
    finally:
        policy.denoiser._compiled_call_impl = None
        torch.compiler.reset()


Variant = Callable[[Policy], Any]
EVERYWHERE: dict[str, Variant] = {
    "default": as_it_is,
    "channels_last": channels_last,
    "math_attention": functools.partial(attention_by, SDPBackend.MATH),
}
ON_GPUS: dict[str, Variant] = {
    "flash_attention": functools.partial(attention_by, SDPBackend.FLASH_ATTENTION),
    "efficient_attention": functools.partial(attention_by, SDPBackend.EFFICIENT_ATTENTION),
    "cudnn_attention": functools.partial(attention_by, SDPBackend.CUDNN_ATTENTION),
    "tf32": functools.partial(fp32_as, "tf32"),
    "ieee": functools.partial(fp32_as, "ieee"),
    "fastest_convolutions": fastest_convolutions,
    "compiled": compiled,
}


def kernels(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Returns how fast groups are sampled with each variant, over the default, and the gaps of log-probabilities,
    latent_mean: of each variant to what the default has stored, and of the default in batches of other sizes."""
    torch.set_num_threads(recipe.rollout_worker.threads)
    chain = Chain(Policy.from_recipe(recipe, device, with_decoder=False), recipe.sampler)
    patient = Patient(recipe, chain, stack_groups(draw_groups(recipe, chain), device))
    size = patient.batch.log_prob_PGT.shape[1]

    def sample() -> float:
        started = time.perf_counter()
        chain.sample("a photograph of a lighthouse at dusk", range(recipe.batch.group_size))
        return time.perf_counter() - started

    def gap(batch_size: int = size) -> float:
        return float(patient.gap(patient.scores(batch_size), patient.stored()).max())

    def try_(variant: Variant) -> dict[str, Any]:
        try:
            with variant(chain.policy):
                sample()
                return {"seconds": statistics.median(sample() for _ in range(3)), "log_prob_gap": gap()}
        except RuntimeError as error:  # a kernel that this device, dtype or shape has none of
            return {"failed": first_line(str(error))}

    found = {name: try_(variant) for name, variant in (EVERYWHERE | (ON_GPUS if device.type == "cuda" else {})).items()}
    for measured in found.values():
        if "seconds" in measured:
            measured["speed"] = found["default"]["seconds"] / measured["seconds"]
    return {"log_prob_gap_of_batches": {str(n): gap(n) for n in sorted({1, size, 2 * size})}, "variants": found}


# --- all cases --------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what rows are comparable on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        **{name: version(name) for name in ("torch", "diffusers", "deepspeed")},
        **{name: place.fp32_precision for name, place in zip(FP32_WORK, FP32_PLACES, strict=True)},
    }


def first_line(text: str) -> str:
    """Returns the first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "nothing was said")


def run_apart(case: Case, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a case's row, measured in a process of its own, or how that failed."""
    named = [case.model, case.algorithm, case.trains, case.precision]
    command = [sys.executable, "-m", "bench.gpu", "--size", arguments.size, "--case", *named, str(folder)]
    done = subprocess.run([*command, "--", *arguments.overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
        return {**vars(case), "failed": said[-1].strip()}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run_all(arguments: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Measures all cases and writes the results after each."""
    results = {**machine(device), "size": arguments.size, "overrides": arguments.overrides, "rows": []}
    for model in arguments.models:
        base = MODELS[model]
        source = (base.make if arguments.size == "real" else base.make_small)(folder / f"{model}-{arguments.size}")
        for case in cases([model], arguments.algorithms):
            row = run_apart(case, source, arguments)
            results["rows"].append(row)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(case.model, case.algorithm, case.trains, case.precision, told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """Returns a row in words."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "variants" in row:
        speeds = {name: one.get("speed") for name, one in row["variants"].items()}
        return ", ".join(f"{name} {speed:.2f}" if speed else f"{name} failed" for name, speed in speeds.items())
    roles = [
        f"{role} {row[role]['images_per_s'] if role == 'rollout' else row['num_images'] / row[role]['round_s']:.3g} "
        f"images/s, {row[role]['tflop_per_s']:.3g} TFLOP/s, {row[role]['peak_bytes'] / 1e9:.3g} GB"
        for role in ("rollout", "learner")
    ]
    gap = "" if row["parity"] is None else f"; parity {row['parity']['max_abs']:.1g} of {row['parity']['limit']:.1g}"
    return "; ".join(roles) + gap


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n\n")[0])

    def several(of: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            if unknown := sorted(set(text.split(",")) - set(of)):
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(of)}")
            return text.split(",")

        return read

    rows = (*ALGORITHMS, KERNELS)
    parser.add_argument("--models", type=several(tuple(MODELS)), default=list(MODELS), help="of sd15,sdxl")
    parser.add_argument("--algorithms", type=several(rows), default=list(rows), help="names of algorithms, and kernels")
    parser.add_argument("--size", choices=("real", "small"), default="real")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--models-dir", type=Path, help="keeps the models for the next time (9 GB)")
    parser.add_argument("--case", nargs=5, help="one row, measured in this process: MODEL ROW TRAINS PRECISION FOLDER")
    parser.add_argument("overrides", nargs="*", help="of every recipe, such as learner.micro_batch_size=4")
    return parser.parse_args(words)


def main() -> None:
    """Runs what the command line asks for."""
    arguments, device = parse(), torch.device(own_device())
    if arguments.size == "real" and device.type == "cpu":
        sys.exit("there is no GPU here: run it with --size small")
    if arguments.case:
        be_a_gang_of_one(device)
        model, row, trains, precision, folder = arguments.case
        size = MODELS[model].size if arguments.size == "real" else SMALL
        print(json.dumps(run(Case(model, row, trains, precision), Path(folder), size, arguments.overrides, device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run_all(arguments, arguments.models_dir or Path(temporary), device)


if __name__ == "__main__":
    main()
