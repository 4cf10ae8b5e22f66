"""What may happen to an output folder: decided before any work, so that no run ends unable to save."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def require_writable(output_dir: str, argument: str = "--output_dir") -> None:
    """Creates the folder if need be and writes a file into it.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"{argument} must be a folder that can be written, got {output_dir!r}: {error}") from error


def missing_part(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be resumed from, or None. `Trainer` writes its state last, weights first."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"a readable trainer_state.json ({error})"
    for weights in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="np"):  # compares the header with the length of the file
                pass
        except (OSError, SafetensorError) as error:
            return f"whole weights ({weights.name}: {error})"
    return None


def checkpoints_in(output_dir: str) -> list[Path]:
    """Checkpoint folders, the latest step first."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name).group(1)), reverse=True)


def last_complete_checkpoint(output_dir: str) -> Path | None:
    """The latest checkpoint that is whole: a process killed while saving leaves one that is not."""
    if not Path(output_dir).is_dir():
        return None
    return next((path for path in checkpoints_in(output_dir) if missing_part(path) is None), None)


def find_resume_point(output_dir: str, resume: str | bool | None) -> str | None:
    """The checkpoint to go on from.

    `resume` is true (the last checkpoint of `output_dir`, which must exist), "auto" (the last one if there is any), a
    checkpoint's path, or false.

    Raises:
        ValueError: nothing to resume from, or a checkpoint that is not whole.
    """
    wish = str(resume).lower()
    if resume is None or wish in ("false", "none", ""):
        return None
    if wish in ("true", "auto"):
        last = last_complete_checkpoint(output_dir)
        if last is None and wish == "true":
            raise ValueError(
                f"--resume_from_checkpoint True needs a whole checkpoint-* folder in {output_dir!r}, got none"
            )
        return None if last is None else str(last)
    if not Path(resume).is_dir():
        raise ValueError(f"--resume_from_checkpoint must be True, auto or a checkpoint folder, got {resume!r}")
    missing = missing_part(Path(resume))
    if missing is not None:
        raise ValueError(f"--resume_from_checkpoint must be a whole checkpoint, {resume!r} lacks {missing}")
    return str(resume)


def require_free(output_dir: str, *, resuming: bool, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless the run resumes there or may overwrite.

    Raises:
        ValueError: the folder is not empty and neither was asked for, or both were.
    """
    if resuming and overwrite:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other, got both")
    folder = Path(output_dir)
    if resuming or overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    raise ValueError(
        f"--output_dir must be empty or new, got {output_dir!r} with {len(list(folder.iterdir()))} entries: pass "
        "--resume_from_checkpoint True to go on from its last checkpoint, or --overwrite_output_dir to start anew"
    )


def remove_checkpoints(output_dir: str) -> None:
    """Removes the checkpoints of an earlier run: a later resume would take them for this run's."""
    for checkpoint in checkpoints_in(output_dir):
        shutil.rmtree(checkpoint)
