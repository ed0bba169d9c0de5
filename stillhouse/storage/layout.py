"""Where the objects of an artifact lie.

An artifact's folder is `<kind>/<fingerprint>/`. That of a kind in `ROWS` holds its rows as Parquet
files and nothing else, not even hidden files (some readers take those too): pandas, `datasets`,
DuckDB, Polars and Ray read it as it is. Whatever else there is of it, the manifest first, lies in
`<kind>/about/<fingerprint>/`. Of other kinds the manifest and its files lie in the folder itself.
"""

from stillhouse.storage.filesystem import exists, join, list_names, read_bytes

MANIFEST = "manifest.json"
PART_LIST = "parts.parquet"
"""The parts of an artifact that has too many for its manifest."""
LEDGER = "ledger.parquet"
ROWS = ("selections", "distilled", "dead_letters")
LAYOUT_VERSION = 2
"""Of folders of rows, in their artifacts' fingerprints; 1 had everything in one folder."""
_ABOUT = "about"


def about(folder: str) -> str:
    """Where the manifest of the artifact in `folder` (a URI or a path in the store) lies.

    >>> about("s3://bucket/store/selections/0123"), about("tokens/0123")
    ('s3://bucket/store/selections/about/0123', 'tokens/0123')
    """
    parent, _, name = folder.rpartition("/")
    return f"{parent}/{_ABOUT}/{name}" if parent.rpartition("/")[2] in ROWS else folder


def folder_about(place: str) -> str:
    """The artifact's folder whose manifest lies in `place`: the inverse of `about`."""
    parent, _, name = place.rpartition("/")
    kind = parent.removesuffix(f"/{_ABOUT}")
    return f"{kind}/{name}" if kind != parent and kind.rpartition("/")[2] in ROWS else place


def places(folder: str) -> tuple[str, ...]:
    """Where the manifest of an artifact may lie: first where it is written now."""
    return tuple(dict.fromkeys((about(folder), folder)))


def read_manifest(folder: str) -> tuple[str, bytes]:
    """The folder in which the manifest of an artifact lies, and its bytes.

    Raises:
        FileNotFoundError: there is none, also not where layout 1 had it.
    """
    first, *others = places(folder)
    try:
        return first, read_bytes(join(first, MANIFEST))
    except FileNotFoundError:
        for place in others:
            return place, read_bytes(join(place, MANIFEST))
        raise


def artifact_names(kind: str) -> list[str]:
    """Names of the artifacts in the folder of a kind, those without a row included; sorted."""
    names = {*list_names(kind)}
    if _ABOUT in names:
        names |= {*list_names(join(kind, _ABOUT))}
    return sorted(names - {_ABOUT})


def has_manifest(folder: str) -> bool:
    """Whether there is an artifact in a folder."""
    return any(exists(join(place, MANIFEST)) for place in places(folder))
