"""What img2dataset leaves beside a shard: `00000_stats.json` with counts, `00000.parquet` with a row a sample."""

import json
from collections.abc import Mapping
from pathlib import Path

from data.shards.locations import is_remote


def stated_samples(location: str) -> int | None:
    """How many samples img2dataset says it wrote into a local shard; None where it says nothing."""
    if is_remote(location):
        return None
    try:
        stated = json.loads(Path(location).with_name(_stem(location) + "_stats.json").read_text())
        return int(stated["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parquet_image_sizes(location: str) -> Mapping[str, tuple[int, int]]:
    """Height and width of the stored pictures by key, from the parquet file beside a local shard; empty without one."""
    path = Path(location).with_name(_stem(location) + ".parquet")
    if is_remote(location) or not path.is_file():
        return {}
    import pyarrow.parquet  # a third of a second, for few

    try:
        table = pyarrow.parquet.read_table(path, columns=["key", "height", "width"]).to_pydict()
    except (OSError, ValueError, KeyError):  # pyarrow's errors derive from these
        return {}
    rows = zip(table["key"], table["height"], table["width"], strict=True)
    return {str(key): (int(height), int(width)) for key, height, width in rows if height and width}


def _stem(location: str) -> str:
    return Path(location).name.removesuffix(".tar")
