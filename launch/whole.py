"""Checkpoint files that are whole or absent, whenever the process ends and however full the disk is."""

from __future__ import annotations

import io
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning_fabric.plugins.io import TorchCheckpointIO


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: ``Trainer(plugins=[WholeCheckpointIO()])``; ``kfac-dist fit`` adds it.

    Lightning writes to the folder of temporary files and moves the result. Where that folder lies on another disk, as
    on most clusters, to move is to copy: a process that is killed meanwhile leaves a torn checkpoint in place of the
    last one. Remote folders (``s3://..``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the checkpoint, or leave what was there.

        Raises:
            OSError: it could not be written; the message names the file and says what became of the last one.
        """
        if get_protocol(str(path)) != "file" or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(str(path).removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not a name that Lightning could take for a checkpoint, and of its own: others may save in this folder.
        unfinished = target.parent / f".unfinished-{uuid.uuid4().hex}"
        # Pickled first: torch reports a disk that is full as a RuntimeError about positions in the file.
        pickled = io.BytesIO()
        torch.save(checkpoint, pickled)
        try:
            with unfinished.open("xb") as file:
                file.write(pickled.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        except OSError as error:
            last = "the last checkpoint of that name is untouched" if target.exists() else "there is none of that name"
            message = f"the checkpoint {target} could not be saved: {error.strerror}; {last}"
            raise OSError(error.errno, message) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: the file is torn, or no checkpoint.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            if get_protocol(str(path)) != "file" or zipfile.is_zipfile(str(path).removeprefix("file://")):
                raise
            raise ValueError(
                f"{path} is no whole checkpoint: it was cut off, or is another kind of file; resume from an earlier one"
            ) from error
