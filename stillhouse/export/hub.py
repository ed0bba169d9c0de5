"""`hub`: a data set as the Hugging Face Hub lays it out; DIR may be `hf://datasets/OWNER/NAME`."""

from pathlib import Path
from typing import Any

import yaml

from stillhouse.export.shards import Exported, Shard, ShardReceipt, write_parquet
from stillhouse.export.text import text_rows

CARD = "README.md"
_BOUNDS = dict(enumerate(["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"], 3))


class Hub:
    """`data/train-00000-of-00008.parquet`, ... and a card, `README.md`."""

    name = "hub"
    shard_tokens = 2**26
    takes_documents = True

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        (folder / "data").mkdir()
        path = folder / _name(shard.number, shard.count)
        write_parquet(path, (text_rows(source, table) for table in shard.tables()))
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """The card."""
        samples = sum(shard.num_samples for shard in shards)
        header = {
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
                }
            ],
            "size_categories": [_size_category(samples)],
            "tags": ["stillhouse"],
        }
        tokens = sum(shard.num_tokens for shard in shards)
        lines = [
            "---",
            yaml.safe_dump(header, sort_keys=False).rstrip(),
            "---",
            "",
            "# Selected training data",
            "",
            f"{samples:,} {source.grain} ({tokens:,} tokens), selected by Stillhouse.",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in source.about.items()),
            "",
            "`provenance/` has a row for each sample: its scores, its position in the pool and the",
            "raw files and rows that it was cut from.",
            "",
        ]
        return {CARD: "\n".join(lines).encode()}


def _size_category(samples: int) -> str:
    """The Hub's name for a size: `1K<n<10K`."""
    exponent = max(3, len(str(samples)))
    below, above = _BOUNDS.get(exponent - 1), _BOUNDS.get(exponent)
    if above is None:
        return "n>1T"
    return f"n<{above}" if below is None else f"{below}<n<{above}"


def _name(number: int, count: int) -> str:
    return f"data/train-{number:05d}-of-{count:05d}.parquet"
