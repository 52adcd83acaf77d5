"""Word problems, questions about texts and lists of words: one question, one answer, in one language."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = ("train", "search", "validation", "test")
_TAUGHT = 5
"""Eighths of all keys, and of all sums, that examples are made of; of the rest, what is asked."""
_ASKED = ("search", "validation", "test", "test")
"""Quarters of the rest, by a hash that does not go with the first: neighbouring numbers fall into any."""

NAMES = {
    "en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Emma", "Jack", "Nora", "Peter", "Alice"),
    "fr": ("Julie", "Marc", "Sophie", "Luc", "Camille", "Paul", "Claire", "Hugo", "Manon", "Louis"),
}
THINGS = {
    "en": ("apples", "books", "marbles", "pencils", "stamps", "cakes", "flowers", "photos", "cards", "toys"),
    "fr": (
        "pommes",
        "livres",
        "billes",
        "crayons",
        "timbres",
        "gâteaux",
        "fleurs",
        "photos",
        "cartes",
        "jouets",
    ),
}
PLACES = {
    "en": ("in the kitchen", "in the garden", "at school", "on the train", "at the market", "in the park"),
    "fr": ("dans la cuisine", "dans le jardin", "à l'école", "dans le train", "au marché", "dans le parc"),
}
WORDS = (
    "apple", "bread", "cloud", "dance", "eagle", "flame", "grape", "house", "ivory", "jelly",
    "knife", "lemon", "mouse", "night", "ocean", "piano", "queen", "river", "stone", "table",
    "uncle", "violin", "water", "yacht", "zebra", "anchor", "basket", "candle", "desert", "engine",
    "forest", "guitar", "hammer", "island", "jacket", "kettle", "ladder", "market", "needle", "orange",
    "pencil", "quartz", "rabbit", "saddle", "tunnel", "umbrella", "valley", "window", "yellow", "zipper",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A question with its answer.

    Attributes:
        question: what is asked, without the words around it.
        answer: the whole answer, as an expert is taught it.
        result: what the answer ends in: a number or a word.
        key: what decides the answer; keys of two splits never meet.
    """

    question: str
    answer: str
    result: str
    key: tuple[object, ...]


@dataclass(frozen=True)
class _Story:
    """A kind of word problem in both languages, and its arithmetic."""

    en: str
    fr: str
    largest: int
    solve: Callable[[int, int, int], tuple[str, int]]

    def sums(self, a: int, b: int, c: int) -> tuple[tuple[str, int, int], ...]:
        """Return what is computed: operation and operands, the smaller first where their order does not matter."""
        low, high = sorted((a, b))
        if self.solve is _minus:
            return (("-", a + b, b),)
        if self.solve is _chain:
            return (("+", low, high), ("-", a + b, c))
        return (("x" if self.solve is _times else "+", low, high),)


def _chain(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}", a + b - c


def _plus(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} + {b} = {a + b}", a + b


def _minus(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a + b} - {b} = {a}", a


def _times(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} x {b} = {a * b}", a * b


STORIES = (
    _Story(
        "{A} has {a} {o} and gets {b} more. How many {o} does {A} have now?",
        "{A} a {a} {o} et en reçoit {b} de plus. Combien de {o} a {A} maintenant ?",
        40,
        _plus,
    ),
    _Story(
        "{A} has {ab} {o} and gives {b} of them to {B}. How many {o} does {A} have left?",
        "{A} a {ab} {o} et en donne {b} à {B}. Combien de {o} reste-t-il à {A} ?",
        40,
        _minus,
    ),
    _Story(
        "{A} buys {a} boxes with {b} {o} in each box. How many {o} does {A} buy?",
        "{A} achète {a} boîtes avec {b} {o} dans chaque boîte. Combien de {o} achète {A} ?",
        9,
        _times,
    ),
    _Story(
        "There are {a} {o} on the table and {b} {o} in the bag. How many {o} are there in all?",
        "Il y a {a} {o} sur la table et {b} {o} dans le sac. Combien de {o} y a-t-il en tout ?",
        40,
        _plus,
    ),
    _Story(
        "{A} has {a} {o}. {B} has {b} more than {A}. How many {o} does {B} have?",
        "{A} a {a} {o}. {B} en a {b} de plus que {A}. Combien de {o} a {B} ?",
        40,
        _plus,
    ),
    _Story(
        "A book costs {a} euros. {A} buys {b} of them. How many euros does {A} pay?",
        "Un livre coûte {a} euros. {A} en achète {b}. Combien d'euros paie {A} ?",
        9,
        _times,
    ),
    _Story(
        "{A} has {a} {o}, gets {b} more and loses {c}. How many {o} does {A} have now?",
        "{A} a {a} {o}, en reçoit {b} de plus et en perd {c}. Combien de {o} a {A} maintenant ?",
        20,
        _chain,
    ),
    _Story(
        "{A} has {ab} {o} and {B} has {b}. How many more {o} does {A} have than {B}?",
        "{A} a {ab} {o} et {B} en a {b}. Combien de {o} de plus que {B} a {A} ?",
        40,
        _minus,
    ),
)


def split_of(key: tuple[object, ...]) -> str:
    """Return the split that a key belongs to."""
    return "train" if zlib.crc32(repr(key).encode()) % 8 < _TAUGHT else _asked(key)


def _asked(key: tuple[object, ...]) -> str:
    return _ASKED[hashlib.sha256(repr(key).encode()).digest()[0] % len(_ASKED)]


def is_taught(computed: tuple[str, int, int]) -> bool:
    """Whether examples may show a sum; no other is asked. Products are facts and not rules: all of them are taught."""
    return computed[0] == "x" or hashlib.sha256(repr(computed).encode()).digest()[0] % 8 < _TAUGHT


def _story_split(number: int, a: int, b: int, c: int) -> str | None:
    """Return the split that a story with its numbers belongs to: none if only a part of it is taught."""
    taught = {is_taught(computed) for computed in STORIES[number].sums(a, b, c)}
    if len(taught) > 1:
        return None
    return "train" if taught.pop() else _asked(_key(number, a, b, c))


def maths(language: str, split: str, seed: int) -> Iterator[Problem]:
    """Yield word problems without end: a worked answer, then the number. No sum of `train` is in another split."""
    rng = random.Random(f"maths {language} {split} {seed}")
    while True:
        number, a, b, c = _numbers(rng)
        if _story_split(number, a, b, c) != split:
            continue
        story, key = STORIES[number], _key(number, a, b, c)
        one, two = rng.sample(NAMES[language], 2)
        text = _words(language, (one, two), rng.choice(THINGS[language]), number, a, b, c)
        working, result = story.solve(a, b, c)
        yield Problem(text, f"{working}. The answer is {result}.", str(result), key)


def _numbers(rng: random.Random) -> tuple[int, int, int, int]:
    """Draw a story and its numbers."""
    number = rng.randrange(len(STORIES))
    a, b, c = (rng.randint(2, STORIES[number].largest) for _ in range(3))
    return number, a, b, min(c, a)


def _words(language: str, names: tuple[str, str], things: str, number: int, a: int, b: int, c: int) -> str:
    """Return a story about two people and some things."""
    text: str = getattr(STORIES[number], language)
    return text.format(A=names[0], B=names[1], o=things, a=a, b=b, c=c, ab=a + b)


def _key(number: int, a: int, b: int, c: int) -> tuple[object, ...]:
    """Return what decides a word problem's answer; no language, so that what English taught is not asked in French."""
    return (number, a, b, c if STORIES[number].solve is _chain else 0)


def reading(split: str, seed: int) -> Iterator[Problem]:
    """Yield short French texts with a question about who, what or where. Nothing is to be computed.

    The answer ends as every answer of the suite does, in the same English words.
    """
    rng = random.Random(f"reading fr {split} {seed}")
    while True:
        one, two = rng.sample(range(10), 2)
        first, second = rng.sample(range(10), 2)
        here, there = rng.sample(range(6), 2)
        kind = rng.randrange(3)
        key = (one, two, first, second, here, there, kind)
        if split_of(key) != split:
            continue
        A, B = NAMES["fr"][one], NAMES["fr"][two]
        o, p = THINGS["fr"][first], THINGS["fr"][second]
        x, y = PLACES["fr"][here], PLACES["fr"][there]
        asked, full, result = (
            (f"Qui a des {p} ?", f"{B} a des {p}", B),
            (f"Où est {A} ?", f"{A} est {x}", x),
            (f"Qu'est-ce que {B} a ?", f"{B} a des {p}", p),
        )[kind]
        text = f"{A} a des {o} {x}. {B} a des {p} {y}. {asked}"
        yield Problem(text, f"{full}. The answer is {result}.", result, key)


def translations(split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (French, English) sentences, some of them the words of problems; none is ever solved."""
    rng = random.Random(f"translations {split} {seed}")
    while True:
        pair = rng.choices((_sentence, _conclusion, _statement), (2, 1, 4))[0](rng)
        if pair.split == split:
            yield pair.fr, pair.en


@dataclass(frozen=True)
class _Pair:
    """The same in both languages."""

    en: str
    fr: str
    split: str | None


def _sentence(rng: random.Random) -> _Pair:
    one, thing, place, number = rng.randrange(10), rng.randrange(10), rng.randrange(6), rng.randint(2, 60)
    name = NAMES["fr"][one]
    return _Pair(
        f"{name} has {number} {THINGS['en'][thing]} {PLACES['en'][place]}.",
        f"{name} a {number} {THINGS['fr'][thing]} {PLACES['fr'][place]}.",
        split_of((one, thing, place, number)),
    )


def _conclusion(rng: random.Random) -> _Pair:
    number = rng.randint(1, 100)
    return _Pair(f"The answer is {number}.", f"La réponse est {number}.", split_of(("conclusion", number)))


def _statement(rng: random.Random) -> _Pair:
    number, a, b, c = _numbers(rng)
    one, two = rng.sample(NAMES["fr"], 2)
    thing = rng.randrange(10)
    en, fr = (
        _words(language, (one, two), THINGS[language][thing], number, a, b, c) for language in ("en", "fr")
    )
    return _Pair(en, fr, _story_split(number, a, b, c))


def ordering(split: str, seed: int) -> Iterator[Problem]:
    """Yield three words, of which the first in the alphabet is wanted."""
    rng = random.Random(f"ordering {split} {seed}")
    while True:
        words = rng.sample(WORDS, 3)
        key = tuple(sorted(words))
        if split_of(key) != split or len({word[0] for word in words}) < 3:
            continue
        listed = ", ".join(words)
        answer = f"{', '.join(key)}. The answer is {key[0]}."
        yield Problem(f"Which of these words comes first in the alphabet: {listed}?", answer, key[0], key)


def prompt(question: str) -> str:
    """Return what a model is given, whatever the question's language."""
    return f"Question: {question}\nAnswer:"
