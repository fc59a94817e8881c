"""Opening what may be compressed, and reading text line by line with its line numbers."""
from __future__ import annotations

import contextlib
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FilePath = str | os.PathLike[str]

__all__ = ["FilePath", "LineError", "TraceError", "lines", "open_input", "open_output", "output_path"]


class TraceError(Exception):
    """A history or a recording cannot be used.

    Attributes
    ----------
    path : str
        The file.
    reason : str
        What is wrong with it.
    line : int or None
        The line, counted from 1, if it is a text.
    """

    def __init__(self, path: FilePath, reason: str, line: int | None = None) -> None:
        self.path, self.reason, self.line = os.fspath(path), reason, line
        where = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{where}: {reason}")


class LineError(ValueError):
    """A reader cannot make sense of a line; whoever knows the file and number makes it a TraceError."""


# What the decompressors raise on foreign, damaged and truncated input.
_DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


def _zstandard(path):
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise TraceError(path, "reading and writing .zst needs the package zstandard") from None
    return zstandard


class _Checked(io.RawIOBase):
    """A byte stream whose every failure is a TraceError that names the file."""

    def __init__(self, stream, path, plain):
        self._stream, self._path, self.plain = stream, path, plain

    def readable(self):
        return True

    def read(self, size=-1):
        try:
            return self._stream.read(size)
        except _DAMAGE as error:
            raise TraceError(self._path, f"damaged or truncated: {error}") from None
        except OSError as error:
            raise TraceError(self._path, error.strerror or str(error)) from None
        except Exception as error:  # zstandard's own error class exists only if the package does
            if type(error).__module__.partition(".")[0] != "zstandard":
                raise
            raise TraceError(self._path, f"damaged or truncated: {error}") from None

    def close(self):
        self._stream.close()
        super().close()


class _Frames:
    """Reads Zstandard frames; the package's own reader takes a truncated one for the end."""

    def __init__(self, zstandard, file):
        self._zstandard, self._file = zstandard, file
        self._frame, self._input, self._output = None, b"", b""

    def read(self, size=-1):
        while size < 0 or len(self._output) < size:
            self._input = self._input or self._file.read(1 << 11)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                break
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            self._output += self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = len(self._output) if size < 0 else size
        data, self._output = self._output[:size], self._output[size:]
        return data

    def close(self):
        self._file.close()


def open_input(path: FilePath) -> _Checked:
    """Open `path` for reading bytes, decompressed by its suffix; every error is a TraceError."""
    path = Path(path)
    try:
        if path.suffix == ".xz":
            return _Checked(lzma.open(path), path, False)
        if path.suffix == ".gz":
            return _Checked(gzip.open(path), path, False)
        if path.suffix == ".zst":
            return _Checked(_Frames(_zstandard(path), open(path, "rb")), path, False)
        return _Checked(open(path, "rb"), path, True)
    except OSError as error:
        raise TraceError(path, error.strerror or str(error)) from None
    except ValueError as error:  # a null character in the name
        raise TraceError(str(path), str(error)) from None


def output_path(path: FilePath) -> Path:
    """The file that writing to `path` makes or replaces: symbolic links are followed, devices left alone.

    Raises OSError, with `path` as its filename, or TraceError if what compresses it is missing.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_file() and not target.is_symlink()):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    if not target.parent.is_dir():
        raise OSError(errno.ENOENT, "no such directory", os.fspath(path))
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "may not write in its directory", os.fspath(path))
    if path.suffix == ".zst":
        _zstandard(path)
    return target


@contextlib.contextmanager
def open_output(path: FilePath) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes, compressed by its suffix; errors are OSErrors."""
    path = Path(path)
    stream: Any
    if path.suffix == ".xz":
        stream = lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME)
    elif path.suffix == ".gz":
        stream = gzip.open(path, "wb")
    elif path.suffix == ".zst":
        stream = _zstandard(path).open(path, "wb")
    else:
        stream = open(path, "wb")
    with stream:
        yield stream


# No line of a recording is longer, save one that is none: execve's arguments are abbreviated.
LINE_LIMIT = 1 << 20


def lines(path: FilePath) -> Iterator[tuple[int, str]]:
    """Yield ``(number, line)`` of a text, plain or compressed, without its line ends.

    Bytes that are not UTF-8 become surrogates, so that any input can be looked at.
    """
    number, rest = 0, b""
    with open_input(path) as stream:
        while data := stream.read(1 << 18):
            rest += data
            if len(rest) > LINE_LIMIT and b"\n" not in data:
                raise TraceError(path, "the line has no end", number + 1)
            complete, newline, rest = rest.rpartition(b"\n")
            if newline:
                for line in complete.decode("utf-8", "surrogateescape").split("\n"):
                    number += 1
                    yield number, line
        if rest:
            yield number + 1, rest.decode("utf-8", "surrogateescape")
