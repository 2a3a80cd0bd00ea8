"""A LongNet in the real TRL (`make peers` installs it): its trainers' losses against the LongNet's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: make peers")

import transformers as hf
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import longnet_cli.integrations.transformers  # noqa: F401 (the Auto classes know a LongNet)
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet

BYTES = Tokenizer.bytes()
TEXTS = ["def f(x):\n    return x", "import os", "One text, which is longer", "Two"] * 2
SHAPE = {"vocab_size": BYTES.vocab_size, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
LEVELS = {"segment_lengths": (8, 32), "dilation_rates": (1, 2), "position": "rope"}
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def net(request: pytest.FixtureRequest, tmp_path: Path) -> LongNet:
    torch.manual_seed(0)
    net = LongNet(LongNetConfig(**SHAPE, **LEVELS, tie_embeddings=request.param)).eval()
    net.save_pretrained(tmp_path / "model", BYTES.to_json())
    return net


def trained(trainer: Any) -> list[float]:
    """Train and evaluate, compare the checkpoint with the model in memory, and return the losses."""
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    net = LongNet.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-3")
    weights = trainer.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in net.state_dict().items())
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def arguments(folder: Path, from_path: bool) -> dict[str, Any]:
    words = hf.AutoTokenizer.from_pretrained(folder)
    words.pad_token = words.eos_token
    model = str(folder) if from_path else hf.AutoModelForCausalLM.from_pretrained(folder)
    return {"model": model, "processing_class": words}


@pytest.mark.parametrize("from_path", [True, False], ids=["path", "object"])
def test_sft_trains_a_longnet(net, from_path, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    losses = {}
    for again in (True, False):  # gradient checkpointing, TRL's default
        args = SFTConfig(
            output_dir=str(tmp_path / str(again)), gradient_checkpointing=again, **OPTIONS
        )
        given = arguments(tmp_path / "model", from_path)
        trainer = SFTTrainer(**given, args=args, train_dataset=data, eval_dataset=data)
        losses[again] = trained(trainer)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    total, count = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            tokens = torch.tensor([[*BYTES.encode(text).tolist(), 256]])
            nll = net.nll(net(tokens)[:, :-1], tokens[:, 1:])
            total, count = total + float(nll.sum()), count + nll.numel()
    assert losses[True][0] == pytest.approx(total / count, rel=1e-4)
    assert losses[True] == sorted(losses[True], reverse=True)


@pytest.mark.parametrize("from_path", [True, False], ids=["path", "object"])
def test_dpo_trains_a_longnet(net, from_path, tmp_path):
    pairs = {"prompt": [text[:3] for text in TEXTS], "chosen": [text[3:] + "." for text in TEXTS]}
    data = Dataset.from_dict(pairs | {"rejected": [text[::-1] for text in TEXTS]})
    args = DPOConfig(output_dir=str(tmp_path / "run"), **OPTIONS)
    given = arguments(tmp_path / "model", from_path)
    losses = trained(DPOTrainer(**given, args=args, train_dataset=data, eval_dataset=data))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: it starts as its own reference
    assert losses[-1] < 0.5
