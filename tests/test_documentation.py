"""What the documents promise must exist."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

import compresslab
from compresslab import cli, recipe

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-TW.md", ROOT / "CONTRIBUTING.md"]


def test_papers_table_is_what_the_methods_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_papers.py"))["text"]()
    assert (ROOT / "docs" / "papers.md").read_text(encoding="utf-8") == made, "run python docs/make_papers.py"


def test_oracles_that_are_named_are_there() -> None:
    """In the heads of files: a test or an oracle, by its path from the root."""
    named = [
        (path, place)
        for folder in ("src", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for place in re.findall(r"\btests/[\w/]+(?:\.py)?", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 100
    missing = [f"{path.relative_to(ROOT)}: {place}" for path, place in named if not (ROOT / place).exists()]
    assert not missing, missing


def test_every_essay_that_names_its_paper_has_a_row() -> None:
    """Networks of others (architectures/) are no methods of ours."""
    table, package = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"), Path(compresslab.__file__).parent
    files = [path for path in package.rglob("*.py") if path.parent.name != "architectures"]
    essays = [path for path in files if re.search(r"^Papers?\. ", path.read_text(encoding="utf-8"), flags=re.M)]
    rows = [f"`{path.relative_to(package).as_posix()}`" for path in essays]
    assert len(rows) > 60 and not [row for row in rows if row not in table]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8"))
    links += re.findall(r"""(?:src|href)="(?!https?://|#)([^"]+)""", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def commands(document: Path) -> list[list[str]]:
    """Every `compresslab ...` line of a document's shell blocks, as words."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("compresslab ")]


@pytest.mark.parametrize("document", DOCUMENTS[:2], ids=lambda path: path.name)
def test_commands_in_the_readme_have_the_options_that_exist(document: Path) -> None:
    found = commands(document)
    assert found, "the README shows no command"
    known = get_command(cli.app).commands  # type: ignore[attr-defined]
    for words in found:
        assert words[1] in known, words
        command = known[words[1]]
        if hasattr(command, "commands"):  # a group, such as lab
            assert words[2] in command.commands, words
            command = command.commands[words[2]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word for word in words[2:] if word.startswith("--")}
        assert used <= options, words


def test_readmes_have_the_same_shape() -> None:
    """The Chinese README has a twin of every heading and every command of the English one."""
    english, chinese = (path.read_text(encoding="utf-8") for path in DOCUMENTS[:2])
    assert len(re.findall(r"^#+ ", english, flags=re.M)) == len(re.findall(r"^#+ ", chinese, flags=re.M))
    assert commands(DOCUMENTS[0]) == commands(DOCUMENTS[1])


def test_public_names_resolve_and_are_few() -> None:
    assert len(compresslab.__all__) <= 15
    for name in compresslab.__all__:
        assert getattr(compresslab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compresslab.nothing


def test_every_recipe_says_what_to_expect() -> None:
    for name in recipe.shipped():
        assert recipe.read(name).expect or recipe.read(name).training is not None, name


def test_no_document_holds_a_machine_path() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"/(?:root|work|tmp|home)/", path.read_text(encoding="utf-8")), path


def test_no_large_file_is_tracked() -> None:
    """A benchmark run in the checkout once left 90 MB of weights in a commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name]
    assert len(tracked) > 100
    assert not [path for path in tracked if path.exists() and path.stat().st_size > 500_000]
