"""Weights of the loss terms of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from domainssl.errors import ConfigError, nearest

__all__ = ["term_weights"]


def term_weights(
    given: dict[str, float] | None,
    method: str,
    terms: Sequence[str] | Mapping[str, float] = ("contrastive", "reconstruction"),
) -> dict[str, float]:
    """Return the weight of every loss term, the usual one where none is given.

    Args:
        given: Weights by term.
        method: Name of the objective, for the message.
        terms: Names of its terms, of weight 1, or their usual weights.

    Raises:
        ConfigError: There is no such term, or a weight is below zero.
    """
    known = dict(terms) if isinstance(terms, Mapping) else dict.fromkeys(terms, 1.0)
    for name, value in (given or {}).items():
        if name not in known:
            raise ConfigError(
                f"model.init_args.loss_weights: unknown term {name!r}.{nearest(name, known)} "
                f"{method} has {list(known)}."
            )
        if value < 0:
            raise ConfigError(
                f"model.init_args.loss_weights.{name}: got {value!r}, expected zero or more."
            )
    return {**known, **(given or {})}
