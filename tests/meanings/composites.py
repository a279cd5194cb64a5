"""Operators that consist of others, which may give back what they were given; what reads tensors by no operator."""

import io
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from meanings.base import written


def channels(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


@written("PicklesItsNormBetween")
def _(self, x, y):
    saved = pickle.loads(pickle.dumps(self.bn))
    return F.relu(y) + channels(saved.running_mean)


@written("SavesItsNormBetween")
def _(self, x, y):
    file = io.BytesIO()
    torch.save(nn.Sequential(self.bn), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    return F.silu(y) * channels(saved[0].running_var)


@written("CallsWhatConsistsOfOthers")
def _(self, x, y):
    a = F.relu(y.to(x.dtype).double().cpu().type_as(x).flatten(2, 2).to(x.device))
    z = self.features[1](x).resolve_conj().resolve_neg().real.positive()
    b = F.relu(z) * z.is_floating_point() * (not z.is_complex())
    w = F.feature_alpha_dropout(self.bn(x * 2), 0.0, True)
    c = F.relu(F.alpha_dropout(F.dropout3d(F.dropout2d(w, 0.0), 0.3, False), 0.0))
    d = F.selu(self.bn(x)) + F.celu(self.bn(x), 0.5) + F.logsigmoid(self.bn(x))
    return a + b + c + d + F.relu(torch.atleast_3d(self.bn(x))) + F.pairwise_distance(self.bn(x), x, keepdim=True)


@written("ChangesWhatWasGivenBack")
def _(self, x, y):
    a = self.features[1](x).contiguous()
    b = a.to(x)
    assert b is a
    b.mul_(2)
    c = self.bn(x)
    d = c.to(x.dtype)
    d += x
    return F.relu(y.double()) + F.relu(a) + b + c + F.relu(d)


@written("HooksWhatWasGivenBack")
def _(self, x, y):
    z, w = y.double(), self.features[1](x)
    s = w.to(x.dtype) + x
    if z.requires_grad:
        z.register_hook(lambda g: g * 3)
        w.register_hook(lambda g: g * 2)
    return F.relu(y) + F.silu(s) + F.relu(s.double())


@written("NormalizesItWithTheSameStatistics")
def _(self, x, y):
    norm = self.features[1]
    with torch.no_grad():  # PyTorch keeps running statistics for its gradient
        z = norm(x)
        z = F.batch_norm(z, norm.running_mean, norm.running_var, training=self.training)
        z = F.instance_norm(norm(z), norm.running_mean, norm.running_var, use_input_stats=True)
    return F.relu(y) + z


@written("DropsAPartOfIt")
def _(self, x, y):
    z = F.dropout(y, 0.5 if self.training else 0.0, True)
    w = F.dropout2d(self.features[1](x), 0.2, self.training)
    v = F.dropout(self.bn(x), 0.0, True, inplace=True)
    return F.relu(z) + F.relu(w) + F.relu(v) + torch.rand((), dtype=x.dtype)
