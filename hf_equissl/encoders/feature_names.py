"""Which features of an encoder can be asked for; known without torch, for the help of commands."""

from __future__ import annotations

# (B, 4 D): the CLS tokens of the last four blocks; (B, 5 D): these and the mean patch of the last one.
BLOCK_FEATURES = ("cls_4", "cls_4_patches")
# Names of features, each (B, .). "backbone" is [CLS ; mean patch] after the final norm, "invariant" and "equivariant"
# that of a slice, of which the names that follow are the halves.
FEATURES = (
    *("cls", "patches", "backbone", *BLOCK_FEATURES, "stem", "invariant", "equivariant"),
    *(f"{part}_{row}" for part in ("invariant", "equivariant") for row in ("cls", "patches")),
)
# All patch tokens after the final norm, (B, N, D): for extraction, not for probes.
PATCH_TOKENS = "patch_tokens"
