"""Data: sources, tokenizing, packing, and loaders that resume to the batch.

A name's module is imported when the name is first used. The schemas of the command line can thus
import the sources without torch and Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lctrain.data.chat import ChatSource
    from lctrain.data.collator import PackCollator, PackedRows
    from lctrain.data.datamodule import PackedDataModule
    from lctrain.data.dataset import pack
    from lctrain.data.documents import TokenizedDocument
    from lctrain.data.hub import HubSource
    from lctrain.data.masking import MaskedPackCollator, MaskTokens
    from lctrain.data.mix import SourceMix, SourcePart
    from lctrain.data.packages import PackagesSource
    from lctrain.data.packing import PackingPlan, PackingReport
    from lctrain.data.row_order import RowOrder
    from lctrain.data.sources import JsonlSource, ParquetSource, Source, StdlibSource, TextSource

__all__ = [
    "ChatSource",
    "HubSource",
    "JsonlSource",
    "MaskTokens",
    "MaskedPackCollator",
    "PackCollator",
    "PackagesSource",
    "PackedDataModule",
    "PackedRows",
    "PackingPlan",
    "PackingReport",
    "ParquetSource",
    "RowOrder",
    "Source",
    "SourceMix",
    "SourcePart",
    "StdlibSource",
    "TextSource",
    "TokenizedDocument",
    "pack",
]

_HOMES = {
    "ChatSource": "chat.source",
    "HubSource": "hub",
    "JsonlSource": "sources",
    "MaskTokens": "masking",
    "MaskedPackCollator": "masking",
    "PackCollator": "collator",
    "PackagesSource": "packages",
    "PackedDataModule": "datamodule",
    "PackedRows": "collator",
    "PackingPlan": "packing",
    "PackingReport": "packing",
    "ParquetSource": "sources",
    "RowOrder": "row_order",
    "Source": "sources",
    "SourceMix": "mix",
    "SourcePart": "mix",
    "StdlibSource": "sources",
    "TextSource": "sources",
    "TokenizedDocument": "documents",
    "pack": "dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lctrain.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lctrain.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
