"""Writes the golden files beside it: what PyTorch 2.13.0 on CPU computes in float64.

    python tests/golden/make.py

The models are written with PyTorch's own operations, from the architectures' descriptions. Weights are drawn by
`recipe.py` in JAX's layouts (kernels h, w, in, out; flattening in the order h, w, c) and permuted in the forward pass.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import recipe
import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


class Scope:
    """Layers by name. With `values` None it notes the shapes of the variables on the way instead."""

    def __init__(self, values: Tensors | None, training: bool):
        self.values, self.training, self.shapes = values, training, {}

    def variable(self, path: str, *shape: int) -> torch.Tensor:
        self.shapes[path] = shape
        return torch.ones(shape) if self.values is None else self.values[path]

    def conv(self, x: torch.Tensor, name: str, out: int, size: int, stride: int = 1, bias: bool = True) -> torch.Tensor:
        kernel = self.variable(f"{name}/kernel", size, size, x.shape[1], out)
        shift = self.variable(f"{name}/bias", out) if bias else None
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), shift, stride, size // 2)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale, bias, mean, var = (self.variable(f"{name}/{v}", x.shape[1]) for v in ("scale", "bias", "mean", "var"))
        # Copies, as PyTorch updates the running statistics in place.
        return F.batch_norm(x, mean.clone(), var.clone(), scale, bias, self.training)

    def dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
        kernel = self.variable(f"{name}/kernel", x.shape[1], recipe.CLASSES)
        return F.linear(x, kernel.T, self.variable(f"{name}/bias", recipe.CLASSES))


def flatten(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(1)


def lenet(scope: Scope, x: torch.Tensor) -> torch.Tensor:
    for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        x = torch.sigmoid(scope.conv(x, name, 12, 5, stride))
    return scope.dense(flatten(x), "head")


def convnet(scope: Scope, x: torch.Tensor) -> torch.Tensor:
    for i, width in enumerate((64, 128, 128, 256, 256, 256, 256, 256)):
        x = F.relu(scope.norm(scope.conv(x, f"conv{i}", width, 3), f"norm{i}"))
        x = F.max_pool2d(x, 3) if i in (5, 7) else x
    return scope.dense(flatten(x), "head")


def resnet18(scope: Scope, x: torch.Tensor) -> torch.Tensor:
    def conv_norm(x: torch.Tensor, conv: str, norm: str, *shape: int) -> torch.Tensor:
        return scope.norm(scope.conv(x, conv, *shape, bias=False), norm)

    x = F.relu(conv_norm(x, "stem", "stem_norm", 64, 3))
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            at, stride = f"stage{stage}_block{block}", 2 if stage > 0 and block == 0 else 1
            y = F.relu(conv_norm(x, f"{at}/conv1", f"{at}/norm1", width, 3, stride))
            y = conv_norm(y, f"{at}/conv2", f"{at}/norm2", width, 3)
            x = conv_norm(x, f"{at}/shortcut", f"{at}/shortcut_norm", width, 1, stride) if stride > 1 else x
            x = F.relu(x + y)
    return scope.dense(x.mean((2, 3)), "head")


def update(forward: Callable, values: Tensors, training: bool, images: torch.Tensor, labels: np.ndarray):
    """Loss and its gradient with respect to the parameters."""
    logits = forward(Scope(values, training), images.permute(0, 3, 1, 2))
    loss = F.cross_entropy(logits, torch.tensor(labels))
    params = {path: v for path, v in values.items() if v.requires_grad}
    return loss, dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True)))


def case(name: str) -> dict[str, np.ndarray]:
    model, side, mode = recipe.CASES[name]
    forward, training = {"LeNet": lenet, "ConvNet": convnet, "ResNet": resnet18}[model], mode == "training"
    shapes = Scope(None, training)
    forward(shapes, torch.zeros(2, 3, side, side))
    values = {path: torch.tensor(value) for path, value in recipe.variables(shapes.shapes).items()}
    for path, value in values.items():
        value.requires_grad_(path.split("/")[-1] not in ("mean", "var"))

    images, labels, client_images, client_labels = recipe.batches(side)
    candidate = torch.tensor(images, requires_grad=True)
    _, target = update(forward, values, training, torch.tensor(client_images), client_labels)
    target = torch.cat([t.detach().ravel() for t in target.values()])
    loss, simulated = update(forward, values, training, candidate, labels)
    flat = torch.cat([t.ravel() for t in simulated.values()])
    objectives = {
        "euclidean": (flat - target).square().sum(),
        "cosine": 1 - torch.dot(flat, target) / (flat.norm() * target.norm()),
    }
    found = {path: t.detach().numpy() for path, t in simulated.items()}
    result = {"loss": loss.detach().numpy(), "summary": recipe.summary(found)}
    for objective, value in objectives.items():
        result[objective] = value.detach().numpy()
        result[f"{objective}_gradient"] = torch.autograd.grad(value, candidate, retain_graph=True)[0].numpy()
    return result | (found if name == "lenet" else {})


def lbfgs_iterates(history_size: int, num_steps: int = 30) -> np.ndarray:
    """Start and iterates of torch.optim.LBFGS, one inner iteration a step."""
    matrix, start = (torch.tensor(value) for value in recipe.quartic())
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], lr=1, max_iter=1, history_size=history_size, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.log(torch.cosh(matrix @ x)).sum() + (x**4 / 4 - x**2 / 2).sum()
        value.backward()
        return value

    iterates = [x.detach().clone()]
    for _ in range(num_steps):
        optimizer.step(closure)
        iterates.append(x.detach().clone())
    return torch.stack(iterates).numpy()


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name in recipe.CASES:
        np.savez_compressed(folder / f"{name}.npz", **case(name))
    np.savez_compressed(folder / "lbfgs.npz", **{f"history_{size}": lbfgs_iterates(size) for size in (100, 4)})
