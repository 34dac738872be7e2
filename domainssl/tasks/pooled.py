"""Heads that give one prediction per item: over pooled features, or over tokens with attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import present_mask

__all__ = ["AttentivePool", "GatedPool", "ItemHead", "PooledHead"]

_KINDS = ("linear", "mlp", "attentive", "gated")


@dataclass(frozen=True, kw_only=True)
class PooledHead:
    """How features become one prediction per item.

    Attributes:
        kind: `linear` and `mlp` read the pooled features. `attentive` lets a learned query look at
            the tokens. `gated` is the gated attention of multiple-instance learning, for bags of
            tiles (Ilse et al. 2018).
        features: Which features are read: a modality, `joint`, or None for all that the backbone
            has, whose predictions are averaged over those that an item has.
        hidden: Width between features and prediction, of `mlp` and of the two attentions.
        dropout: Share of the features that is dropped in training.

    Raises:
        ConfigError: A value lies outside its range.
    """

    kind: Literal["linear", "mlp", "attentive", "gated"] = "linear"
    features: str | None = None
    hidden: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(
                f"model.init_args.head.kind: got {self.kind!r}, expected one of {_KINDS}."
                f"{nearest(self.kind, _KINDS)}"
            )
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"model.init_args.head: got hidden {self.hidden!r} and dropout {self.dropout!r}, "
                "expected a width of 1 or more and a share in [0, 1)."
            )


class AttentivePool(nn.Module):
    """A learned query attends to the tokens: one head of attention, softmax over valid ones.

    Args:
        width: Of the tokens.
        hidden: Of keys.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, hidden)
        self.query = nn.Parameter(torch.randn(hidden) * hidden**-0.5)

    def scores(self, tokens: Tensor) -> Tensor:
        """Return how much a token counts before the softmax, (B, N)."""
        return self.key(tokens).float() @ self.query.float()

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of the tokens and the weights.

        Args:
            tokens: (B, N, E).
            valid: bool (B, N); True where a token counts. An item without one gives zeros.

        Returns:
            Means (B, E) and weights float32 (B, N), which sum to 1.
        """
        scores = self.scores(tokens).masked_fill(~valid, -torch.inf)
        scores = torch.where(valid.any(1, keepdim=True), scores, torch.zeros_like(scores))
        weights = scores.softmax(1) * valid
        return torch.einsum("bn,bne->be", weights, tokens.float()), weights


class GatedPool(AttentivePool):
    """Gated attention over a bag: `softmax(w^T (tanh(V h) * sigmoid(U h)))`.

    Source: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", 2018, eq. 9.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.gate = nn.Linear(width, hidden)

    def scores(self, tokens: Tensor) -> Tensor:
        """Return how much a token counts before the softmax, (B, N)."""
        hidden = torch.tanh(self.key(tokens)) * torch.sigmoid(self.gate(tokens))
        return hidden.float() @ self.query.float()


class _NameHead(nn.Module):
    """The head over the features of one name."""

    def __init__(self, options: PooledHead, width: int, outputs: int) -> None:
        super().__init__()
        self.pool: AttentivePool | None = None
        if options.kind in ("attentive", "gated"):
            pool = GatedPool if options.kind == "gated" else AttentivePool
            self.pool = pool(width, options.hidden)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(options.dropout)
        self.inner: nn.Module = nn.Identity()
        if options.kind == "mlp":
            self.inner = nn.Sequential(nn.Linear(width, options.hidden), nn.GELU())
            width = options.hidden
        self.out = nn.Linear(width, outputs)

    def forward(self, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, K), and the weights of the tokens where there is attention."""
        weights = None
        if self.pool is not None:
            assert valid is not None
            values, weights = self.pool(self.norm(values), valid)
        else:
            values = self.norm(values)
        return self.out(self.inner(self.drop(values))).float(), weights


class ItemHead(nn.Module):
    """Predict from the features of several names: the mean over those that an item has.

    Args:
        options: See `PooledHead`.
        backbone: Whose features they are.
        outputs: Numbers per item.

    Raises:
        ConfigError: The backbone has no features of the name.
    """

    def __init__(self, options: PooledHead, backbone: Backbone, outputs: int) -> None:
        super().__init__()
        widths = backbone.embed_dim
        if options.features is not None and options.features not in widths:
            raise ConfigError(
                f"model.init_args.head.features: got {options.features!r}, but "
                f"{type(backbone).__name__} has {', '.join(widths)}."
                f"{nearest(options.features, widths)}"
            )
        names = [options.features] if options.features is not None else list(widths)
        self.reads_tokens = options.kind in ("attentive", "gated")
        self.names = nn.ModuleDict({n: _NameHead(options, widths[n], outputs) for n in names})

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what is trained by one modality alone."""
        if name in self.names:
            yield from self.names[name].parameters()

    def forward(self, features: Features, batch: Mapping[str, Any]) -> Tensor:
        """Return logits, float32 (B, K); see `with_weights`."""
        return self.with_weights(features, batch)[0]

    def with_weights(
        self, features: Features, batch: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and how much every token counted.

        Args:
            features: Of the backbone.
            batch: Says which items have which modality.

        Returns:
            Logits float32 (B, K), and weights float32 (B, N) by name, where there is attention.

        Raises:
            DataError: The batch has none of the names.
        """
        values = features.tokens if self.reads_tokens else features.pooled
        total, count, weights = None, None, {}
        for name, head in self.names.items():
            if name not in values:
                continue
            valid = features.token_valid.get(name)
            if valid is None and self.reads_tokens:
                valid = values[name].new_ones(values[name].shape[:2], dtype=torch.bool)
            there = _there(name, values[name], valid, batch)
            logits, found = head(values[name], valid)
            if found is not None:
                weights[name] = found
            counted = there.to(logits.dtype).unsqueeze(1)
            total = logits * counted if total is None else total + logits * counted
            count = counted if count is None else count + counted
        if total is None or count is None:
            raise DataError(
                f"The head reads features of {', '.join(self.names)}, of which the batch has none; "
                f"it has {', '.join(values) or 'nothing'}. Add a modality, or set "
                "model.init_args.head.features: null."
            )
        return total / count.clamp(min=1), weights


def _there(name: str, values: Tensor, valid: Tensor | None, batch: Mapping[str, Any]) -> Tensor:
    """Return which items have something of a name, bool (B,)."""
    there = torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    if name in batch:
        there = present_mask(batch, name)
    return there if valid is None else there & valid.any(1)
