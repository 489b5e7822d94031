"""One round's update: reference, old and current log-probabilities, then K passes of exact two-pass steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.policy import Denoiser
from learner import parity
from learner.algorithms.metrics import Metrics
from learner.algorithms.prdp import prdp, summarise
from learner.batching import RoundBatch, items_where, micro_batches
from learner.engine import Engine
from learner.two_pass import differentiate, surrogate
from protocol.errors import TrainingError
from protocol.recipe import Recipe
from protocol.seeds import Purpose, derive_seed

Behaviour = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the module holds the weights that sampled the round."""


@dataclass
class UpdateReport:
    """What a round's update did, summed or maximised over ranks. Per-update lists have one entry a step."""

    kl: float
    parity_max_abs: float
    recomputed: bool
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    skipped: int = 0
    details: list[dict[str, float]] = field(default_factory=list)


class Updater:
    """Applies the recipe's algorithm to rounds of groups. All ranks call it together."""

    def __init__(self, recipe: Recipe, chain: Chain, engine: Engine, after_pass: Callable[[], None]) -> None:
        """`after_pass` is called after every micro-batch, for whoever watches progress."""
        self._recipe, self._chain, self._engine = recipe, chain, engine
        self._after_pass = after_pass
        self.num_forward = self.num_backward = 0
        """U-Net evaluations so far on this rank, one latent and one branch each (algorithms.md 7.1)."""

    def learn(self, batch: RoundBatch, round_: int, behaviour: Behaviour | None) -> UpdateReport:
        """Takes the round's optimizer steps. `behaviour` is None when the current weights sampled the round."""
        algorithm = self._recipe.algorithm
        gap = self._parity_gap(batch, round_, behaviour or nullcontext)
        with self._chain.policy.reference(self._engine.denoiser) as reference:
            ref_PGT = self._score_all(batch, reference)
        reusable = gap == 0 and behaviour is None
        now_PGT = batch.log_prob_PGT if reusable else self._score_all(batch, self._engine.denoiser)
        old_PGT = batch.log_prob_PGT if algorithm.clip_center == "behaviour" else now_PGT
        if round_ == 0:
            self._check_start(now_PGT, ref_PGT, batch)
        report = UpdateReport(self._mean_kl(now_PGT, ref_PGT), gap, recomputed=not reusable)
        for update in range(algorithm.num_updates):
            for part in range(algorithm.inner_minibatches):
                first = update == part == 0
                self._step(batch, now_PGT if first else None, old_PGT, ref_PGT, part, report)
        return report

    def _step(
        self,
        batch: RoundBatch,
        now_PGT: Tensor | None,
        old_PGT: Tensor,
        ref_PGT: Tensor,
        part: int,
        report: UpdateReport,
    ) -> None:
        """One optimizer step on one part of the round: pass A, loss, pass B. `now_PGT` saves pass A."""
        num_parts = self._recipe.algorithm.inner_minibatches
        batch = batch.part(part, num_parts)
        old, ref = old_PGT.chunk(num_parts)[part], ref_PGT.chunk(num_parts)[part]
        reused = None if now_PGT is None else now_PGT.chunk(num_parts)[part]
        now = self._score_all(batch, self._engine.denoiser) if reused is None else reused
        loss = functools.partial(
            prdp,
            log_prob_old_PGT=old,
            log_prob_ref_PGT=ref,
            scored_PT=batch.scored_PT,
            reward_PG=batch.reward_PG,
            settings=self._recipe.algorithm,
            num_latent_entries=batch.num_latent_entries,
            normaliser=len(batch.groups) * self._engine.world_size,
        )
        total, omega, metrics = differentiate(loss, now)
        self._refuse_non_finite(now, omega)
        norm = self._descend(batch, omega)
        self._refuse_non_finite(torch.tensor(norm or 0.0), omega)
        report.skipped += norm is None
        report.grad_norm.append(norm or 0.0)
        report.loss.append(float(self._engine.sum(total)))
        report.details.append(summarise(self._means(metrics)))

    def _descend(self, batch: RoundBatch, omega: Tensor) -> float | None:
        """Pass B and the optimizer step. Returns the gradient norm, or None if no rank has any gradient."""
        batches = micro_batches(items_where(omega != 0), self._recipe.learner.micro_batch_size)
        num_passes = int(self._engine.max(torch.tensor(float(len(batches)))))
        if num_passes == 0:
            return None
        score = functools.partial(self._score, batch, self._engine.denoiser)
        losses = [functools.partial(surrogate, score, items, omega) for items in batches]
        # A rank with fewer passes than others joins the rest with an item of weight 0.
        filler = torch.zeros((1, 3), dtype=torch.long, device=omega.device)
        padding = functools.partial(surrogate, score, filler, torch.zeros_like(omega))
        losses += [padding] * (num_passes - len(losses))
        self.num_backward += sum(map(len, batches)) * self._recipe.sampler.num_branches
        return self._engine.apply(losses)

    def _score(self, batch: RoundBatch, denoiser: Denoiser, item_N3: Tensor) -> Tensor:
        """Returns the log-probabilities of (group, sibling, step) items, (N,) fp64 latent_sum."""
        group_N, sibling_N, step_N = item_N3.unbind(1)
        self.num_forward += len(item_N3) * self._recipe.sampler.num_branches
        scored = self._chain.step(
            denoiser,
            batch.latents_PGSCHW[group_N, sibling_N, step_N],
            step_N,
            self._chain.policy.embed_all(batch.prompts)[group_N],
            next_state_NCHW=batch.latents_PGSCHW[group_N, sibling_N, step_N + 1],
        )
        self._after_pass()
        return scored.log_prob_N

    @torch.no_grad()
    def _score_all(self, batch: RoundBatch, denoiser: Denoiser) -> Tensor:
        """Returns all log-probabilities, (P, G, T) fp64; 0 at unscored steps."""
        result_PGT = torch.zeros_like(batch.log_prob_PGT)
        for item_N3 in self._scored_items(batch):
            result_PGT[tuple(item_N3.unbind(1))] = self._score(batch, denoiser, item_N3)
        return result_PGT

    def _scored_items(self, batch: RoundBatch) -> list[Tensor]:
        """The micro-batches of all scored items: as many on every rank, since parts and schedules are equal."""
        scored_PGT = batch.scored_PT[:, None, :].expand_as(batch.log_prob_PGT)
        return micro_batches(items_where(scored_PGT), self._recipe.learner.micro_batch_size)

    @torch.no_grad()
    def _parity_gap(self, batch: RoundBatch, round_: int, behaviour: Behaviour) -> float:
        """Recomputes some micro-batches as training does; returns the largest gap on any rank, latent_mean."""
        probes = self._scored_items(batch)
        seed = derive_seed(self._recipe.seed, Purpose.PARITY_PROBE, round_)
        chosen = torch.randperm(len(probes), generator=torch.Generator().manual_seed(seed))
        gaps = []
        with behaviour():
            for number in chosen[: self._recipe.learner.num_parity_probes].tolist():
                items = probes[number]
                stored_N = batch.log_prob_PGT[tuple(items.unbind(1))]
                gaps.append((self._score(batch, self._engine.denoiser, items) - stored_N).abs().max())
        gap = float(self._engine.max(torch.stack(gaps).max())) / batch.num_latent_entries
        workers = ", ".join(sorted({group.worker for group in batch.groups}))
        limit = parity.tolerance(self._recipe, batch.num_latent_entries)
        parity.check(gap, limit, round_=round_, workers=workers)
        return gap

    def _check_start(self, now_PGT: Tensor, ref_PGT: Tensor, batch: RoundBatch) -> None:
        gap = float(self._engine.max((now_PGT - ref_PGT).abs().max())) / batch.num_latent_entries
        parity.check_start(gap, parity.tolerance(self._recipe, batch.num_latent_entries))

    def _mean_kl(self, now_PGT: Tensor, ref_PGT: Tensor) -> float:
        """Mean trajectory log-ratio to ref in sum_sum: an unbiased KL estimate when theta sampled the round."""
        rho_PG = (now_PGT - ref_PGT).sum(2)
        total, count = self._engine.sum(torch.stack([rho_PG.sum(), rho_PG.new_tensor(rho_PG.numel())]))
        return float(total / count)

    def _refuse_non_finite(self, values: Tensor, omega: Tensor) -> None:
        broken = ~(torch.isfinite(values).all() & torch.isfinite(omega).all())
        if bool(self._engine.max(broken.float())):
            raise TrainingError(
                "a log-probability or a gradient is NaN or infinite under the current weights",
                expected="finite numbers; nothing of this round is published or kept",
                do="lower learner.learning_rate, or set algorithm.clip_eps, and resume from the last checkpoint",
            )

    def _means(self, metrics: Metrics) -> dict[str, float]:
        names = sorted(metrics)
        totals = self._engine.sum(torch.stack([metrics[name] for name in names]))
        return {name: float(total / max(count, 1)) for name, (total, count) in zip(names, totals, strict=True)}
