"""Updates on excursions: Diffusion-Sharpening, by errors at the states that the best and the worst candidate visited.

The rollouts have made excursions and rewards; the learner selects, and evaluates only those whom it trains on. That is
the gradient of one pass over all candidates, since the others have none (algorithms.md 4.3).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.kernels import noised, predicted_noise_and_clean
from diffusion.noise import normal
from learner.algorithms.metrics import Metrics, by_quartile, mean_metric
from learner.algorithms.sharpening import plain_error, sharpening_rlhf, sharpening_select, sharpening_sft
from learner.batching import stack
from learner.probes import Costs, ErrorProbe, Noised, WalkProbe
from learner.summary import summarise
from learner.update import Behaviour, Place, Tools, UpdateReport
from protocol.algorithms import SharpeningRlhf, SharpeningSft
from protocol.errors import RecipeError
from protocol.groups import Group
from protocol.seeds import Purpose, derive_seed, draw_uniform

COMPARE_EVERY_ROUNDS = 10
NUM_HELD_OUT = 16


@dataclass(frozen=True)
class Chosen:
    """U groups' selected candidates, best first: their sibling numbers, the M states of each, which of the M a group
    has, and the scores of best and worst."""

    groups: tuple[Group, ...]
    numbers: tuple[tuple[int, ...], ...]
    noised: Noised
    mask_UM: Tensor
    reward_U2: Tensor
    metrics: Metrics


class ExcursionUpdater:
    """Applies Diffusion-Sharpening."""

    def __init__(self, tools: Tools) -> None:
        assert isinstance(tools.recipe.algorithm, SharpeningSft | SharpeningRlhf)
        self._tools, self._recipe, self._engine = tools, tools.recipe, tools.engine
        self._settings = tools.recipe.algorithm
        self._held_out: list[list[str]] | None = None
        if tools.follows and self._settings.backprop_through_steps:
            raise RecipeError(
                "algorithm.backprop_through_steps: the states of another learner's weights cannot be visited again",
                do="set it to false for followers",
            )

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        return self._tools.descent.costs

    def state(self) -> dict[str, Any]:
        """The held-out images."""
        return {"held_out": self._held_out}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        self._held_out = state["held_out"]

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:  # noqa: ARG002
        """Takes the round's optimizer steps. `behaviour` is not needed: states are the ticket's version's own."""
        report = UpdateReport()
        for place in self._tools.steps(round_):
            compares = round_ % COMPARE_EVERY_ROUNDS == 0 and not report.loss
            self._step(self._tools.part(groups, place.part), place, report, compares=compares)
        return report

    def _step(self, groups: Sequence[Group], place: Place, report: UpdateReport, *, compares: bool) -> None:
        chosen = self._choose(groups, place.update)
        metrics = {**chosen.metrics, **self._plain(chosen), **self._held(groups)} if compares else chosen.metrics
        num_units = round(float(self._engine.sum(torch.tensor(float(len(chosen.noised))))))
        loss = partial(self._loss, chosen, max(1, num_units))
        step = self._tools.descent.one_pass(self._probe(chosen.noised), loss, len(chosen.noised), metrics)
        report.add(step, place.rate, summarise(with_difference(step.means)))

    def _probe(self, noised: Noised) -> ErrorProbe:
        policy, with_reference = self._tools.policy, isinstance(self._settings, SharpeningRlhf)
        if not self._settings.backprop_through_steps:
            return ErrorProbe(policy, noised, with_reference)
        num_states, wire_dtype = self._settings.excursion.num_states, self._tools.chain.wire_dtype
        return WalkProbe(policy, noised, with_reference, num_states=num_states, wire_dtype=wire_dtype)

    @property
    def _num_timesteps(self) -> int:
        return len(self._tools.policy.process)

    def _choose(self, groups: Sequence[Group], update: int) -> Chosen:
        """Selects by the groups' rewards, on all of them; a group whose candidates tie has no pair to learn from."""
        settings, num_states = self._settings, self._settings.excursion.num_states
        mask_PM = torch.tensor([[m < len(g.array("state_timestep_M")) for m in range(num_states)] for g in groups])
        draws = [draw_uniform(self._recipe.seed, Purpose.SELECTION, group.ticket_id) for group in groups]
        on_path = settings.select_on != "final_x0"
        selection = sharpening_select(
            torch.stack([_padded(group, "state_reward_GM", num_states) for group in groups]) if on_path else None,
            None if on_path else stack(groups, "reward_G", torch.device("cpu")),
            mask_PM,
            select_on=settings.select_on,
            selection=settings.selection,
            draws_P=torch.tensor(draws, dtype=torch.float64),
        )
        has_pairs = isinstance(settings, SharpeningRlhf)
        rows = [p for p in range(len(groups)) if not has_pairs or selection.usable_P[p]]
        candidates = (selection.best_P, selection.worst_P) if has_pairs else (selection.best_P,)
        numbers = tuple(tuple(int(candidate_P[p]) for candidate_P in candidates) for p in rows)
        usable, device = tuple(groups[p] for p in rows), self._tools.policy.device
        return Chosen(
            usable,
            numbers,
            self._noised(usable, numbers, [self._prompt(group, update) for group in usable], len(candidates)),
            mask_PM[rows].to(device),
            selection.reward_P2[rows].to(device),
            {**selection.metrics, **self._by_start(groups)},
        )

    def _by_start(self, groups: Sequence[Group]) -> Metrics:
        """Returns where excursions start, and all candidates' mean reward by that."""
        tau_P = torch.tensor([int(group.array("state_timestep_M")[0]) for group in groups])
        reward_P = stack(groups, "reward_G", torch.device("cpu")).mean(1)
        quartiles = by_quartile("sharpening/reward", reward_P, tau_P, self._num_timesteps)
        return {"sharpening/start_tau_mean": mean_metric(tau_P), **quartiles}

    def _prompt(self, group: Group, update: int) -> str:
        """The prompt, or the empty one, that errors are taken with in a pass."""
        drawn = draw_uniform(self._recipe.seed, Purpose.PROMPT_DROPOUT, group.ticket_id, 0, update)
        return "" if drawn < self._settings.prompt_dropout else group.prompt

    def _noised(
        self, groups: Sequence[Group], numbers: Sequence[Sequence[int]], prompts: Sequence[str], num_candidates: int
    ) -> Noised:
        """Returns the states of the given candidates of each group, one candidate's M after the other's."""
        num_states, device = self._settings.excursion.num_states, self._tools.policy.device
        states, targets, timesteps = [], [], []
        for group, chosen in zip(groups, numbers, strict=True):
            states_GMCHW = _padded(group, "states_GMCHW", num_states)
            target_GCHW = torch.from_numpy(group.array("target_GCHW").astype("float32"))
            timestep_M = _padded_timesteps(group, num_states)
            states.append(torch.cat([states_GMCHW[number] for number in chosen]))
            targets.append(torch.cat([target_GCHW[number].expand(num_states, -1, -1, -1) for number in chosen]))
            timesteps.append(timestep_M.repeat(len(chosen)))
        empty = torch.zeros(0, num_candidates * num_states, *self._tools.policy.latent_shape_CHW)
        return Noised.of(
            (torch.stack(states) if states else empty).to(device),
            (torch.stack(targets) if targets else empty).to(device),
            (torch.stack(timesteps) if timesteps else torch.zeros(empty.shape[:2], dtype=torch.long)).to(device),
            prompts,
        )

    def _plain(self, chosen: Chosen) -> Metrics:
        """Returns the error of one candidate of each group that was not chosen, if there is any: the first."""
        left = [
            (u, min(others))
            for u, (group, numbers) in enumerate(zip(chosen.groups, chosen.numbers, strict=True))
            if (others := set(range(len(group.array("target_GCHW")))) - set(numbers))
        ]
        rows, groups = [u for u, _ in left], [chosen.groups[u] for u, _ in left]
        noised = self._noised(groups, [(number,) for _, number in left], [group.prompt for group in groups], 1)
        error_UM = self._evaluate(ErrorProbe(self._tools.policy, noised), torch.arange(len(groups)))
        return {"sharpening/error_plain": mean_metric(plain_error(error_UM, chosen.mask_UM[rows].double()))}

    def _held(self, groups: Sequence[Group]) -> Metrics:
        """Returns the error at images that are kept, under noise and timesteps that never change: the schedule's parts,
        each at its middle. What is selected has no say in it."""
        if self._held_out is None:
            self._held_out = self._hold_out(groups)
        policy, shape_CHW, num_images = self._tools.policy, self._tools.policy.latent_shape_CHW, len(self._held_out)
        x0 = [np.frombuffer(base64.b64decode(data), "<f2").astype("float32") for _, data in self._held_out]
        seeds = [derive_seed(self._recipe.seed, Purpose.TRAINING_NOISE, "held out", n) for n in range(num_images)]
        x0_NCHW = torch.from_numpy(np.stack(x0)).view(-1, *shape_CHW).to(policy.device)
        noise_NCHW = torch.stack([normal(seed, shape_CHW) for seed in seeds]).to(policy.device)
        timestep_N = torch.arange(1, 2 * num_images, 2, device=policy.device) * self._num_timesteps // (2 * num_images)
        target_NCHW = policy.process.target(noise_NCHW, x0_NCHW)
        states_NCHW = noised(x0_NCHW, noise_NCHW, policy.process.level(timestep_N))
        prompts = [prompt for prompt, _ in self._held_out]
        held_out = Noised.of(states_NCHW[:, None], target_NCHW[:, None], timestep_N[:, None], prompts)
        own = torch.arange(self._engine.rank, num_images, self._engine.world_size)
        return {"sharpening/heldout_error": mean_metric(self._evaluate(ErrorProbe(policy, held_out), own))}

    def _hold_out(self, groups: Sequence[Group]) -> list[list[str]]:
        """Returns prompts and fp16 latents of the first candidates' images of a round, the same on every rank."""
        process, rows = self._tools.policy.process, []
        for group in groups[:NUM_HELD_OUT]:
            timestep_1 = torch.from_numpy(group.array("state_timestep_M")[:1].astype("int64"))
            first_1CHW, target_1CHW = (
                torch.from_numpy(array[None].astype("float32"))
                for array in (group.array("states_GMCHW")[0, 0], group.array("target_GCHW")[0])
            )
            level = process.level(timestep_1.to(self._tools.policy.device))
            first_1CHW, target_1CHW = first_1CHW.to(level.signal_N.device), target_1CHW.to(level.signal_N.device)
            _, x0_1CHW = predicted_noise_and_clean(first_1CHW, target_1CHW, level, process.target_type)
            data = base64.b64encode(x0_1CHW.cpu().numpy().astype("<f2").tobytes()).decode()
            rows.append((group.ticket_id, group.prompt, data))
        everyone = sorted(row for rows in self._engine.gather(rows) for row in rows)
        return [[prompt, data] for _, prompt, data in everyone[:NUM_HELD_OUT]]

    def _evaluate(self, probe: ErrorProbe, place_N: Tensor) -> Tensor:
        """Returns the errors (N, K) of some units under the weights as they are."""
        return self._tools.descent.evaluate(probe, self._engine.denoiser, place_N[:, None])

    def _loss(self, chosen: Chosen, normaliser: int, error_NK: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
        loss, metrics = self._objective(chosen, normaliser, error_NK, unit_N)
        timestep_N = chosen.noised.timestep_UK[unit_N, 0]
        return loss, {**metrics, **by_quartile("error", error_NK[:, 0], timestep_N, self._num_timesteps)}

    def _objective(self, chosen: Chosen, normaliser: int, error_NK: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
        mask_NM, settings = chosen.mask_UM[unit_N], self._settings
        weight_NM, usable_N = mask_NM.double(), torch.ones(len(unit_N), dtype=torch.bool, device=mask_NM.device)
        if isinstance(settings, SharpeningSft):
            return sharpening_sft(error_NK, weight_NM, usable_N, normaliser=normaliser)
        # The policy's errors at the states of the best and of the worst, then the reference's.
        error_N2M, error_ref_N2M = error_NK.view(len(error_NK), 2, 2, settings.excursion.num_states).unbind(1)
        if settings.ref_times == "first":
            error_ref_N2M = error_ref_N2M[:, :, :1].expand_as(error_ref_N2M)
        return sharpening_rlhf(
            error_N2M,
            error_ref_N2M,
            weight_NM,
            chosen.reward_U2[unit_N],
            usable_N,
            beta=settings.beta_full,
            margin=settings.margin,
            normaliser=normaliser,
        )


def with_difference(means: Mapping[str, float]) -> dict[str, float]:
    """Adds what selection alone makes of the error, where that of candidates that were not selected is known."""
    if not {"sharpening/error_selected", "sharpening/error_plain"} <= means.keys():
        return dict(means)
    difference = means["sharpening/error_selected"] - means["sharpening/error_plain"]
    return {**means, "sharpening/selected_minus_plain": difference}


def _padded(group: Group, name: str, num_states: int) -> Tensor:
    """Returns a field (G, M, ...) in fp32 with zeros for states that the group does not have."""
    value_GM = torch.from_numpy(group.array(name).astype("float32"))
    padded = torch.zeros(len(value_GM), num_states, *value_GM.shape[2:])
    padded[:, : value_GM.shape[1]] = value_GM
    return padded


def _padded_timesteps(group: Group, num_states: int) -> Tensor:
    timestep_M = torch.from_numpy(group.array("state_timestep_M").astype("int64"))
    return torch.cat([timestep_M, torch.zeros(num_states - len(timestep_M), dtype=torch.long)])
