"""Every architecture of AutoModelForCausalLM, tiny and with large random weights: right, refused, wrong or crashed.

    python tests/architectures.py [NAME ...]     # a line for each name
    python tests/architectures.py --write        # all: docs/architectures.md, longnet_cli/models/hf/tried.json

A model is saved by transformers and opened as `--model` does: as it comes, and with two patterns; whole, and in nine
chunks. Expected are the nats of transformers' eager attention, or of the dense reference with that pattern.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers as hf
from hf_models import LEVELS, WINDOW
from tiny_configs import tiny_config
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import LongNetError
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf import trying
from longnet_cli.models.hf.trying import hidden_states
from longnet_cli.running.causal_stream import open_stream

ROOT = Path(__file__).resolve().parents[1]
PAGE, LIST = ROOT / "docs" / "architectures.md", ROOT / "longnet_cli" / "models" / "hf" / "tried.json"
CHUNKS = (50, 1, 1, 7, 1, 33, 20, 1, 26)
PATTERNS = {"levels": LEVELS, "sinks": WINDOW}
TOLERANCE = 1e-4  # of a token's nats, relative to the largest


class Row(NamedTuple):
    """What one architecture does, as it comes and with a pattern; `why` says what is refused."""

    name: str
    architecture: str
    outcome: str  # right, own attention, refused, wrong or crashed
    own: str
    pattern: str
    why: str


def grown(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Give a model random weights that are large enough for attention to matter."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "sink" in name:
                x.normal_(0, 2)
            elif x.dim() > 1:
                x.normal_(0, 1 if "embed" in name or "wte" in name else 1.2 / x.shape[-1] ** 0.5)
            elif x.is_floating_point():
                x.add_(torch.randn_like(x) * 0.1)
    return model.eval()


@contextmanager
def saved(name: str) -> Iterator[tuple[Path, type]]:
    """Make a folder of a tiny model of an architecture, and yield it with the model's class."""
    torch.manual_seed(0)
    model = grown(hf.AutoModelForCausalLM.from_config(tiny_config(name)))
    with TemporaryDirectory() as place:
        model.save_pretrained(place)
        yield Path(place), type(model)


@contextmanager
def untried() -> Iterator[Path]:
    """Forget what was tried, and yield the cache folder in which the trials are kept meanwhile."""
    before, known = os.environ.get("XDG_CACHE_HOME"), dict(trying.TRIED)
    with TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        trying.TRIED.clear()
        try:
            yield Path(place)
        finally:
            trying.TRIED.update(known)
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def examine(name: str) -> Row:
    try:
        with saved(name) as (folder, kind):
            return _examine(name, folder, kind)
    except Exception as error:  # each class has reasons of its own
        return Row(name, NAMES[name], "not made", "", "", f"transformers cannot make a tiny one: {_said(error)}")


def _examine(name: str, folder: Path, kind: Any) -> Row:
    ids = torch.randint(3, 97, (1, sum(CHUNKS) + 1), generator=torch.Generator().manual_seed(1))
    eager = kind.from_pretrained(folder, attn_implementation="eager").eval()
    forms: dict[str, tuple[str, str]] = {}  # by form: how it is read, or a word, and why
    for form, pattern in {"own": None, **PATTERNS}.items():
        try:
            forms[form] = _read(folder, eager, ids, pattern)
        except LongNetError as error:
            forms[form] = ("refused", _said(error).partition(f"{folder}: ")[2] or _said(error))
        except Exception as error:
            forms[form] = ("crashed", f"{type(error).__name__}: {_said(error)}")
    if forms["own"][0] == "refused":
        forms["levels"] = forms["sinks"] = _in_python(kind, folder, eager, ids) or forms["own"]
    own, levels, sinks = (forms[x][0] for x in ("own", "levels", "sinks"))
    how = levels if sinks != "refused" or levels == "refused" else f"{levels}, no sinks"
    whys = dict.fromkeys(why.replace(str(folder), "DIR") for _, why in forms.values() if why)
    bad = {"crashed", "wrong"} & {own, levels, sinks}
    outcome = "crashed" if "crashed" in bad else "wrong" if bad else "refused" if own == "refused" else "right"
    if outcome == "right" and levels == "refused":
        outcome = "own attention"
    return Row(name, kind.__name__, outcome, own, how, "; ".join(whys))


def _read(folder: Path, eager: Any, ids: Tensor, pattern: Pattern | None) -> tuple[str, str]:
    """Return how a model is read, "in chunks" or "whole", and why not otherwise; "wrong" if its numbers are."""
    net: Any = ModelFolder(folder).net(pattern=pattern)
    found = _compared(net, eager, ids, pattern)
    if pattern is None and net.dilated and found[0] != "wrong":  # also with transformers' attention, as `bench` has it
        other = _compared(net.as_it_comes(), eager, ids, None)
        return other if other[0] == "wrong" else found
    return found


def _compared(net: Any, eager: Any, ids: Tensor, pattern: Pattern | None) -> tuple[str, str]:

    @torch.no_grad()
    def nats(hidden: Tensor) -> Tensor:
        try:
            return net.nll(hidden, ids[:, 1:])
        except LongNetError:  # its logits are more than a product, which `score` refuses
            return hidden

    with torch.no_grad():
        whole = net(ids[:, :-1])
        if pattern is None:
            expected = hidden_states(eager, ids[:, :-1])
        else:
            with trying.attending(net.model, "dilated_reference"):
                expected = hidden_states(net.model, ids[:, :-1])
            if not _differs(nats(expected), nats(hidden_states(eager, ids[:, :-1]))):
                return "wrong", "the pattern changes nothing"
    if error := _differs(nats(whole), nats(expected)):
        return "wrong", f"whole, by {error:.1g}"
    if not net.config.streams:
        found = re.search(r"\w+ (cannot be run )?in chunks.*(?=[:;] it reads)", net.note or "")
        return "whole", found[0] if found else ""
    stream = open_stream(net)
    parts = torch.cat([stream(x) for x in ids[:, :-1].split(CHUNKS, 1)], 1)
    if error := _differs(nats(parts), nats(expected)):
        return "wrong", f"in chunks, by {error:.1g}"
    return "in chunks", ""


def _in_python(kind: Any, folder: Path, eager: Any, ids: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with a model that the commands refuse, after `use_dilated_attention`; None if nothing is."""
    try:
        model = use_dilated_attention(kind.from_pretrained(folder), Pattern((1 << 10,), (1,)))
        model.config.use_cache = eager.config.use_cache = False
        with torch.no_grad():
            found, expected = (x.eval()(input_ids=ids[:, :-1]).logits for x in (model, eager))
    except LongNetError:
        return None
    except Exception as error:
        return "crashed", f"in Python, {type(error).__name__}: {_said(error)}"
    return ("wrong", f"in Python, by {error:.1g}") if (error := _differs(found, expected)) else None


def _differs(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; 0 if it is small."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return 0.0 if error <= TOLERANCE else error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def verdicts(cache: Path) -> dict[str, dict[str, str | None]]:
    """Return, by architecture and form, what the trials in this cache have found: why it is refused, or None."""
    found: dict[str, dict[str, str | None]] = {}
    for path in sorted(cache.glob("longnet/verdicts/*.json")):
        data = json.loads(path.read_text())
        known, form = found.setdefault(data["asked"]["architecture"], {}), data["asked"]["trial"]
        known[form] = known.get(form) or data["found"]
    return {name: dict(sorted(known.items())) for name, known in sorted(found.items())}


def page(rows: list[Row]) -> str:
    """Return docs/architectures.md, with these rows."""
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in OUTCOMES}
    lines = [
        f"transformers {hf.__version__}, {len(rows)} names: "
        + ", ".join(f"{n} {what}" for what, n in counts.items())
        + ".",
        "",
        "| `model_type` | architecture | | as it comes | with a pattern | what is refused |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join((f"`{row.name}`", *(x.replace("|", "/") for x in row[1:]))) + " |" for row in rows),
    ]
    return PAGE.read_text().partition(TABLE)[0] + TABLE + "\n".join(lines) + "\n"


OUTCOMES = ("right", "own attention", "refused", "not made", "wrong", "crashed")
TABLE = "## The table\n\n"


def main() -> None:
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    write = sys.argv[1:] == ["--write"]
    rows = []
    with untried() as cache:
        for name in NAMES if write else sys.argv[1:] or NAMES:
            rows.append(examine(name))
            print(*rows[-1], sep=" | ", flush=True)
        if write:
            lines = [f" {json.dumps(name)}: {json.dumps(known)}" for name, known in verdicts(cache).items()]
            text = ",\n".join(lines)
            LIST.write_text(f'{{"transformers": "{hf.__version__}", "architectures": {{\n{text}\n}}}}\n')
            PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
