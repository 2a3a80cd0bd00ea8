"""The jobs and commands on folders of transformers: numbers are those of the model itself, whatever the chunk; what
cannot be run is refused in one line.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from builders import MadeInputs, make_document, scores, tiny_llama
from hf_models import (
    CAUSAL,
    CHOSEN,
    FAR,
    GROUPED,
    LEVELS,
    MODELS,
    TILED,
    WINDOW,
    bert,
    built,
    gpt2,
    ids,
    llama,
    mixed,
    modernbert,
    nats_from,
    qwen2,
    qwen3,
    rotary,
)
from processes import invoke, refused, total

from longnet_cli.attention import Pattern
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.spans import Lanes
from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.jobs.encoding import EncodeFacts, Encoder, encode
from longnet_cli.jobs.job_options import EncodeOptions
from longnet_cli.jobs.row_jobs import Output, write_rows
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf.pretrained_net import TransformersNet
from longnet_cli.running.causal_stream import CausalStream, open_stream
from longnet_cli.running.reader import Reader

OPTIONS = ["--pattern", "8/1,24/3,60/5"]
TEXT = "Far keys are one more branch, and branches merge. " * 6  # 300 tokens of a byte each
SMALL = {"vocab_size": 257, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
SMALL |= {"intermediate_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def net_of(
    model: Callable[..., hf.PreTrainedModel],
    attention: str = "dilated",
    pattern: Pattern = LEVELS,
    **changes,
) -> TransformersNet:
    """`attention` "dense" is ours, "own" that of transformers."""
    found = built(model, **changes)
    if attention == "own":
        return TransformersNet(found)
    return TransformersNet(
        use_dilated_attention(found, Pattern.dense() if attention == "dense" else pattern)
    )


def sliding() -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(
        hf.MistralConfig(**SMALL, sliding_window=16, num_key_value_heads=2)
    )


def assert_stream_is_whole(stream: Callable[..., torch.Tensor], net: TransformersNet) -> None:
    found, start = [], 0
    for size in (50, 1, 1, 7, 1, 33, 20, 1, 26):
        found.append(stream(ids(140)[:, start : start + size]))
        start += size
    with torch.no_grad():
        expected = net.model.base_model(ids(140), use_cache=False).last_hidden_state
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "attention"),
    [*((model, "own") for model in (*CAUSAL, mixed, sliding)), (mixed, "dilated")],
)
def test_a_stream_with_the_cache_of_transformers_is_the_whole(model, attention):
    net = net_of(model, attention)
    assert net.config.memory == "cache"
    # a LongNetCache keeps few
    assert net.note == "" if attention == "dilated" else "keeps all keys" in net.note
    assert_stream_is_whole(open_stream(net), net)


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        *((x, LEVELS) for x in CAUSAL),
        *((llama, Pattern.dense()), (llama, FAR), (qwen2, TILED), (qwen3, GROUPED), (gpt2, WINDOW)),
        *((x, CHOSEN) for x in (llama, gpt2)),
    ],
)
def test_a_stream_is_the_whole(model, pattern):
    """In chunks that cut segments of every level, single tokens too; it remembers only what can be seen later."""
    net = net_of(model, pattern=pattern)
    c = net.config
    assert (c.memory, c.pattern) == ("segments", pattern)
    assert (net.note == "") == (pattern != Pattern.dense())
    stream = open_stream(net)
    assert isinstance(stream, CausalStream)
    assert_stream_is_whole(stream, net)
    rows = cached_rows(Lanes(pattern, c.num_heads, c.kv_heads))
    if pattern not in (Pattern.dense(), CHOSEN):  # which remember all
        assert stream.cache_bytes <= 4 * 2 * 2 * c.num_layers * c.head_dim * rows


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn", "partial", "neighbours"])
def test_a_document_is_the_same_at_any_position(kind):
    """Float32 phases are off by 0.06 at 10^6 and noise at 10^8."""
    net = TransformersNet(
        use_dilated_attention(built(rotary, kind=kind), Pattern.window(20, sinks=3))
    )
    assert net.config.max_tokens is None
    near = nats_from(net, ids(120), 40)
    for start in (10**6, 10**8):
        assert (nats_from(net, ids(120), start) - near).abs().max() <= 1e-4
    assert net.model.base_model.rotary_emb._forward_hooks.popitem()
    assert (nats_from(net, ids(120), 10**8) - near).abs().max() > 1e-2


def test_positions_that_are_made_in_another_way_end(monkeypatch):
    """Where nothing says what the columns are, a document ends before float32 phases are noise."""
    made = hf.models.llama.modeling_llama.LlamaRotaryEmbedding
    forward = made.forward
    monkeypatch.setattr(
        made,
        "forward",
        lambda self, x, position_ids: [y.flip(-1) for y in forward(self, x, position_ids)],
    )
    net = TransformersNet(built(llama))
    assert net.config.max_tokens == 1 << 20


@pytest.mark.parametrize("attention", ["dilated", "dense", "own"])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_scores_are_those_of_the_models_own_loss(model, attention):
    """Of documents alone and in company, in one chunk and in many."""
    net = net_of(model, attention)
    documents = [make_document(length) for length in (130, 3, 260, 1, 50)]
    for chunk in (10_000, 64, 7):
        rows = list(scores(net, documents, bos=0, chunk=chunk))
        for document, row in zip(documents, rows, strict=True):
            tokens = torch.tensor([[0, *document.tokens.tolist()]])
            with torch.no_grad():
                logits = net.model(tokens[:, :-1], use_cache=False).logits
            expected = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
            assert row.score.nll_sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", ["dilated", "dense", "own"])
@pytest.mark.parametrize("model", [llama, bert, modernbert])
def test_vectors_are_the_means_of_the_models_own_hidden_states(model, attention):
    net = net_of(model, attention)
    documents = [make_document(length) for length in (5, 33, 1, 200, 64)]
    for chunk in (1000, 40):
        table = encode(
            net, documents, EncodeOptions(normalize=False), EncodeFacts(0), chunk=chunk
        ).read_all()
        before = [0] if net.config.causal else []
        for document, vector in zip(documents, table["embedding"].to_numpy(), strict=True):
            with torch.no_grad():
                inputs = torch.tensor([before + document.tokens.tolist()])
                hidden = net.model.base_model(inputs).last_hidden_state[0, len(before) :]
            np.testing.assert_allclose(vector, hidden.mean(0).numpy(), atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_saved_is_loaded(model, tmp_path):
    """Every architecture from its folder, its own class, its pattern with all options; sharded weights too."""
    saved = use_dilated_attention(built(model), FAR)
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    net = ModelFolder(tmp_path).net()
    auto = (
        hf.AutoModelForCausalLM if model in CAUSAL else hf.AutoModelForMaskedLM
    ).from_pretrained(tmp_path)
    assert type(net.model) is type(auto) is type(saved)
    assert (net.config.pattern, net.config.causal) == (FAR, model in CAUSAL)
    with torch.no_grad():
        hidden = saved.base_model(ids(70)).last_hidden_state
        assert torch.equal(net(ids(70)), hidden)
        assert torch.equal(
            hf.AutoModel.from_pretrained(tmp_path)(ids(70)).last_hidden_state, hidden
        )
        assert torch.equal(auto(ids(70)).logits, saved(ids(70)).logits)
    other = ModelFolder(tmp_path).net(pattern=Pattern((16,), (1,)))
    assert other.config.pattern == Pattern((16,), (1,))
    assert not torch.equal(other(ids(70)), net(ids(70)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without a pattern, with a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("llama")
    tiny_llama(place, **SMALL, num_key_value_heads=2)
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    return place


def test_the_real_command(folder, run_longnet):
    """Nothing but the one value on stdout, nothing on stderr: no progress bar and no advice of transformers."""
    done = run_longnet(
        f"score --ppl {folder}/text.txt --model {folder}", *OPTIONS, "--format", "json", "-q"
    )
    assert (done.returncode, done.stderr) == (0, "")
    here = json.loads(
        invoke(f"score {folder}/text.txt --model {folder}", *OPTIONS, "--format", "json").stdout
    )
    assert json.loads(done.stdout)["total"] == here["total"]
    assert here["total"]["n_tokens"] == here["total"]["n_bytes"] == 300


def test_a_cache_of_transformers_is_not_saved(tmp_path):
    built(mixed).save_pretrained(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    words = f"generate -i {tmp_path}/x.jsonl --format jsonl -m {tmp_path} --save-state new"
    assert "this model keeps a cache of its own" in str(refused(words))


def test_score_with_options(folder):
    def ppl(*options: str) -> float:
        result = invoke(f"score {folder}/text.txt --model {folder} --format json", *options, code=0)
        assert ("it keeps all keys of a document" in result.stderr) == ("dense" in options)
        assert ("dense attention as it was trained, on up to 2048 tokens" in result.stderr) == (
            not options
        )
        return json.loads(result.stdout)["total"]["ppl"]

    dilated, dense = ppl(*OPTIONS), ppl()
    assert ppl("--pattern", "dense") == dense
    assert ppl("--pattern", "dense", "--chunk", "64") == pytest.approx(dense, rel=1e-6)
    assert ppl("--pattern", "1Ki/1") == pytest.approx(dense, rel=1e-6)
    assert not math.isclose(dilated, dense, rel_tol=1e-4)


def test_what_decides_the_vectors_decides_what_can_be_resumed(folder, tmp_path):
    def run(**options) -> None:
        net = ModelFolder(folder).net(**options)
        job = Encoder(Reader(net), EncodeOptions(), EncodeFacts(256))
        write_rows(
            job, MadeInputs((), made=[make_document(20)]), Output(tmp_path / "out", resume=True)
        )

    run(pattern=LEVELS)
    run(pattern=LEVELS)
    for other in ({"pattern": Pattern((8,), (1,))}, {"pattern": Pattern.dense()}):
        with pytest.raises(ConfigError, match="model"):
            run(**other)


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder with another config.json."""

    def make(**changes) -> Path:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        config = json.loads((folder / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None})
        )
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModel": "mine.Mine"}, "model_type": "hyena"},
            "code of the folder's own .* is never run",
        ),
        (
            {"model_type": "hyena"},
            r"does not know the architecture LlamaForCausalLM \(model_type hyena\)",
        ),
        ({"hidden_size": "many"}, "config.json: "),
        (
            {"num_hidden_layers": 1_000_000_000},
            r"num_hidden_layers: .* less than or equal to 10000 \(got 1000000000\)",
        ),
        ({"num_hidden_layers": "2"}, r"num_hidden_layers: .* valid integer \(got '2'\)"),
        (
            {"num_key_value_heads": 0},
            r"config.json: num_key_value_heads: .* greater than 0 \(got 0\)",
        ),
        (
            {"max_position_embeddings": 1 << 63},
            "max_position_embeddings: .* less than or equal to 9223372036854775807",
        ),
        ({"text_config": 3}, r"config.json: text_config: .* \(got 3\)"),
        (
            {"text_config": {"model_type": 3}},
            r"config.json: text_config.model_type: .* valid string \(got 3\)",
        ),
        ({"architectures": 3}, r"config.json: architectures: .* valid list \(got 3\)"),
        ({"pad_token_id": 257}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"rope_parameters": {"rope_type": [1], "rope_theta": 1e4}}, "unhashable"),
        ({"architectures": ["BertModel"]}, "does not know the architecture BertModel"),
        ({"architectures": ["pipeline"]}, "does not know the architecture pipeline"),
        (
            {"dilated_attention": {"segment_lengths": [8], "dilation_rates": []}},
            "one entry per level",
        ),
        ({"dilated_attention": [8, 1]}, "dilated_attention in the model's config: a table of "),
        (
            {"dilated_attention": {"lookback": 1}},
            "unknown key 'lookback': did you mean 'look_back'?",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type dynamic",
        ),
    ],
)
def test_configurations_that_are_refused(spoilt, changes, message):
    place = spoilt(
        **{"dilated_attention": {"segment_lengths": [8], "dilation_rates": [1]}} | changes
    )
    (place / "mine.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ConfigError, match=message) as caught:
        ModelFolder(place).net()
    assert str(place) in str(caught.value)
    assert caught.value.exit_code == 2


def test_settings_beside_the_model(spoilt, folder):
    """What transformers would return does not matter; an id before each text does."""
    place, text = (
        spoilt(return_dict="", output_attentions=True, torchscript=True),
        folder / "text.txt",
    )
    assert total(text, "-m", place)["nll_sum"] == total(text, "-m", folder)["nll_sum"]
    assert invoke(f"generate hello -m {place} -n 2").exit_code == 0
    assert "it reads the id -1 before a text" in str(
        refused(f"score {text} -m", spoilt(bos_token_id=-1))
    )
    (place / "generation_config.json").write_text("null")
    for more in ([], ["--dry-run"]):
        assert "generation_config.json: not a JSON object" in str(
            refused(f"score {text} -m {place}", *more)
        )


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    built(llama).save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/model.safetensors"):
        path.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(
            ConfigError, match=rf"index.json: the file {name} is outside of the folder"
        ):
            ModelFolder.find(str(tmp_path))


@pytest.mark.parametrize("named", ["dilated", "somebody/kernel", "eager"])
def test_an_attention_that_config_json_names_is_not_used(spoilt, named):
    levels = {"segment_lengths": [8], "dilation_rates": [1]}
    code = {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}  # never run
    place = spoilt(
        attn_implementation=named, _attn_implementation=named, dilated_attention=levels, **code
    )
    (place / "mine.py").write_text("raise SystemExit('this must never run')")
    assert ModelFolder(place).net().model.config._attn_implementation == "dilated"


@pytest.mark.parametrize("attention", ["dilated", "dense"])
def test_a_decoder_that_its_configuration_makes_bidirectional(attention):
    net = net_of(llama, attention, is_causal=False)
    assert (net.config.causal, net.config.memory) == (False, "none")
    with torch.no_grad():
        alone = net(ids(50))
        padded = net(
            torch.cat([ids(50), torch.zeros(2, 30, dtype=torch.int64)], 1), lengths=[50, 50]
        )[:, :50]
    assert (alone - padded).abs().max() <= 1e-5 * alone.abs().max()


def test_weights_that_are_refused(spoilt, folder):
    place = spoilt(num_hidden_layers=3)
    with pytest.raises(
        CheckpointError, match=r"missing tensors model\.layers\.2\.input_layernorm\.weight"
    ):
        ModelFolder(place).net(pattern=LEVELS)
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors model\.layers\.1\.input_layernorm\.weight"
    ):
        ModelFolder(spoilt(num_hidden_layers=1)).net(pattern=LEVELS)
    with pytest.raises(
        CheckpointError,
        match=r"lm_head.weight has shape \(257, 48\), and the net needs \(300, 48\)",
    ):
        ModelFolder(spoilt(vocab_size=300)).net(pattern=LEVELS)
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ModelFolder(place).net(pattern=LEVELS)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    error = refused(f"score {place}/config.json --model {place}", *OPTIONS)
    assert error.exit_code == 4
    assert "pickled weights are never read" in str(error)


def test_a_model_without_a_tokenizer_is_refused(spoilt, folder):
    text, place = folder / "text.txt", spoilt()
    (place / "tokenizer.json").unlink()
    error = refused(f"score {text} --model {place}", *OPTIONS)
    assert (error.exit_code, "tokenizer" in str(error)) == (2, True)


@pytest.mark.ci
@pytest.mark.full
@pytest.mark.parametrize(
    ("library", "words", "extra"),
    [
        ("transformers", ["score", "text.txt", "--model", "./"], "hf"),
        ("gguf", ["convert", "m.gguf", "-o", "out"], "gguf"),
    ],
)
def test_without_a_library(library, words, extra, folder, command_env):
    (folder / "m.gguf").write_bytes(b"GGUF")
    script = (
        f"import sys; sys.modules['{library}'] = None; from longnet_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(
        command, cwd=folder, env=command_env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.rstrip().endswith(f"pip install '.[{extra}]'")


def test_models_that_cannot_score():
    headless = hf.LlamaModel(hf.LlamaConfig(**SMALL, num_key_value_heads=2))
    with pytest.raises(ConfigError, match="LlamaModel has no output layer"):
        list(scores(TransformersNet(headless), [make_document(9)], bos=0))


def test_positions_that_end():
    """RoBERTa keeps the first places of its table for the padding."""
    config = hf.RobertaConfig(**SMALL | {"pad_token_id": 1}, max_position_embeddings=34)
    net = TransformersNet(hf.RobertaModel(config))
    assert net.config.max_tokens == 32
    encode(net, [make_document(32)], EncodeOptions(), EncodeFacts(None)).read_all()
    with pytest.raises(ConfigError, match="33 tokens, and the model has 32 positions"):
        encode(net, [make_document(33)], EncodeOptions(), EncodeFacts(None)).read_all()
