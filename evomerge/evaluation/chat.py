"""How prompts are written: as plain text or through a chat template, and what of an answer is thinking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, at, nearest
from evomerge.evaluation.requests import Loglikelihood, Request
from evomerge.suite_config import Suite as SuiteConfig

log = logging.getLogger(__name__)

ChatTemplate = Callable[..., str]


@dataclass(frozen=True)
class PromptStyle:
    """What a suite says of all its prompts, with lm-eval's semantics.

    Attributes:
        template: renders a list of messages; None: prompts are plain text.
        system: put before the task's description, as the system message where there is a template.
        multiturn: whether few-shot examples are turns of their own, rather than text in the one user message.
        think_end: what ends an answer's thinking; the answer is what follows its last occurrence.
        thinks: whether the template is asked to let the model think.
    """

    template: ChatTemplate | None = None
    system: str | None = None
    multiturn: bool = False
    think_end: str | None = None
    thinks: bool = False

    def answer(self, text: str, stops: Sequence[str]) -> str:
        """Return what of a generated text is the answer.

        Without `think_end` the text ends at its first stop string already. With it the stop strings, which may
        well be in the thinking, hold for what follows (as in lm-eval's vLLM model).
        """
        if self.think_end is None:
            return text
        text = text.split(self.think_end)[-1].lstrip()
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text


def prompt_style(config: SuiteConfig, tokenizer: Any, file: Path | str | None) -> PromptStyle:
    """Return how the suite's prompts are written; an undecided `chat_template` is false.

    Args:
        config: the config's suite.
        tokenizer: of the merged models, with its chat templates.
        file: the config file, for messages.

    Raises:
        UserError: there is no such chat template, or settings do not fit each other.
    """
    arguments = config.chat_template_args
    if not config.chat_template:
        if arguments:
            raise UserError(
                f"{at(file, 'suite.chat_template_args')}they need a chat template; write suite.chat_template: true, "
                "or leave them out"
            )
        if config.fewshot_as_multiturn:
            raise UserError(
                f"{at(file, 'suite.fewshot_as_multiturn')}true needs a chat template; "
                "write suite.chat_template: true, or leave it out"
            )
    elif getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{at(file, 'suite.chat_template')}the merged model's tokenizer has no chat template; set it to false, or "
            "give the model one with output.chat_template"
        )
    thinks = bool(arguments.get("enable_thinking"))
    if thinks and config.think_end_token is None:
        raise UserError(
            f"{at(file, 'suite.think_end_token')}this key is required with chat_template_args.enable_thinking: true; "
            "write what ends the model's thinking, e.g. think_end_token: </think>"
        )
    if config.think_end_token is not None and config.think_end_token in getattr(
        tokenizer, "all_special_tokens", ()
    ):
        raise UserError(
            f"{at(file, 'suite.think_end_token')}'{config.think_end_token}' is a special token of the tokenizer, which "
            "generated texts do not show; name a text that they do"
        )
    template = None
    if config.chat_template:
        text = _template_of(tokenizer, config.chat_template, file)
        template = _renderer(tokenizer, text, arguments)
        if config.system_instruction is not None and not _takes_system(tokenizer, text, arguments):
            raise UserError(
                f"{at(file, 'suite.system_instruction')}the chat template takes no system message, so the instruction "
                "would be dropped; leave it out, or set chat_template to false or to another template"
            )
    multiturn = template is not None and config.fewshot_as_multiturn is not False
    return PromptStyle(template, config.system_instruction, multiturn, config.think_end_token, thinks)


def check_thinking(requests: Iterable[Request], style: PromptStyle, task: str, place: str) -> None:
    """Refuse log-probabilities of given answers where the model is to think first, as lm-eval does."""
    if style.thinks and any(isinstance(request, Loglikelihood) for request in requests):
        raise UserError(
            f"{place}task '{task}' scores given answers, before which a model cannot think; take it out, or set "
            "suite.chat_template_args.enable_thinking to false"
        )


def decide_chat(
    config: SuiteConfig,
    tokenizer: Any,
    templates: Mapping[str, Mapping[str, str]],
    first_prompts: Callable[[PromptStyle], str | None],
    *,
    key: str = "suite.chat_template",
    file: Path | str | None,
) -> SuiteConfig:
    """Return the suite with `chat_template` decided: false if no model has one, otherwise it must be written.

    Args:
        config: the config's suite.
        tokenizer: of the merged models.
        templates: model → its chat templates by name.
        first_prompts: gives the first prompt of the suite in a style; None if no task has prompts.
        key: what the user is to write.
        file: the config file, for messages.

    Raises:
        UserError: it is not written although a model has one; shows the first prompt both ways.
    """
    if config.chat_template is not None:
        return config
    undecided = config.model_copy(update={"chat_template": False})
    owner = next((model for model, found in templates.items() if found), None)
    if owner is None:
        return undecided
    plain = config.model_copy(
        update={"chat_template": False, "chat_template_args": {}, "fewshot_as_multiturn": None}
    )
    without = first_prompts(prompt_style(plain, tokenizer, file))
    if without is None:
        return undecided
    known = templates[owner]
    own = tokenizer if getattr(tokenizer, "chat_template", None) is not None else None
    text = known.get("default", next(iter(known.values()))) if own is None else _any_template(tokenizer)
    style = PromptStyle(
        _renderer(tokenizer, text, config.chat_template_args),
        config.system_instruction,
        config.fewshot_as_multiturn is not False,
    )
    also = "" if own is not None or key.startswith("-") else f" (with output.chat_template: {owner})"
    raise UserError(
        f"{at(file, key)}has to be written, since '{owner}' has a chat template: true{also} for prompts like "
        f"{_short(first_prompts(style) or '')!r}, false for prompts like {_short(without)!r}"
    )


def _short(text: str, length: int = 160) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def _any_template(tokenizer: Any) -> str:
    known = tokenizer.chat_template
    return str(known.get("default", next(iter(known.values()))) if isinstance(known, dict) else known)


def _template_of(tokenizer: Any, chosen: bool | str, file: Path | str | None) -> str:
    """Return the text of the tokenizer's template: the only one, the default one, or the named one."""
    known = tokenizer.chat_template
    known = dict(known) if isinstance(known, Mapping) else {"default": str(known)}
    name = "default" if chosen is True else str(chosen)
    if name not in known:
        raise UserError(
            f"{at(file, 'suite.chat_template')}the merged model has no chat template '{name}'{nearest(name, known)}; "
            f"it has {', '.join(known)}"
        )
    return str(known[name])


def _takes_system(tokenizer: Any, template: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a system message goes through a template that takes one of a user."""
    import jinja2

    system, user = ({"role": role, "content": "?"} for role in ("system", "user"))
    try:
        tokenizer.apply_chat_template(
            [system, user], tokenize=False, add_generation_prompt=True, chat_template=template, **arguments
        )
    except jinja2.exceptions.TemplateError:
        return False
    return True


def _renderer(tokenizer: Any, template: str, arguments: Mapping[str, Any]) -> ChatTemplate:
    """Return the template as lm-eval applies it: without the system message if it must."""
    import jinja2

    said: list[bool] = []

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "chat_template": template,
            **arguments,
        }
        try:
            return str(tokenizer.apply_chat_template(history, **options))
        except jinja2.exceptions.TemplateError:
            users = [message for message in history if message["role"] != "system"]
            if not said and len(users) < len(history):
                said.append(True)
                log.warning(
                    "the chat template takes no system message; tasks' descriptions are dropped, as by lm-eval"
                )
            return str(tokenizer.apply_chat_template(users, **options))

    return render
