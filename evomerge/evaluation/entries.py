"""What a task of a suite is: items ready to be asked, and a scorer that knows what the answers are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evomerge.evaluation.guards import Answers, check_finite
from evomerge.evaluation.items import Item, Split
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import (
    Answer,
    Engine,
    Generated,
    Generation,
    Loglikelihood,
    Request,
    Rolling,
)

REQUEST_KINDS = (Loglikelihood, Rolling, Generation)


@dataclass(frozen=True)
class Entry:
    """An item with all that asking and scoring it needs.

    Attributes:
        item: the item.
        requests: what the engine is asked; empty where the scorer asks by itself.
        scorer: of the item's task.
        reference: the prompt and the right answer, as they follow each other; None if there is no such text.
        material: what the scorer keeps with the item.
    """

    item: Item
    requests: tuple[Request, ...]
    scorer: Scorer
    reference: tuple[str, str] | None
    material: Any


@dataclass(frozen=True)
class Reply:
    """An entry and the engine's answers to its requests, in their order."""

    entry: Entry
    answers: tuple[Answer, ...]

    @property
    def truncated(self) -> bool | None:
        """Whether a generated text was cut at its token limit; None if none was generated."""
        texts = [answer for answer in self.answers if isinstance(answer, Generated)]
        return any(text.truncated for text in texts) if texts else None


class Scorer(Protocol):
    """Scores the items of one task and split."""

    def score(self, replies: Sequence[Reply], engine: Engine) -> list[tuple[float, float]]:
        """Return (raw, value in [0, 1]) of each reply.

        Args:
            replies: all those of one part.
            engine: for scorers that ask by themselves.

        Raises:
            CandidateFailed: a score is not finite.
            UserError: the task's own code fails, or returns no such score.
        """
        ...

    def given(self, replies: Sequence[Reply]) -> Answers | None:
        """Return what was answered, if answers that do not depend on the item mean a broken model."""
        ...

    def preview(self, reply: Reply, engine: Engine) -> Preview:
        """Return what a person wants to see of one item."""
        ...


class Task(Protocol):
    """One task of a suite, before its items are rendered.

    Attributes:
        metric: its fitness.
        output_type: lm-eval's word for what is asked, or ``python``.
        documents: split → its documents.
    """

    metric: Metric
    output_type: str

    @property
    def documents(self) -> Mapping[Split, Sequence[Any]]: ...

    def entries(self, split: Split) -> list[Entry]:
        """Return an entry for each document of a split."""
        ...


@dataclass(frozen=True)
class Questions:
    """Some entries, their requests by kind, and each scorer with the places of its entries."""

    entries: tuple[Entry, ...]
    asked: Mapping[type, tuple[Request, ...]]
    groups: tuple[tuple[Scorer, tuple[int, ...]], ...]


def ask_of(entries: Iterable[Entry]) -> Questions:
    """Collect what a part's entries ask: requests of one kind go to the engine together."""
    entries = tuple(entries)
    groups: dict[int, tuple[Scorer, list[int]]] = {}
    for place, entry in enumerate(entries):
        groups.setdefault(id(entry.scorer), (entry.scorer, []))[1].append(place)
    asked = _by_kind(entry.requests for entry in entries)
    return Questions(entries, asked, tuple((scorer, tuple(places)) for scorer, places in groups.values()))


def answer(engine: Engine, questions: Questions) -> list[Reply]:
    """Return the reply to each entry, checked to be finite.

    Raises:
        CandidateFailed: a log-probability or a logit is not finite.
    """
    answers = _answers(engine, questions.asked, [entry.requests for entry in questions.entries])
    return [Reply(entry, given) for entry, given in zip(questions.entries, answers, strict=True)]


def ask(engine: Engine, groups: Sequence[tuple[Request, ...]]) -> list[tuple[Answer, ...]]:
    """Return the answers to groups of requests that are asked together and once; otherwise as `answer`."""
    return _answers(engine, _by_kind(groups), groups)


def _by_kind(groups: Iterable[tuple[Request, ...]]) -> Mapping[type, tuple[Request, ...]]:
    requests = [request for group in groups for request in group]
    return {kind: tuple(r for r in requests if isinstance(r, kind)) for kind in REQUEST_KINDS}


def _answers(
    engine: Engine, asked: Mapping[type, Any], groups: Sequence[tuple[Request, ...]]
) -> list[tuple[Answer, ...]]:
    answers: dict[type, Sequence[Answer]] = {}
    if asked[Loglikelihood]:
        pairs = engine.loglikelihood(asked[Loglikelihood])
        check_finite((logprob for logprob, _ in pairs), "a log-probability")
        answers[Loglikelihood] = pairs
    if asked[Rolling]:
        answers[Rolling] = rolled = engine.loglikelihood_rolling(asked[Rolling])
        check_finite(rolled, "a log-probability")
    if asked[Generation]:
        answers[Generation] = engine.generate(asked[Generation])
    streams = {kind: iter(given) for kind, given in answers.items()}
    return [tuple(next(streams[type(request)]) for request in group) for group in groups]


def given_by(questions: Questions, replies: Sequence[Reply]) -> dict[str, Answers]:
    """Return what was answered, by task, for the tasks whose answers can be degenerate."""
    answers = {}
    for scorer, places in questions.groups:
        given = scorer.given([replies[place] for place in places])
        if given is not None:
            answers[replies[places[0]].entry.item.task] = given
    return answers


def score_all(engine: Engine, questions: Questions, replies: Sequence[Reply]) -> list[tuple[float, float]]:
    """Return (raw, value) of each reply; see `Scorer.score`."""
    scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(replies)
    for scorer, places in questions.groups:
        found = scorer.score([replies[place] for place in places], engine)
        for place, score in zip(places, found, strict=True):
            scores[place] = score
    return scores
