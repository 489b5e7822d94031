"""Flow-matching models: the SDE's kernels, their levels, and what errors are taken against."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion.chain import Chain
from diffusion.excursion import draw_start, excursion, excursion_schedule, walk_again
from diffusion.families.schedulers import FlowScheduler, shift_of
from diffusion.kernels import noised, predicted_noise_and_clean, teacher_forced_transition, transition
from diffusion.policy import Policy
from diffusion.process import Flow, VariancePreserving
from diffusion.schedules import StepConstants, make_flow_schedule
from protocol.algorithms import Excursion
from protocol.errors import ModelError
from protocol.recipe import Lora, Sampler
from tests.models import make_tiny_flux_model, make_tiny_model, make_tiny_sd3_model

KERNELS = [("flow_grpo", 0.7), ("dance_grpo", 0.3)]
FLOW = Flow(torch.linspace(1e-3, 1, 1000, dtype=torch.float64))


def schedule(shares: list[float], kernel: str, eta: float) -> StepConstants:
    share_T = torch.tensor(shares, dtype=torch.float64)
    return make_flow_schedule(share_T, share_T, kernel=kernel, eta=eta)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def mean_and_sigma(kernel: str, eta: float, state: float, velocity: float) -> tuple[float, float]:
    """The step from s = 0.6 to 0.5."""
    constants = schedule([0.6, 0.5], kernel, eta).at(torch.tensor([0]))
    drawn = transition(column(state), column(velocity), constants, prediction_type="flow", noise_NCHW=column(0.0))
    return float(drawn.mean_NCHW), float(drawn.sigma_N)


@pytest.mark.parametrize(
    ("kernel", "eta", "mean", "sigma"), [("flow_grpo", 0.7, 0.78835, 0.27111), ("dance_grpo", 0.3, 0.82490, 0.09487)]
)
def test_a_step_of_the_sde_is_the_published_one(kernel: str, eta: float, mean: float, sigma: float) -> None:
    """K-T5; the last digits are those of the table."""
    found = mean_and_sigma(kernel, eta, 0.8, -0.3)
    assert found == (pytest.approx(mean, abs=5e-6), pytest.approx(sigma, abs=5e-6))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_flow_grpos_own_form_is_the_same_step(eta: float) -> None:
    """K-T5: its code writes the mean with std^2/(2 s) factors on x and v."""
    share, length, state, velocity = 0.6, 0.1, 0.8, -0.3
    std = eta * math.sqrt(share / (1 - share))
    mean = state * (1 - std**2 / (2 * share) * length) - velocity * (1 + std**2 * (1 - share) / (2 * share)) * length
    found = mean_and_sigma("flow_grpo", eta, state, velocity)
    assert found == (pytest.approx(mean, rel=1e-12), pytest.approx(std * math.sqrt(length), rel=1e-12))


def test_dance_grpos_own_form_is_the_same_step() -> None:
    """K-T5: its code takes the score from x0's estimate."""
    share, length, state, velocity, eta = 0.6, 0.1, 0.8, -0.3, 0.3
    clean = state - share * velocity
    score = -(state - clean * (1 - share)) / share**2
    mean = state - length * velocity + eta**2 / 2 * score * length
    found = mean_and_sigma("dance_grpo", eta, state, velocity)
    assert found == (pytest.approx(mean, rel=1e-12), pytest.approx(eta * math.sqrt(length), rel=1e-12))


@pytest.mark.parametrize("kernel", ["flow_grpo", "dance_grpo"])
def test_without_noise_a_step_is_eulers(kernel: str) -> None:
    assert mean_and_sigma(kernel, 0.0, 0.8, -0.3) == (pytest.approx(0.8 + 0.1 * 0.3, rel=1e-12), 0.0)


def test_flow_grpos_first_step_divides_by_the_second_shares_complement() -> None:
    constants = schedule([1.0, 0.8, 0.4], "flow_grpo", 0.7)
    assert float(constants.sigma_N[0]) == pytest.approx(0.7 * math.sqrt(1 / 0.2 * 0.2), rel=1e-12)
    assert constants.sigma_N.isfinite().all()


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_the_last_step_lands_on_the_clean_latent_and_has_no_density(kernel: str, eta: float) -> None:
    constants = schedule([1.0, 0.7, 0.3], kernel, eta)
    assert constants.scored_N.tolist() == [True, True, False]
    drawn = transition(
        column(0.8), column(-0.3), constants.at(torch.tensor([2])), prediction_type="flow", noise_NCHW=column(5.0)
    )
    assert float(drawn.next_state_NCHW) == pytest.approx(0.8 + 0.3 * 0.3)
    assert float(drawn.log_prob_N) == 0.0


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_a_kernel_integrates_to_one(kernel: str, eta: float) -> None:
    """K-T3."""
    constants = schedule([0.6, 0.5], kernel, eta).at(torch.zeros(20001, dtype=torch.long))
    mean, sigma = mean_and_sigma(kernel, eta, 0.8, -0.3)
    grid = torch.linspace(mean - 10 * sigma, mean + 10 * sigma, 20001, dtype=torch.float64)
    ones = torch.ones(20001, 1, 1, 1, dtype=torch.float64)
    scored = transition(
        0.8 * ones, -0.3 * ones, constants, prediction_type="flow", next_state_NCHW=grid.view(-1, 1, 1, 1)
    )
    assert float(scored.log_prob_N.exp().sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=1e-6)


def variance_error(kernel: str, eta: float, num_steps: int) -> float:
    """Data N(1, 0.25), exact velocity, s from 1 to 0.1: the flow's own moments there are 0.9 and 0.2125."""
    mean, variance = walk_moments(torch.linspace(1, 0.1, num_steps + 1, dtype=torch.float64).tolist(), kernel, eta)
    assert mean == pytest.approx(0.9, abs=1e-9)
    return variance - 0.2125


def test_dance_grpos_sde_keeps_the_flows_marginals_as_steps_shrink() -> None:
    """K-T6: the error falls like 1/N."""
    errors = [variance_error("dance_grpo", 0.3, num_steps) for num_steps in (100, 200, 400)]
    assert 0.2125 + errors[1] == pytest.approx(0.2105, abs=5e-5)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_flow_grpos_sde_keeps_them_more_slowly() -> None:
    """K-T6. Its first step, which divides by the second share's complement, leaves a^4/4 too much variance however
    short it is; that is forgotten at a rate that only grows with ln N, so that the error falls more slowly than 1/N."""
    errors = [variance_error("flow_grpo", 0.7, num_steps) for num_steps in (200, 800, 3200)]
    assert 0.2125 + errors[0] == pytest.approx(0.2139, abs=5e-5)
    assert errors[0] > errors[1] > errors[2] > 0
    assert 1.2 < errors[1] / errors[2] < 2.5, "1/N would be 4"


def walk_moments(shares: list[float], kernel: str, eta: float) -> tuple[float, float]:
    """Mean and variance at the last share: each step is linear in its state, so two states tell it."""
    constants, mean, variance = schedule(shares, kernel, eta), 0.0, 1.0
    for step in range(len(shares) - 1):
        share = shares[step]
        total = (1 - share) ** 2 * 0.25 + share**2
        states = column(0.0, 1.0)
        pull = ((1 - share) * 0.25 * (states - (1 - share)) / total + 1, share * (states - (1 - share)) / total)
        drawn = transition(
            states,
            pull[1] - pull[0],
            constants.at(torch.tensor([step, step])),
            prediction_type="flow",
            noise_NCHW=torch.zeros(2, 1, 1, 1, dtype=torch.float64),
        )
        at_zero, at_one = drawn.mean_NCHW.flatten().tolist()
        slope, sigma = at_one - at_zero, float(drawn.sigma_N[0])
        mean, variance = at_zero + slope * mean, slope**2 * variance + sigma**2
    return mean, variance


def shifted(num_steps: int) -> list[float]:
    """Shares of noise that start evenly and are shifted by 3."""
    even = [1 - step / num_steps for step in range(num_steps)]
    return [3 * share / (1 + 2 * share) for share in even]


def real_spread(kernel: str, eta: float, shares: list[float], reach: int) -> float:
    """Standard deviation of a real image's latent after so many steps, in shares of noise there. Steps are linear."""
    constants, variance = schedule(shares, kernel, eta), shares[0] ** 2
    for step in range(reach):
        drawn = teacher_forced_transition(
            column(0.0, 1.0), column(0.0, 0.0), constants.at(torch.tensor([step] * 2)), noise_NCHW=column(0.0, 0.0)
        )
        at_zero, at_one = drawn.mean_NCHW.flatten().tolist()
        variance = (at_one - at_zero) ** 2 * variance + float(drawn.sigma_N[0]) ** 2
    return math.sqrt(variance) / shares[reach]


@pytest.mark.parametrize("kernel", ["flow_grpo", "dance_grpo"])
def test_without_noise_real_images_keep_the_forward_process(kernel: str) -> None:
    assert real_spread(kernel, 0.0, shifted(10), 9) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_a_step_adds_the_error_of_eulers_step_to_real_images(kernel: str, eta: float) -> None:
    """nu^2 d^2 / s + (nu^2 d / 2 s)^2 of variance; docs/models.md."""
    share, length = 0.6, 0.1
    nu_square = eta**2 * (share / (1 - share) if kernel == "flow_grpo" else 1)
    excess = nu_square * length**2 / share + (nu_square * length / (2 * share)) ** 2
    found = (real_spread(kernel, eta, [share, share - length, 0.1], 1) * (share - length)) ** 2
    assert found - (share - length) ** 2 == pytest.approx(excess, rel=1e-9)


def test_real_images_reach_a_given_share_as_in_the_forward_process_but_for_flow_grpos_first_step() -> None:
    """Half the way, in even steps: the excess falls like 1/T, to what the first step of eta^4/4 leaves of it."""
    excesses = {
        kernel: [
            real_spread(kernel, eta, [1 - step / num for step in range(num)], num // 2) - 1 for num in (40, 80, 160)
        ]
        for kernel, eta in KERNELS
    }
    assert [excesses["dance_grpo"][i] / excesses["dance_grpo"][i + 1] for i in (0, 1)] == [
        pytest.approx(2, abs=0.1),
        pytest.approx(2, abs=0.1),
    ]
    assert excesses["flow_grpo"][0] > excesses["flow_grpo"][1] > excesses["flow_grpo"][2] > 0
    first = real_spread("flow_grpo", 0.7, [1.0, 1 - 1e-6, 0.5], 1) ** 2 - 1
    assert first == pytest.approx(0.7**4 / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("kernel", "eta", "num_steps", "spread"),
    [
        ("flow_grpo", 0.7, 10, 1.29),
        ("flow_grpo", 0.7, 80, 1.30),
        ("dance_grpo", 0.3, 10, 1.06),
        ("dance_grpo", 0.3, 80, 1.60),
    ],
)
def test_the_last_noised_state_of_a_real_image_has_more_noise_than_its_share_however_many_steps(
    kernel: str, eta: float, num_steps: int, spread: float
) -> None:
    """Its share is as small as a step; the numbers of docs/models.md."""
    assert real_spread(kernel, eta, shifted(num_steps), num_steps - 1) == pytest.approx(spread, abs=0.005)


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.2, 0.5], [0.5, 0.5], [0.5, 0.0]])
def test_shares_that_do_not_fall_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="must fall"):
        schedule(shares, "flow_grpo", 0.7)


def test_a_velocity_says_noise_and_clean_latent_and_is_what_errors_are_taken_against() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    timestep = torch.tensor([0, 500, 999])
    level = FLOW.level(timestep)
    state, velocity = noised(clean, noise, level), FLOW.target(noise, clean)
    for found, true in zip(predicted_noise_and_clean(state, velocity, level, "flow"), (noise, clean), strict=True):
        torch.testing.assert_close(found, true)
    assert torch.equal(FLOW.predicted_target(state, velocity, timestep, "flow"), velocity)
    assert FLOW.told(timestep).tolist() == pytest.approx([1.0, 501.0, 1000.0])


def test_a_diffusion_models_target_is_the_noise_whatever_its_network_predicts() -> None:
    process = VariancePreserving(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    clean, noise, timestep = column(0.3), column(-1.2), torch.tensor([400])
    state, level = noised(clean, noise, process.level(timestep)), process.level(timestep)
    signal, spread = level.signal_N.view(-1, 1, 1, 1), level.noise_N.view(-1, 1, 1, 1)
    for kind, output in (("epsilon", noise), ("v_prediction", signal * noise - spread * clean), ("sample", clean)):
        torch.testing.assert_close(process.predicted_target(state, output, timestep, kind), noise)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    make = make_tiny_sd3_model if request.param == "sd3" else make_tiny_flux_model
    folder = make(tmp_path_factory.mktemp("flows") / "model")
    return Policy(str(folder), trainable=Lora(rank=2), seed=0, resolution=16)


def test_a_sampler_visits_the_pipelines_shares(policy: Policy) -> None:
    constants = policy.schedule(Sampler(kernel="flow_grpo", num_steps=5))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(policy.source, subfolder="scheduler")
    if scheduler.config.use_dynamic_shifting:
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2], mu=shift_of(16, scheduler.config))
    else:
        scheduler.set_timesteps(5)
    assert constants.noise_N.tolist() == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)
    assert constants.timestep_N.tolist() == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    assert constants.length_N.sum() == pytest.approx(1)


def test_the_shift_is_a_line_in_the_number_of_tokens() -> None:
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert [shift_of(tokens, config) for tokens in (256, 4096)] == [0.5, pytest.approx(1.15)]


def test_training_draws_from_shares_that_rise_to_pure_noise(policy: Policy) -> None:
    share_M = policy.process.level(torch.arange(1000)).noise_N
    assert (share_M.diff() > 0).all()
    assert share_M[-1] == 1.0
    assert share_M[500] > 0.501, "both schedules are shifted towards noise"


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_what_was_drawn_is_scored_alike(policy: Policy, kernel: str, eta: float) -> None:
    chain = Chain(policy, Sampler(kernel=kernel, eta=eta, num_steps=4, guidance_scale=2.0, wire_dtype="float16"))
    drawn = chain.sample("a red seven", [3, 4])
    told = policy.condition(["a red seven"]).expand(2)
    for step in range(3):
        with torch.no_grad():
            scored = chain.step(
                policy.denoiser,
                drawn.latents_GSCHW[:, step].float(),
                torch.full((2,), step),
                told,
                next_state_NCHW=drawn.latents_GSCHW[:, step + 1].float(),
            )
        assert torch.equal(scored.log_prob_N, drawn.log_prob_GT[:, step])
    assert drawn.scored_T.tolist() == [True, True, True, False]


def test_real_images_are_noised_on_the_chains_shares(policy: Policy) -> None:
    chain = Chain(policy, Sampler(kernel="dance_grpo", eta=0.3, num_steps=4))
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = chain.teacher_forced(x0, [7, 8])
    torch.testing.assert_close(latents[:, -1], x0)
    assert latents[:, 0].std() == pytest.approx(1, abs=0.2), "s is 1 at the start: nothing of the image is left"


def test_excursions_are_eulers_steps_between_levels_of_training(policy: Policy) -> None:
    chain = Chain(policy, Sampler(kernel="dance_grpo", eta=0.3, num_steps=4))
    settings = Excursion(noise="fresh", num_states=3, stride=100)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    start = draw_start([1, 2], x0, settings, num_train_timesteps=len(policy.process))
    visited = excursion(chain, "a red seven", [1, 2], start, settings)
    first = start.timestep
    num_states = min(3, 1 + first // 100)
    assert visited.timestep_M.tolist() == [first - 100 * state for state in range(num_states)]
    level = policy.process.level(torch.tensor([first]))
    assert torch.equal(visited.states_GMCHW[:, 0], noised(x0, start.noise_GCHW, level))
    told = policy.condition(["a red seven"]).expand(2)
    with torch.no_grad():
        again, predicted = walk_again(
            lambda state, timestep: policy.predict(policy.denoiser, state, policy.process.told(timestep), told, 1.0),
            visited.states_GMCHW[:, 0],
            visited.timestep_M.expand(2, -1),
            policy.process,
            prediction_type="flow",
            wire_dtype=torch.float32,
        )
    torch.testing.assert_close(again, visited.states_GMCHW, rtol=1e-5, atol=1e-5)
    shares = excursion_schedule(policy.process, first, settings).noise_N.tolist()
    step = visited.states_GMCHW[:, 1] - visited.states_GMCHW[:, 0]
    torch.testing.assert_close(step, (shares[1] - shares[0]) * predicted[:, 0], rtol=1e-4, atol=1e-5)


def test_a_kernel_for_another_kind_of_model_is_refused(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not for a flow-matching model.*'ddim'.*flow_grpo or dance_grpo"):
        policy.schedule(Sampler(kernel="ddim"))
    diffusion = Policy(str(make_tiny_model(tmp_path / "model")), trainable=Lora(rank=2), seed=0)
    with pytest.raises(ModelError, match=r"not for a diffusion model.*'flow_grpo'.*ddim or ddpm"):
        diffusion.schedule(Sampler(kernel="flow_grpo"))
    with pytest.raises(ModelError, match="no cumulative signal levels"):
        _ = policy.alpha_bar


def test_a_flow_scheduler_is_read_from_the_models_files(policy: Policy) -> None:
    assert isinstance(FlowScheduler(policy.source, 16, even_shares=False).process, Flow)
