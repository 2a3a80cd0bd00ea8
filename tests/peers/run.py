"""Run the tests that transformers has for every model on ours, beside plain Llama: run.py [OPTION OF PYTEST...]

They are in the source distribution of the installed version, which pip fetches to build/peers; nothing of it is kept
here. What plain Llama fails does not count. Exits with 1 for a failure that `REFUSED` in suites.py does not name, and
for a refusal there that is none any more.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "peers"
PACKAGE = "peers_of_transformers"
PLAIN = "PlainLlama"

# What the tests import, and the distribution may lack
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch(version: str) -> Path:
    """Return a folder with the tests of this version of transformers as a package, which pip fetches if needed."""
    folder = BUILD / version
    if (folder / PACKAGE).is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run(
        [*command, "--no-binary", "transformers", f"transformers=={version}"], check=True
    )
    unpacked = folder / "unpacked"
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        tests = [name for name in archive.getnames() if re.match(r"[^/]+/tests/.*\.py$", name)]
        for name in tests:
            path = unpacked / name.split("/tests/", 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(name).read())
    for name, text in {"__init__.py": "", **STAND_INS}.items():
        path = unpacked / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        if not path.exists():
            path.write_text(text)
    unpacked.rename(folder / PACKAGE)
    return folder


class Results:
    """A plugin of pytest that notes how each test ended, by model and test; parts of a test count as it."""

    def __init__(self) -> None:
        self.ends: dict[str, dict[str, str]] = defaultdict(dict)
        self.messages: dict[tuple[str, str], str] = {}
        self.broken: list[str] = []  # files that could not be read

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        _, model, test = report.nodeid.split("::")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.messages[model, test] = crash.message.splitlines()[0] if crash else "failed"
        known = self.ends[model].get(test, "passed")
        if report.outcome != "passed" and known != "failed":
            self.ends[model][test] = report.outcome
        else:
            self.ends[model][test] = known

    def judge(self, refused: dict[str, dict[str, str]]) -> int:
        """Print counts, refusals and what is wrong, and return the exit code."""
        plain = {test for test, end in self.ends[PLAIN].items() if end == "failed"}
        wrong = [*self.broken]
        for model, ends in sorted(self.ends.items()):
            print(f"{model}: {len(ends)} tests, {dict(Counter(sorted(ends.values())))}")
            reasons, left = refused.get(model, {}), set(ends) - plain
            for pattern, reason in reasons.items():
                some = {test for test in left if re.search(pattern, test)}
                failed = {test for test in some if ends[test] == "failed"}
                print(f"  {len(failed)} x {pattern}: {reason}")
                left -= failed
                if some and not failed:
                    wrong.append(f"{model} passes {pattern}: take it out of REFUSED")
            for test in sorted(left):
                if ends[test] == "failed" and model != PLAIN:
                    wrong.append(f"{model}.{test}: {self.messages[model, test]}")
        print(f"plain Llama fails, and so it does not count: {sorted(plain)}")
        print("\n".join(["WRONG:", *wrong] if wrong else ["nothing else fails"]))
        return bool(wrong) or not self.ends


def main() -> int:
    folder = fetch(transformers.__version__)
    sys.path[:0] = [str(ROOT), str(folder)]
    sys.path.append(str(HERE))
    os.environ["HF_HUB_OFFLINE"] = "1"  # what asks the hub is skipped, and waits for nothing
    results = Results()
    options = ["-q", "-n", "2", "--no-header", "--no-summary", "--noconftest", "-W", "ignore"]
    options += ["-c", "/dev/null", "--rootdir", str(HERE), "-p", "no:cacheprovider"]
    options += ["-o", f"pythonpath={ROOT} {folder}", *sys.argv[1:]]
    pytest.main([*options, str(HERE / "suites.py")], plugins=[results])
    from suites import REFUSED

    print(f"\ntransformers {transformers.__version__}")
    return results.judge(REFUSED)


if __name__ == "__main__":
    sys.exit(main())
