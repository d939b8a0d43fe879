"""`crosslayer train --dry-run`: what a run will cost, from its config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from crosslayer.errors import UserError
from crosslayer.plan.cost import (
    kv_bytes_per_token,
    num_parameters,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from crosslayer.plan.training_memory import checkpoint_bytes, training_memory
from crosslayer.plan.units import format_bytes, format_flops
from crosslayer.train import TrainConfig, make_model_config
from crosslayer.train.metrics import clock

# Of matmuls, in bf16, that one H100 does a second in training paper-1b: benchmarks/results, 16 x 2048 tokens.
MEASURED_TFLOPS = 513.0


def dry_run(config: TrainConfig, *, gpus: int, tflops: float = MEASURED_TFLOPS) -> dict[str, Any]:
    """The figures of a run on `gpus` GPUs that each do `tflops` TFLOP/s: counts, bytes (memory: of one GPU), hours.

    The vocabulary is that of the model section, else the one that the tokenizer is to be trained with.

    Raises:
        UserError: no GPU, no speed, a run in fp32 or not compiled, a model or batch that so many GPUs cannot share, or
            a vocabulary that only a tokenizer's file would tell.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    if not 0 < tflops < float("inf"):
        raise UserError(f"--tflops must be positive, got {tflops}")
    recipe = config.train
    if recipe.precision == "fp32" or recipe.compile is False:
        raise UserError("a dry run knows compiled runs in bf16 only; leave train.precision and train.compile open")
    if gpus % recipe.tensor_parallel:
        raise UserError(f"train.tensor_parallel {recipe.tensor_parallel} must divide --gpus {gpus}")
    data_parallel = gpus // recipe.tensor_parallel
    micro_batch = recipe.micro_batch_of(data_parallel)
    micro_batches = recipe.batch_size // data_parallel // micro_batch

    known = config.data.tokenizer is None
    if not known and not {"preset", "vocab_size"} & config.model.keys():
        raise UserError("a dry run does not read data.tokenizer; say how large it is with model.vocab_size")
    model = make_model_config(
        config.model,
        vocab_size=config.data.vocab_size if known else 1,
        eos_token_id=None,
        context=recipe.sequence_length,
    )
    flops = training_flops_per_token(model, recipe.sequence_length)
    recomputed = recomputed_flops_per_token(model, recipe.sequence_length, recipe.activation_checkpointing)
    tokens = recipe.steps * recipe.tokens_per_step
    gpu_hours = tokens * (flops + recomputed) / (tflops * 1e12) / 3600
    memory = training_memory(
        model,
        tokens=micro_batch * recipe.sequence_length,
        micro_batches=micro_batches,
        recompute=recipe.activation_checkpointing,
        data_parallel=data_parallel,
        tensor_parallel=recipe.tensor_parallel,
    )
    return {
        "parameters": num_parameters(model),
        "vocab_size": model.vocab_size,
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "tokens": tokens,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "sequence_length": recipe.sequence_length,
        "gpus": gpus,
        "data_parallel": data_parallel,
        "tensor_parallel": recipe.tensor_parallel,
        "micro_batch_size": micro_batch,
        "micro_batches": micro_batches,
        "activation_checkpointing": recipe.activation_checkpointing,
        "training_flops_per_token": flops,
        "recomputed_flops_per_token": recomputed,
        "training_flops": tokens * flops,
        "tflops": tflops,
        "hours": gpu_hours / gpus,
        "gpu_hours": gpu_hours,
        "checkpoint_bytes": checkpoint_bytes(model),
        "memory": asdict(memory),
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as people read them."""
    tensor, shards = figures["tensor_parallel"], figures["data_parallel"]
    recompute = figures["activation_checkpointing"]
    shared = f"fp32, 1/{shards} by FSDP2" if shards > 1 else "fp32"
    shared += f" of what tensor parallelism over {tensor} leaves" if tensor > 1 else ""
    whole = "fp32, whole until the last micro batch of a step" if figures["micro_batches"] > 1 else shared
    kept = {"none": "nothing is recomputed", "block": "blocks are recomputed", "group": "groups are recomputed"}
    notes = {
        "weights": shared,
        "gradients": whole,
        "optimizer": f"AdamW's two moments, {shared}",
        "compute_weights": "bf16",
        "activations": f"of {figures['micro_batch_size']} x {figures['sequence_length']:,} tokens; {kept[recompute]}",
        "loss": "logits in chunks, and their gradients",
        "peak": "the most at one time, as PyTorch allocates it",
    }
    flops = f"{format_flops(figures['training_flops_per_token'])}FLOP a token, "
    flops += f"{format_flops(figures['training_flops'])}FLOP in all"
    if figures["recomputed_flops_per_token"]:
        flops += f"; and {format_flops(figures['recomputed_flops_per_token'])}FLOP a token recomputed"
    model = f"{figures['parameters']:,} parameters, {figures['kv_bytes_per_token']:,} bytes of KV cache a token"
    batch = f"{figures['batch_size']:,} x {figures['sequence_length']:,}"
    micro_batches = f"{figures['micro_batches']} x {figures['micro_batch_size']} sequences a step"
    hours = f"{clock(figures['hours'] * 3600)}, {figures['gpu_hours']:,.1f} GPU-hours"
    lines = [
        f"model       {model}",
        f"tokens      {figures['tokens']:,}: {figures['steps']:,} steps of {batch}",
        f"GPUs        {figures['gpus']}: {shards} data-parallel x {tensor} tensor-parallel, each {micro_batches}",
        f"training    {flops}",
        f"time        {hours}, at {figures['tflops']:g} TFLOP/s a GPU",
        f"checkpoint  {format_bytes(figures['checkpoint_bytes'])}, of which two are kept",
        "",
        "memory of a GPU",
    ]
    for name, count in figures["memory"].items():
        lines.append(f"  {name.replace('_', ' '):16}{format_bytes(count):>10}  {notes[name]}")
    return "\n".join(lines)
