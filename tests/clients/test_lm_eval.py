"""The models of `longnet` in the real lm-eval (extra `lm-eval`): log-likelihoods against its own class and `score`."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'longnet-cli[lm-eval]'")

import transformers as hf
from builders import tiny_model
from loopback_hub import fill_cache, read_folder

import longnet_cli.integrations.transformers
from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents import Document
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.jobs.generating import generate
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.lm_eval import LongNetLM
from longnet_cli.models.folder import ModelFolder

BYTES = Tokenizer.bytes()
SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
LEVELS = {"segment_lengths": (16, 64), "dilation_rates": (1, 2)}
TEXT = "A document that is longer than a chunk. " * 20
PAIRS = [("What is", " this?"), ("", "begin"), ("One, two, ", "three"), (TEXT, "the end"), ("a", "b")]


def native(folder: Path) -> Path:
    return tiny_model(folder / "native", **SHAPE, **LEVELS)


def dilated(folder: Path) -> Path:
    """A small Llama with a window and sinks, and the tokenizer of bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=BYTES.vocab_size, **sizes, max_position_embeddings=64, bos_token_id=256)
    model = use_dilated_attention(hf.LlamaForCausalLM(config).eval(), Pattern.window(16, sinks=4))
    model.save_pretrained(folder / "dilated")
    BYTES.save(folder / "dilated" / "tokenizer.json")
    settings = (native(folder) / "tokenizer_config.json").read_text()
    (folder / "dilated" / "tokenizer_config.json").write_text(settings)
    return folder / "dilated"


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


@pytest.mark.parametrize("make", [native, dilated])
def test_continuations_are_as_likely_as_for_lm_evals_own_class(make: Any, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    folder = make(tmp_path)
    others = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=4096, batch_size=2)
    expected = others.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for options in ({}, {"chunk": 37}):  # the long context is read in chunks
        found = LongNetLM(pretrained=str(folder), device="cpu", **options).loglikelihood(requests(*PAIRS))
        assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], rel=1e-6)
        assert [each[1] for each in found] == [each[1] for each in expected]


@pytest.mark.parametrize("make", [native, dilated])
def test_the_likeliest_continuation_is_greedy(make: Any, tmp_path: Path) -> None:
    model = LongNetLM(pretrained=str(make(tmp_path)), device="cpu")
    text = model.generate_until(requests(("Once", {"until": [], "max_gen_toks": 3})))[0]
    prompt = Document("0", BYTES.encode("Once"), None, "prompt")
    steps = list(generate(model.net, prompt, bos=None, tokenizer=BYTES, max_tokens=3, end_ids={256}))
    assert text == "".join(step.text for step in steps)
    ids = [step.id for step in steps]
    (likely, greedy), (_, other) = model._loglikelihood_tokens(
        [("", model.tok_encode("Once"), ids), ("", model.tok_encode("Once"), [ids[0] ^ 1, *ids[1:]])]
    )
    assert (greedy, other) == (True, False)
    assert likely == pytest.approx(sum(step.logprob for step in steps), rel=1e-5)


@pytest.mark.parametrize("make", [native, dilated])
def test_whole_documents_cost_what_score_says_in_any_chunks(make: Any, tmp_path: Path) -> None:
    folder, texts = make(tmp_path), [TEXT, "short", ""]
    documents = [Document(str(i), BYTES.encode(text), None, "test") for i, text in enumerate(texts)]
    net = ModelFolder(folder).net()
    expected = [-each.score.nll_sum for each in score(net, documents, bos=256)]
    for chunk in (None, 37, 4096):
        model = LongNetLM(pretrained=str(folder), device="cpu", chunk=chunk)
        found = model.loglikelihood_rolling(requests(*((text,) for text in texts)))
        assert found == pytest.approx(expected, rel=1e-6)
    cut = LongNetLM(pretrained=str(folder), device="cpu", max_length=64)
    windows = [-each.score.nll_sum for each in score(net, documents, bos=256, context=64)]
    assert cut.loglikelihood_rolling(requests(*((text,) for text in texts))) == pytest.approx(windows, rel=1e-6)


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    folder = native(tmp_path)
    with pytest.raises(ConfigError, match="pattern: "):
        LongNetLM(pretrained=str(folder), pattern="window:")
    with pytest.raises(ConfigError, match="generation has no num_beams"):
        LongNetLM(pretrained=str(folder), device="cpu").generate_until(requests(("a", {"num_beams": 4})))


@pytest.mark.slow
def test_the_command_evaluates_a_task(tmp_path: Path, command_env: dict[str, str]) -> None:
    """Bits per byte that lm-eval prints for a task of whole documents, and those of `score`. The model is a name."""
    folder, texts = native(tmp_path), [TEXT, "Another document, a short one."]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "documents.yaml").write_text(
        "task: documents\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    command = [sys.executable, "-m", "longnet_cli.lm_eval", "--model", "longnet", "--tasks", "documents"]
    commit = fill_cache(tmp_path / "hf/hub", "org/native", read_folder(folder))
    command += ["--model_args", "pretrained=org/native,chunk=64", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out")]
    env = command_env | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(path.read_text())["config"]["pretrained"] == f"org/native@{commit}"
    found = json.loads(path.read_text())["results"]["documents"]["bits_per_byte,none"]
    documents = [Document(str(i), BYTES.encode(text), len(text), "test") for i, text in enumerate(texts)]
    scores = [each.score for each in score(ModelFolder(folder).net(), documents, bos=256)]
    assert found == pytest.approx((scores[0] + scores[1]).bpb, rel=1e-6)
    missing = [word.replace("org/native", "./none") for word in command]
    done = subprocess.run(missing, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == "longnet: error: none: no such folder; expected a model"


assert longnet_cli.integrations.transformers  # lm-eval's own class opens our folders by it
