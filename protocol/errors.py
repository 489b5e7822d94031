"""The error tree: every error a person can cause or must act on.

    SfumatoError            what happened, the value, what was expected, what to do
    |- RecipeError          a recipe, an override or a combination of settings
    |- ModelError           a base model, a prompt file or weights that cannot be used
    |- RewardError          a reward that cannot be built, or scores that cannot be used
    |- RunDirError          a run directory that is taken, foreign, incomplete or in the wrong place
    |- RedisError           a Redis server that cannot be reached, refuses us or is too small
    |- WireError            bytes from the stream that are not a ticket or a group of ours
    |- TrainingError        numbers that must not be trained on: parity, digests, non-finite values
    `- VerifyError          a run's record that does not hold together, or groups that do not come out again

`ValueError` stays for callers' mistakes in pure functions, `assert` for invariants.
"""

from __future__ import annotations

_ABSENT = object()


class SfumatoError(Exception):
    """What happened, and where known the offending value, what was expected, and what to do about it.

    Survives pickling, since Ray carries exceptions between processes.
    """

    def __init__(self, what: str, *, value: object = _ABSENT, expected: str = "", do: str = "") -> None:
        parts = [what.rstrip(".")]
        if value is not _ABSENT:
            parts.append(f"Got: {value!r}")
        if expected:
            parts.append(f"Expected: {expected.rstrip('.')}")
        if do:
            parts.append(f"To do: {do.rstrip('.')}")
        # What ends with a table ends its line itself.
        super().__init__((". ".join(parts) + ".").replace("\n. ", "\n"))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self)))


def _rebuild(kind: type[SfumatoError], message: str) -> SfumatoError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class RecipeError(SfumatoError):
    """A recipe, an override, or a combination of settings that cannot run."""


class ModelError(SfumatoError):
    """A base model, a prompt file or weights that cannot be used."""


class RewardError(SfumatoError):
    """A reward that cannot be built, or scores that cannot be used."""


class RunDirError(SfumatoError):
    """A run directory that is taken, made by another recipe, incomplete, or in the wrong place."""


class RedisError(SfumatoError):
    """A Redis server that cannot be reached, refuses the password, or is too small for the recipe."""


class WireError(SfumatoError):
    """Bytes from a stream that are not an entry of ours: truncated, corrupted, or of another schema."""


class TrainingError(SfumatoError):
    """Numbers that must not be trained on: a parity gap, a wrong digest, a non-finite value."""


class VerifyError(SfumatoError):
    """A run's record that contradicts its recipe, its files or itself, or groups that cannot be made again."""
