"""Proves that saved = loaded to the bit, that nothing half-written stays, and that a wrong file is told in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import to_torchscale
from safetensors.torch import load_file, save_file
from torch import Tensor

from longnet_cli.basics.errors import CheckpointError, LongNetError
from longnet_cli.models.official import from_torchscale
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import save_pretrained


def small(**changes: object) -> LongNetConfig:
    sizes = {"vocab_size": 29, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    return LongNetConfig(
        **(sizes | {"segment_lengths": (8, 16), "dilation_rates": (1, 2)} | changes)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_saved_is_loaded(tmp_path, tied):
    net = LongNet(small(tie_embeddings=tied))
    net.save_pretrained(tmp_path / "run", tokenizer_json='{"version": "1.0"}')
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "run" / "config.json").read_text().startswith('{\n  "vocab_size": 29,\n')
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert ("output.weight" in stored) is not tied
    again = LongNet.from_pretrained(str(tmp_path / "run"))
    assert again.config == net.config
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert (
        next(LongNet.from_pretrained(tmp_path / "run", dtype=torch.bfloat16).parameters()).dtype
        is torch.bfloat16
    )


def test_saving_replaces_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    first, second = LongNet(small()), LongNet(small())
    (tmp_path / ".model.safetensors.0123abcd.tmp").write_bytes(b"of one that was killed")
    (tmp_path / ".model.89abcdef.tmp").mkdir()
    first.save_pretrained(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(LongNetError, match="No space left") as caught:
        second.save_pretrained(tmp_path)
    assert caught.value.exit_code == 1  # no model is damaged, which is 4
    monkeypatch.undo()
    assert torch.equal(LongNet.from_pretrained(tmp_path).embedding.weight, first.embedding.weight)
    assert len(list(tmp_path.iterdir())) == 2
    save_pretrained(first, tmp_path, state_dict=second.state_dict())
    assert torch.equal(LongNet.from_pretrained(tmp_path).embedding.weight, second.embedding.weight)
    (tmp_path / "file").write_text("")
    with pytest.raises(LongNetError, match="cannot write"):
        first.save_pretrained(tmp_path / "file" / "model")


def test_a_directory_has_a_config_only_when_it_has_all_else(tmp_path, monkeypatch):
    rename, named = os.replace, []

    def interrupted(old: Path, new: Path) -> None:
        if named:
            raise KeyboardInterrupt
        named.append(new)
        rename(old, new)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LongNet(small()).save_pretrained(tmp_path, tokenizer_json='{"version": "1.0"}')
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_equal_models_are_equal_files(tmp_path):
    net = LongNet(small())
    for number in range(8):  # safetensors would put four keys of metadata in a random order
        net.save_pretrained(tmp_path / str(number), tokenizer_json='{"version": "1.0"}')
    assert len({path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}) == 1


def test_no_flipped_byte_changes_the_weights_without_a_word(tmp_path):
    LongNet(small()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 397):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"the digest of its tensors|NaN or infinite"):
            LongNet.from_pretrained(tmp_path)
    LongNet.from_pretrained(tmp_path, verify=False)
    save_file(load_file(path), path)  # which drops the digests
    LongNet.from_pretrained(tmp_path)


def test_a_changed_configuration_is_told_unless_it_only_looks_different(tmp_path):
    LongNet(small()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    LongNet.from_pretrained(tmp_path)
    path.write_text(json.dumps(data | {"segment_lengths": [4, 16]}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: not what the weights were saved with"
    ):
        LongNet.from_pretrained(tmp_path)
    LongNet.from_pretrained(tmp_path, verify=False).save_pretrained(tmp_path)
    LongNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net = LongNet(small())
    with torch.no_grad():
        net.layers[1].ffn.fc1.weight[3, 4] = value
    net.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\.fc1\.weight has numbers that are NaN or infinite"
    ):
        LongNet.from_pretrained(tmp_path)


def damage(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def enlarge(folder: Path, **sizes: int) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | sizes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "config.json").write_text('{"dim": '),
            "config.json: cannot be read",
        ),
        (
            lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
            "config.json: cannot be read",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not tensors"), "damaged"),
        (truncate, "damaged"),
        (damage(lambda t: t.pop("layers.1.ffn.fc1.bias")), "missing tensor layers.1.ffn.fc1.bias"),
        (damage(lambda t: [t.pop(k) for k in list(t) if "ffn" in k]), "and 13 more"),
        (
            damage(lambda t: t.update({"embedding.weight": t["embedding.weight"].int()})),
            "embedding.weight is of type torch.int32",
        ),
        (
            damage(lambda t: t.update({"embedding.weight": t["embedding.weight"] + 1j})),
            "is of type torch.complex64",
        ),
        (
            lambda folder: enlarge(folder, num_layers=10**4),
            "its configuration needs 20,",
        ),
        (lambda folder: enlarge(folder, dim=2**24), "its configuration needs"),
        (damage(lambda t: t.update(extra=torch.zeros(1))), "unexpected tensor extra"),
        (
            damage(lambda t: t.update({"embedding.weight": torch.zeros(9, 16)})),
            "embedding.weight has shape (9, 16)",
        ),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, spoil, part):
    LongNet(small()).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        LongNet.from_pretrained(tmp_path)
    text = str(caught.value)
    assert part in text
    assert str(tmp_path) in text
    assert "\n" not in text


def test_torchscale_refusals():
    net = LongNet(small())
    state = to_torchscale(net)
    for changes, part in [
        (
            {"embed_positions.weight": torch.zeros(4, 16)},
            "unexpected tensor embed_positions.weight",
        ),
        ({"layers.0.ffn.fc1.bias": torch.zeros(25)}, "has shape (25,)"),
        ({"output_projection.weight": torch.zeros(29, 16)}, "tie_embeddings=false"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            from_torchscale(state | changes, net.config)
        assert part in str(caught.value)
    del state["layers.1.self_attn.q_proj.bias"]
    with pytest.raises(CheckpointError, match=r"missing tensor layers\.1\.self_attn\.q_proj\.bias"):
        from_torchscale(state, net.config)


# which files may have
MADE_ANEW = {"layers.0.self_attn.xpos.scale": torch.zeros(4), "version": torch.tensor([3.0])}
ENCODER = {"vocab_size": 0, "position": "none", "causal": False}


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, ENCODER, ENCODER | {"norm": "pre"}]
)
def test_official_names_are_read(changes):
    net = LongNet(small(head_offsets="grouped", **changes))
    state = to_torchscale(net)
    if not net.config.vocab_size:
        half = from_torchscale(
            {f"encoder.{name}": x.half() for name, x in state.items()}, net.config
        )
        assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    for prefix in ("", "model.", "decoder.", "model.decoder."):
        again = from_torchscale(
            {f"{prefix}{name}": x for name, x in (state | MADE_ANEW).items()}, net.config
        )
        assert again.state_dict().keys() == net.state_dict().keys()
        for name, tensor in net.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    again.layers[0].ffn.fc1.weight.data.zero_()
    assert net.layers[0].ffn.fc1.weight.abs().sum() > 0  # its own memory
