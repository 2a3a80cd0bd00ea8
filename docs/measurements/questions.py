"""Ask for needles in their own words and in others, at several places of a span of 128 tokens. Nothing is trained.

    python examples/real_model.py runs/real
    python docs/measurements/questions.py runs/real/smollm2 window:1Ki,sinks=4 finding --ask finding:chosen_every=4 \\
      --text runs/real/prose/sec[A-E]*.txt
    python docs/measurements/questions.py runs/real/smollm2 dense --text runs/real/prose/sec[A-E]*.txt --tokens 7500

A document of prose hides `--needles` like "The pass key of the red fox is 48213.", evenly, in any order, none in its
last 2,048 tokens. Ten of them are asked for. In the same words, a question is "The pass key of the red fox is"; in
others, it has no word of the name: "Which number belongs to the animal with a crimson coat? The number is". What an
answer costs that cannot be found is told by such a question about something that has no number. The other needles have
other names.

The document is read once per pattern, and each question comes alone after it, in a forked process. Before a question
comes as much more prose as moves the first token of its answer to an `--offsets` of a span of 128 tokens: patterns that
look over the past once per span do so at its first token. `--ask` names patterns with which the saved states of those
with chosen blocks are asked, too.

It writes one line of JSON per pattern, way of asking and offset: `pattern, asked` (the pattern of the questions),
`words` (same, other or none), `offset, tokens, needles, questions` and `nats` (per token of the answers). The table on
stderr has a row for each way, and the nats by offset.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from passage import apart, nats_of
from ruler import ADJECTIVES, NOUNS

from longnet_cli import CausalStream, ConfigError, LongNetError, ModelFolder, Net, Tokenizer, open_stream, parse_pattern
from longnet_cli.basics.sizes import parse_size

SPAN = 128  # tokens
LAST = 2048  # tokens after the last needle
NEEDLE = "\nThe pass key of the {} is"
OTHER = "\nWhich number belongs to {}? The number is"
ABSENT = "the tall bird that cannot fly"
NAMES = {  # and the same in other words
    "red fox": "the animal with a crimson coat",
    "old king": "the aged ruler of a realm",
    "blind musician": "the one who plays songs but cannot see",
    "angry bee": "the furious insect that makes honey",
    "frozen puddle": "the bit of water that turned to ice",
    "rich merchant": "the wealthy person who buys and sells",
    "sick child": "the boy or girl with a fever",
    "wooden spade": "the digging tool made from timber",
    "sleepy kitten": "the baby cat that needs a nap",
    "famous doctor": "the healer whom everybody has heard about",
}

Row = dict[str, Any]


class Document:
    """The ids of a document with needles, the prose that follows, and questions and answers by way of asking."""

    def __init__(self, tokenizer: Tokenizer, paths: list[str], tokens: int, needles: int, seed: int) -> None:
        def ids(text: str) -> np.ndarray:
            return tokenizer.encode(text).astype(np.int64)

        rng = np.random.default_rng(seed)
        prose = np.concatenate([ids(Path(path).read_text(encoding="utf-8", errors="replace")) for path in paths])
        others = rng.permutation([f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS)])
        numbers = {name: f" {rng.integers(10_000, 100_000)}" for name in [*NAMES, *others[: needles - len(NAMES)]]}
        hidden = [ids(f"{NEEDLE.format(name)}{numbers[name]}.\n") for name in rng.permutation([*numbers])]
        step = (tokens - LAST - sum(map(len, hidden))) // len(hidden)  # tokens of prose before each needle
        needed = step * len(hidden) + LAST + SPAN
        if step < 1 or len(prose) < needed:
            raise ConfigError(
                f"{len(hidden)} needles and {len(prose)} tokens of prose do not make {tokens}: change --needles, "
                "--tokens or --text"
            )
        parts = [np.concatenate([prose[i * step : (i + 1) * step], needle]) for i, needle in enumerate(hidden)]
        self.ids = np.concatenate([*parts, prose[step * len(hidden) : needed - SPAN]])
        self.next = prose[needed - SPAN : needed]
        self.questions = {
            "same": [(ids(NEEDLE.format(name)), ids(numbers[name])) for name in NAMES],
            "other": [(ids(OTHER.format(words)), ids(numbers[name])) for name, words in NAMES.items()],
            "none": [(ids(OTHER.format(ABSENT)), ids(numbers[name])) for name in NAMES],
        }


def ask(net: Net, stream: Any, position: int, document: Document, offsets: list[int]) -> Iterator[Row]:
    """Yield a row per way of asking and offset, of a stream that has read `position` tokens and stays as it is."""
    for words, pairs in document.questions.items():
        for offset in offsets:
            nats: list[float] = []
            for question, answer in pairs:
                more = document.next[: (offset - position - len(question)) % SPAN]
                whole = np.concatenate([more, question, answer])
                nats += apart(net, stream, partial(nats_of, net, stream, whole))[-len(answer) :]
            yield {"words": words, "offset": offset, "questions": len(pairs), "nats": float(np.mean(nats))}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of each pattern. All patterns get the same document and questions."""
    torch.set_num_threads(1)  # other threads would be missing in a forked process
    folder = ModelFolder.find(options.model)
    tokenizer = folder.tokenizer()
    document = Document(tokenizer, options.text, options.tokens, options.needles, options.seed)
    for written in options.patterns:
        net = folder.net(pattern=None if written == "dense" else parse_pattern(written))
        text = np.concatenate([net.start_rows(folder.bos(tokenizer)), document.ids])
        row = {"pattern": written, "asked": written, "tokens": len(text), "needles": options.needles}
        stream = open_stream(net)
        for start in range(0, len(text), options.chunk):
            nats_of(net, stream, text[start : start + options.chunk])
        for result in ask(net, stream, len(text), document, options.offsets):
            yield row | result
        if options.ask and isinstance(stream, CausalStream) and net.config.pattern.chosen:
            with tempfile.TemporaryDirectory() as place:
                stream.save(Path(place) / "state")
                for asked in options.ask:
                    net = folder.net(pattern=parse_pattern(asked))
                    saved = CausalStream.load(net, Path(place) / "state")
                    for result in ask(net, saved, len(text), document, options.offsets):
                        yield row | {"asked": asked} | result


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines of Markdown: a row per pattern and way of asking, and a column of nats per offset."""
    offsets = list(dict.fromkeys(row["offset"] for row in rows))
    yield "| pattern | words | " + " | ".join(f"at {offset}" for offset in offsets) + " |"
    yield "|---" * (2 + len(offsets)) + "|"
    values = iter(rows)
    while row_of := list(islice(values, len(offsets))):
        read, asked = (row_of[0][key] for key in ("pattern", "asked"))
        name = f"`{read}`" + (f", asked with `{asked}`" if asked != read else "")
        yield f"| {name} | {row_of[0]['words']} | " + " | ".join(f"{row['nats']:.2f}" for row in row_of) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("patterns", nargs="+")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="prose, joined")
    parser.add_argument("--ask", nargs="+", default=[], metavar="PATTERN", help="of questions to saved states")
    parser.add_argument("--tokens", type=parse_size, default=32_768, help="of the document")
    parser.add_argument("--needles", type=int, default=400, help="in the document; ten are asked for")
    parser.add_argument("--offsets", type=int, nargs="+", default=[0, 40, 100], help=f"of answers, in {SPAN} tokens")
    parser.add_argument("--chunk", type=parse_size, default=4096, help="tokens that are in memory at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    if options.needles < len(NAMES):
        parser.error(f"--needles: {len(NAMES)} are asked for")
    rows = []
    try:
        for row in measure(options):
            print(json.dumps(row), flush=True)
            rows.append(row)
    except (LongNetError, ValueError, OSError) as error:
        parser.exit(2, f"questions: {error}\n")
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
