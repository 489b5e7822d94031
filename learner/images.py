"""Updates on clean images: SFT, DPO, CPO, their NCP forms and SPIN, by errors at drawn timesteps.

units     images or pairs of the round's groups (learner/units.py)
frozen    the reference's errors, the opponent's, or none: CPO and SFT never run the reference
K passes  each with fresh timesteps and noise, each step one pass of forward and backward
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.perception import Encoder, make_encoder
from learner import parity
from learner.algorithms.cpo import cpo
from learner.algorithms.metrics import Metrics, by_quartile
from learner.algorithms.preference import preference
from learner.algorithms.sft import sft
from learner.probes import Costs, ErrorProbe, PerceptualProbe
from learner.summary import summarise
from learner.units import Units, noise_units, perception_draws, preference_units, self_play_units, single_units
from learner.update import Behaviour, Place, Tools, UpdateReport
from protocol.algorithms import Cpo, Dpo, NcpCpo, NcpDpo, NcpSft, Sft, Spin
from protocol.errors import TrainingError
from protocol.groups import Group

OnImages = Sft | Dpo | Cpo | NcpSft | NcpDpo | NcpCpo | Spin


class ImageUpdater:
    """Applies an algorithm on errors."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._recipe, self._engine = tools, tools.recipe, tools.engine
        assert isinstance(tools.recipe.algorithm, OnImages)
        self._settings = tools.recipe.algorithm
        self._first_loser_error: float | None = None
        self._encoder: Encoder | None = None
        if isinstance(self._settings, NcpSft | NcpDpo | NcpCpo):
            self._encoder = make_encoder(tools.policy, self._settings.perception, tools.recipe.seed)

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        costs = self._tools.descent.costs
        return costs if self._encoder is None else replace(costs, encoder_forward=self._encoder.num_forward)

    def state(self) -> dict[str, Any]:
        """The loser's error at the start, which CPO's is compared with."""
        return {"first_loser_error": self._first_loser_error}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        self._first_loser_error = state["first_loser_error"]

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:
        """Takes the round's optimizer steps."""
        report = UpdateReport()
        for place in self._tools.steps(round_):
            self._step(self._tools.part(groups, place.part), round_, place, behaviour, report)
        return report

    def _step(
        self,
        groups: Sequence[Group],
        round_: int,
        place: Place,
        behaviour: Behaviour | None,
        report: UpdateReport,
    ) -> None:
        units = self._units(groups)
        probe = self._probe(units, place.update)
        opponent_UK = self._opponent(probe, behaviour)
        if round_ == 0 and not report.loss:
            self._check_start(probe)
        normaliser = max(1, round(float(self._engine.sum(torch.tensor(float(units.num_units))))))

        def loss(error_NK: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
            weight_N = units.weight_U[unit_N]
            if opponent_UK is not None:
                error_NK = torch.cat([error_NK, opponent_UK[unit_N]], dim=1)
            value, metrics = self._loss(error_NK, weight_N, round_, normaliser)
            timestep_N = probe.noised.timestep_UK[unit_N, 0]
            quartiles = by_quartile("error", error_NK[:, 0], timestep_N, len(self._tools.policy.alpha_bar))
            return value, {**metrics, **quartiles}

        step = self._tools.descent.one_pass(probe, loss, len(units.keys), units.metrics)
        report.add(step, place.rate, summarise({**step.means, **self._loser_growth(step.means)}))

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
            error_1K = self._tools.descent.evaluate(probe, self._engine.denoiser, probe.filler_1K)
            now_1K, ref_1K = error_1K.chunk(2, dim=1)
            parity.check_start(float(self._engine.max((now_1K - ref_1K).abs().max())), parity.TOLERANCE_WITHOUT_WINDOW)

    def _loss(self, error_NK: Tensor, weight_N: Tensor, round_: int, normaliser: int) -> tuple[Tensor, Metrics]:
        """error_NK: the policy's, then the reference's or the opponent's."""
        match self._settings:
            case Sft() | NcpSft():
                return sft(error_NK[:, 0], weight_N, normaliser=normaliser)
            case Cpo() | NcpCpo() as settings:
                beta, sft_weight = settings.beta_full, settings.sft_weight
                return cpo(error_NK, weight_N, beta=beta, sft_weight=sft_weight, normaliser=normaliser)
            case Dpo() | NcpDpo() as settings:
                beta = settings.beta
            case Spin() as settings:
                beta = settings.iteration_at(round_).beta
        error_N2, frozen_N2 = error_NK.chunk(2, dim=1)
        return preference(error_N2, frozen_N2, weight_N, beta=beta, normaliser=normaliser)

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
