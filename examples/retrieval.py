"""Measure what vectors find: the other half of a document, or the document that one line describes.

    pip download --no-deps -d archives django twisted sqlalchemy dask bokeh sphinx biopython nltk
    (cd archives && apt-get download python3.13-doc perl-doc vim-doc git-doc apache2-doc manpages manpages-dev)
    python examples/retrieval.py make bench archives/*
    python examples/retrieval.py words bench --read 2Ki,8Ki,all
    python examples/retrieval.py vectors bench --model ./my-model --read 512,2Ki,8Ki,all
    python examples/retrieval.py vectors bench --model ./all-MiniLM-L6-v2 --read 2Ki --span 254 --words
    python examples/retrieval.py sentences bench --model ./all-MiniLM-L6-v2 --read 256,8Ki

`make` reads wheels and Debian packages without installing them, and writes the pairs of each task to
bench/pairs.jsonl. Which documents are taken is decided by the SHA-256 of their text, so equal archives give equal
pairs; the digest of each task is printed, and identifies it.

    py-S, py-M, py-L    the first 45 % of a Python file of 8-16, 32-64, over 130 kB finds its last 45 %
    en-S, en-M, en-L    the same with English documentation: text, HTML, pod, reStructuredText
    pydoc, man          the first line of a docstring finds its module, the NAME line its manual page

`words`, `vectors` and `sentences` print a line of JSON per task and method: recall at 1 with its standard error, and
the mean reciprocal rank, when only the first bytes (of `words`) or tokens (of the others) of each text are read
(`read`; `bytes` are the mean of second texts). Vectors are also compared without their mean (`centred`). Halves are
compared among at most 100 documents, lines among 80. With --span, two texts score as the mean, over the spans of the
first, of the best span of the second. --words adds TF-IDF: a sum of z-scores over all pairs. `sentences` takes a model
of sentence-transformers; a text longer than its window has the mean of the vectors of its parts, weighted by their
tokens.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nearest import read_table, scaled, vectors_of, z_scores

from longnet_cli import LongNetError, ModelFolder
from longnet_cli.basics.sizes import parse_size

SIZES = {"S": (8_000, 16_000), "M": (32_000, 64_000), "L": (130_000, 10_000_000)}  # bytes
HALVES, LINES, SHARE = 100, 80, 0.45
ENGLISH = (".txt", ".html", ".pod", ".rst")
Tasks = dict[str, list[tuple[str, str]]]  # name -> pairs of texts


def files_in(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files in a wheel or a Debian package; .gz files without their compression."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as found:
            yield from (
                (name, found.read(name))
                for name in sorted(found.namelist())
                if not name.endswith("/")
            )
        return
    data, at = archive.read_bytes(), 8  # an ar archive: a header of 60 bytes before each member
    if not data.startswith(b"!<arch>\n"):
        sys.exit(f"{archive}: neither a wheel nor a Debian package")
    while at < len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as found:
                for member in found:
                    if member.isfile() and (file := found.extractfile(member)):
                        content = file.read()
                        packed = member.name.endswith(".gz")
                        yield (
                            member.name.removesuffix(".gz"),
                            gzip.decompress(content) if packed else content,
                        )
        at += 60 + size + size % 2


class _Words(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skips = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.skips += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.skips -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.skips:
            self.parts.append(data)


def plain_text(name: str, text: str) -> str:
    """Return the text of a page of HTML, or of a manual page, without markup; other text as it is."""
    if name.endswith(".html"):
        page = _Words()
        page.feed(text)
        return re.sub(r"\s*\n\s*", "\n", "".join(page.parts)).strip()
    if "/man/" in name:
        lines = [
            line for line in text.splitlines() if re.match(r"\.(S[HS]|[BIR]{1,2} )|[^.']|$", line)
        ]
        kept = (re.sub(r"^\.[BIR]{1,2} ", "", re.sub(r"^\.S[HS] ?", "\n", line)) for line in lines)
        return re.sub(r"\\f.|\\[&|^]", "", "\n".join(kept)).replace("\\-", "-").strip()
    return text


def described(name: str, text: str) -> tuple[str, str, str] | None:
    """Return (task, line, the text without it) of a module with a docstring, or of a manual page; None for others."""
    if name.endswith(".py"):
        try:
            docstring = ast.get_docstring(ast.parse(text), clean=False)
        except (SyntaxError, ValueError, RecursionError):
            return None
        line = docstring.strip().split("\n")[0].strip() if docstring else ""
        return ("pydoc", line, text.replace(docstring or "", "", 1)) if len(line) >= 20 else None
    found = re.search(r'NAME"?\n+(.+?) - (.+)\n', text) if "/man/" in name else None
    return ("man", found[2], text[found.end() :]) if found else None


def documents_in(archives: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, path, text) of the Python files ("py"), manual pages ("man") and other documents ("en")."""
    for archive in archives:
        stems = set()  # a page as text and as HTML is one document
        for name, content in files_in(archive):
            kind = (
                "py"
                if name.endswith(".py")
                else "man"
                if "/man/" in name
                else "en"
                if name.endswith(ENGLISH)
                else ""
            )
            stem = name.rpartition(".")[0]
            if kind == "en" and stem in stems:
                continue
            stems.add(stem)
            try:
                text = plain_text(name, content.decode()) if kind else ""
            except UnicodeDecodeError:
                continue
            if text:
                yield kind, name, text


def make_tasks(archives: list[Path]) -> Tasks:
    """Return the pairs of each task, those with the smallest digests first."""
    found: dict[str, dict[str, tuple[str, str]]] = defaultdict(
        dict
    )  # task -> digest of the text -> pair
    for kind, name, text in documents_in(archives):
        size, digest = len(text.encode()), hashlib.sha256(text.encode()).hexdigest()
        for letter, (least, most) in SIZES.items():
            if kind in ("py", "en") and least <= size < most:
                part = int(SHARE * len(text))
                found[f"{kind}-{letter}"][digest] = text[:part], text[-part:]
        if size >= 2_000 and (pair := described(name, text)):
            found[pair[0]][digest] = pair[1:]
    taken: Tasks = {}
    for task, pairs in sorted(found.items()):
        most = HALVES if "-" in task else LINES
        seen: dict[str, str] = {}  # equal lines describe one document only
        for digest in sorted(pairs):
            seen.setdefault(pairs[digest][0], digest)
        taken[task] = [pairs[digest] for digest in list(seen.values())[:most]]
    return taken


def read_tasks(folder: Path, wanted: str | None = None) -> Tasks:
    """Return the pairs of each task, or of the `wanted` ones, separated by commas."""
    tasks: Tasks = defaultdict(list)
    try:
        lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(
            f"{folder}: no benchmark ({error.strerror}): write one with `retrieval.py make {folder} ARCHIVES`"
        )
    for line in lines:
        row = json.loads(line)
        tasks[row["task"]].append((row["first"], row["second"]))
    names = wanted.split(",") if wanted else [*tasks]
    if unknown := [name for name in names if name not in tasks]:
        sys.exit(f"--tasks {','.join(unknown)}: the tasks of {folder} are {', '.join(tasks)}")
    return {name: tasks[name] for name in names}


def report(
    task: str,
    method: str,
    read: int | None,
    scores: np.ndarray,
    seconds: list[str],
    shares: list[float],
    **more: Any,
) -> None:
    """Print how well first texts find their `seconds`, of which these shares were read, given scores (n, n)."""
    places = (scores >= scores.diagonal()[:, None]).sum(1)
    recall, n = float((places == 1).mean()), len(places)
    error = (recall * (1 - recall) / n) ** 0.5
    size = round(
        float(
            np.mean(
                [len(text.encode()) * share for text, share in zip(seconds, shares, strict=True)]
            )
        )
    )
    row = {"task": task, "method": method, "read": read, "bytes": size, **more, "n": n}
    row |= {
        "recall_1": round(recall, 4),
        "se": round(error, 4),
        "mrr": round(float((1 / places).mean()), 4),
    }
    print(json.dumps(row), flush=True)


def word_scores(pairs: list[tuple[str, str]], read: int | None) -> dict[str, np.ndarray]:
    """Return the scores (n, n) of TF-IDF, BM25 and 256 hashed word counts."""
    cut = [
        text.encode()[:read].decode(errors="ignore").lower()
        for side in zip(*pairs, strict=True)
        for text in side
    ]
    bags = [Counter(re.findall(r"\w+", text)) for text in cut]
    names = {
        word: index
        for index, word in enumerate(dict.fromkeys(word for bag in bags for word in bag))
    }
    counts, hashed = (
        np.zeros((len(bags), len(names)), np.float32),
        np.zeros((len(bags), 256), np.float32),
    )
    for row, bag in enumerate(bags):
        for word, count in bag.items():
            counts[row, names[word]] = count
            hashed[row, zlib.crc32(word.encode()) % 256] += count
    n, documents = len(pairs), counts[len(pairs) :]
    holders = (documents > 0).sum(0)
    weighted = scaled(np.log1p(counts) * np.log((1 + n) / (1 + holders)), 0.0)
    lengths = documents.sum(1, keepdims=True)
    frequent = (
        2.2 * documents / (documents + 1.2 * (0.25 + 0.75 * lengths / max(1, lengths.mean())))
    )
    buckets = scaled(np.log1p(hashed), 0.0)
    return {
        "tf-idf": weighted[:n] @ weighted[n:].T,
        "bm25": counts[:n] @ (frequent * np.log(1 + (n - holders + 0.5) / (holders + 0.5))).T,
        "256 counts": buckets[:n] @ buckets[n:].T,
    }


def encode_rows(texts: list[np.ndarray], options: list[str]) -> pa.Table:
    """Return the rows of `longnet encode` for texts of token ids, which are named by their index."""
    with tempfile.TemporaryDirectory() as place:
        pq.write_table(
            pa.table({"doc_id": [*map(str, range(len(texts)))], "input_ids": texts}),
            f"{place}/ids.parquet",
        )
        command = [sys.executable, "-m", "longnet_cli", "encode", f"{place}/ids.parquet", "--quiet"]
        if code := subprocess.run(
            [*command, "-o", f"{place}/vectors.arrow", *options], check=False
        ).returncode:
            sys.exit(code)  # `longnet encode` has said why
        return read_table(f"{place}/vectors.arrow").combine_chunks()


def encode_side(
    texts: list[np.ndarray], reads: list[int | None], options: list[str], before: int
) -> list[np.ndarray]:
    """Return the vectors (texts, dim) of the first tokens of each text, for each number in `reads`.

    A causal model has one state after so many tokens, whatever follows: the spans of one pass give all these vectors.
    `before` tokens of a prompt are pooled with the first span.
    """
    span = min((read for read in reads if read), default=0) if len(reads) > 1 else 0
    if odd := [read for read in reads if read and span and read % span]:
        sys.exit(f"--read {odd[0]}: no multiple of {span}, the shortest one")
    longest = None if None in reads else max(read or 0 for read in reads)
    rows = encode_rows(
        [ids[:longest] for ids in texts],
        ["--no-normalize", *(["--span", str(span)] * bool(span)), *options],
    )
    vectors = vectors_of(rows).copy()
    owners = np.array(rows["doc_id"].to_pylist(), np.int64)
    starts, ends, tokens = (rows[name].to_numpy() for name in ("start", "end", "n_tokens"))
    mean = (rows.schema.metadata or {}).get(b"longnet.pooling") == b"mean"
    weighted = vectors * (tokens + before * (starts == 0))[:, None] if mean else vectors
    found = []
    for read in reads:
        out = np.zeros((len(texts), vectors.shape[1]), np.float32)
        taken = ends <= (read or ends.max())
        if mean:
            np.add.at(out, owners[taken], weighted[taken])
        else:
            last = taken & ~np.append((owners[1:] == owners[:-1]) & taken[1:], False)
            out[owners[last]] = vectors[last]
        found.append(scaled(out, 0.0))
    return found


def encode_spans(
    texts: list[np.ndarray], read: int | None, span: int, options: list[str]
) -> list[np.ndarray]:
    """Return the vectors (spans, dim) of the first `read` tokens of each text."""
    rows = encode_rows([ids[:read] for ids in texts], ["--span", str(span), *options])
    vectors, owners = scaled(vectors_of(rows), 0.0), np.array(rows["doc_id"].to_pylist(), np.int64)
    return [vectors[owners == owner] for owner in range(len(texts))]


def span_scores(firsts: list[np.ndarray], seconds: list[np.ndarray]) -> np.ndarray:
    """Return (firsts, seconds): the mean, over the spans of the first text, of the best span of the second."""
    return np.array([[(first @ second.T).max(1).mean() for second in seconds] for first in firsts])


def vector_scores(
    tasks: Tasks,
    model: str,
    reads: list[int | None],
    options: list[str],
    span: int | None,
    words_too: bool,
) -> None:
    folder = ModelFolder.find(model)
    words, prompts = folder.tokenizer(), ("", "")
    if words is None:
        sys.exit(f"{model}: has no tokenizer")
    options = ["--model", model, *options]
    if model_of_library := folder.sentence_model():
        prompts = (model_of_library.query_prompt or "", model_of_library.document_prompt)
    ids = [
        [words.encode(pair[side]) for pairs in tasks.values() for pair in pairs] for side in (0, 1)
    ]
    if span:
        for read in reads:
            sides = [
                encode_spans(side, read, span, [*options, "--prefix", prompt or "none"])
                for side, prompt in zip(ids, prompts, strict=True)
            ]
            shares = [min(1.0, (read or 1e9) / max(1, len(found))) for found in ids[1]]
            report_spans(tasks, f"{model}, spans of {span}", read, *sides, shares, words_too)
        return
    for group in [reads] if folder.config.get("causal", True) else [[read] for read in reads]:
        sides = []
        for side, prompt in zip(ids, prompts, strict=True):
            prefix, before = ["--prefix", prompt or "none"], len(words.encode(prompt))
            sides.append(encode_side(side, group, options + prefix, before))
        for read, firsts, seconds in zip(group, *sides, strict=True):
            shares = [min(1.0, (read or 1e9) / max(1, len(found))) for found in ids[1]]
            report_vectors(tasks, model, read, firsts, seconds, shares)


def report_spans(
    tasks: Tasks,
    method: str,
    read: int | None,
    firsts: list[np.ndarray],
    seconds: list[np.ndarray],
    shares: list[float],
    words_too: bool,
) -> None:
    """Report each task by its spans and, with `words_too`, by spans and words together."""
    at = 0
    for task, pairs in tasks.items():
        mine = slice(at, at := at + len(pairs))
        scores, texts = span_scores(firsts[mine], seconds[mine]), [pair[1] for pair in pairs]
        report(task, method, read, scores, texts, shares[mine])
        if words_too:
            both = z_scores(scores) + z_scores(
                word_scores(pairs, read and 4 * read)["tf-idf"]
            )  # as many bytes, about
            report(task, f"{method}, and words", read, both, texts, shares[mine])


def report_vectors(
    tasks: Tasks,
    model: str,
    read: int | None,
    firsts: np.ndarray,
    seconds: np.ndarray,
    shares: list[float],
) -> None:
    """Report each task, whose texts come in order in the rows of `firsts` and `seconds` (texts, dim)."""
    at = 0
    for task, pairs in tasks.items():
        mine = slice(at, at + len(pairs))
        at += len(pairs)
        for centred in (False, True):
            mean = seconds[mine].mean(0) if centred else 0.0
            scores = scaled(firsts[mine], mean) @ scaled(seconds[mine], mean).T
            report(
                task,
                model,
                read,
                scores,
                [pair[1] for pair in pairs],
                shares[mine],
                centred=centred,
            )


def sentence_scores(tasks: Tasks, model: str, reads: list[int | None]) -> None:
    """Report the vectors of a model of sentence-transformers: of each text, the mean over its windows."""
    from sentence_transformers import SentenceTransformer

    net = SentenceTransformer(model, device="cpu")
    window = net.max_seq_length - net.tokenizer.num_special_tokens_to_add()
    texts = [[pair[side] for pairs in tasks.values() for pair in pairs] for side in (0, 1)]
    places = [
        net.tokenizer(side, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for side in texts
    ]
    for read in reads:
        sides = []
        for side, found in zip(texts, places, strict=True):
            parts, owners, counts = [], [], []
            for i, (text, offsets) in enumerate(zip(side, found["offset_mapping"], strict=True)):
                cut = offsets[:read]
                starts = [*(start for start, _ in cut[::window]), cut[-1][1]]
                parts += [text[start:stop] for start, stop in pairwise(starts)]
                owners += [i] * (len(starts) - 1)
                counts += [min(window, len(cut) - at) for at in range(0, len(cut), window)]
            vectors = net.encode(parts, normalize_embeddings=True) * np.array(counts)[:, None]
            out = np.zeros((len(side), vectors.shape[1]), np.float32)
            np.add.at(out, owners, vectors)
            sides.append(scaled(out, 0.0))
        shares = [min(1.0, (read or 1e9) / len(offsets)) for offsets in places[1]["offset_mapping"]]
        report_vectors(tasks, model, read, *sides, shares)


def draw(results: list[Path], task: str, output: Path) -> None:
    """Draw recall at 1 by how much of a document is read, one curve for each method; vectors as they are."""
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for path in results:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["task"] == task and not row.get("centred"):
                point = row["bytes"], row["recall_1"], row["se"]
                curves[Path(row["method"]).name].append(point)
    figure = Figure(figsize=(5.0, 2.7), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        bytes_read, recall, errors = np.array(sorted(points)).T
        axes.plot(bytes_read, recall, "o-", linewidth=1.2, markersize=4, label=name)
        axes.fill_between(bytes_read, recall - errors, recall + errors, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="bytes read of each text", ylabel=f"recall at 1, {task}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(output, dpi=300)


def sizes(text: str) -> list[int | None]:
    return [None if each == "all" else parse_size(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what vectors find.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the pairs")
    make.add_argument("folder", type=Path)
    make.add_argument("archives", type=Path, nargs="+", help="wheels and Debian packages")
    for name in ("words", "sentences", "vectors"):
        command = commands.add_parser(name)
        if name != "words":
            command.add_argument("--model", required=name == "sentences", default="longnet-tiny")
        if name == "vectors":
            command.add_argument("--span", type=parse_size, help="compare spans of so many tokens")
            command.add_argument(
                "--words", action="store_true", help="with --span: also with TF-IDF added"
            )
        command.add_argument("folder", type=Path)
        command.add_argument(
            "--read",
            type=sizes,
            default=[None],
            help="bytes or tokens of each text, as 2Ki,8Ki,all",
        )
        command.add_argument("--tasks", help="only these, as py-S,man")
        command.add_argument("--pairs", type=int, help="only so many pairs of each")
    command.epilog = "More options of `longnet encode` may follow after --."
    given = [*sys.argv[1:], "--"]
    command = commands.add_parser("picture", help="draw recall by how much is read")
    command.add_argument("output", type=Path, help="a .png, .svg or .pdf")
    command.add_argument(
        "results", type=Path, nargs="+", help="files with what `words` and `vectors` have printed"
    )
    command.add_argument("--task", default="py-L")
    args, options = parser.parse_args(given[: given.index("--")]), given[given.index("--") + 1 : -1]
    if args.command == "picture":
        draw(args.results, args.task, args.output)
        return
    if args.command == "make":
        args.folder.mkdir(parents=True, exist_ok=True)
        with (args.folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
            for task, pairs in make_tasks(sorted(args.archives)).items():
                rows = [
                    json.dumps({"task": task, "first": a, "second": b}) + "\n" for a, b in pairs
                ]
                file.writelines(rows)
                digest = hashlib.sha256("".join(rows).encode()).hexdigest()
                print(f"{task}: {len(rows)} pairs, SHA-256 {digest[:16]}", file=sys.stderr)
        return
    if args.command == "vectors" and args.words and not args.span:
        sys.exit("--words adds words to the scores of spans: give --span")
    tasks = read_tasks(args.folder, args.tasks)
    tasks = {task: pairs[: args.pairs] for task, pairs in tasks.items()}
    if args.command == "vectors":
        vector_scores(tasks, args.model, args.read, options, args.span, args.words)
        return
    if args.command == "sentences":
        sentence_scores(tasks, args.model, args.read)
        return
    for read in args.read:
        for task, pairs in tasks.items():
            seconds = [second for _, second in pairs]
            shares = [min(1.0, (read or 1e9) / len(second.encode())) for second in seconds]
            for method, scores in word_scores(pairs, read).items():
                report(task, method, read, scores, seconds, shares)


if __name__ == "__main__":
    try:
        main()
    except LongNetError as error:
        sys.exit(f"retrieval: {error}")
