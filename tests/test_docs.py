"""The documentation runs: what a page shows is what its reader gets."""

import doctest
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
import yaml
from langchain_core.embeddings import DeterministicFakeEmbedding
from markdown_it import MarkdownIt

from langchain_rerank import create_rerank_retriever, init_reranker
from langchain_rerank.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/README.md")])
LINKING = sorted({*PAGES, *ROOT.glob("*.md")})
MODULES = sorted(path for path in ROOT.glob("langchain_rerank/**/*.py") if ">>> " in path.read_text("utf-8"))

NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->\s*", re.DOTALL)
MOST_NOT_RUN = 6

ONLY_SHOWN = {"", "json", "text", "toml"}
"""Languages that nothing is checked of; any other that has no check below is a slip, such as `py` for `python`."""

PLACEHOLDER = "http://localhost:8000"
"""What the key and each `${VARIABLE}` of a YAML block are set to: fit for a key, a path or an address; none is used."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    not_run: str | None  # the reason, if there is one

    @property
    def where(self):
        return f"{self.page.name}, line {self.line}"


def blocks_of(page):
    text = page.read_text("utf-8")
    tokens = MarkdownIt().parse(text)
    comments = [(token.map[1], NOT_RUN.fullmatch(token.content)) for token in tokens if token.type == "html_block"]
    reasons = {line: match[1] for line, match in comments if match}
    code = [token for token in tokens if token.type in ("fence", "code_block")]
    stray = len(re.findall(r"<!--\s*not run", text, re.IGNORECASE)) - sum(token.map[0] in reasons for token in code)
    assert not stray, f"{page.name}: 'not run' needs a colon, a reason and its block on the very next line"
    return [
        Block(page, token.map[0] + 2, token.info.strip(), token.content, reasons.get(token.map[0])) for token in code
    ]


# Blocks -------------------------------------------------------------------------------------------------------------


def run_page(page, folder, monkeypatch):
    """Runs a page's blocks from top to bottom, as one program in `folder`."""
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)  # pydantic looks names up there
    monkeypatch.setenv("COHERE_API_KEY", PLACEHOLDER)
    monkeypatch.chdir(folder)
    checks = {
        "python": lambda block: run_python(block, vars(program)),
        "yaml": lambda block: build_yaml(block, monkeypatch),
        "console": lambda block: check_commands(block, console_commands(block)),
        "bash": lambda block: check_commands(block, block.code),
    }
    for block in blocks_of(page):
        known = [*checks, *sorted(ONLY_SHOWN)]
        assert block.language in known, f"{block.where}: {block.language!r} is none of {known}"
        if block.language in ONLY_SHOWN:
            assert not re.search(r"^(>>>|\$) ", block.code, re.MULTILINE), (
                f"{block.where}: looks like python or console"
            )
        elif block.not_run is None:
            checks[block.language](block)
        else:
            assert block.language in ("python", "yaml"), f"{block.where}: {block.language} is never run anyway"


def run_python(block, namespace):
    if ">>> " in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, {}, "page", str(block.page), block.line - 1)
        test.globs = namespace  # not a copy: the next block goes on from here
        run_doctest(test)
    else:  # the empty lines make tracebacks point into the page
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)


def run_doctest(test):
    report = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
    if report:
        pytest.fail("".join(report), pytrace=False)


def build_yaml(block, monkeypatch):
    """Builds what the block describes, and saves it if it begins with a file's name: `# rerank.yaml`."""
    content = yaml.safe_load(block.code)
    assert isinstance(content, dict | list), f"{block.where}: neither a mapping nor a list"
    for name in re.findall(r"\$\{(\w+)\}", block.code):
        monkeypatch.setenv(name, PLACEHOLDER)
    if "retriever" in content:
        create_rerank_retriever({**content, "retriever": at_hand(content["retriever"])}).close()
    elif "sets" in content:
        from langchain_rerank.training import read_recipe  # imports torch

        read_recipe(content)
    else:
        init_reranker(content)
    if named := re.match(r"# (\S+\.ya?ml)\n", block.code):
        Path(named[1]).write_text(block.code, encoding="utf-8")


def at_hand(retriever):
    """The retriever's options without a place and an embedding that only its reader has."""
    if not isinstance(retriever, dict):
        return retriever
    own = {name: value for name, value in retriever.items() if name not in ("path", "url", "location", "api_key")}
    if "embedding" in own:
        assert re.fullmatch(r"\w+:\S+", own["embedding"]), "an embedding is provider:model"
        own["embedding"] = DeterministicFakeEmbedding(size=8)
    return own


# Commands -----------------------------------------------------------------------------------------------------------


def console_commands(block):
    """The lines after a prompt, with those that a backslash joins to them; the rest is output."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block.code, re.MULTILINE)
    assert commands, f"{block.where}: no line begins with '$ '"
    return "\n".join(commands)


def check_commands(block, script):
    for line in script.replace("\\\n", " ").splitlines():
        for words in simple_commands(line):
            try:
                check_command(words)
            except Exception as error:
                raise AssertionError(f"{block.where}: {shlex.join(words)}: {error}") from error


def simple_commands(line):
    """Words of each command between `|`, `&&` and their like; variables set in front are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def check_command(words):
    program, *arguments = words
    if Path(program).name == "langchain-rerank":
        parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), f"the Makefile has {targets}"
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), "no such program"
    elif program == "pip":
        for extras in re.findall(r"langchain-rerank\[(.+?)\]", " ".join(arguments)):
            known = metadata("langchain-rerank").get_all("Provides-Extra")
            assert set(extras.split(",")) <= set(known), f"the extras are {known}"


def parse(arguments):
    """As the program does, with commands that do nothing."""
    program = typer.main.get_command(app)
    for command in [program, *program.commands.values()]:
        command.callback = None
    program.main(arguments, prog_name="langchain-rerank", standalone_mode=False)


# Tests --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_does_what_it_shows(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_docstring_does_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    tests = doctest.DocTestFinder().find(module)
    for test in tests:
        run_doctest(test)

    shown = len(re.findall(r"^ *>>> ", path.read_text("utf-8"), re.MULTILINE))
    assert sum(len(test.examples) for test in tests) == shown  # else one stands where doctest does not look


def test_what_is_not_run_is_little():
    not_run = [f"{block.where}: {block.not_run}" for page in PAGES for block in blocks_of(page) if block.not_run]

    assert len(not_run) <= MOST_NOT_RUN, not_run


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def broken_links(page):
    inline = [child for token in MarkdownIt().parse(page.read_text("utf-8")) for child in token.children or []]
    targets = [child.attrs.get("href") or child.attrs.get("src") for child in inline]
    own = [target for target in targets if target and not re.match(r"\w+:", target)]
    return [target for target in own if not leads_somewhere(page, target)]


def leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    return file.exists() and (not anchor or anchor in anchors(file))


def anchors(page):
    """As GitHub makes them from headings: lower case, no punctuation, hyphens for spaces."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    headings = [text.content for opening, text in pairwise(tokens) if opening.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Tests of the checks ------------------------------------------------------------------------------------------------


def fenced(language, *lines):
    return "\n".join([f"```{language}", *lines, "```", ""])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (fenced("python", "1 / 0"), "division by zero"),
        (fenced("python", ">>> 1 + 1", "3"), "Expected:"),
        (fenced("python", "x = 1") + fenced("python", ">>> x", "2"), 'page.md", line 5'),
        (fenced("py", "x = 1"), "'py' is none of"),
        (fenced("", ">>> 1 + 1"), "looks like python"),
        ("    >>> 1 + 1\n", "looks like python"),
        (fenced("yaml", "embedded"), "neither a mapping nor a list"),
        (fenced("yaml", "backend: embeded"), "Did you mean 'embedded'"),
        (fenced("yaml", "backend: cross-encoder", "devise: cpu"), "Did you mean 'device'"),
        (fenced("yaml", "retriever: {k: 50}", "reranker: {backend: embeded}"), "Did you mean 'embedded'"),
        (fenced("yaml", "retriever: {path: ./qdrant, kk: 50}"), "Unknown option 'kk' for retriever 'qdrant'"),
        (fenced("yaml", "retriever: {mode: hybird, embedding: 'openai:a'}"), "Unknown mode 'hybird'"),
        (fenced("yaml", "retriever: qdrant", "rerankers: embedded"), "Did you mean 'reranker'"),
        (fenced("console", "langchain-rerank demo"), "no line begins with"),
        (fenced("console", "$ langchain-rerank demmo"), "No such command 'demmo'"),
        (fenced("console", "$ langchain-rerank demo --al"), "No such option: --al"),
        (fenced("console", "$ cat a.txt | langchain-rerank rank"), "langchain-rerank rank: Missing"),
        (fenced("console", "$ langchain-rerank rank q \\", "    --topn 3", "1 0.9"), "No such option: --topn"),
        (fenced("bash", "A=1 langchain-rerank rank q --top-n many"), "valid integer"),
        (fenced("bash", "make tset"), "the Makefile has"),
        (fenced("bash", "python examples/quick.py"), "no such program"),
        (fenced("bash", "pip install 'langchain-rerank[qdrnat]'"), "the extras are"),
        ("<!-- not run -->\n" + fenced("python", "1 / 0"), "needs a colon, a reason"),
        ("<!-- not run: no key -->\n\ntext\n\n" + fenced("python", "1 / 0"), "on the very next line"),
        ("<!-- not run: no key -->\n" + fenced("bash", "true"), "never run anyway"),
    ],
    ids=lambda value: value if "\n" not in value else "page",
)
def test_a_page_that_is_wrong_is_noticed(text, problem, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")

    with pytest.raises((Exception, pytest.fail.Exception), match=re.escape(problem)):
        run_page(page, tmp_path, monkeypatch)


def test_a_page_is_one_program_with_the_files_that_it_shows(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        fenced("yaml", "# rerank.yaml", "backend: cross-encoder:${HOME_OF_MODELS}/a", "top_n: 7")
        + fenced("python", "from langchain_rerank import init_reranker", "reranker = init_reranker('rerank.yaml')")
        + fenced("python", ">>> reranker.top_n", "7", ">>> seven = _")
        + "<!-- not run: it would fail -->\n"
        + fenced("python", "1 / 0")
        + fenced("python", "from pathlib import Path", "Path('end').touch()"),
        encoding="utf-8",
    )

    run_page(page, tmp_path, monkeypatch)

    assert (tmp_path / "end").exists()


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One, two & three\n[a](page.md) [b](#one-two--three) [c](none.md) [d](page.md#four) ![e](none.png) "
        "[f](https://example.org)\n",
        encoding="utf-8",
    )

    assert broken_links(page) == ["none.md", "page.md#four", "none.png"]
