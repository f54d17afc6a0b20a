"""Data that is larger than memory, for ``Task.data()``: files of records."""

from weft.data.shards import Shards

__all__ = ["Shards"]
