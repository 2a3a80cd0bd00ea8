"""The README and docs/start.md run as printed, with the two models that `make demo` leaves beside the README."""

import sys
from pathlib import Path

import pytest
from page_blocks import copy_checkout, run_blocks
from places import ROOT
from processes import environment


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_blocks_run_with_the_models_of_the_demo(page, minilm, smollm2, tmp_path):
    folder = copy_checkout(tmp_path)
    for model in (minilm, smollm2):
        (folder / model.name).symlink_to(model)
    programs = Path(sys.executable).parent
    assert run_blocks(ROOT / page, ("sh", "python"), folder, programs, environment())
    if page == "README.md":
        assert "dilated" in (folder / "my-smollm2/config.json").read_text(encoding="utf-8")
