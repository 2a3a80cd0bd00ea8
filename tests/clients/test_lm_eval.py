"""The models of `longnet` in the real lm-eval (extra `lm-eval`): answers of its own class, and losses of `score`."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")

import transformers as hf
from builders import scores, tiny_llama, tiny_model
from files import write_lines
from lm_eval.models.huggingface import HFLM
from loopback_hub import fill_cache, read_folder

import longnet_cli.integrations.transformers
from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.lm_eval import LongNetLM
from longnet_cli.models.folder import ModelFolder

BYTES = Tokenizer.bytes()
SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
LEVELS = {"segment_lengths": (16, 64), "dilation_rates": (1, 2)}
TEXT = "A document that is longer than a chunk. " * 20
PAIRS = [
    ("What is", " this?"),
    ("", "begin"),
    ("One, two, ", "three"),
    (TEXT, "the end"),
    ("a", "b"),
]


def native(folder: Path) -> Path:
    return tiny_model(folder / "native", **SHAPE, **LEVELS, position="rope")


def dilated(folder: Path) -> Path:
    """A small Llama with a window and sinks, and the tokenizer of bytes."""
    plain = tiny_llama(folder / "plain", max_position_embeddings=64, intermediate_size=48)
    model = hf.LlamaForCausalLM.from_pretrained(plain).eval()
    use_dilated_attention(model, Pattern.window(16, sinks=4))
    model.bfloat16().save_pretrained(folder / "dilated")  # which is read in float32, as by score
    BYTES.save(folder / "dilated" / "tokenizer.json")
    settings = (native(folder) / "tokenizer_config.json").read_text()
    (folder / "dilated" / "tokenizer_config.json").write_text(settings)
    return folder / "dilated"


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


def answers(model: HFLM) -> tuple[list[Any], list[float]]:
    """What a model says to the three kinds of request: text and which continuations are greedy, and log-likelihoods."""
    text = model.generate_until(
        requests(("Once", {"until": [], "max_gen_toks": 9})), disable_tqdm=True
    )
    continuations = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    whole = model.loglikelihood_rolling(requests((TEXT,), ("short",)), disable_tqdm=True)
    return [*text, *(greedy for _, greedy in continuations)], [
        *(nats for nats, _ in continuations),
        *whole,
    ]


def assert_same_answers(found: HFLM, expected: HFLM) -> None:
    texts, numbers = answers(expected)
    assert answers(found) == (texts, pytest.approx(numbers, rel=1e-6))


@pytest.mark.parametrize("make", [native, dilated])
def test_a_folder_is_read_as_by_lm_evals_own_class(make, tmp_path):
    options = {
        "pretrained": str(make(tmp_path)),
        "device": "cpu",
        "batch_size": 2,
        "max_length": 500,
    }
    assert_same_answers(LongNetLM(**options), HFLM(**options, dtype="float32"))


@pytest.mark.parametrize("make", [native, dilated])
def test_a_pattern_is_as_if_it_stood_in_the_folder(make, tmp_path):
    folder, text = make(tmp_path), "8/1,32/4,look_back=1"
    model, pattern = hf.AutoModelForCausalLM.from_pretrained(folder), parse_pattern(text)
    if make is dilated:
        use_dilated_attention(model, pattern)
    else:
        model = hf.AutoModelForCausalLM.from_pretrained(folder, **asdict(pattern))
    model.save_pretrained(tmp_path / "other")
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "other")
    assert_same_answers(
        LongNetLM(str(folder), pattern=text),
        HFLM(str(tmp_path / "other"), device="cpu", dtype="float32"),
    )


@pytest.mark.parametrize("make", [native, dilated])
def test_a_whole_document_costs_what_score_says(make, tmp_path):
    """Also with chosen blocks."""
    folder = make(tmp_path)
    for text in (None, "window:128,chosen=2x8,chosen_every=8"):
        net = ModelFolder(folder).net(pattern=text and parse_pattern(text))
        (expected,) = scores(net, [Document("0", BYTES.encode(TEXT), None, "test")], bos=256)
        model = LongNetLM(str(folder), pattern=text, device="cpu", max_length=1000)
        (found,) = model.loglikelihood_rolling(requests((TEXT,)), disable_tqdm=True)
        assert found == pytest.approx(-expected.score.nll_sum, rel=1e-6)


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^sinks: lm-eval cuts at commas, .*\"pattern\": \"window:8,sinks=4\""
    ):
        LongNetLM("longnet-tiny", pattern="window:8", sinks=4)
    with pytest.raises(ConfigError, match="pattern: "):
        LongNetLM(str(native(tmp_path)), pattern="window:")
    encoder = tiny_model(tmp_path / "encoder", **SHAPE, **LEVELS, causal=False, position="rope")
    with pytest.raises(ConfigError, match="lm-eval needs a model that predicts the next token"):
        LongNetLM(str(encoder))


@pytest.mark.slow
def test_the_command_evaluates_a_task(tmp_path, command_env, run_python):
    """Bits per byte that lm-eval prints for a task of whole documents, and those of `score`. The model is a name."""
    folder, texts = native(tmp_path), [TEXT, "Another document, a short one."]
    write_lines(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    (tmp_path / "documents.yaml").write_text(
        "task: documents\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    commit = fill_cache(tmp_path / "hf/hub", "org/native", read_folder(folder))
    words = "-m longnet_cli.lm_eval --model longnet --tasks documents --include_path . --output_path out"
    command = [*words.split(), "--model_args"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    env = command_env | offline | {"HF_HOME": str(tmp_path / "hf")}
    run_python(*command, "pretrained=org/native", env=env)
    (path,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(path.read_text())["config"]["pretrained"] == f"org/native@{commit}"
    found = json.loads(path.read_text())["results"]["documents"]["bits_per_byte,none"]
    documents = [
        Document(str(i), BYTES.encode(text), len(text), "test") for i, text in enumerate(texts)
    ]
    expected = [each.score for each in scores(ModelFolder(folder).net(), documents, bos=256)]
    assert found == pytest.approx((expected[0] + expected[1]).bpb, rel=1e-6)
    missing = run_python(*command, "pretrained=./none", env=env, code=4)
    line = "longnet: error: none: no such folder; expected a model"
    assert missing.stderr.splitlines()[-1] == line


assert longnet_cli.integrations.transformers  # lm-eval's own class opens our folders by it
