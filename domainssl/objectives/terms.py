"""Weights of the loss terms of objectives."""

from __future__ import annotations

from collections.abc import Sequence

from domainssl.errors import ConfigError, nearest

__all__ = ["term_weights"]


def term_weights(
    given: dict[str, float] | None,
    method: str,
    terms: Sequence[str] = ("contrastive", "reconstruction"),
) -> dict[str, float]:
    """Return the weight of every loss term, 1 where none is given.

    Args:
        given: Weights by term.
        method: Name of the objective, for the message.
        terms: Names of its terms.

    Raises:
        ConfigError: There is no such term.
    """
    known = dict.fromkeys(terms, 1.0)
    for name in given or {}:
        if name not in known:
            raise ConfigError(
                f"model.init_args.loss_weights: unknown term {name!r}.{nearest(name, known)} "
                f"{method} has {list(known)}."
            )
    return {**known, **(given or {})}
