"""Ask a small model 40 questions about Python's own documentation: how many answers are right, and how many end.

    pip install 'longnet-cli[gguf]' && examples/models.sh
    python docs/measurements/answers.py ./smollm2

The texts are the topics of `help()` and the documentation of some modules, as Python itself prints them. The questions
were written for this, in the words of the texts. A line of JSON per prompt, in the model's chat template or as plain
text, has `found` (questions whose answer is in a passage that the model reads), `right` (answers that have it; another
sense than the asked one is not noticed), `ended` (answers that end before `--max-tokens`), `tokens` (of an answer, on
average) and `seconds` (of CPU time, per question). The prompts are that of `longnet ask`, and the same without
its request to be brief. The first 14 questions chose the prompt among ten.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pydoc
import re
import sys
import time
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import torch

from longnet_cli import LongNetError, ModelFolder
from longnet_cli.data.documents.passages import PassageIndex
from longnet_cli.data.files.opened_inputs import Text
from longnet_cli.jobs.asking import SYSTEM, answer

MODULES = (
    "argparse base64 bisect calendar collections configparser contextlib copy csv datetime "
    "decimal difflib email.message fnmatch fractions functools getopt glob gzip heapq hmac "
    "http.cookies imaplib ipaddress itertools json locale logging mailbox marshal netrc os "
    "pathlib pdb pickle platform plistlib pprint queue random re sched secrets shelve shlex "
    "shutil sqlite3 statistics string struct subprocess tarfile tempfile textwrap threading "
    "time timeit tokenize trace tty types unicodedata urllib.parse uuid wave weakref "
    "webbrowser zipapp zipfile zlib "
)
# what is asked, and what a right answer has
QUESTIONS = [
    ("What does the pass statement do when it is executed?", r"nothing|null operation"),
    ("What value does the variable __debug__ have when optimization is requested?", r"\bFalse\b"),
    ("Which exception is raised when an unbound name is deleted?", r"NameError"),
    ("Which character is ignored in integer literals, and groups digits?", r"underscore"),
    ("In which radix are the exponent parts of floating point literals interpreted?", r"\b10\b|\bten\b"),
    ("Which PEP has the specification for the nonlocal statement?", r"3104"),
    ("Can functions that are created with lambda expressions contain statements?", r"\bno\b|cannot|can't|can not"),
    ("What is an empty string always considered to be of any other string?", r"substring"),
    ("Which method do classes define to support membership tests?", r"__contains__"),
    ("Which RFC describes the HMAC algorithm?", r"2104"),
    ("On which RFC is the IMAP4 client based?", r"2060"),
    ("Which day is the first day of the week in calendars by default?", r"Monday"),
    ("What is always the smallest element of a heap?", r"a\[0\]|heap\[0\]|first"),
    ("From a version of which library is the json module derived?", r"simplejson"),
    ("Which special path name connects to an in-memory SQLite database?", r":memory:"),
    ("Which version of SQLite does the sqlite3 module require?", r"3\.7\.15"),
    ("Who wrote the logging package for Python?", r"Sajip"),
    ("Which PEP describes the interface that the csv module implements?", r"\b305\b"),
    ("Which function of tempfile is subject to race conditions and should not be used?", r"mktemp"),
    ("Which function of uuid may compromise privacy, because it has the computer's network address?", r"uuid1"),
    ("How many members has the tuple that represents local time?", r"\b(9|nine)\b"),
    ("On which date is the Epoch on Unix?", r"January 1(st)?,? 1970|1970"),
    ("How many times does timeit repeat the timer by default?", r"\b(5|five)\b"),
    ("Which version of UnicodeData.txt is the database of unicodedata based on?", r"14\.0"),
    ("What are the keys of a shelf?", r"strings?"),
    ("What is the prompt of the Python debugger?", r"\(Pdb\)|Pdb"),
    ("What does a ChainMap create of multiple mappings?", r"single view|one view"),
    ("Which class of collections counts hashable objects?", r"Counter"),
    ("What does the fnmatchcase function always take into account?", r"\bcase\b"),
    ("Which method of a wave file returns the sampling frequency?", r"getframerate"),
    ("Which format character of struct stands for a pad byte?", r"\bx\b"),
    ("What does os.altsep stand for?", r"alternat"),
    ("Which function computes an Adler-32 checksum?", r"adler32"),
    ("Which module generates random numbers for managing secrets such as tokens?", r"\bsecrets\b"),
    ("What do decorators of functions have to be, when they are evaluated?", r"callable"),
    ("What does an expression list with at least one comma yield?", r"tuple"),
    ("Which statement jumps out of the nearest enclosing loop?", r"break"),
    ("In which direction do operators with the same precedence group, except for exponentiation?", r"left to right"),
    ("Which operator tests for membership?", r"[\"'`]in[\"'`]|\bin operator"),
    ("Inside which kind of function can await only be used?", r"coroutine"),
]  # fmt: skip


def read_texts() -> Iterator[Text]:
    """Yield the documentation, as Python prints it."""
    for name, text in topics.items():
        yield Text(f"topic {name}", text, name)
    for name in MODULES.split():
        text = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
        yield Text(f"module {name}", text, name)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt and form of it."""
    loaded = ModelFolder.find(options.model, gguf=True).load(
        device=torch.device("cpu"), dtype=options.dtype, chat=None
    )
    index = PassageIndex()
    for text in read_texts():
        index.add(text)
    found = [index.find(question, options.passages) for question, _ in QUESTIONS]
    for form in ("chat", "plain"):
        model = loaded if form == "chat" else loaded._replace(chat=None)
        for prompt, system in (("brief", None), ("not brief", SYSTEM)):
            began, totals = (
                time.process_time(),
                dict.fromkeys(("found", "right", "ended", "tokens"), 0),
            )
            for (question, right), passages in zip(QUESTIONS, found, strict=True):
                given = answer(
                    model,
                    question,
                    passages,
                    system=system,
                    max_tokens=options.max_tokens,
                    dtype=options.dtype,
                )
                print(f"{question} {given.answer!r}", file=sys.stderr)
                totals["found"] += any(has(right, passage.text) for passage in passages)
                totals["right"] += has(right, given.answer or "")
                totals["ended"] += given.finish_reason != "length"
                totals["tokens"] += given.n_tokens
            count = len(QUESTIONS)
            yield (
                {"form": form, "prompt": prompt, "questions": count}
                | totals
                | {
                    "tokens": totals["tokens"] / count,
                    "seconds": (time.process_time() - began) / count,
                }
            )


def has(right: str, text: str) -> bool:
    return re.search(right, text, re.IGNORECASE) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, or a GGUF file")
    parser.add_argument("--passages", type=int, default=3, help="that the model reads at most")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    try:
        for row in measure(parser.parse_args()):
            print(json.dumps(row), flush=True)
    except (LongNetError, OSError) as error:
        parser.exit(2, f"answers: {error}\n")


if __name__ == "__main__":
    main()
