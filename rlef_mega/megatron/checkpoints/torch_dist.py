"""Files of Megatron's torch_dist format, written without Megatron.

The format is PyTorch's distributed checkpoint (DCP). `*.distcp` files hold chunks of tensors, each
an archive of `torch.save`. The index `.metadata` names every tensor, with its global shape, and
where each chunk of it is stored. Training writes it (`writer`), and so does `rlef import-hf`
(`convert.from_hf`); `state.fill` and `convert.stored_network` read it.
"""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

METADATA = ".metadata"
Locations = dict[MetadataIndex, _StorageInfo]  # where each chunk is
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
FILE_BUFFER = 1 << 20  # bytes; torch writes headers in small pieces


class ChecksummedFile:
    """A new file and the SHA-256 of what was written to it. The checksum is computed from the bytes
    given to `write`, so that it reveals a fault on the way to the disk. Large writes are hashed on
    another thread while the same bytes are written. The error of a failed write is kept until
    `raise_fault`, because an exception in torch's archive writer would end the process.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.file = path.open("wb", buffering=FILE_BUFFER)
        self.checksum, self.hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self.bytes = 0
        self.fault: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hasher.shutdown()
        with suppress(OSError):  # `raise_fault` has reported it
            self.file.close()

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        if len(view) < FILE_BUFFER:
            self.checksum.update(view)
            hashing = None
        else:
            hashing = self.hasher.submit(self.checksum.update, view)
        if self.fault is None:
            try:
                self.file.write(view)
            except OSError as error:
                self.fault = error
        if hashing is not None:
            hashing.result()
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: `to_disk` flushes, once. torch's archive writer asks for this method."""

    def append(self, tensor: torch.Tensor) -> _StorageInfo:
        """Write a tensor as an archive. Returns where it is stored; raises OSError."""
        start = self.bytes
        torch.save(tensor, self)  # type: ignore[arg-type]
        self.raise_fault()
        return _StorageInfo(self.name, start, self.bytes - start)

    def raise_fault(self) -> None:
        if self.fault is not None:
            raise self.fault

    def to_disk(self) -> dict[str, Any]:
        """Flush the file to the disk. Returns its entry in the manifest; raises OSError."""
        self.raise_fault()
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.bytes, "sha256": self.checksum.hexdigest()}


def write_index(folder: Path, metadata: Metadata, stored: Locations) -> list[str]:
    """Write the files that make a folder of chunks a checkpoint of this format. Returns their
    names. `storage_meta` stays empty: it would hold a random number.
    """
    metadata.storage_data, metadata.version = stored, CURRENT_DCP_VERSION
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    torch.save({}, folder / "common.pt")  # nothing is common to all ranks: everything is in chunks
    return [METADATA, "common.pt", "metadata.json"]
