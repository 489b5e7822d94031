"""The prompts of DDPO's and PRDP's small experiments, generated: 45 common animals, alone or at something."""

from __future__ import annotations

ANIMALS = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion"),
    *("tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale"),
    *("dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig"),
    *("turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)
"""The 45 common animals of Black et al. (DDPO), arXiv 2305.13301, section 6."""

ACTIVITIES = ("riding a bike", "playing chess", "washing dishes")
"""What they do in DDPO's experiment on prompt alignment, section 6."""


def animals() -> list[str]:
    """Returns `a cat`, ..., `an ant`, ...: 45 prompts."""
    return [_with_article(animal) for animal in ANIMALS]


def animal_activities() -> list[str]:
    """Returns `a cat riding a bike`, ...: 135 prompts of DDPO's form `a(n) [animal] [activity]`."""
    return [f"{_with_article(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]


def animal_paintings() -> list[str]:
    """Returns `A painting of a cat`, ...: 45 prompts in the form of PRDP (arXiv 2402.08714, section 5.2), whose
    template says `a` of all of them."""
    return [f"A painting of a {animal}" for animal in ANIMALS]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


BUILTIN = {"animals": animals, "animal_activities": animal_activities, "animal_paintings": animal_paintings}
"""What `builtin:NAME` may name."""
