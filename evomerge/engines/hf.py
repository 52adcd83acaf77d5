"""The Hugging Face engine: a live module, scored with lm-eval's semantics by fewer tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from evomerge.engines import inputs
from evomerge.engines.decoding import GrowingText, Stops
from evomerge.engines.encoding import Encoder
from evomerge.engines.generation import Decoder, generate_plain, rows_at_once
from evomerge.engines.hops import SharedHops
from evomerge.engines.live import LiveModel
from evomerge.engines.packing import VERSION, PromptBatch, ScoreBatch, pack_prompts, pack_scores
from evomerge.engines.prefixes import Prefixes
from evomerge.engines.reordering import ReorderedWeights
from evomerge.engines.scoring import score_all
from evomerge.engines.trials import try_hops, try_reordering, try_savings
from evomerge.environment import library_versions
from evomerge.evaluation.requests import Generated, Generation, Listener, Loglikelihood, Rolling

if TYPE_CHECKING:
    from evomerge.merging.live_paths import LivePath

Plan = TypeVar("Plan")
_KEPT_PLANS = 2048


def default_batch_tokens(device: str | torch.device) -> int:
    """Return the token budget of one forward pass where the config says ``auto`` and nothing is probed.

    On a CPU, 256 to 1024 tokens are equally fast for models of any width and larger batches slower.
    """
    return 512 if torch.device(device).type == "cpu" else 8192


def packing_name(batch_tokens: int) -> str:
    """Return name and version of the batching with its token budget, as blocks carry it."""
    return f"{VERSION}:{batch_tokens}"


def default_max_length(config: Any, tokenizer: Any) -> int:
    """Return the model's length as lm-eval resolves it: config, then tokenizer, then 2048."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else 2048


class HFEngine:
    """Scores and generates with a causal language model that lives in this process.

    The weights may be replaced in place between calls if `weights_changed` is called. Numbers equal those
    of lm-eval's `HFLM` with ``softmax_dtype=float32`` up to rounding. What is saved, where a trial on the
    given model shows that it changes nothing else (see `trials`): the LM head runs at scored positions
    only; continuations of one context share its computation (tree attention); what many texts begin with,
    such as few-shot examples, is computed once for all calls until the weights change; short texts share
    rows; on a CPU the weights of a small bfloat16 model are brought into the order of its matrix products
    once, with the same bits. Texts are generated together, whatever their prompts' lengths, and a text that
    is done makes room for the next prompt.

    Args:
        model: a transformers causal LM, on `device`; put into eval mode.
        tokenizer: its tokenizer.
        batch_tokens: token budget of one forward pass.
        max_length: longest input, in tokens; longer ones lose their beginning.
        device: where the model is.
        hops: what layer paths share; nothing by default.

    Raises:
        CandidateFailed: the model's logits are not finite, so that the trial says nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_tokens: int,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
        hops: SharedHops | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be positive, not {batch_tokens}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        self.max_length = max_length or default_max_length(self.model.config, tokenizer)
        self._encoder = Encoder(tokenizer)
        self._plans: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
        self._stops: dict[tuple[str, ...], Stops] = {}
        self._live = LiveModel(model, self.device, self.max_length, hops)
        self._prefixes = Prefixes(self._live)
        self._reordered = ReorderedWeights(model)
        try_savings(self._live)
        try_reordering(self._live, self._reordered)

    def weights_changed(self) -> None:
        """Forget what was computed with the weights as they were."""
        self._prefixes.clear()
        self._reordered.forget()

    def follow(self, path: LivePath | None, branches: Collection[int]) -> None:
        """Know which layers the model has now, so that what other paths have computed of them is used.

        Args:
            path: the layers; None: the model is no layer path.
            branches: after how many hops waiting paths leave it.
        """
        if path is not None:
            try_hops(self._live, path)
        self._live.hops.begin(path, branches)

    def listen(self, listener: Listener) -> None:
        """Tell a listener, while requests are answered, how many more are."""
        self._live.listener = listener

    @property
    def packing(self) -> str:
        """Name and version of the batching with its token budget."""
        return packing_name(self.batch_tokens)

    @property
    def fingerprint(self) -> str:
        """Everything besides weights and requests that the numbers depend on."""
        parameter = next(self.model.parameters())
        kind = self.device.type
        if kind == "cuda":
            kind += f"/{torch.cuda.get_device_name(self.device)}".replace(" ", "-")
        elif kind == "cpu":
            kind += f"/{torch.backends.cpu.get_cpu_capability()}"
            # How a matrix product is cut over threads changes its bits.
            threads = torch.get_num_threads()
            kind += "" if threads == 1 else f"/{threads}-threads"
        paths = (
            "+".join(n for n, on in (("head", self._live.splits_head), ("tree", self._live.forks)) if on)
            or "plain"
        )
        return " ".join(
            [
                VERSION,
                *library_versions("torch", "transformers", "lm-eval"),
                f"device={kind}",
                f"dtype={str(parameter.dtype).removeprefix('torch.')}",
                f"attention={getattr(self.model.config, '_attn_implementation', None)}",
                f"paths={paths}",
                f"tokenizer={self._encoder.sha256[:16]}",
                f"batch_tokens={self.batch_tokens}",
                f"max_length={self.max_length}",
            ]
        )

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Loglikelihood]) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, greedy decoding gives it) for each request."""
        batches = self._plan("scores", requests, lambda: self._pack_pairs(requests))
        with self._reordered.used():
            sums, greedy = score_all(self._live, self._prefixes, batches, len(requests))
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Rolling]) -> list[float]:
        """Return the log-probability of each text, in disjoint windows where it is longer than the model."""
        batches, owners = self._plan("rolling", requests, lambda: self._pack_windows(requests))
        with self._reordered.used():
            sums, _ = score_all(self._live, self._prefixes, batches, len(owners))
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, sums)
        return [float(total) for total in totals]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Generation]) -> list[Generated]:
        """Return the greedy continuations.

        A text ends at a stop string, at the tokenizer's or the model's EOS token, or after its number
        of tokens. The model's own `repetition_penalty` is applied, as by transformers' ``generate``.

        Raises:
            CandidateFailed: a logit is not finite.
            UserError: the model's generation config asks for what is not supported here.
        """
        config = getattr(self.model, "generation_config", None)
        penalty, ends = inputs.repetition_penalty(config, "hf"), inputs.ends(config, self.tokenizer)
        prompts, batches, rows = self._plan(
            f"generate at {self._live.token_bytes} bytes", requests, lambda: self._pack_prompts(requests)
        )
        texts = [GrowingText(request, self._stops_of(request), ends) for request in requests]
        with self._reordered.used():
            if batches is not None:
                decoder = Decoder(self._live, self._prefixes, rows=rows, penalty=penalty)
                decoder.run(batches, prompts, texts, self.tokenizer)
            else:
                generate_plain(
                    self._live,
                    prompts,
                    texts,
                    [request.max_tokens for request in requests],
                    batch_tokens=self.batch_tokens,
                    ends=ends,
                    tokenizer=self.tokenizer,
                )
        return [text.result(self.tokenizer) for text in texts]

    def _plan(self, kind: str, requests: Sequence[Any], make: Callable[[], Plan]) -> Plan:
        """Return the plan of these requests; the last `_KEPT_PLANS` are kept.

        A tuple that was planned before is known by its identity: nothing of it is read again.
        """
        key = (kind, id(requests)) if isinstance(requests, tuple) else (kind, *requests)
        if key not in self._plans:
            # The requests are kept too, so that their identity stays theirs.
            self._plans[key] = requests, make()
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan: Plan = self._plans[key][1]
        return plan

    def _pack_pairs(self, requests: Sequence[Loglikelihood]) -> tuple[ScoreBatch, ...]:
        return self._pack(inputs.scored_pairs(self._encoder, requests, self.max_length))

    def _pack_windows(
        self, requests: Sequence[Rolling]
    ) -> tuple[tuple[ScoreBatch, ...], np.ndarray[Any, Any]]:
        pairs, owners = inputs.rolling_pairs(self._encoder, requests, self.max_length)
        return self._pack(pairs), np.array(owners, dtype=np.int64)

    def _pack(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[ScoreBatch, ...]:
        return pack_scores(
            pairs,
            batch_tokens=self.batch_tokens,
            max_length=self.max_length,
            tree=self._live.forks,
            one_length=self._live.length_matters,
            device=self.device,
        )

    def _pack_prompts(
        self, requests: Sequence[Generation]
    ) -> tuple[list[list[int]], tuple[PromptBatch, ...] | None, int]:
        """Return the prompts' tokens, their batches (None for the plain way), and how many texts grow at once."""
        prompts = inputs.prompts(self._encoder, requests, self.max_length)
        if not self._live.forks:
            return prompts, None, 0
        longest = max(
            (len(prompt) + request.max_tokens for prompt, request in zip(prompts, requests, strict=True)),
            default=1,
        )
        rows = min(rows_at_once(self._live, longest), max(1, len(prompts)))
        batches = pack_prompts(prompts, batch_tokens=self.batch_tokens, most=rows, device=self.device)
        return prompts, batches, rows

    def _stops_of(self, request: Generation) -> Stops:
        if request.stops not in self._stops:
            self._stops[request.stops] = Stops(request.stops, self._encoder)
        return self._stops[request.stops]
