"""Running statistics, parameters and settings that are read or changed in between."""

import contextlib
import threading

import torch
import torch.nn.functional as F

from meanings.base import Layers, case, written


@written("ReadsItsStatistics")
def _(self, x, y):
    mean = self.bn.running_mean.clone()
    state = {k: v.clone() for k, v in self.bn.state_dict().items()}
    return F.relu(y) + mean.view(1, -1, 1, 1) + state["running_var"].view(1, -1, 1, 1)


@written("ChangesItsParametersBetween")
def _(self, x, y):
    before = self.bn.weight.detach().clone()
    y = y.detach()
    z = self.bn(x)
    with torch.no_grad():
        self.bn.weight.mul_(2)
    z = F.relu(z.detach() + y)
    with torch.no_grad():
        self.bn.weight.copy_(before)
    return z


@written("ChangesItsMomentumAndModeBetween")
def _(self, x, y):
    training, self.bn.momentum = self.bn.training, 0.5
    self.bn.eval()
    z = F.relu(y)
    self.bn.train(training)
    self.bn.momentum = 0.1
    return z


@written("ReplacesItsStatisticsBetween")
def _(self, x, y):
    self.bn.running_mean = self.bn.running_mean.clone()
    return F.relu(y)


@written("ResetsItsStatisticsBetween")
def _(self, x, y):
    with torch.no_grad():  # PyTorch keeps running statistics for its gradient
        y = self.bn(x)
        if self.training:
            self.bn.reset_running_stats()
        return F.relu(y) + self.bn.running_mean.mean()


@case()
class CallsANormTwice(Layers):
    def forward(self, x):
        a, b = self.bn(x), self.bn(2 * x)
        return F.relu(b) + F.relu(a) + self.bn(self.bn(x))


@case()
class SharesStatistics(Layers):
    def __init__(self) -> None:
        super().__init__()
        other = self.features[1]
        other.running_mean, other.running_var = self.bn.running_mean, self.bn.running_var

    def forward(self, x):
        a = self.bn(x)
        b = F.relu(self.features[1](x * 3))
        return F.relu(a) + b


@written("DropsIt")
def _(self, x, y):
    del y
    return F.relu(self.features[1](x)) * self.bn.running_mean.view(1, -1, 1, 1)


@written("FailsBetween")
def _(self, x, y):
    with contextlib.suppress(RuntimeError):
        y + x[:, :3]
    with contextlib.suppress(TypeError):
        F.relu(y, 1, 2)
    return F.relu(y)


@written("UsesItByChance")
def _(self, x, y):
    return F.relu(y) if torch.rand(()) > 0.5 else y * 2


@case()
class HasASchedule(Layers):
    warm = False

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.warm = not self.warm
        return F.relu(y) if self.warm else torch.sigmoid(y)


@written("ChangesItsLayout")
def _(self, x, y):
    z = y.contiguous(memory_format=torch.channels_last)
    return F.relu(z) + F.relu(self.features[1](z)) * y.stride(0) + y.is_contiguous()


@written("SplitsAndTransposes")
def _(self, x, y):
    a, b = y.chunk(2, 1)
    z = self.features[1](x.transpose(2, 3))
    return F.relu(torch.cat([b, a], 1)) + F.relu(z) + z.stride(3)


@written("ComparesAndIndexes")
def _(self, x, y):
    return F.relu(y)[(y > 0).any(0, keepdim=True).expand_as(y)] if y.sum() > -1e9 and len(y) else y


@written("RunsInAnotherThread")
def _(self, x, y):
    found = []
    enabled = torch.is_grad_enabled()

    def work() -> None:
        with torch.set_grad_enabled(enabled):
            found.append(F.relu(y))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0] + y
