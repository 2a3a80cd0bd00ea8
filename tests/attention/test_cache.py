"""The cache's size is the formula's, and its rows come when they are needed.

That any shards with their cache equal the whole is proved in test_pattern_options.py, for every pattern.
"""

from __future__ import annotations

import pytest
import torch
from strategies import PAPER_64TH

from longnet_cli.attention import KVCache, Pattern, dilated_attention


def test_its_bytes_are_the_formulas_and_do_not_grow() -> None:
    pattern = Pattern.paper()
    cache = KVCache(pattern, 2, 12, 64)
    assert cache.nbytes == 2 * 2 * 12 * 64 * 4 * 11_606 == 2 * 2 * 12 * 64 * 4 * pattern.cache_rows
    small = KVCache(PAPER_64TH, 1, 3, 8)
    before = small.nbytes
    for _ in range(5):
        k = torch.randn(1, 400, 3, 8)
        small.append(k, k)
    assert small.nbytes == before == 2 * 3 * 8 * 4 * PAPER_64TH.cache_rows


@pytest.mark.parametrize("pattern", [Pattern.dense(), Pattern((8, 96), (1, 2), look_back=1)])
@pytest.mark.parametrize("keep", [0, 300])
def test_rows_of_long_segments_come_when_they_are_needed(
    pattern: Pattern, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longnet_cli.attention.cache.FIRST_ROWS", 16)
    q, k, v = torch.randn(3, 1, 300, 4, 8, dtype=torch.float64)
    cache, parts, seen = KVCache(pattern, 1, 4, 8, dtype=q.dtype, keep=keep), [], []
    begun = cache.nbytes
    for part in zip(*(x.split([1, 20, 3, 100, 76, 100], 1) for x in (q, k, v)), strict=True):
        seen.append((part, cache.position, cache.far()))
        parts.append(dilated_attention(*part, pattern, start=cache.position, far=cache.far()))
        cache.append(*part[1:])
    torch.testing.assert_close(torch.cat(parts, 1), dilated_attention(q, k, v, pattern), rtol=1e-12, atol=1e-12)
    most = min(pattern.cache_rows, 2 * 300)
    assert begun < cache.nbytes <= 2 * 4 * 8 * 8 * most
    if keep:
        again = [dilated_attention(*part, pattern, start=start, far=far) for part, start, far in seen]
        assert all(map(torch.equal, again, parts))


def test_a_billion_tokens_take_one_row_set_for_each_level_more() -> None:
    sizes = {n: KVCache(Pattern.geometric(10**n), 1, 1, 8).nbytes for n in (6, 7, 8, 9)}
    row_set = 2 * 2048 * 8 * 4
    levels = {n: len(Pattern.geometric(10**n).levels) for n in sizes}
    assert all(sizes[n] == levels[n] * row_set for n in sizes)
    assert KVCache(Pattern.geometric(2**30), 1, 1, 8).nbytes == 40_960 * 2 * 8 * 4
