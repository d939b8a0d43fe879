"""Running a comparison: every design with every seed, what each costs, and the outputs."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from crosslayer import checkpoint
from crosslayer.compare.config import CompareConfig, Sample, design_folder
from crosslayer.compare.results import Continuation, Curve, DesignResult, Results, Run, Shape, Summary, compare_losses
from crosslayer.data import PreparedData, prepare
from crosslayer.engine import LLM, EngineConfig
from crosslayer.environment import describe_environment
from crosslayer.errors import UserError
from crosslayer.files import say, write_json, write_whole
from crosslayer.model import ContiguousCache
from crosslayer.model.cache import check_one_pass, slot_capacities
from crosslayer.plan import ModelConfig
from crosslayer.plan.cost import kv_bytes, num_parameters
from crosslayer.settings import to_mapping
from crosslayer.train import train
from crosslayer.train.host import choose_device
from crosslayer.train.loop import RESULT, claim_folder
from crosslayer.train.metrics import clock, read_metrics

# KV bytes are stated for the 16-bit cache of the paper's tables, whatever precision the comparison is trained in.
CACHE_DTYPE, CACHE_TORCH_DTYPE = "bf16", torch.bfloat16


def compare(config: CompareConfig, out: Path, *, command: str = "") -> Results:
    """Train every design with every seed under one budget, and write what was found into `out`.

    Runs are in `out`/runs/DESIGN/seed-N. Those that have finished are not repeated, and one that was cut off goes on
    from its last checkpoint, so that after an interruption the same call continues. A run that fails is reported in the
    results and does not stop the others; the next call tries it again. A sample that fails is left out. `command` is
    what the report says to repeat it.

    Raises:
        UserError: the sample's design cannot write text, `out` belongs to another comparison, or every run failed.
    """
    data = prepare(config.data)
    if config.sample:
        _check_sample(config, config.sample, data)
    claim_folder(out, {**to_mapping(config), "data_fingerprint": data.fingerprint})
    runs = _run_all(config, data, out)
    if all(run.error for run in runs):
        raise UserError(f"no run finished; the first, {runs[0].design} with seed {runs[0].seed}: {runs[0].error}")
    designs = tuple(_design_result(config, design, runs, data) for design in config.designs)
    results = Results(
        command=command,
        config=config,
        environment=describe_environment(),
        data=data.summary(),
        data_fingerprint=data.fingerprint,
        tokens=config.train.steps * config.train.tokens_per_step,
        context=config.train.sequence_length,
        cache_dtype=CACHE_DTYPE,
        differences=compare_losses(designs),
        sample=_sample(config, config.sample, designs, out, data) if config.sample else None,
        designs=designs,
    )
    publish(results, out)
    return results


def publish(results: Results, out: Path) -> None:
    """Write results.json, the plots and the report."""
    from crosslayer.compare.plots import draw_curves, draw_pareto, to_png
    from crosslayer.compare.report import report_html

    write_json(out / "results.json", to_mapping(results))
    pareto, curves = to_png(draw_pareto(results)), to_png(draw_curves(results))
    files = {"pareto.png": pareto, "curves.png": curves, "report.html": report_html(results, pareto, curves).encode()}
    for name, content in files.items():
        write_whole(out / name, content)


def _run_all(config: CompareConfig, data: PreparedData, out: Path) -> list[Run]:
    """Seed by seed, so that what an interruption leaves, or a machine that slows down, treats the designs alike."""
    plan = [(design, seed) for seed in config.seeds for design in config.designs]
    runs: list[Run] = []
    took: list[float] = []  # seconds of each run trained here
    for design, seed in plan:
        to_train = [pair for pair in plan[len(runs) :] if not (out / _folder(*pair) / RESULT).exists()]
        if took and to_train:
            left = clock(sum(took) / len(took) * len(to_train))
            say(f"{len(runs)} of {len(plan)} runs done, about {left} left for the rest")
        started = time.monotonic()
        try:
            runs.append(_run(config, design, seed, data, out, f"[{len(runs) + 1}/{len(plan)}] {design} seed {seed}"))
        except KeyboardInterrupt:
            say(f"\n{len(runs)} of {len(plan)} runs done; the same command goes on from here")
            raise
        if (design, seed) in to_train and runs[-1].error is None:
            took.append(time.monotonic() - started)
    return runs


def _run(config: CompareConfig, design: str, seed: int, data: PreparedData, out: Path, label: str) -> Run:
    folder = _folder(design, seed)
    try:
        training = config.training(design, seed)
        # What has no cache has no bytes to compare.
        slot_capacities(training.model_config(data.tokenizer).plan, config.train.sequence_length)
        result = train(training, data, out / folder, label=label)
        scores = result["validation"]
        if not math.isfinite(scores["loss"]):
            raise UserError(f"the held-out loss is {scores['loss']}")
    except Exception as error:  # whatever ends one run must not lose the others
        return Run(design, seed, folder, error=_report(error, label))
    return Run(
        design,
        seed,
        folder,
        loss=scores["loss"],
        perplexity=scores["perplexity"],
        bits_per_byte=scores["bits_per_byte"],
        seconds=result["seconds"],
        curve=_curve(out / folder),
    )


def _report(error: Exception, label: str) -> str:
    """What went wrong, in a line, which is printed also; with the traceback where it is not the user's to fix."""
    reason = str(error)
    if not isinstance(error, UserError):
        traceback.print_exc()
        reason = f"{type(error).__name__}: {reason.partition(chr(10))[0]}"
    say(f"{label}: failed: {reason}")
    return reason


def _folder(design: str, seed: int) -> str:
    return f"runs/{design_folder(design)}/seed-{seed}"


def _curve(folder: Path) -> Curve:
    lines = read_metrics(folder)
    trained = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validated = [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    return Curve(*zip(*trained, strict=True), *zip(*validated, strict=True))


def _design_result(config: CompareConfig, design: str, runs: Sequence[Run], data: PreparedData) -> DesignResult:
    own = tuple(run for run in runs if run.design == design)
    rate = config.learning_rates.get(design, config.train.learning_rate)
    try:
        shape = _shape(_model_config(config, design, data), config.train.sequence_length)
    except UserError:  # its runs say why
        shape = None
    return DesignResult(design, rate, shape, Summary.of(own), own)


def _model_config(config: CompareConfig, design: str, data: PreparedData) -> ModelConfig:
    return config.training(design, config.seeds[0]).model_config(data.tokenizer)


def _shape(model: ModelConfig, context: int) -> Shape:
    cache = ContiguousCache(model, 1, context, dtype=CACHE_TORCH_DTYPE)
    return Shape(
        kv_bytes_per_token=_per_token(kv_bytes(model, context, 1, CACHE_DTYPE), context),
        allocated_kv_bytes_per_token=_per_token(cache.nbytes, context),
        num_kv_layers=len(model.plan.owners),
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        parameters=num_parameters(model),
        sharing_plan=model.plan.to_dict(),
    )


def _per_token(num_bytes: int, tokens: int) -> int | float:
    """A whole number unless some layers keep a window only."""
    return num_bytes / tokens if num_bytes % tokens else num_bytes // tokens


def _check_sample(config: CompareConfig, sample: Sample, data: PreparedData) -> None:
    try:
        plan = _model_config(config, sample.design, data).plan
    except UserError:  # its runs will say why
        return
    try:
        check_one_pass(plan)
    except UserError as error:
        raise UserError(f"sample.design: {error}") from None


def _sample(
    config: CompareConfig, sample: Sample, designs: Sequence[DesignResult], out: Path, data: PreparedData
) -> Continuation | None:
    try:
        return _continue(config, sample, designs, out, data)
    except Exception as error:  # all that was trained must not be lost for it
        _report(error, "sample")
        return None


def _continue(
    config: CompareConfig, sample: Sample, designs: Sequence[DesignResult], out: Path, data: PreparedData
) -> Continuation | None:
    """The text that the sample asks for, by the first seed that finished; None if none has."""
    run = next((run for d in designs if d.design == sample.design for run in d.runs if run.error is None), None)
    if run is None:
        return None
    device = choose_device(config.train.device)
    model = checkpoint.load(out / run.folder / "model", device=device, dtype=torch.float32)
    prompt = data.tokenizer.encode(sample.prompt)
    # Beyond the context if need be: the training is done, and must not end with a refusal.
    max_length = max(model.config.max_position_embeddings, len(prompt) + (sample.sampling.max_tokens or 1))
    llm = LLM(model, EngineConfig(max_length=max_length, max_running=1), tokenizer=data.tokenizer)
    ((completion,),) = llm.generate([prompt], sample.sampling)
    tokens = len(completion.token_ids)
    reference = None
    if designs[0].shape is not None:
        first = _model_config(config, designs[0].design, data)
        reference = kv_bytes(first, len(prompt) + tokens, 1, "fp32")
    cached = kv_bytes(model.config, len(prompt) + tokens, 1, "fp32")
    return Continuation(sample.design, run.seed, sample.prompt, completion.text, tokens, "fp32", cached, reference)
