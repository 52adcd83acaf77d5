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
    random weights). `hold` is the part of the steps at the full learning rate, which then falls to zero linearly.
    """

    name: str
    parent: str | None
    shares: dict[str, float]
    steps: int
    learning_rate: float
    hold: float
    seed: int
    batch: int = 128
    warmup: int = 20


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
    """The zoo that experiments use: experts of unequal strength.

    `arithmetic` and `text` are trained gently, so that a merge wants them at nearly full weight. `ordering` is trained
    hotter and rehearses nothing: it is the best at its own skills and harms the others', so that a merge wants little
    of it. The same weight for all three is therefore far from the best.
    """

    def expert(seed: int, name: str, steps: int, learning_rate: float, rehearsal: float) -> Training:
        shares = expert_shares(OWN_SKILLS[name], rehearsal)
        return Training(name, "base", shares, steps, learning_rate, hold=0.0, seed=seed, warmup=10)

    even = {skill: 1 / len(SKILLS) for skill in SKILLS}
    return Settings(
        models=(
            Training("base", None, even, 240, 2e-3, hold=0.0, seed=0),
            expert(1, "arithmetic", 70, 2e-4, rehearsal=0.15),
            expert(2, "text", 70, 2e-4, rehearsal=0.15),
            expert(3, "ordering", 120, 8e-4, rehearsal=0.0),
        )
    )


def tiny_settings() -> Settings:
    """A zoo of the same layout that has learned nothing, for tests: made in a few seconds."""
    shape = Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    full = full_settings()
    return replace(
        full, shape=shape, models=tuple(replace(model, steps=8, batch=16) for model in full.models)
    )
