"""What a user waits for before anything happens, against importing Lightning's command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from domainssl.bench.report import Goal, Row, Settings, ratio, timed

__all__ = ["measure"]

_COMMANDS = {
    "import domainssl": ("-c", "import domainssl"),
    "python -m domainssl --help": ("-m", "domainssl", "--help"),
    "python -m domainssl fit --help": ("-m", "domainssl", "fit", "--help"),
}
_OTHER = ("-c", "import lightning.pytorch.cli")


def measure(settings: Settings) -> Iterator[Row]:
    """Yield, per command, its time over that of `import lightning.pytorch.cli`."""
    rounds = settings.pick(5, 1, settings.rounds)
    sides = {**_COMMANDS, "other": _OTHER}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, words in sides.items():
            time = timed(lambda words=words: _run(words))  # type: ignore[misc]
            if turn:  # the first one brings the files into the page cache
                seconds[name].append(time)
    for name in _COMMANDS:
        yield ratio(
            "startup",
            f"{name} / import lightning.pytorch.cli, time",
            list(zip(seconds["other"], seconds[name], strict=True)),
            Goal("at most", 1.0),
            "a new interpreter each time",
            ("lightning", "ours"),
        )


def _run(words: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
