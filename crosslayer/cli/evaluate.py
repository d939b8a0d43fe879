"""crosslayer evaluate"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslayer.cli.common import (
    add_device_argument,
    add_json_argument,
    check_json_argument,
    load_model,
    warn_beyond_context,
    write_json_output,
)
from crosslayer.errors import UserError

if TYPE_CHECKING:
    from crosslayer.data import Tokenizer
    from crosslayer.evaluate.recall import Recall
    from crosslayer.evaluate.tasks import TaskScore
    from crosslayer.model import Transformer

HELP = "measure a model: loss on held-out text, standard task sets, recall over a distance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Loss, perplexity and bits per byte of text; with --tasks or --recall those instead, and of text too where "
        "--text or --held-out is given."
    )
    parser.add_argument("model", metavar="FOLDER", help="model folder")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", nargs="+", metavar="FILE", help="text files to score, each a document")
    text.add_argument(
        "--held-out",
        metavar="CONFIG",
        help="score the held-out part of the data of this config for training (default: of the embedded corpus)",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens a window, or a row of recall (default: the context)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window; less than --window gives more context"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows at a time (default: %(default)s)")
    parser.add_argument(
        "--tasks", metavar="A,B,...", help="task sets to score: lambada, hellaswag, piqa, arc_easy, blimp, wikitext-2"
    )
    parser.add_argument("--task-data", metavar="DIR", help="folder with the files of the task sets")
    parser.add_argument("--task-items", type=int, metavar="N", help="N items of each set, evenly spaced (default: all)")
    parser.add_argument("--recall", action="store_true", help="recall of words that stood up to a whole window before")
    add_device_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    check_json_argument(arguments)
    for name in ("window", "stride", "batch", "task_items"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if (arguments.tasks is None) != (arguments.task_data is None):
        raise UserError("--tasks A,B,... and --task-data DIR go together: which sets, and the folder with their files")
    model, tokenizer, device = load_model(arguments.model, arguments.device)

    from crosslayer.environment import describe_environment
    from crosslayer.train.host import autocast

    record: dict[str, Any] = {"model": arguments.model}
    parts: list[str] = []
    with autocast(device, "auto"):
        other = arguments.tasks is not None or arguments.recall
        if arguments.text or arguments.held_out is not None or not other:
            _add_text(arguments, model, tokenizer, record, parts)
        if arguments.tasks is not None:
            _add_tasks(arguments, model, tokenizer, record, parts)
        if arguments.recall:
            _add_recall(arguments, model, tokenizer, record, parts)
    if arguments.json:
        write_json_output(arguments.json, _as_json({**record, "environment": describe_environment()}))
    if arguments.json != "-":
        print("\n\n".join(parts))


def _add_text(
    arguments: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, record: dict[str, Any], parts: list[str]
) -> None:
    from crosslayer.data import TokenStream
    from crosslayer.evaluate import score
    from crosslayer.train.metrics import ProgressLine

    window = arguments.window or model.config.max_position_embeddings
    stride = arguments.stride or window
    stream = TokenStream.from_texts(tokenizer, _texts(arguments))
    warn_beyond_context(model, min(window, len(stream)))
    started = time.monotonic()
    with closing(ProgressLine("evaluate")) as line:
        show = _progress(line, "tokens")
        result = score(model, stream, sequence_length=window, stride=stride, batch_size=arguments.batch, progress=show)
    seconds = time.monotonic() - started
    text = arguments.text or arguments.held_out or "stdlib"
    record |= {"text": text, "window": window, "stride": stride, **result.to_dict(), "seconds": seconds}
    parts.append(
        f"loss {result.loss:.4f}   perplexity {result.perplexity:.3f}   bits per byte {result.bits_per_byte:.4f}\n"
        f"{result.tokens:,} tokens, {result.num_bytes:,} bytes, {result.tokens / seconds:,.0f} tokens/s"
    )


def _add_tasks(
    arguments: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, record: dict[str, Any], parts: list[str]
) -> None:
    from crosslayer.evaluate import score_tasks
    from crosslayer.train.metrics import ProgressLine

    with closing(ProgressLine("evaluate")) as line:
        scores = score_tasks(
            model,
            tokenizer,
            Path(arguments.task_data),
            arguments.tasks.split(","),
            items=arguments.task_items,
            progress=lambda task: _progress(line, f"sequences of {task}"),
        )
    record["tasks"] = {name: asdict(result) for name, result in scores.items()}
    parts.append(format_tasks(scores))


def _add_recall(
    arguments: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, record: dict[str, Any], parts: list[str]
) -> None:
    from crosslayer.evaluate import score_recall
    from crosslayer.train.metrics import ProgressLine

    length = arguments.window or model.config.max_position_embeddings
    with closing(ProgressLine("evaluate")) as line:
        show = _progress(line, "rows of recall")
        results = score_recall(model, tokenizer, lengths=(length, length // 2), progress=show)
    record["recall"] = [asdict(result) for result in results]
    parts.append(format_recall(results))


def format_tasks(scores: dict[str, TaskScore]) -> str:
    """A line a metric: value and standard error, what guessing would give, and the number of items."""
    lines = [f"{'task':12}{'metric':18}{'value ± s.e.':22}{'chance':>8}{'items':>9}"]
    for task, score in scores.items():
        for name, metric in score.metrics.items():
            chance = "" if metric.chance is None else f"{metric.chance:.4f}"
            value = _with_error(metric.value, metric.standard_error)
            lines.append(f"{task:12}{name:18}{value:22}{chance:>8}{score.items:>9,}")
    return "\n".join(lines)


def format_recall(results: list[Recall]) -> str:
    """A line for each length and distance."""
    lines = [
        f"recall of words, {results[0].rows} rows each; loss and gain in nats a word",
        f"{'length':>6}{'distance':>10}   {'accuracy ± s.e.':18}{'loss ± s.e.':18}gain ± s.e.",
    ]
    for r in results:
        accuracy = _with_error(r.accuracy, r.accuracy_error)
        loss, gain = _with_error(r.loss, r.loss_error), _with_error(r.gain, r.gain_error)
        lines.append(f"{r.length:6}{r.distance:10}   {accuracy:18}{loss:18}{gain}")
    return "\n".join([*lines, f"guessing among the words: accuracy {results[0].chance:.4f}; without recall: gain 0"])


def _with_error(value: float, error: float | None) -> str:
    digits = 4 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}" + ("" if error is None else f" ±{error:,.{digits}f}")


def _as_json(value: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(line: Any, what: str) -> Callable[[int, int], None]:
    """Done, rate and time left on a progress line."""
    from crosslayer.train.metrics import clock

    started = time.monotonic()

    def show(done: int, total: int) -> None:
        if done == 0:
            return
        rate = done / (time.monotonic() - started)
        text = f"{done:,}/{total:,} {what}  {rate:,.0f}/s  {clock((total - done) / rate)} left"
        line.show(text, last=done == total)

    return show


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    from crosslayer.data import DataConfig, read_documents
    from crosslayer.data.corpus import split_documents
    from crosslayer.settings import load_settings
    from crosslayer.train import TrainConfig

    if arguments.text:
        files = DataConfig(source="text", paths=tuple(arguments.text))
        return (document.text for document in read_documents(files, files.paths))
    config = DataConfig()
    if arguments.held_out is not None:
        config = load_settings(TrainConfig, Path(arguments.held_out)).data
    return (document.text for split, document in split_documents(config) if split == "valid")
