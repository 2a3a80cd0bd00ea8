"""Fetch real pretrained models (models.sh) and long English prose, as text.

    pip install '.[gguf]'
    python examples/real_model.py runs/real
    python examples/real_model.py runs/real --prose FOLDER   # your own .html or .txt in place of the prose
    longnet score runs/real/prose --model runs/real/smollm2 --pattern pretrained

The models are SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (Apache-2.0, 190 MB). The prose is Debian's package
`anarchism`, from /usr/share/doc or `apt-get download`. Without either, it is Python's own manual, which every
installation has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data import topics

DEBIAN = Path("usr/share/doc/anarchism/html")
LEAST = 100_000  # bytes of a document that counts as long


class Prose(HTMLParser):
    """A parser for the text of a page, without markup, with an empty line where a block ends."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "title")
        if tag in ("br", "li"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "title")
        if tag in ("p", "div", "blockquote", "h1", "h2", "h3", "h4", "li"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).split("\n\n"))
        return "\n\n".join(filter(None, lines)) + "\n"


def pages(given: Path | None) -> dict[str, str]:
    """Return the documents by name: from the given folder, from Debian's package, or Python's manual."""
    with tempfile.TemporaryDirectory() as place:
        folder = given or Path("/") / DEBIAN
        if not folder.is_dir():
            try:
                subprocess.run(
                    ["apt-get", "download", "-qq", "anarchism"],
                    cwd=place,
                    check=True,
                    capture_output=True,
                )
                package = next(Path(place).glob("*.deb"))
                subprocess.run(["dpkg-deb", "-x", package, place], check=True)
                folder = Path(place) / DEBIAN
            except (OSError, StopIteration, subprocess.CalledProcessError):
                print(
                    "no package anarchism here: Python's own manual is the prose", file=sys.stderr
                )
                return {
                    "python-manual": "\n\n".join(text for _, text in sorted(topics.topics.items()))
                }
        found = {}
        for path in sorted(folder.iterdir()):
            if path.suffix in (".html", ".txt"):
                text = path.read_text(encoding="utf-8", errors="replace")
                found[path.stem] = Prose(text).text() if path.suffix == ".html" else text
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--prose", type=Path, help="a folder of .html or .txt")
    parser.add_argument("--no-model", action="store_true", help="make the prose alone")
    options = parser.parse_args()
    prose = options.output / "prose"
    prose.mkdir(parents=True, exist_ok=True)
    for name, text in pages(options.prose).items():
        if options.prose or len(text) >= LEAST:
            (prose / f"{name}.txt").write_text(text, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in prose.iterdir()}
    print(f"{len(sizes)} documents of together {sum(sizes.values()):,} bytes in {prose}")
    model = options.output / "smollm2"
    if not options.no_model and not model.exists():
        subprocess.run(["bash", Path(__file__).with_name("models.sh"), options.output], check=True)


if __name__ == "__main__":
    main()
