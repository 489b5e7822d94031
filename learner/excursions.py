"""Updates on excursions: Diffusion-Sharpening, by errors at the states that the best and the worst candidate visited.

The rollouts have made excursions and rewards; the learner selects, and evaluates only those whom it trains on. That is
the gradient of one pass over all candidates, since the others have none (algorithms.md 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, by_quartile
from learner.algorithms.sharpening import sharpening_rlhf, sharpening_select, sharpening_sft
from learner.batching import stack
from learner.probes import Costs, ErrorProbe, Noised
from learner.summary import summarise
from learner.update import Behaviour, Tools, UpdateReport
from protocol.algorithms import SharpeningRlhf, SharpeningSft
from protocol.groups import Group
from protocol.seeds import Purpose, draw_uniform


@dataclass(frozen=True)
class Chosen:
    """U groups' selected candidates: the M states of the best, or 2 M of best and worst, which of the M states each
    group has, and the scores of best and worst."""

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

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        return self._tools.descent.costs

    def state(self) -> dict[str, Any]:
        """Nothing but the weights."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:  # noqa: ARG002
        """Takes the round's optimizer steps. `behaviour` is not needed: states are the ticket's version's own."""
        report = UpdateReport()
        for place in self._tools.steps(round_):
            self._step(self._tools.part(groups, place.part), place.rate, report)
        return report

    def _step(self, groups: Sequence[Group], rate: float, report: UpdateReport) -> None:
        chosen = self._choose(groups)
        probe = ErrorProbe(self._tools.policy, chosen.noised, isinstance(self._settings, SharpeningRlhf))
        num_units = round(float(self._engine.sum(torch.tensor(float(len(chosen.noised))))))

        def loss(error_NK: Tensor, unit_N: Tensor) -> tuple[Tensor, Metrics]:
            value, metrics = self._loss(error_NK, chosen, unit_N, max(1, num_units))
            timestep_N = chosen.noised.timestep_UK[unit_N, 0]
            return value, {**metrics, **by_quartile("error", error_NK[:, 0], timestep_N, self._num_timesteps)}

        step = self._tools.descent.one_pass(probe, loss, len(chosen.noised), chosen.metrics)
        report.add(step, rate, summarise(step.means))

    @property
    def _num_timesteps(self) -> int:
        return len(self._tools.policy.alpha_bar)

    def _choose(self, groups: Sequence[Group]) -> Chosen:
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
        numbers = [[int(candidate_P[p]) for candidate_P in candidates] for p in rows]
        noised = self._noised([groups[p] for p in rows], numbers, groups[0])
        device = self._tools.policy.device
        return Chosen(noised, mask_PM[rows].to(device), selection.reward_P2[rows].to(device), selection.metrics)

    def _noised(self, groups: Sequence[Group], numbers: Sequence[Sequence[int]], any_group: Group) -> Noised:
        """Returns the states of the given candidates of each group, one candidate's M after the other's."""
        num_states, device = self._settings.excursion.num_states, self._tools.policy.device
        states, noises, timesteps = [], [], []
        for group, chosen in zip(groups, numbers, strict=True):
            states_GMCHW = _padded(group, "states_GMCHW", num_states)
            noise_GCHW = torch.from_numpy(group.array("noise_GCHW").astype("float32"))
            timestep_M = _padded_timesteps(group, num_states)
            states.append(torch.cat([states_GMCHW[number] for number in chosen]))
            noises.append(torch.cat([noise_GCHW[number].expand(num_states, -1, -1, -1) for number in chosen]))
            timesteps.append(timestep_M.repeat(len(chosen)))
        num_values = num_states * (2 if isinstance(self._settings, SharpeningRlhf) else 1)
        empty = torch.zeros(0, num_values, *any_group.array("noise_GCHW").shape[1:])
        return Noised.of(
            (torch.stack(states) if states else empty).to(device),
            (torch.stack(noises) if noises else empty).to(device),
            (torch.stack(timesteps) if timesteps else torch.zeros(0, num_values, dtype=torch.long)).to(device),
            [group.prompt for group in groups],
        )

    def _loss(self, error_NK: Tensor, chosen: Chosen, unit_N: Tensor, normaliser: int) -> tuple[Tensor, Metrics]:
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


def _padded(group: Group, name: str, num_states: int) -> Tensor:
    """Returns a field (G, M, ...) in fp32 with zeros for states that the group does not have."""
    value_GM = torch.from_numpy(group.array(name).astype("float32"))
    padded = torch.zeros(len(value_GM), num_states, *value_GM.shape[2:])
    padded[:, : value_GM.shape[1]] = value_GM
    return padded


def _padded_timesteps(group: Group, num_states: int) -> Tensor:
    timestep_M = torch.from_numpy(group.array("state_timestep_M").astype("int64"))
    return torch.cat([timestep_M, torch.zeros(num_states - len(timestep_M), dtype=torch.long)])
