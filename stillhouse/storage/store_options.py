"""How stores on other servers than the cloud's own are reached, remembered on this machine.

An endpoint cannot be read from a store that only it leads to. So a run keeps its spec's
`storage_options`, which hold no secret, in `~/.config/stillhouse/stores.json` by the store's URI,
and whatever opens that store later (`verify`, `status`, a reader) finds them there. What the
process itself was given, by a spec or in the environment, comes first.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def remember_options(store: str, options: dict[str, Any]) -> None:
    """Keep the options of a store that is not a local folder; empty ones are forgotten."""
    known = _read()
    if "://" not in store or known.get(store.rstrip("/"), {}) == options:
        return
    known[store.rstrip("/")] = options
    kept = {uri: found for uri, found in known.items() if found}
    path = _page()
    beside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    with suppress(OSError):  # a home that cannot be written: give them again, by the environment
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(kept, indent=1, sort_keys=True))
        os.replace(beside, path)


def known_options(uri: str) -> dict[str, Any]:
    """The options for what lies in a store, unless the process has others for its protocol."""
    from fsspec.config import conf

    protocol = uri.split("://", 1)[0]
    if "://" not in uri or conf.get(protocol) or any(name in os.environ for name in _ENDPOINTS):
        return {}
    inside = [store for store in _read() if f"{uri}/".startswith(f"{store}/")]
    return _read()[max(inside, key=len)] if inside else {}


def _page() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "stillhouse", "stores.json")


def _read() -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(_page().read_bytes()))
    except (OSError, ValueError):
        return {}
