"""`hub`: a data set as the Hugging Face Hub lays it out; DIR may be `hf://datasets/OWNER/NAME`."""

from pathlib import Path
from typing import Any

import yaml

from stillhouse.export.shards import Exported, Shard, ShardReceipt
from stillhouse.export.text import write_parquet

CARD = "README.md"
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}
_SIZES |= {10**7: "1M<n<10M", 10**8: "10M<n<100M", 10**9: "100M<n<1B", 10**10: "1B<n<10B"}


class Hub:
    """`data/train-00000-of-00008.parquet`, ... and a card, `README.md`."""

    name = "hub"
    shard_tokens = 2**26
    takes_documents = True

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        (folder / "data").mkdir()
        write_parquet(source, shard, folder / _name(shard.number, shard.count))
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
            "size_categories": [next((s for n, s in _SIZES.items() if samples < n), "n>1T")],
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


def _name(number: int, count: int) -> str:
    return f"data/train-{number:05d}-of-{count:05d}.parquet"
