"""The learning rate of each optimizer step: a function of its place in the run, never of what came before."""

from __future__ import annotations

from itertools import accumulate

from protocol.recipe import Recipe


def learning_rate(recipe: Recipe, round_: int, step_in_round: int) -> float:
    """Returns the rate of one step: a linear warm-up, then constant or linearly to 0 at the end.

    An iteration of self-play has a rate and a schedule of its own, from its first step on.
    """
    learner, per_round = recipe.learner, recipe.algorithm.num_steps_per_round
    first, rounds, peak = 0, recipe.rounds, learner.learning_rate
    starts = accumulate((iteration.rounds for iteration in recipe.iterations), initial=0)
    for iteration, start in zip(recipe.iterations, starts, strict=False):
        if start <= round_:
            first, rounds, peak = start, iteration.rounds, iteration.learning_rate or learner.learning_rate
    step, total = (round_ - first) * per_round + step_in_round, rounds * per_round
    if step < learner.warmup_steps:
        return peak * (step + 1) / learner.warmup_steps
    if learner.decay == "linear":
        return peak * max(0.0, (total - step) / max(1, total - learner.warmup_steps))
    return peak
