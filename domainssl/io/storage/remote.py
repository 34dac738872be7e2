"""Files behind fsspec URLs, over connections that fail now and then.

Every request is repeated a bounded number of times with growing pauses, and an answer of the wrong
length is no answer. What stays away after that is an error that says how often it was tried.
"""

from __future__ import annotations

import io
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO, TypeVar, cast

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.storage.http_ranges import http_ranges, http_whole

__all__ = ["Remote", "Retry", "StoreError"]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_BUFFER = 2**16
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_ABSENT = (404, 410)
_STATUS = (408, 425, 429)  # of the 4xx, those that may pass; of the others all 5xx
_CLIENTS = ("aiohttp", "botocore", "gcsfs", "urllib3", "requests", "azure")


class StoreError(DataError):
    """A store did not answer, although it was asked several times."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often, and after which pauses, a failed request is repeated.

    Attributes:
        attempts: Requests in all.
        first_wait_s: Pause after the first failure.
        factor: How much longer every further pause is.
        longest_wait_s: Limit of a pause.
        timeout_s: How long one request may go without an answer; clients of asynchronous file
            systems (HTTP, S3, Google, Azure) are ended then.
    """

    attempts: int = 5
    first_wait_s: float = 0.5
    factor: float = 2.0
    longest_wait_s: float = 30.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        numbers = [getattr(self, field.name) for field in fields(self)]
        is_number = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if not is_number or not isinstance(self.attempts, int) or self.attempts < 1 or (
            self.first_wait_s < 0 or self.factor < 1 or self.longest_wait_s < 0
            or self.timeout_s <= 0
        ):  # fmt: skip
            raise ConfigError(
                f"data.init_args.storage_options.retry: got {self}, expected attempts >= 1, "
                "factor >= 1, pauses of at least 0 seconds and a time-out above 0."
            )

    @classmethod
    def of(cls, value: Retry | Mapping[str, Any] | None) -> Retry:
        """Return a policy from its arguments; None means the usual one."""
        if isinstance(value, Retry):
            return value
        names = [field.name for field in fields(cls)]
        for name in value or {}:
            if not isinstance(value, Mapping) or name not in names:
                raise ConfigError(
                    f"data.init_args.storage_options.retry: unknown entry {name!r}, known are "
                    f"{', '.join(names)}.{nearest(name, names)}"
                )
        return cls(**dict(value or {}))

    def waits(self) -> Iterator[float]:
        """Yield the pauses between the attempts, each shortened by chance to between 1/2 and 1.

        Workers that failed together do not come back together.
        """
        wait = self.first_wait_s
        for _ in range(self.attempts - 1):
            yield min(wait, self.longest_wait_s) * random.SystemRandom().uniform(0.5, 1.0)
            wait *= self.factor

    def call(self, action: Callable[[], _T], what: str) -> _T:
        """Return the result of `action`, asking again while it fails for a passing reason.

        Args:
            action: One request.
            what: What is asked for, for messages.

        Raises:
            StoreError: It failed every time, or for a reason that does not pass.
            FileNotFoundError: There is nothing there.
        """
        waits = self.waits()
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except IsADirectoryError:
                raise
            except Exception as failure:
                error = _reason(failure)
                if isinstance(error, FileNotFoundError):
                    raise
                if not _is_of_the_store(error):
                    raise
                if not _may_pass(error):
                    raise StoreError(f"{what}: refused by the store ({_words(error)})") from error
                wait = next(waits, None)
                if wait is None:
                    raise StoreError(
                        f"{what}: no answer in {attempt} attempts; the last one failed with "
                        f"{_words(error)}. The store or the network is down or overloaded: try "
                        "again later (fit --auto_resume goes on where the run ended), copy the "
                        "files to a local disk, or allow more with "
                        "data.init_args.storage_options.retry."
                    ) from error
                logger.warning(
                    "%s: attempt %d of %d failed (%s); next in %.1f s",
                    what, attempt, self.attempts, _words(error), wait,
                )  # fmt: skip
                time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")


class _ShortAnswerError(OSError):
    """Fewer or more bytes came than were asked for."""


def _status(error: BaseException) -> int | None:
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    return None


def _reason(error: Exception) -> Exception:
    """Return why a request failed: file systems call any failure a missing file.

    The answer of the server is then the cause of the error; only 404 and 410 say that there is no
    such file.
    """
    if not isinstance(error, FileNotFoundError):
        return error
    cause = error.__cause__
    while isinstance(cause, FileNotFoundError):
        cause = cause.__cause__
    if not isinstance(cause, Exception) or _status(cause) in _ABSENT:
        return error
    return cause if _is_of_the_store(cause) else error


def _is_of_the_store(error: Exception) -> bool:
    root = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError) or root in _CLIENTS or _status(error) is not None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in _STATUS
    return not isinstance(error, _PERMANENT)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Remote:
    """One path of an fsspec file system.

    Args:
        url: The address.
        options: fsspec options; `retry` among them is ours (a `Retry` or its arguments).

    Raises:
        DataError: There is no file system for this kind of address.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        import fsspec

        rest = dict(options or {})
        self.url = url
        self.retry = Retry.of(rest.pop("retry", None))
        try:
            self._fs, inner = self.retry.call(lambda: fsspec.core.url_to_fs(url, **rest), url)
        except (ImportError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{url}: no file system for this kind of URL ({error})") from error
        self._path = str(inner)
        names = self._fs.protocol
        self._is_http = "http" in ((names,) if isinstance(names, str) else names)

    def _ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        """Call a method of the file system, for `timeout_s` seconds where it can be ended."""
        from fsspec.asyn import AsyncFileSystem, sync

        method = getattr(self._fs, f"_{name}", None)
        if isinstance(self._fs, AsyncFileSystem) and method is not None:
            limit = self.retry.timeout_s
            return sync(self._fs.loop, method, *arguments, timeout=limit, **more)
        return getattr(self._fs, name)(*arguments, **more)

    def _is(self, kind: str) -> bool:
        def asked() -> bool:
            try:
                facts = self._ask("info", self._path)
            except FileNotFoundError as error:
                if _reason(error) is not error:
                    raise
                # a prefix of an object store may have no entry of its own
                return kind == "directory" and not self._is_http and self._ask("isdir", self._path)
            if not self._is_http:
                return bool(facts["type"] == kind)
            # over HTTP everything is a file, and a listing is a page of links
            is_page = facts.get("mimetype") == "text/html"
            is_listing = is_page and self._ask("isdir", self._path)
            return bool(is_listing) == (kind == "directory")

        return self.retry.call(asked, self.url)

    def is_folder(self) -> bool:
        """Return whether a folder lies there."""
        return self._is("directory")

    def is_file(self) -> bool:
        """Return whether a file lies there."""
        return self._is("file")

    def size(self) -> int:
        """Return the size of the file in bytes."""

        def asked() -> int:
            size = self._ask("info", self._path).get("size")
            if size is None:
                raise DataError(f"{self.url}: the store does not say how large the file is")
            return int(size)

        return self.retry.call(asked, self.url)

    def names(self) -> list[str]:
        """Return the sorted names in the folder."""
        found = self.retry.call(lambda: self._ask("ls", self._path, detail=False), self.url)
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if name)

    def find(self) -> list[str]:
        """Return the relative paths of all files below the folder."""
        inner = self._path.rstrip("/")
        found = self.retry.call(lambda: self._ask("find", inner), self.url)
        return [str(path)[len(inner) :].lstrip("/") for path in found]

    def content(self, limit: int) -> bytes:
        """Return the whole file; over HTTP, no more than `limit` bytes are received.

        Raises:
            DataError: A server sends more.
        """

        def asked() -> bytes:
            if self._is_http:
                return cast(bytes, self._sync(http_whole, self._fs, self._path, limit))
            return cast(bytes, self._ask("cat_file", self._path))

        return self.retry.call(asked, self.url)

    def _sync(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run a request of our own in the loop of the file system, for `timeout_s` seconds."""
        from fsspec.asyn import sync

        return sync(self._fs.loop, action, *arguments, timeout=self.retry.timeout_s)

    def part(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset` on."""
        [data] = self.parts([(offset, size)])
        return data

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several (offset, size) ranges, fetched side by side; repeats only what failed."""
        done: dict[int, bytes] = {}

        def asked() -> None:
            open_ = [i for i in range(len(ranges)) if i not in done]
            failed: list[Exception] = []
            answers = self._answers([ranges[i] for i in open_])
            for i, answer in zip(open_, answers, strict=True):
                try:
                    if isinstance(answer, Exception):
                        raise answer
                    done[i] = self._complete(bytes(answer), *ranges[i])
                except Exception as error:
                    failed.append(error)
            if failed:
                raise failed[0]

        self.retry.call(asked, self.url)
        return [done[i] for i in range(len(ranges))]

    def _answers(self, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | Exception]:
        if self._is_http:
            found: list[bytes | Exception] = self._sync(http_ranges, self._fs, self._path, ranges)
            return found
        starts, ends = [offset for offset, _ in ranges], [sum(each) for each in ranges]
        paths = [self._path] * len(ranges)
        answers: Sequence[bytes | Exception] = self._ask(
            "cat_ranges", paths, starts, ends, on_error="return"
        )
        return answers

    def _complete(self, data: bytes, offset: int, size: int) -> bytes:
        if len(data) == size:
            return data
        text = f"{len(data)} bytes at offset {offset} where {size} belong"
        whole = self._ask("info", self._path).get("size")
        if whole is not None and offset + size > whole:
            raise DataError(f"{self.url}: truncated, {text}; the file has {whole} bytes in all")
        raise _ShortAnswerError(text)

    def open(self) -> BinaryIO:
        """Return the file for reading; only the byte ranges that are read are fetched."""
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(self, self.size()), _BUFFER))


class _RemoteFile(io.RawIOBase):
    """A file whose reads are requests of their own."""

    def __init__(self, remote: Remote, size: int) -> None:
        self._remote, self._size, self._at = remote, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "seek before the start of the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._at))
        if wanted:
            buffer[:wanted] = self._remote.part(self._at, wanted)
            self._at += wanted
        return wanted
