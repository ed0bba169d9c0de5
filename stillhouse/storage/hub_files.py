"""Data sets of the Hugging Face hub: their files, pinned to a commit.

`hf://datasets/ORG/NAME/...` names files, as elsewhere; `hub://ORG/NAME?split=train` a data set as
`datasets` finds it, by its card and the names of its files. Both are listed with the commit in each
URI, so that all workers read the same files, in ranges, whatever is pushed meanwhile.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from stillhouse.errors import InputError, SpecError, require

HUB = "hub://"
_KEYS = {"split": "train", "config": None, "revision": None}
"""What may stand behind the `?`, with the defaults."""


def pinned_path(fs: Any, path: str) -> str:
    """A path of the hub's filesystem at the commit that its branch or tag is at.

    Raises:
        InputError: no such repository or revision, or no access.
    """
    from huggingface_hub import HfApi

    try:
        found = fs.resolve_path(path)
    except FileNotFoundError as error:
        raise InputError(f"hf://{error}") from error
    if not hasattr(found, "repo_id"):
        return path
    api = HfApi(endpoint=fs.endpoint, token=fs.token)
    info = api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision)
    folder = {"dataset": "datasets/", "space": "spaces/"}.get(found.repo_type, "")
    return f"{folder}{found.repo_id}@{info.sha}/{found.path_in_repo}".rstrip("/")


def hub_files(uri: str) -> list[str]:
    """The files of a split of a data set `hub://NAME?split=...&config=...&revision=...`.

    Raises:
        SpecError: an unknown key. InputError: no such data set, configuration or split.
        MissingExtraError: `datasets` is not installed.
    """
    name, _, query = uri.removeprefix(HUB).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := given.keys() - _KEYS.keys():
        raise SpecError(f"{uri}: unknown {sorted(unknown)}; there are {', '.join(_KEYS)}")
    asked = _KEYS | given
    files = _splits(uri, name, asked["config"], asked["revision"])
    split = str(asked["split"])
    if split not in files:
        raise InputError(f"{uri}: no split `{split}`; there are {', '.join(files)}")
    return [str(file) for file in files[split]]


def _splits(
    uri: str, name: str, config: str | None, revision: str | None
) -> dict[str, Sequence[str]]:
    require("datasets")
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(name, config, revision=revision)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{uri}: {first}") from error
    files: Any = builder.config.data_files
    if not files:
        raise InputError(f"{uri}: it has no files of data")
    return {str(split): found for split, found in files.items()}
