"""The Hugging Face engine: a live module, scored with lm-eval's semantics by fewer tokens."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from evomerge.engines.decoding import GrowingText, mark_stopped, penalise
from evomerge.engines.encoding import Encoder
from evomerge.engines.packing import VERSION, GenerationBatch, ScoreBatch, pack_generations, pack_scores
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.requests import Generated, Generation, Loglikelihood, Rolling
from evomerge.losses import loss

Plan = TypeVar("Plan")
_KEPT_PLANS = 512
_LOGITS_AT_ONCE = 2**22
_UNSUPPORTED = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "sequence_bias", "exponential_decay_length_penalty", "guidance_scale",
)  # fmt: skip


def default_batch_tokens(device: str | torch.device) -> int:
    """Return the token budget of one forward pass where the config says ``auto``."""
    return 2048 if torch.device(device).type == "cpu" else 16384


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

    The weights may be replaced in place between calls: nothing that depends on them is kept. Numbers
    equal those of lm-eval's `HFLM` with ``softmax_dtype=float32`` up to rounding. Three savings are used
    where a trial on the given model shows that they change nothing else: the LM head runs at scored
    positions only, continuations of one context share its computation (tree attention), and so do
    prompts that begin alike.

    Args:
        model: a transformers causal LM, on `device`; put into eval mode.
        tokenizer: its tokenizer.
        batch_tokens: token budget of one forward pass.
        max_length: longest input, in tokens; longer ones lose their beginning.
        device: where the model is.

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
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be positive, not {batch_tokens}")
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        self.max_length = max_length or default_max_length(self.model.config, tokenizer)
        self._encoder = Encoder(tokenizer)
        self._plans: OrderedDict[Any, Any] = OrderedDict()
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._splits_head = self._try(self._head_is_linear)
        self._forks = self._splits_head and self._try(self._tree_matches)

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
        versions = (
            f"{name}={importlib.metadata.version(name)}" for name in ("torch", "transformers", "lm-eval")
        )
        paths = "+".join(n for n, on in (("head", self._splits_head), ("tree", self._forks)) if on) or "plain"
        return " ".join(
            [
                VERSION,
                *versions,
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
        batches = self._plan(("scores", *requests), lambda: self._pack_pairs(requests))
        sums, greedy = self._score(batches, len(requests))
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Rolling]) -> list[float]:
        """Return the log-probability of each text, in disjoint windows where it is longer than the model."""
        batches, owners = self._plan(("rolling", *requests), lambda: self._pack_windows(requests))
        sums, _ = self._score(batches, len(owners))
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
        batches = self._plan(("generate", *requests), lambda: self._pack_prompts(requests))
        answers = [Generated("")] * len(requests)
        for batch in batches:
            wanted = [requests[number] for number in batch.requests]
            for number, answer in zip(batch.requests, self._generate(batch, wanted), strict=True):
                answers[number] = answer
        return answers

    def _plan(self, key: Any, make: Callable[[], Plan]) -> Plan:
        """Return the plan of these requests; the last `_KEPT_PLANS` are kept."""
        if key not in self._plans:
            self._plans[key] = make()
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan: Plan = self._plans[key]
        return plan

    def _pack_pairs(self, requests: Sequence[Loglikelihood]) -> tuple[ScoreBatch, ...]:
        pairs = [self._encoder.pair(request.context, request.continuation) for request in requests]
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"the answer {request.continuation!r:.60} has {len(continuation)} tokens, "
                    f"it needs 1 to {self.max_length} (the model's length) to be scored"
                )
        return self._pack(pairs)

    def _pack_windows(
        self, requests: Sequence[Rolling]
    ) -> tuple[tuple[ScoreBatch, ...], np.ndarray[Any, Any]]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self._encoder.encode(request.text)
            for window in get_rolling_token_windows(tokens, self._encoder.prefix, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        return self._pack(pairs), np.array(owners, dtype=np.int64)

    def _pack(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[ScoreBatch, ...]:
        return pack_scores(
            pairs,
            batch_tokens=self.batch_tokens,
            max_length=self.max_length,
            tree=self._forks,
            device=self.device,
        )

    def _pack_prompts(self, requests: Sequence[Generation]) -> tuple[GenerationBatch, ...]:
        prompts = []
        for request in requests:
            room = self.max_length - request.max_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks {request.max_tokens} leaves no room for a prompt: "
                    f"the model's length is {self.max_length} tokens"
                )
            prompts.append(self._encoder.prompt(request.context)[-room:])
        return pack_generations(
            prompts,
            batch_tokens=self.batch_tokens,
            share_prefix=self._forks,
            device=self.device,
        )

    def _score(
        self, batches: Sequence[ScoreBatch], count: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return each request's log-probability (float64 sums of float32) and whether it is greedy."""
        sums = np.zeros(count)
        greedy = np.ones(count, dtype=bool)
        for batch in batches:
            logprobs_N, greedy_N = self._score_batch(batch)
            numbers = np.array(batch.requests)
            sums[numbers] = np.add.reduceat(logprobs_N.double().cpu().numpy(), batch.starts)
            greedy[numbers] = np.logical_and.reduceat(greedy_N.cpu().numpy(), batch.starts)
        return sums, greedy

    def _score_batch(self, batch: ScoreBatch) -> tuple[Tensor, Tensor]:
        if not self._splits_head:
            logits = self.model(batch.ids_BL, use_cache=False).logits
            return _pick(logits.flatten(0, 1)[batch.scored_N], batch.targets_N)
        if batch.branch_BL is None:
            hidden = self._body(batch.ids_BL)
        else:
            hidden = self._body(
                batch.ids_BL, attention_mask=batch.mask_BLL(), position_ids=batch.positions_BL
            )
        hidden_ND = hidden.flatten(0, 1)[batch.scored_N]
        head = self.model.get_output_embeddings()
        rows = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
        parts = [
            _pick(head(hidden_ND[i : i + rows]), batch.targets_N[i : i + rows])
            for i in range(0, len(hidden_ND), rows)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _body(self, ids_BL: Tensor, **inputs: Any) -> Tensor:
        """Return the last hidden states (B, L, D)."""
        hidden: Tensor = self.model.base_model(input_ids=ids_BL, use_cache=False, **inputs)[0]
        return hidden

    def _penalty(self) -> float:
        """Return the model's repetition penalty; refuse generation settings that would be ignored."""
        config = getattr(self.model, "generation_config", None)
        for name in _UNSUPPORTED:
            if getattr(config, name, None) not in (None, 0, [], 1 if name == "guidance_scale" else None):
                raise UserError(
                    f"generation_config.json: {name}: not supported by the hf engine; remove it from the base model"
                )
        if (getattr(config, "num_beams", None) or 1) != 1:
            raise UserError("generation_config.json: num_beams: the hf engine decodes greedily; remove it")
        return float(getattr(config, "repetition_penalty", None) or 1.0)

    def _ends(self) -> frozenset[int]:
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
        return frozenset(token for token in ids if token is not None)

    def _forward(
        self, ids_BL: Tensor, cache: Any, mask: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Any]:
        """Return the last position's logits (B, V) and the cache."""
        last = {"logits_to_keep": 1} if self._selects else {}
        out = self.model(
            input_ids=ids_BL,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def _generate(self, batch: GenerationBatch, requests: Sequence[Generation]) -> list[Generated]:
        B, L = batch.ids_BL.shape
        P = len(batch.prefix)
        device = self.device
        penalty, ends = self._penalty(), self._ends()

        cache = None
        prefix = torch.tensor([batch.prefix], dtype=torch.long, device=device)
        if P:
            _, cache = self._forward(prefix, None, None, torch.arange(P, device=device)[None])
            cache.batch_repeat_interleave(B)
        lengths = torch.tensor(batch.lengths, device=device)
        rest = (torch.arange(L, device=device) >= L - lengths[:, None]).long()
        positions = (P + rest.cumsum(1) - 1).clamp(min=0)
        mask = None
        if min(batch.lengths) < L:
            mask = torch.cat([rest.new_ones(B, P), rest], dim=1)
        seen = torch.cat([prefix.expand(B, P), batch.ids_BL], dim=1)
        logits, cache = self._forward(batch.ids_BL, cache, mask, positions)
        position = P + lengths

        texts = [GrowingText(request, self._encoder, ends) for request in requests]
        rows = list(texts)
        while True:
            if not torch.isfinite(logits).all():
                raise CandidateFailed("a logit is not finite")
            if penalty != 1.0:
                logits = penalise(logits, seen, penalty)
            chosen = logits.argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                row.append(token)
            mark_stopped(rows, self.tokenizer)
            running = [slot for slot, row in enumerate(rows) if not row.done]
            if not running:
                return [text.result(self.tokenizer) for text in texts]
            # A row that is done may stay a while: taking rows out of the cache copies it.
            if len(running) <= 0.75 * len(rows):
                keep = torch.tensor(running, device=device)
                cache.batch_select_indices(keep)
                chosen, position, seen = chosen[keep], position[keep], seen[keep]
                mask = None if mask is None else mask[keep]
                rows = [rows[slot] for slot in running]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if penalty != 1.0:
                seen = torch.cat([seen, chosen[:, None]], dim=1)
            logits, cache = self._forward(chosen[:, None], cache, mask, position[:, None])
            position = position + 1

    def _try(self, trial: Callable[[], bool]) -> bool:
        """Whether a saving works on this model; one that raises does not, unless the engine is lost with it."""
        try:
            with torch.inference_mode():
                return trial()
        except CandidateFailed:
            raise
        except Exception as error:
            if loss(error) is not None:
                raise
            return False

    def _head_is_linear(self) -> bool:
        """Whether logits are the output embedding of the base model's last hidden state, and no more."""
        ids = torch.arange(1, 6, device=self.device)[None]
        whole = self.model(ids, use_cache=False).logits
        if not torch.isfinite(whole).all():
            raise CandidateFailed("a logit is not finite")
        return bool(torch.equal(self.model.get_output_embeddings()(self._body(ids)), whole))

    def _tree_matches(self) -> bool:
        """Whether two branches behind one context get the hidden states that they get alone."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        windowed = (
            window is not None and getattr(config, "use_sliding_window", True) and window < self.max_length
        )
        if kinds != {"full_attention"} or (getattr(config, "layer_types", None) is None and windowed):
            return False
        pairs = [([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3], [5, 4, 7])]
        options: dict[str, Any] = {"batch_tokens": 64, "max_length": 64, "device": self.device}
        (forked,) = pack_scores(pairs, tree=True, **options)
        if forked.branch_BL is None:
            return False
        together = self._score_batch(forked)[0].double()
        alone = [
            self._score_batch(b)[0].double()
            for pair in pairs
            for b in pack_scores([pair], tree=False, **options)
        ]
        # Far above rounding, far below what a wrong mask does.
        tolerance = torch.finfo(self.model.dtype).eps ** 0.5 * max(1.0, float(together.abs().max()))
        return bool(torch.allclose(together, torch.cat(alone), rtol=0, atol=tolerance))


def _pick(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets' float32 log-probabilities and whether each is the argmax."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return target_N - logits_NV.logsumexp(1), logits_NV.argmax(1) == targets_N
