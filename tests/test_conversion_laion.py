"""LAION-CLAP files into ClapModel: names, shapes, refusals. The numbers against the original code: see ..._parity."""

from __future__ import annotations

import json
import os

import pytest
import torch
from laion_names import BASE, ROBERTA, SMALL, SMALL_ROBERTA, TINY, laion_state_dict
from torch.nn import functional
from transformers import ClapFeatureExtractor, ClapModel, RobertaConfig, RobertaModel

from recap_cli import main
from recap_hf.conversion import ConversionError, convert_laion_clap, convert_laion_clap_state_dict

UNUSED_PARTS = ("_extractor.", "tscam_conv", ".head.", "_transform.", ".attn_mask")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return laion_state_dict(SMALL, SMALL_ROBERTA, joint=24)


def save(state: dict, path, **extra) -> str:
    torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}, **extra}, path)
    return str(path)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize(("size", "width", "depths"), [(TINY, 768, [2, 2, 6, 2]), (BASE, 1024, [2, 2, 12, 2])])
def test_full_sizes_keep_every_parameter(size, width, depths, fusion):
    state = laion_state_dict(size, ROBERTA, fusion=fusion, device="meta")
    result = convert_laion_clap_state_dict(state)
    audio, text = result.config.audio_config, result.config.text_config
    assert (audio.hidden_size, list(audio.depths), audio.spec_size, audio.window_size) == (width, depths, 256, 8)
    assert list(audio.num_attention_heads) == [4, 8, 16, 32]
    assert (audio.enable_fusion, audio.fusion_type) == (fusion, "aff_2d" if fusion else None)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (768, 12, 12)
    assert text.layer_norm_eps == 1e-5
    used = sum(v.numel() for k, v in state.items() if v.is_floating_point() and not any(p in k for p in UNUSED_PARTS))
    assert sum(v.numel() for v in result.state_dict.values() if v.is_floating_point()) == used
    assert set(result.unused) == {key for key in state if any(part in key for part in UNUSED_PARTS)}
    # Parameters proper, BatchNorm statistics aside: the published size of laion/clap-htsat-unfused.
    if size is TINY and not fusion:
        statistics = sum(v.numel() for k, v in state.items() if "running_" in k)
        assert used - statistics == 153_492_890


def test_tensors_land_where_they_belong(state):
    result = convert_laion_clap_state_dict(state).state_dict
    block = "audio_model.audio_encoder.layers.1.blocks.1"
    qkv = state["audio_branch.layers.1.blocks.1.attn.qkv.weight"]
    for index, name in enumerate(("query", "key", "value")):
        assert torch.equal(result[f"{block}.attention.self.{name}.weight"], qkv[32 * index : 32 * (index + 1)])
    pairs = {
        f"{block}.layernorm_before.weight": "audio_branch.layers.1.blocks.1.norm1.weight",
        f"{block}.layernorm_after.bias": "audio_branch.layers.1.blocks.1.norm2.bias",
        f"{block}.intermediate.dense.weight": "audio_branch.layers.1.blocks.1.mlp.fc1.weight",
        f"{block}.output.dense.weight": "audio_branch.layers.1.blocks.1.mlp.fc2.weight",
        f"{block}.attention.output.dense.bias": "audio_branch.layers.1.blocks.1.attn.proj.bias",
        "audio_model.audio_encoder.batch_norm.running_mean": "audio_branch.bn0.running_mean",
        "audio_model.audio_encoder.norm.weight": "audio_branch.norm.weight",
        "audio_projection.linear2.weight": "audio_projection.2.weight",
        "text_projection.linear1.bias": "text_projection.0.bias",
        "text_model.pooler.dense.weight": "text_branch.pooler.dense.weight",
        "logit_scale_t": "logit_scale_t",
    }
    for target, source in pairs.items():
        assert torch.equal(result[target], state[source]), target


def test_command_writes_a_folder_that_clap_loads(state, tmp_path, capsys):
    out = tmp_path / "clap"
    assert main(["convert", "laion-clap", save(state, tmp_path / "c.pt"), str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    model, info = ClapModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Text embeddings as LAION's code computes them: RoBERTa and a projection, from the tensors of the file.
    ids = torch.randint(3, SMALL_ROBERTA["vocabulary"], (1, 12), generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": "vocabulary", "hidden_size": "hidden", "intermediate_size": "inner"}
    sizes |= {"num_hidden_layers": "layers", "max_position_embeddings": "positions"}
    sizes = {name: SMALL_ROBERTA[key] for name, key in sizes.items()}
    config = RobertaConfig(**sizes, num_attention_heads=1, type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = RobertaModel(config).eval()
    roberta.load_state_dict({name: state[f"text_branch.{name}"] for name in roberta.state_dict()})
    with torch.inference_mode():
        hidden = roberta(input_ids=ids).pooler_output
        for layer in (0, 2):
            weight, bias = (state[f"text_projection.{layer}.{kind}"] for kind in ("weight", "bias"))
            hidden = functional.linear(hidden.relu() if layer else hidden, weight, bias)
        actual = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    torch.testing.assert_close(actual, hidden, rtol=1e-5, atol=1e-6)
    extractor = ClapFeatureExtractor.from_pretrained(out)
    assert (extractor.truncation, extractor.frequency_min, extractor.frequency_max) == ("rand_trunc", 50, 14_000)
    assert os.listdir(tmp_path).count("clap") == 1 and len(os.listdir(tmp_path)) == 2


def test_fused_checkpoint_gets_the_fused_extractor(tmp_path):
    state = laion_state_dict(SMALL, SMALL_ROBERTA, fusion=True, joint=24)
    report = convert_laion_clap(save(state, tmp_path / "c.pt"), tmp_path / "out")
    assert report["fusion"] is True
    assert ClapFeatureExtractor.from_pretrained(tmp_path / "out").truncation == "fusion"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_survives(state, dtype, tmp_path):
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    report = convert_laion_clap(save(low, tmp_path / "c.pt"), tmp_path / "out")
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    model = ClapModel.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.equal(model.text_projection.linear2.weight, low["text_projection.2.weight"])


def test_buffers_may_be_absent_but_not_different(state):
    without = {k: v for k, v in state.items() if not k.endswith(("position_ids", "relative_position_index"))}
    complete = convert_laion_clap_state_dict(state).state_dict
    assert convert_laion_clap_state_dict(without).state_dict.keys() == complete.keys()
    key = "audio_branch.layers.0.blocks.0.attn.relative_position_index"
    with pytest.raises(ConversionError, match="relative_position_index differs"):
        convert_laion_clap_state_dict({**state, key: state[key].flip(0)})


def test_missing_extra_and_misshapen_keys_are_all_named(state):
    broken = dict(state)
    del broken["audio_branch.layers.2.blocks.0.mlp.fc1.weight"]
    broken["audio_branch.surprise"] = torch.zeros(3)
    broken["text_branch.encoder.layer.0.output.dense.extra"] = torch.zeros(3)
    broken["text_projection.2.weight"] = torch.zeros(24, 23)
    with pytest.raises(ConversionError) as caught:
        convert_laion_clap_state_dict(broken)
    message = str(caught.value)
    assert "layers.2.blocks.0.intermediate.dense.weight" in message.split("unknown")[0]
    assert "audio_branch.surprise" in message and "text_branch.encoder.layer.0.output.dense.extra" in message
    assert "text_projection.linear2.weight: (24, 23), expected (24, 24)" in message


def test_key_that_carries_a_size_is_asked_for_by_name(state):
    without = {k: v for k, v in state.items() if k != "audio_branch.bn0.weight"}
    with pytest.raises(ConversionError, match=r"missing:\n  audio_branch\.bn0\.weight"):
        convert_laion_clap_state_dict(without)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("audio_branch.conv_block1.conv1.weight", "PANN"),
        ("text_branch.resblocks.0.ln_1.weight", "CLIP"),
        ("text_branch.shared.weight", "BART"),
        ("audio_branch.patch_embed.fusion_model.local_att2.0.weight", "iaff_2d"),
        ("audio_branch.mel_conv1d.0.weight", "one dimension"),
    ],
)
def test_other_architectures_are_refused_by_name(state, key, said):
    with pytest.raises(ConversionError, match=said):
        convert_laion_clap_state_dict({**state, key: torch.zeros(1)})


def test_bert_text_branch_is_refused(state):
    key = "text_branch.embeddings.token_type_embeddings.weight"
    with pytest.raises(ConversionError, match="2 token types, so it is BERT"):
        convert_laion_clap_state_dict({**state, key: torch.zeros(2, 64)})


def test_mel_filters_of_another_range_are_refused(state):
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14_000)
    key = "audio_branch.logmel_extractor.melW"
    right = {**state, key: torch.from_numpy(extractor.mel_filters_slaney).float()}
    assert key in convert_laion_clap_state_dict(right).unused
    other = ClapFeatureExtractor(frequency_min=0, frequency_max=8_000).mel_filters_slaney
    with pytest.raises(ConversionError, match="mel filter bank"):
        convert_laion_clap_state_dict({**state, key: torch.from_numpy(other).float()})


class Payload:
    """Runs a command when unpickled carelessly."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(state, tmp_path, capsys):
    trap = tmp_path / "ran"
    path = save(state, tmp_path / "evil.pt", optimizer=Payload(str(trap)))
    assert main(["convert", "laion-clap", path, str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "refused and nothing in it was run" in message and "mkdir" in message
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_metrics_of_a_training_script_are_no_code(state, tmp_path):
    import numpy as np

    path = save(state, tmp_path / "c.pt", best=np.float64(0.5), step=np.int64(3))
    assert convert_laion_clap(path, tmp_path / "out")["parameters"] > 0


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_broken_files_are_named(content, tmp_path, capsys):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    assert main(["convert", "laion-clap", str(path), str(tmp_path / "out")]) == 1
    assert "broken.pt" in capsys.readouterr().err


def test_newer_pickle_protocol_is_explained(state, tmp_path):
    torch.save(dict(state), tmp_path / "c.pt", pickle_protocol=4)
    with pytest.warns(UserWarning, match="protocol"), pytest.raises(ConversionError, match="default protocol"):
        convert_laion_clap(tmp_path / "c.pt", tmp_path / "out")


def test_existing_folder_is_kept_unless_told(state, tmp_path):
    path = save(state, tmp_path / "c.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert_laion_clap(path, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    with pytest.raises(FileExistsError, match=r"mine\.txt is not a file of a conversion"):
        convert_laion_clap(path, tmp_path / "out", overwrite=True)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").rename(tmp_path / "out" / "vocab.txt")
    convert_laion_clap(path, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "vocab.txt").exists() and (tmp_path / "out" / "config.json").exists()
    # What it wrote itself it replaces.
    convert_laion_clap(path, tmp_path / "out", overwrite=True)
