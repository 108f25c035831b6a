"""The troubleshooting page explains every message of the package, and none that the package cannot give."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted(ROOT.glob("langchain_rerank/**/*.py"))

VARIES = "…"
"""Stands on the page, and here, for what the code fills in."""

NOT_EXPLAINED = {
    "module … has no attribute …": "Python's own words for a name that a module lacks",
    "give BackendTests a fixture 'backend' that returns the backend under test": "for authors of backends, in a test",
}
"""Messages that need no entry, with the reason."""

WITHOUT_WORDS = {
    "typer.Exit(1)": "an exit code, after the message",
    "typer.Exit(INTERRUPTED)": "an exit code",
    "typer.Exit(BROKEN_PIPE)": "an exit code",
    "AttributeError(name)": "for `copy` and `pickle`, which ask a connection for private names",
    "ConfigurationError(f'{what}: {problems}')": "pydantic's words; the page explains them in its own",
    "self._failure(error)": "a function that makes the error, and is read as such",
    "self._refused(response)": "a function that makes the error, and is read as such",
}
"""What is raised with no text of its own in that place, with the reason."""

ERROR = re.compile(r"\w*Error|BadParameter")
"""Names of what makes an error, raised on the spot or returned for it."""


@dataclass(frozen=True)
class Message:
    """What a user may read, with `…` for what varies."""

    text: str
    where: str

    @property
    def key(self):
        return constant_parts(self.text)

    def __str__(self):
        return f"{self.where}: {self.text}"


def constant_parts(text):
    """What stands between the parts that vary, without the spaces, quotes and punctuation next to them."""
    parts = (" ".join(part.split()).strip(" '\".,:;()[]") for part in text.split(VARIES))
    return tuple(part for part in parts if part)


# The code -----------------------------------------------------------------------------------------------------------


def messages_of(source, name="module.py"):
    """Every text of a module that ends up in an error or a warning, wherever it is put together."""
    module = ast.parse(source)
    texts = assigned_texts(module)
    found = [
        Message(template(text, texts), f"{name}, line {text.lineno}")
        for node in ast.walk(module)
        for text in texts_in(node, texts)
    ]
    return list(dict.fromkeys(found))  # an error that is made where it is raised is met twice


def texts_in(node: ast.AST, texts) -> Iterator[ast.expr]:
    match node:
        case ast.Raise(exc=ast.Call(args=arguments)):  # by any name: a function may make the error
            yield from first_text(arguments, texts)
        case ast.Call(args=[_, message, *_]) if called(node) == "_warn_once":
            yield from first_text([message], texts)
        case ast.Call(args=arguments) if ERROR.fullmatch(called(node)) or is_logged(node):
            yield from first_text(arguments, texts)
        case ast.Tuple(elts=[ast.Name(id=kind), text]) if ERROR.fullmatch(kind):  # what to raise, and what to say
            yield from first_text([text], texts)
        case ast.Return(value=text) | ast.IfExp(body=text, orelse=ast.Constant(value="")) if is_addition(text):
            yield text


def called(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_logged(call):
    return ast.unparse(call.func) in ("logger.warning", "logger.error", "logger.exception", "warnings.warn")


def is_addition(text):
    """Whether this goes behind a message: it begins as the middle of a sentence does."""
    return isinstance(text, ast.Constant | ast.JoinedStr) and re.match(r"[.;,]? \w", template(text, {})) is not None


def first_text(arguments, texts):
    return [argument for argument in arguments if constant_parts(template(argument, texts))][:1]


def assigned_texts(module):
    """The texts that have a name."""
    assignments = [node for node in ast.walk(module) if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): node.value for node in assignments if template(node.value, {}) != VARIES}


def template(node, texts):
    """The text with `…` for each placeholder, of an f-string or of logging."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sdrg]", VARIES, text)
        case ast.JoinedStr(values=values):
            return "".join(value.value if isinstance(value, ast.Constant) else VARIES for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, texts) + template(right, texts)
        case ast.Name(id=name) if name in texts:
            return template(texts[name], {})
    return VARIES


def raised_without_words(source):
    """What a module raises for which no text was found."""
    module = ast.parse(source)
    texts = assigned_texts(module)
    calls = [node.exc for node in ast.walk(module) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return [ast.unparse(call) for call in calls if not first_text(call.args, texts)]


# The page -----------------------------------------------------------------------------------------------------------


def entries_of(page):
    """The messages of each entry: code at the beginning of a list item, each with a line of its own."""
    entries = []
    for opening, inline in pairwise(MarkdownIt().parse(page)):
        if opening.type == "paragraph_open" and opening.level and inline.children[0].type == "code_inline":
            children = iter(inline.children)
            for line, (code, end) in enumerate(zip(children, children, strict=False), inline.map[0] + 1):
                if (code.type, end.type) != ("code_inline", "hardbreak"):
                    break
                entries.append(Message(code.content, f"troubleshooting.md, line {line}"))
    return entries


def differences(sources, page):
    """What the code says and the page does not explain, and what only the page says."""
    excused = {constant_parts(text) for text in NOT_EXPLAINED}
    said = [message for name, source in sources.items() for message in messages_of(source, name)]
    said = [message for message in said if message.key and message.key not in excused]
    entries = entries_of(page)
    missing = [message for message in said if message.key not in {entry.key for entry in entries}]
    left_over = [entry for entry in entries if entry.key not in {message.key for message in said}]
    return list(map(str, missing)), list(map(str, left_over))


# Tests --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources():
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in SOURCES}


def test_the_page_explains_every_message_and_no_other(sources):
    missing, left_over = differences(sources, PAGE.read_text("utf-8"))

    assert not missing, "no entry in docs/troubleshooting.md for\n" + "\n".join(missing)
    assert not left_over, "no such message in the code any more:\n" + "\n".join(left_over)


def test_nothing_is_raised_whose_words_cannot_be_found(sources):
    assert {call for source in sources.values() for call in raised_without_words(source)} == set(WITHOUT_WORDS)


def test_each_exception_is_still_needed(sources):
    said = {message.key for source in sources.values() for message in messages_of(source)}

    assert {constant_parts(text) for text in NOT_EXPLAINED} <= said


# Tests of the checks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ValueError(f'top_n is {n}; it must be 0 ' 'or more')", "top_n is …; it must be 0 or more"),
        ("raise ConfigurationError('no ' + name) from error", "no …"),
        ("busy = f'{path} is in use'\nraise OSError(busy)", "… is in use"),
        ("raise kind(f'Qdrant at {place} {message}')", "Qdrant at … …"),
        ("raise self._mismatch(f'vectors of size {size}', 'name')", "vectors of size …"),
        ("def refusal():\n    return RequestError(f'{place} refused')", "… refused"),
        ("def explained():\n    return RetrieverError, f'refused {it}'", "refused …"),
        ("def hint():\n    return '. Give a key'", ". Give a key"),
        ("hint = f'; did you mean {name}?' if name else ''", "; did you mean …?"),
        ("logger.warning('%s: out of memory', name)", "…: out of memory"),
        ("self._warn_once('query', f'a query of {n} tokens')", "a query of … tokens"),
    ],
)
def test_a_message_is_found_however_it_is_made(source, text):
    assert [message.text for message in messages_of(source)] == [text]


def test_what_is_no_message_is_none():
    source = "logger.info('trying again')\nname = 'x'\nif name:\n    raise\ndevice = 'cpu' if name else ''"

    assert messages_of(source) == []


def test_a_message_without_an_entry_and_an_entry_without_a_message_are_both_named():
    source = {"a.py": "raise ValueError(f'no {name} here')\nraise ValueError('gone')"}
    page = "- `no '…' here`\\\n  It is not here. See `name`.\n- `no … there`\\\n  `nowhere`\\\n  It is not there.\n"

    assert differences(source, page) == (
        ["a.py, line 2: gone"],
        ["troubleshooting.md, line 3: no … there", "troubleshooting.md, line 4: nowhere"],
    )
