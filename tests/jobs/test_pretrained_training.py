"""A decoder of transformers trains as a LongNet does: exact in chunks and over ranks, resumed as uninterrupted, and
what it leaves is a folder that transformers opens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from builders import metrics_of, tiny_llama, write_corpus
from many_ranks import mesh, run_ranks
from processes import contents

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.events import Events
from longnet_cli.jobs.training.checkpoint import checkpoints_in, tensor_names
from longnet_cli.jobs.training.costs import estimate_training
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.objective import backward
from longnet_cli.jobs.training.recipe import PretrainedRecipe, Recipe, load_recipe
from longnet_cli.jobs.training.step_bytes import far_bytes
from longnet_cli.models.folder import ModelFolder
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.memory_maps import MappedMemory
from longnet_cli.running.ranks.ranks import Ranks

pytestmark = pytest.mark.full

SIZES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
WINDOW = "window:16,sinks=3"
NESTED = Pattern((8, 32), (1, 4), look_back=1, overlap="once", queries="all", sinks=2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path, 100, 4)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The folder of a small Llama of random weights, larger than an initialisation has them, so that layers matter."""
    tiny_llama(tmp_path / "llama", **SIZES, initializer_range=0.2, bos_token_id=257)
    (tmp_path / "llama/tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return tmp_path / "llama"


def recipe(llama: Path, corpus: Path, **changes: object) -> Recipe:
    """Windows of 96 tokens, three chunks of 32 each: longer than a chunk, and than the model was trained on."""
    settings: dict[str, Any] = {
        "init": str(llama),
        "model.pattern": WINDOW,
        "data.train": [str(corpus)],
        "data.held_out": [str(corpus.with_name("held_out.txt"))],
        "optimizer.lr": 1e-3,
        "schedule.warmup_steps": 0,
        "train.stages": [{"seq_len": 96, "steps": 6}],
        "train.batch_tokens": 192,
        "train.chunk": 32,
        "train.log_every": 1,
        "train.save_every": 3,
    }
    return load_recipe(None, json.loads(json.dumps(settings)) | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("lora", [None, ["q_proj", "down_proj"]])
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern.dense(),
        Pattern.window(16, sinks=3),
        NESTED,
        Pattern((8, 32), (1, 2)),
    ],
)
def test_the_gradient_in_chunks_is_the_whole_one(pattern, lora, llama, tmp_path):
    """With LoRA on queries alone, no weight that is trained makes the first layer's keys. Far rows are in a file."""
    net = ModelFolder(llama).net(pattern=pattern)
    net.check_trainable()
    if lora:
        pytest.importorskip("peft")
        net.add_lora({"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": lora})
        torch.manual_seed(1)
        for name, p in net.named_parameters():
            if "lora_B" in name:  # zeros, by which A would have no gradient
                torch.nn.init.normal_(p)
    ids = torch.randint(257, (2, 101))
    room = MappedMemory(ids.shape[0] * far_bytes(net.config, 100, 24, 4).stored, tmp_path)
    found = []
    for chunk in (100, 24):
        net.zero_grad()
        nll = backward_in_chunks(net, ids[:, :-1], ids[:, 1:], chunk, allocate=room.empty)
        found.append(
            (nll, {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad})
        )
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    for name, whole in found[0][1].items():
        assert (found[1][1][name] - whole).norm() <= 1e-5 * whole.norm(), name


def test_documents_in_one_row_are_as_each_alone(llama):
    net = ModelFolder(llama).net(pattern=parse_pattern(WINDOW))
    ids, lengths = torch.randint(257, (1, 90)), [20, 43, 27]
    found = net(ids, documents=lengths)
    expected = torch.cat([net(part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    nll = backward(net, ids, ids, chunk=64, starts=[[0, 20, 63]])  # of which two fit one forward
    alone = sum(net.nll(net(part), part).double().sum() for part in ids.split(lengths, 1))
    assert nll.item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_run_leaves_a_folder_of_transformers(llama, corpus, tmp_path):
    result = train(recipe(llama, corpus), tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert result.loss == lines[-1]["loss"]
    assert lines[-1]["held_out_loss"] is not None
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["dilated_attention"]["segment_lengths"] == [16]
    assert settings["dilated_attention"]["sinks"] == 3
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (llama / name).read_bytes()
    assert not list((tmp_path / "run").glob(".saving-*"))
    assert not torch.equal(
        weights(tmp_path / "run")["lm_head.weight"], weights(llama)["lm_head.weight"]
    )
    assert ModelFolder(tmp_path / "run").net().config.pattern == Pattern.window(16, sinks=3)
    found = PretrainedRecipe.model_validate_json((tmp_path / "run/recipe.json").read_text())
    assert found == recipe(llama, corpus) == load_recipe(str(tmp_path / "run/recipe.json"), {})


def train_four_steps(found: Recipe, output: Path) -> None:
    def stop(tokens: int, line: Any) -> None:
        if line.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(found, output, events=Events(step=stop))


def test_lora_leaves_the_merged_model_and_the_adapter(llama, corpus, tmp_path):
    peft = pytest.importorskip("peft")
    found = recipe(llama, corpus, **{"lora.rank": 4, "lora.dropout": 0.1})
    train(found, tmp_path / "whole")

    train_four_steps(found, tmp_path / "run")
    assert "model.model.model.embed_tokens.weight" not in tensor_names(
        checkpoints_in(tmp_path / "run/checkpoints")[0]
    )
    train(
        recipe(
            llama, corpus, **{"lora.rank": 4, "lora.dropout": 0.1, "train.spill": str(tmp_path)}
        ),
        tmp_path / "run",
    )
    merged = weights(tmp_path / "run")
    torch.testing.assert_close(merged, weights(tmp_path / "whole"), rtol=0, atol=0)
    assert torch.equal(merged["lm_head.weight"], weights(llama)["lm_head.weight"])
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    # a set: equal runs have equal bytes
    assert settings["target_modules"] == sorted(settings["target_modules"])
    adapted = (
        peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")
        .merge_and_unload()
        .state_dict()
    )
    torch.testing.assert_close(merged, adapted, rtol=1e-6, atol=1e-6)
    other = hf.AutoModelForCausalLM.from_pretrained(llama)
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(llama)
    with pytest.raises(ConfigError, match="with other weights"):
        train(found, tmp_path / "run")


def test_a_full_disk_keeps_the_model_and_the_adapter(llama, corpus, small_disk):
    pytest.importorskip("peft")
    found = recipe(llama, corpus, **{"lora.rank": 4})
    net = ModelFolder(llama).trainable(found.model, found.adapter, print)
    words, folder = (llama / "tokenizer.json").read_text(), small_disk / "model"
    net.save(folder, words, net.state_dict())
    before = contents(folder)
    for left in (None, 1 << 14):  # bytes: not enough for the model; nor for the adapter
        if left:
            (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
        with pytest.raises(LongNetError, match=r"cannot write.*No space left on device") as caught:
            net.save(folder, words, net.state_dict())
        assert str(caught.value).startswith(str(folder / "adapter") if left else f"{folder}:")
        assert contents(folder) == before


@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_lora_beside_weights_of_two_bytes_is_that_beside_float32(
    stored, products, llama, corpus, tmp_path
):
    """The frozen matrices stay in the type of their folder, and the numbers are those of float32 weights."""
    pytest.importorskip("peft")
    model, frozen = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=stored), []
    for folder in (tmp_path / "narrow", tmp_path / "wide"):
        shutil.copytree(llama, folder)
        model.save_pretrained(folder)
        changes = {
            "lora.rank": 4,
            "train.dtype": products,
            "train.stages": [{"seq_len": 96, "steps": 3}],
        }
        found = recipe(folder, corpus, **changes)
        net = ModelFolder(folder).trainable(found.model, found.adapter, print)
        frozen.append(sum(p.nbytes for p in net.parameters() if not p.requires_grad))
        assert found.model.frozen_bytes == frozen[-1]
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        facts = estimate_training(found, torch.device("cpu")).facts
        assert (facts["parameters"], facts["trained"]) == (model.num_parameters(), trained)
        train(found, tmp_path / f"{folder.name}-run")
        model.to(torch.float32)
    narrow, wide = tmp_path / "narrow-run", tmp_path / "wide-run"
    assert frozen[0] < 0.51 * frozen[1]
    assert [line["loss"] for line in metrics_of(narrow)] == [
        line["loss"] for line in metrics_of(wide)
    ]
    torch.testing.assert_close(weights(narrow), weights(wide), rtol=0, atol=0)


def train_on(llama: Path, corpus: Path, runs: list[tuple[Path, int, str, str, bool]]) -> None:
    for output, dp, shard, pattern, lora in runs:
        ranks = mesh(dp) if torch.distributed.is_initialized() else Ranks()
        changes = {
            "parallel.shard": shard,
            "model.pattern": pattern,
            "train.stages": [{"seq_len": 96, "steps": 3}],
        }
        train(
            recipe(llama, corpus, **changes, **({"lora.rank": 4} if lora else {})),
            output,
            ranks=ranks,
        )


@pytest.mark.ci
def test_two_ranks_are_one(llama, corpus, tmp_path):
    # for LoRA
    hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(llama)
    alone = [(tmp_path / f"{WINDOW}{lora}", 1, "none", WINDOW, lora) for lora in (0, 1)]
    train_on(llama, corpus, alone)
    settings = [
        (1, "none", WINDOW, 0),
        (2, "full", WINDOW, 0),
    ]
    settings += [(2, "full", WINDOW, 1)]
    runs = [(tmp_path / str(i), *each) for i, each in enumerate(settings)]
    run_ranks(2, tmp_path, train_on, llama, corpus, runs)
    for output, dp, shard, pattern, lora in runs:
        single = tmp_path / f"{pattern}{lora}"
        torch.testing.assert_close(weights(output), weights(single), rtol=2e-4, atol=2e-4)
        two, one = ([line["grad_norm"] for line in metrics_of(path)] for path in (output, single))
        # AdamW does not see how large gradients are
        assert two == pytest.approx(one, rel=1e-3), (dp, shard, pattern)


def test_a_model_without_a_pattern_trains_dense_as_far_as_it_was_trained(llama, corpus, tmp_path):
    plain: dict[str, object] = {"model.pattern": None}
    with pytest.raises(ConfigError, match=r"reads up to 64 tokens.* needs 96: set model\.pattern"):
        recipe(llama, corpus, **plain)
    plain |= {"train.stages": [{"seq_len": 64, "steps": 2}]}
    with pytest.raises(
        ConfigError, match=r"data\.held_out: .* reads 64 at most: set train\.held_out_context=64"
    ):
        train(recipe(llama, corpus, **plain), tmp_path / "run")
    train(recipe(llama, corpus, **plain, **{"train.held_out_context": 64}), tmp_path / "run")
    assert "dilated_attention" not in json.loads((tmp_path / "run/config.json").read_text())
    assert ModelFolder(tmp_path / "run").net().config.as_trained


@pytest.mark.parametrize(("pattern", "named"), [("window:33,sinks=4", 1), ("dense", 0)])
def test_a_first_level_wider_than_the_model_was_trained_is_named(
    llama, corpus, tmp_path, pattern, named
):
    stage = {"train.stages": [{"seq_len": 96, "steps": 1}], "data.held_out": None}
    notes: list[str] = []
    found = recipe(llama, corpus, **stage, **{"model.pattern": pattern})
    train(found, tmp_path / "run", events=Events(note=notes.append))
    assert sum("66 tokens back, and the model was trained on 64" in line for line in notes) == named


@pytest.mark.parametrize(
    ("changes", "rate"),
    [({}, 2e-5), ({"lora.rank": 2}, 2e-4), ({"lora.rank": 2, "optimizer.lr": 1e-3}, 1e-3)],
)
def test_a_run_from_a_model_has_the_rate_of_fine_tuning(changes, rate, llama):
    stage = {"train.stages": [{"seq_len": 64, "steps": 1}]}
    assert (
        load_recipe(
            None, {"init": str(llama), "optimizer.clip": 1.0} | stage | changes
        ).optimizer.lr
        == rate
    )
