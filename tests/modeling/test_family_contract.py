"""What the library asks of every family of diffusion networks; see `families.py` for how to add one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from aselect_hf import select_timestep
from aselect_hf.audit import audit_timestep
from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.feature_cache import cache_key, pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

from .families import FAMILIES

Build = Callable[..., Any]


@pytest.fixture(params=FAMILIES)
def build(request: pytest.FixtureRequest, randomize: Any) -> Build:
    """`build(seed=0)`: the family's tiny model with random weights, in evaluation mode."""
    return lambda seed=0: randomize(FAMILIES[request.param](), seed)


@pytest.fixture
def model(build: Build) -> Any:
    return build()


@pytest.fixture
def pixels(model: Any, normal: Any) -> Callable[..., torch.Tensor]:
    """`pixels(count)`: random images as the model takes them, in [-1, 1]."""
    side = model.config.image_size
    return lambda count, seed=0: normal(count, model.config.image_channels, side, side, seed=seed).clamp(-1, 1)


@pytest.fixture
def latents(model: Any, normal: Any) -> torch.Tensor:
    """Random `(3, channels, height, width)` of what the network sees."""
    return normal(3, model.config.num_channels, model.config.sample_size, model.config.sample_size)


@pytest.fixture
def images(pixels: Any) -> ImageData:
    """40 images of two classes."""
    dark, light = pixels(20) / 2 - 0.5, pixels(20, seed=1) / 2 + 0.5
    return ImageData([*dark, *light], labels=np.repeat([0, 1], 20))


def one_feature(model: Any) -> str:
    return str(model.config.feature)


def test_every_feature_has_the_shape_that_the_config_says(model: Any, latents: torch.Tensor) -> None:
    config, names = model.config, model.config.list_features()
    kinds = getattr(config, "kinds_of", lambda block: config.feature_kinds)
    assert names == [f"blocks.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in kinds(i)]
    found = model.extract_features(latents=latents, features=names[::-1], timesteps=[700, 30])
    assert list(found) == names[::-1]
    for name, feature in found.items():
        assert feature.shape == (3, 2, config.num_patches, config.feature_width(name))
        assert not feature.requires_grad
    assert model.last_output == names[-1]
    last = model.extract_features(latents=latents, feature=f"blocks.-1.{config.feature_kinds[-1]}", timestep=30)
    assert torch.equal(*last.values(), found[names[-1]][:, 1:])


def test_a_feature_is_the_same_alone_and_among_all(model: Any, latents: torch.Tensor) -> None:
    names = model.config.list_features()
    together = model.extract_features(latents=latents, features=names, timestep=500)
    for name in names:
        alone = model.extract_features(latents=latents, feature=name, timestep=500)[name]
        torch.testing.assert_close(alone, together[name], rtol=1e-5, atol=1e-5)


def test_what_a_feature_does_not_depend_on_does_not_move_it(build: Build, latents: torch.Tensor) -> None:
    model = build()
    for name in model.config.list_features():
        changed = build()
        with torch.no_grad():
            for part in changed.unused_parts([name]):
                for parameter in part.parameters():
                    parameter.fill_(7.0)
        expected, found = (each.extract_features(latents=latents, feature=name)[name] for each in (model, changed))
        assert torch.equal(found, expected)


def test_a_run_stops_after_the_deepest_feature(model: Any, latents: torch.Tensor) -> None:
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    counts = []
    for name in model.config.list_features():
        calls.clear()
        model(latents=latents, feature=name)
        counts.append(calls.total())
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] / 2


def test_timesteps_come_in_the_order_asked(model: Any, latents: torch.Tensor) -> None:
    name = one_feature(model)
    together = model.extract_features(latents=latents, feature=name, timesteps=[900, 3, 900, 450])[name]
    for position, t in enumerate([900, 3, 900, 450]):
        alone = model.extract_features(latents=latents, feature=name, timestep=t)[name][:, 0]
        torch.testing.assert_close(together[:, position], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-2)


def test_forward_is_the_chosen_feature(model: Any, latents: torch.Tensor) -> None:
    name = one_feature(model)
    output = model(latents=latents)
    expected = model.extract_features(latents=latents)[name][:, 0]
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, expected.mean(dim=1), rtol=1e-5, atol=1e-5)
    names = [f"blocks.0.{model.config.feature_kinds[-1]}", name]
    both = model(latents=latents, feature=names).last_hidden_state
    assert both.shape[-1] == sum(map(model.config.feature_width, names))


def test_the_stored_noise_is_used_unless_noise_is_given(build: Build, latents: torch.Tensor, normal: Any) -> None:
    torch.manual_seed(1)
    model = build()
    torch.manual_seed(2)
    assert torch.equal(build().evaluation_noise, model.evaluation_noise)
    state, options = torch.get_rng_state(), {"feature": one_feature(model), "timestep": 600}
    (stored,) = model.extract_features(latents=latents, **options).values()
    assert torch.equal(torch.get_rng_state(), state)
    draws = [model.extract_features(latents=latents, noise=draw, **options) for draw in model.evaluation_noise]
    mean = torch.stack([next(iter(draw.values())) for draw in draws]).mean(dim=0)
    torch.testing.assert_close(mean, stored, rtol=1e-5, atol=1e-5)
    (other,) = model.extract_features(latents=latents, noise=normal(*latents.shape, seed=9), **options).values()
    assert (other - stored).abs().max() > 1e-2


def test_latents_stand_in_for_pixels(model: Any, pixels: Any) -> None:
    images, name = pixels(2), one_feature(model)
    from_latents = model.extract_features(latents=model.prepare_latents(images))[name]
    assert torch.equal(model.extract_features(images)[name], from_latents)


def test_output_formats_agree(model: Any, latents: torch.Tensor) -> None:
    name = one_feature(model)
    tokens, maps, pooled = (
        model.extract_features(latents=latents, timesteps=[5, 500], output_format=each)[name]
        for each in ("tokens", "map", "pooled")
    )
    height, width = model.grid_size(latents)
    assert torch.equal(maps.flatten(3).mT, tokens)
    assert maps.shape[-2:] == (height, width)
    torch.testing.assert_close(pooled, tokens.mean(dim=2))


def test_a_saved_model_loads_through_the_auto_classes(model: Any, latents: torch.Tensor, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert isinstance(loaded, NoisyBackbone)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(latents=latents).last_hidden_state, model(latents=latents).last_hidden_state)
    other = type(model).from_pretrained(tmp_path, noise_seed=5, num_noise_draws=3)
    assert other.evaluation_noise.shape[0] == other.config.num_noise_draws == 3


def test_adapters_belong_where_gradients_arrive(build: Build, latents: torch.Tensor) -> None:
    for name in build().config.list_features():
        model = build()
        model(latents=latents, feature=name).last_hidden_state.square().sum().backward()
        moved = {each for each, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        targets = {f"{each}.weight" for each in model.attention_projections([name])}
        assert targets == {each for each in moved if each.removesuffix(".weight").endswith(model.projection_names)}
        unused = {p for part in model.unused_parts([name]) for p in part.parameters()}
        assert not {each for each, p in model.named_parameters() if p in unused} & moved


def test_it_denoises_and_reads_features_in_one_run(model: Any, latents: torch.Tensor) -> None:
    names, steps = [one_feature(model)], torch.tensor([3, 400, 900])
    if not model.config.is_whole:
        with pytest.raises(ValueError, match="cannot denoise"):
            model.denoise(latents, 3)
        return
    with torch.no_grad():
        prediction, found = model.denoise_with_features(latents, steps, names)
        assert prediction.shape == latents.shape
        torch.testing.assert_close(model.denoise(latents, steps), prediction, rtol=1e-5, atol=1e-5)
        for name, feature in model.features_of_noisy(latents, steps, names).items():
            torch.testing.assert_close(found[name], feature, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": "blocks.99.query"}, r"blocks\.99\.query"),
        ({"feature": "blocks.0.nothing"}, "kind one of"),
        ({"timestep": 1000}, r"timestep.*0\.\.999"),
        ({"timestep": 0.5}, "timestep"),
        ({"latents": torch.zeros(1, 7, 8, 8)}, r"latents must be \(batch"),
        ({"latents": None}, "exactly one"),
        ({"class_labels": torch.tensor([99, 0, 0])}, "class_labels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["forward", "extract_features"])
def test_bad_arguments_are_named(
    model: Any, latents: torch.Tensor, method: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**({"latents": latents} | change))


def test_bad_values_are_refused(model: Any, latents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        model(latents=latents * torch.nan)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        model(latents=latents, bogus=1)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".0." in name and "vae" not in name).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"blocks\.0 gives NaN or infinite values in torch\.float32"):
        model(latents=latents, feature=model.last_output)


def test_a_fixed_timestep_gives_the_same_features(model: Any, latents: torch.Tensor) -> None:
    name = one_feature(model)
    if not model.can_fix_timestep:
        with pytest.raises(ValueError, match=rf"{type(model).__name__} cannot be fixed"):
            model.fix_timestep(70, name)
        return
    fixed = model.fix_timestep(70, name)
    assert fixed.config.list_features() == [name]
    torch.testing.assert_close(
        fixed(latents=latents).last_hidden_state, model(latents=latents, timestep=70).last_hidden_state,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="fixed to timestep 70"):
        fixed.denoise(latents, 70)


def test_the_name_of_cached_features_changes_with_all_that_changes_them(build: Build, images: ImageData) -> None:
    def changed(**fields: Any) -> Any:
        model = build()
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model

    models = [build(), build(seed=1), changed(noise_seed=3), changed(noise_schedule={"beta_end": 0.5})]
    noisy = build()
    noisy.evaluation_noise += 1
    first, second = build().config.list_features()[:2]
    keys = [cache_key(each, images, first, "pooled 1") for each in (*models, noisy)]
    keys += [cache_key(build(), images, second, "pooled 1"), cache_key(build(), images, first, "pooled 2")]
    assert len(set(keys)) == len(keys)
    assert cache_key(build(), images, first, "pooled 1") == keys[0]


def test_cached_features_are_the_features(model: Any, images: ImageData, tmp_path: Any) -> None:
    name = model.config.list_features()[-2]
    cached = pooled_features(model, images, [5, 500], name, cache_dir=tmp_path, batch_size=16, progress=False)
    pixels = torch.stack([images.decode(index) for index in range(len(images))])
    expected = model.extract_features(pixels, feature=name, timesteps=[5, 500], output_format="pooled")[name]
    for column, values in enumerate(cached.values):
        torch.testing.assert_close(torch.from_numpy(values.copy()), expected[:, column], rtol=1e-4, atol=1e-4)
    draws = model.config.num_noise_draws
    assert cached.flops == 40 * encode_flops(model) + 2 * 40 * draws * feature_flops(model, name) > 0


def test_an_untrained_twin_differs_in_its_weights_alone(model: Any, latents: torch.Tensor) -> None:
    state = torch.get_rng_state()
    twin, again = model.untrained_twin(), model.untrained_twin()
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.vae is model.vae
    assert twin.config.to_dict() == model.config.to_dict()
    assert torch.equal(twin.stored_noise(latents), model.stored_noise(latents))
    own, untrained, same = ([*each.parameters()] for each in (model, twin, again))
    assert all(map(torch.equal, untrained, same))
    assert not all(map(torch.equal, own, untrained))


@pytest.mark.parametrize("method", ["hfr", "consensus", "logme", "gate"])
def test_a_timestep_is_selected(model: Any, images: ImageData, tmp_path: Any, method: str) -> None:
    selection = select_timestep(
        model, images, method=method, timesteps=[0, 300, 900], cache_dir=tmp_path, progress=False
    )
    assert selection.timestep in (0, 300, 900)
    assert selection.apply(model).config.timestep == selection.timestep


def test_a_feature_is_selected_with_the_timestep(model: Any, images: ImageData) -> None:
    kinds = [model.config.feature_kinds[0], model.config.feature_kinds[-1]]
    selection = select_timestep(
        model, images, method="logme", feature="auto", kinds=kinds, timesteps=[0, 900], progress=False
    )
    assert selection.feature in model.config.list_features()
    with pytest.raises(ValueError, match="kinds must be a list of names out of"):
        select_timestep(model, images, method="logme", feature="auto", kinds=["nothing"], progress=False)


def test_a_timestep_is_audited(model: Any, images: ImageData, tmp_path: Any) -> None:
    audit = audit_timestep(model, images, timesteps=[0, 300, 900], cache_dir=tmp_path, progress=False)
    assert audit.timestep in (0, 300, 900)
    assert audit.untrained is not None
