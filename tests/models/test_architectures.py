"""Models of any architecture are right, or refused in one line: each is tried first, with all of its settings.

`pytest -m slow -s tests/models/test_architectures.py` tries all of transformers, and prints what each one does.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from hf_models import LEVELS, WINDOW, built, ids, llama, mixed
from processes import invoke, refused
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.basics.errors import ConfigError, InputWarning
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf import trying
from longnet_cli.models.hf.pretrained_net import TransformersNet
from longnet_cli.models.hf.trying import hidden_states
from longnet_cli.running.causal_stream import open_stream

# sizes, by the names that configurations have for them: the first that fits
SIZES = {
    r".*vocab_size.*": 97,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_(size|dim)": 64,
    r"n_layers?|(num_)?(hidden_|decoder_|encoder_)?layers": 2,
    r".*(key_value|kv)_heads|index_n_heads|linear_num_\w+_heads": 2,
    r"mamba_n(um)?_heads": 8,
    r".*heads|n_head": 4,
    r"qk_(rope|nope)_head_dim|hidden_size_per_layer_input|rotary_dim": 8,
    r".*head_dim|dim_head|kv_channels|mamba_d_head|\w*d_state|\w*state_size|kv_lora_rank|index_topk|rel_extent": 16,
    r"(sliding|local)_window.*|sliding_window|.*chunk_size|window_size": 16,
    r"(dense_|prefix_dense_)?intermediate_size.*|.*ffn_(hidden_size|dim)|dff|dim_ff|n_inner": 48,
    r".*(intermediate|ffn_hidden)_size": 32,
    r"n(um)?_(routed_|local_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_k|(mamba_)?expand|type_vocab_size": 2,
    r"n_group|topk_group|n(um)?_shared_experts|first_k_dense_replace|(mamba_)?n_groups": 1,
    r"max_position_embeddings|n_positions|n_ctx": 1024,
    r"(attention|attn|hidden|activation|resid|embd|embed)\w*_(dropout|pdrop|dropout_prob)|.*_pdrop|dropout": 0.0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"pad_token_id|num_kv_shared_layers": 0,
    r"is_decoder": True,
    r"q_lora_rank": 24,
}
# what a model type needs besides
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "mistral": {"sliding_window": None},  # as in all since its first version
    "moshi": {"audio_vocab_size": 32},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"]},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """Return the configuration of a model type, of one layer of each kind that it has, or of two equal ones."""
    cls = hf.CONFIG_MAPPING[kind]
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    settings = {**MORE.get(kind, {}), **settings}
    sizes: dict[str, Any] = {}
    for name, default in fields.items():
        size = next((x for pattern, x in SIZES.items() if re.fullmatch(pattern, name)), None)
        if (
            size is not None
            and not ("window" in name and default is None)
            and not isinstance(default, list)
        ):
            sizes[name] = size
    if "qk_rope_head_dim" in fields:  # latent attention has no groups of heads
        sizes.pop("head_dim", None)
        sizes |= {"num_key_value_heads": 4} if "num_key_value_heads" in fields else {}
    if (
        "layer_types" in fields
        and "layer_types" not in settings
        and (kinds := [*dict.fromkeys(cls().layer_types or [])])
    ):
        kinds = kinds if kinds[1:] else kinds * 2
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return cls(**sizes | settings)


WIDE = Pattern((1024,), (1,))
SLIDING = {
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 16,
}
SHARED = {"num_hidden_layers": 6, "num_kv_shared_layers": 3}
SHARED |= {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "activation_sparsity_pattern": [0.0] * 6,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 1e4,
}
MOST = 5_000_000  # parameters of a model that is tried: those of images stay large


@pytest.fixture(autouse=True)
def _nothing_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def grown(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Give a model random weights that are large enough for attention to matter."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "sink" in name:
                x.normal_(0, 2)
            elif x.dim() > 1:
                x.normal_(0, 1 if "embed" in name or "wte" in name else 1.2 / x.shape[-1] ** 0.5)
            elif x.is_floating_point():
                x.add_(torch.randn_like(x) * 0.1)
    return model.eval()


@contextmanager
def saved(name: str, **settings: Any) -> Iterator[Path]:
    """Make a folder of a tiny model. Raises whatever transformers raises for one that it cannot make."""
    torch.manual_seed(0)
    config = tiny_config(name, **settings)
    with torch.device("meta"):
        if sum(x.numel() for x in hf.AutoModelForCausalLM.from_config(config).parameters()) > MOST:
            raise ValueError("not a small model")
    with TemporaryDirectory() as place:
        grown(hf.AutoModelForCausalLM.from_config(config)).save_pretrained(place)
        yield Path(place)


def outcome(folder: Path, pattern: Pattern | None) -> tuple[str, str]:
    """Return how a model is read, and why not otherwise: "chunks", "whole", "refused", or "wrong".

    Expected are hidden states of transformers' eager attention, or of the dense reference with the pattern.
    """
    try:
        net: Any = ModelFolder(folder).net(pattern=pattern)
    except ConfigError as error:  # exit code 2
        return "refused", str(error)
    x = ids(140, 1)
    other = type(net.model).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = hidden_states(other, x)
        if pattern:
            with trying.attending(net.model, "dilated_reference"):
                expected = hidden_states(net.model, x)
        found = [net(x)]
        if net.config.streams:
            stream = open_stream(net)
            found.append(
                torch.cat([stream(part) for part in x.split((50, 1, 1, *[7] * 12, 4), 1)], 1)
            )
    if any((each - expected).abs().max() > 1e-4 * expected.abs().max() for each in found):
        return "wrong", ""
    return ("chunks" if net.config.streams else "whole"), net.note


@pytest.mark.ci
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "settings", "own", "pattern", "why"),
    [
        (
            "llama",
            {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1},
            "chunks",
            "chunks",
            "",
        ),
        ("qwen3", SLIDING | {"rope_parameters": YARN}, "chunks", "chunks", ""),
        (
            "phi",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "chunks",
            "chunks",
            "",
        ),
        ("gemma3n_text", SHARED, "chunks", "chunks", ""),
        ("gemma4_text", SHARED, "chunks", "chunks", ""),  # layers of several sizes
        ("gemma4_text", SHARED | {"layer_types": ["full_attention"] * 6}, "chunks", "chunks", ""),
        ("gemma2", {}, "chunks", "refused", "dilated attention has no softcap"),
        ("gemma2", {"attn_logit_softcapping": None}, "chunks", "chunks", ""),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "whole",
            "refused",
            "cannot be run with a pattern",
        ),
        (
            "qwen2_moe",
            SLIDING,
            "chunks",
            "refused",
            "Qwen2MoeForCausalLM cannot be run with a pattern",
        ),
        ("electra", {"embedding_size": 32}, "chunks", "chunks", ""),
        ("hrm_text", {"L_cycles": 1}, "chunks", "chunks", ""),
        (
            "hrm_text",
            {"num_layers_per_stack": 2, "num_hidden_layers": 3},
            "whole",
            "whole",
            "cannot be run in chunks",
        ),
        ("mimo_v2_flash", {}, "chunks", "refused", "dilated attention has no s_aux"),
        ("roberta", {}, "chunks", "chunks", ""),  # its positions start after the padding's
        (
            "diffllama",
            {},
            "chunks",
            "whole",
            "DiffLlamaForCausalLM in chunks, with a pattern differs",
        ),
        ("moshi", {}, "whole", "refused", "MoshiForCausalLM in chunks differs"),
        (
            "deepseek_v32",
            {},
            "whole",
            "refused",
            "DeepseekV32ForCausalLM cannot be run with a pattern",
        ),
        (
            "recurrent_gemma",
            {},
            "whole",
            "refused",
            "every layer of this model has a sliding window",
        ),
        ("bamba", {}, "whole", "whole", ""),  # an infinity in its config.json
    ],
)
def test_settings_that_change_attention(name, settings, own, pattern, why):
    if name not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    with saved(name, **settings) as folder:
        found = [outcome(folder, None), outcome(folder, LEVELS)]
    assert [each[0] for each in found] == [own, pattern], found
    assert why in found[0][1] + found[1][1]


@pytest.mark.slow
def test_every_architecture_is_right_or_refused():
    tally: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMES:
            with ExitStack() as stack:
                try:
                    folder = stack.enter_context(saved(name))
                except Exception as error:  # each class has reasons of its own
                    found = {
                        None: (
                            "not made",
                            f"{type(error).__name__}: {' '.join(str(error).split())[:80]}",
                        )
                    }
                else:
                    found = {form: outcome(folder, form) for form in (None, LEVELS, WINDOW)}
            print(f"{name}: {'; '.join(' '.join(filter(None, each)) for each in found.values())}")
            tally.update(how for how, _ in found.values())
    print(tally)
    assert not tally["wrong"]
    assert tally["chunks"] + tally["whole"] > 250


def forwards(model: hf.PreTrainedModel) -> list[int]:
    """Count the tokens of each forward pass from now on."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    trying.body(model).register_forward_pre_hook(count, with_kwargs=True)
    return counts


def test_a_model_is_tried_once_for_its_settings_and_weights():
    yarn = {"rope_parameters": YARN}
    for changes, scale, times in (({}, 1, 3), ({}, 1, 0), (yarn, 1, 3), ({}, 2, 3)):
        net = built(llama, **changes)
        net.lm_head.weight.data.mul_(scale)
        counts = forwards(net)
        use_dilated_attention(net, WIDE)
        TransformersNet(net)
        assert [x for x in counts if x > 2 and x != 31][:times] == [64] * times
        assert bool(counts.count(64)) == bool(times)
    net = built(mixed)
    counts = forwards(net)
    use_dilated_attention(net, WIDE)
    assert counts == [17, 17]  # one more than its window


def test_a_trial_leaves_the_model_as_it_was():
    net = built(llama).train()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    use_dilated_attention(net, Pattern.window(16, sinks=2))
    assert net.training
    assert net.config.dilated_attention["segment_lengths"] == [16]
    assert net.config._attn_implementation == "dilated"
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(x.grad is None and x.requires_grad for x in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_attention_is_refused_with_the_difference(dtype, monkeypatch):
    """A model whose attention function loses what is below zero, as ours once lost sinks."""
    torch.manual_seed(0)
    net = grown(built(llama)).to(dtype)

    def lossy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        return dilated_attention(q.relu(), k.relu(), v.relu(), *args, **options)

    monkeypatch.setattr("longnet_cli.models.hf.attention.dilated_attention", lossy)
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM with a pattern differs .* by 0\.\d+ of its nats"
    ):
        use_dilated_attention(net, WIDE)


def test_a_long_trial_is_said(monkeypatch):
    monkeypatch.setattr(trying, "_LONG", 0.0)
    with pytest.warns(
        InputWarning, match=r"LlamaForCausalLM was tried with a pattern, on 64 tokens in \d+ s"
    ):
        use_dilated_attention(built(llama), WIDE)


def test_what_the_command_says(tmp_path):
    """A refusal in one line with exit code 2; a note where chunks are not read; the same numbers for any chunk."""
    rows = pa.table({"input_ids": [[*range(3, 90)]]})
    with (
        pa.OSFile(str(tmp_path / "ids.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, rows.schema) as writer,
    ):
        writer.write_table(rows)
    options = ["score", tmp_path / "ids.arrow", "--format", "json", "--bos", "1", "--model"]
    for name, settings, pattern, said in (
        (
            "deepseek_v32",
            {},
            ["--pattern", "window:16"],
            "DeepseekV32ForCausalLM cannot be run with a pattern (Type",
        ),
        (
            "electra",
            {"embedding_size": 32},
            [],
            "ElectraForCausalLM does more to its logits than multiply",
        ),
    ):
        with saved(name, **settings) as folder:
            error = refused(*options, folder, *pattern)
            assert error.exit_code == 2
            assert said in str(error)
    with saved("diffllama") as folder:
        results = [
            invoke(*options, folder, "--pattern", "window:16", "--chunk", n) for n in (8, 100)
        ]
    assert {result.exit_code for result in results} == {0}
    assert results[0].stdout == results[1].stdout
    assert all(
        "DiffLlamaForCausalLM in chunks, with a pattern differs" in x.stderr
        and x.stderr.count("in one forward") == 1
        for x in results
    )


def test_models_of_images_and_texts(tmp_path):
    """CLIP is refused in one line, and its part that reads texts takes no vectors, not even none."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = hf.CLIPConfig(text_config={**sizes, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
                           vision_config={**sizes, "image_size": 32, "patch_size": 16})  # fmt: skip
    hf.CLIPModel(config).save_pretrained(tmp_path / "both")
    hf.CLIPTextModel(config.text_config).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"CLIPModel is not a text Transformer") as caught:
        ModelFolder(tmp_path / "both").net()
    assert len(str(caught.value)) < 300
    with torch.no_grad():
        assert ModelFolder(tmp_path / "text").net(pattern=WIDE)(ids(20)).shape == (2, 20, 32)


def test_a_model_that_cannot_run_is_refused_in_one_line(monkeypatch):
    with saved("llama") as folder:

        def broken(*args: Any, **options: Any) -> None:
            raise TypeError("two\nlines")

        monkeypatch.setattr(hf.models.llama.modeling_llama.LlamaMLP, "forward", broken)
        with pytest.raises(
            ConfigError, match=r"LlamaForCausalLM cannot be run .* \(TypeError: two lines\)$"
        ):
            ModelFolder(folder).net()
