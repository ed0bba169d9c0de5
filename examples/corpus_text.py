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
_COMMENT = re.compile(r"[ \t]*#+ ?(.*)")
_NOTICE = re.compile(r"copyright|licen[cs]ed? |type: ignore|SPDX|^-\*-|^!/", re.IGNORECASE)
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
    nodes = list(ast.walk(tree := ast.parse(text)))
    lines = text.split("\n")
    doc_nodes = [node for scope in nodes if (node := docstring_node(scope)) is not None]
    doc_nodes.sort(key=lambda node: node.lineno)
    cleaned = [_clean_docstring(node) for node in doc_nodes]
    return PythonTexts(
        docstrings=group(cleaned),
        code=group(_definitions(tree, lines, _line_numbers(doc_nodes)), separator="\n\n\n"),
        comments=group(_comment_blocks(lines, _line_numbers(_strings(nodes)))),
        messages=group(_messages(nodes), separator="\n"),
    )


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


def _definitions(tree: ast.Module, lines: list[str], docs: set[int]) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            numbers = range(first, (node.end_lineno or first) + 1)
            yield "\n".join(lines[i - 1].rstrip() for i in numbers if i not in docs)


def _strings(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    for node in nodes:
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if isinstance(node, ast.JoinedStr) or is_text:
            yield node  # type: ignore[misc]


def _line_numbers(nodes: Iterable[ast.expr]) -> set[int]:
    return {i for node in nodes for i in range(node.lineno, (node.end_lineno or 0) + 1)}


def _comment_blocks(lines: list[str], string_lines: set[int]) -> Iterator[str]:
    """Runs of two or more comment lines that read as prose; no notices, no commented-out code."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        match = None if number in string_lines else _COMMENT.match(line)
        if match:
            block.append(match[1].rstrip())
            continue
        text = "\n".join(block).strip()
        if len(block) > 1 and is_prose(text) and not _NOTICE.search(text):
            yield text
        block = []


def _messages(nodes: list[ast.AST]) -> Iterator[str]:
    """What raised exceptions, warnings and log calls say, with `{...}` for what they fill in."""
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in _SPEAKING_CALLS:
                continue
            call = node
        else:
            continue
        text = _spoken(call.args[0]) if call.args else ""
        if text.count(" ") >= 3:
            yield " ".join(text.split())


def _spoken(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else part.value
            for part in node.values
            if isinstance(part, ast.FormattedValue | ast.Constant)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        return _spoken(node.left)
    return ""


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
    """The text cut to documents, or nothing where it was minified or is mostly numbers."""
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
