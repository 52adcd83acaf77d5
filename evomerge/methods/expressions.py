"""Linear expressions of models: "A is to B as C is to D" is written ``c + (b - a)``.

Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089), §5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from evomerge.errors import nearest

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[^\W\d][\w.]*)
    |(?P<quoted>'[^']*'|"[^"]*")
    |(?P<sign>[-+*/()]))""",
    re.VERBOSE,
)
_DEEPEST = 50


@dataclass(frozen=True)
class _Sum:
    """A number plus factors of models."""

    number: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)

    def plus(self, other: _Sum, sign: float) -> _Sum:
        names = dict.fromkeys([*self.factors, *other.factors])
        factors = {n: self.factors.get(n, 0.0) + sign * other.factors.get(n, 0.0) for n in names}
        return _Sum(self.number + sign * other.number, factors)

    def times(self, number: float) -> _Sum:
        return _Sum(self.number * number, {name: factor * number for name, factor in self.factors.items()})


def factors(text: str, names: Collection[str]) -> dict[str, float]:
    """Return the factor of each model in a linear expression; 0 for one that is not in it.

    An expression has names, numbers, ``+ - * /`` and parentheses. A name that is not a plain word is quoted:
    ``c + 0.5 * ('math-7b' - a)``.

    Args:
        text: the expression.
        names: the models' names.

    Raises:
        ValueError: it is no linear expression of these names; one sentence without the expression's place.
    """
    found = _Parser(text, names).whole()
    if not all(map(math.isfinite, (found.number, *found.factors.values()))):
        raise ValueError(f"'{text}' has a factor that is not finite")
    if found.number or not found.factors:
        raise ValueError(f"'{text}' adds a number to models" if found.factors else f"'{text}' names no input")
    return {name: found.factors.get(name, 0.0) for name in names}


class _Parser:
    """Recursive descent: sum = product (± product)*, product = atom (*/ atom)*."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self._text, self._names = text, names
        self._tokens: list[tuple[str, str]] = []
        self._at = 0
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise ValueError(f"'{text}': '{text[position:].strip()[0]}' has no place in an expression")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()

    def whole(self) -> _Sum:
        found = self._sum(0)
        if self._at < len(self._tokens):
            token = self._tokens[self._at][1]
            what = "closes nothing" if token == ")" else "follows without an operator"
            raise ValueError(f"'{self._text}': '{token}' {what}")
        return found

    def _next(self, *signs: str) -> str | None:
        """Take the next token if it is one of these signs."""
        if self._at < len(self._tokens) and self._tokens[self._at] in [("sign", sign) for sign in signs]:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return None

    def _sum(self, depth: int) -> _Sum:
        found = self._product(depth)
        while sign := self._next("+", "-"):
            found = found.plus(self._product(depth), 1.0 if sign == "+" else -1.0)
        return found

    def _product(self, depth: int) -> _Sum:
        found = self._atom(depth)
        while sign := self._next("*", "/"):
            other = self._atom(depth)
            if sign == "*" and found.factors and other.factors:
                raise ValueError(
                    f"'{self._text}' multiplies models; only sums of models times numbers are linear"
                )
            if sign == "/" and other.factors:
                raise ValueError(
                    f"'{self._text}' divides by a model; only sums of models times numbers are linear"
                )
            if sign == "/" and other.number == 0:
                raise ValueError(f"'{self._text}' divides by 0")
            if sign == "/":
                found = found.times(1 / other.number)
            else:
                found = other.times(found.number) if other.factors else found.times(other.number)
        return found

    def _atom(self, depth: int) -> _Sum:
        factor = 1.0
        while sign := self._next("+", "-"):
            factor = -factor if sign == "-" else factor
        if self._next("("):
            if depth == _DEEPEST:
                raise ValueError(f"parentheses are nested deeper than {_DEEPEST}")
            found = self._sum(depth + 1)
            if not self._next(")"):
                raise ValueError(f"'{self._text}': a parenthesis is not closed")
            return found.times(factor)
        if self._at == len(self._tokens):
            raise ValueError(f"'{self._text}' ends where a name or a number should follow")
        kind, token = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            return _Sum(factor * float(token))
        name = token[1:-1] if kind == "quoted" else token
        if kind == "sign":
            raise ValueError(f"'{self._text}': '{token}' stands where a name or a number should")
        if name not in self._names:
            hint = nearest(name, self._names) or f" (known: {', '.join(self._names)})"
            place = "" if name == self._text else f"'{self._text}': "
            raise ValueError(f"{place}'{name}' is not an input of the merge{hint}")
        return _Sum(0.0, {name: factor})
