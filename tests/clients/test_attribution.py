"""Attribution tools that hook a block: the calls of grad-cam, and captum itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CLASSIFIERS = ["ours-classifier", "ours-fixed-classifier", "vit-classifier"]


def blocks(model: Any) -> Any:
    return model.dit.layers if hasattr(model, "dit") else model.vit.layers


def tokens_to_map(tokens: torch.Tensor) -> torch.Tensor:
    """The `reshape_transform` of a 4 x 4 grid; ViT's class token, if there is one, is dropped."""
    return tokens[:, -16:].reshape(tokens.shape[0], 4, 4, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_grad_cam(name: str, block: int, build: Any, pixels: torch.Tensor) -> None:
    """grad-cam needs torchvision and OpenCV, so its calls: two forward hooks, a hook on the output, a reshape."""
    model, activations, gradients = build(name), [], []

    def save_activation(module: Any, inputs: Any, output: Any) -> None:
        activations.append(tokens_to_map(output).detach())

    def save_gradient(module: Any, inputs: Any, output: Any) -> None:
        if hasattr(output, "requires_grad") and output.requires_grad:
            output.register_hook(lambda gradient: gradients.insert(0, tokens_to_map(gradient).detach()))

    for hook in (save_activation, save_gradient):
        blocks(model)[block].register_forward_hook(hook)
    model(pixels).logits[:, 1].sum().backward()
    assert len(activations) == len(gradients) == 1
    weights = gradients[0].mean(dim=(2, 3), keepdim=True)
    heatmap = torch.relu((weights * activations[0]).sum(dim=1))
    assert heatmap.shape == (3, 4, 4)
    assert heatmap.abs().sum() > 0


@pytest.mark.parametrize("feature", ["blocks.1.query", "blocks.1.mlp"])
def test_grad_cam_on_the_block_of_the_feature(feature: str, build: Any, pixels: torch.Tensor) -> None:
    """The last block that runs returns the feature that is read."""
    model, outputs = build("ours-classifier", feature=feature), []
    model.dit.layers[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(pixels)
    assert torch.equal(outputs[0], model.dit(pixels).last_hidden_state)


@pytest.mark.parametrize("method", ["LayerGradCam", "LayerIntegratedGradients", "LayerActivation"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_captum_on_a_block(name: str, method: str, build: Any, pixels: torch.Tensor) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed: pip install 'aselect-hf[clients]'")
    model = build(name)
    tool = getattr(attr, method)(lambda inputs: model(inputs).logits, blocks(model)[1])
    options: dict[str, Any] = {} if method == "LayerActivation" else {"target": 1}
    options |= {"n_steps": 5} if method == "LayerIntegratedGradients" else {}
    found = tool.attribute(pixels, **options)
    assert isinstance(found, torch.Tensor)
    assert found.shape[0] == 3
    assert found.abs().sum() > 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_captum_on_pixels(name: str, build: Any, pixels: torch.Tensor) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed: pip install 'aselect-hf[clients]'")
    model = build(name)
    found, delta = attr.IntegratedGradients(lambda inputs: model(inputs).logits).attribute(
        pixels, target=1, n_steps=200, return_convergence_delta=True
    )
    assert found.shape == pixels.shape
    assert delta.abs().max() < 0.05 * found.abs().sum()
