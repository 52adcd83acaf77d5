"""Item by item, scores are those of lm-eval's own evaluator with its own Hugging Face model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evomerge.engines.hf import HFEngine
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from tests.evaluation.tiny import MEAN, build, documents, whole, write_task


def lm_eval_samples(path: Path, model: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    """Return what lm-eval logs for the documents of the data split `search`, sorted by filter."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = yaml.safe_load(path.read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {s: str(path.parent / f) for s, f in files.items()}
    loaded = TaskManager(include_defaults=False).load([deepcopy(config) | {"test_split": "search"}])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    max_length = options.pop("max_length", None)
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        device="cpu",
        softmax_dtype="float32",
        batch_size=16,
        max_length=max_length,
        **options.pop("lm", {}),
    )
    results = evaluate(lm, loaded, bootstrap_iters=0, log_samples=True, **options)
    assert results is not None
    return list(results["samples"][config["task"]])


def ours(
    folder: Path,
    model: Any,
    tokenizer: Any,
    task: Any,
    *,
    batch_tokens: int = 300,
    max_length: int = 512,
    **suite: Any,
) -> tuple[Any, Any, dict[int, Any]]:
    """Return suite, engine and the scores of the search items by document index."""
    built = build(folder, task, splits_needed=("search",), tokenizer=tokenizer, **suite)
    engine = HFEngine(model, tokenizer, batch_tokens=batch_tokens, max_length=max_length)
    scores = built.score(engine, whole(built), check_degenerate=False)
    index = {item.id: item.index for item in built.items("search")}
    return built, engine, {index[score.item]: score for score in scores}


def requests_of(sample: dict[str, Any]) -> list[Loglikelihood]:
    return [Loglikelihood(*arguments) for arguments in sample["arguments"]]


@pytest.mark.parametrize(("metric", "fewshot"), [("acc", 3), ("acc_norm", 0), ("brier_score", 0)])
def test_multiple_choice(tmp_path: Path, model: Any, tokenizer: Any, metric: str, fewshot: int) -> None:
    data = {
        s: documents(30 if s == "search" else 5, 1000 * i)
        for i, s in enumerate(("search", "validation", "test"))
    }
    data["shots"] = documents(9, 5000)
    brier = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    path = write_task(
        tmp_path,
        data=data,
        num_fewshot=fewshot,
        fewshot_split="shots",
        metric_list=[{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}, brier],
    )
    expected = lm_eval_samples(path, model, tokenizer)
    _, engine, scores = ours(tmp_path, model, tokenizer, {"task": "tiny", "metric": metric})

    assert len(scores) == len(expected) == 30
    for sample in expected:
        answers = engine.loglikelihood(requests_of(sample))
        theirs = [response[0] for response in sample["resps"]]
        np.testing.assert_allclose([a[0] for a in answers], [t[0] for t in theirs], rtol=1e-5)
        assert [a[1] for a in answers] == [t[1] for t in theirs]
        if metric == "brier_score":
            gold, probabilities = sample[metric]
            wanted = sum((p - (i == gold)) ** 2 for i, p in enumerate(probabilities))
            assert scores[sample["doc_id"]].raw == pytest.approx(wanted, rel=1e-5)
            assert scores[sample["doc_id"]].value == pytest.approx(1 - wanted / 2, rel=1e-5)
        else:
            assert scores[sample["doc_id"]].raw == scores[sample["doc_id"]].value == sample[metric]


def test_multiple_inputs(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    keys = {"doc_to_text": "{{gold}}", "doc_to_target": "{{answer}}", "target_delimiter": " "}
    path = write_task(tmp_path, **keys, metric_list=[{"metric": "acc", **MEAN}])
    expected = lm_eval_samples(path, model, tokenizer)
    _, _, scores = ours(tmp_path, model, tokenizer, {"task": "tiny", "group": "id"})
    assert [scores[s["doc_id"]].raw for s in expected] == [s["acc"] for s in expected]


def test_loglikelihood(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    path = write_task(tmp_path, kind="likelihood", doc_to_text="{{question}} ", target_delimiter="")
    expected = lm_eval_samples(path, model, tokenizer)
    _, _, scores = ours(tmp_path, model, tokenizer, {"task": "tiny", "metric": "perplexity"})
    for sample in expected:
        score = scores[sample["doc_id"]]
        np.testing.assert_allclose(np.log(score.value), sample["perplexity"], rtol=1e-5)
        np.testing.assert_allclose(np.log(score.raw), -sample["perplexity"], rtol=1e-5)


@pytest.mark.parametrize("max_length", [512, 16])
@pytest.mark.parametrize("metric", ["bits_per_byte", "word_perplexity", "byte_perplexity"])
def test_rolling(tmp_path: Path, model: Any, tokenizer: Any, metric: str, max_length: int) -> None:
    path = write_task(tmp_path, kind="rolling")
    expected = lm_eval_samples(path, model, tokenizer, max_length=max_length)
    _, _, scores = ours(tmp_path, model, tokenizer, {"task": "tiny", "metric": metric}, max_length=max_length)
    for sample in expected:
        logprob, weight = sample[metric]
        value = np.exp(logprob / weight)
        raw = -logprob / weight / np.log(2) if metric == "bits_per_byte" else np.exp(-logprob / weight)
        np.testing.assert_allclose(scores[sample["doc_id"]].value, value, rtol=1e-4)
        np.testing.assert_allclose(scores[sample["doc_id"]].raw, raw, rtol=1e-4)


FILTERS = [
    {
        "name": "digits",
        "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}],
    },
    {
        "name": "letters",
        "filter": [{"function": "regex", "regex_pattern": "([A-Z])"}, {"function": "take_first"}],
    },
]


# What the tiny model says is made of such characters.
@pytest.mark.parametrize(("until", "batch_tokens"), [(["\n"], 64), (["\x04=", "3\x7f"], 4096), (["+"], 700)])
def test_generation(tmp_path: Path, model: Any, tokenizer: Any, until: list[str], batch_tokens: int) -> None:
    shared = "A long beginning that all prompts have. "
    path = write_task(
        tmp_path,
        kind="generate",
        doc_to_text=shared + "{{question}}{% if gold > 1 %} Say more about it.{% endif %}\nAnswer:",
        generation_kwargs={"until": until, "max_gen_toks": 8, "do_sample": False},
        doc_to_target="{{choices[0][0]}}",
        filter_list=FILTERS,
    )
    expected = lm_eval_samples(path, model, tokenizer)
    for name in ("digits", "letters"):
        samples = [s for s in expected if s["filter"] == name]
        suite, engine, scores = ours(
            tmp_path,
            model,
            tokenizer,
            {"task": "tiny", "metric": f"exact_match,{name}"},
            batch_tokens=batch_tokens,
        )
        requests = [Generation(s["arguments"][0][0], tuple(until), 8) for s in samples]
        texts = [answer.text for answer in engine.generate(requests)]
        assert texts == [s["resps"][0][0] for s in samples]
        whole = engine.generate([Generation(request.context, (), 8) for request in requests])
        whole_texts = [answer.text for answer in whole]
        assert (texts == whole_texts) == (until == ["\n"])
        assert [scores[s["doc_id"]].raw for s in samples] == [s["exact_match"] for s in samples]
        items = {item.index: item for item in suite.items("search")}
        shown = [suite.preview(engine, items[s["doc_id"]]) for s in samples]
        assert [p.extracted for p in shown] == [s["filtered_resps"][0] for s in samples]
        assert [p.extracted_ok for p in shown] == [p.extracted != "[invalid]" for p in shown]
        assert [p.prompt for p in shown] == [s["arguments"][0][0] for s in samples]


def test_generation_of_a_model_with_eos_and_repetition_penalty(
    family: dict[str, Path], tokenizer: Any
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    prompts = [f"{word} and then some" for word in ("one", "two hundred", "three", "4")]
    plain = HFEngine(model, tokenizer, batch_tokens=500).generate([Generation(p, (), 20) for p in prompts])
    model.generation_config.repetition_penalty = 1.3
    # The byte that the model likes best ends the text, besides the tokenizer's own EOS.
    model.generation_config.eos_token_id = [1, tokenizer.encode(plain[0].text[0])[0]]
    kwargs = {"until": [], "max_gen_toks": 20, "do_sample": False}
    instances = [Instance("generate_until", {}, (p, kwargs), 0) for p in prompts]
    # One at a time: in a batch, HFLM penalises the padding token as if it had been in the prompt.
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1).generate_until(instances)
    ours = HFEngine(model, tokenizer, batch_tokens=500).generate([Generation(p, (), 20) for p in prompts])
    assert [answer.text for answer in ours] == theirs
    assert [answer.text for answer in ours] != [answer.text for answer in plain]


def test_chat_template(tmp_path: Path, family: dict[str, Path], model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family["base"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = write_task(tmp_path, description="Be brief.\n")
    expected = lm_eval_samples(path, model, tokenizer, apply_chat_template=True)
    suite, engine, scores = ours(tmp_path, model, tokenizer, "tiny", chat_template=True)
    assert [scores[s["doc_id"]].raw for s in expected] == [s["acc"] for s in expected]
    items = {item.index: item for item in suite.items("search")}
    contexts = [suite.preview(engine, items[s["doc_id"]]).prompt for s in expected]
    assert contexts == [s["arguments"][0][0] for s in expected]
    assert contexts[0].startswith("<user>Question")


PAIRS = [
    ("", "no context at all"),
    ("<s>own bos", " and more"),
    ("trailing spaces  ", "here"),
    ("   ", "only spaces before"),
    ("short", "!"),
    ("The context", " one"),
    ("The context", " two and longer"),
    ("The context", " t"),
    ("The context", " tw"),
    ("x" * 70, "y" * 25),
    ("x" * 70, "y"),
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("max_length", [200, 40])
def test_encodings_truncation_and_shared_contexts(tmp_path: Path, kind: str, max_length: int) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.models import make_model

    path = make_model(tmp_path / kind, kind=kind, tied=True, layers=2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = HFEngine(model, tokenizer, batch_tokens=128, max_length=max_length)
    assert "paths=head+tree" in engine.fingerprint
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=max_length, batch_size=2)
    pairs = [p for p in PAIRS if p[0].strip()] + [p for p in PAIRS if p[0] == ""]
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs], disable_tqdm=True)
    got = engine.loglikelihood([Loglikelihood(*p) for p in pairs])
    np.testing.assert_allclose([a for a, _ in got], [a for a, _ in theirs], rtol=1e-5)
    assert [g for _, g in got] == [g for _, g in theirs]
    texts = ["", "a", "z" * 100]
    wanted = [
        0.0,
        *lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts[1:]], True),
    ]
    np.testing.assert_allclose(engine.loglikelihood_rolling([Rolling(t) for t in texts]), wanted, rtol=1e-5)
