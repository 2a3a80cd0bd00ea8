"""What `encode` adds for search: the place of a span in its text, prefixes, short vectors."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_model
from conftest import RunLongnet
from files import write_rows
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from longnet_cli.data.documents import Document
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.encoding import TextPlaces


@pytest.mark.parametrize("name", ["bytes", "longnet-tiny"])
@given(text=st.text(max_size=60), span=st.integers(1, 7))
def test_places_are_exact(name: str, text: str, span: int) -> None:
    words = Tokenizer.load(name)
    ids, data = words.encode(text), text.encode()
    places = TextPlaces(Document("a", ids, len(data), "a", tokenizer=words))
    lengths = words.token_bytes
    edges = np.concatenate([[0], np.cumsum(lengths[ids])])  # in bytes
    owner = [index for index, character in enumerate(text) for _ in character.encode()]  # of each byte
    for start in range(0, len(ids), span):
        end = min(start + span, len(ids))
        own = owner[edges[start] : edges[end]]
        assert places.of(start, end) == (own[0], own[-1] + 1)


def test_a_text_that_the_tokenizer_changes_has_no_places() -> None:
    words = Tokenizer.load("longnet-tiny")
    assert TextPlaces(Document("a", words.encode("abc"), 4, "a", tokenizer=words)).of(0, 1) == (None, None)
    assert TextPlaces(Document("a", words.encode("abc"), words, "a")).of(0, 1) == (None, None)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("texts", "vectors", "options"),
    [
        (["texts.parquet", "--keep", "text"], ["v.arrow"], ["--text", "text"]),
        (["texts"], ["v.parquet"], ["--root", "texts"]),
        (["texts"], ["v", "--shard-rows", "2", "--no-normalize"], ["--root", "texts"]),
    ],
)
def test_nearest_answers_a_query(
    texts: list[str],
    vectors: list[str],
    options: list[str],
    tmp_path: Path,
    run_longnet: RunLongnet,
    command_env: dict[str, str],
    python: Path,
) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(("red fox", "blue whale", "green frog"))]
    write_rows(tmp_path / "texts.parquet", rows)
    (tmp_path / "texts").mkdir()
    for row in rows:
        (tmp_path / "texts" / row["id"]).write_text(row["text"])
    command = [python, ROOT / "examples/nearest.py", vectors[0], "--query", "blue whale", *options]

    def ask() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, env=command_env, capture_output=True, text=True, check=False)

    missing = ask()
    assert (missing.returncode, missing.stderr) == (1, f"{vectors[0]}: No such file or directory\n")
    assert run_longnet("encode", *texts, "-o", *vectors).returncode == 0
    done = ask()
    assert done.returncode == 0, done.stderr
    assert "cosines of vectors without their mean" in done.stderr
    assert done.stdout.splitlines()[:2] == ["1.000  1, tokens 0 to 6", "       blue whale"]
    command[5:] = []
    assert all(map(str.strip, ask().stdout.splitlines()))


def write_archives(folder: Path) -> list[Path]:
    """A wheel with six modules, and a Debian package with three manual pages, each with words of its own."""
    folder.mkdir()
    wheel, deb, tar = folder / "a.whl", folder / "b.deb", io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as packed:
        for i in range(6):
            words = " ".join(f"x = 'module{i} word{i * 50 + j % 40}'\n" for j in range(400)).replace(" x", "x")
            packed.writestr(f"a/m{i}.py", f'"""The module of word{i * 50} and others."""\n{words}')
    with tarfile.open(fileobj=tar, mode="w:xz") as packed:
        for i in range(3):
            page = f".TH P{i} 1\n.SH NAME\np{i} \\- the tool of word{i}\n.SH DESCRIPTION\n" + f"Of word{i}.\n" * 300
            content = gzip.compress(page.encode())
            member = tarfile.TarInfo(f"./usr/share/man/man1/p{i}.1.gz")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    data = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", tar.getvalue())):
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    deb.write_bytes(data)
    return [deb, wheel]


@pytest.mark.ci
def test_retrieval_is_measured(tmp_path: Path, command_env: dict[str, str], python: Path) -> None:

    def run(*args: str | Path, code: int = 0) -> tuple[list[dict], str]:
        command = [python, ROOT / "examples/retrieval.py", *args]
        done = subprocess.run(command, cwd=tmp_path, env=command_env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    archives = write_archives(tmp_path / "archives")
    said = run("make", "bench", *archives)[1]
    assert [line.split(" pairs")[0] for line in said.splitlines()] == ["man: 3", "py-S: 6", "pydoc: 6"]
    assert run("make", "again", *reversed(archives))[1] == said
    pairs = [json.loads(line) for line in (tmp_path / "bench/pairs.jsonl").read_text().splitlines()]
    pages = {pair["first"]: pair["second"] for pair in pairs if pair["task"] == "man"}
    assert pages["the tool of word1"].startswith("\nDESCRIPTION\nOf word1.\n")
    modules = [pair for pair in pairs if pair["task"] == "pydoc"]
    assert all(pair["first"].startswith("The module") and "The module" not in pair["second"] for pair in modules)
    found, _ = run("words", "bench", "--read", "32,all")
    assert len(found) == 2 * 3 * 3
    assert all(row["recall_1"] == 1 for row in found if row["read"] is None and row["method"] != "256 counts")
    assert all(row["recall_1"] < 1 for row in found if row["read"] == 32 and row["task"] == "py-S")
    tiny_model(tmp_path / "model")
    command = ("vectors", "bench", "--model", "./model", "--tasks", "man,pydoc", "--read")
    found, _ = run(*command, "16")
    assert run(*command, "16,48")[0] == found + run(*command, "48", "--", "--chunk", "64")[0]
    assert [(row["task"], row["centred"], row["n"]) for row in found] == [
        *(("man", False, 3), ("man", True, 3)),
        *(("pydoc", False, 6), ("pydoc", True, 6)),
    ]
    for said, *args in (
        ("bench/none: no benchmark", "words", "./bench/none"),
        ("--tasks mann: the tasks of bench are man, py-S, pydoc", "words", "bench", "--tasks", "mann"),
        ("--read 24: no multiple of 16, the shortest one", *command, "16,24"),
        ("nothing: no such folder", "vectors", "bench", "--model", "./nothing"),
    ):
        error = run(*args, code=1)[1]
        assert error.count("\n") == 1
        assert said in error
