"""What the zoo is made of: the models' shape and how each one is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from skills import SKILLS, SPLITS

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

    `drop` and `repeat` are the chances with which a step leaves out a layer between the first and the last (LayerDrop,
    Fan et al. 2019), or runs it twice. `layers`, first and one past the last, are the only ones trained (None: all,
    and embeddings, final norm and head).
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
    drop: float = 0.0
    repeat: float = 0.0
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Settings:
    """Everything the zoo depends on besides the code. Models are listed parents first.

    `splits` are the items of each skill in each split.
    """

    shape: Shape = field(default_factory=Shape)
    models: tuple[Training, ...] = ()
    seed: int = 0
    splits: dict[str, int] = field(default_factory=lambda: dict(SPLITS))


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


DEEP = Shape(hidden_size=64, intermediate_size=176, num_hidden_layers=10)


def deep_settings() -> Settings:
    """The zoo for searches over layer paths: narrower, deeper, and used to paths.

    Large language models bear it when layers are left out, repeated or taken from a sibling; small ones that always
    saw all layers in order do not. The base therefore learns at random depths: each step leaves out some layers and
    runs some twice. Each expert trains five layers, at another depth than the others, and leaves the rest frozen.
    """

    def expert(seed: int, name: str, layers: tuple[int, int]) -> Training:
        shares = expert_shares(OWN_SKILLS[name], rehearsal=0.1)
        return Training(name, "base", shares, 180, 2e-3, seed, batch=64, layers=layers)

    shares = {"add": 0.16, "larger": 0.16, "reverse": 0.26, "vowels": 0.14, "sort": 0.16, "next": 0.12}
    base = Training("base", None, shares, 260, 3e-3, seed=0, matrix_rate=0.02, hold=0.3, batch=64)
    return Settings(
        shape=DEEP,
        models=(
            replace(base, drop=0.2, repeat=0.2),
            expert(1, "arithmetic", (3, 8)),
            expert(2, "text", (1, 6)),
            expert(3, "ordering", (5, 10)),
        ),
        splits={"search": 240, "validation": 160, "test": 400},
    )


def tiny(settings: Settings) -> Settings:
    """A zoo of the same layout that has learned nothing, for tests: made in a few seconds."""
    layers = settings.shape.num_hidden_layers // 2
    shape = Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2)
    return replace(
        settings,
        shape=shape,
        models=tuple(
            replace(model, steps=8, batch=16, layers=model.layers and (1, layers - 1))
            for model in settings.models
        ),
    )
