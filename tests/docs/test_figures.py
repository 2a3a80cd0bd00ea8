"""Numbers on pages are those of docs/figures, whose entries a runner wrote: `check` finds what is not, and `draw` what
no longer comes out.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT, imported

SCRIPT = """import json
PATTERNS = ["window:16", "16/1,64/4"]
print(json.dumps({"name": "a", "tokens": 1234567, "ppl": 6.8244, "ppl_se": 0.4855, "bytes": 3 << 20, "seconds": 1.5}))
print(json.dumps({"name": "b", "tokens": 100, "ppl": 7.25, "ppl_se": 0.5, "bytes": 2_600_000, "ratio": 0.7724}))
"""
FIGURES = """[small]
run = "OMP_NUM_THREADS=1 python measure.py || longnet pattern window:1Ki --format json"
timed = "seconds"
cheap = true

[by-hand]
date = "2026-11-30"
machine = "Intel Xeon"
commit = "4b6bcfa0"
command = "longnet score book.txt"
rows = [[1.2e6, 18, 0.97, 0.02]]
"""
PAGE = """# A page

<!-- figure: small -->

| net | tokens | ppl | +- | MB |
|---|---|---|---|---|
| a, fp32 | 1,234,567 | 6.82 | 0.5 | 3.1 |
| `b` of 2 GiB | 100 | 7.25 | 0.50 | 2.6 |

<!-- figure: small -->
It has 22.8 % less, at 6.824 +- 0.486.

<!-- figure: by-hand -->
Once, 1,200,000 tokens took 18 s on an Intel Xeon, at 0.97 +- 0.02.
"""
RESULTS = "| name | date | machine | commit |\n|---|---|---|---|\n| by-hand | 2026-11-30 | Intel Xeon | 4b6bcfa0 |\n"


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner, in a small tree that it has measured."""
    module = imported(ROOT / "docs/measurements/figures.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "docs/figures/figures.toml").write_text(FIGURES)
    (tmp_path / "measure.py").write_text(SCRIPT)
    (tmp_path / "docs/measurements").mkdir()
    (tmp_path / "docs/measurements/results.md").write_text(RESULTS)
    (tmp_path / "README.md").write_text(PAGE.replace(" of 2 GiB", ""))
    (tmp_path / "docs/rows.jsonl").write_text('{"pattern": "window:16"}\n')
    module.run("small")
    assert [*module.check()] == []
    return module


def test_pages_have_the_numbers_of_their_entries():
    figures = imported(ROOT / "docs/measurements/figures.py")
    assert [*figures.check()] == []


BROKEN = r"""
README.md => 6.82 | => 6.83 | => README.md: 6.83 is not in small
README.md => | 100 | => | 1,234,567 | => README.md: 1,234,567 is not in small
README.md => 22.8 % => 23.8 % => README.md: 23.8 % is not in small
README.md => 0.486 => 0.468 => README.md: 0.468 is not in small
README.md => figure: small => figure: large => no entry docs/figures/large
measure.py => 16/1,64 => 16/1,32 => small.json: measure.py has changed
docs/figures/small.json => --format json => --base 2 => No such option: --base
docs/figures/small.json => longnet pattern => longnet paint => no command paint
measure.py => "window:16" => "nested:16" => small.json: nested:16
docs/rows.jsonl => window => nested => docs/rows.jsonl: nested:16
README.md => 18 s => 19 s => README.md: 19 is not in by-hand
README.md => <!-- figure: by-hand --> => NOTHING => README.md: measured, without a marker: O
docs/measurements/results.md => 4b6bcfa0 => NOTHING => results.md: no line of by-hand
docs/figures/figures.toml => [by-hand] => [large]\nrun = "true"\n[by-hand] => large was never measured
docs/figures/figures.toml => 1Ki => 2Ki => its command is not that of figures.toml
"""


@pytest.mark.parametrize("row", BROKEN.strip().splitlines())
def test_what_is_broken_is_named(row, figures, tmp_path):
    """A row is a file, what stands there, what is put in its place, and what is said."""
    path, old, new, message = row.split(" => ")
    new = new.replace(r"\n", "\n").replace("NOTHING", "")
    text = (tmp_path / path).read_text()
    assert old in text
    (tmp_path / path).write_text(text.replace(old, new, 1))
    if path.endswith("small.json"):  # both, so that only the command is at fault
        toml = tmp_path / "docs/figures/figures.toml"
        toml.write_text(toml.read_text().replace(old, new, 1))
    found = [*figures.check()]
    assert [each for each in found if message in each], found


def test_a_script_that_is_gone_is_named(figures, tmp_path):
    (tmp_path / "measure.py").unlink()
    assert [*figures.check()] == ["docs/figures/small.json: measure.py is gone"]


def test_a_run_agrees_within_its_errors(figures, tmp_path):
    script = tmp_path / "measure.py"
    assert [*figures.draw("0")] == []
    script.write_text(SCRIPT.replace('seconds": 1.5', 'seconds": 9.5').replace("6.8244", "6.9"))
    assert [*figures.draw("0")] == []  # a timing, and a value within its error
    for old, new in (
        ("6.8244", "7.4"),
        ("1234567", "1234568"),
        ("0.7724", "0.7725"),
        ('"b"', '"c"'),
    ):
        script.write_text(SCRIPT.replace(old, new))
        assert len([*figures.draw("0")]) == 1, new


@pytest.mark.ci
def test_a_figure_comes_out_again(monkeypatch):
    """Drawn by the commit: over some commits, all of the cheap ones."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert [*imported(ROOT / "docs/measurements/figures.py").draw(commit)] == []


def test_entries_say_how_they_were_measured(figures, tmp_path):
    entry = json.loads((tmp_path / "docs/figures/small.json").read_text())
    assert entry["threads"] == 1
    assert entry["files"] == {"measure.py": figures.sha256(tmp_path / "measure.py")}
    assert entry["rows"][0]["tokens"] == 1234567
    assert {"command", "output_sha256", "commit", "machine", "torch", "date", "cpu_seconds"} < {
        *entry
    }
