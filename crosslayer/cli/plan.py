"""`crosslayer plan`: what sharing designs cost, before anything is trained."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from crosslayer.cli.common import add_json_argument, write_json_output
from crosslayer.errors import UserError
from crosslayer.files import write_whole
from crosslayer.plan import ModelConfig
from crosslayer.plan.cost import BYTES_PER_ELEMENT, Cost
from crosslayer.plan.draw import draw
from crosslayer.plan.pipeline import pipeline_stages
from crosslayer.plan.presets import PRESETS, parse_design, preset
from crosslayer.plan.sharing import PASSES, PASSES_WITH_GRADIENT
from crosslayer.plan.units import format_bytes, format_flops, parse_bytes

HELP = "cache bytes, parameters, FLOPs and what fits in a memory, for one design or several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute what sharing designs cost, each next to the same model unshared. A DESIGN is [H<head size>]-"
        "[MHA|GQA<n>|MQA]-[plan], such as H128-MQA-CLA2, MQA-yoco:window=1024, cla3 or 0,0,2,2; a part left out stays "
        "as it is in the preset or config. Without a DESIGN the preset or config itself is shown."
    )
    parser.add_argument("designs", nargs="*", metavar="DESIGN", help="a design to try on the model")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", metavar="NAME", help=f"a shape from the paper: {', '.join(PRESETS)}")
    model.add_argument("--config", type=Path, metavar="PATH", help="a config.json or a model folder")
    parser.add_argument("--context", type=int, metavar="N", help="tokens a sequence (default: the model's maximum)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument("--memory", default="80GiB", metavar="BYTES", help="for weights and cache (default: 80GiB)")
    parser.add_argument("--cache-dtype", choices=BYTES_PER_ELEMENT, default="bf16", help="default: bf16")
    parser.add_argument("--pipeline-stages", type=int, metavar="N", help="cut the layers into N stages of a pipeline")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the cache: a .png, .svg or .pdf file")
    parser.add_argument("--draw", action="store_true", help="draw the plans (a single design is always drawn)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    name, base = _model(args)
    designs = [(design, parse_design(design, base)) for design in args.designs] or [(name, base)]
    workload = {
        "context": base.max_position_embeddings if args.context is None else args.context,
        "batch": args.batch,
        "memory": parse_bytes(args.memory),
        "cache_dtype": args.cache_dtype,
    }
    for key in ("context", "batch"):
        if workload[key] < 1:
            raise UserError(f"--{key} must be at least 1, got {workload[key]}")
    stages: int | None = args.pipeline_stages
    if stages is not None and stages < 1:
        raise UserError(f"--pipeline-stages must be at least 1, got {stages}")
    if args.json not in (None, "-") and not args.json.endswith(".json"):
        raise UserError(f"--json writes to a file named *.json, got {args.json!r}; name designs before --json")
    if args.plot and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot writes .png, .svg or .pdf files, got {str(args.plot)!r}")

    if args.json:
        figures = [_figures(design, config, workload) for design, config in designs]
        if stages is not None:
            for figure, (_, config) in zip(figures, designs, strict=True):
                figure["pipeline_stages"] = _stages(config, stages)
        write_json_output(args.json, figures)
    if args.json != "-":
        print(_report(name, designs, workload))
        if args.draw or len(designs) == 1:
            for design, config in designs:
                print(f"\n{design}: {draw(config.plan)}")
        if stages is not None:
            print()
            for design, config in designs:
                print(f"{design}: {_stages(config, stages)}")
    if args.plot:
        _plot(args.plot, designs, workload)


def _model(args: argparse.Namespace) -> tuple[str, ModelConfig]:
    if args.preset:
        return args.preset, preset(args.preset)
    path: Path = args.config
    folder = path if path.is_dir() else path.parent
    name = path.stem if path.is_file() and path.name != "config.json" else folder.resolve().name
    return name, ModelConfig.from_json_file(path)


def _figures(design: str, config: ModelConfig, workload: dict[str, Any]) -> dict[str, Any]:
    """One object of the JSON list: bytes and FLOPs as whole numbers, longest_context null where nothing limits it."""
    return {
        "design": design,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        **workload,
        **asdict(Cost.of(config, **workload)),
        "unshared": asdict(Cost.of(config.with_plan(config.plan.unshared), **workload)),
        "sharing_plan": config.plan.to_dict(),
    }


def _report(name: str, designs: list[tuple[str, ModelConfig]], workload: dict[str, Any]) -> str:
    windowed = any(window for _, config in designs for window in config.plan.windows)
    header = ["design", "KV/token", "past windows", "KV layers", "parameters", "forward", "training"]
    header += ["KV cache", "largest batch", "longest context"]
    rows = [header]
    for design, config in designs:
        rows.append(_row(design, config, workload))
        if not config.plan.is_identity:
            rows.append(_row("  unshared", config.with_plan(config.plan.unshared), workload))
    if not windowed:
        rows = [row[:2] + row[3:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    context, batch, dtype = f"{workload['context']:,}", f"{workload['batch']:,}", workload["cache_dtype"]
    memory = format_bytes(workload["memory"])
    notes = [
        "forward, training: FLOPs per token at that context. KV cache: at that context and batch.",
        f"largest batch at that context, longest context at that batch: {dtype} cache and bf16 weights in {memory}.",
    ]
    if dtype in ("fp8", "int8"):
        notes.append(f"The scales that a kernel keeps next to {dtype} keys and values are not counted.")
    for design, config in designs:
        if config.plan.readers_below_owner:
            passes = f"{PASSES + PASSES_WITH_GRADIENT} passes, of which {PASSES_WITH_GRADIENT} have gradients"
            notes.append(
                f"{design} has a layer that reads one above it: from there to the owner its FLOPs are of {passes}."
            )
    title = f"{name}: context {context} tokens, batch {batch}, {dtype} cache"
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *notes])


def _row(label: str, config: ModelConfig, workload: dict[str, Any]) -> list[str]:
    cost = Cost.of(config, **workload)
    return [
        label,
        format_bytes(cost.kv_bytes_per_token),
        format_bytes(cost.kv_bytes_per_token_past_windows),
        f"{cost.num_kv_layers} of {config.num_hidden_layers}",
        f"{cost.parameters / 1e6:,.1f} M",
        format_flops(cost.forward_flops_per_token),
        format_flops(cost.training_flops_per_token),
        format_bytes(cost.kv_bytes),
        f"{cost.largest_batch:,}",
        "no limit" if cost.longest_context is None else f"{cost.longest_context:,}",
    ]


def _stages(config: ModelConfig, stages: int) -> str:
    try:
        found = pipeline_stages(config.plan, stages)
    except UserError as reason:  # of one design; the next may have such stages
        return str(reason)
    return "pipeline stages of layers " + ", ".join(f"{stage.start}-{stage.stop - 1}" for stage in found)


def _plot(path: Path, designs: list[tuple[str, ModelConfig]], workload: dict[str, Any]) -> None:
    from crosslayer.plan.plot import plot_costs

    figure = plot_costs(designs, **workload)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=160)
    try:
        write_whole(path, drawn.getvalue())
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}") from None
