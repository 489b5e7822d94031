"""Units: what one image or one pair of images is to the losses on images, and how it is noised.

    sampled group    the sibling of the highest reward, or pairs of siblings by reward
    dataset's image  itself, or a pair with each image that the opponent generated for its caption
    dataset's pair   itself, or its winner

Timesteps and noise are drawn by key (algorithms.md 0.10): no draw depends on the batch, on ranks or on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.kernels import noised
from diffusion.noise import normal
from diffusion.policy import Policy
from learner.algorithms.metrics import Metrics
from learner.algorithms.selection import best_of_n, make_pairs, random_selection, selection_metrics
from learner.batching import stack
from learner.probes import Noised
from protocol.algorithms import ImageAlgorithm, Pairs
from protocol.groups import Group
from protocol.seeds import Purpose, derive_seed, draw_uniform


@dataclass(frozen=True)
class Units:
    """U units of K clean latents: x0_UKCHW fp32, winner or real image first; weight_U fp64; (ticket_id, number) and the
    prompt of each. `num_units` is this rank's part of the loss's normaliser."""

    x0_UKCHW: Tensor
    weight_U: Tensor
    keys: tuple[tuple[str, int], ...]
    prompts: tuple[str, ...]
    num_units: int
    metrics: Metrics


Member = tuple[Group, int, list[Tensor], float]
"""A group, the unit's number in it, its clean latents, its weight."""


def single_units(groups: Sequence[Group], select: str, run_seed: int, device: torch.device) -> Units:
    """Returns one image of each group. Raises TrainingError for groups without images or rewards."""
    sampled = [group for group in groups if _is_sampled(group)]
    chosen, metrics = {}, {"select/gap": torch.zeros(2, dtype=torch.float64)}
    if sampled:
        reward_PG = stack(sampled, "reward_G", torch.device("cpu"))
        draws = [draw_uniform(run_seed, Purpose.SELECTION, group.ticket_id) for group in sampled]
        chosen_P = (
            best_of_n(reward_PG)
            if select == "best"
            else random_selection(torch.tensor(draws, dtype=torch.float64), reward_PG.shape[1])
        )
        chosen = {group.ticket_id: int(number) for group, number in zip(sampled, chosen_P, strict=True)}
        metrics = selection_metrics(reward_PG, chosen_P)
    members: list[Member] = []
    for group in groups:
        if group.ticket_id in chosen:
            x0 = _images(group)[chosen[group.ticket_id]]
        elif "pair_x0_2CHW" in group.arrays:
            x0 = _latents(group, "pair_x0_2CHW")[0]
        else:
            x0 = _latents(group, "real_x0_CHW")
        members.append((group, 0, [x0], 1.0))
    return _units(members, 1, len(members), metrics, groups, device)


def preference_units(groups: Sequence[Group], settings: Pairs, device: torch.device) -> Units:
    """Returns pairs, winner first: of each sampled group by its rewards, of a dataset as they are."""
    sampled = [group for group in groups if _is_sampled(group)]
    members: list[Member] = [
        (group, 0, list(_latents(group, "pair_x0_2CHW")), 1.0) for group in groups if not _is_sampled(group)
    ]
    num_units, counts = len(members), torch.zeros(2, dtype=torch.float64)
    if sampled:
        pairs = make_pairs(stack(sampled, "reward_G", torch.device("cpu")), settings)
        num_units += pairs.num_units
        numbers = [0] * len(sampled)
        for place, winner, loser, weight in zip(
            pairs.group_Q.tolist(), pairs.winner_Q, pairs.loser_Q, pairs.weight_Q.tolist(), strict=True
        ):
            x0_GCHW = _images(sampled[place])
            members.append((sampled[place], numbers[place], [x0_GCHW[winner], x0_GCHW[loser]], weight))
            numbers[place] += 1
        num_considered = len(members) + pairs.num_tied + pairs.num_below_threshold
        counts = torch.tensor([float(pairs.num_tied), float(num_considered)], dtype=torch.float64)
    return _units(members, 2, num_units, {"pairs/tied": counts}, groups, device)


def self_play_units(groups: Sequence[Group], device: torch.device) -> Units:
    """Returns pairs of a dataset's image, first, and each image that the opponent generated for its caption."""
    members: list[Member] = []
    for group in groups:
        real = _latents(group, "real_x0_CHW")
        members += [(group, g, [real, own], 1.0) for g, own in enumerate(_latents(group, "x0_GCHW"))]
    return _units(members, 2, len(members), {}, groups, device)


def noise_units(
    units: Units, policy: Policy, settings: ImageAlgorithm, *, shared_noise: bool, run_seed: int, update: int
) -> Noised:
    """Noises every unit at one timestep, its members alike unless noise is not shared. `update` counts the passes over
    a round, each with draws of its own."""
    num_members, shape_CHW = units.x0_UKCHW.shape[1], policy.latent_shape_CHW
    num_timesteps = len(policy.process)
    timesteps, noises, prompts = [], [], []
    for (ticket_id, number), prompt in zip(units.keys, units.prompts, strict=True):
        key = (ticket_id, number, update)
        timesteps.append(draw_timestep(run_seed, settings.min_tau, num_timesteps, *key))
        dropped = draw_uniform(run_seed, Purpose.PROMPT_DROPOUT, *key) < settings.prompt_dropout
        prompts.append("" if dropped else prompt)
        seeds = [derive_seed(run_seed, Purpose.TRAINING_NOISE, *key, k) for k in range(num_members)]
        noises.append(torch.stack([normal(seeds[0] if shared_noise else seed, shape_CHW) for seed in seeds]))
    empty = torch.zeros(0, num_members, *shape_CHW)
    noise_UKCHW = (torch.stack(noises) if noises else empty).to(policy.device)
    timestep_U = torch.tensor(timesteps, dtype=torch.long, device=policy.device)
    timestep_UK = timestep_U[:, None].expand(-1, num_members)
    level = policy.process.level(timestep_UK.flatten())
    states_NCHW = noised(units.x0_UKCHW.flatten(0, 1), noise_UKCHW.flatten(0, 1), level)
    target_UKCHW = policy.process.target(noise_UKCHW, units.x0_UKCHW)
    return Noised.of(states_NCHW.view_as(noise_UKCHW), target_UKCHW, timestep_UK, prompts)


def perception_draws(units: Units, policy: Policy, run_seed: int, update: int) -> tuple[Tensor, Tensor]:
    """Returns the step noise of each unit (U + 1, C, H, W) and its fresh timestep (U + 1,), with a filler last."""
    keys = [(*key, update) for key in (*units.keys, ("", 0))]
    noises = [normal(derive_seed(run_seed, Purpose.PERCEPTION_NOISE, *key), policy.latent_shape_CHW) for key in keys]
    num_timesteps = len(policy.process)
    timesteps = [derive_seed(run_seed, Purpose.PERCEPTION_TIMESTEP, *key) % num_timesteps for key in keys]
    return torch.stack(noises).to(policy.device), torch.tensor(timesteps, device=policy.device)


def draw_timestep(run_seed: int, smallest: int, num_timesteps: int, *key: int | str) -> int:
    """Returns a training timestep, uniform from `smallest` to the last."""
    return smallest + derive_seed(run_seed, Purpose.TIMESTEP, *key) % (num_timesteps - smallest)


def _is_sampled(group: Group) -> bool:
    return not {"real_x0_CHW", "pair_x0_2CHW"} & group.arrays.keys()


def _images(group: Group) -> Tensor:
    """Returns a sampled group's clean latents (G, C, H, W): the ends of its trajectories, if it carries those."""
    if "latents_GSCHW" in group.arrays:
        return _latents(group, "latents_GSCHW")[:, -1]
    return _latents(group, "x0_GCHW")


def _latents(group: Group, name: str) -> Tensor:
    return torch.from_numpy(group.array(name).astype("float32"))


def _units(
    members: Sequence[Member],
    num_members: int,
    num_units: int,
    metrics: Metrics,
    groups: Sequence[Group],
    device: torch.device,
) -> Units:
    in_order = sorted(members, key=lambda member: (member[0].ticket_id, member[1]))
    x0 = [torch.stack(latents) for _, _, latents, _ in in_order]
    shape_CHW = next(array.shape[-3:] for name, array in groups[0].arrays.items() if name.endswith("CHW"))
    empty = torch.zeros(0, num_members, *shape_CHW)
    return Units(
        (torch.stack(x0) if x0 else empty).to(device),
        torch.tensor([weight for *_, weight in in_order], dtype=torch.float64, device=device),
        tuple((group.ticket_id, number) for group, number, *_ in in_order),
        tuple(group.prompt for group, *_ in in_order),
        num_units,
        metrics,
    )
