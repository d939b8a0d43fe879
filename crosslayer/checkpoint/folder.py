"""Model folders in Hugging Face form: config.json, safetensors, tokenizer.json. No pickle is ever opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosslayer.checkpoint.files import CHECKSUMS, CONFIG, check_folder, new_folder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.model import Transformer
from crosslayer.plan import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class SavesToFolder(Protocol):
    """A tokenizer, as far as this room knows one."""

    def save(self, folder: Path, /) -> None: ...


def save(
    model: Transformer, folder: str | Path, *, tokenizer: SavesToFolder | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a model folder, replacing an earlier one in one step if it holds nothing else.

    An unshared model of a shape that Llama, Mistral, Qwen2 or Qwen3 can express is written as that model. Weights are
    stored as `dtype`, or as they are. A `tokenizer` puts its own files beside them.

    Raises:
        UserError: `folder` exists and holds something else than a model that was saved, or cannot be written.
    """
    state = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    stored_dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    with new_folder(Path(folder)) as scratch:
        write_json(scratch / CONFIG, {**model.config.to_dict(), "dtype": stored_dtype})
        shards = _split(state)
        if len(shards) == 1:
            save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        else:
            places: dict[str, str] = {}
            for number, shard in enumerate(shards, start=1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                save_file(shard, scratch / name, metadata={"format": "pt"})
                places |= dict.fromkeys(shard, name)
            size = sum(tensor.nbytes for tensor in state.values())
            write_json(scratch / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        if tokenizer is not None:
            tokenizer.save(scratch)


def load(folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Read a model folder: ours, or a Llama, Mistral, Qwen2 or Qwen3 checkpoint. Weights keep their stored dtype
    unless `dtype` is given.

    Raises:
        UserError: the folder is incomplete, damaged, holds only pickled weights, or its tensors are not those that
            its config calls for; the message names the file or the tensor.
    """
    folder = Path(folder)
    config = ModelConfig.from_json_file(folder)
    try:
        check_folder(folder)
    except UserError as error:
        raise UserError(f"{error}; to keep a change of your own, remove {CHECKSUMS}") from None
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        for name, tensor in _read(file):
            if (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
                continue  # some checkpoints store these although they follow from the rest
            if name not in wanted:
                raise UserError(f"{file}: tensor {name} has no place in this model{_reason(config, name)}")
            if tensor.shape != wanted[name]:
                raise UserError(
                    f"{file}: tensor {name} has shape {list(tensor.shape)}, but config.json calls for "
                    f"{list(wanted[name])}"
                )
            state[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _split(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{folder / INDEX}: weight_map is missing or is not a map to file names")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX}: want the names of .safetensors files in the folder, got {name!r}")
    else:
        names = [WEIGHTS]
    files = [folder / name for name in names]
    for file in files:
        if not file.exists():
            pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
            hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
            raise UserError(f"{file}: no such file{hint}")
    return files


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None


def _reason(config: ModelConfig, name: str) -> str:
    """Say so where a tensor is the K or V projection of a layer that reads another layer's."""
    parts = name.split(".")
    if name.startswith("model.layers.") and parts[2].isdecimal() and int(parts[2]) < config.num_hidden_layers:
        layer = int(parts[2])
        for kind, sources in (("k", config.plan.key_sources), ("v", config.plan.value_sources)):
            if f"{kind}_proj" in parts and sources[layer] != layer:
                return f": layer {layer} reads layer {sources[layer]}"
    return ""
