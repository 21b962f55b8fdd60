"""Writing one shard: its tar file, its index, and the record of what went into it."""

import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import NamedTuple

from sgmim_fast.data.members import Member, PairMembers
from sgmim_fast.data.sharding.packing import Content, Packing, encode_pair
from sgmim_fast.data.shards import (
    BLOCK,
    INDEX_VERSION,
    MAX_MEMBER,
    Shard,
    member_name,
    pair_key,
    read_table,
    tar_name,
)
from sgmim_fast.errors import UserError

_SKIPPED_LINE = b'{"skipped": '


class Task(NamedTuple):
    """One shard to be packed."""

    out: Path
    number: int
    pairs: Sequence[PairMembers]
    root: str
    """Where the names in the record start from."""
    packing: Packing
    skip_bad: bool


class Packed(NamedTuple):
    """One shard that has been packed."""

    shard: Shard | None
    """None if all its pairs were bad."""
    skipped: list[bytes]
    """Lines of the record, one a bad pair."""


def pack_pair(members: PairMembers, packing: Packing) -> Content:
    """Read a pair and encode it."""
    image, structure = members
    content = encode_pair(image.read(), None if structure is None else structure.read(), packing)
    if max(len(data) for _, data in content) > MAX_MEMBER:
        raise UserError(f"{image.name}: this pair has a file of 4 GiB or more; make it smaller, or remove the pair")
    return content


def packed_size(content: Content) -> int:
    """Bytes that a pair takes in a tar file."""
    return sum(BLOCK + _padded(len(data)) for _, data in content)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def pack_shard(task: Task) -> Generator[int, None, None]:
    """Write one shard: record, index, tar file. Yields how many of its pairs are done, after each."""
    tar = task.out / tar_name(task.number)
    final = [tar.with_suffix(".jsonl"), tar.with_suffix(".idx"), tar]
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in final}
    index: list[str] = []
    record: list[bytes] = []
    begin = 0
    try:
        with open(temporary[tar], "wb", buffering=1 << 20) as file:
            for done, members in enumerate(task.pairs, start=1):
                names = [None if member is None else _shown(member, task.root) for member in members]
                key = pair_key(task.number, len(index))
                try:
                    content = pack_pair(members, task.packing)
                except UserError as error:
                    if not task.skip_bad:
                        raise UserError(f"{error}; --skip-bad leaves such pairs out") from error
                    line = {"skipped": str(error), "image": names[0], "structure": names[1]}
                    record.append(json.dumps(line).encode() + b"\n")
                    yield done
                    continue
                fields = []
                for place, (suffix, data) in enumerate(content):
                    name = member_name(key, suffix, structure=place == 1)
                    file.write(_header(name, len(data)))
                    file.write(data)
                    file.write(bytes(_padded(len(data)) - len(data)))
                    fields.append(f"{name.partition('.')[2]} {begin + BLOCK} {len(data)} {name}")
                    begin += BLOCK + _padded(len(data))
                index.append(" ".join(fields) + "\n")
                line = {"key": key, "image": names[0], "structure": names[1]}
                record.append(json.dumps(line).encode() + b"\n")
                yield done
            file.write(bytes(2 * BLOCK))  # how a tar file ends
            file.flush()
            os.fsync(file.fileno())
        write_synced(temporary[final[0]], b"".join(record))
        write_synced(temporary[final[1]], f"{INDEX_VERSION} {len(index)}\n{''.join(index)}".encode())
        for path in final if index else final[:1]:  # a shard of nothing but bad pairs has a record only
            os.replace(temporary[path], path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(tar)) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _shown(member: Member, root: str) -> str:
    return member.name.removeprefix(root)


def _header(name: str, size: int) -> bytes:
    """One block; owner and time are left out, so that the same pairs make the same bytes."""
    info = TarInfo(name)
    info.size = size
    return info.tobuf(USTAR_FORMAT)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then move it to its own."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def find_packed(out: Path, number: int) -> Packed | None:
    """What an earlier call made of a shard; None if it is to be packed (again)."""
    tar = out / tar_name(number)
    try:
        record = tar.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
        skipped = [line for line in record if line.startswith(_SKIPPED_LINE)]
        pairs = len(record) - len(skipped)
        if not pairs:
            return Packed(None, skipped)
        table, index_sha256 = read_table(out, tar.name, pairs)
    except (FileNotFoundError, UserError):
        return None
    size = int(table.offsets[-1, -1]) + _padded(int(table.sizes[-1, -1])) + 2 * BLOCK
    return Packed(Shard(tar.name, pairs, size, index_sha256), skipped) if size == tar.stat().st_size else None
