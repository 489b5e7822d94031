"""Benchmarks as ratios: `python -m bench.run [NAME ...]`. bench/README.md says what each compares."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
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
from protocol.algorithms import Prdp
from protocol.codec import decode_group, encode_group
from protocol.groups import Group
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe

RESULTS = Path(__file__).with_name("results.json")
TINY = "recipes/tiny_prdp.yaml"
RECIPE, LONGER = load_recipe(TINY), load_recipe(TINY, ["sampler.num_steps=10"])
NUM_GROUPS, GROUP_SIZE, MICRO_BATCH = 4, 8, 16
PROMPTS = (
    "a red seven on a blue ground",
    "a black two on a white ground",
    "a pink one on a green ground",
    "a blue four on a red ground",
)
RELAXED_THREADS = 2
RUN_TIMEOUT_S = 300
"""Of a whole run of the system: a minute where nothing else runs."""


def ratio(first: Callable[[], object], second: Callable[[], object], num_pairs: int = 5) -> dict[str, float]:
    """Returns the median, least and greatest ratio of times, first over second, measured in turn."""
    first(), second()
    return spread([_seconds(first) / _seconds(second) for _ in range(num_pairs)])


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Returns what is kept of several ratios."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def two_pass_time() -> dict[str, float]:
    """Time of the two-pass gradient over one-shot autograd."""
    problem = GradientProblem()
    return ratio(problem.two_pass, problem.one_shot, num_pairs=3)


def two_pass_memory() -> dict[str, float]:
    """Peak memory of the two-pass gradient over that of one-shot autograd, for trajectories of ten steps.

    In a process of its own, whose allocator hands tensors back when they are freed: memory that earlier work has left
    lying about would hide what is used anew.
    """
    command = [sys.executable, "-m", "bench.run", "--peaks"]
    frees_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=frees_at_once)
    return spread([two_pass / one_shot for two_pass, one_shot in json.loads(done.stdout.splitlines()[-1])])


def group_batch() -> dict[str, float]:
    """Time to sample siblings together over one by one."""
    chain, seeds = _chain(), list(range(GROUP_SIZE))
    return ratio(lambda: chain.sample(PROMPTS[0], seeds), lambda: [chain.sample(PROMPTS[0], [seed]) for seed in seeds])


def batch_is_the_group() -> dict[str, float]:
    """Time to sample groups one by one over all of their siblings in one batch, whose bits depend on the company."""
    chain = _chain()
    return ratio(lambda: _sample_groups(chain), lambda: _sample_together(chain))


def one_thread() -> dict[str, float]:
    """Time to sample a round with one thread, as recipes do unless told otherwise, over that with two."""
    chain = _chain()
    return ratio(lambda: _sample_groups(chain), lambda: _with_threads(RELAXED_THREADS, lambda: _sample_groups(chain)))


def proofs() -> dict[str, float]:
    """Time of a round's digests and checksums over the time to sample the round."""
    chain = _chain()
    return ratio(_make_prove(chain), lambda: _sample_groups(chain))


def determinism() -> dict[str, float]:
    """Time of a rollout worker's round as it is made (one thread, a group a batch, digests and checksums) over that of
    a round with all of it relaxed (two threads, one batch, no digests)."""
    chain = _chain()
    prove = _make_prove(chain)

    def as_it_is() -> None:
        _sample_groups(chain)
        prove()

    return ratio(as_it_is, lambda: _with_threads(RELAXED_THREADS, lambda: _sample_together(chain)))


def codec() -> dict[str, float]:
    """Time to encode and decode a group of 8 Stable Diffusion 1.x trajectories over copying its bytes twice."""
    latents = np.random.default_rng(0).standard_normal((8, 51, 4, 64, 64)).astype(np.float16)
    group = _group({"latents_GSCHW": latents})
    return ratio(lambda: decode_group(encode_group(group)), lambda: latents.copy().tobytes())


def lag() -> dict[str, float]:
    """Time of a round of a run that overlaps sampling and learning over that of one that alternates."""
    return spread([_seconds_a_round("lag=1") / _seconds_a_round("lag=0")])


class GradientProblem:
    """One PRDP gradient on sampled groups of the embedded model, in either form."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        self._chain = _chain(recipe)
        drawn = [
            self._chain.sample(prompt, range(number * 8, number * 8 + GROUP_SIZE))
            for number, prompt in enumerate(PROMPTS)
        ]
        self._latents_PGSCHW = torch.stack([one.latents_GSCHW for one in drawn])
        self._old_PGT = torch.stack([one.log_prob_GT for one in drawn])
        self._scored_PT = torch.stack([one.scored_T for one in drawn])
        self._conditioning = self._chain.policy.condition(PROMPTS)
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
        assert isinstance(RECIPE.algorithm, Prdp)
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
            self._chain.policy.denoiser,
            self._latents_PGSCHW[group_N, sibling_N, step_N],
            step_N,
            self._conditioning[group_N],
            next_state_NCHW=self._latents_PGSCHW[group_N, sibling_N, step_N + 1],
        ).log_prob_N


def _sample_groups(chain: Chain) -> None:
    for number, prompt in enumerate(PROMPTS):
        chain.sample(prompt, range(number * GROUP_SIZE, (number + 1) * GROUP_SIZE))


@torch.no_grad()
def _sample_together(chain: Chain) -> None:
    """What a sampler does that fills its batch with whoever is there."""
    seeds, shape_CHW = range(NUM_GROUPS * GROUP_SIZE), chain.policy.latent_shape_CHW
    conditioning = chain.policy.condition(PROMPTS).repeat_interleave(GROUP_SIZE)
    state_NCHW = initial_noise(seeds, shape_CHW, shared=False)
    for step in range(len(chain.schedule)):
        step_N, noise_NCHW = torch.full((len(seeds),), step), step_noise(seeds, step, shape_CHW)
        drawn = chain.step(chain.policy.denoiser, state_NCHW, step_N, conditioning, noise_NCHW=noise_NCHW)
        state_NCHW = drawn.next_state_NCHW


def _make_prove(chain: Chain) -> Callable[[], None]:
    """Returns what takes a round's digests: of weights twice, as learner and one rollout worker do, and of each group
    twice, as made and as received."""
    drawn = chain.sample(PROMPTS[0], range(GROUP_SIZE))
    group = _group({"latents_GSCHW": drawn.latents_GSCHW.numpy(), "log_prob_GT": drawn.log_prob_GT.numpy()})
    weights = chain.policy.trainable_state()

    def prove() -> None:
        for _ in range(2):
            weights_digest(weights)
        for _ in range(2 * NUM_GROUPS):
            group.content_checksum()

    return prove


def _group(arrays: dict[str, np.ndarray]) -> Group:
    return Group("000000-0000", 0, 0, PROMPTS[0], 0, "0" * 64, "{}", "{}", "w", 0.0, 0.0, GROUP_SIZE, 0, arrays)


def _with_threads(count: int, run: Callable[[], None]) -> None:
    torch.set_num_threads(count)
    try:
        run()
    finally:
        torch.set_num_threads(1)


def _chain(recipe: Recipe = RECIPE) -> Chain:
    torch.set_num_threads(1)
    return Chain(Policy.from_recipe(recipe), recipe.sampler)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _seconds_a_round(*overrides: str) -> float:
    """Returns the median over the rounds of a short run of the whole system, but for the first, which waits for
    processes to warm up. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        size = ["rounds=6", "batch.num_groups=8", "rollouts=1", "learner.world_size=1", *overrides]
        command = [sys.executable, "sfumato.py", "train", TINY, "--run-dir", f"{folder}/run", *size]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=RUN_TIMEOUT_S)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    elapsed_s = [json.loads(line)["time/elapsed_s"] for line in lines]
    return statistics.median(after - before for before, after in pairwise(elapsed_s))


def print_peaks(num_pairs: int = 3) -> None:
    """Prints by how many bytes memory grows in a two-pass and in a one-shot gradient, several times."""
    problem = GradientProblem(LONGER)
    for warm_up in (problem.two_pass, problem.one_shot):
        warm_up()
    print([[_peak_bytes(problem.two_pass), _peak_bytes(problem.one_shot)] for _ in range(num_pairs)])


def _peak_bytes(run: Callable[[], object]) -> int:
    """Returns by how much memory at most exceeds what it is now. Linux forgets a peak when told to."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_bytes("VmRSS")
    run()
    return _memory_bytes("VmHWM") - before


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(names: list[str]) -> None:
    """Runs the named benchmarks, or all, and keeps the results of the others."""
    chosen = (
        *(two_pass_time, two_pass_memory, group_batch),
        *(determinism, one_thread, batch_is_the_group, proofs),
        *(codec, lag),
    )
    benchmarks = {run.__name__: run for run in chosen}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or benchmarks:
        results[name] = {key: round(value, 4) for key, value in benchmarks[name]().items()}
        print(name, results[name], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--peaks"]:
        print_peaks()
    else:
        main(sys.argv[1:])
