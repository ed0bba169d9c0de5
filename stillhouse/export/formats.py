"""The formats by their names."""

from stillhouse.errors import SpecError
from stillhouse.export.hub import Hub
from stillhouse.export.mds import Mds
from stillhouse.export.megatron import Megatron
from stillhouse.export.shards import Format
from stillhouse.export.text import Files, TextFiles
from stillhouse.export.tokens import Tokens

_ALL: tuple[type[Format], ...] = (TextFiles, Tokens, Megatron, Mds, Hub)
FORMATS = {form.name: form for form in _ALL}


def find_format(name: str, files: Files | None) -> Format:
    """The format of a name.

    Raises:
        SpecError: none has it, or `files` beside another than `text`.
    """
    if name not in FORMATS:
        raise SpecError(f"`--format {name}`: there are {', '.join(FORMATS)}")
    if files is None:
        return FORMATS[name]()
    if name != TextFiles.name:
        raise SpecError(f"`--files` is of `--format text`: `{name}` has files of its own")
    return TextFiles(files)
