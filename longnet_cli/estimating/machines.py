"""Machines that a plan can be made for: what `--on` names, a machine of the table or a file of one's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from longnet_cli.configuration import StrictModel, nearest, parse, read_text, validate
from longnet_cli.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("machines.toml")
KNOWN_BY = {  # who knows a rate: the tables of a machine, in words
    "measured": "measured by `longnet bench --calibrate`",
    "others": "measured by others",
    "data_sheet": "from data sheets",
    "assumed": "assumed",
}

UNTRIED = "arithmetic: no GPU and no cluster has run this program"


class Rates(StrictModel):
    """Rates of one device. FLOP/s, bytes per second in one direction, bytes, seconds.

    products: matrix products. share: of that rate, what a net's products reach. attention, attention_backward: the
    kernel's two passes. bandwidth: the device's memory, under elementwise operations. node_link, network: to another
    device of the node, and of another node. message: the time of an empty message. host_link: to the host's memory.
    disk: of files. memory: of the device. reserved: of that, what the program takes. host_memory: of a node.
    """

    products: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, le=1)
    attention: float | None = Field(default=None, gt=0)
    attention_backward: float | None = Field(default=None, gt=0)
    bandwidth: float | None = Field(default=None, gt=0)
    node_link: float | None = Field(default=None, gt=0)
    network: float | None = Field(default=None, gt=0)
    message: float | None = Field(default=None, ge=0)
    host_link: float | None = Field(default=None, gt=0)
    disk: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    reserved: float | None = Field(default=None, ge=0)
    host_memory: float | None = Field(default=None, gt=0)


class Machine(StrictModel):
    """`devices` of one kind, `node` of them in each node. Every rate is in exactly one of the tables, by who knows it.

    The rates of products and attention are those of `dtype`.
    """

    name: str = ""
    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "bf16"]
    devices: int = Field(default=1, gt=0, le=1 << 16)
    node: int = Field(default=1, gt=0)
    measured: Rates = Rates()
    others: Rates = Rates()
    data_sheet: Rates = Rates()
    assumed: Rates = Rates()

    @model_validator(mode="after")
    def _check(self) -> Machine:
        for rate in Rates.model_fields:
            tables = [table for table in KNOWN_BY if getattr(getattr(self, table), rate) is not None]
            if len(tables) != 1:
                found = f"is in {' and in '.join(tables)}" if tables else "is missing"
                raise ValueError(f"{rate} {found}: give it in one of the tables {', '.join(KNOWN_BY)}")
        return self

    def rate(self, name: str) -> float:
        """Return a rate by its name in `Rates`."""
        return next(x for table in KNOWN_BY if (x := getattr(getattr(self, table), name)) is not None)

    def known(self) -> dict[str, list[str]]:
        """Return the names of the rates by table; tables without a rate are left out."""
        found = {table: [*getattr(self, table).model_dump(exclude_none=True)] for table in KNOWN_BY}
        return {table: names for table, names in found.items() if names}

    def link(self, ranks: int) -> float:
        """Return the bytes per second of the slowest link among so many neighbouring ranks."""
        return self.rate("network" if ranks > self.node else "node_link")


def find_machine(name: str) -> Machine:
    """Return the machine that `--on` names: `h100x64` of the table, or a TOML file. Raises ConfigError for others."""
    if name.endswith(".toml") or "/" in name:
        return validate(Machine, {"name": name, **_read(Path(name))}, name)
    known, (kind, count) = _read(TABLE), re.fullmatch(r"(.*?)(?:x(\d+))?", name).groups()  # type: ignore[union-attr]
    if kind not in known:
        close = nearest(kind, known)
        meant = f": did you mean '{close}x{count or 1}'?" if close else "."
        raise ConfigError(
            f"--on: unknown machine '{name}'{meant} Known are {', '.join(f'{each}xN' for each in known)}, with N "
            "devices; for a machine of your own, name a .toml file, as `longnet bench --calibrate` writes it"
        )
    return validate(Machine, {"name": name, "devices": int(count or 1), **known[kind]}, f"--on {name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse(read_text(path), tomllib.loads)
    except FileNotFoundError:
        raise ConfigError(f"--on {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--on {path}: {error.strerror}") from None
    except ValueError as error:  # of the parser, or not UTF-8
        raise ConfigError(f"--on {path}: not TOML: {error}") from None
