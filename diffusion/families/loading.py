"""Loading parts of a base model in diffusers layout, with errors that say what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from protocol.errors import ModelError


def load(kind: Any, source: str, part: str, **options: Any) -> Any:
    """Returns a part of a model folder or hub id; a network's weights are read from safetensors alone, never from
    pickles. Raises ModelError."""
    only = {"use_safetensors": True} if issubclass(kind, nn.Module) else {}
    return _explained(kind.from_pretrained, source, part, **only, **options)


def load_config(kind: Any, source: str, part: str) -> dict[str, Any]:
    """Returns the configuration of a part. Raises ModelError."""
    config: dict[str, Any] = _explained(kind.load_config, source, part)
    return config


def _explained(read: Callable[..., Any], source: str, part: str, **options: Any) -> Any:
    try:
        return read(source, subfolder=part, **options)
    except Exception as error:  # diffusers and transformers raise many types for an unusable folder
        raise ModelError(
            f"the {part} of the base model cannot be loaded: {_first_line(error)}",
            value=source,
            expected="a model in diffusers layout, with weights in safetensors",
            do="check model.path; a hub id needs the network or a filled cache",
        ) from error


def check_tokenizer(tokenizer: Any, config: Any, source: str, part: str) -> None:
    """transformers makes a tokenizer without words of a folder without its files, and says nothing."""
    # T5's positions are relative, so that it has no longest text.
    longest = getattr(config, "max_position_embeddings", math.inf)
    if not config.vocab_size / 2 < len(tokenizer) <= config.vocab_size or tokenizer.model_max_length > longest:
        raise ModelError(
            f"the {part} of the base model is missing or does not belong to its text encoder",
            value=f"{len(tokenizer)} words, at most {tokenizer.model_max_length} tokens in {source}",
            expected=f"about {config.vocab_size} words, not more, and at most {longest} tokens",
            do=f"check the model's {part} folder",
        )


def token_ids(tokenizer: Any, prompt: str, length: int | None = None) -> Any:
    """Returns a prompt's tokens, (1, L), cut or filled to a length: by default the tokenizer's own."""
    tokens = tokenizer(
        prompt,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
