"""A LongNet in transformers' own tools: Auto classes, generate(), pipeline, Trainer; numbers against the LongNet."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from builders import tiny_net
from pattern_nets import llama_body

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.basics.model_files import MODEL_TYPE
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.integrations.transformers import LongNetCache, use_dilated_attention
from longnet_cli.jobs.encoding import EncodeFacts, encode
from longnet_cli.jobs.generating import generate
from longnet_cli.jobs.job_options import EncodeOptions
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import TRANSFORMERS_KEYS

BYTES = Tokenizer.bytes()
CACHE = (
    "cache"
    if "cache" in hf.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
    else "past_key_values"
)
NETS = {
    "xpos": {},
    "sinks": {
        "look_back": 1,
        "overlap": "once",
        "queries": "all",
        "sinks": 2,
        "position": "rope",
    },
    "untied": {"position": "rope", "tie_embeddings": False},
    "llama": {"position": "rope", "tie_embeddings": False, **llama_body(2)},
}
TEXTS = ["One text, which has some length, more than a segment.", "Two"]


@pytest.fixture(
    params=[
        "sinks",
        *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("xpos", "untied", "llama")),
    ]
)
def net(request: pytest.FixtureRequest) -> LongNet:
    return tiny_net(**NETS[request.param]).eval()


@pytest.fixture
def folder(net: LongNet, tmp_path: Path) -> Path:
    net.save_pretrained(tmp_path / "model", BYTES.to_json())
    return tmp_path / "model"


@pytest.fixture
def words(folder: Path) -> Any:
    found = hf.AutoTokenizer.from_pretrained(folder, padding_side="left")
    found.pad_token = found.eos_token
    return found


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_auto_classes_open_what_a_longnet_saves(net, folder):
    config = hf.AutoConfig.from_pretrained(folder)
    assert config.longnet == net.config
    assert (config.hidden_size, config.num_hidden_layers, config.eos_token_id) == (16, 2, 256)
    tokens = ids(2, 50)
    hidden = net(tokens)
    assert torch.equal(hf.AutoModel.from_pretrained(folder)(tokens).last_hidden_state, hidden)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    found = model(tokens, labels=tokens)
    assert torch.equal(found.logits, net.logits(hidden))
    torch.testing.assert_close(found.loss, net.nll(hidden[:, :-1], tokens[:, 1:]).mean())
    assert torch.equal(model(tokens, logits_to_keep=3).logits, found.logits[:, -3:])
    assert torch.equal(model(inputs_embeds=net.embedding(tokens)).logits, found.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], found.logits)
    words = hf.AutoTokenizer.from_pretrained(folder)
    assert words(TEXTS[0])["input_ids"] == BYTES.encode(TEXTS[0]).tolist()
    assert words.eos_token == "<|endoftext|>"


def test_layers_like_llamas_compute_what_transformers_llama_does():
    """In float64, on a dense pattern: outputs, and the gradient of each weight."""
    sizes = {"dim": 32, "num_heads": 4, "segment_lengths": (64,), "dilation_rates": (1,)}
    net = tiny_net(**NETS["llama"], **sizes).double()
    config = hf.LlamaConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, intermediate_size=32, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    llama = hf.LlamaForCausalLM(config).double()
    parts = {
        "embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head",
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "ffn.fc1": "mlp.up_proj", "ffn.gate": "mlp.gate_proj", "ffn.fc2": "mlp.down_proj",
    }  # fmt: skip

    def theirs(name: str, weight: torch.Tensor) -> torch.Tensor:
        """A pair of features that turn together are neighbours here, and half a head apart there."""
        if ".q." not in name and ".k." not in name:
            return weight
        return weight.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)

    named = {}
    for name, weight in net.named_parameters():
        layer, _, part = re.fullmatch(r"((layers\.\d+\.)?)(.+)\.weight", name).groups()
        parameter = llama.get_parameter(f"{'model.' if layer else ''}{layer}{parts[part]}.weight")
        parameter.data.copy_(theirs(name, weight.data))
        named[name] = parameter
    assert len(named) == len([*llama.parameters()])
    tokens = ids(2, 50)
    logits = net.logits(net(tokens))
    expected = llama(tokens).logits
    # transformers turns by angles in float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(
            theirs(name, weight.grad), named[name].grad, rtol=1e-4, atol=1e-4
        )


def test_what_does_not_know_a_longnet_names_the_import(folder, monkeypatch):
    monkeypatch.delitem(hf.CONFIG_MAPPING._extra_content, MODEL_TYPE)
    with pytest.raises(
        ValueError,
        match=r"model type `longnet: import longnet_cli\.integrations\.transformers` but",
    ):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_what_transformers_saves_is_a_longnet_again(net, folder, tmp_path):
    model, report = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    model.save_pretrained(tmp_path / "again")
    again = LongNet.from_pretrained(tmp_path / "again")
    assert again.config == net.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["model_type"], saved["eos_token_id"]) == (MODEL_TYPE, 256)
    model.config.save_pretrained(tmp_path / "again")  # the file alone, as transformers writes it
    assert LongNet.from_pretrained(tmp_path / "again").config == net.config
    torch.manual_seed(3)
    drawn = hf.AutoModelForCausalLM.from_config(model.config)
    torch.manual_seed(3)
    # drawn once, as a LongNet
    assert torch.equal(drawn.embedding.weight, LongNet(net.config).embedding.weight)


def test_a_resized_vocabulary_is_saved(folder, tmp_path):
    base = hf.AutoModel.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    for resized in (base, model):
        resized.resize_token_embeddings(300)
    assert base(ids(1, 20) + 40).last_hidden_state.shape == (1, 20, 16)
    model.save_pretrained(tmp_path / "large")
    large = LongNet.from_pretrained(tmp_path / "large").eval()
    assert large.config.vocab_size == 300
    with torch.no_grad():
        assert torch.equal(model(ids(1, 20)).logits, large.logits(large(ids(1, 20))))


def test_keys_that_transformers_writes_are_known_by_name_and_no_others(folder):
    assert {*hf.PretrainedConfig().to_dict()} <= TRANSFORMERS_KEYS
    path = folder / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | dict.fromkeys(TRANSFORMERS_KEYS - {"model_type"})))
    LongNet.from_pretrained(folder)
    path.write_text(
        json.dumps({key: value for key, value in data.items() if key not in TRANSFORMERS_KEYS})
    )
    LongNet.from_pretrained(folder)  # as it was saved before transformers was told of it
    with pytest.raises(ValueError, match="model_type"):
        hf.AutoConfig.from_pretrained(folder)
    path.write_text(json.dumps(data | {"sink": 1}))
    for load in (LongNet.from_pretrained, hf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match="unknown key 'sink': did you mean 'sinks'"):
            load(folder)
    path.write_text(json.dumps(data | {"model_type": "longnet"}))
    with pytest.raises(
        ConfigError, match=r"config\.json: model_type 'longnet' is not that of a LongNet"
    ):
        LongNet.from_pretrained(folder)


def test_weights_that_are_missing_are_an_error(folder):
    from safetensors.torch import load, save_file

    # a file that is replaced must not be mapped
    weights = load((folder / "model.safetensors").read_bytes())
    removed = weights.pop("layers.1.attention.q.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensor layers\.1\.attention\.q\.weight"):
        hf.AutoModelForCausalLM.from_pretrained(folder)
    surplus = weights | {"layers.1.attention.q.weight": removed, "other": removed.clone()}
    save_file(surplus, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected tensor other"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_come_out_alone(net, folder, side):
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    rows = [ids(1, 43)[0], ids(1, 9)[0], ids(1, 43)[0][:0]]
    padded = torch.zeros(3, 43, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        place = slice(43 - len(row), None) if side == "left" else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    found = model(padded, attention_mask=mask).logits
    for i, row in enumerate(rows[:2]):
        torch.testing.assert_close(found[i][mask[i].bool()], net.logits(net(row[None]))[0])


@pytest.mark.full
def test_it_generates_what_the_command_generates(net, folder, words):
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 40, "do_sample": False}
    inputs = words(TEXTS, padding=True, return_tensors="pt")
    found = model.generate(**inputs, **options, pad_token_id=256, return_dict_in_generate=True)
    assert isinstance(found[CACHE], LongNetCache)
    for i, text in enumerate(TEXTS):
        prompt = Document("0", BYTES.encode(text), None, "test")
        steps = list(generate(net, prompt, bos=None, tokenizer=BYTES, max_tokens=40, end_ids={256}))
        new = found.sequences[i, inputs["input_ids"].shape[1] :].tolist()
        assert new[: len(steps)] == [step.id for step in steps]
    plain = model.generate(**inputs, **options, pad_token_id=256, use_cache=False)
    assert torch.equal(found.sequences, plain)
    beams = [
        model.generate(
            **inputs,
            max_new_tokens=12,
            num_beams=3,
            do_sample=False,
            pad_token_id=256,
            use_cache=use,
        )
        for use in (True, False)
    ]
    assert torch.equal(*beams)
    own = LongNetCache(model.config)
    assert torch.equal(model.generate(**inputs, **options, pad_token_id=256, **{CACHE: own}), plain)
    size = own.nbytes
    model.generate(
        **inputs,
        max_new_tokens=90,
        do_sample=False,
        pad_token_id=256,
        **{CACHE: (more := LongNetCache(model.config))},
    )
    assert more.nbytes == size  # of what later tokens can see, and no more
    with pytest.raises(ValueError, match="takes no other cache"):
        model(ids(1, 5), past_key_values=hf.DynamicCache(config=model.config))


@pytest.mark.ci
@pytest.mark.parametrize("net", ["untied"], indirect=True)
def test_a_trainer_trains(net, folder, tmp_path):
    """The first loss is the LongNet's; its checkpoint is a LongNet, with the losses and logits that it evaluates."""
    pytest.importorskip("accelerate")
    tokens = ids(1, 40)
    data = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in tokens.tolist()] * 8
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    options |= {
        "use_cpu": True,
        "report_to": "none",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    arguments = hf.TrainingArguments(output_dir=str(tmp_path / "run"), disable_tqdm=True, **options)
    trainer = hf.Trainer(
        hf.AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=data
    )
    trainer.train()
    again = LongNet.from_pretrained(tmp_path / "run" / "checkpoint-4")
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    with torch.no_grad():
        expected = net.nll(net(tokens)[:, :-1], tokens[:, 1:]).mean()
    assert float(losses[0]) == pytest.approx(float(expected), abs=1e-5)
    assert losses == sorted(losses, reverse=True)
    labels = torch.tensor(data[0]["labels"])
    with torch.no_grad():
        logits = again.logits(again(tokens))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:])
    assert trainer.evaluate(data[:2])["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    predicted = trainer.predict(data[:2]).predictions
    torch.testing.assert_close(torch.tensor(predicted[:1]), logits)


@torch.no_grad()
def test_a_bidirectional_net_fills_masks(tmp_path):
    net = tiny_net(causal=False, position="rope").eval()
    net.save_pretrained(tmp_path)
    model = hf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :11] = 0
    found = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    alone = net.logits(net(tokens[1:, 11:]))
    torch.testing.assert_close(found.logits[1:, 11:], alone)
    assert found.loss > 0
    with pytest.raises(ValueError, match="bidirectional: open it with AutoModelForMaskedLM"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_causal_net_and_one_without_vocabulary_say_what_opens_them(folder, tmp_path):
    with pytest.raises(ValueError, match="causal: open it with AutoModelForCausalLM"):
        hf.AutoModelForMaskedLM.from_pretrained(folder)
    tiny_net(vocab_size=0).save_pretrained(tmp_path / "vectors")
    with pytest.raises(ValueError, match="no vocabulary: open it with AutoModel"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "vectors")
    hidden = hf.AutoModel.from_pretrained(tmp_path / "vectors")(
        inputs_embeds=torch.zeros(1, 5, 16)
    ).last_hidden_state
    assert hidden.shape == (1, 5, 16)


def test_what_a_longnet_does_not_do_is_refused(folder):
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokens = ids(1, 10)
    with pytest.raises(ValueError, match="packed texts"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]))
    with pytest.raises(ValueError, match="attention_mask must say of all 10 tokens"):
        model(tokens, attention_mask=torch.ones(1, 9))
    with pytest.raises(ConfigError, match="dilated attention of its own"):
        use_dilated_attention(model, Pattern.window(8))
    for kind in ("static", "offloaded", "quantized", "dynamic"):
        with pytest.raises(ValueError, match=f"cache of its own: no cache_implementation='{kind}'"):
            model.generate(tokens, max_new_tokens=2, cache_implementation=kind)
    with pytest.raises(ValueError, match="not generate by continuous batching"):
        model.generate_batch(tokens.tolist())


def test_settings_of_a_folder_are_kept_or_refused(folder, tmp_path):
    open_, tokens = hf.AutoModelForCausalLM.from_pretrained, ids(1, 10)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"no {name}"):
            open_(folder, **{name: True})(tokens)
    assert open_(folder)(tokens).get(CACHE) is None
    model = open_(folder, use_cache=True)
    assert isinstance(model(tokens).get(CACHE), LongNetCache)
    assert model(tokens, use_cache=False).get(CACHE) is None
    model.save_pretrained(tmp_path / "again")
    assert open_(tmp_path / "again").config.use_cache is True
    LongNet.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("net", ["sinks"], indirect=True)
def test_activations_are_computed_again(net, folder):
    """Loss and gradients stay the same, fewer tensors are saved, and the cache that the config asks for is not made."""
    tokens, runs = ids(1, 30), []
    model = hf.AutoModelForCausalLM.from_pretrained(folder, use_cache=True).train()
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        calls, saved = [], []
        hook = model.layers[0].attention.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        )
        with keep:
            output = model(tokens, labels=tokens)
        assert (output.get(CACHE) is None) is again
        model.zero_grad()
        output.loss.backward()
        hook.remove()
        runs.append((output.loss, [p.grad.clone() for p in model.parameters()]))
        assert len(calls) == 1 + again
        runs.append(sum(saved))
    torch.testing.assert_close(runs[2], runs[0])
    assert runs[3] < runs[1] / 2
    assert isinstance(model.eval()(tokens).get(CACHE), LongNetCache)
    model.gradient_checkpointing_disable()
    assert isinstance(model.train()(tokens).get(CACHE), LongNetCache)


@torch.no_grad()
@pytest.mark.parametrize("net", ["sinks", "untied"], indirect=True)
def test_the_base_model_and_the_output_matrix_make_the_logits(net, folder):
    """TRL puts them together itself; they are one model with the rest, also in a copy."""
    tokens = ids(2, 30)
    model = copy.deepcopy(hf.AutoModelForCausalLM.from_pretrained(folder))
    model.final_norm.weight *= 2
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    output = model.get_output_embeddings()
    logits = torch.nn.functional.linear(hidden, output.weight, output.bias)
    torch.testing.assert_close(logits, model(tokens).logits)
    assert (logits - net.logits(net(tokens))).norm() > 0.1
    assert type(model.base_model) is type(hf.AutoModel.from_pretrained(folder))


@pytest.mark.parametrize("causal", [True, False])
def test_vectors_are_those_of_encode(causal, tmp_path):
    net = tiny_net(position="rope", causal=causal).eval()
    net.save_pretrained(tmp_path, BYTES.to_json())
    documents = [Document(str(i), BYTES.encode(text), None, "test") for i, text in enumerate(TEXTS)]
    expected = (
        encode(net, documents, EncodeOptions(), EncodeFacts(256))
        .read_all()["embedding"]
        .to_pylist()
    )
    model, words = (
        hf.AutoModel.from_pretrained(tmp_path),
        hf.AutoTokenizer.from_pretrained(tmp_path),
    )
    words.pad_token = words.eos_token
    for side in ("left", "right"):
        inputs = words(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        trained = model.embed(**inputs)
        with torch.no_grad():
            found = model.embed(**inputs)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
        torch.testing.assert_close(trained, found, rtol=0, atol=1e-6)
        assert trained.requires_grad
    with torch.no_grad():  # an empty text is where its start token is
        start = torch.nn.functional.normalize(net(torch.tensor([[256]]))[0] * causal, dim=-1)
        for some in (["", TEXTS[1], ""], ["", ""]):
            vectors = model.embed(**words(some, padding=True, return_tensors="pt"))
            wanted = [torch.tensor(expected[1]) if text else start[0] for text in some]
            torch.testing.assert_close(vectors, torch.stack(wanted), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("net", ["sinks", "untied"], indirect=True)
def test_offloaded_weights_come_back_for_the_output(net, folder, tmp_path):
    """The logits are those of the LongNet wherever accelerate keeps the matrix, and never of other memory."""
    accelerate = pytest.importorskip("accelerate")
    tokens, cpu = ids(2, 30), torch.device("cpu")
    expected = net.logits(net(tokens))
    open_ = hf.AutoModelForCausalLM.from_pretrained
    accelerate.cpu_offload(in_cpu := open_(folder), cpu)
    accelerate.disk_offload(on_disk := open_(folder), str(tmp_path / "disk"), cpu)
    little = {"cpu": sum(p.nbytes for p in net.parameters()) * 4 // 5}
    by_size = open_(
        folder, device_map="auto", max_memory=little, offload_folder=str(tmp_path / "parts")
    )
    assert {p.is_meta for p in by_size.parameters()} == {False, True}
    for model in (in_cpu, on_disk, by_size):
        torch.testing.assert_close(model(tokens).logits, expected)
    accelerate.cpu_offload(net, cpu)
    if net.config.tie_embeddings:
        with pytest.raises(ConfigError, match="embedding, which logits need, is offloaded"):
            net.logits(net(tokens))
    else:
        torch.testing.assert_close(net.logits(net(tokens)), expected)


TRAINED = [
    {"modules_to_save": ["embedding"]},
    {"modules_to_save": ["output"]},
    {"modules_to_save": ["final_norm"]},
    {"trainable_token_indices": [3, 5]},
]


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("trained", TRAINED, ids=lambda trained: str(*trained.values()))
@pytest.mark.parametrize("net", ["sinks", "untied"], indirect=True)
def test_what_peft_puts_in_place_of_a_module_is_trained_and_saved(trained, folder, tmp_path):
    peft = pytest.importorskip("peft")
    tokens = torch.tensor([[3, 7, 5, 3, 9, 5]])
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"], **trained))
    adapted(tokens, labels=tokens).loss.backward()
    changed = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    still = {name for name, p in changed.items() if not p.grad.any()}
    assert {name.split(".")[-3] for name in still} == {"lora_A"}  # lora_B is zero so far
    assert any("lora" not in name for name in changed)
    with torch.no_grad():
        for parameter in changed.values():
            parameter -= parameter.grad
        expected = adapted.eval()(tokens).logits
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = LongNet.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged.logits(merged(tokens)), expected)
        fresh = hf.AutoModelForCausalLM.from_pretrained(folder)
        assert not torch.allclose(fresh(tokens).logits, expected)
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(again(tokens).logits, expected)
