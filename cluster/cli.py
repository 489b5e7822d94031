"""The command line. Imports stay light here: `--help`, `--dry-run`, `digest`, `verify` and `rewards list` need no
torch and no Ray."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.signals import TERMINATED, interrupt_on_sigterm
from protocol import __version__
from protocol.errors import RecipeError, SfumatoError
from protocol.log import LOG, is_json, set_up

if TYPE_CHECKING:
    from protocol.recipe import Recipe

LIVE_HELP = "the weights as last trained, where the run also keeps their moving average (learner.ema)"
EXIT_OURS, EXIT_UNEXPECTED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 1, 130, 143
DEBUG_HELP = "show tracebacks and the logs of all processes"


def run_command_line(arguments: Sequence[str]) -> int:
    """Runs one command. Returns the exit code: 0, the command's own, 2 for an error that explains itself, or 1."""
    options = parse(arguments)
    try:
        return int(options.command(options) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_TERMINATED if TERMINATED.is_set() else EXIT_INTERRUPTED
    except SfumatoError as error:
        return _tell(error, f"error: {error}", EXIT_OURS, options)
    except Exception as error:
        return _tell(error, f"unexpected error: {type(error).__name__}: {error}", EXIT_UNEXPECTED, options)


def _tell(error: Exception, message: str, code: int, options: argparse.Namespace) -> int:
    print(message, file=sys.stderr)
    if options.debug:
        traceback.print_exception(error)
    elif code == EXIT_UNEXPECTED:
        print("(--debug shows where)", file=sys.stderr)
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command. Overrides may stand before, between and after options."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options and not any(argument.startswith("-") for argument in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sfumato",
        description="Fine-tune text-to-image diffusion models with rewards and self-play, on a cluster or a laptop.",
    )
    parser.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_scale,
        _add_evaluate,
        _add_sample,
        _add_export,
        _add_digest,
        _add_verify,
        _add_rewards,
        _add_doctor,
    ):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("train", help="run a recipe")
    command.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, such as recipes/tiny_prdp.yaml")
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    command.add_argument(
        "--run-dir", type=Path, help="where the run is kept; default <recipe>-<time> in $SFUMATO_RUNS or runs/"
    )
    command.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print every derived number, start nothing"
    )
    command.set_defaults(command=_train)
    return command


def _add_scale(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("scale", help="give a run that is going on more or fewer actors")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    command.add_argument(
        "--rollouts", metavar="N|MIN:MAX", help="so many rollout actors; or between these, as the run needs them"
    )
    command.add_argument(
        "--reward", nargs="+", action="extend", default=[], metavar="NAME=M", help="so many actors of a reward"
    )
    command.set_defaults(command=_scale)
    return command


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("evaluate", help="compare a run's newest weights with its base model")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    command.add_argument(
        "--prompts", help="a set of prompts, named as in a recipe; default: those that the run holds out"
    )
    command.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    command.add_argument("--live", action="store_true", help=LIVE_HELP)
    command.set_defaults(command=_evaluate)
    return command


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("sample", help="draw images of a prompt")
    command.add_argument("source", metavar="RUN_OR_MODEL", help="a run directory, or a model folder or hub id")
    command.add_argument("--prompt", required=True, help="what to draw")
    command.add_argument("--out", required=True, type=Path, metavar="PNG", help="the picture to write")
    command.add_argument("--num-images", type=int, default=4, help="images in the picture (default 4)")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    command.add_argument("--num-steps", type=int, help="denoising steps; default: the recipe's, or 50")
    command.add_argument("--guidance-scale", type=float, help="guidance; default: the recipe's, or 1")
    command.add_argument("--live", action="store_true", help=LIVE_HELP)
    command.set_defaults(command=_sample)
    return command


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("export", help="write a run's weights for other tools, with a model card")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    command.add_argument("--version", type=int, help="a version; default: that of the newest checkpoint")
    command.add_argument(
        "--form",
        choices=("lora", "pipeline"),
        help="the adapter alone (default of LoRA runs), or a whole pipeline with any adapter fused",
    )
    command.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="what `evaluate --json` wrote; default: RUN/evaluation.json"
    )
    command.add_argument("--live", action="store_true", help=LIVE_HELP)
    command.set_defaults(command=_export)
    return command


def _add_digest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("digest", help="print the digest of a run's weights, as the last line")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    command.add_argument("--version", type=int, help="a version; default: the newest published one")
    command.set_defaults(command=_digest)
    return command


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("verify", help="check what a run has written, and make groups of it again")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    command.add_argument(
        "--replay", type=int, metavar="K", help="also sample and score K groups again and compare their bits"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the choice of groups (default 0)")
    command.set_defaults(command=_verify)
    return command


def _add_rewards(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("rewards", help="show the rewards that come with sfumato, or try any one by itself")
    parts = command.add_subparsers(required=True, metavar="list|check")
    rows = parts.add_parser("list", help="show the rewards that come with sfumato, and what each needs")
    rows.set_defaults(command=_list_rewards)
    check = parts.add_parser(
        "check", help="build a reward in its environment and score images: counts, determinism, speed, memory"
    )
    check.add_argument("reward", metavar="NAME_OR_PATH", help="as in a recipe: a name, ./file.py:Name or a dotted path")
    check.add_argument("--kwargs", nargs="+", default=[], metavar="key=value", help="its keyword arguments")
    check.add_argument("--pins", nargs="+", metavar="PIN", help="its own environment's packages, instead of its file's")
    check.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images to score beside generated ones")
    check.add_argument("--prompt", nargs="+", default=[], metavar="PROMPT", help="what to score every image for")
    check.add_argument("--num-images", type=int, default=4, help="generated images, one group (default 4)")
    check.add_argument("--size", type=int, help="their height and width (default 512, or what the reward needs)")
    check.add_argument("--threads", type=int, default=1, help="CPU threads, as in a recipe (default 1)")
    check.add_argument("--gpu", action="store_true", help="build it on the GPU, as with num_gpus above 0")
    check.set_defaults(command=_check_reward)
    for part in (rows, check):
        part.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
    return command


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = commands.add_parser("doctor", help="examine this machine, and how a model is sampled and scored")
    command.add_argument(
        "subject", metavar="MODEL_OR_RECIPE", nargs="?", help="a model folder or hub id, or a recipe; default: neither"
    )
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    command.add_argument("--device", choices=("cpu", "cuda"), help="where to examine it; default: as the recipe says")
    command.set_defaults(command=_doctor)
    return command


def _train(options: argparse.Namespace) -> None:
    from protocol.derived import check_before_start, derived_numbers
    from protocol.errors import RunDirError
    from protocol.memory import memory_numbers
    from protocol.recipe_file import load_recipe
    from rewards.loading import check_exists

    recipe = load_recipe(options.recipe, options.overrides)
    check_before_start(recipe)
    for reward in (*recipe.scored_rewards, *recipe.evaluation.rewards):
        check_exists(reward.name)
    if options.dry_run or not is_json():
        _print_numbers(derived_numbers(recipe) | memory_numbers(recipe))
    if options.dry_run:
        return
    if options.resume and options.run_dir is None:
        raise RunDirError("--resume needs to know which run", do="add --run-dir DIR")
    _start(recipe, options)


def _print_numbers(numbers: Mapping[str, str]) -> None:
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value}")


def _start(recipe: Recipe, options: argparse.Namespace) -> None:
    from cluster.driver import Driver, check_redis, default_run_dir
    from cluster.memory import check_here, peak_numbers
    from cluster.progress import display
    from cluster.ray_head import check_head
    from cluster.run_dir import RunDir
    from protocol.base_model import pinned
    from rewards.loading import pins_of, resolve

    recipe = pinned(recipe)
    for reward in (*recipe.scored_rewards, *recipe.evaluation.rewards):
        # What needs an environment of its own cannot be imported here; its actor is tried before anything is sampled.
        if not pins_of(reward):
            resolve(reward.name)
    check_head()
    check_redis(recipe)
    check_here(recipe, lambda words: print(f"note: {words}", flush=True))
    run_dir = RunDir(options.run_dir or default_run_dir(options.recipe), recipe, resume=options.resume)
    try:
        set_up(run_dir.run_id, "driver")
        LOG.info(f"run directory: {run_dir.path}")
        if run_dir.notice:
            LOG.info(f"note: {run_dir.notice}")
        interrupt_on_sigterm()
        with display(recipe, run_dir.path) as show:
            Driver(recipe, run_dir, show, debug=options.debug).run()
    except KeyboardInterrupt:
        print(f"stopped; what was learnt is kept: go on with --resume --run-dir {run_dir.path}", file=sys.stderr)
        raise
    finally:
        run_dir.release()
    if not is_json():
        _print_numbers(peak_numbers(recipe, run_dir.path))
    LOG.info(f"done: {run_dir.path}")


def _scale(options: argparse.Namespace) -> None:
    from cluster.wanted import scale

    wanted = scale(options.run, options.rollouts, options.reward)
    _print_numbers(
        {
            **({"rollout actors": str(wanted.rollouts)} if wanted.rollouts else {}),
            **{f"actors of {label}": str(number) for label, number in wanted.replicas.items()},
        }
    )
    print(f"the driver of {options.run} was asked for this")


def _evaluate(options: argparse.Namespace) -> None:
    folder = options.json and options.json.absolute().parent
    if folder and not folder.is_dir():
        raise RecipeError(f"the folder {folder} of --json does not exist", do="make it, or correct --json")
    from cluster.evaluate import evaluate_run, print_table, write_json

    result = evaluate_run(options.run, options.prompts, live=options.live)
    print_table(result)
    if options.json:
        write_json(result, options.json)


def _sample(options: argparse.Namespace) -> None:
    from cluster.sample import sample_to_file

    sample_to_file(
        options.source,
        options.prompt,
        options.out,
        num_images=options.num_images,
        seed=options.seed,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        live=options.live,
    )
    print(options.out)


def _export(options: argparse.Namespace) -> None:
    from cluster.export import export_run

    _print_numbers(
        export_run(
            options.run,
            options.out,
            version=options.version,
            form=options.form,
            evaluation_file=options.evaluation,
            live=options.live,
        )
    )


def _digest(options: argparse.Namespace) -> None:
    from cluster.digest import digest_of

    version, digest = digest_of(options.run, options.version)
    print(f"version {version}")
    print(digest)


def _verify(options: argparse.Namespace) -> None:
    if options.replay is not None and options.replay < 1:
        raise RecipeError("--replay is too small", value=options.replay, expected="1 or more")
    from cluster.verify import summary, verify_record

    record = verify_record(options.run)
    _print_numbers(summary(record))
    if options.replay is None:
        return
    from cluster.replay import replay

    _print_numbers(replay(record, options.replay, options.seed))


def _list_rewards(_: argparse.Namespace) -> None:
    from cluster.reward_tools import list_rewards

    rows = list_rewards()
    width = max(map(len, rows))
    for name, lines in rows.items():
        for number, line in enumerate(lines):
            print(f"  {'' if number else name:<{width}}  {line}")


def _check_reward(options: argparse.Namespace) -> None:
    from cluster.reward_tools import check_reward, read_kwargs

    _print_numbers(
        check_reward(
            options.reward,
            read_kwargs(options.kwargs),
            pins=options.pins,
            prompts=options.prompt,
            files=options.images,
            num_images=options.num_images,
            size=options.size,
            threads=options.threads,
            gpu=options.gpu,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
            debug=options.debug,
        )
    )


def _doctor(options: argparse.Namespace) -> int:
    folder = options.json and options.json.absolute().parent
    if folder and not folder.is_dir():
        raise RecipeError(f"the folder {folder} of --json does not exist", do="make it, or correct --json")
    from cluster.doctor.diagnosis import diagnose, print_finding, write_json

    diagnosis = diagnose(options.subject, options.overrides, options.device, print_finding)
    if options.json:
        write_json(diagnosis, options.json)
    print(f"{diagnosis.count('ok')} ok, {diagnosis.count('warning')} warnings, {diagnosis.count('error')} errors")
    return EXIT_OURS if diagnosis.count("error") else 0
