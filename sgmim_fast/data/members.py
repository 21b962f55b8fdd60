"""Where the bytes of images and maps are: whole files, or parts of the tar files of a sharded data set."""

import os
from typing import NamedTuple, Protocol

from sgmim_fast.errors import UserError


class Encoded(NamedTuple):
    """A file's content, not decoded yet."""

    name: str
    """What messages call it; its suffix tells arrays (.npy) from pictures."""
    data: bytes


class Member(NamedTuple):
    """One image or one map, by where its bytes are."""

    path: str
    """The file to open."""
    size: int | None = None
    """Bytes it must have; None where nobody has counted them."""
    offset: int | None = None
    """First byte in a shard; None for a whole file."""
    inner: str = ""
    """Name within the shard."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path if self.offset is None else f"{self.path}:{self.inner}"

    def read(self) -> Encoded:
        """All its bytes.

        Raises:
            UserError: if the file is missing, unreadable, empty, or has another size than it must have.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.offset is None:
                    size = os.fstat(file.fileno()).st_size
                    self._check_size(size)
                    data = file.read()
                else:
                    assert self.size is not None, "a part of a file has a size"
                    data = os.pread(file.fileno(), self.size, self.offset)
                    self._check_size(len(data))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path}: the file does not exist; restore it, or remove it from the data set"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.name}: cannot be read ({error.strerror}); check the disk and permissions"
            ) from error
        return Encoded(self.name, data)

    def _check_size(self, size: int) -> None:
        if size == 0:
            raise UserError(f"{self.name}: cannot be read (the file is empty); replace it, or remove the pair")
        if self.size is not None and size != self.size:
            raise UserError(
                f"{self.name}: has {size} bytes, but {self.size} when the data set was verified or packed; "
                "restore it, or verify again"
            )


PairMembers = tuple[Member, Member | None]


class Pairs(Protocol):
    """A data set: image and map of each dataset index, whatever holds them."""

    @property
    def sha256(self) -> str:
        """Fingerprint of the list of pairs, their order included."""

    @property
    def shard_sizes(self) -> tuple[int, ...] | None:
        """Pairs in each shard, in the order of their indices; None where every pair is a file of its own."""

    def __len__(self) -> int: ...

    def members(self, index: int) -> PairMembers:
        """The image and the map of one pair; the map is None where the data set was opened without maps."""
