"""The joint objective: one run for both losses, a bank of heads that do not disturb each other, exact on any split."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation
from aselect_hf.selection.timestep_gate import TimestepGate
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.latents import clean_latents
from aselect_hf.training.objective import SETTLED, HeadSetting, TaskObjective

from .toys import MaskedPictures, segmenter

SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 2,
    "sample_size": 8, "num_channels": 2, "num_condition_classes": 5, "timestep": 100, "num_labels": 4,
    "learned_sigma": False, "feature": "blocks.1.mlp",
}  # fmt: skip
CANDIDATES = [0, 50, 200, 600]
MODELS = [ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation]


@pytest.fixture
def make_objective(randomize):
    def make(model_class=ASelectDiTForImageClassification, gate=False, heads=1, frozen=False, draws=1, **options):
        model = randomize(model_class(ASelectDiTConfig(**SHAPE, num_noise_draws=draws)))
        if frozen:
            model.freeze_backbone()
        if gate:
            schedule = model.dit.noise_schedule
            options["gate"] = TimestepGate(24, CANDIDATES, [schedule.log_snr(t) for t in CANDIDATES])
        return TaskObjective(model, [HeadSetting(1e-3, 0.0)] * heads, **options).train()

    return make


def batch_of(objective, count=6):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 8, 8) if objective.task.dense else (count,)
    return {
        "pixel_values": torch.randn(count, 2, 8, 8, generator=generator),
        "labels": torch.randint(0, 4, shape, generator=generator),
    }


def draws_of(count=6, start=0):
    return SampleDraws(0, 0, range(start, start + count))


def count_runs(objective):
    """Samples that went through each block."""
    counts = [0] * len(objective.dit.layers)
    for index, layer in enumerate(objective.dit.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: counts.__setitem__(index, counts[index] + len(args[0])),
            with_kwargs=True,
        )
    return counts


@pytest.mark.parametrize("model_class", MODELS)
def test_the_joint_loss_costs_no_run_beyond_the_denoising_loss(make_objective, model_class):
    objective = make_objective(model_class, gate=True, denoising_loss_weight=1.0)
    counts = count_runs(objective)
    losses = objective(batch_of(objective), draws_of())
    assert counts == [6 * 2] * 3  # what denoising every image at its two visited timesteps takes
    assert losses["loss"].item() == pytest.approx((losses["task_loss"] + losses["denoising_loss"]).item(), rel=1e-5)


def test_without_the_denoising_loss_a_run_stops_at_the_feature(make_objective):
    objective = make_objective(gate=True, frozen=True)
    counts = count_runs(objective)
    objective(batch_of(objective), draws_of())
    assert counts == [12, 12, 0]


def test_a_settled_gate_visits_one_timestep_and_keeps_it(make_objective):
    objective = make_objective(gate=True, frozen=True)
    objective.set_progress(SETTLED)
    counts = count_runs(objective)
    loss = objective(batch_of(objective), draws_of())["loss"]
    assert counts == [6, 6, 0]
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.gate.parameters())
    settled = objective.timestep
    with torch.no_grad():
        objective.gate.query.add_(torch.randn(objective.gate.query.shape))
    assert objective.timestep == settled
    copy = make_objective(gate=True, frozen=True)
    copy.load_state_dict(objective.state_dict())
    assert copy.timestep == settled


def test_the_denoising_loss_is_that_of_the_diffusion_model(make_objective):
    """Computed again from the same draws, by `denoise`."""
    objective = make_objective(denoising_loss_weight=0.5)
    batch, schedule = batch_of(objective), objective.dit.noise_schedule
    found = objective(batch, draws_of())
    noise, steps = draws_of().normal(1, 2, 8, 8)[:, 0], torch.full((6,), 100)
    prediction = objective.dit.denoise(schedule.add_noise(batch["pixel_values"], noise, 100), steps)
    expected = F.mse_loss(prediction, schedule.training_target(batch["pixel_values"], noise, steps))
    assert found["denoising_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((found["task_loss"] + 0.5 * expected).item(), rel=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("noise_draws", [1, 2])
def test_evaluation_gives_the_logits_of_the_model(make_objective, model_class, noise_draws):
    objective = make_objective(model_class, heads=2, draws=noise_draws).eval()
    model = model_class(ASelectDiTConfig(**SHAPE, num_noise_draws=noise_draws)).eval()
    model.dit.load_state_dict(objective.dit.state_dict())
    head = model.decode_head if objective.task.dense else model.classifier
    head.load_state_dict(objective.heads[1].state_dict())
    batch = batch_of(objective)
    with torch.no_grad():
        logits = objective(batch)
        expected = model(batch["pixel_values"]).logits
    assert logits.shape[:2] == (2, 6)
    torch.testing.assert_close(logits[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
def test_the_loss_of_one_head_is_that_of_the_model(make_objective, model_class):
    objective = make_objective(model_class, frozen=True)
    model = model_class(ASelectDiTConfig(**SHAPE)).eval()
    model.dit.load_state_dict(objective.dit.state_dict())
    head = model.decode_head if objective.task.dense else model.classifier
    head.load_state_dict(objective.heads[0].state_dict())
    batch = batch_of(objective)
    if objective.task.dense:
        batch["labels"][:, :3] = 255
    expected = model(**batch).loss
    assert objective(batch, draws_of())["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_heads_of_a_bank_train_as_if_alone(make_objective):
    """The same steps with one head, at its own learning rate, end in the same weights."""

    def train(settings):
        objective = make_objective(frozen=True, heads=len(settings))
        objective.settings = settings
        optimizer = torch.optim.AdamW(objective.parameter_groups(1e-3, 0.0, 1e-2))
        for step in range(5):
            optimizer.zero_grad()
            (len(settings) * objective(batch_of(objective), draws_of(start=6 * step))["loss"]).backward()
            optimizer.step()
        return objective.heads

    settings = [HeadSetting(1e-3, 0.0), HeadSetting(1e-2, 0.1)]
    together = train(settings)
    for index, setting in enumerate(settings):
        alone = train([setting])[0]
        for one, other in zip(together[index].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not torch.equal(together[0].linear.weight, together[1].linear.weight)


@pytest.mark.parametrize("gate", [False, True])
def test_two_halves_make_the_whole_batch(make_objective, gate):
    """Gradients of a batch are the mean of those of its halves: what processes and accumulation rely on."""
    objective = make_objective(gate=gate, denoising_loss_weight=1.0, random_flip=True)
    batch = batch_of(objective)
    state = {name: value.clone() for name, value in objective.state_dict().items()}

    def gradients(rows, start):
        objective.load_state_dict(state)
        objective.zero_grad()
        part = {name: value[rows] for name, value in batch.items()}
        objective(part, draws_of(len(part["labels"]), start))["loss"].backward()
        return [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    whole = gradients(slice(0, 6), 0)
    halves = zip(gradients(slice(0, 3), 0), gradients(slice(3, 6), 3), strict=True)
    for expected, (first, second) in zip(whole, halves, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-3, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), gate=st.booleans(), masks=st.booleans(), heads=st.integers(1, 2))
def test_any_division_of_a_step_has_the_same_gradient(randomize, data, gate, masks, heads):
    """Uneven passes, any share of ignored pixels in each, several heads, both losses: as if it were one pass."""
    model_class = ASelectDiTForSemanticSegmentation if masks else ASelectDiTForImageClassification
    model = randomize(model_class(ASelectDiTConfig(**SHAPE)))
    log_snr = [model.dit.noise_schedule.log_snr(t) for t in CANDIDATES]
    chooser = TimestepGate(24, CANDIDATES, log_snr, num_heads=heads) if gate else None
    objective = TaskObjective(
        model, [HeadSetting(1e-3, 0.0)] * heads, gate=chooser, denoising_loss_weight=0.5, random_flip=True
    ).train()
    batch = batch_of(objective)
    if masks:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=6, max_size=6), label="rows that count"))
        batch["labels"][torch.arange(8)[None] >= rows[:, None]] = 255
    cuts = sorted(data.draw(st.sets(st.integers(1, 5)), label="cuts"))

    def gradients(bounds):
        state = {name: value.clone() for name, value in objective.state_dict().items()}
        objective.zero_grad()
        slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        passes = [{name: value[rows] for name, value in batch.items()} for rows in slices]
        counts = sum(objective.count_items(each) for each in passes) / len(passes)
        loss = 0.0
        for rows, each in zip(slices, passes, strict=True):
            found = objective(each, draws_of(rows.stop - rows.start, rows.start), counts)
            (found["loss"] / len(passes)).backward()
            loss += found["loss"].item() / len(passes)
        objective.end_step()
        learned = objective.state_dict()
        objective.load_state_dict(state)
        return {
            "loss": torch.tensor(loss),
            **{name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None},
            **{f"new {name}": value.clone() for name, value in learned.items() if name.startswith("gate.")},
        }

    whole, divided = gradients([0, 6]), gradients([0, *cuts, 6])
    assert whole.keys() == divided.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(
            divided[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("gate", [False, True])
def test_accumulation_trains_on_masks_like_the_larger_batch(make_trainer, gate):
    """Also with gradients clipped, and where a forward pass has nothing but ignored pixels."""
    states = {}
    for passes in (1, 4):
        options = {"per_device_train_batch_size": 8 // passes, "gradient_accumulation_steps": passes}
        trainer = make_trainer(
            f"in-{passes}", MaskedPictures(), segmenter(gate), collate=MaskedPictures.collate, learning_rate=1e-3,
            max_train_steps=6, max_grad_norm=0.05, **options,
        )  # fmt: skip
        history = trainer.train()["history"]
        states[passes] = (history, trainer.objective.state_dict())
    for one, other in zip(states[1][0], states[4][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-9)
    for name, value in states[1][1].items():
        torch.testing.assert_close(
            states[4][1][name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_flips_turn_masks_with_their_images(make_objective):
    objective = make_objective(ASelectDiTForSemanticSegmentation, random_flip=True, frozen=True)
    batch = batch_of(objective)
    batch["labels"] = (batch["pixel_values"][:, 0] > 0).long()
    flip, labels = objective._flips(batch, draws_of())
    latents = clean_latents(objective.dit, batch, draws_of(), flip, sampled=False)
    assert torch.equal((latents[:, 0] > 0).long(), labels)
    flipped = (latents != batch["pixel_values"]).flatten(1).any(dim=1)
    assert 0 < flipped.sum() < 6


def test_a_frozen_backbone_cannot_denoise(make_objective):
    with pytest.raises(ValueError, match="denoising_loss_weight must be 0 with a frozen backbone"):
        make_objective(frozen=True, denoising_loss_weight=1.0)
