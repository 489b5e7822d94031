"""Descent by one pass or two is one-shot autograd, for any micro-batches, on any number of ranks."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.redis_server import free_port
from learner.algorithms.metrics import Metrics, mean_metric
from learner.descent import Descent, Step
from learner.engine import Engine
from learner.probes import Probe
from protocol.errors import TrainingError
from protocol.paths import ROOT
from protocol.recipe import Learner
from tests.learner.descent_cells import CELLS, FEW, learn_alone

pytestmark = pytest.mark.usefixtures("gang_of_one")

NUM_FEATURES = 5
MICRO_BATCHES = (2, 4, 6, 14, 1000)
"""In evaluations, of which an item has two."""


class Probed(nn.Module):
    """A linear network of which a probe asks two numbers an item."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_FEATURES, 1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, feature_NF: Tensor) -> Tensor:
        """One number a row."""
        output: Tensor = self.linear(feature_NF).tanh()[:, 0]
        return output


@dataclass(frozen=True)
class Scores:
    """What a network makes of each item's two rows of features, added up, or beside each other. Items are places in
    features (..., 2, F)."""

    feature: Tensor
    num_values: int | None = None

    width = 2
    num_branches = 1
    num_evaluations = 2

    @property
    def value_shape(self) -> tuple[int, ...]:
        return () if self.num_values is None else (self.num_values,)

    @property
    def filler_1K(self) -> Tensor:
        return torch.zeros(1, self.feature.dim() - 2, dtype=torch.long)

    def __call__(self, denoiser: Callable[[Tensor], Tensor], item_NK: Tensor) -> Tensor:
        feature_N2F = self.feature[tuple(item_NK.unbind(1))]
        value_N2 = denoiser(feature_N2F.flatten(0, 1)).view(-1, 2).double()
        return value_N2.sum(1) if self.num_values is None else value_N2


@dataclass(frozen=True)
class Bench:
    """A network in an engine, and what is asked of it."""

    module: Probed
    engine: Engine
    gradients: dict[str, Tensor]

    def descent(self, micro_batch_size: int) -> Descent:
        return Descent(self.engine, micro_batch_size, lambda: None)


@pytest.fixture
def make_bench() -> Iterator[Callable[[], Bench]]:
    """Makes networks that note the gradients that reach their parameters."""
    hooks = []

    def make() -> Bench:
        module = Probed()
        gradients = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}

        def note(name: str, gradient: Tensor) -> None:
            gradients[name] += gradient

        hooks.extend(p.register_hook(functools.partial(note, name)) for name, p in module.named_parameters())
        settings = Learner(learning_rate=1e-2, weight_decay=0.1)
        return Bench(module, Engine(module, settings, torch.device("cpu")), gradients)

    yield make
    for hook in hooks:
        hook.remove()


def autograd(loss: Callable[[nn.Module], Tensor]) -> tuple[float, dict[str, Tensor], float]:
    """The loss, its gradient, all at once, and that one's norm."""
    module = Probed()
    total = loss(module)
    total.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return float(total.detach()), gradients, float(torch.cat([g.flatten() for g in gradients.values()]).norm())


def assert_is(step: Step, bench: Bench, expected: tuple[float, dict[str, Tensor], float]) -> None:
    """The same loss and gradient, and a step was taken."""
    loss, gradients, norm = expected
    assert step.loss == pytest.approx(loss, rel=1e-6)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(bench.gradients[name], gradient, rtol=1e-5, atol=1e-7)
    start = Probed().state_dict()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in bench.module.state_dict().items())


UNITS = torch.randn(7, 2, NUM_FEATURES, generator=torch.Generator().manual_seed(1))
WEIGHT_U = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 0.25], dtype=torch.float64)
PAIRS = Scores(UNITS, num_values=2)


def contrast(value_N2: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
    """A loss on pairs of values, and two metrics of which one knows of the units of odd number alone."""
    margin_N = value_N2[:, 0] - value_N2[:, 1]
    loss = (WEIGHT_U[unit_N] * nn.functional.softplus(margin_N)).sum() / len(UNITS)
    odd_N = unit_N % 2 == 1
    return loss, {"margin": mean_metric(margin_N), "odd": mean_metric(margin_N[odd_N])}


@pytest.mark.parametrize("size", MICRO_BATCHES)
def test_one_pass_is_one_shot_autograd_for_any_micro_batches(make_bench: Callable[[], Bench], size: int) -> None:
    bench, all_units = make_bench(), torch.arange(len(UNITS))
    expected = autograd(lambda module: contrast(PAIRS(module, all_units[:, None]), all_units)[0])
    descent = bench.descent(size)
    step = descent.one_pass(PAIRS, contrast, len(UNITS), {"given": torch.tensor([3.0, 2.0], dtype=torch.float64)})
    assert_is(step, bench, expected)
    value_U2 = PAIRS(Probed(), all_units[:, None]).detach()
    margin_U = (value_U2[:, 0] - value_U2[:, 1]).tolist()
    assert step.means == pytest.approx(
        {"margin": sum(margin_U) / 7, "odd": sum(margin_U[1::2]) / 3, "given": 1.5}, rel=1e-6
    )
    assert vars(descent.costs) == {"unet_forward": 14, "unet_backward": 14, "encoder_forward": 0}


def test_a_metric_that_nothing_was_counted_of_is_left_out(make_bench: Callable[[], Bench]) -> None:
    step = make_bench().descent(8).one_pass(PAIRS, contrast, 1, {"none": torch.zeros(2, dtype=torch.float64)})
    assert step.means.keys() == {"margin"}


STEPS = torch.randn(2, 3, 4, 2, NUM_FEATURES, generator=torch.Generator().manual_seed(2))
"""Features of 2 groups of 3 siblings over 4 steps."""


def coupled(value_PGT: Tensor) -> tuple[Tensor, Metrics]:
    """A loss that no sum over entries is, and that leaves the last step out."""
    total_PG = value_PGT[..., :3].sum(2)
    loss = (total_PG - total_PG.mean(1, keepdim=True)).square().sum() / 2
    return loss, {"total": mean_metric(total_PG)}


def coupled_with_channel(value_PGTC: Tensor) -> tuple[Tensor, Metrics]:
    """The same of the first channel's values, times the second's at the first step, and nothing of the second group."""
    loss, metrics = coupled(value_PGTC[:1, ..., 0])
    return loss * value_PGTC[0, :, 0, 1].exp().sum(), metrics


ALL_ITEMS = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))


def values_of(probe: Probe, denoiser: Any) -> Tensor:
    """All values of the steps, (2, 3, 4, ...)."""
    value_N = probe(denoiser, ALL_ITEMS)
    return value_N.view(2, 3, 4, *value_N.shape[1:])


@pytest.mark.parametrize("size", MICRO_BATCHES)
@pytest.mark.parametrize(
    ("loss", "num_values", "num_wanted"), [(coupled, None, 2 * 3 * 3), (coupled_with_channel, 2, 3 * 3)]
)
def test_two_passes_are_one_shot_autograd_and_skip_what_has_no_gradient(
    make_bench: Callable[[], Bench], size: int, loss: Any, num_values: int | None, num_wanted: int
) -> None:
    bench, probe = make_bench(), Scores(STEPS, num_values)
    expected = autograd(lambda module: loss(values_of(probe, module))[0])
    descent = bench.descent(size)
    flat = descent.evaluate(probe, bench.engine.denoiser, ALL_ITEMS)
    values = flat.view(2, 3, 4, *flat.shape[1:])
    torch.testing.assert_close(values, values_of(probe, Probed()).detach(), rtol=1e-6, atol=1e-6)
    assert not values.requires_grad
    step = descent.two_pass(probe, loss, values)
    assert_is(step, bench, expected)
    assert vars(descent.costs) == {
        "unet_forward": 2 * (24 + num_wanted),
        "unet_backward": 2 * num_wanted,
        "encoder_forward": 0,
    }


def test_nothing_is_evaluated_of_no_items(make_bench: Callable[[], Bench]) -> None:
    bench = make_bench()
    descent = bench.descent(8)
    for probe, shape in ((PAIRS, (0, 2)), (Scores(UNITS), (0,))):
        nothing = torch.zeros(0, 1, dtype=torch.long)
        assert descent.evaluate(probe, bench.engine.denoiser, nothing).shape == shape
    assert vars(descent.costs) == {"unet_forward": 0, "unet_backward": 0, "encoder_forward": 0}


def nothing(value_PGT: Tensor) -> tuple[Tensor, Metrics]:
    """A loss without a gradient anywhere."""
    return (value_PGT * 0.0).sum(), {}


def test_a_step_without_a_gradient_is_not_taken(make_bench: Callable[[], Bench]) -> None:
    """AdamW would decay the weights all the same."""
    bench, before = make_bench(), Probed().state_dict()
    descent = bench.descent(8)
    nothing_learnt = descent.one_pass(PAIRS, contrast, 0, {"none": torch.zeros(2, dtype=torch.float64)})
    assert nothing_learnt == Step(0.0, None, {})
    probe = Scores(STEPS)
    assert (
        descent.two_pass(
            probe,
            lambda values: (nothing(values)[0], {"one": mean_metric(values[0, 0])}),
            values_of(probe, bench.module).detach(),
        ).grad_norm
        is None
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.module.state_dict().items())
    assert vars(descent.costs) == {"unet_forward": 0, "unet_backward": 0, "encoder_forward": 0}


@pytest.mark.parametrize("where", ["value", "loss", "gradient"])
def test_what_is_not_finite_stops_the_run(make_bench: Callable[[], Bench], where: str) -> None:
    feature = UNITS.clone()
    feature[3, 0, 0] = torch.nan if where == "value" else 0.0

    def loss(value_N2: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
        total, metrics = contrast(value_N2, unit_N)
        if where == "loss":
            total = total + torch.where(unit_N == 3, torch.inf, 0.0).sum()
        if where == "gradient":
            # The root's slope at 0 is infinite.
            total = total + (value_N2 - value_N2.detach()).square().sum().sqrt()
        return total, metrics

    with pytest.raises(TrainingError, match="NaN or infinite under the current weights"):
        make_bench().descent(4).one_pass(Scores(feature, num_values=2), loss, len(UNITS), {})


# --- two ranks ------------------------------------------------------------------------------------------


Found = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two ranks ended with in a cell; those of the suite are trained by one gang, the slow ones by another."""

    @cache
    def folder_of(names: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("gang")
        run_gang(tiny_model, folder, names)
        return folder

    rest = tuple(name for name in CELLS if name not in FEW)
    return lambda name: load_file(folder_of(FEW if name in FEW else rest) / f"{name}.safetensors")


def run_gang(model: str, folder: Path, names: tuple[str, ...]) -> None:
    """Runs two ranks to their end."""
    port = str(free_port("127.0.0.1"))
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.learner.descent_cells", str(rank), port, model, str(folder), *names]
        with log.open("w") as output:
            ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    for process, log in zip(ranks, logs, strict=True):
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CELLS])
def test_two_ranks_of_which_one_has_less_to_learn_from_are_one_rank_with_all(
    found: Found, tiny_model: str, name: str
) -> None:
    start, end, losses = learn_alone(CELLS[name], tiny_model)
    both = found(name)
    apart = sum(float((both[key] - end[key]).double().square().sum()) for key in end) ** 0.5
    moved = sum(float((start[key] - end[key]).double().square().sum()) for key in end) ** 0.5
    assert moved > 0
    assert apart < 1e-4 * moved
    # A beta of 100 or more multiplies the rounding of errors.
    assert both["losses"].tolist() == pytest.approx(losses, rel=1e-4)
