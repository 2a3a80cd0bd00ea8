"""Hide pass keys in prose and ask for them, to see how far back a model finds what it has read.

    python examples/real_model.py runs/real
    python docs/measurements/passkey.py ask runs/real/smollm2 runs/real/prose/secA*.txt dense window:1Ki,sinks=4

Sentences like "The pass key of the red fox is 48213." are hidden in prose. The document ends with the questions, "The
pass key of the red fox is", each `distance` tokens after its sentence. An answer is right if the model ranks every
token of the number first, given the tokens before it. Greedy decoding then gives the number.

`ask` writes one line of JSON per pattern and distance: `pattern, distance, questions, right, nats` (per token of the
numbers). If the model does not read that far back, `questions` is 0 and `nats` is null. `dense` reads only the last
tokens of a document, as many as the model was trained on.

    python docs/measurements/passkey.py alone runs/real/smollm2 runs/real/prose/secA*.txt dense window:1Ki,chosen=32x32

`alone` hides all `--keys` in one document, evenly, none in its last 1,800 tokens, and asks each question as if it came
alone after the document. Patterns with chosen blocks read the questions with every number of `--every` in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from longnet_cli import ConfigError, LongNetError, ModelFolder, Tokenizer, parse_pattern
from longnet_cli.basics.sizes import parse_size

LAST = 1800  # tokens after the last pass key of `alone`
COLORS = ["red", "blue", "green", "black", "white", "brown", "yellow", "silver", "golden", "purple"]
ANIMALS = ["fox", "bear", "horse", "eagle", "whale", "tiger", "rabbit", "camel", "snake", "goose"]
DISTANCES = [1000, 2000, 4000, 7000, 16_000, 32_000]

Answer = tuple[int, int, int]  # distance, and the places [start, stop) of the number in the document


class Writer:
    """A writer of documents of prose, with sentences to remember and questions at the end."""

    def __init__(self, tokenizer: Tokenizer, paths: list[str], seed: int) -> None:
        texts = [tokenizer.encode(Path(path).read_text(encoding="utf-8", errors="replace")) for path in paths]
        self.tokenizer, self.prose, self.rng = tokenizer, np.concatenate(texts), np.random.default_rng(seed)

    def document(self, tokens: int, distances: list[int]) -> tuple[np.ndarray, list[Answer]]:
        """Return the ids (tokens,) of a document and its answers: a question for each of `distances`, in any order."""
        names = self.rng.permutation([f"{c} {a}" for c, a in product(COLORS, ANIMALS)])[: len(distances)]
        questions, length = [], 0
        for name, distance in zip(names, self.rng.permutation(distances), strict=True):
            question = self.tokenizer.encode(f"\nThe pass key of the {name} is")
            number = self.tokenizer.encode(f" {self.rng.integers(10_000, 100_000)}")
            end = self.tokenizer.encode(".\n")
            questions.append((length, int(distance), question, number, end))
            length += len(question) + len(number) + len(end)
        first = tokens - length  # the place of the questions
        start = int(self.rng.integers(max(1, len(self.prose) - tokens)))
        ids = np.resize(self.prose[start:], tokens)  # repeated if there is too little of it
        answers, free = [], 0
        for place, distance, *parts in sorted(questions, key=lambda found: found[0] - found[1]):
            sentence = np.concatenate(parts)
            at = max(free, first + place - distance)
            free = at + len(sentence)
            ids[at:free] = sentence
            ids[first + place : first + place + len(sentence)] = sentence
            number = first + place + len(parts[0])
            answers.append((distance, number, number + len(parts[1])))
        if free > first:
            raise ConfigError("so many pass keys do not fit: give more --tokens or fewer --keys")
        return ids, answers


def ask(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of each pattern. All patterns get the same questions."""
    import torch

    from longnet_cli import Document
    from longnet_cli.running.reader import Reader, Window

    folder = Path(args.model)
    tokenizer, dtype = ModelFolder(folder).tokenizer(), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    for pattern in args.patterns:
        net = ModelFolder(folder).net(pattern=None if pattern == "dense" else parse_pattern(pattern), dtype=dtype)
        if pattern == "dense" and not net.config.as_trained:
            raise ConfigError(f"{folder} has a pattern of its own: dense is for a model without one")
        writer = Writer(tokenizer, args.texts, args.seed)
        found: dict[int, list[tuple[bool, float]]] = defaultdict(list)
        for _ in range(args.documents):
            ids, answers = writer.document(args.tokens, args.distances * args.keys)
            before = len(net.start_rows(ModelFolder(folder).bos(tokenizer)))
            limit = (net.config.max_tokens or len(ids) + before) - before if pattern == "dense" else len(ids)
            lost = max(0, len(ids) - limit)
            document = Document("pass keys", ids[lost:], len(ids) - lost, "pass keys")
            text = net.sequence(document, ModelFolder(folder).bos(tokenizer))
            first = min(start for _, start, _ in answers) - 1 - lost + text.own_start
            reader = Reader(net, chunk=args.chunk, dtype=args.dtype)
            pieces = [piece for group in reader.read([Window(text, 0, len(text), first)]) for piece in group]
            hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
            with torch.inference_mode():
                logprobs = net.logits(hidden).float().log_softmax(-1)
            for distance, start, stop in answers:
                if start - distance < lost:
                    continue
                at = slice(start - 1 - lost + text.own_start - first, stop - 1 - lost + text.own_start - first)
                targets = torch.from_numpy(ids[start:stop].astype(np.int64))
                nats = -logprobs[at].gather(1, targets[:, None]).mean()
                found[distance].append((bool((logprobs[at].argmax(-1) == targets).all()), float(nats)))
            print(f"{pattern}: {sum(right for each in found.values() for right, _ in each)} right", file=sys.stderr)
        for distance in args.distances:
            rights = [right for right, _ in found[distance]]
            nats = float(np.mean([each for _, each in found[distance]])) if rights else None
            row = {"pattern": pattern, "distance": distance, "questions": len(rights), "right": sum(rights)}
            yield {**row, "nats": nats}


def alone(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per pattern and number of `--every`: all questions about one document, each in a forked process."""
    import torch
    from passage import apart, nats_of

    from longnet_cli import open_stream

    torch.set_num_threads(1)  # other threads would be missing in a forked process
    folder = ModelFolder.find(args.model)
    tokenizer = folder.tokenizer()
    writer = Writer(tokenizer, args.texts, args.seed)
    names = writer.rng.permutation([f"{c} {a}" for c, a in product(COLORS, ANIMALS)])[: args.keys]
    numbers = writer.rng.integers(10_000, 100_000, args.keys)
    parts, step, begin = [], (args.tokens - LAST) // args.keys, int(writer.rng.integers(len(writer.prose) // 2))
    for name, number in zip(names, numbers, strict=True):
        sentence = tokenizer.encode(f"\nRemember this: the pass key of the {name} is {number}.\n")
        parts += [writer.prose[begin : begin + step - len(sentence)], sentence]
        begin += step
    ids = np.concatenate([*parts, writer.prose[begin : begin + LAST]]).astype(np.int64)
    for written in args.patterns:
        net = folder.net(pattern=None if written == "dense" else parse_pattern(written))
        stream = open_stream(net)
        text = np.concatenate([net.start_rows(folder.bos(tokenizer)), ids])
        for start in range(0, len(text), args.chunk):
            nats_of(net, stream, text[start : start + args.chunk])
        for every in args.every if net.config.pattern.chosen else [None]:
            nats = []
            for name, number in zip(names, numbers, strict=True):
                question = tokenizer.encode(f"\nThe pass key of the {name} is")
                answer = tokenizer.encode(f" {number}")
                whole = np.concatenate([question, answer]).astype(np.int64)
                nats += apart(net, stream, partial(nats_of, net, stream, whole), every)[len(question) - 1 :]
            row = {"pattern": written, "every": every, "tokens": len(text), "questions": args.keys}
            yield {**row, "nats": float(np.mean(nats))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    uses = parser.add_subparsers(dest="use", required=True)
    for name, text in (
        ("ask", "print what patterns find again"),
        ("alone", "print what patterns find again, one question at a time"),
    ):
        use = uses.add_parser(name, help=text, description=text)
        use.add_argument("model", help="a Hugging Face model folder, whose tokenizer and weights are taken")
        use.add_argument("words", nargs="+", metavar="FILE|PATTERN", help="texts of prose, and patterns")
        use.add_argument("--seed", type=int, default=0)
        if name == "alone":
            use.add_argument("--tokens", type=parse_size, default=6761, help="of the document")
            use.add_argument("--keys", type=int, default=8, help="pass keys in the document")
            use.add_argument("--every", type=int, nargs="+", default=[16, 4, 1], help="chosen_every of the questions")
            use.add_argument("--chunk", type=parse_size, default=4096, help="tokens that are in memory at once")
            continue
        use.add_argument("--documents", type=int, default=4)
        use.add_argument("--tokens", type=parse_size, default=33_000, help="of each document")
        use.add_argument("--keys", type=int, default=4, help="pass keys of each distance in a document")
        use.add_argument("--distances", type=parse_size, nargs="+", default=DISTANCES)
        use.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
        use.add_argument("--chunk", type=parse_size, default=4096, help="tokens that are in memory at once")
    args = parser.parse_args()
    args.texts = [word for word in args.words if Path(word).is_file()]
    args.patterns = [word for word in args.words if word not in args.texts]
    if not args.texts or not args.patterns:
        parser.error("give files of prose and patterns")
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"{args.model}: not the folder of a model")
    try:
        for pattern in args.patterns:
            parse_pattern(pattern)
        for row in (ask if args.use == "ask" else alone)(args):
            print(json.dumps(row), flush=True)
    except ValueError as error:
        parser.error(str(error))
    except LongNetError as error:
        parser.exit(error.exit_code, f"passkey: {error}\n")


if __name__ == "__main__":
    main()
