"""Seven networks as a stranger would write them in PyTorch, for `strangers.py`: functions of the images' side."""

from typing import Any

from torch import nn

CLASSES = 10


def linear(side: int) -> Any:
    """A dense layer on all pixels."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(3 * side * side, CLASSES))


def lenet(side: int) -> Any:
    """The LeNet of DLG, in one sequence, with DLG's first weights."""
    layers: list[Any] = []
    for features, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(features, 12, 5, stride, 2), nn.Sigmoid()]
    made = nn.Sequential(*layers, nn.Flatten(1), nn.Linear(12 * (side // 4) ** 2, CLASSES))
    for parameter in made.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return made


def lenet_body(side: int) -> Any:
    """The same LeNet in two parts, as GradAttack writes it."""
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
    layers: list[Any] = []
    features = 3
    sizes = ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))
    for out, size, stride, padding in sizes:
        layers += [nn.Conv2d(features, out, size, stride, padding, bias=False), nn.LeakyReLU(0.2)]
        features, side = out, (side + 2 * padding - size) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(128 * side * side, CLASSES))


def convnet(side: int) -> Any:
    """The ConvNet of Inverting Gradients."""
    layers: list[Any] = []
    features = 3
    for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
        layers += [nn.Conv2d(features, 64 * factor, 3, padding=1), nn.BatchNorm2d(64 * factor), nn.ReLU()]
        layers += [nn.MaxPool2d(3)] if i in (5, 7) else []
        features = 64 * factor
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(features * (side // 9) ** 2, CLASSES))


def resnet18(side: int) -> Any:
    """ResNet-18 with the 3x3 stem of CIFAR."""
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
