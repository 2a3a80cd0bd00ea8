"""Models that people have, on texts of the size that people have, beside the libraries of their makers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from real_files import score


def nats(model: Path, ids: list[int], bos: list[int]) -> float:
    """The sum of the losses of the ids in transformers."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = net(torch.tensor([bos + ids])).logits[0, max(0, len(bos) - 1) : -1]
    targets = torch.tensor(ids if bos else ids[1:])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()


# SmolLM2-135M-Instruct


@pytest.fixture(scope="session")
def page(book: str) -> str:
    return book[20_000:24_000]


def ids_of(page: str, folder: Path) -> list[int]:
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return words.encode(page, add_special_tokens=False).ids


@pytest.mark.slow
def test_a_gguf_file_its_folder_and_transformers_agree(run, gguf, smollm2, page, tmp_path):
    (tmp_path / "page.txt").write_text(page, encoding="utf-8")
    folder = score(run, "page.txt", "--model", smollm2, mib=2500)
    file = score(run, "page.txt", "--model", gguf, "--dtype", "fp32", mib=2500)
    ids = ids_of(page, smollm2)
    expected = nats(smollm2, ids, folder["bos"])
    assert folder["nll_sum"] == pytest.approx(expected, abs=2e-4 * len(ids))
    assert file["nll_sum"] == pytest.approx(expected, abs=2e-4 * len(ids))


def test_a_scaling_in_a_gguf_file_counts(run, gguf, smollm2, page, tmp_path):
    """As Llama 3.1 and later have it: without it, numbers are wrong and nothing says so."""
    import gguf as format

    reader, path = format.GGUFReader(gguf), tmp_path / "scaled.gguf"
    writer = format.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = [format.GGUFValueType(kind) for kind in field.types]
            writer.add_key_value(
                field.name, field.contents(), kinds[0], sub_type=kinds[-1] if kinds[1:] else None
            )
    writer.add_rope_scaling_type(format.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (scaled / name).symlink_to(smollm2 / name)
    config = json.loads((smollm2 / "config.json").read_text())
    theta = config.pop("rope_theta", None) or config.pop("rope_parameters")["rope_theta"]
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": theta}
    (scaled / "config.json").write_text(json.dumps(config))
    (tmp_path / "page.txt").write_text(page, encoding="utf-8")
    ours = score(run, "page.txt", "--model", path, "--dtype", "fp32", mib=2500)
    ids = ids_of(page, smollm2)
    assert ours["nll_sum"] == pytest.approx(nats(scaled, ids, ours["bos"]), abs=2e-4 * len(ids))


def test_places_of_tokens_are_those_of_the_library(run, smollm2, page, tmp_path):
    """With the normalizer of Qwen's tokenizer: one character grows as much as another one shrinks."""
    folder = tmp_path / "nfc"
    folder.mkdir()
    for path in smollm2.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((smollm2 / "tokenizer.json").read_text()) | {
        "normalizer": {"type": "NFC"}
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    text = "A line of \u0958 and cafe\u0301, re\u0301sume\u0301.\n" + page[:1500]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run("score text.txt --model", folder, "--token-logprobs", "t.arrow", "-q", mib=2500)
    row = feather.read_table(tmp_path / "t.arrow").to_pylist()[0]
    encoding = tokenizers.Tokenizer.from_str(json.dumps(settings)).encode(
        text, add_special_tokens=False
    )
    first = len(encoding.ids) - len(row["input_ids"])
    assert list(zip(row["char_start"], row["char_end"], strict=True)) == encoding.offsets[first:]


def test_greedy_tokens_are_those_of_transformers(run, smollm2, page, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "page.txt").write_text(page, encoding="utf-8")
    words = "generate --input page.txt --max-tokens 16 --bos none --model", smollm2
    ours = run(*words, "--dtype", "fp32", "--format", "jsonl", "-q", mib=2500).rows[0]["tokens"]
    ids = (
        tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
        .encode(page, add_special_tokens=False)
        .ids
    )
    net = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    theirs = net.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert ours == theirs[: len(ours)]
    assert len(ours) > 3


def test_a_question_to_a_library_is_answered_from_the_right_file(run, smollm2, library, tmp_path):
    (tmp_path / "files.txt").write_text("\n".join(map(str, library)))
    question = "What is the period of the underlying Mersenne Twister core generator?"
    words = "ask --max-tokens 24 --format json -q --model", smollm2, "@files.txt", question
    told = json.loads(run(*words, mib=2000).stdout)
    assert "19937" in told["answer"]
    source = max(told["sources"], key=lambda source: source["score"])
    assert source["doc_id"] == "random.py"
    text = next(path for path in library if path.name == "random.py").read_text(encoding="utf-8")
    assert "The period is 2**19937-1" in text[source["char_start"] : source["char_end"]]


def test_an_adapter_starts_at_the_model_and_within_its_plan(run, smollm2, page, tmp_path):
    """One window of 800 tokens, in chunks of 256. The first loss is that of transformers: no weight has changed yet."""
    words = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    text = words.decode(words.encode(page, add_special_tokens=False).ids[:800])
    ids = words.encode(text, add_special_tokens=False).ids
    assert len(ids) == 800  # after the start token, as many as a window predicts
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    command = ["train --data text.txt --seq-len 800 --steps 1 -o run --init", smollm2]
    for setting in ("train.chunk=256", "train.batch_tokens=800", "lora.rank=4", "train.dtype=fp32"):
        command += ["--set", setting]
    plan = json.loads(run(*command, "--dry-run", "--format", "json", mib=2500).stdout)
    done = run(*command, "-q", mib=3500)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    start = json.loads((smollm2 / "config.json").read_text())["bos_token_id"]
    assert first["loss"] == pytest.approx(nats(smollm2, ids, [start]) / 800, abs=1e-4)
    assert plan["peak_bytes"] / 2**20 == pytest.approx(done.peak, rel=0.1)


# all-MiniLM-L6-v2


def test_vectors_of_rows_are_those_of_sentence_transformers(run, minilm, lines, tmp_path):
    from sentence_transformers import SentenceTransformer

    with pa.CompressedInputStream(str(lines), "zstd") as file:
        rows = [json.loads(line) for line in file.read().splitlines()][:1500]
    table = pa.table(
        {
            "id": [str(row["id"]) for row in rows],
            "text": [row["doc"]["body"] + " x" for row in rows],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    run("encode rows.parquet -o vectors --shard-format parquet -q --model", minilm, mib=1500)
    found = pq.read_table(tmp_path / "vectors")
    ours = np.stack(found["embedding"].to_numpy())
    theirs = SentenceTransformer(str(minilm)).encode(table["text"].to_pylist())
    assert found["doc_id"].to_pylist() == table["id"].to_pylist()
    assert np.abs(ours - theirs).max() < 1e-5


def test_spans_of_a_long_text_join_to_the_text(run, minilm, book, tmp_path):
    text = book[:200_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run("encode text.txt --model", minilm, "--span", 200, "-o", "v.arrow", "-q", mib=1500)
    table = feather.read_table(tmp_path / "v.arrow")
    starts, ends = table["char_start"].to_pylist(), table["char_end"].to_pylist()
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
    assert not "".join(
        text[end:start] for end, start in zip(ends[:-1], starts[1:], strict=True)
    ).strip()
