"""Which chat template the output has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.checkpoints.tokenizer import chat_templates
from evomerge.errors import UserError
from evomerge.merging.vocabulary import OutputVocabulary
from evomerge.output import AUTO
from evomerge.recipe import Recipe

_CONTROL = re.compile(r"<\|[\w.-]+\|>|\[\|\w+\|\]|\[/?INST\]")


def chosen_templates(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], vocabulary: OutputVocabulary
) -> tuple[Mapping[str, str] | None, tuple[str, ...]]:
    """Return the output's chat templates by name (``default``: the main one), and warnings.

    What the recipe says wins over what lies beside the tokenizer. A name is a model's if there is one of that
    name, then ``auto`` or a built-in one.

    Returns:
        None for the tokenizer's own, otherwise what takes its place; nothing in it removes it.

    Raises:
        UserError: the text is no Jinja template.
    """
    choice = recipe.output.chat_template
    if choice is None:
        return None, ()
    if choice in recipe.models:
        folder = checkpoints[choice].path
        return (None if folder == vocabulary.source.folder else chat_templates(folder)), ()
    if choice == AUTO:
        return _most_common(checkpoints, recipe)
    template = BUILT_IN.get(choice, choice)
    if choice not in BUILT_IN:
        _check_syntax(template)
    return {"default": template}, _unknown_tokens(template, vocabulary)


def _most_common(
    checkpoints: Mapping[str, Checkpoint], recipe: Recipe
) -> tuple[Mapping[str, str] | None, tuple[str, ...]]:
    """Return the template that most models have; of several the one whose model comes first."""
    found = [chat_templates(checkpoints[name].path).get("default") for name in recipe.models]
    counts = Counter(template for template in found if template is not None)
    if not counts:
        return None, ("output.chat_template: auto: none of the models has a chat template",)
    return {"default": counts.most_common(1)[0][0]}, ()


def _check_syntax(template: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    # transformers adds a block of its own, which marks what the assistant says.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise UserError(
            f"line {error.lineno}: not a Jinja template: {error.message}", key="output.chat_template"
        ) from None


def _unknown_tokens(template: str, vocabulary: OutputVocabulary) -> tuple[str, ...]:
    ids = vocabulary.ids if vocabulary.has_tokenizer else {}
    missing = [token for token in dict.fromkeys(_CONTROL.findall(template)) if token not in ids]
    if not missing or not ids:
        return ()
    return (
        f"the chat template writes {', '.join(missing)}, which the output's tokenizer has no tokens for; they "
        "become several tokens each",
    )
