"""Ask RULER's questions about long documents, to see how far back a model finds what it has read. Nothing is trained.

    python examples/real_model.py runs/real
    python docs/measurements/ruler.py runs/real/smollm2 dense window:1Ki,sinks=4 finding --text prose.txt

The tasks are seven of RULER (arXiv 2404.06654), in its words: needles ("One of the special magic numbers for calm-river
is: 4821937.") lie in repeated sentences, in prose, or among other needles, and chains of variables in repeated
sentences. Four things differ. A document is read once and all its questions are asked of it, each in a forked process;
so it holds the needles of all questions, 25 or as many as fit in a third of it, and even `niah_single` has many. The
prose is your `--text`. Words come from two short lists. And the model is given the right answer and is scored by its
log-probabilities, because a model that was not taught to answer goes on with something else.

It writes one line of JSON per pattern, task, length, document and number of `--every`: `pattern, task, tokens,
document, every, questions, right` (the share of values of which the model ranks every token first), `nats` (per token
of the values) and `seconds`. `dense` reads no more tokens than the model was trained on. The table
on stderr has the means.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from passage import apart

from longnet_cli import (
    ConfigError,
    LongNetError,
    ModelFolder,
    Net,
    Tokenizer,
    open_stream,
    parse_pattern,
)
from longnet_cli.basics.sizes import parse_size

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
WORDS = """
able bold brave brief calm clean clever cold cool curious dark deep eager early fair fancy fast fine firm fresh gentle
glad grand happy honest huge humble keen kind large late light lively lucky mellow mild modest narrow neat noble odd
plain proud quick quiet rapid rare ripe rough round sharp shy silent simple slow smart smooth soft solid stout sweet
swift tall tame thin tidy tiny vast warm wild wise young

anchor apple arrow badge basket beach bell bird boat bridge brook candle castle cave chair circle cliff cloud coast
corner crown desert door drum field flame flute forest garden gate glove hammer harbor hill horse island jacket kettle
ladder lake lamp lantern leaf library market meadow mirror mountain needle ocean orchard paper pencil piano pillow
planet pond prairie puzzle ribbon river road rocket saddle shadow shell ship spoon stone street table temple tower
valley violin wagon window
"""
ADJECTIVES, NOUNS = (words.split() for words in WORDS.split("\n\n"))


class Task(NamedTuple):
    """A task of needles: where they lie, and how many there are per question."""

    hay: str  # noise, prose or needles
    kind: str = "number"  # of value: number or uuid
    keys: int = 1  # needles per question; only the first one's key is asked for
    values: int = 1  # needles of a key


TASKS = {
    "niah_single_1": Task("noise"),
    "niah_single_2": Task("prose"),
    "niah_single_3": Task("prose", "uuid"),
    "niah_multikey_1": Task("prose", keys=4),
    "niah_multikey_2": Task("needles"),
    "niah_multivalue": Task("prose", values=4),
    "vt": None,  # chains of a variable that has a number, and of 4 that have the value of the one before
}


class Question(NamedTuple):
    """A question about a document, and the values that answer it."""

    text: str
    values: list[str]
    between: str  # values


class Writer:
    """A writer of documents and their questions, with random words and numbers."""

    def __init__(self, tokenizer: Tokenizer, prose: str, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        self.sentences = [
            found.group() for found in re.finditer(r"\S.*?(?:[.!?]\s+|\n\n|$)", prose, re.DOTALL)
        ]

    def document(self, name: str, tokens: int, most: int) -> tuple[np.ndarray, list[Question]]:
        """Return the ids of a document (at most `tokens`,), and its questions, `most` or as many as fit."""
        task = TASKS[name]
        needles, questions = self._needles(task, most) if task else self._chains(most)
        if task:
            before = (
                f"Some special magic {task.kind}s are hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {task.kind}s afterwards.\n"
            )
        else:
            before = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            example, asked = self._chains(1)
            before += (
                NOISE.join(example[0]) + asked[0].text + " ".join(asked[0].values) + "\n\n" + before
            )
        start = self._ids(before)
        found = [[self._ids(part) for part in parts] for parts in needles]
        room = tokens - len(start)
        sizes = np.cumsum([sum(map(len, parts)) for parts in found])
        number = int(
            np.searchsorted(
                sizes, room if task and task.hay == "needles" else room // 3, side="right"
            )
        )
        if not number:
            raise ConfigError(
                f"{name}: no needle fits in a third of {tokens} tokens: give more --tokens"
            )
        hay = self._hay(task, room - int(sizes[number - 1]), needles[number:])
        pieces = [part for parts in found[:number] for part in parts]
        if task:  # in any order; those of a chain keep theirs
            pieces = [pieces[i] for i in self.rng.permutation(len(pieces))]
            order = np.arange(len(pieces))
        else:
            order = np.argsort(
                np.concatenate([np.sort(self.rng.random(len(parts))) for parts in found[:number]])
            )
        places = np.sort(self.rng.integers(len(hay) + 1, size=len(pieces)))
        text = [start]
        for piece, place, last in zip(
            [pieces[i] for i in order], places, [0, *places[:-1]], strict=True
        ):
            text += [*hay[last:place], piece]
        return np.concatenate([*text, *hay[places[-1] :]]), questions[:number]

    def _needles(self, task: Task, number: int) -> tuple[list[list[str]], list[Question]]:
        """Return the sentences of each question, and the questions. More needles than questions are for the hay."""
        pairs = self.rng.permutation(len(ADJECTIVES) * len(NOUNS))
        keys = [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pairs]
        needles, questions = [], []
        for place in range(0, len(keys) - task.keys, task.keys):
            key, *others = keys[place : place + task.keys]
            values = [self._value(task.kind) for _ in range(task.values)]
            of_keys = [(key, value) for value in values] + [
                (other, self._value(task.kind)) for other in others
            ]
            needles.append(
                [f"One of the special magic {task.kind}s for {k} is: {v}.\n" for k, v in of_keys]
            )
            many = f"{task.kind}s" if task.values > 1 else task.kind
            what, verb = ("What are all", "are") if task.values > 1 else ("What is", "is")
            subject = f"the special magic {many} for {key} mentioned in the provided text"
            ask = f"\n{what} {subject}? {subject[0].upper()}{subject[1:]} {verb}"
            questions.append(Question(ask, [f" {value}" for value in values], ","))
        return needles if task.hay == "needles" else needles[:number], questions[:number]

    def _chains(self, number: int) -> tuple[list[list[str]], list[Question]]:
        """Return the assignments of each chain, in order, and the questions."""
        needles, questions = [], []
        for _ in range(number):
            names = ["".join(chr(65 + i) for i in self.rng.integers(26, size=5)) for _ in range(5)]
            value = self.rng.integers(10_000, 100_000)
            needles.append([f"VAR {names[0]} = {value}\n"])
            needles[-1] += [f"VAR {new} = VAR {old}\n" for old, new in pairwise(names)]
            ask = (
                f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
                "According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
                f"value {value}, they are:"
            )
            questions.append(Question(ask, [f" {name}" for name in names], ""))
        return needles, questions

    def _value(self, kind: str) -> str:
        if kind == "number":
            return str(self.rng.integers(1_000_000, 10_000_000))
        return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))

    def _hay(self, task: Task | None, tokens: int, needles: list[list[str]]) -> list[np.ndarray]:
        """Return the ids of pieces of hay, between which needles may lie: `tokens` in all, or a few less."""
        if task and task.hay == "needles":
            texts = [text for texts in needles for text in texts]
        elif task and task.hay == "prose":
            first = int(self.rng.integers(len(self.sentences)))
            texts = self.sentences[first:] + self.sentences[:first]
        else:
            texts = [NOISE]
        pieces: list[np.ndarray] = []
        while texts:
            for text in texts:
                ids = self._ids(text)
                if len(ids) > tokens:
                    return pieces
                pieces.append(ids)
                tokens -= len(ids)
        raise ConfigError("no text for the hay: give longer files to --text")

    def _ids(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text).astype(np.int64)


def answer(
    net: Net, stream: Any, tokenizer: Tokenizer, question: Question
) -> list[tuple[bool, float, int]]:
    """Read a question and its answer.

    Return of each value if all its tokens are ranked first, nats and tokens.
    """
    parts, places = [tokenizer.encode(question.text)], []
    for number, value in enumerate(question.values):
        if number and question.between:
            parts.append(tokenizer.encode(question.between))
        ids = tokenizer.encode(value)
        start = sum(map(len, parts))
        places.append(slice(start - 1, start - 1 + len(ids)))
        parts.append(ids)
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    with torch.inference_mode():
        hidden = [stream(ids[None, : len(parts[0])])]
        hidden.append(stream(ids[None, len(parts[0]) :]))
        logprobs = net.logits(torch.cat(hidden, 1)[0, :-1]).float().log_softmax(-1)
    nats, right = -logprobs.gather(1, ids[1:, None])[:, 0], logprobs.argmax(-1) == ids[1:]
    return [(bool(right[at].all()), float(nats[at].sum()), at.stop - at.start) for at in places]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of each pattern. All patterns get the same documents and questions."""
    torch.set_num_threads(1)  # other threads would be missing in a forked process
    folder = ModelFolder.find(args.model)
    tokenizer = folder.tokenizer()
    prose = "".join(Path(path).read_text(encoding="utf-8", errors="replace") for path in args.text)
    for written in args.patterns:
        net = folder.net(pattern=None if written == "dense" else parse_pattern(written))
        start = net.start_rows(folder.bos(tokenizer))
        for tokens, name, document in args.documents:
            if (
                written == "dense"
                and net.config.max_tokens
                and tokens > net.config.max_tokens - 100
            ):
                continue  # for the question
            seed = [args.seed, tokens, [*TASKS].index(name), document]
            ids, questions = Writer(tokenizer, prose, seed).document(name, tokens, args.questions)
            begin, stream = time.perf_counter(), open_stream(net)
            text = torch.from_numpy(np.concatenate([start, ids]))
            with torch.inference_mode():
                for chunk in text.split(args.chunk):
                    stream(chunk[None])
            for every in args.every if net.config.pattern.chosen else [None]:
                found = []
                for question in questions:
                    found += apart(
                        net, stream, partial(answer, net, stream, tokenizer, question), every
                    )
                right, nats, lengths = zip(*found, strict=True)
                row = {
                    "pattern": written,
                    "task": name,
                    "tokens": tokens,
                    "document": document,
                    "every": every,
                }
                row |= {
                    "questions": len(questions),
                    "right": sum(right) / len(right),
                    "nats": sum(nats) / sum(lengths),
                }
                yield {**row, "seconds": round(time.perf_counter() - begin, 1)}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines of Markdown: a row per pattern and length, with the means of documents: right, and nats."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    yield "| pattern | tokens | " + " | ".join(tasks) + " |"
    yield "|---" * (len(tasks) + 2) + "|"
    cells: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["pattern"], row["every"], row["tokens"]][row["task"]].append(
            (row["right"], row["nats"])
        )
    for (pattern, every, tokens), of_task in cells.items():
        means = (np.mean(of_task[name], 0) if of_task[name] else None for name in tasks)
        columns = ["" if mean is None else f"{mean[0]:.2f}, {mean[1]:.2f}" for mean in means]
        yield (
            f"| `{pattern}`{f', every {every}' if every else ''} | {tokens:,} | "
            + " | ".join(columns)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder")
    parser.add_argument("patterns", nargs="+")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="prose, joined")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*TASKS],
        default=[*TASKS],
        metavar="TASK",
        help=" ".join(TASKS),
    )
    parser.add_argument(
        "--tokens", type=parse_size, nargs="+", default=[2048, 8000, 32_768], help="of a document"
    )
    parser.add_argument("--haystacks", type=int, default=2, help="documents per task and length")
    parser.add_argument("--questions", type=int, default=25, help="of a document, if so many fit")
    parser.add_argument(
        "--every", type=int, nargs="+", default=[4], help="chosen_every of the questions"
    )
    parser.add_argument(
        "--chunk", type=parse_size, default=4096, help="tokens that are in memory at once"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    args.documents = [
        (t, name, i) for t in args.tokens for name in args.tasks for i in range(args.haystacks)
    ]
    rows = []
    try:
        for row in measure(args):
            print(json.dumps(row), flush=True)
            rows.append(row)
    except (LongNetError, ValueError, OSError) as error:
        parser.exit(2, f"ruler: {error}\n")
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
