"""Data: sources, tokenizing, packing, and loaders that resume to the batch."""

from lctrain.data.collator import PackCollator, PackedRows
from lctrain.data.datamodule import PackedDataModule
from lctrain.data.documents import TokenizedDocument
from lctrain.data.hub import HubSource
from lctrain.data.packages import PackagesSource
from lctrain.data.packing import PackingPlan, PackingReport, pack
from lctrain.data.sources import JsonlSource, ParquetSource, Source, StdlibSource, TextSource

__all__ = [
    "HubSource",
    "JsonlSource",
    "PackCollator",
    "PackagesSource",
    "PackedDataModule",
    "PackedRows",
    "PackingPlan",
    "PackingReport",
    "ParquetSource",
    "Source",
    "StdlibSource",
    "TextSource",
    "TokenizedDocument",
    "pack",
]
