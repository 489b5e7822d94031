"""Updates on clean images: SFT, DPO, CPO, their NCP forms and SPIN, by errors at drawn timesteps.

units     images or pairs of the round's groups (learner/units.py)
frozen    the reference's errors, the opponent's, or none: CPO and SFT never run the reference
K passes  each with fresh timesteps and noise, each step one pass of forward and backward
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.perception import Encoder, make_encoder
from learner import parity
from learner.algorithms.cpo import cpo, cpo_losses
from learner.algorithms.metrics import Metrics, by_quartile, mean_metric
from learner.algorithms.preference import preference, preference_losses
from learner.algorithms.sft import sft
from learner.probes import Costs, ErrorProbe, PerceptualProbe, TargetProbe
from learner.summary import summarise
from learner.units import Units, noise_units, perception_draws, preference_units, self_play_units, single_units
from learner.update import Behaviour, Tools, UpdateReport
from protocol.algorithms import Cpo, Dpo, NcpCpo, NcpDpo, NcpSft, Sft, Spin
from protocol.errors import TrainingError
from protocol.groups import Group

OnImages = Sft | Dpo | Cpo | NcpSft | NcpDpo | NcpCpo | Spin

MATCHED_BETA, NUM_MATCHED = 2500.0, 1024
"""`match_dpo`: the beta_full of DPO whose logits' scale is matched, and on how many latents at least."""


@dataclass(frozen=True)
class Task:
    """What the micro-batches of a step share: weight_U, 0 for units to leave out; the normaliser, their sum over all
    ranks; beta in the convention of beta_full."""

    probe: ErrorProbe
    opponent_UK: Tensor | None
    weight_U: Tensor
    normaliser: float
    beta: float
    metrics: Metrics


class ImageUpdater:
    """Applies an algorithm on errors."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._recipe, self._engine = tools, tools.recipe, tools.engine
        assert isinstance(tools.recipe.algorithm, OnImages)
        self._settings = tools.recipe.algorithm
        self._first_loser_error: float | None = None
        self._matched_beta: float | None = None
        self._encoder: Encoder | None = None
        if isinstance(self._settings, NcpSft | NcpDpo | NcpCpo):
            self._encoder = make_encoder(tools.policy, self._settings.perception, tools.recipe.seed)

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        costs = self._tools.descent.costs
        return costs if self._encoder is None else replace(costs, encoder_forward=self._encoder.num_forward)

    def state(self) -> dict[str, Any]:
        """The loser's error at the start, which CPO's is compared with, and the factor that was matched on the base."""
        return {"first_loser_error": self._first_loser_error, "matched_beta": self._matched_beta}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        self._first_loser_error, self._matched_beta = state["first_loser_error"], state["matched_beta"]

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:
        """Takes the round's optimizer steps."""
        report = UpdateReport()
        for place in self._tools.steps(round_):
            self._update_encoder()
            units = self._units(self._tools.part(groups, place.part))
            if self._matches_beta and self._matched_beta is None:
                self._matched_beta = self._match_beta(units)
            probe = self._probe(units, place.update)
            if round_ == 0 and not report.loss:
                self._check_start(probe)
            self._step(self._task(units, probe, round_, behaviour), place.rate, report)
        return report

    def _update_encoder(self) -> None:
        """Gives an encoder of the average the weights that the average has now."""
        policy, average = self._tools.policy, self._engine.average
        if self._encoder is None or policy.average_denoiser is None:
            return
        assert average is not None, "a recipe whose encoder has the average's weights keeps one"
        own = dict(policy.average_denoiser.named_parameters())
        average.each(lambda name, tensor: own[name].data.copy_(tensor))

    def _step(self, task: Task, rate: float, report: UpdateReport) -> None:
        # Where no rank has a unit that counts, no step is taken.
        num_units = len(task.weight_U) if task.normaliser else 0
        step = self._tools.descent.one_pass(task.probe, partial(self._loss, task), num_units, task.metrics)
        report.add(step, rate, self._complete(step.means))

    def _task(self, units: Units, probe: ErrorProbe, round_: int, behaviour: Behaviour | None) -> Task:
        opponent_UK = self._opponent(probe, behaviour)
        weight_U, metrics = units.weight_U, units.metrics
        if isinstance(probe, PerceptualProbe):
            probe, weight_U, dead = self._without_dead(probe, units)
            metrics = {**metrics, **dead}
        num_units = units.num_units - float((units.weight_U - weight_U).sum())
        normaliser = float(self._engine.sum(torch.tensor(num_units, dtype=torch.float64)))
        return Task(probe, opponent_UK, weight_U, normaliser, self._beta(round_), metrics)

    def _without_dead(self, probe: PerceptualProbe, units: Units) -> tuple[PerceptualProbe, Tensor, Metrics]:
        """Drops units of which a target has no feature to divide by: weight 0. They are counted with the latents whose
        error is 0 for every estimate, which stay: those have features."""
        place_U = torch.arange(len(units.keys))
        usable_UK = torch.ones(len(place_U), probe.width, dtype=torch.bool)
        if probe.settings.norm == "relative":
            targets = TargetProbe(probe)
            usable_UK = self._tools.descent.evaluate(targets, self._engine.denoiser, place_U[:, None]).bool()
            probe = targets.encoded()
        dead_UK = ~usable_UK.to(units.weight_U.device) | (probe.k_NK(place_U) == 0)
        usable_U = usable_UK.all(1).to(units.weight_U.device)
        return probe, torch.where(usable_U, units.weight_U, 0.0), {"ncp/dead_items": mean_metric(dead_UK)}

    def _match_beta(self, units: Units) -> float | None:
        """Returns the beta_full for which errors between features have the scale of DPO's at 2500, on the base and some
        1024 latents: those of this step, each as often as it takes. None where no rank has any."""
        own = float(len(units.keys) * units.x0_UKCHW.shape[1])
        num_latents = round(float(self._engine.sum(torch.tensor(own))))
        if not num_latents:
            return None
        totals = torch.zeros(2, dtype=torch.float64)
        for repeat in range(math.ceil(NUM_MATCHED / num_latents)):
            # Passes over a round count from 0: these draws are of no step.
            probe = self._probe(units, -1 - repeat)
            assert isinstance(probe, PerceptualProbe)
            probe, weight_U, _ = self._without_dead(replace(probe, with_reference=False), units)
            with self._tools.policy.reference(self._engine.denoiser) as base:
                value_UK = self._tools.descent.evaluate(probe, base, torch.arange(len(weight_U))[:, None])
            totals += torch.stack([part.double().sum().cpu() for part in value_UK[weight_U > 0].chunk(2, dim=1)])
        between_features, in_noise = map(float, self._engine.sum(totals))
        if between_features == 0:
            raise TrainingError(
                "algorithm.beta_full: match_dpo finds no error between features of the base",
                value=f"mean error in noise {in_noise:.3g}, between features 0, of {num_latents} latents",
                do="choose other perception.blocks, or give beta_full as a number",
            )
        return MATCHED_BETA * in_noise / between_features

    def _units(self, groups: Sequence[Group]) -> Units:
        settings, device = self._settings, self._tools.policy.device
        if isinstance(settings, Sft | NcpSft):
            return single_units(groups, settings.select, self._recipe.seed, device)
        if isinstance(settings, Spin):
            return self_play_units(groups, device)
        return preference_units(groups, settings.pairs, device)

    def _probe(self, units: Units, update: int) -> ErrorProbe:
        policy, settings, run_seed = self._tools.policy, self._settings, self._recipe.seed
        shared_noise = isinstance(settings, Sft | NcpSft) or settings.shared_noise
        noised = noise_units(units, policy, settings, shared_noise=shared_noise, run_seed=run_seed, update=update)
        with_reference = isinstance(settings, Dpo | NcpDpo)
        if self._encoder is None or not isinstance(settings, NcpSft | NcpDpo | NcpCpo):
            return ErrorProbe(policy, noised, with_reference)
        step_noise_UCHW, fresh_timestep_U = perception_draws(units, policy, run_seed, update)
        return PerceptualProbe(
            policy,
            noised,
            with_reference,
            encoder=self._encoder,
            settings=settings.perception,
            step_noise_UCHW=step_noise_UCHW,
            fresh_timestep_U=fresh_timestep_U,
        )

    def _opponent(self, probe: ErrorProbe, behaviour: Behaviour | None) -> Tensor | None:
        """Returns the errors (U, K) of SPIN's opponent, whose weights take the policy's place for a while."""
        if not isinstance(self._settings, Spin):
            return None
        assert behaviour is not None, "self-play needs its opponent's weights"
        with behaviour():
            return self._tools.descent.evaluate(probe, self._engine.denoiser, torch.arange(len(probe.noised))[:, None])

    def _check_start(self, probe: ErrorProbe) -> None:
        """Before the first update policy and reference are one, so that a pair's loss is ln 2."""
        if probe.with_reference:
            value_1K = self._tools.descent.evaluate(probe, self._engine.denoiser, probe.filler_1K)
            now_1K, ref_1K = value_1K[:, : probe.num_evaluations].chunk(2, dim=1)
            parity.check_start(float(self._engine.max((now_1K - ref_1K).abs().max())), parity.TOLERANCE_WITHOUT_WINDOW)

    def _beta(self, round_: int) -> float:
        """The factor of error differences in the convention of beta_full; 0 for methods that have none."""
        match self._settings:
            case Sft() | NcpSft():
                return 0.0
            case Spin() as settings:
                return settings.iteration_at(round_).beta
            case settings:
                # While nothing could be matched there is nothing to multiply either.
                return settings.beta or self._matched_beta or 0.0

    @property
    def _matches_beta(self) -> bool:
        return isinstance(self._settings, NcpDpo | NcpCpo) and self._settings.beta is None

    def _loss(self, task: Task, value_NK: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of some units, and their metrics."""
        kept_N = task.weight_U[unit_N] > 0
        value_NK, unit_N = value_NK[kept_N], unit_N[kept_N.cpu()]
        probe, error_NK = task.probe, value_NK[:, : task.probe.num_evaluations]
        if task.opponent_UK is not None:
            error_NK = torch.cat([error_NK, task.opponent_UK[unit_N]], dim=1)
        loss, loss_N, metrics = self._objective(task, error_NK, task.weight_U[unit_N])
        timestep_N, num_timesteps = probe.noised.timestep_UK[unit_N, 0], len(self._tools.policy.process)
        quartiles = {
            **by_quartile("error", error_NK[:, 0], timestep_N, num_timesteps),
            **by_quartile("loss", loss_N, timestep_N, num_timesteps),
        }
        if isinstance(probe, PerceptualProbe):
            identity_NK = probe.k_NK(unit_N).square() * value_NK[:, probe.num_evaluations :]
            own = {"ncp/error": error_NK[:, : probe.width], "ncp/identity_error": identity_NK}
            metrics |= {name: mean_metric(value_NK) for name, value_NK in own.items()}
        return loss, {**metrics, **quartiles}

    def _objective(self, task: Task, error_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        """Returns the loss, each unit's own and metrics. error_NK: the policy's, then the reference's or opponent's."""
        beta, normaliser = task.beta, task.normaliser
        match self._settings:
            case Sft() | NcpSft():
                loss, metrics = sft(error_NK[:, 0], weight_N, normaliser=normaliser)
                return loss, error_NK[:, 0], metrics
            case Cpo() | NcpCpo() as settings:
                factors = {"beta": beta, "sft_weight": settings.sft_weight}
                loss, metrics = cpo(error_NK, weight_N, **factors, normaliser=normaliser)
                return loss, cpo_losses(error_NK.detach(), **factors), metrics
            case _:
                error_N2, frozen_N2 = error_NK.chunk(2, dim=1)
                loss, metrics = preference(error_N2, frozen_N2, weight_N, beta=beta, normaliser=normaliser)
                return loss, preference_losses(error_N2.detach(), frozen_N2, beta=beta), metrics

    def _complete(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns a step's means with what is made of several of them, and with the factor that was matched."""
        matched = {} if self._matched_beta is None else {"ncp/beta_full": self._matched_beta}
        return {**summarise(with_gain(means)), **self._loser_growth(means), **matched}

    def _loser_growth(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns CPO's metric of the losers' error. Stops a run in which it grows without bound, which the loss alone
        does not show."""
        now = means.get("pairs/error_loser")
        if not isinstance(self._settings, Cpo | NcpCpo) or not now:
            return {}
        if self._first_loser_error is None:
            self._first_loser_error = now
        ratio, limit = now / self._first_loser_error, self._settings.max_loser_error_ratio
        if ratio > limit:
            raise TrainingError(
                f"the loser's error has grown {ratio:.1f} times since the start of the run",
                expected=f"at most {limit:g} times: algorithm.max_loser_error_ratio",
                do="lower beta_full or the learning rate, or raise algorithm.sft_weight, which bounds it",
            )
        return {"cpo/loser_error_ratio": ratio}


def with_gain(means: Mapping[str, float]) -> dict[str, float]:
    """Replaces the mean errors between features, and those that identity features would have, by their ratio: a beta
    acts as k^2 times `ncp/encoder_gain` times itself would on errors in noise."""
    means = dict(means)
    error, identity = means.pop("ncp/error", 0.0), means.pop("ncp/identity_error", 0.0)
    return {**means, "ncp/encoder_gain": error / identity} if identity else means
