"""Text sources, tokenizers, token shards, and batches addressed by step number. Knows nothing of models."""

from crosslayer.data.batches import Batch, TrainBatches
from crosslayer.data.corpus import DataConfig, read_documents
from crosslayer.data.prepared import PreparedData, default_cache_dir, open_prepared, prepare
from crosslayer.data.shards import TokenStream
from crosslayer.data.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Batch",
    "DataConfig",
    "PreparedData",
    "StreamDecoder",
    "TokenStream",
    "Tokenizer",
    "TrainBatches",
    "default_cache_dir",
    "open_prepared",
    "prepare",
    "read_documents",
]
