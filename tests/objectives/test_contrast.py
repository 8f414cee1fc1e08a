from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_equissl.objectives.contrast import contrast, info_nce


def test_keys_of_info_nce_get_no_gradient():
    rows = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    contrast(*rows, 0.3, "info_nce")[0].backward()
    by_hand = rows.detach().clone().requires_grad_(True)
    first, second = by_hand
    keys = F.normalize(rows.detach(), dim=-1)
    (info_nce(first, keys[1], 0.3)[0] + info_nce(second, keys[0], 0.3)[0]).backward()
    torch.testing.assert_close(rows.grad, by_hand.grad)
    assert rows.grad.abs().min() > 1e-4
