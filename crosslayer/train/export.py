"""From a checkpoint of a run to a model folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from crosslayer import checkpoint
from crosslayer.checkpoint.state import Checkpoints
from crosslayer.data import Tokenizer
from crosslayer.errors import UserError
from crosslayer.files import read_json
from crosslayer.model import Transformer
from crosslayer.settings import from_mapping
from crosslayer.train.config import TrainConfig
from crosslayer.train.loop import CHECKPOINTS, CONFIG, TOKENIZER


def export(run: Path, out: Path, step: int | None = None) -> int:
    """Write the model of a checkpoint in the folder `run`, the newest or that of `step`, to the model folder `out`.

    Needs one process, however many have written the checkpoint, and no data: the run's folder says what the model is
    and keeps its tokenizer. Returns the step.

    Raises:
        UserError: `run` is not the folder of a run, or has no whole checkpoint (of `step`); or `out` is something else
            than a model folder, or not apart from `run`.
    """
    if not (run / CHECKPOINTS).is_dir():
        raise UserError(f"{run}: not the folder of a training run with checkpoints (it has no {CHECKPOINTS}/)")
    source, target = run.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(f"{out}: not apart from the run {run}, which is left as it is; choose another place")
    settings = read_json(run / CONFIG)
    settings.pop("data_fingerprint", None)
    try:
        config = from_mapping(TrainConfig, settings)
    except UserError as error:
        raise UserError(f"{run / CONFIG}: {error}") from None
    tokenizer = Tokenizer.load(run / TOKENIZER)
    model = Transformer(config.model_config(tokenizer))
    with closing(Checkpoints(run / CHECKPOINTS)) as checkpoints:
        progress = checkpoints.load(model, step=step)
    if progress is None:
        raise UserError(f"{run / CHECKPOINTS}: no whole checkpoint in it")
    checkpoint.save(model, out, tokenizer=tokenizer)
    return int(progress["step"])
