"""The PyTorch library `breaching` 0.1.2 (extra `peers`), its own Inverting Gradients timed step by step.

It runs on the device on which JAX runs: on a GPU where JAX has one.
"""

import time
import warnings
from typing import Any

import jax
import numpy as np

NAMES = {"lenet": "lenet_zhu", "resnet18": "resnet18", "convnet": "convnet", "resnet18_imagenet": "resnet18"}

_KEPT: list[Any] = []


def _breaching() -> Any:
    warnings.filterwarnings("ignore")
    from torch import library

    try:
        import breaching
    except RuntimeError:  # a torchvision made for another torch lacks its operators; nothing here calls them
        definitions = library.Library("torchvision", "DEF")
        definitions.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        definitions.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(definitions)  # they last as long as this object
        import breaching
    return breaching


class Peer:
    """A victim of `breaching` with a random network: its weights, the client's data and gradient, and the attack."""

    def __init__(self, model: str, batch_size: int, threads: int) -> None:
        import torch

        breaching = _breaching()
        from breaching.cases.models.model_preparation import construct_model

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.breaching, self.torch = breaching, torch
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.config, size = breaching.get_case_config(overrides=[]).data, 32
        if model.endswith("_imagenet"):
            size = 224
            self.config.update({"name": "ImageNet", "shape": [3, size, size], "classes": 1_000})
        self.model, self.loss = construct_model(NAMES[model], self.config, pretrained=False)
        self.model.to(self.device).eval()
        self.inputs = torch.randn(batch_size, 3, size, size).to(self.device)
        self.labels = (torch.arange(batch_size) % 10).to(self.device)
        loss = self.loss(self.model(self.inputs), self.labels)
        self.gradient = [g.detach() for g in torch.autograd.grad(loss, list(self.model.parameters()))]

    def weights(self) -> list[np.ndarray]:
        """The parameters, in the order of the network's layers."""
        return [p.detach().cpu().numpy() for p in self.model.parameters()]

    def step_times(self, steps: int) -> list[float]:
        """Seconds between two evaluations of the objective in a run of the attack, the first ones left out."""
        settings = [f"optim.max_iterations={steps + 3}", "optim.callback=1000000"]
        config = self.breaching.get_attack_config("invertinggradients", overrides=settings)
        setup = {"device": self.device, "dtype": self.torch.float}
        attacker = self.breaching.attacks.prepare_attack(self.model, self.loss, config, setup)
        parameters = [p.detach() for p in self.model.parameters()]
        server = [{"parameters": parameters, "buffers": list(self.model.buffers()), "metadata": self.config}]
        metadata = {"num_data_points": len(self.labels), "labels": self.labels, "local_hyperparams": None}
        shared = [{"gradients": self.gradient, "buffers": None, "metadata": metadata}]
        began, original = [], attacker._compute_objective

        def timed(*arguments: Any) -> Any:
            if self.device.type == "cuda":
                self.torch.cuda.synchronize()  # a step ends when the GPU has done it
            began.append(time.perf_counter())
            return original(*arguments)

        attacker._compute_objective = timed
        attacker.reconstruct(server, shared, {}, dryrun=False)
        return np.diff(began)[2:].tolist()

    def device_memory(self) -> str:
        """Megabytes at the peak on a GPU."""
        if self.device.type != "cuda":
            return "-"
        return f"{self.torch.cuda.max_memory_allocated() / 1e6:.0f}"


def to_jax(weights: list[np.ndarray], params: dict[str, Any], last_shape: tuple[int, int, int]) -> dict[str, Any]:
    """PyTorch's arrays, in the order of layers, as a tree like `params`, whose layers are those of `gia_jax.models`.

    Args:
        weights: As of `Peer.weights`; a gradient in the same order does as well.
        params: The tree to fill.
        last_shape: (h, w, c) of what enters the last layer, flattened in another order there.
    """
    left = iter(weights)
    filled: dict[str, Any] = {}
    for layer in _layers(params):
        node, target = params, filled
        for key in layer:
            node, target = node[key], target.setdefault(key, {})
        for name in ("kernel", "scale", "bias"):
            if name in node:
                value = next(left)
                if name == "kernel" and value.ndim == 4:
                    value = value.transpose(2, 3, 1, 0)
                elif name == "kernel":
                    h, w, c = last_shape
                    value = value.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
                if value.shape != node[name].shape:
                    raise ValueError(f"{layer} {name} has shape {value.shape}, expected {node[name].shape}")
                target[name] = value
    return filled


def _layers(params: dict[str, Any]) -> list[tuple[str, ...]]:
    """Paths of the layers in the order of the forward pass."""
    inner = ("conv1", "norm1", "conv2", "norm2", "shortcut", "shortcut_norm")
    order: list[tuple[str, ...]] = [("stem",), ("stem_norm",)]
    for name in sorted(name for name in params if name.startswith("stage")):
        order += [(name, part) for part in inner if part in params[name]]
    for i in range(10):
        order += [(f"conv{i}",), (f"norm{i}",)]
    return [path for path in [*order, ("head",)] if path[0] in params]
