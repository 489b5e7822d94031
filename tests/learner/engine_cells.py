"""One rank of a gang that trains a small U-Net in every cell of the ZeRO matrix and writes down what came of it.

Run as `python -m tests.learner.engine_cells RANK WORLD_SIZE PORT MODEL FOLDER WHICH`, WHICH being `few` or `rest`.
Rank 0 writes FOLDER/<world size>.json and FOLDER/<cell>-<world size>.safetensors. All cells share one process, since
importing DeepSpeed takes seconds.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.policy import DTYPES, Policy
from diffusion.weights import weights_digest
from learner.engine import Engine
from protocol.recipe import Full, Lora
from protocol.roles import Average, Learner

NUM_STEPS, NUM_BATCHES = 4, 2
DECAY = 0.22
"""Above (1 + n) / (10 + n) in the first two steps, and below afterwards."""
HALF = NUM_STEPS // 2


@dataclass(frozen=True)
class Cell:
    """A corner of the matrix: what is trained, how it is sharded, and in which dtype."""

    form: str
    stage: int
    precision: str
    offload: Literal["", "optimizer", "parameters", "both"] = ""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"

    @property
    def name(self) -> str:
        return f"{self.form}-stage{self.stage}-{self.precision}{self.offload and '-offload-' + self.offload}"

    def learner(self, world_size: int) -> Learner:
        return Learner(
            world_size=world_size,
            zero_stage=self.stage,
            precision=self.precision,
            offload_optimizer=self.offload in ("optimizer", "both"),
            offload_parameters=self.offload in ("parameters", "both"),
            learning_rate=1e-3,
            weight_decay=1e-2,
            max_grad_norm=0.5,
            optimizer=self.optimizer,
            ema=Average(decay=DECAY),
        )

    def policy(self, model: str) -> Policy:
        trainable = Lora(rank=4, alpha=4) if self.form == "lora" else Full(form="full")
        return Policy(model, trainable=trainable, seed=0, dtype=DTYPES[self.precision], with_decoder=False)

    def with_other_stage(self) -> Cell:
        """The cell whose checkpoint this one also reads."""
        return Cell(self.form, (self.stage + 1) % 4, self.precision)


def cells() -> list[Cell]:
    """All 24 cells, and the optimizer and parameters offloaded where there are any to offload."""
    matrix = [Cell(f, s, p) for f in ("lora", "full") for s in range(4) for p in ("fp32", "bf16", "fp16")]
    optimizer = [Cell("lora", stage, "fp32", "optimizer") for stage in (1, 2, 3)]
    both = [Cell("full", 3, "bf16", "both"), Cell("lora", 2, "fp16", "optimizer")]
    return [*matrix, *optimizer, Cell("lora", 3, "fp32", "parameters"), *both]


FEW = (Cell("lora", 3, "fp32"), Cell("lora", 2, "bf16"), Cell("lora", 0, "fp32"))
"""What the suite trains; the rest is slow."""


def chosen(which: str) -> list[Cell]:
    """The cells of a gang."""
    return list(FEW) if which == "few" else [cell for cell in cells() if cell not in FEW]


def make_losses(policy: Policy, denoiser: Callable[..., Tensor], step: int) -> list[Callable[[], Tensor]]:
    """The micro-batches of a step, the same ones for every number of ranks: fixed noise to be predicted."""

    def loss(number: int) -> Tensor:
        noise = torch.Generator().manual_seed(100 * step + number)
        state, target = torch.randn(2, 3, *policy.latent_shape_CHW, generator=noise)
        timestep = torch.randint(1000, (3,), generator=noise)
        predicted = policy.predict(denoiser, state, timestep, policy.condition(["a red one"] * 3), 1.0)
        return (predicted - target).square().mean() / NUM_BATCHES

    return [functools.partial(loss, number) for number in range(NUM_BATCHES)]


class Training:
    """A policy in an engine of a cell."""

    def __init__(self, cell: Cell, model: str, world_size: int) -> None:
        self.policy = cell.policy(model)
        self.engine = Engine(self.policy.denoiser, cell.learner(world_size), torch.device("cpu"))
        self.norms: list[float] = []

    def run(self, first: int, last: int) -> Training:
        for step in range(first, last):
            losses = make_losses(self.policy, self.engine.denoiser, step)
            self.norms.append(self.engine.apply(losses[self.engine.rank :: self.engine.world_size]))
        return self

    def digest(self) -> str:
        with self.engine.gathered():
            return weights_digest(self.policy.trainable_state())

    def masters(self) -> dict[str, Tensor]:
        """On every rank, without the moments, whose gathering takes twice as long."""
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in self.engine.masters()}

    def average(self) -> dict[str, Tensor]:
        assert self.engine.average
        whole: dict[str, Tensor] = self.engine.broadcast(self.engine.average.whole())
        return whole

    def take_up_average(self, whole: dict[str, Tensor]) -> Training:
        assert self.engine.average
        self.engine.average.load(whole, HALF)
        return self

    def take_up(self, file: Path) -> Training:
        self.engine.load_consolidated(load_file(file), HALF, make_losses(self.policy, self.engine.denoiser, 0)[0])
        return self


def reference(cell: Cell, model: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same training by torch alone: fp32 masters, gradients summed in fp32, AdamW; in fp16 of a scaled loss.

    Returns masters at the start and at the end, and the gradient norms.
    """
    policy, settings = cell.policy(model), cell.learner(1)
    live = {name: p for name, p in policy.denoiser.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in live.items()}
    start = {name: master.detach().clone() for name, master in masters.items()}
    optimizer = torch.optim.AdamW(
        masters.values(),
        settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    norms, scale = [], 2.0**16 if cell.precision == "fp16" else 1.0
    for step in range(NUM_STEPS):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for loss in make_losses(policy, policy.denoiser, step):
            gradients = torch.autograd.grad(loss() * scale, list(live.values()))
            for master, gradient in zip(masters.values(), gradients, strict=True):
                assert master.grad is not None
                master.grad += gradient.float() / scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), settings.max_grad_norm)))
        optimizer.step()
        for name, parameter in live.items():
            parameter.data.copy_(masters[name].detach())
    return start, {name: master.detach() for name, master in masters.items()}, norms


def averaged(
    training: Training, first: int, last: int, before: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trains on; returns what the average must then be, by its formula, of the masters after each step, and those after
    the last."""
    average = masters = before
    for step in range(first, last):
        masters = training.run(step, step + 1).masters()
        weight = 1 - min(DECAY, (1 + step) / (10 + step))
        average = {name: tensor + (masters[name] - tensor) * weight for name, tensor in average.items()}
    return average, masters


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states have the same bits."""
    return weights_digest(one) == weights_digest(other)


def gap(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The distance of two end points, as a share of the way from the start (Euclidean, all parameters)."""
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in other)
    moved = sum(float((start[name] - other[name]).double().square().sum()) for name in other)
    return float((apart / moved) ** 0.5)


def examine(cell: Cell, model: str, world_size: int, folder: Path) -> dict[str, object]:
    """Trains a cell unbroken, repeated, resumed from DeepSpeed's files, and resumed from consolidated ones."""
    start, end, norms = reference(cell, model)
    mine = f"{cell.name}-{world_size}"
    unbroken = Training(cell, model, world_size)
    begun = unbroken.masters()
    starts_there = are_equal(unbroken.average(), begun)
    expected, _ = averaged(unbroken, 0, HALF, begun)
    average = unbroken.average()
    unbroken.engine.save(folder / mine)
    if (whole := unbroken.engine.consolidated()) is not None:
        save_file(whole, folder / f"{mine}.safetensors")
        save_file(average, folder / f"{mine}-average.safetensors")
    unbroken.engine.barrier()
    at_half = unbroken.digest()
    expected_last, masters = averaged(unbroken, HALF, NUM_STEPS, average)
    digest = unbroken.digest()
    resumed = Training(cell, model, world_size)
    resumed.engine.load(folder / mine)
    resumed.take_up_average(average)
    own = Training(cell, model, world_size).take_up(folder / f"{mine}.safetensors")
    result: dict[str, object] = {
        "gap_to_adamw": gap(masters, end, start),
        "norm_gap": max(abs(one / other - 1) for one, other in zip(unbroken.norms, norms, strict=True)),
        "moved": digest != at_half,
        "repeats": Training(cell, model, world_size).run(0, HALF).digest() == at_half,
        "resumes": resumed.run(HALF, NUM_STEPS).digest() == digest,
        "consolidated_carries_the_weights": own.digest() == at_half,
        "consolidated_gap": gap(own.run(HALF, NUM_STEPS).masters(), masters, start),
        "average_is_its_formula": are_equal(average, expected) and are_equal(unbroken.average(), expected_last),
        "average_starts_as_the_masters": starts_there,
        "average_resumes": are_equal(resumed.average(), expected_last),
        "average_leaves_masters": are_equal(unbroken.masters(), masters),
    }
    for origin in other_origins(cell, folder):
        other = Training(cell, model, world_size).take_up(folder / f"{origin}.safetensors")
        average = load_file(folder / f"{origin}-average.safetensors")
        result[f"average_from_{origin}"] = are_equal(other.take_up_average(average).average(), average)
        result[f"gap_from_{origin}"] = gap(other.run(HALF, NUM_STEPS).masters(), masters, start)
    return result


def other_origins(cell: Cell, folder: Path) -> Iterator[str]:
    """The consolidated file that one rank wrote at another stage, if this gang is the one of two ranks."""
    origin = f"{cell.with_other_stage().name}-1"
    if (folder / "1.json").exists() and (folder / f"{origin}.safetensors").exists():
        yield origin


def main() -> None:
    """Examines every cell on this rank."""
    rank, world_size, port, model, folder, which = sys.argv[1:]
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    results = {cell.name: examine(cell, model, int(world_size), Path(folder)) for cell in chosen(which)}
    if rank == "0":
        (Path(folder) / f"{world_size}.json").write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
