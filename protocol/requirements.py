"""What each algorithm asks of the rest of a recipe: the combinations that could not learn, each with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from protocol.algorithms import (
    ALGORITHMS,
    Cpo,
    Ddpo,
    NcpCpo,
    NcpDpo,
    NcpSft,
    PolicyGradient,
    Prediction,
    SharpeningRlhf,
    SharpeningSft,
    Spin,
    SpinExact,
)
from protocol.errors import RecipeError

if TYPE_CHECKING:
    from protocol.algorithms import SourceKind
    from protocol.recipe import Recipe

HAS_WHICH = {
    "prompts": "prompts.train",
    "images": "a dataset of images in data",
    "pairs": "a dataset of preference pairs in data",
}


def problems(recipe: Recipe) -> Iterator[str]:
    """Yields what is wrong, in the order in which a person would mend it."""
    yield from _sources(recipe)
    yield from _groups(recipe)
    yield from _densities(recipe)
    yield from _kl_form(recipe)
    yield from _iterations(recipe)
    yield from _excursions(recipe)
    yield from _perception(recipe)
    yield from _behaviour(recipe)
    yield from _firewall(recipe)
    yield from _optional_rewards(recipe)
    for follower in recipe.followers:
        own = recipe.of_follower(follower.name)
        for problem in (*problems(own), *_follows(recipe, own)):
            yield f"followers, {follower.name}: {problem}"
    names = [follower.name for follower in recipe.followers]
    if len(set(names)) < len(names):
        yield f"followers: two have one name: {', '.join(sorted(names))}"
    if names and recipe.checkpoints.keep_last < 2:
        yield "checkpoints.keep_last: 1, but learners that resume together need 2: one may be a checkpoint ahead"


KERNELS: dict[str, tuple[Prediction, ...]] = {
    "ddim": ("epsilon", "v_prediction", "sample"),
    "ddpm": ("epsilon", "v_prediction", "sample"),
    "flow_grpo": ("flow",),
    "dance_grpo": ("flow",),
}
"""The base models that a sampler's kernel is for, by what their networks predict."""


def check_model(recipe: Recipe, prediction_type: str) -> None:
    """Raises RecipeError where a recipe's algorithms or its sampler are not for a model that predicts this."""
    fitting = [kernel for kernel, predictions in KERNELS.items() if prediction_type in predictions]
    if not fitting:
        raise RecipeError(
            "the base model predicts something unknown",
            value=prediction_type,
            expected=f"one of {', '.join(get_args(Prediction))}",
            do="choose another base model",
        )
    for algorithm in recipe.algorithms:
        if prediction_type not in algorithm.predictions:
            able = [name for name, kind in ALGORITHMS.items() if prediction_type in kind.predictions]
            raise RecipeError(
                f"algorithm {algorithm.name} cannot train a model that predicts {prediction_type}",
                value=recipe.model.path,
                expected=f"a model that predicts {' or '.join(algorithm.predictions)}",
                do=f"choose another base model, or one of these algorithms: {', '.join(able)}",
            )
    if recipe.sampler.kernel not in fitting:
        raise RecipeError(
            f"sampler.kernel is not for a model that predicts {prediction_type}",
            value=recipe.sampler.kernel,
            expected=" or ".join(fitting),
            do="correct sampler.kernel",
        )


def _behaviour(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    if recipe.behaviour == "base" and (algorithm.max_lag is not None or recipe.iterations):
        yield f"behaviour: base, but {algorithm.name} needs samples of the weights that it trains"


def colocation(recipe: Recipe) -> Iterator[str]:
    """Yields what keeps the first learner's ranks from sampling as rollout actors would, where they are to sample."""
    learner, worker = recipe.learner, recipe.rollout_worker
    if not recipe.is_colocated:
        return
    if learner.zero_stage == 3:
        yield (
            "rollouts: 0 lets the learner's ranks sample, each a ticket of its own, but with learner.zero_stage 3 no "
            "rank has all parameters; use stage 2 or less, or rollouts: 1"
        )
    if learner.threads != worker.threads or (learner.num_gpus > 0) != (worker.num_gpus > 0):
        yield (
            "rollouts: 0 lets the learner's ranks sample as rollout actors would, but learner.threads, num_gpus "
            f"{learner.threads}, {learner.num_gpus:g} and rollout_worker.threads, num_gpus {worker.threads}, "
            f"{worker.num_gpus:g} would compute in different ways: give both as many threads, and both GPUs or none"
        )


def _firewall(recipe: Recipe) -> Iterator[str]:
    if recipe.firewall is None:
        return
    if not recipe.rewards:
        yield "firewall: there are no rewards whose climbing it could compare with"
    if recipe.prompts.held_out is None and recipe.prompts.train is None:
        yield "firewall: it has no prompts to draw; set prompts.held_out"
    if recipe.behaviour == "base":
        yield "behaviour: base, but the firewall looks at what the sampling weights draw, which would never change"
    for reward in recipe.firewall.rewards:
        if reward.weight != 1 or reward.normalise.how != "none":
            yield f"firewall.rewards: {reward.label} has a weight or is normalised, but is never added to anything"
    if recipe.firewall.on_trip == "roll_back" and (recipe.followers or recipe.iterations):
        yield "firewall.on_trip: roll_back is for one learner without iterations; use warn or stop"


def _optional_rewards(recipe: Recipe) -> Iterator[str]:
    optional = [reward.label for reward in recipe.rewards if not reward.required]
    if optional and isinstance(recipe.algorithm, Ddpo):
        yield (
            f"rewards: {', '.join(optional)} may be left out of a round, but ddpo keeps statistics over rounds, which "
            "would then be of different sums; make all rewards required"
        )
    for reward in recipe.scored_rewards:
        longest_s = reward.timeout_s * reward.max_attempts
        if longest_s >= recipe.supervision.stall_timeout_s:
            yield (
                f"supervision.stall_timeout_s: {recipe.supervision.stall_timeout_s:g}, but the reward {reward.label} "
                f"may take {reward.max_attempts} times {reward.timeout_s:g} s for one group, and would be taken for a "
                f"standstill; raise it above {longest_s:g}"
            )


def _follows(recipe: Recipe, own: Recipe) -> Iterator[str]:
    """What a learner cannot do with groups that another's weights have sampled."""
    algorithm, first = own.algorithm, recipe.algorithm
    if algorithm.max_lag is not None and "excursions" not in (algorithm.content, first.content):
        yield f"{algorithm.name} is on-policy, but its groups are sampled with the first learner's weights"
    if isinstance(algorithm, SharpeningSft | SharpeningRlhf) and algorithm.backprop_through_steps:
        yield "algorithm.backprop_through_steps: what another learner's weights have visited cannot be visited again"
    if isinstance(algorithm, Spin | SpinExact):
        yield f"{algorithm.name} needs its own opponent's images, but the first learner's weights sample its groups"
    if "excursions" in (algorithm.content, first.content):
        own_excursion, first_excursion = (getattr(one, "excursion", None) for one in (algorithm, first))
        if own_excursion != first_excursion:
            yield f"{algorithm.name} and {first.name} would need groups of two kinds; excursions must be the same"
    if isinstance(first, Spin) and algorithm.content == "trajectories":
        yield f"{algorithm.name} needs trajectories, but {first.name} encodes its images anew"


def needs_rewards(recipe: Recipe) -> bool:
    """True if some group is learnt from by its rewards."""
    return "prompts" in recipe.source_kinds or recipe.algorithm.content == "excursions"


def is_sampled(recipe: Recipe, kind: SourceKind) -> bool:
    """True if groups of a source depend on weights: pairs, and images but for self-play and excursions, are only
    encoded."""
    algorithm = recipe.algorithm
    return kind == "prompts" or algorithm.content == "excursions" or isinstance(algorithm, Spin | SpinExact)


def _sources(recipe: Recipe) -> Iterator[str]:
    name, usable = recipe.algorithm.name, recipe.algorithm.sources
    wanted = " or ".join(HAS_WHICH[kind] for kind in usable)
    if not recipe.source_kinds:
        yield f"there is nothing to learn from: algorithm {name} needs {wanted}"
    for kind in recipe.source_kinds:
        if kind not in usable:
            yield f"algorithm {name} cannot learn from {HAS_WHICH[kind]}; it needs {wanted}"
    if needs_rewards(recipe) and not recipe.rewards:
        yield f"rewards: algorithm {name} learns from rewards, so that at least one is needed"


def _groups(recipe: Recipe) -> Iterator[str]:
    algorithm, group_size = recipe.algorithm, recipe.batch.group_size
    if needs_rewards(recipe) and group_size < algorithm.min_group_size:
        yield (
            f"batch.group_size: {group_size}; {algorithm.name} compares siblings and needs at least "
            f"{algorithm.min_group_size}"
        )
    if algorithm.max_lag is not None and recipe.lag > algorithm.max_lag:
        yield (
            f"lag: {recipe.lag}; the loss of {algorithm.name} means nothing on groups that old: use at most "
            f"{algorithm.max_lag}"
        )


def _densities(recipe: Recipe) -> Iterator[str]:
    sampler, name = recipe.sampler, recipe.algorithm.name
    if recipe.algorithm.content == "trajectories" and sampler.num_scored_steps < 1:
        yield (
            f"sampler: eta {sampler.eta} with {sampler.num_steps} steps leaves no step with a density; {name} needs a "
            "stochastic sampler: eta above 0 and at least 2 steps"
        )


def _kl_form(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    if isinstance(algorithm, PolicyGradient) and algorithm.kl_form == "flow_grpo" and not recipe.sampler.is_flow:
        yield (
            f"algorithm.kl_form: flow_grpo divides by a flow's step length, which kernel {recipe.sampler.kernel} does "
            "not have; use exact"
        )


def _iterations(recipe: Recipe) -> Iterator[str]:
    total = sum(iteration.rounds for iteration in recipe.iterations)
    if recipe.iterations and total != recipe.rounds:
        yield f"rounds: {recipe.rounds}, but the iterations of algorithm.iterations have {total} in all"


def _excursions(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    if not isinstance(algorithm, SharpeningSft | SharpeningRlhf) or "images" not in recipe.source_kinds:
        return
    if algorithm.select_on == "final_x0":
        yield (
            "algorithm.select_on: final_x0 gives all candidates of one dataset image the same score; use path_mean or "
            "path_sum"
        )
    if algorithm.excursion.noise != "fresh":
        yield (
            f"algorithm.excursion.noise: {algorithm.excursion.noise}, but candidates of one dataset image differ only "
            "by their noise; use fresh"
        )


def _perception(recipe: Recipe) -> Iterator[str]:
    if not isinstance(recipe.algorithm, NcpSft | NcpDpo | NcpCpo):
        return
    if recipe.algorithm.perception.encoder_weights == "ema" and recipe.learner.ema is None:
        yield "algorithm.perception.encoder_weights: ema, but no average is kept; set learner.ema: {decay: 0.999}"
    if recipe.learner.precision != "fp32":
        yield (
            f"learner.precision: {recipe.learner.precision}; {recipe.algorithm.name} resolves differences of 1e-3 in a "
            f"latent, which {recipe.learner.precision} rounds away: use fp32"
        )


def warnings(recipe: Recipe) -> list[str]:
    """Returns what is legal and probably not meant."""
    algorithm, found = recipe.algorithm, []
    if isinstance(algorithm, Cpo | NcpCpo) and algorithm.sft_weight == 0:
        found.append("algorithm.sft_weight is 0: nothing bounds the loser's error")
    if isinstance(algorithm, SpinExact) and algorithm.spin_lambda < 0.5:
        found.append(f"algorithm.spin_lambda is {algorithm.spin_lambda}: below 1/2 iterations diverge")
    if isinstance(algorithm, SharpeningSft) and recipe.batch.group_size == 1:
        found.append("batch.group_size is 1: sharpening_sft is then plain regression, with nothing to select")
    if recipe.firewall and recipe.firewall.every_rounds >= recipe.rounds:
        found.append("firewall.every_rounds: only the first round is checked, so that nothing is ever compared")
    if recipe.iterations and any(
        recipe.learner.warmup_steps > iteration.rounds * algorithm.num_steps_per_round
        for iteration in recipe.iterations
    ):
        found.append("learner.warmup_steps outlasts an iteration: its learning rate is never reached")
    return found
