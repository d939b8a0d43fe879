"""Model folders: what is saved loads again, whole or not at all, and anything broken is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import crosslayer
from crosslayer.checkpoint import files, folder
from crosslayer.errors import UserError
from crosslayer.model import Transformer
from tests.conftest import CACHEABLE, tiny_config
from tests.limits import file_size_limit
from tests.model.checks import random_model, random_tokens

WEIGHTS = "model.safetensors"


def same_weights(first: Transformer, second: Transformer) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved cla2 model."""
    crosslayer.save(random_model(tiny_config()), tmp_path / "model")
    return tmp_path / "model"


def drop_checksums(model: Path) -> None:
    """Make the folder look like one of somebody else's."""
    (model / files.CHECKSUMS).unlink()


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    drop_checksums(model)
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)


def change_config(model: Path, **changes: Any) -> None:
    drop_checksums(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


# -- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", CACHEABLE)
def test_round_trip(plan: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(plan, attention_bias=True, qk_norm=True))
    crosslayer.save(model, tmp_path / "model")
    again = crosslayer.load(tmp_path / "model")
    assert again.config == model.config
    assert same_weights(model, again)
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in again.parameters())
    stored = set(load_file(tmp_path / "model" / WEIGHTS))
    assert stored == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(tiny_config()).to(dtype)
    crosslayer.save(model, tmp_path / "kept")
    assert same_weights(crosslayer.load(tmp_path / "kept"), model)
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert same_weights(crosslayer.load(tmp_path / "kept", dtype=torch.float32), model.float())


def test_dtype_can_be_chosen_when_saving(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    crosslayer.save(model, tmp_path / "model", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    assert same_weights(crosslayer.load(tmp_path / "model"), model.bfloat16())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    crosslayer.save(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / WEIGHTS)
    again = crosslayer.load(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same_weights(model, again)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("identity"))
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    crosslayer.save(model, tmp_path / "model")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    contents = [load_file(tmp_path / "model" / shard) for shard in shards]
    assert all(sum(t.nbytes for t in content.values()) <= 20_000 for content in contents)
    assert same_weights(crosslayer.load(tmp_path / "model"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "model" / shards[1]).unlink()
    with pytest.raises(UserError, match=f"{shards[1]}: missing, though checksums.json lists it"):
        crosslayer.load(tmp_path / "model")
    drop_checksums(tmp_path / "model")
    with pytest.raises(UserError, match=f"{shards[1]}: no such file"):
        crosslayer.load(tmp_path / "model")


def test_saving_again_leaves_nothing_of_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folder, "SHARD_BYTES", 20_000)
        crosslayer.save(random_model(tiny_config()), tmp_path / "model")
    crosslayer.save(random_model(tiny_config("cla3")), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [files.CHECKSUMS, "config.json", WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert crosslayer.load(tmp_path / "model").config.plan == tiny_config("cla3").plan


class Words:
    """A tokenizer, as far as save is concerned."""

    def save(self, target: Path) -> None:
        (target / "tokenizer.json").write_text('{"model": {}}')


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    crosslayer.save(random_model(tiny_config()), tmp_path / "model", tokenizer=Words())
    assert (tmp_path / "model" / "tokenizer.json").read_text() == '{"model": {}}'
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged or changed"):
        crosslayer.load(tmp_path / "model")


def test_what_others_store_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    model = random_model(tiny_config("identity", tie_word_embeddings=True))
    crosslayer.save(model, tmp_path / "model")
    extras = {"lm_head.weight": torch.zeros(61, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    change_weights(tmp_path / "model", lambda tensors: tensors.update(extras))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"never opened")
    assert same_weights(crosslayer.load(tmp_path / "model"), model)


# -- all or nothing -----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, like KeyboardInterrupt: nothing may swallow it."""


def crash(*_: object, **__: object) -> None:
    raise Crash


def half_a_file(tensors: dict[str, Tensor], path: Path, metadata: object = None) -> None:
    path.write_bytes(b"half of it")
    raise Crash


def crash_at_second_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = Path.rename, []

    def counted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise Crash
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)


CRASHES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "before the config": lambda m: m.setattr(folder, "write_json", crash),
    "in the weights": lambda m: m.setattr(folder, "save_file", half_a_file),
    "in the tokenizer": lambda m: m.setattr(Words, "save", crash),
    "in the checksums": lambda m: m.setattr(files, "sha256", crash),
    "in flushing": lambda m: m.setattr(os, "fsync", crash),
    "in renaming the old": lambda m: m.setattr(Path, "rename", crash),
    "in renaming the new": crash_at_second_rename,
}


@pytest.mark.parametrize("moment", CRASHES)
def test_crash_leaves_the_former_model(moment: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        CRASHES[moment](patch)
        with pytest.raises(Crash):
            crosslayer.save(random_model(tiny_config("cla3")), saved, tokenizer=Words())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    crosslayer.load(saved)


@pytest.mark.parametrize("moment", [moment for moment in CRASHES if moment != "in renaming the new"])
def test_crash_leaves_nothing_where_nothing_was(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CRASHES[moment](monkeypatch)
    with pytest.raises(Crash):
        crosslayer.save(random_model(tiny_config()), tmp_path / "model", tokenizer=Words())
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_former_model(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    message = rf"{saved} cannot be written: .*File too large"
    for limit in (10, len(before[WEIGHTS]) // 2):
        with file_size_limit(limit), pytest.raises(UserError, match=message):
            crosslayer.save(random_model(tiny_config("cla3")), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_folder_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    model = random_model(tiny_config())
    for target in (precious, tmp_path / "file"):
        with pytest.raises(UserError, match=rf"{target.name}: exists and is not a folder with a config\.json"):
            crosslayer.save(model, target)
    assert (precious / "chapter1.tex").exists()
    (precious / "chapter1.tex").unlink()
    crosslayer.save(model, precious)  # empty by now
    crosslayer.save(model, tmp_path / "in" / "a" / "new" / "place")
    assert same_weights(crosslayer.load(str(tmp_path / "in" / "a" / "new" / "place")), model)


@pytest.mark.parametrize("beside", ["chapter1.tex", "checkpoints", ".git"])
def test_a_folder_in_which_more_than_a_model_stands_is_not_replaced(beside: str, saved: Path) -> None:
    """The folder of a training run, or a project of somebody else's, has a config.json too."""
    (saved / beside).mkdir()
    (saved / beside / "precious").write_text("...")
    before = sorted(path.name for path in saved.iterdir())
    model = random_model(tiny_config("cla3"))
    with pytest.raises(UserError, match=rf"{saved}: exists, and {beside} in it was not saved with a model"):
        crosslayer.save(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == before
    shutil.rmtree(saved / beside)
    crosslayer.save(model, saved)
    assert same_weights(crosslayer.load(saved), model)


def test_a_model_of_somebody_else_is_not_replaced(saved: Path) -> None:
    drop_checksums(saved)
    with pytest.raises(UserError, match=rf"{saved}: exists, and {WEIGHTS} in it was not saved with a model"):
        crosslayer.save(random_model(tiny_config()), saved)
    crosslayer.load(saved)


def test_a_link_goes_on_to_show_where_it_did(saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved)
    model = random_model(tiny_config("cla3"))
    crosslayer.save(model, link)
    assert link.is_symlink()
    assert same_weights(crosslayer.load(saved), model)


# -- refusals -----------------------------------------------------------------------------------------------------


def refused(model: Path, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        crosslayer.load(model)
    assert "\n" not in str(caught.value)


def test_truncated_file(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        (saved / WEIGHTS).write_bytes(content[:length])
        refused(saved, f"{saved / WEIGHTS}: damaged or changed since it was saved")
    drop_checksums(saved)
    for length in (0, 5, 200, len(content) - 1):
        (saved / WEIGHTS).write_bytes(content[:length])
        refused(saved, f"{saved / WEIGHTS}: not a readable safetensors file")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_flipped_bit(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    place = content.index(b'"vocab_size": 61') + 14 if name == "config.json" else len(content) - 7
    content[place] ^= 1  # 61 becomes 71: still JSON
    (saved / name).write_bytes(content)
    refused(saved, f"{saved / name}: damaged or changed since it was saved")


def test_a_change_of_the_users_own_is_accepted_without_checksums(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    refused(saved, "to keep a change of your own, remove checksums.json")
    drop_checksums(saved)
    assert crosslayer.load(saved).config.max_position_embeddings == 77


def test_wrong_shape(saved: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    change_weights(saved, lambda tensors: tensors.update({name: torch.zeros(10, 32)}))
    refused(saved, f"{saved / WEIGHTS}: tensor {name} has shape [10, 32], but config.json calls for [20, 32]")


def test_missing_tensors(saved: Path) -> None:
    change_weights(saved, lambda tensors: [tensors.pop(f"model.layers.{i}.kv_layernorm.weight") for i in (0, 4)])
    refused(saved, f"{saved}: 2 tensors are missing, the first is model.layers.0.kv_layernorm.weight")


@pytest.mark.parametrize("kind", ["k", "v"])
def test_stray_projection_of_a_reader(saved: Path, kind: str) -> None:
    name = f"model.layers.3.self_attn.{kind}_proj.weight"
    change_weights(saved, lambda tensors: tensors.update({name: torch.zeros(20, 32)}))
    refused(saved, f"{saved / WEIGHTS}: tensor {name} has no place in this model: layer 3 reads layer 2")


def test_unknown_tensor(saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors.update({"model.layers.6.mlp.up_proj.weight": torch.zeros(48, 32)}))
    refused(saved, "tensor model.layers.6.mlp.up_proj.weight has no place in this model")


class Bomb:
    """Unpickling this fails the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "model.pkl"])
def test_pickles_are_never_opened(saved: Path, name: str) -> None:
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    drop_checksums(saved)
    refused(saved, f"{saved / WEIGHTS}: no such file; {name} is a pickle, which is never loaded")


def test_pickle_under_the_name_of_safetensors(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    drop_checksums(saved)
    refused(saved, f"{saved / WEIGHTS}: not a readable safetensors file")


@pytest.mark.parametrize("text", ["{", "", "[1]", "\x00\xff"])
def test_config_that_is_not_json(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    refused(saved, f"{saved / 'config.json'}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: llama,"),
        ({"sharing_plan": {"key_sources": [0, 0, 1, 1, 4, 4]}}, "layer 2 reads the keys of layer 1, but layer 1 owns"),
        (
            {"sharing_plan": {"key_sources": [1, 1, 2, 3, 4, 5], "windows": [4, None, None, None, None, None]}},
            "layer 0 reads a layer above it, and cannot have a window besides",
        ),
        ({"num_hidden_layers": 5}, "the sharing plan has 6 layers but num_hidden_layers is 5"),
    ],
)
def test_config_of_another_model(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    refused(saved, message)


def test_folder_without_a_config(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").unlink()
    refused(saved, f"{saved / 'config.json'}: no such file")
    refused(tmp_path / "nowhere", "nowhere: no such file; a model folder has a config.json")


@pytest.mark.parametrize("escape", ["../outside.safetensors", "sub/inside.safetensors", "{absolute}", "..", ""])
def test_index_that_points_outside_the_folder(saved: Path, escape: str) -> None:
    outside = saved.parent / "outside.safetensors"
    (saved / "sub").mkdir()
    for place in (outside, saved / "sub" / "inside.safetensors"):
        shutil.copyfile(saved / WEIGHTS, place)
    names = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    drop_checksums(saved)
    target = escape.format(absolute=outside)
    (saved / folder.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))
    refused(saved, f"{folder.INDEX}: want the names of .safetensors files in the folder, got {target!r}")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"model.norm.weight": 3}}])
def test_index_without_a_map(saved: Path, index: Any) -> None:
    drop_checksums(saved)
    (saved / folder.INDEX).write_text(json.dumps(index))
    refused(saved, f"{saved / folder.INDEX}: weight_map is missing or is not a map to file names")


def test_weights_that_are_links_load(saved: Path) -> None:
    """Download caches keep the files elsewhere and link to them."""
    expected = crosslayer.load(saved)
    shutil.move(saved / WEIGHTS, saved.parent / "blob")
    (saved / WEIGHTS).symlink_to("../blob")
    assert same_weights(crosslayer.load(saved), expected)


def test_loaded_model_computes_the_same(saved: Path) -> None:
    model = crosslayer.load(saved)
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(model(tokens), random_model(tiny_config())(tokens))
