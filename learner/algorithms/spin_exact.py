"""SPIN-Diffusion, the exact form: self-play on whole trajectories (Yuan et al., arXiv 2402.10210).

With rho the log-ratio of a trajectory against the opponent, the weights at the start of the iteration,

    l(z) = -ln sig(z),     L = mean over pairs of l( lambda * [rho(real) - rho(generated)] ),     rho = sum over steps

The sum over steps is inside l: the paper's approximate form, and the one it trains, have it outside, as a Jensen bound.
Solved to convergence an iteration takes the opponent's law p to p * (data / p)^(1/lambda), normalised: lambda 1 reaches
the data at once, above 1 contracts, below 1/2 diverges. Real trajectories are teacher-forced (`Chain.teacher_forced`),
which the paper leaves open.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.metrics import Metrics, mean_metric


def spin_exact(
    log_prob_Q2T: Tensor,
    log_prob_opponent_Q2T: Tensor,
    scored_T: Tensor,
    *,
    spin_lambda: float,
    normaliser: int,
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of Q pairs, column 0 real and 1 generated; differentiable in `log_prob_Q2T`.

    Log-probabilities are fp64, latent_sum; scored_T is bool. The loss is summed over the pairs given and divided by
    `normaliser`, the number of pairs over all ranks; no pair gives exactly 0. `pairs/margin` is the logit. Raises
    ValueError for shapes that do not fit, no scored step, or a non-finite opponent.
    """
    _check(log_prob_Q2T, log_prob_opponent_Q2T, scored_T)
    zero = torch.zeros((), dtype=log_prob_Q2T.dtype, device=log_prob_Q2T.device)
    log_ratio_Q2 = torch.where(scored_T, log_prob_Q2T - log_prob_opponent_Q2T, zero).sum(2)
    margin_Q = spin_lambda * (log_ratio_Q2[:, 0] - log_ratio_Q2[:, 1])
    loss = -logsigmoid(margin_Q).sum() / normaliser
    return loss, {
        "pairs/margin": mean_metric(margin_Q),
        "pairs/margin_square": mean_metric(margin_Q.square()),
        "pairs/accuracy": mean_metric((margin_Q.sign() + 1) / 2),
        "spin/log_ratio_real": mean_metric(log_ratio_Q2[:, 0]),
        "spin/log_ratio_generated": mean_metric(log_ratio_Q2[:, 1]),
    }


def _check(log_prob_Q2T: Tensor, opponent_Q2T: Tensor, scored_T: Tensor) -> None:
    expected_shape = (len(log_prob_Q2T), 2, len(scored_T))
    for name, tensor in (("log-probabilities", log_prob_Q2T), ("opponent log-probabilities", opponent_Q2T)):
        if tensor.shape != expected_shape:
            raise ValueError(f"spin_exact needs {name} of shape {expected_shape}, not {tuple(tensor.shape)}")
    if not bool(scored_T.any()):
        raise ValueError("spin_exact needs a step with a density; a deterministic sampler has none")
    if not bool(torch.isfinite(opponent_Q2T).all()):
        raise ValueError("spin_exact was given a non-finite opponent")
