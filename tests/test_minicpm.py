import json
import pickle
from pathlib import Path

import goldens
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._minicpm import LayerwiseMiniCPM, MiniCPMConfig
from langchain_rerank.errors import ModelLoadError

ALL = (2, 3, 4, 5, 6)


def load(folder, layers=ALL, dtype=torch.float32):
    files = ModelFiles(str(folder))
    config = MiniCPMConfig.from_json(files.read_json("config.json"))
    return LayerwiseMiniCPM.load(files, config, layers, dtype=dtype, device=torch.device("cpu"))


def run(model, batch):
    with torch.inference_mode():
        return model(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)).numpy().T


@pytest.fixture(scope="module")
def model(tiny_minicpm):
    return load(tiny_minicpm)


@pytest.fixture(params=[512, 32])
def golden(request, tiny_minicpm):
    _, ids, logits = goldens.case("minicpm", tiny_minicpm, request.param)
    return ids, logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_layers_logits_equal_flagembeddings_whichever_side_is_padded(model, golden, side):
    ids, expected = golden

    assert run(model, goldens.padded(ids, side, pad=2, width=640)) == pytest.approx(expected, abs=goldens.TOLERANCE)


def test_one_prompt_alone_gives_flagembeddings_logits(model, golden):
    ids, expected = golden
    alone = np.hstack([run(model, goldens.padded([row], "right")) for row in ids])

    assert alone == pytest.approx(expected, abs=goldens.TOLERANCE)


def test_what_stands_in_the_padding_does_not_matter(model, golden):
    ids, _ = golden
    left, right = (run(model, goldens.padded(ids, side, pad=300)) for side in ("left", "right"))

    assert left == pytest.approx(run(model, goldens.padded(ids, "left", pad=2)), abs=1e-6)
    assert right == pytest.approx(run(model, goldens.padded(ids, "right", pad=2)), abs=1e-6)


def test_one_layer_gives_what_it_gives_among_others(tiny_minicpm, model, golden):
    ids, _ = golden
    batch = goldens.padded(ids, "right")

    assert run(load(tiny_minicpm, [3]), batch)[0] == pytest.approx(run(model, batch)[1], abs=1e-6)


def test_bfloat16_gives_nearly_the_same(tiny_minicpm, golden):
    ids, expected = golden
    logits = run(load(tiny_minicpm, dtype=torch.bfloat16), goldens.padded(ids, "right"))

    assert logits.dtype == np.float32
    assert np.abs(logits - expected).mean() < 0.1


def test_layers_above_the_highest_chosen_one_are_neither_read_nor_run(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "low")
    low = load(tiny_minicpm, [2, 3])
    upper = (*(f"model.layers.{layer}." for layer in (3, 4, 5)), *(f"lm_head.{head}." for head in (2, 3, 4)))
    goldens.change_weights(
        folder, lambda weights: {name: value for name, value in weights.items() if not name.startswith(upper)}
    )
    batch = goldens.padded([[1, 300, 301]], "right")

    assert len(low.model.layers) == 3
    assert run(load(folder, [2, 3]), batch) == pytest.approx(run(low, batch))
    with pytest.raises(ModelLoadError, match=r"lacks 10 of .* weights"):
        load(folder, [4])


def test_a_sharded_checkpoint_loads_and_only_the_shards_that_are_needed(tiny_minicpm, tmp_path, model):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    upper = {name for name in weights if name.startswith(("model.layers.4.", "model.layers.5.", "lm_head.4."))}
    shards = {"model-1-of-2.safetensors": weights.keys() - upper, "model-2-of-2.safetensors": upper}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, folder / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    batch = goldens.padded([[1, 300, 301]], "right")

    assert run(load(folder), batch) == pytest.approx(run(model, batch))
    (folder / "model-2-of-2.safetensors").unlink()
    assert run(load(folder, [4]), batch)[0] == pytest.approx(run(model, batch)[2])
    with pytest.raises(ModelLoadError, match="has no whole checkpoint"):
        load(folder, [6])


def test_a_pickled_checkpoint_loads_as_tensors_only(tiny_minicpm, tmp_path, model):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "pickled")
    weights = {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    batch = goldens.padded([[1, 300, 301]], "right")

    assert run(load(folder), batch) == pytest.approx(run(model, batch))


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_that_holds_code_is_refused_and_not_run(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "trap")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")

    with pytest.raises(ModelLoadError, match="convert it to safetensors") as refused:
        load(folder)
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "sprung").exists()


def test_half_a_download_is_refused(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "half")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(ModelLoadError, match=r"is no whole safetensors file .* download it again"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "wide", intermediate_size=128)

    with pytest.raises(
        ModelLoadError, match=r"mlp.gate_proj.weight has shape \(64, 32\), config.json says \(128, 32\)"
    ):
        load(folder)


def test_a_folder_without_weights_is_refused(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "empty")
    (folder / "model.safetensors").unlink()

    with pytest.raises(ModelLoadError, match="has no whole checkpoint: looked for model"):
        load(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_type": "complex"}, "head_type='complex' is not supported, only 'simple'"),
        ({"head_multi": False}, "head_multi=False is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported, only None"),
        ({"scale_emb": None}, "incomplete: .*scale_emb"),
        ({"num_attention_heads": None}, "incomplete: .*num_attention_heads"),
    ],
)
def test_another_variant_of_the_architecture_is_refused(tiny_minicpm, changed, message):
    config = json.loads(Path(tiny_minicpm, "config.json").read_text())

    with pytest.raises(ModelLoadError, match=message):
        MiniCPMConfig.from_json(config | changed)


@pytest.mark.parametrize("layers", [[1], [7], [2, 28]])
def test_a_layer_without_a_head_is_refused(tiny_minicpm, layers):
    config = MiniCPMConfig.from_json(json.loads(Path(tiny_minicpm, "config.json").read_text()))

    with pytest.raises(ModelLoadError, match="choose from 2 to 6"):
        config.check_layers(layers)


def test_as_many_key_heads_as_query_heads_is_what_a_config_without_a_number_means(tiny_minicpm):
    config = json.loads(Path(tiny_minicpm, "config.json").read_text())
    del config["num_key_value_heads"]

    assert MiniCPMConfig.from_json(config).num_key_value_heads == 4
