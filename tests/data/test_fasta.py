"""Proves that a record of FASTA is a document: its name, its letters, in any layout; and what is no record."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import RunLongnet
from files import BYTES
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.basics.errors import DataError, InputWarning
from longnet_cli.data.inputs import Inputs

FASTA = ">chr1 assembled\r\nACGT\r\nNNac\r\n\r\n;a comment\r\nGT\r\n>chr2\n>chr3 x\nTTTT"
READS = [("chr1", "ACGTNNacGT"), ("chr2", ""), ("chr3", "TTTT")]


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    inputs = Inputs((str(path),), tokenizer=BYTES, **options)
    return [
        (document.doc_id, bytes(document.read(0, len(document)).tolist()).decode()) for document in inputs.documents()
    ]


@pytest.mark.parametrize("name", ["a.fa", "a.fasta", "a.fna", "a.ffn", "a.faa"])
def test_a_record_is_a_document(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FASTA, newline="")
    assert read(tmp_path / name) == READS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(FASTA.encode()))
    assert read(tmp_path / f"{name}.gz") == READS
    assert read(tmp_path / name, keep=("description",)) == READS


def test_stdin_that_looks_like_fasta_is_read_as_text_with_a_note(run_longnet: RunLongnet) -> None:
    note = "longnet: note: stdin looks like FASTA and is read as text: give a file named .fasta"
    for text, noted in ((FASTA, True), (">A quoted line\nand an answer.\n", False), ("ACGT\n>a\nACGT\n", False)):
        for sent in (text.encode(), gzip.compress(text.encode())):
            done = run_longnet("tokenize", "-", "-o", "x.arrow", input=sent, text=False)
            assert (done.returncode, done.stderr.decode().count(note)) == (0, noted)


@given(st.lists(st.text("ACGTNacgt-*", max_size=40), min_size=1, max_size=5), st.integers(1, 9))
def test_lines_of_any_length_are_joined(sequences: list[str], width: int) -> None:
    with TemporaryDirectory() as folder:
        lines = [
            line
            for number, letters in enumerate(sequences)
            for line in (f">r{number}", *(letters[i : i + width] for i in range(0, len(letters), width)))
        ]
        path = Path(folder, "x.fa")
        path.write_text("\n".join(lines) + "\n")
        assert read(path) == [(f"r{number}", letters) for number, letters in enumerate(sequences)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ACGT\n>x\n", "a.fa, line 1: FASTA begins with a name"),
        (">x\nA\n>x\nC\n", "a.fa, line 3: the name 'x' again"),
        (">\nA\n", "a.fa, line 1: no name"),
        (">x\nAC\udcffGT\n", "a.fa, line 2: not UTF-8: byte 2 is 0xff"),
    ],
)
def test_what_is_no_record_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=said) as error:
        read(tmp_path / "a.fa")
    assert "\n" not in str(error.value)


def test_a_folder_gives_its_records_and_no_index_beside_them(tmp_path: Path) -> None:
    (tmp_path / "b.fa").write_text(">x\nA\n")
    (tmp_path / "b.fa.fai").write_text("x\t1\t3\t1\t2\n")
    with pytest.warns(InputWarning, match=r": 1 file is not read beside b.fa: b.fa.fai$"):
        assert read(tmp_path) == [("x", "A")]
