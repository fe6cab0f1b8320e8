"""Small networks of torch alone, each with something that a structured pruner can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)


class ConvStack(nn.Module):
    """Convolutions, pooling, flattened with its pixels into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                                      nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU(), nn.AvgPool2d(2))  # fmt: skip
        self.first, self.second = nn.Linear(5 * 4 * 4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.features(x).flatten(1))))


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(into, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out), nn.BatchNorm2d(out)
        self.padded = padded and (stride > 1 or into != out)
        self.extra = out - into
        self.downsample = nn.Identity()
        if not padded and (stride > 1 or into != out):
            self.downsample = nn.Sequential(conv(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = (
            F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
            if self.padded
            else self.downsample(x)
        )
        return F.relu(y + short)


class ResNet20(nn.Module):
    """He et al., arXiv 1512.03385, section 4.2: three stages of `depth` blocks; shortcuts by 1 x 1 convolutions, or padded."""

    def __init__(self, *, depth: int = 3, width: int = 8, padded: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, width), nn.BatchNorm2d(width)
        blocks, into = [], width
        for stage in range(3):
            for block in range(depth):
                out = width << stage
                blocks.append(BasicBlock(into, out, 2 if stage and not block else 1, padded))
                into = out
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(into, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Inverted(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * into
        self.layers = nn.Sequential(conv(into, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6(), conv(wide, wide, 3, stride, wide),
                                    nn.BatchNorm2d(wide), nn.ReLU6(), conv(wide, out, 1), nn.BatchNorm2d(out))  # fmt: skip
        self.adds = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNet(nn.Module):
    """Inverted residuals with depthwise convolutions, and a squeeze-and-excitation at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(4, 6, 1), Inverted(6, 6, 1), Inverted(6, 8, 2))
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concatenated(nn.Module):
    """As in DenseNet and U-Net: what was there before is read again, beside what is new; up again by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(9, 6, 2, 2)
        self.norm, self.up = nn.BatchNorm2d(9), nn.ConvTranspose2d(6, 5, 2, 2)
        self.last = nn.Conv2d(5 + 4 + 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.a(x))
        both = self.norm(torch.cat([a, F.silu(self.b(a))], dim=1))
        up = self.up(F.relu(self.down(both)))
        return self.last(torch.cat([up, a, x], dim=1)).mean(dim=(2, 3))


class Grouped(nn.Module):
    """Grouped convolutions and group norms: whole groups leave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.grouped, self.last = nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.Conv2d(8, 6, 1)
        self.slope, self.fc = nn.PReLU(8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.grouped(F.relu(self.norm(self.first(x)))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Gated(nn.Module):
    """An MLP whose hidden layer is split into a value and its gate, with a residual and a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(5, 8)
        self.back = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        value, gate = self.inner(x).chunk(2, dim=-1)
        x = x + self.out(value * torch.sigmoid(gate))
        return self.back(x) + F.linear(x, self.into.weight.t())


class Attention(nn.Module):
    """Queries, keys and values of one layer; heads are counted by the code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, -1))


class ViT(nn.Module):
    """A vision transformer written by hand, with a class token and layer scale."""

    def __init__(self, width: int = 12, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(width), "attention": Attention(width, heads), "norm2": nn.LayerNorm(width),
                           "mlp": nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))})
            for _ in range(depth)
        )  # fmt: skip
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = x + self.scale * block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, seed: int = 0) -> Any:
        """In eval mode, with norms that have seen something."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.3, 3)
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
                    nn.init.uniform_(module.weight, 0.5, 2)
                    nn.init.normal_(module.bias, 0.3, 0.5)
        return model.eval()

    def inputs(self, count: int = 2, seed: int = 1) -> list[Tensor]:
        return [torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))]


PICTURE = (3, 16, 16)
NETS = {
    "conv-stack": Net(ConvStack, PICTURE),
    "resnet-20": Net(ResNet20, PICTURE),
    "resnet-padded": Net(lambda: ResNet20(depth=1, padded=True), PICTURE),
    "mobilenet": Net(MobileNet, PICTURE),
    "concatenated": Net(Concatenated, PICTURE),
    "grouped": Net(Grouped, PICTURE),
    "mlp": Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.SELU(), nn.Linear(7, 3)), (6,)),
    "gated": Net(Gated, (6,)),
    "vit": Net(ViT, PICTURE),
}
