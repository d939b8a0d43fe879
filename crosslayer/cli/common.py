"""What several commands have in common."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslayer.errors import UserError
from crosslayer.files import write_whole

if TYPE_CHECKING:
    import torch

    from crosslayer.data import Tokenizer
    from crosslayer.model import Transformer


def add_settings_argument(parser: argparse.ArgumentParser) -> None:
    """[CONFIG] [key=value ...]; read with `split_settings`."""
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG|key=value", help="a YAML or TOML file, and settings laid over it"
    )


def split_settings(arguments: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """The config file, if one is given, and the key=value overrides.

    Raises:
        UserError: more than one config file.
    """
    files = [item for item in arguments.settings if "=" not in item]
    if len(files) > 1:
        raise UserError(f"want one config file, got {' and '.join(files)}; settings are written key=value")
    return Path(files[0]) if files else None, [item for item in arguments.settings if "=" in item]


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """--json [FILE]; checked with `check_json_argument`, obeyed with `write_json_output`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the result as JSON (- or no FILE: print it instead of the table)",
    )


def check_json_argument(arguments: argparse.Namespace) -> None:
    """Before any work: a FILE that is taken for something else, or that cannot be written.

    Raises:
        UserError: the file's name does not end in .json, or its folder does not exist.
    """
    if arguments.json in (None, "-"):
        return
    if not arguments.json.endswith(".json"):
        raise UserError(f"--json writes to a file named *.json, got {arguments.json!r}; other arguments go before it")
    if not Path(arguments.json).parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no such folder")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def write_json_output(destination: str, data: Any) -> None:
    """Print `data` as JSON, or write it to the file that --json names.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(data, indent=2) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    try:
        write_whole(Path(destination), text)
    except OSError as error:
        raise UserError(f"--json {destination}: {error.strerror}") from None


def load_model(folder: str, device_name: str) -> tuple[Transformer, Tokenizer, torch.device]:
    """The model and tokenizer of a model folder, on a device.

    Raises:
        UserError: the folder is not a whole model folder, or has no tokenizer.json that fits the model.
    """
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder}: no model folder (it has no config.json); crosslayer train writes one to DIR/model")
    if Path(folder, "model", "config.json").is_file():
        raise UserError(f"{folder}: the folder of a training run; its model is in {Path(folder, 'model')}")
    from crosslayer import checkpoint
    from crosslayer.data import Tokenizer
    from crosslayer.train.host import choose_device

    device = choose_device(device_name)
    tokenizer = Tokenizer.load(folder)
    model = checkpoint.load(folder, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        )
    return model, tokenizer, device


def warn_beyond_context(model: Transformer, tokens: int) -> None:
    """Warn that a sequence of `tokens` is longer than those the model was made for."""
    context = model.config.max_position_embeddings
    if tokens > context:
        warnings.warn(f"{tokens} tokens go beyond the model's context of {context}", stacklevel=2)
