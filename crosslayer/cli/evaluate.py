"""crosslayer evaluate"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from crosslayer.cli.common import (
    add_device_argument,
    add_json_argument,
    check_json_argument,
    load_model,
    warn_beyond_context,
    write_json_output,
)
from crosslayer.errors import UserError

HELP = "measure how well a model predicts text: loss, perplexity, bits per byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="model folder")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", nargs="+", metavar="FILE", help="text files to score, each a document")
    text.add_argument(
        "--held-out",
        metavar="CONFIG",
        help="score the held-out part of the data of this config for training (default: of the embedded corpus)",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens a window (default: the model's context)")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window; less than --window gives more context"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows at a time (default: %(default)s)")
    add_device_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    check_json_argument(arguments)
    for name in ("window", "stride", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be positive, got {value}")
    model, tokenizer, device = load_model(arguments.model, arguments.device)

    from crosslayer.data import TokenStream
    from crosslayer.environment import describe_environment
    from crosslayer.evaluate import score
    from crosslayer.train.host import autocast
    from crosslayer.train.metrics import ProgressLine, clock

    window = arguments.window or model.config.max_position_embeddings
    stride = arguments.stride or window
    stream = TokenStream.from_texts(tokenizer, _texts(arguments))
    warn_beyond_context(model, min(window, len(stream)))
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = done / (time.monotonic() - started)
        text = f"{done:,}/{total:,} tokens  {rate:,.0f} tokens/s  {clock((total - done) / rate)} left"
        progress.show(text, last=done == total)

    with autocast(device, "auto"), closing(ProgressLine("evaluate")) as progress:
        result = score(model, stream, sequence_length=window, stride=stride, batch_size=arguments.batch, progress=show)
    seconds = time.monotonic() - started
    if arguments.json:
        text = arguments.text or arguments.held_out or "stdlib"
        record = {"model": arguments.model, "text": text, "window": window, "stride": stride}
        record |= {**result.to_dict(), "seconds": seconds, "environment": describe_environment()}
        write_json_output(arguments.json, record)
    if arguments.json != "-":
        print(
            f"loss {result.loss:.4f}   perplexity {result.perplexity:.3f}   bits per byte {result.bits_per_byte:.4f}\n"
            f"{result.tokens:,} tokens, {result.num_bytes:,} bytes, {result.tokens / seconds:,.0f} tokens/s"
        )


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    from crosslayer.data import DataConfig, read_documents
    from crosslayer.data.corpus import split_documents
    from crosslayer.settings import load_settings
    from crosslayer.train import TrainConfig

    if arguments.text:
        files = DataConfig(source="text", paths=tuple(arguments.text))
        return (document.text for document in read_documents(files, files.paths))
    config = load_settings(TrainConfig, Path(arguments.held_out)).data if arguments.held_out else DataConfig()
    return (document.text for split, document in split_documents(config) if split == "valid")
