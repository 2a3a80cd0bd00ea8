"""What was read, saved and loaded, goes on as if nothing had happened: bit for bit, for any pattern and any chunks."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from typing import Any

import pytest
import torch
from builders import tiny_llama, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import read_folder
from pattern_nets import CAUSAL, draw, foreign, generated, native, net, prompt
from safetensors.torch import load_file, save_file
from strategies import chosen_patterns, cuts, split

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, DataError, LongNetError
from longnet_cli.basics.sealed_manifests import read_sealed, write_sealed
from longnet_cli.jobs.generating import generate
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.saved_state import STATE_VERSION

CHOSEN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)
PATTERNS = {
    "window": Pattern.window(16, sinks=3),
    "levels": Pattern((8, 24, 96), (1, 3, 8), look_back=1),
    "chosen blocks": CHOSEN,
    "dense": Pattern.dense(),
}


@given(
    pattern=CAUSAL | chosen_patterns(),
    batch=st.integers(1, 2),
    tokens=st.integers(2, 150),
    sizes=cuts(),
    at=st.integers(0, 10**6),
)
def test_a_loaded_stream_goes_on_bit_for_bit(tmp_path_factory, pattern, batch, tokens, sizes, at):
    """Saved or forked, whatever forks of them read; a second state replaces the first."""
    model, ids, place = net(pattern), draw(batch, tokens), tmp_path_factory.getbasetemp()
    parts = ids.split(split(tokens, sizes), 1)
    at = at % len(parts)
    stream = CausalStream(model)
    for part in parts[: at + 1]:
        stream(part)
    stream.save(place / "state")
    loaded = CausalStream.load(model, place / "state")
    loaded.save(place / "state")
    others = [CausalStream.load(model, place / "state"), loaded, loaded.fork(), stream.fork()]
    strays = [stream.fork(), loaded.fork(), others[0].fork()]
    for part in parts[at + 1 :]:
        expected = stream(part)
        assert all(torch.equal(other(part), expected) for other in others)
        for stray in strays:
            stray((part + 1) % 50)
    assert {other.position for other in others} == {tokens}
    assert all(torch.equal(other.last_hidden, stream.last_hidden) for other in others)
    assert all(torch.equal(other.last_tokens, ids[:, -1]) for other in others)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("build", [native, foreign])
def test_generation_from_a_state_is_that_of_one_run(build, kind, tmp_path):
    """Tokens and log-probabilities are equal, however often generation stops and its state is saved."""
    model = build(PATTERNS[kind])
    expected = generated(model, 130, bos=3, chunk=48)
    options: dict[str, Any] = {"bos": None, "tokenizer": None, "chunk": 48}
    stream, nothing = CausalStream(model), prompt(0)
    assert (
        list(generate(model, prompt(130), stream=stream, max_tokens=0, **options | {"bos": 3}))
        == []
    )
    found = []
    for number in (25, 1, 14):
        stream.save(tmp_path / "state")
        stream = CausalStream.load(model, tmp_path / "state")
        found += list(generate(model, nothing, stream=stream, max_tokens=number, **options))
        assert stream.position == 131 + len(found)
    assert [step[:2] for step in found] == [step[:2] for step in expected]


def test_it_stops_at_the_last_position(tmp_path):
    model = foreign(Pattern.dense())
    model.config = model.config.model_copy(update={"max_tokens": 60})
    stream = CausalStream(model)
    options: dict[str, Any] = {"bos": None, "tokenizer": None, "stream": stream}
    assert len(list(generate(model, prompt(50), max_tokens=4, **options))) == 4
    with pytest.raises(ConfigError, match=r"prompt.txt: 61 tokens, and the model"):
        generate(model, prompt(7), **options)
    assert len(list(generate(model, prompt(4), **options))) == 2
    assert stream.position == 60


@pytest.mark.parametrize("first", [False, True])
def test_a_killed_save_leaves_the_old_state(tmp_path, monkeypatch, first):
    """Killed at any rename or removal, the folder has the old state or the new one; the next save removes the rest.

    A killed first save leaves none, and the next one goes on. What has no name of a piece stays.
    """
    model, folder, ids = net(CHOSEN), tmp_path / "state", draw(1, 200)
    monkeypatch.setattr("longnet_cli.running.saved_state.FILE_BYTES", 1 << 13)
    stream, others = (
        CausalStream(model),
        ["piece-0.safetensors", "notes.txt"],
    )
    stream(ids[:, :100])
    if not first:
        stream.save(folder)
        for name in others:
            (folder / name).write_text("mine")
    later = stream.fork()
    later(ids[:, 100:])
    seen, real = set(), {name: getattr(os, name) for name in ("replace", "unlink")}
    calls, last = 0, -1

    def killed(name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > last:
                raise SystemExit
            real[name](*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        # nothing is cleaned up by a process that is gone
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        for name in real:
            patch.setattr(f"os.{name}", killed(name))
        while calls >= last:  # the last save called fewer
            calls, last = 0, last + 1
            with suppress(SystemExit):
                later.save(folder)
            with suppress(ConfigError):  # no state yet
                seen.add(CausalStream.load(model, folder).position)
    assert last > 5
    assert seen == ({200} if first else {100, 200})
    assert CausalStream.load(model, folder).position == 200
    stream.save(folder)
    assert CausalStream.load(model, folder).position == 100
    manifest = json.loads((folder / "manifest.json").read_text())
    mine = set() if first else {*others}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["files"]} | mine
    assert {(folder / name).read_text() for name in mine} <= {"mine"}


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    """Its manifest.json is not that of a state, and its files have a name that a piece might have."""
    stream = CausalStream(net(CHOSEN))
    stream(draw(1, 100))
    manifests = [
        '{"name": "My app", "icons": []}',
        "{",
        '{"version": 3, "files": {}, "digest": ""}',
        None,
    ]
    for number, manifest in enumerate(manifests):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_sealed(folder / "manifest.json", STATE_VERSION, {"kind": "another kind"}, [])
        if manifest:
            (folder / "manifest.json").write_text(manifest)
            (folder / "piece-0.safetensors").write_text("mine")
        old = read_folder(folder)
        with pytest.raises(
            ConfigError, match="neither an empty folder nor a state: name a new one"
        ):
            stream.save(folder)
        assert read_folder(folder) == old


def test_what_no_stream_has_saved_is_refused(tmp_path):
    """Its digests are right, but a fact is none of a state, or a tensor is missing, or of another shape."""
    model, folder, other = net(CHOSEN), tmp_path / "state", tmp_path / "other"
    stream = CausalStream(model)
    stream(draw(1, 105))
    stream.save(folder)
    facts = read_sealed(folder / "manifest.json", STATE_VERSION)
    tensors = load_file(next(folder.glob("*.safetensors")))
    assert {"ids", "0.past", "1.past"} <= tensors.keys()

    def load(changed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        save_file(tensors, other / "piece.safetensors")
        write_sealed(
            other / "manifest.json", STATE_VERSION, {**facts, **changed}, ["piece.safetensors"]
        )
        CausalStream.load(model, other)

    load({}, tensors)
    for key, value in (("tokens", "100"), ("dtype", "load"), ("last_tokens", "x")):
        with pytest.raises(DataError, match="no state of this model: "):
            load({key: value}, tensors)
    for name in tensors.keys() - {"ids"}:
        with pytest.raises(DataError, match="no state of this model: "):
            load({}, {key: x for key, x in tensors.items() if key != name})
    with pytest.raises(DataError, match="no state of this model: "):
        load({}, tensors | {"0.rows.0": tensors["0.rows.0"][:, :, :, :, 1:].contiguous()})


def test_what_is_refused(tmp_path):
    model, folder = net(CHOSEN), tmp_path / "state"
    with pytest.raises(ConfigError, match="after it has read something"):
        CausalStream(model).save(folder)
    stream = CausalStream(model)
    stream(draw(1, 100))
    stream.save(folder, name="./mine", tokenizer_sha256="a" * 64)
    old = read_folder(folder)
    window, few = net(Pattern.window(16)), net(CHOSEN, heads=2)
    patterns = "with the pattern window:16,chosen=4x8.*, and this is window:16: name both"
    digests = "another tokenizer, of SHA-256 aaaaaaaaaaaa..., not bbbbbbbbbbbb..."
    for other, more, message in (
        (window, {}, f"it was saved by ./mine {patterns}"),
        (few, {}, "saved by another model, ./mine: its weights or its configuration differ"),
        (model, {"tokenizer_sha256": "b" * 64}, digests),
        (model, {"dtype": torch.bfloat16}, r"saved in float32, .* in bfloat16 \(--dtype\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            CausalStream.load(other, folder, **more)
    for name in old:
        for damage in (old[name][:-2], old[name][:99] + b"?" + old[name][100:], None):
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            gone = damage is None and name == "manifest.json"
            with pytest.raises(
                ConfigError if gone else DataError, match="no state" if gone else "a damaged state"
            ):
                CausalStream.load(model, folder)
            (folder / name).write_bytes(old[name])
    assert CausalStream.load(model, folder).position == 100
    with pytest.raises(ConfigError, match="Not a directory"):
        stream.save(folder / "manifest.json")
    with pytest.raises(ConfigError, match="no state, manifest"):
        CausalStream.load(model, tmp_path)
    write_sealed(folder / "manifest.json", 2, {"kind": "longnet state"}, [])
    with pytest.raises(
        DataError,
        match=rf"manifest\.json: it was changed .*, or is not of version {STATE_VERSION}$",
    ):
        CausalStream.load(model, folder)


def test_a_full_disk_leaves_the_old_state(small_disk):
    model = net(CHOSEN)
    stream = CausalStream(model)
    stream(draw(1, 20))
    stream.save(small_disk / "state")
    old = read_folder(small_disk / "state")
    stream(draw(1, 3000))
    with pytest.raises(LongNetError, match="cannot write: No space left on device"):
        stream.save(small_disk / "state")
    assert read_folder(small_disk / "state") == old
    assert len([*(small_disk / "state").iterdir()]) == len(old)
    with pytest.raises(LongNetError, match="cannot write: No space left on device"):
        stream.save(small_disk / "new/state")
    assert not (small_disk / "new").exists()


def test_the_command(run_longnet, tmp_path):
    """A book is read once and asked often by the state's own model; the state stays until another takes its place."""

    def said(*words: object) -> dict[str, Any]:
        return json.loads(run_longnet("generate -n 20 --format jsonl -q", *words, code=0).stdout)

    native, other = tiny_model(tmp_path / "native", position="rope"), tiny_llama(tmp_path / "llama")
    (tmp_path / "book.txt").write_text("some words, and others. " * 20)
    place, asked = tmp_path / "book.state", ["--state", "book.state"]
    for model, option, value in ((native, "--pattern", "finding"), (other, "--dtype", "bf16")):
        reading = ["-i", "book.txt", "--model", model, option, value]
        whole, followed = said(*reading), said(*reading, "What?")
        done = run_longnet("generate --save-state book.state", *reading, code=0)
        assert done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("book.state: the state after 481 tokens, ")
        old = read_folder(place)
        assert said(*asked) == whole | {"doc_id": "prompt", "n_prompt": 0}
        after = said("\nWhat?", *asked)
        assert after["tokens"] == followed["tokens"]
        assert followed["n_prompt"] == 480 + after["n_prompt"]
        # the default, if given
        assert "it was saved " in run_longnet("generate -m longnet-tiny", *asked).stderr
        if model == other:  # whose commands import transformers
            break
        (tmp_path / "questions.jsonl").write_text('{"text": "What?"}\n{"text": "Who?"}\n')
        words = "generate -n 20 --format jsonl -q -i questions.jsonl"
        both = run_longnet(words, *asked).stdout.splitlines()
        alone = [said(text, *asked)["tokens"] for text in ("What?", "Who?")]
        assert [json.loads(line)["tokens"] for line in both] == alone
        assert read_folder(place) == old
        first = said(*asked, "-n", "12", "--save-state", "book.state")
        assert first["tokens"] + said(*asked, "-n", "8")["tokens"] == whole["tokens"]
