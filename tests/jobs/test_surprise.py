"""Where a model is surprised: in a page, each token has its text, its nats and the likeliest one."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_model

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.plotting.surprise import read_surprise, write_surprise
from longnet_cli.jobs.scoring.token_logprobs import write_token_logprobs

# With what would end a script of the page, or stand in the place of its data
TEXTS = {
    "a.py": "def f(x):\n\treturn '</script>'\n\n",
    "\u4e2d.txt": "\u4e2d\u6587 \U0001f600 caf\u00e9",
    "@DATA@": "@FACTS@",
}
METADATA = {"longnet.model": "bytes", "longnet.tokenizer_sha256": Tokenizer.bytes().sha256}
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def nats_of(ids: np.ndarray) -> np.ndarray:
    return (ids % 7).astype(np.float32) / 3


def write(
    path: Path, texts: dict[str, str] = TEXTS, scale: float = 1, top: bool = True, **metadata: str
) -> str:
    """A file in which each token costs `nats_of` it, `scale` times, and `e` is always the likeliest, by 0.5 nats."""
    with write_token_logprobs(path, METADATA | metadata, top) as take:
        for name, text in texts.items():
            document = Document(name, tokens := Tokenizer.bytes().encode(text), len(tokens), name)
            for start in range(0, len(tokens), 20):
                ids = tokens[start : start + 20].astype(np.int64)
                likeliest = np.full(len(ids), ord("e")), np.full(len(ids), -0.5, np.float32)
                take(document, start, ids, -scale * nats_of(ids), *(likeliest if top else ()))
    return str(path)


def unpack(page: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """The facts of a page, its lists by name and its text, as its script reads them."""
    html = page.read_text(encoding="utf-8")
    held = {
        name: re.search(f'id="{name}">(.*?)</script>', html, re.DOTALL)
        for name in ("facts", "data")
    }
    facts = json.loads(held["facts"][1])
    data, at, lists = zlib.decompress(base64.b64decode(held["data"][1])), 0, {}
    wanted = [("top", "<u4")] * facts["top"] + [("lengths", "<u2"), ("nats", "<u2")]
    for name, kind in [
        *wanted,
        *[("other", "<u2")] * facts["other"],
        *[("top_nats", "<u2")] * facts["top"],
    ]:
        lists[name] = np.frombuffer(data, kind, facts["tokens"], at)
        at += lists[name].nbytes
    return facts, lists, data[at:].decode()


def test_a_page_holds_the_text_and_the_nats_of_each_token(tmp_path):
    """And nothing that it loads; a text cannot end its script."""
    write_surprise(read_surprise([write(tmp_path / "lp.arrow")]), tmp_path / "p.html")
    facts, lists, text = unpack(tmp_path / "p.html")
    ids = np.concatenate([Tokenizer.bytes().encode(text) for text in TEXTS.values()])
    assert [(of["id"], of["start"], of["tokens"]) for of in facts["documents"]] == [
        (name, 0, len(text.encode())) for name, text in TEXTS.items()
    ]
    assert text.replace("\u25af", "") == "".join(TEXTS.values())
    assert lists["lengths"].sum() == len(text.encode("utf-16-le")) // 2
    assert lists["nats"].tolist() == np.rint(1000 * nats_of(ids)).tolist()
    assert {facts["tops"][index] for index in lists["top"].tolist()} == {"e"}
    assert {*lists["top_nats"].tolist()} == {500}
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script") == 3
    assert not re.search(r"https?:|src=|href=|@import|url\(", html)


def test_two_files_are_compared(tmp_path):
    """Although one has another cut of rows and no likeliest tokens."""
    files = [write(tmp_path / "short.arrow", scale=2, top=False), write(tmp_path / "long.parquet")]
    surprise = read_surprise(files)
    write_surprise(surprise, tmp_path / "p.html")
    facts, lists, _ = unpack(tmp_path / "p.html")
    assert facts["other"]
    assert facts["top"]
    assert np.abs(lists["nats"].astype(int) - 2 * lists["other"].astype(int)).max() <= 1


def test_files_of_other_tokens_are_refused(tmp_path):
    one = write(tmp_path / "one.arrow")
    other = write(
        tmp_path / "other.arrow",
        {"a.py": TEXTS["a.py"], "\u4e2d.txt": "\u4e2d\u6587 \U0001f601 caf\u00e9"},
    )
    with pytest.raises(DataError, match="other tokens of the same document"):
        read_surprise([one, other])
    with pytest.raises(DataError, match="document '\u4e2d\\.txt' and no more documents"):
        read_surprise([one, write(tmp_path / "fewer.arrow", {"a.py": TEXTS["a.py"]})])
    with pytest.raises(ConfigError, match=r"x\.arrow is of another tokenizer"):
        read_surprise([one, write(tmp_path / "x.arrow", **{"longnet.tokenizer_sha256": "0"})])
    with pytest.raises(ConfigError, match="3 files"):
        read_surprise([one] * 3)


def test_the_tokenizer_is_the_one_of_the_scores(tmp_path):
    tiny_model(tmp_path / "model")
    named = str(tmp_path / "model")
    away = write(tmp_path / "away.arrow", **{"longnet.model": "./moved"})
    with pytest.raises(
        ConfigError,
        match=r"away.arrow: the tokenizer of its model ./moved cannot be .* --tokenizer",
    ):
        read_surprise([away])
    assert read_surprise([away], "bytes").documents[0].pieces[:3] == ["d", "e", "f"]
    other = write(
        tmp_path / "other.arrow", **{"longnet.tokenizer_sha256": "0", "longnet.model": named}
    )
    with pytest.raises(ConfigError, match="of another tokenizer than the tokenizer of "):
        read_surprise([other])
    with pytest.raises(ConfigError, match="of another tokenizer than --tokenizer bytes"):
        read_surprise([other], "bytes")


def test_numbers_beyond_the_vocabulary_and_special_tokens_are_named(tmp_path):
    with write_token_logprobs(tmp_path / "x.arrow", METADATA, top=True) as take:
        ids, nats = np.array([97, 256, 999]), np.zeros(3, np.float32)
        take(Document("x", ids.astype(np.int32), 3, "x"), 5, ids, nats, ids, nats)
    surprise = read_surprise([str(tmp_path / "x.arrow")])
    assert surprise.documents[0].pieces == ["a", "<|endoftext|>", "[999]"]
    assert surprise.tops == ["a", "<|endoftext|>", "[999]"]
    assert (surprise.documents[0].start, surprise.documents[0].means) == (5, [0.0])
    with pytest.raises(
        ConfigError, match=r"p.png: log-probabilities are drawn as a page: its name ends in \.html"
    ):
        write_surprise(surprise, tmp_path / "p.png")


ACT = """<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
addEventListener("load", async () => {
  while (!document.documentElement.dataset.shown) await wait(20);
  const said = { elements: document.querySelectorAll("*").length, first: document.querySelector("#lines").textContent };
  document.querySelector("#strip").style.width = "90px";
  fit();
  said.top = document.querySelector("#scroll").scrollTop;
  const part = document.querySelector('[data-token="2"]');
  said.ground = getComputedStyle(part).backgroundColor;
  part.dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
  said.about = document.querySelector("#about").innerText;
  const box = strip.getBoundingClientRect();
  strip.setPointerCapture = () => {};
  strip.dispatchEvent(new PointerEvent("pointerdown", { clientY: box.bottom }));
  said.last = document.querySelector("#lines").textContent;
  said.elements_then = document.querySelectorAll("*").length;
  document.body.textContent = "SAID" + btoa(unescape(encodeURIComponent(JSON.stringify(said)))) + "SAID";
});
</script>"""


@pytest.mark.ci
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 400), (True, 1280)])
def test_a_browser_shows_the_page(tmp_path, dark, width):
    """What is in sight alone is elements; a token tells of itself, and a click on the strip leads to the end."""
    text = "".join(f"line {number} of many\n" for number in range(5000))
    write_surprise(
        read_surprise([write(tmp_path / "lp.arrow", {"a": text}, scale=4)]), tmp_path / "p.html"
    )
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    (tmp_path / "p.html").write_text(page.replace("</body>", ACT + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    theme += [f"--window-size={width},700", "--virtual-time-budget=20000", "--dump-dom"]
    command = [CHROMIUM, *options, *theme, f"file://{tmp_path}/p.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = json.loads(base64.b64decode(re.search("SAID(.+?)SAID", done.stdout)[1]))
    assert ("line 0 of many" in said["first"], said["top"]) == (True, 0)
    assert "line 4999 of many" in said["last"]
    assert max(said["elements"], said["elements_then"]) < 3000
    ground = [int(number) for number in re.findall(r"\d+", said["ground"])]
    assert (sum(ground) < 384) == dark
    assert "text\tn\n" in said["about"]
    assert "surprise\t6.667 nats" in said["about"]
    assert "most likely\te" in said["about"]
