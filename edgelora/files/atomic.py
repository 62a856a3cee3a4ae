"""Nothing half-written or half-removed ever stands under its final name: write beside, fsync, rename, fsync the folder.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelora.errors import OutputError

REPLACED = "replaced"
STALE = ".stale"
REJECTED = ".rejected"
STAGE_PREFIX = ".edgelora-"
STAGE_NAME = re.compile(re.escape(STAGE_PREFIX) + r"(?P<name>.+)-[a-z0-9_]{8}")  # as tempfile and `remove` draw them
MOST_BYTES = 255 - len(f"{STAGE_PREFIX}{REJECTED}-xxxxxxxx")  # of a name: of the longest beside it, disks take 255


def refuse_existing(path: Path, overwrite: bool = False, *, folder: bool = False) -> None:
    """Raise OutputError if something stands at `path`, or nothing can be made there; ask before the work."""
    with _reached(path):
        parent = _standing(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(
                what=f"{path}: nothing can be made here",
                why=f"{parent} is {'read-only' if parent.is_dir() else 'a file, not a folder'}",
                fix="choose a folder you may write to",
            )
        _refuse_long(path)
        _refuse_other(path, overwrite, folder)


def _refuse_long(path: Path) -> None:
    """Raise OutputError for a name to which no staging could add its own."""
    if (n := len(os.fsencode(path.name))) > MOST_BYTES:
        raise OutputError(
            what=f"{path}: a name of {n} bytes",
            why=f"while it is written, longer ones stand beside it, which leaves it {MOST_BYTES} bytes",
            fix="choose a shorter name",
        )


def _refuse_other(path: Path, overwrite: bool, folder: bool) -> None:
    """Raise OutputError for what stands at `path`, if it may not be replaced by a file or a folder."""
    if path.exists() and not overwrite:
        kind = "folder" if path.is_dir() else "file"
        raise OutputError(
            what=f"{path}: this {kind} exists already",
            why="edgelora does not overwrite what it did not just make",
            fix="choose another name, delete it, or pass --overwrite",
        )
    if path.exists() and path.is_dir() != folder:
        kind = "folder" if path.is_dir() else "file"
        raise OutputError(
            what=f"{path}: this is a {kind}",
            why=f"the result is a {'folder' if folder else 'file'}, and would delete what stands here",
            fix="choose another name",
        )


def _standing(path: Path) -> Path:
    """The nearest folder above `path` that is there. Raises OSError."""
    return next(p for p in path.absolute().parents if p.exists())


@contextmanager
def _reached(path: Path) -> Iterator[None]:
    """Raise OutputError where the system does not say what stands at `path`."""
    try:
        yield
    except OSError as e:
        raise OutputError(
            what=f"{path}: nothing can be made here ({e.strerror})",
            why="a folder on the way to it is closed to you, or a name is too long for the disk",
            fix="choose a folder you may write to, and a shorter name where it is too long",
        ) from e


@contextmanager
def staged(path: Path, *, folder: bool = False, overwrite: bool = False, stale: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it becomes `path` in one step.

    The block creates the file (or fills the folder, which exists when `folder` is true). On any error the
    temporary is removed and `path` is as it was. `stale`: a file on the same disk that is true of the old `path` only,
    and is gone before the new one stands. What killed processes left of `path` is swept first.
    Raises OutputError if `path` exists and `overwrite` is false, or if the folder cannot be written.
    """
    sweep(path.absolute().parent, path.name)  # first: it may put an old folder back
    refuse_existing(path, overwrite, folder=folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room, lock = _own_room(path)
    except OSError as e:
        raise OutputError(
            what=f"{path}: cannot write here ({e.strerror})",
            why="the folder is missing, read-only or full",
            fix="choose a folder you may write to",
        ) from e
    draft = room / path.name
    try:
        if folder:
            draft.mkdir()
        yield draft
        for file in sorted(draft.rglob("*")) if folder else [draft]:
            if file.is_file():
                _fsync(file)
        if folder:
            _fsync(draft)
        with _withdrawn(stale, room / STALE):
            _replace(draft, path, room)
        with contextlib.suppress(OSError):  # it stands there whole already; some disks cannot sync a folder
            _fsync(path.parent)
    except OSError as e:
        raise OutputError(
            what=f"{path}: could not be written ({e.strerror})",
            why="the disk refused; what stood there before is untouched",
            fix="free some space or choose another disk, then run the command again",
        ) from e
    finally:
        if path.exists() or not (room / REPLACED).exists():  # else the only copy of what stood there is in `room`
            shutil.rmtree(room, ignore_errors=True)
        os.close(lock)


def _own_room(path: Path) -> tuple[Path, int]:
    """A folder beside `path` to write in, and the lock on it by which others know that its writer lives."""
    while True:
        room = Path(tempfile.mkdtemp(prefix=f"{STAGE_PREFIX}{path.name}-", dir=path.parent))
        try:
            lock = os.open(room, os.O_RDONLY)
        except FileNotFoundError:  # swept in the instant after it was made
            continue
        with contextlib.suppress(OSError):  # a disk that knows no locks: nobody can sweep there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if room.exists():
            return room, lock
        os.close(lock)  # swept in the instant before it was locked


def _replace(draft: Path, path: Path, room: Path) -> None:
    # a folder cannot be renamed over a full one: move the old one aside first, and back if the second rename fails
    if path.is_dir():
        aside = room / REPLACED
        path.rename(aside)
        try:
            draft.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    else:
        draft.replace(path)


@contextmanager
def _withdrawn(stale: Path | None, aside: Path) -> Iterator[None]:
    """Move `stale` aside, and back if the block fails."""
    if stale is not None and os.path.lexists(stale):
        stale.rename(aside)
    try:
        yield
    except BaseException:
        if stale is not None and os.path.lexists(aside):
            aside.rename(stale)
        raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    with staged(path, overwrite=overwrite) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def share(path: Path) -> None:
    """Let others read `path`, a file in the making, as far as the umask has it: safetensors makes its own private.

    The umask is read off a file made beside it; asking for it would set it, for other threads too. Raises OSError.
    """
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def remove(path: Path) -> None:
    """Remove the file or folder `path`; a kill at any instant leaves it whole or gone. Raises OSError."""
    aside = path.with_name(f"{STAGE_PREFIX}{path.name}-{secrets.token_hex(4)}")  # no new folder: the disk may be full
    path.rename(aside)
    with contextlib.suppress(OSError):  # else the deletions could reach the disk before the rename
        _fsync(path.parent)
    _delete(aside)


def rejected(path: Path) -> Path:
    """Where `set_aside` keeps what must not become `path`."""
    return path.with_name(path.name + REJECTED)


def set_aside(draft: Path, path: Path) -> Path:
    """Keep what must not become `path` as `path` + `.rejected`, in place of an older one; returns where it stands.

    For use in the block of `staged`. Raises OSError.
    """
    aside = rejected(path)
    sweep(aside.absolute().parent, aside.name)
    if os.path.lexists(aside):
        remove(aside)
    draft.rename(aside)
    return aside


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of what they wrote in `folder`, or of `name` there alone; never raises.

    What a living process is writing at this moment is locked, and stays; what one is removing is not: hold the lock of
    what stands there. What was moved aside for a new one that did not come is put back.
    """
    with contextlib.suppress(OSError):
        for room in sorted(folder.iterdir()):
            found = STAGE_NAME.fullmatch(room.name)
            if found and name in (None, found["name"]):
                with contextlib.suppress(OSError), _abandoned(room):  # the others all the same
                    _put_back(room, folder / found["name"])
                    _delete(room)


@contextmanager
def _abandoned(room: Path) -> Iterator[None]:
    """Hold the lock of a room whose writer is dead. Raises OSError if it lives."""
    if not _is_folder(room):  # moved aside to be removed: it has no lock
        yield
        return
    lock = os.open(room, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _put_back(room: Path, path: Path) -> None:
    left = {REPLACED, path.name}  # what `_replace` leaves between its two renames
    if not os.path.lexists(path) and _is_folder(room) and {p.name for p in room.iterdir()} - {STALE} == left:
        (room / REPLACED).rename(path)


def _delete(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_folder(path: Path) -> bool:
    """Whether it is one itself: what a link leads to is not ours."""
    return path.is_dir() and not path.is_symlink()


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise OutputError if the disk under `folder`, which need not exist yet, has less than `needed_bytes` free.

    `what` needs the space, in the plural: "the checkpoints".
    """
    with _reached(folder):
        free_bytes = shutil.disk_usage(_standing(folder / "any")).free
    if free_bytes < needed_bytes:
        raise OutputError(
            what=f"{folder}: {what} need {needed_bytes:,} bytes, and {free_bytes:,} are free",
            why="the disk would be full before the end",
            fix=f"free {needed_bytes - free_bytes:,} bytes or more there, or choose a folder on another disk",
        )
