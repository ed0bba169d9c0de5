"""Where the objects of an artifact lie.

An artifact's folder is `<kind>/<fingerprint>/`. For a kind in `ROWS` it holds Parquet files of rows
and nothing else, not even hidden files (some readers take those too), so that pandas, `datasets`,
DuckDB, Polars and Ray can read it; the manifest and other files lie in
`<kind>/about/<fingerprint>/`. For other kinds they lie in the folder itself.
"""

from stillhouse.storage.filesystem import exists, join, list_names, read_bytes

MANIFEST = "manifest.json"
PART_LIST = "parts.parquet"
"""The parts of an artifact that has too many for its manifest."""
LEDGER = "ledger.parquet"
ROWS = ("selections", "distilled", "generated", "dead_letters")
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
    """The folder of the artifact whose manifest lies in `place`: the inverse of `about`."""
    parent, _, name = place.rpartition("/")
    kind = parent.removesuffix(f"/{_ABOUT}")
    return f"{kind}/{name}" if kind != parent and kind.rpartition("/")[2] in ROWS else place


def places(folder: str) -> tuple[str, ...]:
    """The folders that the manifest of an artifact may lie in, that of the present layout first."""
    return tuple(dict.fromkeys((about(folder), folder)))


def read_manifest(folder: str) -> tuple[str, bytes]:
    """The folder in which the manifest of an artifact lies, and its bytes.

    Raises:
        FileNotFoundError: there is none, neither of this layout nor of layout 1.
    """
    first, *others = places(folder)
    try:
        return first, read_bytes(join(first, MANIFEST))
    except FileNotFoundError:
        for place in others:
            return place, read_bytes(join(place, MANIFEST))
        raise


def artifact_names(kind: str) -> list[str]:
    """The sorted names of the artifacts in the folder of a kind, empty ones included."""
    names = {*list_names(kind)}
    if _ABOUT in names:
        names |= {*list_names(join(kind, _ABOUT))}
    return sorted(names - {_ABOUT})


def has_manifest(folder: str) -> bool:
    return any(exists(join(place, MANIFEST)) for place in places(folder))
