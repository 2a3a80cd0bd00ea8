"""Ask for facts in a long text: `longnet ask` with 1 to 4 passages, rank-bm25 and transformers, and `finding`.

    pip install 'longnet-cli[gguf]' rank-bm25
    python examples/real_model.py runs/real
    apt-get download bible-kjv bible-kjv-text && for x in bible-kjv*.deb; do dpkg -x $x kjv; done
    kjv/usr/bin/bible -f -p kjv/usr/lib exo19:1-rev22:21 > kjv.txt
    python docs/measurements/ask.py runs/real/smollm2 --text kjv.txt --tokens 128k
    python docs/measurements/ask.py runs/real/smollm2 --text kjv.txt --passages --pattern finding:chosen_every=4

The first `--tokens` of the text get 55 facts, evenly, in any order, each on a line of its own. They are asked in five
ways: a code in the same words and in other words, a word in the same words and in other words, and three numbers of one
person. All questions were written down before any of them was asked.

A line of JSON per way and method has `questions`, `found` (the share of questions whose facts are all among the
passages that the model reads), `nats` (per token of the right answer, after its beginning, such as "The number is";
the mean over questions), `se` (its standard error), `exact` (of how many answers each token is the likeliest) and
`seconds` (of CPU time, per question). The methods are `ask 1` to `ask 4` (passages); the same of rank-bm25 and
transformers, which find and read what longnet has cut and puts into the prompt; `right passages` (those with the facts
alone); and each `--pattern`, which reads the whole text once, with the question after it. The table on stderr has the
nats.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longnet_cli import CausalStream, LongNetError, ModelFolder, Tokenizer, parse_pattern
from longnet_cli.basics.sizes import parse_size
from longnet_cli.data.documents.passages import Passage, PassageIndex
from longnet_cli.data.documents.text_pieces import cut
from longnet_cli.data.files.opened_inputs import Text
from longnet_cli.jobs.asking import SYSTEM, prompt
from longnet_cli.models.folder import Loaded
from longnet_cli.running.device import precision

CODES = {  # locker: (its code, the same locker in other words that keep a name)
    "Anderton": "4821", "Bellweather": "7306", "Cartmell": "1598", "Dunstable": "9043", "Eastlake": "2267",
    "Farrington": "6614", "Goodspeed": "3379", "Hollowell": "8152", "Inkpen": "5730", "Jessamine": "4096",
    "Kettleby": "7841", "Lorimer": "1263", "Marchbanks": "9508", "Netherby": "2985", "Oakhanger": "6047",
    "Pettigrew": "3714", "Quillfeather": "8826", "Ravenscar": "5191", "Stapleford": "4472", "Thistlewood": "7060",
}  # fmt: skip
CODE = "The code of the locker of Mr {} is {}."
CODE_SAME, CODE_OTHER = (
    "What is the code of the locker of Mr {}?",
    "Which number opens the cabinet that {} uses?",
)
WORDS = [  # a fact, a question in its words, one in others, the answer
    ("The lighthouse keeper of Skerry Point paints his door violet each spring.",
     "What colour does the lighthouse keeper of Skerry Point paint his door each spring?",
     "Which hue is put on the entrance by the man who tends the beacon?", "violet"),
    ("The bakery in Marlow Lane closes on Wednesday because the oven is swept.",
     "On which day is the bakery in Marlow Lane closed because the oven is swept?",
     "When can no bread be bought while the chimney is cleaned?", "Wednesday"),
    ("The ferry captain Ilse Brandt keeps a parrot in the wheelhouse.",
     "Which animal does the ferry captain Ilse Brandt keep in the wheelhouse?",
     "What bird lives with the woman who steers the boat?", "parrot"),
    ("The museum's oldest clock was built in Geneva by a watchmaker's widow.",
     "In which city was the museum's oldest clock built by a watchmaker's widow?",
     "Where does the most ancient timepiece of the collection come from?", "Geneva"),
    ("The glacier hut above Tarn Pass is heated with peat.",
     "With what is the glacier hut above Tarn Pass heated?",
     "Which fuel warms the mountaineers' shelter?", "peat"),
    ("The violin teacher of the orphanage came from Portugal on a cattle ship.",
     "From which country did the violin teacher of the orphanage come on a cattle ship?",
     "What is the homeland of the woman who taught the children music?", "Portugal"),
    ("The winner of the regatta was awarded a silver compass.",
     "What was the winner of the regatta awarded?",
     "Which prize did the fastest sailing crew receive?", "silver compass"),
    ("The physician Dorothea Lunt treats sea sickness with ginger.",
     "With what does the physician Dorothea Lunt treat sea sickness?",
     "Which root helps the doctor's nauseous passengers?", "ginger"),
    ("The telegraph cable from Fairhaven was cut by an anchor in November.",
     "By what was the telegraph cable from Fairhaven cut in November?",
     "How was the wire under the water damaged?", "anchor"),
    ("The apprentice of the glassblower sings in a choir called Halcyon.",
     "What is the choir called in which the apprentice of the glassblower sings?",
     "Which group of singers has the young craftsman joined?", "Halcyon"),
    ("The observatory on Mount Kessler is guarded by two geese.",
     "By what is the observatory on Mount Kessler guarded?",
     "Which fowl protect the astronomers' building?", "two geese"),
    ("The printer Augustin Vale sets his almanac in green ink.",
     "In which ink does the printer Augustin Vale set his almanac?",
     "What tint have the letters of the yearly calendar?", "green"),
    ("The orchard behind the parsonage grows quinces for the bishop.",
     "What does the orchard behind the parsonage grow for the bishop?",
     "Which fruit is raised for the churchman?", "quinces"),
    ("The schoolmistress of Penhallow measures rainfall with a brass funnel.",
     "With what does the schoolmistress of Penhallow measure rainfall?",
     "Which instrument does the teacher use in wet weather?", "brass funnel"),
    ("The locomotive Evangeline burns coal from Silesia.",
     "From where does the locomotive Evangeline burn coal?",
     "Which region supplies the train's fuel?", "Silesia"),
    ("The carpenter Osric Tanner made the altar rail of walnut.",
     "Of what did the carpenter Osric Tanner make the altar rail?",
     "Which timber was used for the church's barrier?", "walnut"),
    ("The inn at Crossgates serves soup of nettles on Sundays.",
     "Of what is the soup that the inn at Crossgates serves on Sundays?",
     "Which weed goes into the tavern's broth?", "nettles"),
    ("The mapmaker Leonie Hart lost her spectacles in Bremen.",
     "In which city did the mapmaker Leonie Hart lose her spectacles?",
     "Where were the cartographer's glasses mislaid?", "Bremen"),
    ("The bell of the fire brigade at Westerly is tuned to F sharp.",
     "To which note is the bell of the fire brigade at Westerly tuned?",
     "What pitch warns the town of flames?", "F sharp"),
    ("The beekeeper Tobias Crane wraps his hives in sailcloth.",
     "In what does the beekeeper Tobias Crane wrap his hives?",
     "Which fabric covers the insects' homes?", "sailcloth"),
]  # fmt: skip
LISTS = {"Abernathy": ("311", "724", "958"), "Bickerstaff": ("462", "837", "175"), "Culpepper": ("593", "248", "816"),
         "Drinkwater": ("684", "139", "407"), "Entwistle": ("752", "361", "920")}  # fmt: skip
VAULTS = ("north", "south", "west")
LIST, LIST_BEGIN = "Madam {} opens the {} vault with {}.", "Madam {} opens her vaults with"
LIST_ASKED = "With which three numbers does Madam {} open her vaults?"

OURS, OTHERS, RIGHT = "ask", "rank-bm25 and transformers", "right passages"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


class Question(NamedTuple):
    """A question, the beginning of its answer, the rest of it, and the lines that say it."""

    text: str
    begin: str
    answer: str
    lines: list[str]


def facts() -> tuple[list[str], dict[str, list[Question]]]:
    """Return the lines with facts, and the questions by the way of asking."""
    codes = {name: CODE.format(name, code) for name, code in CODES.items()}
    lists = {
        name: [LIST.format(name, vault, code) for vault, code in zip(VAULTS, numbers, strict=True)]
        for name, numbers in LISTS.items()
    }
    same = [
        Question(CODE_SAME.format(n), codes[n].rpartition(" ")[0], CODES[n], [codes[n]])
        for n in CODES
    ]
    words = [
        Question(same, line.partition(f" {answer}")[0], answer, [line])
        for line, same, _, answer in WORDS
    ]
    asked = {
        "code, same words": same,
        "code, other words": [
            Question(CODE_OTHER.format(n), "The number is", CODES[n], [codes[n]]) for n in CODES
        ],
        "word, same words": words,
        "word, other words": [
            Question(other, "It is", answer, [line]) for line, _, other, answer in WORDS
        ],
        "three numbers": [
            Question(LIST_ASKED.format(n), LIST_BEGIN.format(n), ", ".join(LISTS[n]), lists[n])
            for n in LISTS
        ],
    }
    return [
        *codes.values(),
        *(line for line, *_ in WORDS),
        *(line for each in lists.values() for line in each),
    ], asked


def hide(text: str, lines: Sequence[str], seed: int) -> str:
    """Return a text with the lines in it, evenly, in any order."""
    order, own = np.random.default_rng(seed).permutation(lines), text.splitlines(keepends=True)
    places = np.linspace(0, len(own), len(order) + 2).astype(int)
    parts = ["".join(own[begin:end]) for begin, end in pairwise(places)]
    return parts[0] + "".join(
        f"{line}\n{part}" for line, part in zip(order, parts[1:], strict=True)
    )


class Asked:
    """A text as an index, the same passages for rank-bm25, and a model that answers, also as transformers opens it."""

    def __init__(self, loaded: Loaded, text: str, dtype: str) -> None:
        self.loaded, self.dtype, self.index = loaded, dtype, PassageIndex()
        self.index.add(Text("text", text, "text"))
        self.passages = [piece.strip() for piece in cut([text], "passage")]

    @cached_property
    def bm25(self) -> Any:
        from rank_bm25 import BM25Okapi

        return BM25Okapi([words_of(each) for each in self.passages])

    @cached_property
    def other(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.loaded.origin, dtype=DTYPES[self.dtype])

    def passages_of(self, method: str, question: Question, count: int) -> list[Passage]:
        """Return the passages that a method lets the model read."""
        if method == OURS:
            return self.index.find(question.text, count)
        texts = [each for each in self.passages if any(line in each for line in question.lines)]
        if method == OTHERS:
            best = np.argsort(-self.bm25.get_scores(words_of(question.text)), kind="stable")[:count]
            texts = [self.passages[place] for place in sorted(best)]
        return [Passage("text", 0, 0, 0.0, each) for each in texts]

    @torch.inference_mode()
    def read(self, method: str, whole: np.ndarray, answer: np.ndarray) -> tuple[float, bool]:
        """Return the nats per token of the answer at the end, and whether each of its tokens is the likeliest."""
        ids, rows = torch.from_numpy(whole)[None], slice(-len(answer) - 1, -1)
        if method == OTHERS:
            return nats_and_exact(self.other(ids).logits[0, rows].float(), answer)
        with precision(self.dtype, ids.device):
            logits = self.loaded.net.logits(self.loaded.net(ids)[0, rows])
        return nats_and_exact(logits.float(), answer)


def with_answer(
    ids: np.ndarray, question: Question, words: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a prompt with the answer after it, and those of the rest of the answer."""
    answer = words.encode(f" {question.answer}").astype(np.int64)
    return np.concatenate([ids, words.encode(question.begin), answer]).astype(np.int64), answer


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def nats_and_exact(logits: torch.Tensor, answer: np.ndarray) -> tuple[float, bool]:
    nats = torch.nn.functional.cross_entropy(logits, torch.from_numpy(answer))
    return float(nats), logits.argmax(-1).tolist() == answer.tolist()


def ask(
    asked: Asked, ways: dict[str, list[Question]], counts: Sequence[int], kinds: Sequence[str]
) -> Iterator[Row]:
    """Yield a row per way of asking and method that makes a prompt of passages."""
    words = asked.loaded.tokenizer
    assert words
    methods = [(kind, count) for count in counts for kind in kinds] + [(RIGHT, 4)]
    for way, questions in ways.items():
        for kind, count in methods:
            answers, found, began = [], 0, time.process_time()
            for question in questions:
                passages = asked.passages_of(kind, question, count)
                found += all(
                    any(line in passage.text for passage in passages) for line in question.lines
                )
                document, _ = prompt(asked.loaded, question.text, passages, 64)
                answers.append(asked.read(kind, *with_answer(document.read(), question, words)))
            yield row_of(
                way,
                kind if kind == RIGHT else f"{kind} {count}",
                answers,
                began,
                found / len(questions),
            )


def row_of(
    way: str, method: str, answers: list[tuple[float, bool]], began: float, found: float | None
) -> Row:
    nats, exact = np.array([each[0] for each in answers]), sum(each[1] for each in answers)
    row = {
        "way": way,
        "method": method,
        "questions": len(answers),
        "found": found,
        "nats": float(nats.mean()),
    }
    seconds = (time.process_time() - began) / len(answers)
    return row | {
        "se": float(nats.std(ddof=1) / len(nats) ** 0.5),
        "exact": exact,
        "seconds": seconds,
    }


def read_whole(
    loaded: Loaded, text: np.ndarray, ways: dict[str, list[Question]], written: str
) -> Iterator[Row]:
    """Yield a row per way of asking of a net that reads the whole text by a pattern, then each question."""
    net, words, chat, stream = loaded.net, loaded.tokenizer, loaded.chat, CausalStream(loaded.net)
    assert words
    for start in range(0, len(text), 4096):
        stream(torch.from_numpy(text[start : start + 4096])[None])
    for way, questions in ways.items():
        answers, began = [], time.process_time()
        for question in questions:
            said = f"Question: {question.text}"
            ids = chat.encode(said, SYSTEM) if chat else words.encode(f"\n\n{said}\nAnswer:")
            whole, answer = with_answer(ids, question, words)
            with torch.inference_mode():
                hidden = stream.fork()(torch.from_numpy(whole)[None])
                answers.append(
                    nats_and_exact(net.logits(hidden[0, -len(answer) - 1 : -1]).float(), answer)
                )
        yield row_of(way, written, answers, began, None)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    lines, ways = facts()
    folder = ModelFolder.find(options.model)
    words = folder.tokenizer()
    text = Path(options.text).read_text(encoding="utf-8")
    text = words.decode(words.encode(text[: 8 * options.tokens])[: options.tokens])
    text = hide(text[: text.rfind("\n") + 1 or None], lines, options.seed)
    load = partial(folder.load, device=torch.device("cpu"), dtype=options.dtype, chat=None)
    yield from ask(
        Asked(load(), text, options.dtype),
        ways,
        options.passages,
        [OURS] if options.alone else [OURS, OTHERS],
    )
    for written in options.pattern:
        loaded = load(pattern=parse_pattern(written))
        start = loaded.net.start_rows(folder.bos(words))
        yield from read_whole(
            loaded, np.concatenate([start, words.encode(text)]).astype(np.int64), ways, written
        )


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines of Markdown: a row per method, with the nats of each way and the share that was found."""
    ways, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("way", "method"))
    yield f"| | {' | '.join(ways)} | CPU s |"
    yield "|---" * (len(ways) + 2) + "|"
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        cells = [
            f"{row['nats']:.2f} ± {row['se']:.2f} ({row['exact']} of {row['questions']})"
            for row in own
        ]
        yield f"| {method} | {' | '.join(cells)} | {np.mean([row['seconds'] for row in own]):.1f} |"
        if own[0]["found"] is not None:
            yield f"| its passages have it | {' | '.join(f'{row[key]:.2f}' for row in own for key in ['found'])} | |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--text", required=True, metavar="FILE", help="prose")
    parser.add_argument(
        "--tokens", type=parse_size, default=32_000, help="of the prose that are taken"
    )
    parser.add_argument(
        "--passages", type=int, nargs="*", default=[1, 2, 3, 4], help="that the model reads at most"
    )
    parser.add_argument("--alone", action="store_true", help="leave out rank-bm25 and transformers")
    parser.add_argument("--pattern", nargs="+", default=[], help="that reads the whole text")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    rows = []
    try:
        for row in measure(parser.parse_args()):
            print(json.dumps(row), flush=True)
            rows.append(row)
    except (LongNetError, OSError) as error:
        parser.exit(2, f"ask: {error}\n")
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
