"""Models of any architecture are right, or refused in one line; one that nobody has tried is tried first."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[hf]'")

import transformers as hf
from architectures import LIST, NAMES, PAGE, examine, grown, saved, untried, verdicts
from hf_models import built, ids, llama, mixed, reference
from processes import invoke, refused
from tiny_configs import tiny_config

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, InputWarning
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf import trying
from longnet_cli.models.hf.attention import dilated_attention_forward
from longnet_cli.models.hf.pretrained_net import TransformersNet
from longnet_cli.running.causal_stream import open_stream

WIDE = Pattern((1024,), (1,))
RIGHT = dict.fromkeys(("as it comes", "in chunks", "with a pattern", "in chunks, with a pattern"))


@pytest.fixture(autouse=True)
def _nothing_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trying, "TRIED", {})


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "outcome", "own", "pattern", "why"),
    [
        ("mimo_v2_flash", "right", "in chunks", "in chunks", ""),  # sinks in its sliding layers
        ("roberta", "right", "in chunks", "in chunks", ""),  # its positions start after the padding's
        ("diffllama", "right", "in chunks", "whole", "DiffLlamaForCausalLM in chunks, with a pattern differs"),
        (
            "moshi",
            "own attention",
            "whole",
            "refused",
            "MoshiForCausalLM in chunks differs from its own attention by 0.",
        ),
        ("deepseek_v32", "own attention", "whole", "refused", "DeepseekV32ForCausalLM cannot be run with a pattern"),
        ("llama4_text", "own attention", "whole", "refused", "does not serve chunked attention"),
        ("qwen3_5_text", "right", "whole", "whole", ""),
        ("gemma4_text", "right", "in chunks", "in chunks", ""),  # layers of several sizes
        ("recurrent_gemma", "own attention", "whole", "refused", "every layer of this model has a sliding window"),
        ("exaone", "right", "in chunks", "in chunks", ""),  # Llama's class, and a configuration of its own
        ("bamba", "right", "whole", "whole", ""),  # an infinity in its config.json
    ],
)
@pytest.mark.full
def test_one_architecture(name: str, outcome: str, own: str, pattern: str, why: str) -> None:
    """As if it were not in the list of those that were tried."""
    if name not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    row = examine(name)
    assert (row.outcome, row.own, row.pattern.partition(",")[0]) == (outcome, own, pattern), row
    assert why in row.why


@pytest.mark.slow
def test_every_architecture_is_right_or_refused() -> None:
    """The page in docs/ and the list of what was tried are what it says now, but for figures."""
    with untried() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [examine(name) for name in NAMES]
        found = verdicts(cache)
    assert not [row for row in rows if row.outcome in ("wrong", "crashed")]
    listed = json.loads(LIST.read_text())
    if hf.__version__ == listed["transformers"]:
        lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")][1:]  # without the head
        written = [[x.strip() for x in line.split("|")[1:6]] for line in lines]
        assert [[f"`{row.name}`", *row[1:5]] for row in rows] == written
        assert _right(found) == _right(listed["architectures"])


def _right(found: dict[str, dict[str, str | None]]) -> set[tuple[str, str, bool]]:
    return {(name, form, why is None) for name, forms in found.items() for form, why in forms.items()}


def forwards(model: hf.PreTrainedModel) -> list[int]:
    """Count the tokens of each forward pass from now on."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    trying.body(model).register_forward_pre_hook(count, with_kwargs=True)
    return counts


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an architecture that is not listed; its answer belongs to its configuration, and the list needs no trial."""
    for listed, again, tokens in ((True, False, []), (False, False, [64] * 3), (False, True, [])):
        monkeypatch.setattr(trying, "TRIED", {"LlamaForCausalLM": RIGHT} if listed else {})
        net = built(llama)
        counts = forwards(net)
        use_dilated_attention(net, WIDE)
        TransformersNet(net)
        assert [x for x in counts if x > 2 and x != 31][: len(tokens)] == tokens, (listed, again)
        assert bool(counts.count(64)) == bool(tokens)
    net = built(mixed)
    counts = forwards(net)
    use_dilated_attention(net, WIDE)
    assert counts == [17, 17]  # one more than its window
    counts.clear()
    use_dilated_attention(net, WIDE)
    assert not counts


def test_a_trial_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = built(llama).train()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    use_dilated_attention(net, Pattern.window(16, sinks=2))
    assert net.training
    assert net.config.dilated_attention["segment_lengths"] == [16]
    assert net.config._attn_implementation == "dilated"
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(x.grad is None and x.requires_grad for x in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_attention_is_refused_with_the_difference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model whose sliding layers have sinks that its attention function loses, as ours once did."""
    torch.manual_seed(0)
    net = grown(hf.AutoModelForCausalLM.from_config(tiny_config("mimo_v2_flash"))).to(dtype)
    use_dilated_attention(net, WIDE)
    monkeypatch.setattr("longnet_cli.models.hf.attention._with_sink", lambda q, k, v, mask, *_: (q, k, v, mask))
    for path in tmp_path.glob("cache/longnet/verdicts/*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"MiMoV2FlashForCausalLM with a pattern differs .* by 0\.\d+ of its nats"):
        use_dilated_attention(net, WIDE)
    monkeypatch.setattr(trying, "TRIED", {"MiMoV2FlashForCausalLM": RIGHT})
    use_dilated_attention(net, WIDE)  # the list has the last word


def test_chunks_that_are_not_one_pass_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The net then reads documents whole, and says why."""
    torch.manual_seed(0)
    net = TransformersNet(grown(hf.AutoModelForCausalLM.from_config(tiny_config("moshi"))))
    assert net.config.memory == "none"
    assert "MoshiForCausalLM in chunks differs from its own attention by 0." in net.note
    assert net.note.endswith("it reads each document in one forward, whatever --chunk")
    monkeypatch.setattr(trying, "TRIED", {"MoshiForCausalLM": RIGHT})
    wrong = TransformersNet(net.model)
    stream = open_stream(wrong)
    with torch.no_grad():
        parts = torch.cat([stream(x) for x in ids(60).split(20, 1)], 1)
        assert (parts - net(ids(60))).abs().max() > 0.1  # what is refused is really wrong


def test_a_large_model_says_that_it_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trying, "_LARGE", 1000)
    with pytest.warns(
        InputWarning, match="LlamaForCausalLM was not tried yet with a pattern: it is tried on 64 tokens first"
    ):
        use_dilated_attention(built(llama), WIDE)


def test_what_the_command_says(tmp_path: Path) -> None:
    """A refusal in one line with exit code 2; a note where chunks are not read; the same numbers for any chunk."""
    rows = pa.table({"input_ids": [[*range(3, 90)]]})
    with pa.OSFile(str(tmp_path / "ids.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    options = ["score", tmp_path / "ids.arrow", "--format", "json", "--bos", "1", "--model"]
    with saved("deepseek_v32") as (folder, _):
        error = refused(*options, folder, "--pattern", "window:16")
        assert error.exit_code == 2
        assert "DeepseekV32ForCausalLM cannot be run with a pattern (TypeError" in str(error)
        assert invoke(*options, folder).exit_code == 0
    with saved("diffllama") as (folder, _):
        results = [invoke(*options, folder, "--pattern", "window:16", "--chunk", n) for n in (8, 100)]
    assert {result.exit_code for result in results} == {0}
    assert results[0].stdout == results[1].stdout
    assert all(
        "DiffLlamaForCausalLM in chunks, with a pattern differs" in x.stderr and x.stderr.count("in one forward") == 1
        for x in results
    )


@pytest.mark.parametrize(("new", "masked"), [(20, True), (20, False), (1, True), (1, False)])
def test_a_sink_in_a_sliding_layer(new: int, masked: bool) -> None:
    """Outputs and gradients with one more key for sdpa are those of scores with a sink beside them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, new, 8), torch.randn(2, 3, 30, 8), torch.randn(2, 3, 30, 5)
    if not masked and new > 1:
        k, v = k[:, :, :new], v[:, :, :new]
    sinks, places = torch.randn(6) * 2, torch.arange(k.shape[2])
    ages = places[-new:, None] - places
    mask = ((ages >= 0) & (ages < 12))[None, None] if masked else None
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, config=None)
    results = []
    for attention in (dilated_attention_forward, reference):
        given = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
        out, _ = attention(module, *given[:3], mask, scaling=0.3, sliding_window=12, s_aux=given[3])
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_model_that_cannot_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with saved("llama") as (folder, _):

        def broken(*args: Any, **options: Any) -> None:
            raise TypeError("two\nlines")

        monkeypatch.setattr(hf.models.llama.modeling_llama.LlamaMLP, "forward", broken)
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be run .* \(TypeError: two lines\)$"):
            ModelFolder(folder).net()


def test_the_list_is_of_this_script() -> None:
    listed = json.loads(LIST.read_text())["architectures"]
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "MoshiForCausalLM"} <= listed.keys()
    assert {*listed["LlamaForCausalLM"].values()} == {None}
    assert listed["MoshiForCausalLM"]["in chunks"]
    assert PAGE.read_text().count("\n| `") == 1 + 196  # the head, too
    assert ", 0 wrong, 0 crashed." in PAGE.read_text()
