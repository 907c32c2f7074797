"""Speed against peers: every contender gives the same feature, every number is there; no test asserts a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from aselect_cli import app
from aselect_hf.conversion import save_model
from aselect_hf.cost import count_flops, feature_flops
from aselect_hf.speed import CUT, DIFFUSERS, FIXED, OURS, VIT, Benchmark, benchmark_model
from aselect_hf.speed.measure import peak_memory
from benchmarks import throughput

RUN: dict[str, Any] = {"rounds": 3, "progress": False}
FLOW = {"type": "flow_matching", "prediction_type": "velocity", "model_time": "data_fraction"}


@pytest.fixture
def wide(make_model: Any) -> Any:
    """`wide(**overrides)`: a tiny model that diffusers has, too."""
    return lambda **overrides: make_model(**({"mlp_ratio": 4, "num_hidden_layers": 4} | overrides))


@pytest.fixture
def with_vae(wide: Any, tiny_kl: Any) -> Any:
    config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
    model = wide(vae_config={name: x for name, x in config.items() if x is not None}, num_channels=4)
    model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_freq_shift": 1, "num_noise_draws": 3},
        {"per_block_conditioning": True, "num_condition_classes": 0, "attention_bias": False},
    ],
)
@pytest.mark.parametrize("feature", [None, "blocks.2.query", "blocks.-1.value", "blocks.0.key"])
def test_all_contenders_give_the_same_feature(wide: Any, options: dict[str, Any], feature: str | None) -> None:
    result = benchmark_model(wide(**options), feature=feature, batch_sizes=[1, 3], **RUN)
    assert [(row.batch_size, row.contender) for row in result.rows] == [
        (batch_size, name) for batch_size in (1, 3) for name in (DIFFUSERS, CUT, OURS, FIXED, VIT)
    ]
    assert {row.feature for row in result.rows} == {feature.replace("-1", "3") if feature else "blocks.1.hidden"}
    for row in result.rows:
        if row.contender == VIT:
            assert row.max_difference is None
        else:
            assert row.max_difference < 1e-4
        ratios = row.over_diffusers + row.over_limit
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in (*ratios, row.images_per_second))
        for middle, least, greatest in (row.over_diffusers, row.over_limit):
            assert 0 < least <= greatest
            assert middle == 1 or row.contender not in (DIFFUSERS, VIT) or least < greatest


def test_a_wrong_feature_is_not_measured(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    fix_timestep = type(model).fix_timestep

    def broken(self: Any, *arguments: Any) -> Any:
        fixed = fix_timestep(self, *arguments)
        fixed.layers[0].mlp.fc2.weight.data.mul_(1.1)
        return fixed

    monkeypatch.setattr(type(model), "fix_timestep", broken)
    with pytest.raises(ValueError, match="ours, fixed timestep and diffusers, whole network compute different"):
        benchmark_model(model, batch_sizes=[1], **RUN)


def test_sizes_flops_and_memory_are_those_of_the_checkpoint(wide: Any, tmp_path: Path) -> None:
    model = wide(hidden_size=96)
    rows = {row.contender: row for row in benchmark_model(model, batch_sizes=[2], **RUN).rows}
    assert rows[OURS].parameters == model.num_parameters()
    for name, contender in ((OURS, model), (FIXED, model.fix_timestep(feature="blocks.1.hidden"))):
        save_model(contender, tmp_path / name)
        saved = (tmp_path / name / "model.safetensors").stat().st_size
        assert 0 <= saved - rows[name].file_bytes < 20_000, "the header only"
    assert rows[FIXED].parameters < rows[OURS].parameters < rows[DIFFUSERS].parameters
    assert abs(rows[OURS].flops_per_image / feature_flops(model, "blocks.1.hidden") - 1) < 1e-6
    tokens, width, blocks = 16, 96, 2
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert rows[VIT].flops_per_image == rows[FIXED].flops_per_image == blocks * block + 2 * tokens * width * 8
    assert rows[DIFFUSERS].flops_per_image > 2 * rows[FIXED].flops_per_image
    assert rows[CUT].flops_per_image < 0.6 * rows[DIFFUSERS].flops_per_image
    if sys.platform == "linux":
        assert all(row.peak_memory_bytes >= row.file_bytes for row in rows.values())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_what_a_run_takes_at_most() -> None:
    def run() -> int:
        first = torch.ones(20_000_000)
        del first
        second = torch.ones(10_000_000)
        return len(second)

    result, peak = peak_memory(run, torch.device("cpu"))
    assert result == 10_000_000
    assert 78e6 < peak < 100e6


def test_flops_of_attention_are_counted() -> None:
    query = torch.ones(1, 2, 8, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(query, query, query)) == 2 * 2 * 2 * 8 * 8 * 4


def test_pixels_go_through_several_autoencoders(with_vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = with_vae.vae.dtype
    result = benchmark_model(with_vae, batch_sizes=[1], **RUN)
    rows = {row.contender: row for row in result.rows if row.input == "pixels"}
    precise, fast = f"{FIXED}, VAE float32", f"{FIXED}, VAE bfloat16 channels-last"
    assert list(rows) == [f"{DIFFUSERS}, VAE float32", precise, fast]
    assert rows[precise].max_difference < 1e-4 < rows[fast].max_difference
    assert all(row.over_limit is None and row.over_diffusers[0] > 0 for row in rows.values())
    assert with_vae.vae.dtype == dtype
    assert not [
        row for row in benchmark_model(with_vae, batch_sizes=[1], pixels=False, **RUN).rows if row.input != "latents"
    ]


def test_a_vae_of_eight_pixels_is_measured_against_a_tiny_one(wide: Any) -> None:
    kl = throughput.SD_VAE | {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
    rows = benchmark_model(wide(vae_config=kl, num_channels=4, sample_size=4), batch_sizes=[1], **RUN).rows
    last = rows[-1]
    assert (last.contender, last.max_difference) == (f"{FIXED}, AutoencoderTiny (random weights)", None)
    encoder = AutoencoderTiny().encoder
    assert last.parameters == rows[3].parameters + sum(x.numel() for x in encoder.parameters())


def test_bfloat16_is_measured_in_bfloat16(wide: Any) -> None:
    rows = benchmark_model(wide(hidden_size=96).to(torch.bfloat16), batch_sizes=[2], **RUN).rows
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert all(row.file_bytes < 2.1 * row.parameters + 1000 for row in rows)
    assert 0 < rows[3].max_difference < 0.5


def test_a_fixed_model_is_compared_with_the_limit_only(wide: Any) -> None:
    fixed = wide().fix_timestep(feature=["blocks.1.attention", "blocks.2.query"])
    result = benchmark_model(fixed, batch_sizes=[1], **RUN)
    assert [row.contender for row in result.rows] == [FIXED, VIT]
    assert result.rows[0].feature == "blocks.1.attention"
    assert result.rows[0].over_diffusers is None
    assert "this model is fixed to timestep 100" in result.skipped[0]["reason"]
    with pytest.raises(ValueError, match=r"feature 'blocks.0.hidden' is not possible: this model is fixed"):
        benchmark_model(fixed, feature="blocks.0.hidden", **RUN)


def test_a_network_that_diffusers_lacks_is_compared_without(wide: Any) -> None:
    result = benchmark_model(wide(noise_schedule=FLOW), batch_sizes=[1], **RUN)
    assert [row.contender for row in result.rows] == [OURS, FIXED, VIT]
    assert "does not support flow matching" in result.skipped[0]["reason"]


def test_what_takes_too_long_is_skipped_with_the_reason(wide: Any) -> None:
    result = benchmark_model(wide(), batch_sizes=[4, 1, 100_000], max_seconds=2, **RUN)
    assert [row.batch_size for row in result.rows] == [1] * 5 + [4] * 5
    (skip,) = result.skipped
    assert (skip["batch_size"], skip["input"]) == (100_000, "latents")
    assert "do not fit in 2 s" in skip["reason"]
    assert f"- Skipped: model model, feature blocks.1.hidden, {skip['reason']}"[:20] in result.markdown()
    assert skip["reason"] in result.markdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes must be positive"),
        ({"batch_sizes": [1, -1]}, "batch_sizes must be positive"),
        ({"rounds": 2}, "rounds must be at least 3"),
        ({"max_seconds": 0}, "max_seconds must be positive"),
        ({"max_seconds": float("nan")}, "max_seconds must be positive"),
        ({"feature": "blocks.0.mlp"}, "a hook can read"),
        ({"feature": "blocks.9.hidden"}, "there is no block 9"),
    ],
)
def test_bad_input_is_one_clear_error(wide: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark_model(wide(), **options)


def test_the_command_writes_json_and_table(
    wide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, output = wide(), tmp_path / "new" / "results.json"
    save_model(model, tmp_path / "model")
    arguments = ["--batch_sizes", "1,2", "--rounds", "3", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["aselect", "benchmark", str(tmp_path / "model"), *arguments])
    with pytest.raises(SystemExit, match=r"^0$"):
        app.main()
    table = output.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert set(content) == {"protocol", "rows", "skipped"}
    assert set(content["protocol"]) >= {"hardware", "threads", "rounds", "versions"}
    assert len(content["rows"]) == 10
    for row in content["rows"]:
        assert (row["input"], row["dtype"], len(row["seconds"])) == ("latents", "float32", 3)
        assert row["images_per_second"] == row["batch_size"] / row["median"]
        assert row["flops_per_second"] == row["flops_per_image"] * row["images_per_second"]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 12
    assert len({line.count("|") for line in lines}) == 1
    assert f"{model.num_parameters() / 1e6:.1f} M" in lines[4]


def test_an_empty_benchmark_has_a_table(tmp_path: Path) -> None:
    protocol = {"hardware": "none", "versions": {"python": "3"}}
    assert Benchmark([], [], protocol).markdown() == "\nProtocol: hardware none; python 3.\n"


def test_random_weights_are_not_degenerate(make_config: Any) -> None:
    model = throughput.random_model(make_config())
    latents = torch.ones(1, 2, 8, 8)
    tokens = [model(latents=latents, feature=f"blocks.{index}.hidden")[0] for index in range(3)]
    assert all((tokens[index] - tokens[index + 1]).abs().mean() > 0.1 for index in range(2))
    assert (model(latents=latents, timestep=5)[0] - model(latents=latents, timestep=900)[0]).abs().mean() > 0.01


def test_the_script_measures_published_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "--sizes", "S/8", "--batch_sizes", "1", "--dtypes", "float32", "--no-pixels", "--device", "cpu",
        "--output", str(tmp_path / "out.json"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    throughput.main()
    assert "DiT-S/8" in capsys.readouterr().out
    rows = {row["contender"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows[FIXED]["parameters"] < rows[DIFFUSERS]["parameters"] / 3
    assert rows[FIXED]["file_bytes"] < rows[DIFFUSERS]["file_bytes"] / 3
