"""Conversations: rows of `messages`, as text by a chat template, and where the answers are."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from stillhouse.errors import ModelError
from stillhouse.text.values import ABSENT, is_unicode

Messages = Sequence[dict[str, Any]]
_ROLES = {"human": "user", "gpt": "assistant"}
_ANSWER = "assistant"
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message.role + ': ' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant: ' }}{% endif %}"
)
"""The chat template of tokenizers that have none; `plain_text` is the same."""


def conversation(value: Any) -> list[dict[str, Any]]:
    """The turns of a row, each with `role` and `content`, and whatever else it has.

    Turns of `from` (human, gpt) and `value` are read too, and contents that are lists of texts.

    Raises:
        ValueError: not such a list, no answer, or text that is not Unicode.
    """
    if value is ABSENT or value is None:
        raise ValueError("null" if value is None else "absent")
    if not isinstance(value, list):
        raise ValueError(f"not a list of turns but {type(value).__name__}")
    if not value:
        raise ValueError("no turns")
    turns = [_turn(i, one) for i, one in enumerate(cast(list[Any], value))]
    if all(turn["role"] != _ANSWER for turn in turns):
        raise ValueError("no turn of the assistant")
    return turns


def _turn(number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"turn {number} is not an object but {type(value).__name__}")
    turn = {k: v for k, v in cast(dict[str, Any], value).items() if v is not None}
    role = turn.pop("from", None) or turn.get("role")
    content = turn.pop("value", None) if "content" not in turn else turn["content"]
    if isinstance(content, list):
        parts = cast(list[Any], content)
        if any(not isinstance(part, dict) or "text" not in part for part in parts):
            raise ValueError(f"turn {number} holds something else than text")
        content = "".join(str(part["text"]) for part in parts)
    if content is None and "tool_calls" in turn:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"turn {number} has no `role` and `content`, both text")
    if not is_unicode(content):
        raise ValueError(f"turn {number}: invalid Unicode (lone surrogate)")
    return turn | {"role": _ROLES.get(role, role), "content": content}


def plain_text(messages: Messages) -> str:
    """Each turn as `role: content`, with an empty line between them."""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the spans of characters that are answers, in order."""

    text: str
    answers: tuple[tuple[int, int], ...]

    def without_beginning(self, beginning: str) -> "Rendered":
        """The same without a text at its beginning, if it is there."""
        if not beginning or not self.text.startswith(beginning):
            return self
        size = len(beginning)
        spans = tuple((max(0, start - size), end - size) for start, end in self.answers)
        return Rendered(self.text[size:], spans)

    def overlaps(self, offsets: Sequence[tuple[int, int]]) -> Iterator[bool]:
        """For each span of characters, in order, whether it holds one of an answer."""
        answers = iter([*self.answers, (len(self.text) + 1, len(self.text) + 1)])
        start, end = next(answers)
        for first, last in offsets:
            while end <= first:
                start, end = next(answers)
            yield last > max(start, first) and first < end


def render(messages: Messages, template: str | None, special: dict[str, str]) -> Rendered:
    """Write a conversation by a chat template (Jinja, as transformers writes it).

    Answers are what the template marks with `{% generation %}`. If it marks nothing, an answer is
    what its turn adds to the text before it, which ends where the assistant is asked to speak.

    Args:
        template: `PLAIN` by default.
        special: tokens that the template may name, such as `bos_token`.

    Raises:
        ValueError: the template refuses the turns, or does not write them one after the other.
        ModelError: it is no template.
    """
    with _refused():
        marked = template is not None and "generation" in template.replace("add_generation", "")
        text, spans = _write(messages, template, special, marked=marked)
        if marked and spans:
            return Rendered(text, tuple((start, end) for start, end in spans))
        found: list[tuple[int, int]] = []
        for i, turn in enumerate(messages):
            if turn["role"] == _ANSWER:
                before, _ = _write(messages[:i], template, special, prompt=True)
                after, _ = _write(messages[: i + 1], template, special)
                if not (text.startswith(after) and after.startswith(before)):
                    raise ValueError("the chat template changes turns that later ones follow")
                found.append((len(before), len(after)))
        return Rendered(text, tuple(found))


def prompt_text(prompt: str, template: str | None, special: dict[str, str]) -> str:
    """What a user says by a chat template, up to where the assistant is asked to speak.

    Raises:
        ValueError, ModelError: as `render`.
    """
    with _refused():
        return _write([{"role": "user", "content": prompt}], template, special, prompt=True)[0]


def _write(
    turns: Messages,
    template: str | None,
    special: dict[str, str],
    *,
    marked: bool = False,
    prompt: bool = False,
) -> tuple[str, list[Any]]:
    """The text of some turns, and the spans that the template marks if `marked`."""
    from transformers.utils import chat_template_utils

    write_all: Any = chat_template_utils.render_jinja_template
    texts, spans = write_all(
        [[dict(turn) for turn in turns]],
        chat_template=template or PLAIN,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=prompt,
        **special,
    )
    return texts[0], spans[0] if marked else []


@contextmanager
def _refused() -> Generator[None]:
    """What a template raises as our errors."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise ModelError(f"the tokenizer's chat template cannot be read: {error}") from error
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
