"""Benchmarks as ratios: `python -m bench.run [NAME ...]`. bench/README.md says what each compares."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.noise import initial_noise, step_noise
from diffusion.policy import Policy
from diffusion.weights import weights_digest
from learner.algorithms.prdp import prdp
from learner.two_pass import differentiate, surrogate
from protocol.codec import decode_group, encode_group
from protocol.groups import Group
from protocol.paths import ROOT
from protocol.recipe_file import load_recipe

RESULTS = Path(__file__).with_name("results.json")
RECIPE = load_recipe("recipes/tiny_prdp.yaml")
NUM_GROUPS, GROUP_SIZE, MICRO_BATCH = 4, 8, 16
PROMPTS = (
    "a red seven on a blue ground",
    "a black two on a white ground",
    "a pink one on a green ground",
    "a blue four on a red ground",
)


def ratio(first: Callable[[], object], second: Callable[[], object], num_pairs: int = 5) -> dict[str, float]:
    """Returns the median, least and greatest ratio of times, first over second, measured in turn."""
    first(), second()
    ratios = [_seconds(first) / _seconds(second) for _ in range(num_pairs)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def two_pass_time() -> dict[str, float]:
    """Time of the two-pass gradient over one-shot autograd."""
    problem = GradientProblem()
    return ratio(problem.two_pass, problem.one_shot, num_pairs=3)


def two_pass_memory() -> dict[str, float]:
    """Peak memory of the two forms beyond the loaded model; a peak cannot be reset, so each has a process."""
    peaks = {form: int(_python("--peak", form)) for form in ("none", "two_pass", "one_shot")}
    return {"median": (peaks["two_pass"] - peaks["none"]) / (peaks["one_shot"] - peaks["none"])}


def group_batch() -> dict[str, float]:
    """Time to sample siblings together over one by one."""
    chain, seeds = _chain(), list(range(GROUP_SIZE))
    return ratio(lambda: chain.sample(PROMPTS[0], seeds), lambda: [chain.sample(PROMPTS[0], [seed]) for seed in seeds])


def batch_is_the_group() -> dict[str, float]:
    """Time to sample groups one by one over all of their siblings in one batch, whose bits depend on the company."""
    chain = _chain()
    seeds_PG = [range(number * GROUP_SIZE, (number + 1) * GROUP_SIZE) for number in range(NUM_GROUPS)]
    return ratio(
        lambda: [chain.sample(prompt, seeds_G) for prompt, seeds_G in zip(PROMPTS, seeds_PG, strict=True)],
        lambda: _sample_together(chain, [seed for seeds_G in seeds_PG for seed in seeds_G]),
    )


def proofs() -> dict[str, float]:
    """Time of a round's digests and checksums (weights twice, as learner and one rollout do; each group twice, as made
    and as received) over the time to sample the round."""
    chain = _chain()
    drawn = chain.sample(PROMPTS[0], range(GROUP_SIZE))
    arrays = {"latents_GSCHW": drawn.latents_GSCHW.numpy(), "log_prob_GT": drawn.log_prob_GT.numpy()}
    group = Group("000000-0000", 0, 0, PROMPTS[0], 0, "0" * 64, "{}", "{}", "w", 0.0, 0.0, arrays)
    weights = chain.policy.trainable_state()

    def prove() -> None:
        for _ in range(2):
            weights_digest(weights)
        for _ in range(2 * NUM_GROUPS):
            group.content_checksum()

    return ratio(prove, lambda: [chain.sample(prompt, range(GROUP_SIZE)) for prompt in PROMPTS])


def codec() -> dict[str, float]:
    """Time to encode and decode a group of 8 Stable Diffusion 1.x trajectories over copying its bytes twice."""
    latents = np.random.default_rng(0).standard_normal((8, 51, 4, 64, 64)).astype(np.float16)
    group = Group("000000-0000", 0, 0, "a prompt", 0, "0" * 64, "{}", "{}", "w", 0.0, 0.0, {"latents_GSCHW": latents})
    return ratio(lambda: decode_group(encode_group(group)), lambda: latents.copy().tobytes())


def lag() -> dict[str, float]:
    """Wall time of a run that overlaps sampling and learning over one that alternates."""
    return ratio(lambda: _train("lag=1"), lambda: _train("lag=0"), num_pairs=1)


class GradientProblem:
    """One PRDP gradient on sampled groups of the embedded model, in either form."""

    def __init__(self) -> None:
        self._chain = _chain()
        drawn = [
            self._chain.sample(prompt, range(number * 8, number * 8 + GROUP_SIZE))
            for number, prompt in enumerate(PROMPTS)
        ]
        self._latents_PGSCHW = torch.stack([one.latents_GSCHW for one in drawn])
        self._old_PGT = torch.stack([one.log_prob_GT for one in drawn])
        self._scored_PT = torch.stack([one.scored_T for one in drawn])
        self._embedding_PLE = self._chain.policy.embed_all(PROMPTS)
        self._reward_PG = torch.linspace(-1, 1, NUM_GROUPS * GROUP_SIZE).view(NUM_GROUPS, GROUP_SIZE)
        self._item_N3 = self._scored_PT[:, None].expand_as(self._old_PGT).nonzero()

    def two_pass(self) -> None:
        """Pass A over micro-batches, then pass B over micro-batches."""
        now_PGT = torch.zeros_like(self._old_PGT)
        for items in self._item_N3.split(MICRO_BATCH):
            with torch.no_grad():
                now_PGT[tuple(items.unbind(1))] = self._score(items)
        _, omega, _ = differentiate(lambda value: self._loss(value), now_PGT)
        for items in self._item_N3.split(MICRO_BATCH):
            surrogate(self._score, items, omega).backward()

    def one_shot(self) -> None:
        """One graph through everything."""
        now_PGT = torch.zeros_like(self._old_PGT).index_put(tuple(self._item_N3.unbind(1)), self._score(self._item_N3))
        self._loss(now_PGT)[0].backward()

    def _loss(self, now_PGT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return prdp(
            now_PGT,
            self._old_PGT,
            self._old_PGT,
            self._scored_PT,
            self._reward_PG,
            settings=RECIPE.algorithm,
            num_latent_entries=256,
            normaliser=NUM_GROUPS,
        )

    def _score(self, item_N3: Tensor) -> Tensor:
        group_N, sibling_N, step_N = item_N3.unbind(1)
        return self._chain.step(
            self._chain.policy.unet,
            self._latents_PGSCHW[group_N, sibling_N, step_N],
            step_N,
            self._embedding_PLE[group_N],
            next_state_NCHW=self._latents_PGSCHW[group_N, sibling_N, step_N + 1],
        ).log_prob_N


@torch.no_grad()
def _sample_together(chain: Chain, seeds: list[int]) -> None:
    """What a sampler does that fills its batch with whoever is there."""
    shape_CHW = chain.policy.latent_shape_CHW
    embedding_NLE = chain.policy.embed_all(PROMPTS).repeat_interleave(GROUP_SIZE, dim=0)
    state_NCHW = initial_noise(seeds, shape_CHW, shared=False)
    for step in range(len(chain.schedule)):
        step_N, noise_NCHW = torch.full((len(seeds),), step), step_noise(seeds, step, shape_CHW)
        drawn = chain.step(chain.policy.unet, state_NCHW, step_N, embedding_NLE, noise_NCHW=noise_NCHW)
        state_NCHW = drawn.next_state_NCHW


def _chain() -> Chain:
    torch.set_num_threads(1)
    return Chain(Policy.from_recipe(RECIPE), RECIPE.sampler)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _train(*overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = ["rounds=4", "batch.num_groups=8", "learner.world_size=1", *overrides]
        command = [sys.executable, "sfumato.py", "train", "recipes/tiny_prdp.yaml", "--run-dir", f"{folder}/run", *size]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _python(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.run", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]


def print_peak(form: str) -> None:
    """Prints this process's peak memory in kB after one gradient in the form named, or after none."""
    problem = GradientProblem()
    if form != "none":
        getattr(problem, form)()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(names: list[str]) -> None:
    """Runs the named benchmarks, or all, and keeps the results of the others."""
    chosen = (two_pass_time, two_pass_memory, group_batch, batch_is_the_group, proofs, codec, lag)
    benchmarks = {run.__name__: run for run in chosen}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or benchmarks:
        results[name] = {key: round(value, 4) for key, value in benchmarks[name]().items()}
        print(name, results[name], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2])
    else:
        main(sys.argv[1:])
