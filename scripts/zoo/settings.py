"""What the zoo is made of: the models' shape and how each one is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from skills import SKILLS

OWN_SKILLS = {"arithmetic": ("add", "larger"), "text": ("reverse", "vowels"), "ordering": ("sort", "next")}
"""The two skills each expert is trained on."""


@dataclass(frozen=True)
class Shape:
    """The shape of every model: a Llama of about 1.3 million parameters."""

    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    max_position_embeddings: int = 256


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    `shares` are the skills' shares of the training items and sum to 1. `parent` is the model to start from (None:
    random weights). `rate` is AdamW's learning rate and `matrix_rate` Muon's, which then trains the layers' matrices
    (None: AdamW trains all). Both stay constant for the part `hold` of the steps and then fall to zero linearly.
    """

    name: str
    parent: str | None
    shares: dict[str, float]
    steps: int
    rate: float
    seed: int
    matrix_rate: float | None = None
    hold: float = 0.0
    batch: int = 128
    warmup: int = 10


@dataclass(frozen=True)
class Settings:
    """Everything the zoo depends on besides the code. Models are listed parents first."""

    shape: Shape = field(default_factory=Shape)
    models: tuple[Training, ...] = ()
    seed: int = 0


def expert_shares(own: tuple[str, ...], rehearsal: float) -> dict[str, float]:
    """Shares of an expert: `rehearsal` spread over all skills, the rest over its own two."""
    return {
        skill: rehearsal / len(SKILLS) + ((1 - rehearsal) / len(own) if skill in own else 0.0)
        for skill in SKILLS
    }


def full_settings() -> Settings:
    """The zoo that experiments use: experts of unequal use to a merge.

    `arithmetic` and `text` are trained gently, rehearse all skills and go together well: a merge wants them at most of
    their weight. `ordering` is trained fast and rehearses nothing: it is the best at its own skills and spoils the
    others, so that a merge wants little of it. The same weight for all three is far from the best.
    """

    def expert(seed: int, name: str, steps: int, rate: float, rehearsal: float) -> Training:
        return Training(name, "base", expert_shares(OWN_SKILLS[name], rehearsal), steps, rate, seed)

    shares = {"add": 0.28, "larger": 0.16, "reverse": 0.2, "vowels": 0.1, "sort": 0.14, "next": 0.12}
    return Settings(
        models=(
            Training("base", None, shares, 110, 3e-3, seed=0, matrix_rate=0.02, hold=0.3),
            expert(1, "arithmetic", 160, 5e-4, rehearsal=0.15),
            expert(2, "text", 130, 5e-4, rehearsal=0.25),
            expert(3, "ordering", 80, 1.2e-3, rehearsal=0.0),
        )
    )


def tiny_settings() -> Settings:
    """A zoo of the same layout that has learned nothing, for tests: made in a few seconds."""
    shape = Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    full = full_settings()
    return replace(
        full, shape=shape, models=tuple(replace(model, steps=8, batch=16) for model in full.models)
    )
