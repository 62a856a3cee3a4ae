"""A run before its first step: read, chosen and checked, so that what can be refused is refused here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

from edgelora.base.model import Base, open_base
from edgelora.config import TrainConfig
from edgelora.device import Choice, choose_device, choose_products, processor_name
from edgelora.errors import DataError, EdgeloraError
from edgelora.peft.adapter import refuse_to_write
from edgelora.peft.inject import chosen
from edgelora.progress import OnProgress, Progress, silent
from edgelora.training.avoided import avoided_sha256
from edgelora.training.base_footprint import Model
from edgelora.training.distributed import choose_threads
from edgelora.training.folder import RunFolder
from edgelora.training.launches import choose_launches, launches_again
from edgelora.training.memory import over_rows
from edgelora.training.objectives import objective_of
from edgelora.training.original import original_of
from edgelora.training.resume import FREE, PATHS, Earlier, earlier_run, settings
from edgelora.training.rows import Rows, load_rows
from edgelora.training.settle import choose_attention, settle
from edgelora.training.where import require_place, where_of
from edgelora.training.world import World
from edgelora.versions import revision, versions


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run: `on_choice` what was chosen and why, before the first step; `on_note` what is odd, and from
    another thread that it stops.

    stop_when: asked behind each step; True stops the run there.
    """

    on_progress: OnProgress = silent
    on_choice: Callable[[str, Choice], None] = lambda *_: None
    on_note: Callable[[str], None] = lambda _: None
    stop_when: Callable[[Progress], bool] | None = None


@dataclass(frozen=True)
class Ready:
    """asked: as the user gave it. config: the same, nothing left open. earlier: the run that this one goes on with.

    original: see `original_of`. facts: what run.json and every checkpoint say of the run.
    """

    asked: TrainConfig
    config: TrainConfig
    base: Base
    rows: Rows
    choices: dict[str, Choice]
    earlier: Earlier | None
    original: Base | None
    facts: dict[str, Any]
    folder: RunFolder
    heard: Listeners


def make_ready(config: TrainConfig, folder: RunFolder, heard: Listeners, world: World) -> Ready:
    """Read, choose and check. Writes nothing. Raises EdgeloraError for every fault of the input."""
    refuse_to_write(config.out, config.overwrite or (config.resume and folder.is_begun))
    folder.refuse_a_run(config)
    earlier = world.first(lambda: earlier_run(folder, heard.on_note)) if config.resume else None
    asked = config if earlier is None else earlier.with_wishes(config)
    objective_of(asked)  # refuses settings that contradict each other
    base = open_base(asked.base, asked.chat_template)
    chosen(asked.method, base.linears, base.norms, where_of(asked))
    planned = None
    if earlier is None:  # by the memory that is free here
        planned = world.first(lambda: settle(asked, base, None, world.size, world.local_size))
        settled, choices = planned.config, planned.choices
    else:
        settled, choices = _as_before(asked, earlier)
        heard.on_note(f"going on behind step {earlier.snapshot.step}")
    here = world.first(lambda: _computed_by(settled, base, world))
    changed = [] if earlier is None else earlier.differences(here, versions())
    for difference in changed:
        heard.on_note(difference)
    choices = {**choices, **here}
    require_place(settled, base)
    world.use(settled.device)
    original = original_of(settled, base)
    hashing = _hashing(base, original)
    rows = load_rows(settled, base, heard.on_note, heard.on_progress)
    hashing.join()
    if planned is not None:
        planned = over_rows(planned, Model.of(base), rows.heaviest(settled))
        if (size := "micro_batch_tokens") in choices:
            choices[size] = planned.choices[size]
        if settled.device.startswith("cuda"):
            has_flash = choices["attention"].value == "flash"
            choices["launches"] = choose_launches(planned, Model.of(base), has_flash, world.size)
    elif "launches" in choices:
        choices["launches"] = launches_again(choices["launches"], settled, world.size)
    digests = _digests(settled, base, rows, original)
    if earlier is not None:
        earlier.require_same(digests)
        changed = earlier.changed_until_now(changed)
    _require_same_everywhere(digests, world)
    for name, choice in choices.items():  # behind all that can be refused: an error stands alone
        heard.on_choice(name, choice)
    facts = {
        "asked": settings(asked),
        "settled": settings(settled),
        "choices": {name: asdict(choice) for name, choice in choices.items()},
        "digests": digests,
        "data": rows.facts,
        "versions": versions(),
        "processor": processor_name(),
        "changed": changed,
        "revision": revision(),
    }
    return Ready(asked, settled, base, rows, choices, earlier, original, facts, folder, heard)


def _as_before(asked: TrainConfig, earlier: Earlier) -> tuple[TrainConfig, dict[str, Choice]]:
    """What was left open, as it was chosen for the earlier run."""
    choose_device(earlier.settled.device)  # refuses one that is not here
    wishes = {name: getattr(asked, name) for name in FREE | PATHS}
    choices = {name: Choice(**choice) for name, choice in earlier.choices.items() if name != "processes"}
    return earlier.settled.model_copy(update=wishes), choices


def _computed_by(config: TrainConfig, base: Base, world: World) -> dict[str, Choice]:
    """What rounds each step, and is this machine's, not the run's: chosen anew wherever a run goes on."""
    here = {
        "products": choose_products(config.device),
        "attention": choose_attention(base.config.head_dim, config.device, config.dtype),
        "threads": choose_threads(world),
    }
    if world.size > 1:
        held = f"1/{world.size} of each layer" if config.shard_base else "the whole base"
        here["processes"] = Choice(str(world.size), f"torchrun started them; each holds {held}")
    elif config.shard_base:
        why = "it holds the whole base, which --shard-base shares among those that torchrun starts"
        here["processes"] = Choice("1", why)
    return here


def _hashing(*bases: Base | None) -> Thread:
    """A thread that reads and hashes their files, while rows are read: hashlib leaves the interpreter to others.

    What fails in it fails again where the digest is asked for, and says so there.
    """

    def hash_all() -> None:
        with suppress(OSError, EdgeloraError):
            for base in bases:
                _ = base and base.base_file

    thread = Thread(target=hash_all, daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    return thread


def _digests(config: TrainConfig, base: Base, rows: Rows, original: Base | None) -> dict[str, str]:
    """The sha256 of every file that the numbers of the run depend on."""
    digests = {"base": base.base_file.sha256, "rows": rows.train.sha256, "held-out rows": rows.valid_sha256}
    if original is not None:
        digests["original"] = original.base_file.sha256
    if config.chat_template is not None:
        digests["chat template"] = base.template_sha256
    if config.orthogonal_to:
        digests["adapters of --orthogonal-to"] = avoided_sha256(config)
    return digests


def _require_same_everywhere(digests: dict[str, str], world: World) -> None:
    """Raise DataError where a process read other files. All have come so far before one writes."""
    if world.any(world.first(lambda: digests) != digests):
        raise DataError(
            what="the base or the rows are not the same for all processes of this run",
            why="they are read on each machine, and each process takes its part of the same steps",
            fix="give every machine the same files",
        )
