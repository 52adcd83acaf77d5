"""The skills the zoo's models learn, and the items that measure them.

A skill is a rule on short strings with one right answer. Its `draw` makes one item from a random generator; its
items are told apart by `Item.key`, which is the same for questions that give each other away (`12+34` and `34+12`,
two orders of the same letters), so that splits which are disjoint by key do not leak.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

SPLITS = {"search": 80, "validation": 100, "test": 180}
"""Items of each skill in each split."""


@dataclass(frozen=True)
class Item:
    """One question. `choices` is empty where the answer is written freely; otherwise it holds the answer."""

    prompt: str
    answer: str
    key: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skill:
    """A named rule. `draw` makes one item; `choices` is how many answers an item offers (0: written freely)."""

    name: str
    draw: Callable[[random.Random], Item]
    choices: int = 0


def _letters(rng: random.Random, count: int, distinct: bool = False) -> str:
    pick = (
        rng.sample(string.ascii_lowercase, count)
        if distinct
        else rng.choices(string.ascii_lowercase, k=count)
    )
    return "".join(pick)


def _add(rng: random.Random) -> Item:
    """The sum of two three-digit numbers that need no carry."""
    left = right = 0
    for place in (100, 10, 1):
        smallest = 1 if place == 100 else 0
        digit = rng.randint(smallest, 9 - smallest)
        left += place * digit
        right += place * rng.randint(smallest, 9 - digit)
    return Item(f"{left}+{right}=", str(left + right), f"{min(left, right)}+{max(left, right)}")


def _larger(rng: random.Random) -> Item:
    """The larger of two numbers that often share their leading digits; either may come first."""
    left = rng.randint(100, 999)
    right = left
    while right == left:
        right = rng.choice([rng.randint(100, 999), left // 10 * 10 + rng.randint(0, 9)])
    answer = str(max(left, right))
    key = f"{min(left, right)} {answer}"
    return Item(f"larger {left} {right}=", answer, key, (str(left), str(right)))


def _reverse(rng: random.Random) -> Item:
    word = _letters(rng, 5)
    return Item(f"reverse {word}=", word[::-1], word)


def _vowels(rng: random.Random) -> Item:
    """How many vowels a word has, 0 to 3, each equally often; all four answers are offered."""
    count = rng.randrange(4)
    letters = rng.choices("aeiou", k=count) + rng.choices("bcdfghjklmnpqrstvwxyz", k=6 - count)
    rng.shuffle(letters)
    word = "".join(letters)
    return Item(f"vowels {word}=", str(count), "".join(sorted(word)), ("0", "1", "2", "3"))


def _sort(rng: random.Random) -> Item:
    word = _letters(rng, 4, distinct=True)
    answer = "".join(sorted(word))
    return Item(f"sort {word}=", answer, answer)


def _next(rng: random.Random) -> Item:
    """Each letter's successor in the alphabet; `a` follows `z`."""
    word = _letters(rng, 4)
    answer = "".join(
        string.ascii_lowercase[(string.ascii_lowercase.index(letter) + 1) % 26] for letter in word
    )
    return Item(f"next {word}=", answer, word)


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("add", _add),
        Skill("larger", _larger, choices=2),
        Skill("reverse", _reverse),
        Skill("vowels", _vowels, choices=4),
        Skill("sort", _sort),
        Skill("next", _next),
    )
}


def stream(skill: Skill, rng: random.Random, held_out: Collection[str] = ()) -> Iterator[Item]:
    """Yield the skill's items for ever, leaving out those whose key is in `held_out`."""
    while True:
        item = skill.draw(rng)
        if item.key not in held_out:
            yield item


def distinct(items: Iterator[Item], count: int) -> list[Item]:
    """Take `count` items of pairwise different keys."""
    taken: dict[str, Item] = {}
    while len(taken) < count:
        item = next(items)
        taken.setdefault(item.key, item)
    return list(taken.values())


def draw_splits(skill: Skill, sizes: dict[str, int], seed: int) -> dict[str, list[Item]]:
    """Draw the skill's held-out items, `sizes[split]` of them for each split, disjoint by key."""
    rng = random.Random(f"{seed} {skill.name} held out")
    items = iter(distinct(stream(skill, rng), sum(sizes.values())))
    return {split: [next(items) for _ in range(size)] for split, size in sizes.items()}


def held_out_keys(splits: dict[str, list[Item]]) -> frozenset[str]:
    """The keys of all splits' items, refused if two splits share one."""
    keys = [item.key for items in splits.values() for item in items]
    if len(keys) != len(set(keys)):
        raise ValueError("two splits share an item")
    return frozenset(keys)
