"""A reader of files: Common Crawl's WET files, the text of a web page a record.

In a spec, run in this folder (or with it on PYTHONPATH):

    pool: {path: crawl/, format: "wet_reader:WetReader", columns: {id: url, source: domain}}
"""

import gzip
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import urlsplit


class WetReader:
    """Rows of a WET file: `text`, `url` and `domain` of each page, in order."""

    suffixes = (".warc.wet.gz", ".wet.gz")  # what is read of a folder

    def read(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        """The rows of a file, which is open at its beginning.

        Raises:
            ValueError: it is not a WET file, or cut off. A spec may skip such files.
        """
        with gzip.open(file) as stream:
            while line := stream.readline():
                if not line.strip():
                    continue
                if not line.startswith(b"WARC/1."):
                    raise ValueError(f"no WARC record begins with {line[:20]!r}")
                header: dict[str, str] = {}
                while line := stream.readline().strip():
                    name, _, value = line.decode().partition(":")
                    header[name.lower()] = value.strip()
                length = int(header["content-length"])
                body = stream.read(length)
                if len(body) < length:
                    raise ValueError("cut off in the middle of a record")
                if header["warc-type"] == "conversion":
                    url = header["warc-target-uri"]
                    yield {"text": body.decode(), "url": url, "domain": urlsplit(url).hostname}
