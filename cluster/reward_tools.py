"""`sfumato rewards`: what there is, and trying one by itself as a run would use it.

A trial runs in a process of its own, by the interpreter of the reward's environment and through the same actor class
as in a run. What the reward prints goes to stderr; what comes of the trial returns through a file, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.reward_actor import RewardActor
from cluster.environments import STEPS, Environment, environment_of, make
from protocol.errors import RewardError
from protocol.paths import ROOT
from protocol.recipe_file import apply_override
from protocol.roles import Reward
from rewards.contract import check_scores, probe_images
from rewards.loading import build, builtin_names, declared, pins_of

USUAL_PROMPT = "a red seven on a blue ground"
USUAL_SIZE = 512

ROUNDING = 1e-2
"""Largest difference, as a share of the largest score, that another batch may make: that of half precision."""

CHILD = f"""
import sys
sys.path.append({str(ROOT)!r})
import sfumato
sfumato.set_up_ray_worker()
from cluster.reward_tools import answer
answer(sys.argv[1])
"""


@dataclass(frozen=True)
class Trial:
    """What is to be tried: `Trial("clip_score", {}, ("a cat",), ("cat.png",), 4, 512, "cpu", 1, False)`."""

    name: str
    kwargs: dict[str, Any]
    prompts: tuple[str, ...]
    files: tuple[str, ...]
    num_images: int
    size: int
    device: str
    threads: int
    debug: bool


@dataclass(frozen=True)
class Sheet:
    """One group's scores and how far they moved, as shares of the largest, when the group was scored otherwise.

    A worked example: Sheet("generated, 512x512", "a cat", (0.21, 0.19), 0.0, 0.0, 1e-7, 0.05). `alone` is None for a
    group-wise reward and for a group of one.
    """

    images: str
    prompt: str
    scores: tuple[float, ...]
    repeated: float
    permuted: float
    alone: float | None
    seconds: float


def list_rewards() -> dict[str, list[str]]:
    """Returns what to print of each built-in reward: what it is, then what it needs. Imports none of them."""
    rows = {}
    for name in builtin_names():
        said = declared(name)
        environment = environment_of(name, said.pins) if said.pins else None
        needs = f"environment: {_describe(environment, said.environment)}; downloads: {said.downloads or 'nothing'}"
        rows[name] = [said.summary, needs]
    return rows


def check_reward(
    name: str,
    kwargs: dict[str, Any],
    *,
    pins: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    files: Sequence[str] = (),
    num_images: int = 4,
    size: int | None = None,
    gpu: bool = False,
    threads: int = 1,
    tell: Callable[[str], None],
    debug: bool = False,
) -> dict[str, str]:
    """Tries a reward in its environment and returns what to print. Raises RewardError for anything that is wrong."""
    said = declared(name)
    _refuse_impossible(files, {"--num-images": num_images, "--size": size or USUAL_SIZE, "--threads": threads})
    reward = Reward(name=name, pins=pins if pins is None else tuple(pins))
    environment = environment_of(reward.label, own) if (own := pins_of(reward)) else None
    for line in make(environment) if environment else ():
        if debug or line.startswith(STEPS):
            tell(f"installing {reward.label}'s environment: {line}")
    trial = Trial(
        name=name,
        kwargs=kwargs,
        prompts=tuple(prompts) or (said.example_prompt or USUAL_PROMPT,),
        files=tuple(files),
        num_images=num_images,
        size=size or said.image_size or USUAL_SIZE,
        device="cuda" if gpu else "cpu",
        threads=threads,
        debug=debug,
    )
    python = str(environment.python) if environment else sys.executable
    found = _ask_child(python, trial)
    return {
        "reward": said.summary or name,
        "environment": _describe(environment, said.environment),
        **_summary(trial, found),
    }


def read_kwargs(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the keyword arguments that `key=value` texts give; values are YAML, as in overrides of a recipe."""
    kwargs: dict[str, Any] = {}
    for text in texts:
        apply_override(kwargs, text)
    return kwargs


def _refuse_impossible(files: Sequence[str], numbers: dict[str, int]) -> None:
    for file in files:
        if not Path(file).is_file():
            raise RewardError("there is no such image file", value=file, do="correct --images")
    for name, number in numbers.items():
        if number < 1:
            raise RewardError(f"{name} is too small", value=number, expected="1 or more")


def answer(result_file: str) -> None:
    """What the process of a trial runs: reads it from stdin, writes what comes of it."""
    trial = Trial(**json.load(sys.stdin))
    try:
        found = run_trial(trial)
    except RewardError as error:
        found = {"error": str(error)}
    except Exception as error:  # a reward of any author may raise anything
        if trial.debug:
            traceback.print_exc()
        found = {"error": str(RewardError(f"reward {trial.name} raised {type(error).__name__}: {error}"))}
    Path(result_file).write_text(json.dumps(found))


def run_trial(trial: Trial) -> dict[str, Any]:
    """Builds the reward and examines it on every group. Raises RewardError."""
    if trial.device == "cuda":
        _need_gpu()
    started = time.monotonic()
    actor = RewardActor(trial.name, build(trial.name, trial.kwargs, trial.device), check_scores)
    built_s = time.monotonic() - started
    sheets = [
        examine(trial.name, actor, title, images_NHW3, prompt)
        for prompt in trial.prompts
        for title, images_NHW3 in _groups(trial)
    ]
    return {
        "is_pure": actor.is_pure,
        "group_wise": actor.group_wise,
        "built_s": built_s,
        "sheets": [asdict(sheet) for sheet in sheets],
        "memory_bytes": _peak_memory_bytes(),
        "gpu_bytes": _peak_gpu_bytes() if trial.device == "cuda" else None,
    }


def examine(name: str, actor: RewardActor, title: str, images_NHW3: np.ndarray, prompt: str) -> Sheet:
    """Scores a group, again, in another order and, unless the reward is group-wise, one image alone.

    Raises RewardError where a reward is not what it declares to be: `is_pure` or `group_wise`.
    """
    score_N = actor.score(images_NHW3, prompt)
    started = time.monotonic()
    again_N = actor.score(images_NHW3, prompt)
    seconds = time.monotonic() - started
    order = np.roll(np.arange(len(score_N)), 1)
    permuted_N = actor.score(images_NHW3[order], prompt)
    has_siblings = not actor.group_wise and len(score_N) > 1
    alone_1 = _score_alone(name, actor, images_NHW3, prompt) if has_siblings else score_N[:1]
    moved = [
        _share(again_N - score_N, score_N),
        _share(permuted_N - score_N[order], score_N),
        _share(alone_1 - score_N[:1], score_N),
    ]
    if actor.is_pure:
        _refuse_moved(name, prompt, moved, pairs=[(score_N, again_N), (score_N[order], permuted_N), (score_N, alone_1)])
    scores = tuple(float(score) for score in score_N)
    return Sheet(title, prompt, scores, moved[0], moved[1], moved[2] if has_siblings else None, seconds)


def _refuse_moved(
    name: str, prompt: str, moved: Sequence[float], pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    repeated, permuted, alone = moved
    about = f"reward {name}, on the prompt {prompt!r},"
    if repeated > 0:
        what, pair = f"{about} gives other scores when it is asked again", pairs[0]
        do = "take out what is random (dropout, a generator without seed), or declare is_pure = False"
    elif permuted > ROUNDING:
        what, pair = f"{about} gives other scores when the siblings change places", pairs[1]
        do = "return the scores in the order of the images"
    elif alone > ROUNDING:
        what, pair = f"{about} gives an image another score without its siblings", pairs[2]
        do = "declare group_wise = True if that is meant"
    else:
        return
    worst = int(np.argmax(np.abs(pair[0][: len(pair[1])] - pair[1])))
    raise RewardError(what, value=float(pair[1][worst]), expected=f"{pair[0][worst]}, as before", do=do)


def _score_alone(name: str, actor: RewardActor, images_NHW3: np.ndarray, prompt: str) -> np.ndarray:
    try:
        return actor.score(images_NHW3[:1], prompt)
    except RewardError as error:
        raise RewardError(
            f"reward {name} cannot score an image without its siblings: {error}",
            do="declare group_wise = True if scores are to depend on them",
        ) from error


def _share(difference_N: np.ndarray, score_N: np.ndarray) -> float:
    largest = float(np.abs(score_N).max())
    return float(np.abs(difference_N).max()) / (largest or 1.0)


def _groups(trial: Trial) -> Iterator[tuple[str, np.ndarray]]:
    """Yields generated images, then the given ones: a group a size, since a group's images have one."""
    yield f"generated, {trial.size}x{trial.size}", probe_images(trial.num_images, trial.size)
    given: dict[tuple[int, int], list[str]] = {}
    for file in trial.files:
        given.setdefault(_read_image(file).shape[:2], []).append(file)
    for (height, width), files in given.items():
        title = f"{', '.join(Path(file).name for file in files)}, {width}x{height}"
        yield title, np.stack([_read_image(file) for file in files])


def _read_image(file: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise RewardError(f"the image {file} cannot be read: {error}", do="correct --images") from None


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RewardError("there is no GPU that torch can use", value=torch.__version__, do="leave out --gpu")


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved()


def _peak_memory_bytes() -> int:
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ask_child(python: str, trial: Trial) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        done = subprocess.run(
            # Without the working directory on the path, as in a run.
            [python, "-P", "-c", CHILD, str(file)],
            input=json.dumps(asdict(trial)),
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(trial.threads)},
            text=True,
            check=False,
        )
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"error": _died(trial, done)}
    if "error" in found:
        raise _said(found["error"])
    return found


def _died(trial: Trial, done: subprocess.CompletedProcess[str]) -> str:
    code = done.returncode
    how = f"was killed by signal {-code}, most often for want of memory" if code < 0 else f"ended with exit code {code}"
    return str(RewardError(f"the process of reward {trial.name} {how}", do="see above for what it printed"))


def _said(message: str) -> RewardError:
    """An error from another process, in its own words."""
    error = RewardError.__new__(RewardError)
    Exception.__init__(error, message)
    return error


def _describe(environment: Environment | None, expected: str) -> str:
    if environment is None:
        return "main"
    size = environment.size_bytes()
    not_yet = f"about {expected}, not installed yet" if expected else "not installed yet"
    kept = not_yet if size is None else f"{_size(size)} in {environment.folder}"
    return f"its own, {len(environment.pins)} pins: {kept}"


def _summary(trial: Trial, found: dict[str, Any]) -> dict[str, str]:
    sheets = [Sheet(**sheet) for sheet in found["sheets"]]
    lines = {
        "kind": f"{'pure' if found['is_pure'] else 'impure'}, {'group-wise' if found['group_wise'] else 'point-wise'}",
        "built in": f"{found['built_s']:.1f} s",
    }
    for number, sheet in enumerate(sheets, 1):
        scores = " ".join(f"{score:.5g}" for score in sheet.scores)
        lines[f"scores {number}"] = f"{scores}   ({sheet.images}; {sheet.prompt!r})"
    alone = [sheet.alone for sheet in sheets if sheet.alone is not None]
    lines["asked again"] = _moved([sheet.repeated for sheet in sheets])
    lines["other order"] = _moved([sheet.permuted for sheet in sheets])
    lines["one alone"] = _moved(alone) if alone else "not asked: scores depend on siblings, or there are none"
    num_images, seconds = sum(len(sheet.scores) for sheet in sheets), sum(sheet.seconds for sheet in sheets)
    where = "the GPU" if trial.device == "cuda" else f"{trial.threads} CPU thread{'s' if trial.threads > 1 else ''}"
    lines["speed"] = f"{num_images / max(seconds, 1e-9):.3g} images/s on {where}"
    lines["memory"] = f"{_size(found['memory_bytes'])} at most"
    if found["gpu_bytes"] is not None:
        lines["GPU memory"] = f"{_size(found['gpu_bytes'])} at most"
    return lines


def _moved(shares: Sequence[float]) -> str:
    return f"scores move by {max(shares):.1g} of the largest" if max(shares) else "the same scores"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
