"""What several commands have in common."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslayer.errors import UserError

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
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the result as JSON (- or no FILE: print it instead of the table)",
    )


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
        Path(destination).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {destination}: {error.strerror}") from None


def load_model(folder: str, device_name: str) -> tuple[Transformer, Tokenizer, torch.device]:
    """The model and tokenizer of a model folder, on a device.

    Raises:
        UserError: the folder is not a whole model folder, or has no tokenizer.json.
    """
    from crosslayer import checkpoint
    from crosslayer.data import Tokenizer
    from crosslayer.train.host import choose_device

    device = choose_device(device_name)
    tokenizer = Tokenizer.load(folder)
    return checkpoint.load(folder, device=device), tokenizer, device
