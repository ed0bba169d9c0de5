"""What a document is, for each kind of file: pure functions from a file's text to documents.

Nothing here reads a file or imports a package; Python is read by `ast` alone. Every function
returns texts in the order in which they stand in the file, so equal files give equal documents.
"""

import ast
import html
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIN_CHARS = 200
MAX_CHARS = 20_000
GROUP_CHARS = 1_500

_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SPEAKING_CALLS = frozenset({"warn", "warning", "error", "exception", "critical", "info"})
_COMMENT = re.compile(r"[ \t]*#+:? ?(.*)")
_NOTICE = re.compile(
    r"copyright|licen[cs]ed? |redistribution|type: ignore|SPDX|distutils:|cython:|^-\*-|^!/",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]+>")
_BLOCK_TAG = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|h\d|br)\s*/?>")
_HEADER_FOLD = re.compile(r"^(?: {7}\||        )", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PythonTexts:
    """The documents of one Python file, by kind."""

    docstrings: list[str]
    code: list[str]
    comments: list[str]
    messages: list[str]


def python_texts(text: str) -> PythonTexts:
    """Split one Python file into its kinds of text.

    Raises SyntaxError, ValueError or RecursionError where `ast` cannot parse the file.
    """
    statements = list(_statements(tree := ast.parse(text)))
    lines = text.split("\n")
    doc_nodes = [node for x in (tree, *statements) if (node := docstring_node(x)) is not None]
    doc_lines = {i for node in doc_nodes for i in _line_range(node)}
    return PythonTexts(
        docstrings=group(_clean_docstring(node) for node in doc_nodes),
        code=group(_definitions(tree, lines, doc_lines), separator="\n\n\n"),
        comments=group(_comment_blocks(lines, doc_lines | _quoted_lines(statements, lines))),
        messages=group(_messages(statements), separator="\n"),
    )


def docstrings(text: str) -> list[str]:
    """The docstrings of one Python file alone; raises as `python_texts` does."""
    tree = ast.parse(text)
    nodes = (docstring_node(x) for x in (tree, *_statements(tree)))
    return group(_clean_docstring(node) for node in nodes if node is not None)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below a node in the order of the source; expressions are not entered."""
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for child in getattr(node, name, ()):
            yield child
            yield from _statements(child)


def docstring_node(scope: ast.AST) -> ast.Constant | None:
    """The string that documents a module, class or function; None where there is none."""
    if not isinstance(scope, _SCOPES) or not scope.body:
        return None
    first = scope.body[0]
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return None
    return first.value if isinstance(first.value.value, str) else None


def _clean_docstring(node: ast.Constant) -> str:
    lines = str(node.value).expandtabs().split("\n")
    margin = min((len(x) - len(x.lstrip()) for x in lines[1:] if x.strip()), default=0)
    return "\n".join([lines[0].strip(), *(x[margin:].rstrip() for x in lines[1:])]).strip()


def _line_range(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _definitions(tree: ast.Module, lines: list[str], doc_lines: set[int]) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            kept = (i for i in range(first, _line_range(node).stop) if i not in doc_lines)
            yield "\n".join(lines[i - 1].rstrip() for i in kept)


def _quoted_lines(statements: list[ast.AST], lines: list[str]) -> set[int]:
    """Lines of simple statements that hold a string of several lines: no comments are there."""
    quoted: set[int] = set()
    for node in statements:
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            numbers = _line_range(node)
            text = "".join(lines[numbers.start - 1 : numbers.stop - 1])
            if len(numbers) > 1 and ('"""' in text or "'''" in text):
                quoted.update(numbers)
    return quoted


def _comment_blocks(lines: list[str], quoted: set[int]) -> Iterator[str]:
    """Runs of two or more comment lines that read as prose; no notices, no commented-out code."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        match = None if number in quoted else _COMMENT.match(line)
        if match:
            block.append(match[1].rstrip())
            continue
        text = "\n".join(block).strip()
        if len(block) > 1 and is_prose(text) and not _NOTICE.search(text):
            yield text
        block = []


def _messages(statements: list[ast.AST]) -> Iterator[str]:
    """What raised exceptions, warnings and log calls say, with `{...}` for what they fill in."""
    for node in statements:
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "attr", "")
            call = node.value if name in _SPEAKING_CALLS else None
        if isinstance(call, ast.Call) and call.args:
            text = _spoken(call.args[0])
            if text.count(" ") >= 3:
                yield " ".join(text.split())


def _spoken(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_formatted, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        return _spoken(node.left)
    return ""


def _formatted(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return f"{{{ast.unparse(part.value)}}}"
    return _spoken(part)


def reference_topics(text: str) -> list[str]:
    """The language reference that `help()` shows: the values of `pydoc_data.topics.topics`."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return group(list(ast.literal_eval(node.value).values()))
    return []


def api_descriptions(text: str) -> list[str]:
    """Every `documentation` value of a service description (JSON), without its HTML tags."""
    return group(_strip_html(value) for value in _documentation(json.loads(text)))


def _documentation(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)


def _strip_html(text: str) -> str:
    text = html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", text)))
    paragraphs = (" ".join(line.split()) for line in text.split("\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def long_description(text: str) -> list[str]:
    """The body of a package's METADATA, or its folded `Description:` header in old files."""
    headers, _, body = text.partition("\n\n")
    if not body.strip() and (start := headers.find("\nDescription: ")) >= 0:
        body = _HEADER_FOLD.sub("", headers[start + len("\nDescription: ") :])
    return clip(body)


def handwritten(text: str) -> list[str]:
    """The text cut to documents; none where it was generated, minified or is mostly numbers."""
    if "@generated" in text[:500]:
        return []
    lines = text.count("\n") + 1
    letters = sum(map(str.isalpha, text[:MAX_CHARS]))
    dense = len(text) > 120 * lines or letters < 0.4 * len("".join(text[:MAX_CHARS].split()))
    return [] if dense else clip(text)


def is_prose(text: str) -> bool:
    """Whether at least 85 % of the characters are letters, blanks or ordinary punctuation."""
    return sum(c.isalpha() or c in " \n,.'" for c in text) >= 0.85 * len(text)


def group(pieces: Iterable[str], separator: str = "\n\n") -> list[str]:
    """Join neighbours until a document has `GROUP_CHARS`; long pieces are cut by `clip`."""
    documents: list[str] = []
    held = ""
    for piece in pieces:
        held = f"{held}{separator}{piece}" if held else piece
        if len(held) >= GROUP_CHARS:
            documents += clip(held)
            held = ""
    return documents + clip(held)


def clip(text: str) -> list[str]:
    """Cut at paragraph (else line) ends to at most `MAX_CHARS`; drop what is under `MIN_CHARS`."""
    pieces: list[str] = []
    rest = text.replace("\r\n", "\n").replace("\0", "").strip()
    while len(rest) > MAX_CHARS:
        ends = (rest.rfind(mark, MIN_CHARS, MAX_CHARS) for mark in ("\n\n", "\n"))
        end = next((end for end in ends if end > 0), MAX_CHARS)
        pieces.append(rest[:end].rstrip())
        rest = rest[end:].strip("\n")
    return [piece for piece in [*pieces, rest] if len(piece) >= MIN_CHARS]
