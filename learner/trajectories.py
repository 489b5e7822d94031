"""Updates on trajectories: PRDP, policy gradients and SPIN's exact form, by per-step log-probabilities.

parity      some log-probabilities computed again, against those that the rollouts stored
frozen      the reference's, or the opponent's: once a round
old         the weights' own at the round's start: where the proximal windows stand
K passes    of exact two-pass steps
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.policy import Denoiser
from learner import parity
from learner.algorithms.ddpo import RewardTracker, per_prompt_advantage
from learner.algorithms.metrics import Metrics
from learner.algorithms.policy_gradient import group_advantage, policy_gradient
from learner.algorithms.prdp import prdp
from learner.algorithms.spin_exact import spin_exact
from learner.batching import RoundBatch, items_where, stack_groups, with_real_trajectories
from learner.probes import Costs, TransitionProbe
from learner.summary import summarise
from learner.two_pass import Loss
from learner.update import Behaviour, Place, Tools, UpdateReport
from protocol.algorithms import Ddpo, PolicyGradient, Prdp, SpinExact
from protocol.groups import Group
from protocol.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class Frozen:
    """What a round's steps share: the batch, log-probabilities (P, G, T) where windows stand and of the frozen network,
    kernel means of the reference and advantages, where the algorithm asks for them."""

    batch: RoundBatch
    old_PGT: Tensor
    frozen_PGT: Tensor
    ref_mean_PGTCHW: Tensor | None = None
    advantage_PG: Tensor | None = None

    def part(self, number: int, num_parts: int) -> Frozen:
        """Returns one of `num_parts` equal, contiguous parts."""

        def rows(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.chunk(num_parts)[number]

        return Frozen(
            self.batch.part(number, num_parts),
            self.old_PGT.chunk(num_parts)[number],
            self.frozen_PGT.chunk(num_parts)[number],
            rows(self.ref_mean_PGTCHW),
            rows(self.advantage_PG),
        )


class TrajectoryUpdater:
    """Applies an algorithm on log-probabilities."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._recipe, self._engine = tools, tools.recipe, tools.engine
        self._tracker = RewardTracker()
        self._extra: Metrics = {}

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        return self._tools.descent.costs

    def state(self) -> dict[str, Any]:
        """DDPO's statistics of each prompt."""
        return {"tracker": self._tracker.to_json()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        self._tracker = RewardTracker.from_json(state["tracker"])

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:
        """Takes the round's optimizer steps."""
        batch = stack_groups(groups, self._tools.policy.device)
        report = UpdateReport()
        if self._tools.follows:
            # Without the weights that sampled, nothing that was stored can be compared or reused.
            report.recomputed = True
        else:
            self._probe_parity(batch, round_, behaviour or nullcontext, report)
        frozen, now_PGT = self._freeze(batch, behaviour, report)
        if round_ == 0:
            self._check_start(now_PGT, frozen)
        for place in self._tools.steps(round_):
            self._step(frozen, now_PGT if place.update == place.part == 0 else None, place, report)
        return report

    def _probe_parity(self, batch: RoundBatch, round_: int, behaviour: Behaviour, report: UpdateReport) -> None:
        """Computes some micro-batches as training does, for the largest gap to what the rollouts stored on any rank,
        and for an estimate of the KL to the pretrained model."""
        probe = TransitionProbe(self._tools.chain, batch)
        probes = self._tools.descent.batches(probe, scored_items(batch))
        seed = derive_seed(self._recipe.seed, Purpose.PARITY_PROBE, round_)
        chosen = torch.randperm(len(probes), generator=torch.Generator().manual_seed(seed)).tolist()
        items_N3 = torch.cat([probes[number] for number in chosen[: self._recipe.learner.num_parity_probes]])
        stored_N = batch.log_prob_PGT[tuple(items_N3.unbind(1))]
        with behaviour():
            sampled_N = self._evaluate(probe, items_N3)
        gap = float(self._engine.max((sampled_N - stored_N).abs().max())) / batch.num_latent_entries
        limit = parity.tolerance(self._recipe, batch.num_latent_entries)
        workers = ", ".join(sorted({group.worker for group in batch.groups}))
        parity.check(gap, limit, round_=round_, workers=workers)
        report.parity_max_abs, report.recomputed = gap, gap > 0 or behaviour is not nullcontext
        if not isinstance(self._recipe.algorithm, Prdp):
            now_N = sampled_N if behaviour is nullcontext else self._evaluate(probe, items_N3)
            with self._tools.policy.reference(self._engine.denoiser) as reference:
                rho_N = now_N - self._tools.descent.evaluate(probe, reference, items_N3)
            report.kl = self._mean(rho_N) * self._recipe.sampler.num_scored_steps

    def _freeze(self, batch: RoundBatch, behaviour: Behaviour | None, report: UpdateReport) -> tuple[Frozen, Tensor]:
        """Returns what the round's steps share, and the log-probabilities under the weights at its start."""
        match self._recipe.algorithm:
            case Prdp() as settings:
                return self._freeze_prdp(batch, settings, report)
            case PolicyGradient() | Ddpo() as settings:
                return self._freeze_policy_gradient(batch, settings, behaviour, report)
            case SpinExact():
                return self._freeze_spin(batch, behaviour)
            case other:
                raise AssertionError(f"{other.name} does not learn from trajectories")

    def _freeze_prdp(self, batch: RoundBatch, settings: Prdp, report: UpdateReport) -> tuple[Frozen, Tensor]:
        with self._tools.policy.reference(self._engine.denoiser) as reference:
            ref_PGT = self._score_all(batch, reference)
        now_PGT = self._score_all(batch) if report.recomputed else batch.log_prob_PGT
        report.kl = self._mean((now_PGT - ref_PGT).sum(2))
        old_PGT = batch.log_prob_PGT if settings.clip_center == "behaviour" else now_PGT
        return Frozen(batch, old_PGT, ref_PGT), now_PGT

    def _freeze_policy_gradient(
        self, batch: RoundBatch, settings: PolicyGradient | Ddpo, behaviour: Behaviour | None, report: UpdateReport
    ) -> tuple[Frozen, Tensor]:
        old_PGT = batch.log_prob_PGT
        if report.parity_max_abs:
            with (behaviour or nullcontext)():
                old_PGT = self._score_all(batch)
        now_PGT = old_PGT if behaviour is None else self._score_all(batch)
        ref_mean_PGTCHW = None
        if isinstance(settings, PolicyGradient) and settings.kl_coef > 0:
            with self._tools.policy.reference(self._engine.denoiser) as reference:
                ref_mean_PGTCHW = self._means_all(batch, reference)
        return Frozen(batch, old_PGT, old_PGT, ref_mean_PGTCHW, self._advantages(batch, settings)), now_PGT

    def _freeze_spin(self, batch: RoundBatch, behaviour: Behaviour | None) -> tuple[Frozen, Tensor]:
        pairs = with_real_trajectories(batch, self._tools.chain, self._recipe.seed)
        now_PGT = self._score_all(pairs)
        assert behaviour is not None, "self-play needs its opponent's weights"
        with behaviour():
            opponent_PGT = self._score_all(pairs)
        return Frozen(pairs, opponent_PGT, opponent_PGT), now_PGT

    def _advantages(self, batch: RoundBatch, settings: PolicyGradient | Ddpo) -> Tensor:
        """Returns this rank's advantages, from the rewards of the whole round in the order of tickets."""
        own = [(group.ticket_id, group.prompt, group.array("reward_G").tolist()) for group in batch.groups]
        everyone = sorted(row for rows in self._engine.gather(own) for row in rows)
        reward_PG = torch.tensor([rewards for _, _, rewards in everyone])
        if isinstance(settings, PolicyGradient):
            advantage_PG = group_advantage(reward_PG, settings)
        else:
            prompts = [prompt for _, prompt, _ in everyone]
            advantage_PG, self._tracker, self._extra = per_prompt_advantage(reward_PG, prompts, self._tracker, settings)
        places = {ticket_id: place for place, (ticket_id, _, _) in enumerate(everyone)}
        return advantage_PG[[places[group.ticket_id] for group in batch.groups]].to(batch.log_prob_PGT.device)

    def _step(self, frozen: Frozen, now_PGT: Tensor | None, place: Place, report: UpdateReport) -> None:
        """One optimizer step on one part of the round. `now_PGT` saves pass A."""
        num_parts = self._recipe.algorithm.inner_minibatches
        mine = frozen.part(place.part, num_parts)
        probe = TransitionProbe(self._tools.chain, mine.batch, mine.ref_mean_PGTCHW, self._kl_factor_T)
        if now_PGT is not None and mine.ref_mean_PGTCHW is None:
            values = now_PGT.chunk(num_parts)[place.part]
        else:
            values = self._score_all(mine.batch, probe=probe)
        step = self._tools.descent.two_pass(probe, self._loss(mine), values)
        report.add(step, place.rate, summarise(step.means))

    @property
    def _kl_factor_T(self) -> Tensor | None:
        """Flow-GRPO's KL is each step's exact one times its length."""
        settings = self._recipe.algorithm
        has_own = isinstance(settings, PolicyGradient) and settings.kl_form == "flow_grpo"
        return self._tools.chain.schedule.length_N if has_own else None

    def _loss(self, mine: Frozen) -> Loss:
        """Returns the loss of one part as a function of its values."""
        batch, ranks = mine.batch, self._engine.world_size
        match self._recipe.algorithm:
            case Prdp() as settings:
                return functools.partial(
                    prdp,
                    log_prob_old_PGT=mine.old_PGT,
                    log_prob_ref_PGT=mine.frozen_PGT,
                    scored_PT=batch.scored_PT,
                    reward_PG=batch.reward_PG,
                    settings=settings,
                    num_latent_entries=batch.num_latent_entries,
                    normaliser=len(batch.groups) * ranks,
                )
            case PolicyGradient() | Ddpo() as settings:
                return functools.partial(self._policy_gradient, mine, settings)
            case SpinExact() as settings:
                return functools.partial(
                    spin_exact,
                    log_prob_opponent_Q2T=mine.frozen_PGT,
                    scored_T=batch.scored_PT[0],
                    spin_lambda=settings.spin_lambda,
                    normaliser=len(batch.groups) * ranks,
                )
            case other:
                raise AssertionError(f"{other.name} does not learn from trajectories")

    def _policy_gradient(self, mine: Frozen, settings: PolicyGradient | Ddpo, values: Tensor) -> tuple[Tensor, Metrics]:
        assert mine.advantage_PG is not None
        has_kl = mine.ref_mean_PGTCHW is not None
        loss, metrics = policy_gradient(
            values[..., 0] if has_kl else values,
            mine.old_PGT,
            mine.advantage_PG,
            mine.batch.scored_PT,
            clip_range=settings.clip_range,
            latent_reduce=settings.latent_reduce,
            num_latent_entries=mine.batch.num_latent_entries,
            normaliser=len(scored_items(mine.batch)) * self._engine.world_size,
            kernel_kl_PGT=values[..., 1] if has_kl else None,
            kl_coef=settings.kl_coef if isinstance(settings, PolicyGradient) else 0.0,
        )
        return loss, {**metrics, **self._extra}

    def _evaluate(self, probe: TransitionProbe, items_N3: Tensor) -> Tensor:
        return self._tools.descent.evaluate(probe, self._engine.denoiser, items_N3)

    def _score_all(
        self, batch: RoundBatch, denoiser: Denoiser | None = None, probe: TransitionProbe | None = None
    ) -> Tensor:
        """Returns all values of a probe, log-probabilities (P, G, T) fp64 by default; 0 at unscored steps."""
        probe = probe or TransitionProbe(self._tools.chain, batch)
        items_N3 = scored_items(batch)
        values = self._tools.descent.evaluate(probe, denoiser or self._engine.denoiser, items_N3)
        return _scatter(values, items_N3, batch)

    def _means_all(self, batch: RoundBatch, denoiser: Denoiser) -> Tensor:
        """Returns the kernels' means at all scored steps, (P, G, T, C, H, W)."""
        probe, items_N3 = TransitionProbe(self._tools.chain, batch), scored_items(batch)
        return _scatter(self._tools.descent.evaluate(probe, denoiser, items_N3, probe.means), items_N3, batch)

    def _check_start(self, now_PGT: Tensor, frozen: Frozen) -> None:
        """Before the first update the policy is the reference, the opponent, or what sampled."""
        gap = float(self._engine.max((now_PGT - frozen.frozen_PGT).abs().max())) / frozen.batch.num_latent_entries
        parity.check_start(gap, parity.tolerance(self._recipe, frozen.batch.num_latent_entries))

    def _mean(self, values: Tensor) -> float:
        total, count = self._engine.sum(torch.stack([values.sum(), values.new_tensor(values.numel())]))
        return float(total / count)


def scored_items(batch: RoundBatch) -> Tensor:
    """Returns the (group, sibling, step) items that have a density, (N, 3): as many on every rank."""
    return items_where(batch.scored_PT[:, None, :].expand_as(batch.log_prob_PGT))


def _scatter(values_N: Tensor, items_N3: Tensor, batch: RoundBatch) -> Tensor:
    whole = torch.zeros(*batch.log_prob_PGT.shape, *values_N.shape[1:], dtype=values_N.dtype, device=values_N.device)
    whole[tuple(items_N3.unbind(1))] = values_N
    return whole
