"""The vLLM engine: one live `vllm.LLM` whose weights are replaced in place."""

from __future__ import annotations

import gc
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from evomerge.engines import inputs, vllm_options
from evomerge.engines.decoding import GrowingText, Stops
from evomerge.engines.encoding import Encoder
from evomerge.environment import library_versions
from evomerge.errors import CandidateFailed, EngineLost, EvomergeError, UserError
from evomerge.evaluation.requests import Generated, Generation, Loglikelihood, Rolling
from evomerge.losses import loss

Plan = TypeVar("Plan")
_KEPT_PLANS = 512
_SENTINEL_TOKENS = 2
_LIKELIEST = 4

SPARE_TOKENS = 2
"""vLLM always generates a token behind a prompt, and a scored text has one token more than its input."""


@dataclass(frozen=True)
class Sentinel:
    """What a model says to a fixed prompt.

    Attributes:
        prompt: log-probability of each of the prompt's tokens but the first.
        tokens: the greedy answer.
        logprobs: log-probability of each of its tokens.
    """

    prompt: tuple[float, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def agrees(self, other: Sentinel, tolerance: float) -> bool:
        """Whether two answers may be the same model's.

        Where they part, both chose the likeliest token of one distribution: it must be a tie.
        """
        if any(abs(a - b) > tolerance for a, b in zip(self.prompt, other.prompt, strict=True)):
            return False
        answers = zip(self.tokens, self.logprobs, other.tokens, other.logprobs, strict=True)
        for mine, my_logprob, its, its_logprob in answers:
            if abs(my_logprob - its_logprob) > tolerance:
                return False
            if mine != its:
                return True
        return True


class VLLMEngine:
    """Scores and generates with vLLM, on the tokens that the Hugging Face engine uses.

    Log-likelihoods are sums of vLLM's prompt log-probabilities (float32, of the unprocessed logits). Such
    requests read no prefix cache, so that a context is computed again for each of its continuations. The
    prefix cache serves generation within one call and is emptied before each: the same requests in the same
    order are scheduled alike, however often they are asked.

    Args:
        folder: a model folder; its weights are not read, unless `load_format` says so.
        tokenizer: its tokenizer.
        generation_config: the model's generation defaults; only penalty and EOS tokens are used.
        dtype: number format of the weights.
        device: ``cpu`` or ``cuda``.
        batch_tokens: token budget of one step.
        max_length: longest input, in tokens; longer ones lose their beginning.
        options: further engine arguments.
        load_format: vLLM's word for where the first weights come from.

    Attributes:
        alive: whether the engine can be asked; once it has failed it cannot.

    Raises:
        UserError: vLLM does not know the model, or refuses an option.
        EngineLost: the device or its memory failed.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        *,
        generation_config: Any,
        dtype: torch.dtype,
        device: str,
        batch_tokens: int,
        max_length: int,
        options: Mapping[str, Any],
        load_format: Literal["dummy", "safetensors"] = "dummy",
    ) -> None:
        vllm_options.require()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.alive = True
        self._batch_tokens = batch_tokens
        self._device = device
        self._dtype = dtype
        self._encoder = Encoder(tokenizer)
        self.set_generation(generation_config)
        self._options = {
            **vllm_options.defaults(device, batch_tokens),
            "kv_cache_memory_bytes": vllm_options.cache_bytes(device, options),
            **options,
        }
        self._plans: OrderedDict[Any, Any] = OrderedDict()
        self._stops: dict[tuple[str, ...], Stops] = {}
        self._llm: Any = _start(
            device,
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length + SPARE_TOKENS,
            max_num_batched_tokens=batch_tokens,
            generation_config="vllm",
            load_format=load_format,
            seed=0,
            disable_log_stats=True,
            **self._options,
        )

    def set_generation(self, generation_config: Any) -> None:
        """Take a model's generation defaults, for the weights to come: penalty and EOS tokens."""
        self._penalty = inputs.repetition_penalty(generation_config, "vllm")
        self._ends = inputs.ends(generation_config, self.tokenizer)

    @property
    def packing(self) -> str:
        """Name and version of the batching with its token budget."""
        return vllm_options.packing_name(self._batch_tokens)

    @property
    def fingerprint(self) -> str:
        """Everything besides weights and requests that the numbers depend on."""
        import vllm

        kind = self._device
        if kind == "cuda":
            kind += f"/{torch.cuda.get_device_name()}".replace(" ", "-")
        else:
            kind += f"/{torch.backends.cpu.get_cpu_capability()}"
        return " ".join(
            [
                vllm_options.VERSION,
                f"vllm={vllm.__version__}",
                *library_versions("torch", "transformers", "lm-eval"),
                f"device={kind}",
                f"dtype={str(self._dtype).removeprefix('torch.')}",
                f"tokenizer={self._encoder.sha256[:16]}",
                f"batch_tokens={self._batch_tokens}",
                f"max_length={self.max_length}",
                f"batch_invariant={vllm.envs.VLLM_BATCH_INVARIANT}",
                *(f"{name}={value}".replace(" ", "") for name, value in sorted(self._options.items())),
            ]
        )

    def loglikelihood(self, requests: Sequence[Loglikelihood]) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, greedy decoding gives it) for each request."""
        return self._score(self._plan("scores", requests, inputs.scored_pairs))

    def loglikelihood_rolling(self, requests: Sequence[Rolling]) -> list[float]:
        """Return the log-probability of each text, in disjoint windows where it is longer than the model."""
        pairs, owners = self._plan("rolling", requests, inputs.rolling_pairs)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate(self, requests: Sequence[Generation]) -> list[Generated]:
        """Return the greedy continuations.

        A text ends at a stop string, at the tokenizer's or the model's EOS token, or after its number
        of tokens. The model's own `repetition_penalty` is applied, as by transformers' ``generate``.

        Raises:
            CandidateFailed: a logit is not finite.
            EngineLost: vLLM failed.
        """
        from vllm import SamplingParams

        prompts = self._plan("generate", requests, inputs.prompts)
        # vLLM's text is used only to stop: special tokens stay in it, since they may be stop strings. Its EOS
        # is that of the tokenizer's class, which beside a config need not be the class that was saved.
        settings = [
            SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                stop=[stop for stop in (*request.stops, self._encoder.eos) if stop],
                ignore_eos=True,
                stop_token_ids=sorted(self._ends),
                repetition_penalty=self._penalty,
                logprobs=0,
                flat_logprobs=True,
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
            )
            for request in requests
        ]
        self.forget()
        answers = []
        for request, output in zip(requests, self._ask(prompts, settings), strict=True):
            answer = output.outputs[0]
            _check_finite(answer.logprobs.logprobs)
            answers.append(self._text(request, answer.token_ids))
        return answers

    def _text(self, request: Generation, tokens: Sequence[int]) -> Generated:
        """Return what the Hugging Face engine makes of these tokens, whatever text vLLM has seen in them."""
        if request.stops not in self._stops:
            self._stops[request.stops] = Stops(request.stops, self._encoder)
        text = GrowingText(request, self._stops[request.stops], self._ends)
        for token in tokens:
            if text.append(token):
                text.look(self.tokenizer.decode(text.tail))
            if text.done:
                break
        return text.result(self.tokenizer)

    def swap(self, tensors: Iterable[tuple[str, torch.Tensor]], *, tied: bool) -> None:
        """Replace all weights in place, and forget what was computed with the old ones.

        Args:
            tensors: every tensor of the model, by its name on disk; must not raise before its end.
            tied: whether the head is the embedding.

        Raises:
            EngineLost: vLLM failed.
        """
        with self._losing("weights are swapped"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            if tied and self._device == "cpu":
                self._llm.apply_model(_pack_heads)
        self.forget()

    def forget(self) -> None:
        """Empty the prefix cache.

        Raises:
            EngineLost: it cannot be emptied: requests are running.
        """
        with self._losing("its prefix cache is emptied"):
            if self._llm.reset_prefix_cache() is not True:
                raise EngineLost("vLLM does not empty its prefix cache")

    def sentinel(self) -> Sentinel:
        """Return the greedy answer to a fixed prompt that fills a cache block.

        It is asked twice: what may be read from the prefix cache must be what is computed anew.

        Raises:
            CandidateFailed: a logit is not finite.
            EngineLost: the prefix cache holds what other weights have computed.
        """
        block = int(self._llm.llm_engine.vllm_config.cache_config.block_size)
        length = max(2, min(block + 9, self.max_length - _SENTINEL_TOKENS))
        tokens = int(self._llm.llm_engine.model_config.get_vocab_size())
        prompt = [(7919 * i + 11) % tokens for i in range(length)]
        read, computed = (self._sentinel(prompt, anew=anew) for anew in (False, True))
        if not replace(read, prompt=computed.prompt).agrees(computed, self.tolerance):
            self.alive = False
            raise EngineLost("vLLM answers from a prefix cache that other weights have filled")
        return computed

    def _sentinel(self, prompt: Sequence[int], *, anew: bool) -> Sentinel:
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0.0,
            max_tokens=_SENTINEL_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=_LIKELIEST if anew else None,
            flat_logprobs=True,
            skip_reading_prefix_cache=anew,
        )
        (output,) = self._ask([prompt], [settings])
        answer = output.outputs[0]
        scores = _prompt_scores(output.prompt_logprobs)[0] if anew else []
        _check_finite([*scores, *answer.logprobs.logprobs])
        return Sentinel(tuple(scores), tuple(answer.token_ids), tuple(answer.logprobs.logprobs))

    @property
    def tolerance(self) -> float:
        """How far log-probabilities of one model may lie apart for rounding alone."""
        return 1e-3 if self._dtype == torch.float32 else 0.1

    def close(self) -> None:
        """Let the model and its memory go. May be called twice."""
        llm, self._llm, self.alive = self._llm, None, False
        if llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _plan(self, kind: str, requests: Sequence[Any], make: Callable[..., Plan]) -> Plan:
        """Return the token ids of these requests; those of the last `_KEPT_PLANS` tuples are kept."""
        key = (kind, id(requests)) if isinstance(requests, tuple) else (kind, *requests)
        if key not in self._plans:
            # The requests are kept too, so that their identity stays theirs.
            self._plans[key] = requests, make(self._encoder, requests, self.max_length)
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan: Plan = self._plans[key][1]
        return plan

    def _score(self, pairs: Sequence[inputs.Pair]) -> list[tuple[float, bool]]:
        """Return each pair's log-probability and whether it is greedy; equal texts are computed once."""
        from vllm import SamplingParams

        texts = [
            tuple([*context, *continuation][-(self.max_length + 1) :]) for context, continuation in pairs
        ]
        unique = list(dict.fromkeys(texts))
        settings = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=_LIKELIEST, flat_logprobs=True, detokenize=False
        )
        outputs = self._ask(unique, [settings] * len(unique))
        scored = {
            text: _prompt_scores(output.prompt_logprobs) for text, output in zip(unique, outputs, strict=True)
        }
        answers = []
        for text, (_, continuation) in zip(texts, pairs, strict=True):
            logprobs, greedy = scored[text]
            count = len(continuation)
            answers.append((math.fsum(logprobs[-count:]), all(greedy[-count:])))
        return answers

    def _ask(self, prompts: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        with self._losing("it answers"):
            return list(
                self._llm.generate(
                    [{"prompt_token_ids": list(prompt)} for prompt in prompts], list(settings), use_tqdm=False
                )
            )

    @contextmanager
    def _losing(self, doing: str) -> Iterator[None]:
        """Count the engine as lost where vLLM fails: requests that it had begun would stay in it."""
        try:
            yield
        except (EvomergeError, EngineLost):
            self.alive = False
            raise
        except Exception as error:
            self.alive = False
            raise EngineLost(f"vLLM failed while {doing}: {loss(error) or _said(error)}") from error
        except BaseException:
            self.alive = False
            raise


def _start(device: str, **arguments: Any) -> Any:
    with _random_state_kept():
        try:
            import vllm
            from vllm.platforms import current_platform

            if current_platform.device_type != device:
                raise UserError(
                    f"engine.device: this build of vLLM runs on '{current_platform.device_type}', not on "
                    f"'{device}'; install the one for '{device}'"
                )
            return vllm.LLM(**arguments)
        except EvomergeError:
            raise
        except Exception as error:
            lost = loss(error)
            if lost is not None:
                raise EngineLost(f"vLLM does not start: {lost}") from error
            raise UserError(
                f"engine: vLLM does not start with this model and these options: {_said(error)}"
            ) from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undo that vLLM seeds the process's global generators when it starts."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(pytorch)


def _pack_heads(model: torch.nn.Module) -> None:
    """Pack heads for the CPU's matrix product again.

    vLLM's reload does so for layers that got weights; a tied head has none of its own, and would go on with
    what it packed before (vLLM 0.32).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _prompt_scores(found: Any) -> tuple[list[float], list[bool]]:
    """Return each prompt token's log-probability and whether greedy decoding gives it; the first has none.

    At each position vLLM lists the prompt's own token first, then the `_LIKELIEST`. Of equally likely tokens
    (bfloat16 has many) greedy decoding gives the first of the vocabulary; if all that are listed are equally
    likely, there may be an earlier one that is not.
    """
    logprobs, greedy = [], []
    for start, end in list(zip(found.start_indices, found.end_indices, strict=True))[1:]:
        own = found.logprobs[start]
        tied = [found.token_ids[i] for i in range(start + 1, end) if found.logprobs[i] == own]
        best = own >= max(found.logprobs[start:end])
        logprobs.append(own)
        first = not tied or found.token_ids[start] <= min(tied)
        greedy.append(best and first and len(tied) < _LIKELIEST)
    return logprobs, greedy


def _check_finite(logprobs: Iterable[float]) -> None:
    """Fail the candidate where a chosen token's log-probability is not finite: some logit is not."""
    if not all(map(math.isfinite, logprobs)):
        raise CandidateFailed("a logit is not finite")


def _said(error: Exception) -> str:
    """Return the sentence of an error that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return said.removeprefix("Value error, ").split(" [type=")[0]
