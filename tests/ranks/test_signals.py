"""Signals act where a run looks for them, on all ranks alike."""

from __future__ import annotations

import signal

import pytest

from longnet_cli.running.ranks.launch import Signals, noted_signals
from longnet_cli.running.ranks.ranks import Ranks


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with noted_signals(Ranks().largest):
        pass
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_comes_while_ranks_look_is_seen_the_next_time() -> None:
    def interrupted(value: float) -> float:
        if not came:
            came.append(value)
            signal.raise_signal(signal.SIGTERM)
        return value

    came: list[float] = []
    with noted_signals(interrupted) as signals:
        assert not signals.look()
        with pytest.raises(SystemExit):
            signals.look()


def test_a_signal_of_any_rank_decides() -> None:
    with pytest.raises(KeyboardInterrupt):
        Signals(lambda value: max(value, 2)).look()  # another rank had SIGINT
