"""Patterns as text: on a command line, in a recipe, and in the metadata of outputs.

    paper                                    one of the constructors of `Pattern`, by its name
    geometric:1e9,base=2048,ratio=2          with its size
    window:1Ki,look_back=1,sinks=4           with options of `Pattern`, which go with every constructor
    window:1Ki,chosen=32x32,chosen_every=4   32 blocks of 32 tokens, chosen every 4 tokens
    pretrained                               a window and sinks, for models that were trained with dense attention
    finding                                  a window and chosen blocks
    dense                                    every key, at any length
    1Ki/1,4Ki/4,look_back=1/5,overlap=once   levels, each as segment length / dilation rate

In an option with one number per level, slashes separate the numbers. Sizes have the format of `basics.sizes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import MAX_SIZE, format_size, parse_size

from .pattern import Pattern

_LEVEL = re.compile(r"\.?\d[\w.+]*/\.?\d", re.ASCII)


class _Constructor(NamedTuple):
    """A constructor of patterns, with the sizes and the words that it takes."""

    make: Callable[..., Pattern]
    size: str = ""  # the name of its size; empty if it takes none
    needed: bool = False  # whether the size has no default
    words: tuple[str, ...] = ()  # its options besides those of `Pattern`
    # options of `Pattern` that it takes itself, as its defaults may not fit its size
    fields: tuple[str, ...] = ()


PATTERN_FIELDS = tuple(field.name for field in fields(Pattern))
_CHOSEN = tuple(name for name in PATTERN_FIELDS if name.startswith("chosen"))
# the fields beyond levels, in the order in which they are written
_FIELDS = sorted(PATTERN_FIELDS[2:], key=lambda name: name == "head_offsets")
_CONSTRUCTORS = {
    "paper": _Constructor(Pattern.paper),
    "geometric": _Constructor(Pattern.geometric, "length", needed=True, words=("base", "ratio")),
    "window": _Constructor(Pattern.window, "width", needed=True),
    "pretrained": _Constructor(Pattern.pretrained, "width"),
    "finding": _Constructor(Pattern.finding, "width", fields=_CHOSEN),
    "dense": _Constructor(Pattern.dense),
}
FORMS = (
    "paper, geometric:LENGTH, window:WIDTH, pretrained, finding, dense, or levels as 1Ki/1,4Ki/4"
)


def _count(text: str) -> int:
    return 0 if text == "0" else parse_size(text)


def _counts(text: str) -> int | tuple[int, ...]:
    found = tuple(map(_count, text.split("/")))
    return found if len(found) > 1 else found[0]


def _chosen(text: str) -> tuple[int, int]:
    """Return the number of chosen blocks and their size."""
    number, times, block = text.partition("x")
    return _count(number), parse_size(block) if times else Pattern.chosen_block


_READERS: dict[str, Callable[[str], Any]] = {"look_back": _counts, "chosen": _chosen}
_BY_TYPE: dict[type, Callable[[str], Any]] = {int: _count, str: str}  # of the default
OPTIONS = {
    name: _READERS.get(name) or _BY_TYPE[type(getattr(Pattern, name))]
    for name in _FIELDS
    if name != "chosen_block"  # a part of chosen
}


def is_pattern(text: str) -> bool:
    """Return whether `text` is meant as a pattern, rather than as a path or the name of something else."""
    return bool(_LEVEL.match(text)) or re.split("[:,]", text, maxsplit=1)[0] in _CONSTRUCTORS


def read_pattern(written: str | Pattern | Mapping[str, Any] | None, name: str) -> Pattern | None:
    """Return the pattern of a text or of fields, None for None. Raises ConfigError that begins with `name`."""
    if isinstance(written, Pattern):
        return written
    try:
        if isinstance(written, str):
            return parse_pattern(written)
        return from_fields(written) if written else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that `text` describes.

    Raises ValueError of one line, with the nearest name for an unknown one.
    """
    text = text.strip()
    if re.match(r"\.?\d", text):
        levels, options = _read("a list of levels", text.split(","), ())
        return replace(_of_levels(levels), **options)
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if name not in _CONSTRUCTORS:
        raise ValueError(_unknown(name, text))
    constructor = _CONSTRUCTORS[name]
    sizes, options = _read(name, rest.split(",") if colon else [], constructor.words)
    if constructor.needed and not sizes:
        raise ValueError(f"{name} needs a {constructor.size}, as {name}:64Ki")
    if len(sizes) > bool(constructor.size):
        takes = f"takes one {constructor.size}" if constructor.size else "takes no size"
        hint = _nearest(sizes[-1], constructor.words, OPTIONS)
        raise ValueError(f"{name} {takes}, and '{sizes[-1]}' is one more{hint}")
    taken = options.keys() & {*constructor.words, *constructor.fields}
    of_constructor = {key: options.pop(key) for key in taken}
    made = constructor.make(*map(parse_size, sizes), **of_constructor)
    return replace(made, **options)


def _unknown(name: str, text: str) -> str:
    """Return what is wrong with a text that begins with no constructor's name."""
    first, _, second = name.partition(",")
    if first not in _CONSTRUCTORS:
        hint = _nearest(name, _CONSTRUCTORS) or "."
        return f"unknown pattern '{name}'{hint} Write {FORMS}"
    if second in _CONSTRUCTORS:
        return f"one pattern is needed, and these are two: {text}"
    return f"a colon follows the name: {text.replace(',', ':', 1)}"


def _read(
    name: str,
    items: Iterable[str],
    words: Sequence[str],
) -> tuple[list[str], dict[str, Any]]:
    """Return the sizes, or levels, that come first, and the options after them."""
    sizes: list[str] = []
    given: dict[str, Any] = {}
    for item in map(str.strip, items):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not item:
            raise ValueError("something is missing beside a colon or a comma")
        if not equals:
            if given:
                raise ValueError(
                    f"'{item}' stands behind an option: sizes come first, and an option is key=value"
                )
            sizes.append(item)
            continue
        if key not in words and key not in OPTIONS:
            raise ValueError(f"{name} has no option '{key}'{_nearest(key, words, OPTIONS)}")
        if key in given:
            raise ValueError(f"{key} is given twice")
        try:
            given[key] = OPTIONS.get(key, parse_size)(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if "chosen" in given:
        given["chosen"], given["chosen_block"] = given["chosen"]
    return sizes, given


def _of_levels(items: Sequence[str]) -> Pattern:
    lengths: list[int] = []
    rates: list[int] = []
    for item in items:
        length, slash, rate = item.partition("/")
        if not slash or "/" in rate:
            raise ValueError(
                f"'{item}' is not a level: write segment length / dilation rate, as 4Ki/4"
            )
        lengths.append(parse_size(length))
        rates.append(parse_size(rate))
    return Pattern(tuple(lengths), tuple(rates))


def _nearest(word: str, *names: Iterable[str]) -> str:
    from longnet_cli.basics.configuration import nearest

    match = nearest(word, chain(*names))
    return f": did you mean '{match}'?" if match else ""


def format_pattern(pattern: Pattern) -> str:
    """Return a text that `parse_pattern` reads as `pattern`: the constructor that gives its levels, or the levels.

    It is never `pretrained` or `finding`: what these mean may change, but what an output's metadata mean must not.
    """
    for text, made in _constructed(pattern):
        if made.levels == pattern.levels:
            return text + _options(made, pattern, ":" if text in _CONSTRUCTORS else ",")
    return format_levels(pattern)


def format_levels(pattern: Pattern) -> str:
    """Return a pattern's levels, as segment length / dilation rate, and its options: `2048/1,4096/2,look_back=1`."""
    levels = ",".join(f"{w}/{r}" for w, r in pattern.levels)
    return levels + _options(Pattern(pattern.segment_lengths, pattern.dilation_rates), pattern, ",")


def _constructed(pattern: Pattern) -> Iterator[tuple[str, Pattern]]:
    """Yield constructors that may give the levels of `pattern`, as text, and the patterns that they give."""
    lengths = pattern.segment_lengths
    yield "dense", Pattern.dense()
    yield "paper", Pattern.paper()
    if pattern.look_backs[0]:  # a window looks back
        yield f"window:{format_size(lengths[0])}", Pattern.window(lengths[0])
    ratio = lengths[1] // lengths[0] if len(lengths) > 1 else 0
    if ratio > 1:
        length = min(lengths[-1], MAX_SIZE)
        sizes = f"{format_size(length)},base={format_size(lengths[0])},ratio={format_size(ratio)}"
        yield f"geometric:{sizes}", Pattern.geometric(length, lengths[0], ratio)


def _options(made: Pattern, pattern: Pattern, separator: str) -> str:
    """Return the options in which `pattern` differs from `made`, as text after `separator`."""
    changed = {name: _value(getattr(pattern, name)) for name in _changed(made, pattern)}
    if changed.pop("chosen_block", None) or "chosen" in changed:
        changed["chosen"] = f"{_value(pattern.chosen)}x{_value(pattern.chosen_block)}"
    words = ",".join(f"{name}={value}" for name, value in changed.items())
    return separator + words if words else ""


def _changed(made: Pattern, pattern: Pattern) -> list[str]:
    """Return the names of the options, beyond levels, in which `pattern` differs from `made`."""
    return [name for name in _FIELDS if getattr(pattern, name) != getattr(made, name)]


def _value(value: Any) -> str:
    if not isinstance(value, tuple):
        return format_size(value) if isinstance(value, int) else str(value)
    return "/".join(map(format_size, value[:1] if len({*value}) == 1 else value))


def pattern_fields(pattern: Pattern) -> dict[str, Any]:
    """Return the arguments that make a pattern: its levels, and the options that differ from the defaults."""
    levels = {name: getattr(pattern, name) for name in ("segment_lengths", "dilation_rates")}
    return levels | {name: getattr(pattern, name) for name in _changed(Pattern(**levels), pattern)}


def from_fields(given: Mapping[str, Any]) -> Pattern:
    """Return the pattern of such arguments. Raises ValueError or, if one is missing, TypeError."""
    if unknown := [name for name in given if name not in PATTERN_FIELDS]:
        raise ValueError(f"unknown key '{unknown[0]}'{_nearest(unknown[0], PATTERN_FIELDS)}")
    return Pattern(**given)
