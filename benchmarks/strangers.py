"""Gradients of PyTorch models with their own names and layouts, read by `gia_jax.interop` and reproduced in JAX.

    python benchmarks/strangers.py [FOLDER]

Seven clients compute one gradient each in PyTorch on a CPU, from modules as a stranger would write them. The state dict
and the gradient are saved as `.safetensors`, the batch as `.npz`. Then JAX reads them and computes the gradient of the
same batch. The table has the relative errors, in float32. PyTorch and safetensors are needed.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx

from gia_jax import Batch, clients, interop, models
from gia_jax.models.functional import BatchNormMode

CLASSES = 10
TOLERANCE = 1e-5  # relative error of a gradient that counts as reproduced


class Case(NamedTuple):
    """A model in both libraries, and the batch of its client.

    Attributes:
        title: What it is, for the table.
        torch_module: Function of a side that makes the module of PyTorch.
        jax_module: Function `(input_shape, num_classes, rngs=) -> module`.
        side: Height and width of the images, in pixels.
        batch_size: Number of images.
        batch_norm: Mode of batch normalisation.
        flatten: Shapes that `interop` cannot find by itself, by the layer that takes them; "auto" for none.
    """

    title: str
    torch_module: Callable[[int], Any]
    jax_module: Callable[..., nnx.Module]
    side: int = 32
    batch_size: int = 1
    batch_norm: BatchNormMode = "evaluation"
    flatten: Any = "auto"


class Row(NamedTuple):
    """How well the gradient of a case is reproduced.

    Attributes:
        parameters: Number of parameters.
        error: L2 norm of the difference over that of PyTorch's gradient.
        worst_error: The largest error of one tensor, over that tensor's norm.
        worst: Name of that tensor.
    """

    parameters: int
    error: float
    worst_error: float
    worst: str


def linear(side: int) -> Any:
    """A dense layer on all pixels."""
    from torch import nn

    return nn.Sequential(nn.Flatten(1), nn.Linear(3 * side * side, CLASSES))


def lenet(side: int) -> Any:
    """The LeNet of DLG, in one sequence."""
    from torch import nn

    layers: list[Any] = []
    for features, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(features, 12, 5, stride, 2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(12 * (side // 4) ** 2, CLASSES))


def lenet_body(side: int) -> Any:
    """The same LeNet in two parts, as GradAttack writes it."""
    from torch import nn

    sequence = lenet(side)

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = sequence[:6], nn.Sequential(sequence[7])

        def forward(self, x: Any) -> Any:
            return self.fc(self.body(x).flatten(1))

    return LeNet()


def cnn6(side: int) -> Any:
    """R-GAP's CNN6."""
    from torch import nn

    layers: list[Any] = []
    features = 3
    sizes = ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))
    for out, size, stride, padding in sizes:
        layers += [nn.Conv2d(features, out, size, stride, padding, bias=False), nn.LeakyReLU(0.2)]
        features, side = out, (side + 2 * padding - size) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(128 * side * side, CLASSES))


def convnet(side: int) -> Any:
    """The ConvNet of Inverting Gradients."""
    from torch import nn

    layers: list[Any] = []
    features = 3
    for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
        layers += [nn.Conv2d(features, 64 * factor, 3, padding=1), nn.BatchNorm2d(64 * factor), nn.ReLU()]
        layers += [nn.MaxPool2d(3)] if i in (5, 7) else []
        features = 64 * factor
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(features * (side // 9) ** 2, CLASSES))


def resnet18(side: int) -> Any:
    """ResNet-18 with the 3x3 stem of CIFAR."""
    from torch import nn

    del side

    class Block(nn.Module):
        def __init__(self, features: int, out: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(features, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
            self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
            shortcut = [nn.Conv2d(features, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
            self.shortcut = nn.Sequential(*(shortcut if stride > 1 else []))

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + self.shortcut(x)).relu()

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
            sizes = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
            for i, (features, out, stride) in enumerate(sizes):
                setattr(self, f"layer{i + 1}", nn.Sequential(Block(features, out, stride), Block(out, out, 1)))
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.bn1(self.conv1(x)).relu()
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(self.pool(x).flatten(1))

    return ResNet()


CASES = {
    "linear": Case("linear", linear, models.MODELS["linear"], flatten={"head": (3, 32, 32)}),
    "lenet": Case("LeNet, sigmoid", lenet, models.LeNet),
    "cnn6": Case("CNN6", cnn6, models.CNN6),
    "convnet": Case("ConvNet, evaluation BN", convnet, models.ConvNet),
    "lenet_body": Case("LeNet in two parts", lenet_body, models.LeNet, batch_size=4),
    "resnet18_evaluation": Case("ResNet-18, evaluation BN", resnet18, models.ResNet),
    "resnet18_training": Case("ResNet-18, training BN", resnet18, models.ResNet, batch_size=4, batch_norm="training"),
}


def export(name: str, case: Case, folder: Path, suffix: str = ".safetensors", seed: int = 0) -> None:
    """The half in PyTorch: writes the state dict, the gradient and the batch of a case into a folder.

    Args:
        name: First part of the files' names.
        case: The case.
        folder: Folder that exists.
        suffix: Format of the tensors.
        seed: Seed of the weights and of the batch.
    """
    import torch

    torch.manual_seed(seed)
    module = case.torch_module(case.side)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # no constants, which would hide a mistake
            for tensor in (layer.weight, layer.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    module.train(case.batch_norm == "training")
    images = torch.randn(case.batch_size, 3, case.side, case.side)
    labels = torch.randint(CLASSES, (case.batch_size,))
    state = {key: value.clone() for key, value in module.state_dict().items()}  # before training moves the statistics
    torch.nn.functional.cross_entropy(module(images), labels).backward()
    gradient = {key: parameter.grad for key, parameter in module.named_parameters()}
    interop.save_tensors(folder / f"{name}_state{suffix}", state)
    interop.save_tensors(folder / f"{name}_gradient{suffix}", gradient)
    truth = {"images": images.permute(0, 2, 3, 1), "labels": labels}
    interop.save_tensors(folder / f"{name}_truth.npz", truth)


def reproduce(name: str, case: Case, folder: Path, suffix: str = ".safetensors") -> Row:
    """The half in JAX: reads what `export` wrote, and computes the gradient of the batch anew.

    Args:
        name: First part of the files' names.
        case: The case.
        folder: Folder with the files.
        suffix: Format of the tensors.

    Returns:
        How far the two gradients are apart.
    """
    module = case.jax_module((case.side, case.side, 3), CLASSES, rngs=nnx.Rngs(0))
    # What it takes to read a stranger's model and gradient:
    state = interop.load_tensors(folder / f"{name}_state{suffix}")
    gradient = interop.load_tensors(folder / f"{name}_gradient{suffix}")
    module = interop.load_torch(module, state, flatten=case.flatten)
    apply_fn, params = models.functional(module, batch_norm=case.batch_norm)
    update = interop.from_torch(gradient, params, flatten=case.flatten)

    truth = interop.load_tensors(folder / f"{name}_truth.npz")
    batch = Batch(jnp.asarray(truth["images"]), jnp.asarray(truth["labels"], jnp.int32))
    found = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))(params, batch)
    found, update = jax.tree.map(np.asarray, (found, update))
    differences = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), found, update)
    path, worst = max(jax.tree.leaves_with_path(differences), key=lambda item: item[1])
    error, norm = (
        np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (jax.tree.map(np.subtract, found, update), update)
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Row(size, float(error / norm), worst, jax.tree_util.keystr(path, simple=True, separator="."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the files are kept; by default they are not")
    with tempfile.TemporaryDirectory() as temporary:
        folder = parser.parse_args().folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = {}
        for name, case in CASES.items():
            export(name, case, folder)
            rows[name] = reproduce(name, case, folder)
    import torch

    table = [
        {
            "model": CASES[name].title,
            "batch": CASES[name].batch_size,
            "parameters": row.parameters,
            "relative error": f"{row.error:.1e}",
            "of the worst tensor": f"{row.worst_error:.1e}",
            "worst tensor": row.worst,
            "reproduced": "yes" if row.error <= TOLERANCE else "NO",
        }
        for name, row in rows.items()
    ]
    record.write(
        "table",
        "Gradients exported from PyTorch, reproduced in JAX, float32",
        table,
        "Relative error: L2 norm of the difference over that of PyTorch's gradient, of the whole gradient and of the "
        f"tensor where it is largest; reproduced: the former is at most {TOLERANCE:g}. BN: batch normalisation, "
        "evaluation or training mode. Random weights and a random batch, seed 0. No attack: the batch is known.",
        torch=torch.__version__,
    )
    if failed := [name for name, row in rows.items() if not row.error <= TOLERANCE]:
        raise SystemExit(f"not reproduced: {', '.join(failed)}")


if __name__ == "__main__":
    main()
