"""When and how a run saves itself, and how it comes back."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from trainer.checkpoint.folder import (
    CheckpointError,
    FragmentFiles,
    Manifest,
    RestoreError,
    clean_partial,
    commit,
    folder_name,
    incomplete,
    read_manifest,
    remove,
    steps_in,
    verify,
    write_manifest,
)
from trainer.checkpoint.saving import Copies, Save, Written, in_files
from trainer.config import InputError, Node, RunError, schema, setting
from trainer.optim.eight_bit import BOUND
from trainer.parallel import distributed
from trainer.parallel.engine import Engine, Fragment, owned_spans

log = logging.getLogger(__name__)

ROUNDED = (
    "optimizer state was rounded to 8 bits, in other blocks than it was saved from: by at most %.2f%% of a block's maximum "
    "(the bound is %.2f%%)"
)
HELD = "held"
"""The state of tensors that belong to a part of the run instead of the model."""


class Part(Protocol):
    """Something of a run with a state of JSON values, equal on all ranks: the loader, the guard, the tracker.

    One that also has ``tensors()``, by name and equal on all ranks, gets them back by ``load_tensors(tensors)``.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Holder(Protocol):
    """A part that has tensors too."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None: ...


@schema("checkpoint")
@dataclass
class Checkpoints(Node):
    """When to save, and what to keep."""

    every: int = setting(500, "steps between checkpoints; 0 = after the last step only", least=0)
    keep: int = setting(2, "verified checkpoints that are kept, the newest; 0 = all", least=0)
    before_deadline: float = setting(
        120.0, "seconds before the job's time limit to save and stop, where a scheduler says it; 0 = never", least=0
    )
    asynchronous: bool = setting(False, "write in the background; costs a copy of what a rank saves, in CPU memory")

    def due(self, step: int, last: int) -> bool:
        """Whether to save after ``step``."""
        return step == last or (self.every > 0 and step % self.every == 0)


class Checkpointer:
    """Saves and restores a run under ``folder``, which all ranks must share."""

    def __init__(
        self,
        config: Checkpoints,
        folder: Path,
        engine: Engine,
        parts: Mapping[str, Part],
        facts: Mapping[str, Any],
    ) -> None:
        self.config, self.folder, self.engine, self.parts, self.facts = config, folder, engine, dict(parts), dict(facts)
        self._writing: Save | None = None
        self._good: set[int] = set()
        distributed.run_on_main(self._prepare)
        self._refuse_unshared()

    def save(self, step: int) -> None:
        """Save the state after ``step``; collective. Where asynchronous, the disk is written while training goes on.

        Raises:
            CheckpointError: if it could not be written; earlier checkpoints are untouched.
        """
        self.advance(wait=True)
        unfinished = Path(distributed.run_on_main(lambda: self._begin(step)))
        # One file's worth at a time: of state in 8 bits they are copies already.
        fragments = chain(self.engine.fragments(owned=True), self._tensors_of_parts())
        save = Save(step, unfinished, distributed.world().name)
        copying = (Copies(together) for together in in_files(fragments))
        if self.config.asynchronous:
            copies = list(copying)
            for together in copies:
                self.engine.before_next_update(together.wait)
            save.manifest = self._facts_of(step)
            save.start(copies)
            self._writing = save
        else:
            save.write(copying)
            save.manifest = self._facts_of(step)
            self._finish(save)

    def advance(self, *, wait: bool = False) -> None:
        """Complete an asynchronous save once every rank has written its part; collective, free when none is under way.

        Raises:
            CheckpointError: if a rank could not write; earlier checkpoints are untouched.
        """
        if self._writing is None:
            return
        if wait:
            self._writing.join()
        if all(distributed.gather(self._writing.done)):
            save, self._writing = self._writing, None
            self._finish(save)

    def restore(self) -> int:
        """Continue from the newest checkpoint that verifies; gives its step, 0 if there is none. Collective.

        Raises:
            RestoreError: if there are checkpoints and none verifies, or the one that does is of another model.
        """
        bad: list[str] = []
        for step in distributed.run_on_main(lambda: steps_in(self.folder)):
            world = distributed.world()
            every = distributed.gather(verify(self.folder / folder_name(step), world.share))
            problems = list(dict.fromkeys(p for part in every for p in part))
            if not problems:
                try:
                    moved = max(distributed.run_on_all_ranks(partial(self._load, step)))
                except InputError as error:
                    raise RestoreError(str(error)) from error
                except (RunError, distributed.RankError) as error:
                    raise CheckpointError(f"{folder_name(step)} could not be restored ({error}); run again") from error
                self._good.add(step)
                if moved and world.is_main:
                    log.warning(ROUNDED, 100 * moved, 100 * BOUND)
                return int(step)
            bad += problems
            for problem in problems if world.is_main else ():
                log.warning("checkpoint %s is damaged and is passed over: %s", folder_name(step), problem)
        if bad:
            raise RestoreError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(bad)}); restore one from a backup, or start afresh "
                "with resume=new"
            )
        return 0

    def close(self) -> None:
        """Wait for a save under way; collective."""
        self.advance(wait=True)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        clean_partial(self.folder)

    def _refuse_unshared(self) -> None:
        """Every node must see what rank 0 writes, or a restore elsewhere would find half a checkpoint."""
        seen = distributed.gather(distributed.sees_files_of_main(self.folder))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise InputError(
                f"run_dir: ranks {', '.join(map(str, blind))} do not see {self.folder} of rank 0; "
                "use a folder that all nodes share"
            )

    def _begin(self, step: int) -> str:
        unfinished = self.folder / f"{folder_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
        unfinished.mkdir()
        return str(unfinished)

    def _facts_of(self, step: int) -> dict[str, Any]:
        """What the manifest says besides the files; taken now, since training may go on before it is written."""
        steps = {name: n for part in distributed.gather(self.engine.optimizer_steps()) for name, n in part.items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        every = distributed.gather(parts)
        differing = [name for name in parts if any(other[name] != parts[name] for other in every)]
        if differing:
            raise CheckpointError(f"the state of {', '.join(differing)} differs between ranks after step {step}")
        return {
            "step": step, "ranks": distributed.world().devices, "optimizer_steps": steps, "engine": self.engine.state(),
            "parts": parts, "facts": self.facts,
        }  # fmt: skip

    def _tensors_of_parts(self) -> Iterator[Fragment]:
        """This rank's share of what parts hold alike on all ranks."""
        replicated = [
            (f"{name}/{key}", t)
            for name, part in self.parts.items()
            if isinstance(part, Holder)
            for key, t in part.tensors().items()
        ]
        for number, first, last in owned_spans([t.numel() for _, t in replicated]):
            name, tensor = replicated[number]
            yield Fragment.of_tensor(name, HELD, tensor.shape, first, tensor.reshape(-1)[first:last])

    def _finish(self, save: Save) -> None:
        """Exchange what was written, write the manifest, and give the checkpoint its name."""
        try:
            every = distributed.run_on_all_ranks(lambda: save.result().as_json())
            written = [Written.from_json(part) for part in every]
            distributed.run_on_main(lambda: self._commit(save, written))
        except (InputError, RunError, distributed.RankError) as error:
            distributed.run_on_main(lambda: shutil.rmtree(save.partial, ignore_errors=True))
            saved = steps_in(self.folder)
            still = f"the newest checkpoint is {folder_name(saved[0])}" if saved else "there is no checkpoint yet"
            raise CheckpointError(f"the checkpoint of step {save.step} was not written ({error}); {still}") from error
        self._good.add(save.step)
        distributed.run_on_main(self._retire)

    def _commit(self, save: Save, written: list[Written]) -> None:
        shapes = {name: shape for part in written for name, shape in part.shapes.items()}
        files = {name: facts for part in written for name, facts in part.files.items()}
        fragments = [f for part in written for f in part.fragments]
        wrong = list(incomplete(shapes, fragments))
        if wrong:
            raise CheckpointError(f"the ranks' fragments do not make up the model: {'; '.join(wrong[:5])}")
        manifest = Manifest(**save.manifest, files=files, shapes=shapes, fragments=fragments)
        write_manifest(save.partial, manifest)
        commit(save.partial, self.folder / folder_name(save.step))

    def _retire(self) -> None:
        """Delete good checkpoints beyond the newest ``keep``; one that this run has not seen is verified before it counts."""
        good = 0
        for step in steps_in(self.folder) if self.config.keep else ():
            folder = self.folder / folder_name(step)
            if step not in self._good and not verify(folder):
                self._good.add(step)
            if step in self._good:
                good += 1
                if good > self.config.keep:
                    remove(folder)

    def _load(self, step: int) -> float:
        """Restore; gives what `Engine.restored` does."""
        folder = self.folder / folder_name(step)
        manifest = read_manifest(folder)
        files = FragmentFiles(folder, manifest)
        wanted = list(self.engine.fragments(owned=False))
        self._refuse_another_model(folder, manifest, files, wanted)
        for fragment in wanted:
            files.read(fragment.name, fragment.state, fragment.box, fragment.start, fragment.tensor)
        moved = self.engine.restored(manifest.optimizer_steps, manifest.engine)
        missing = self.parts.keys() - manifest.parts.keys()
        if missing:
            raise RestoreError(
                f"{folder} holds no state of {', '.join(sorted(missing))}; restore another, or start afresh with resume=new"
            )
        for name, part in self.parts.items():
            part.load_state_dict(manifest.parts[name])
            if isinstance(part, Holder):
                names = {n.removeprefix(f"{name}/"): n for n in manifest.shapes if n.startswith(f"{name}/")}
                part.load_tensors({key: files.full_tensor(n, HELD, manifest.shapes[n]) for key, n in names.items()})
        return moved

    def _refuse_another_model(self, folder: Path, manifest: Manifest, files: FragmentFiles, wanted: list[Any]) -> None:
        problems = []
        for fragment in wanted:
            shape = manifest.shapes.get(fragment.name)
            if shape is None or (fragment.name, fragment.state) not in files.tensors:
                problems.append(f"it lacks {fragment.name} ({fragment.state})")
            elif tuple(shape) != fragment.shape:
                problems.append(f"{fragment.name} is {tuple(shape)} and should be {fragment.shape}")
        if problems:
            more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RestoreError(
                f"{folder} is of another model: {'; '.join(problems[:5])}{more}; set back what changed the model, or start "
                "afresh with resume=new"
            )
