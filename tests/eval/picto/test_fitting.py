"""Training that is interrupted goes on where it was."""

import contextlib

import torch
from torch import nn

from vlm_fix.eval.picto import fitting, train


def fit(out, steps, stop=None):
    torch.manual_seed(0)
    net, seen = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), []

    def loss_of(step):
        if step == stop:
            raise KeyboardInterrupt
        seen.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return net(x).square().sum(), {"loss": 1.0}

    with contextlib.suppress(KeyboardInterrupt):
        fitting.fit("stage", [net], loss_of, steps, 1e-2, out, lambda: None, save_every=-1)
    return seen, [p.detach().clone() for p in net.parameters()]


def test_an_interrupted_stage_goes_on_and_nothing_but_tensors_is_read(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert fit(tmp_path / "a", 6, stop=3)[0] == [0, 1, 2]
    assert not train.done(tmp_path / "a", "stage", 6)
    seen, resumed = fit(tmp_path / "a", 6)
    _, whole = fit(tmp_path / "b", 6)
    assert seen == [3, 4, 5] and all(map(torch.equal, resumed, whole))
    assert train.done(tmp_path / "a", "stage", 6)
