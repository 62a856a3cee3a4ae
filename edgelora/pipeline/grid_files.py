"""The files that cells are measured from, each built once: it stands in a folder named by what it is made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.exit_facts import BaseFacts, Type, facts_of_base
from converters.exit_plan import plan_exit
from converters.plan import QuantizeOptions, plan_types
from edgelora.base.model import FLOAT_QUANTS
from edgelora.errors import AdapterError, EdgeloraError
from edgelora.files.atomic import require_space
from edgelora.pipeline.convert import convert
from edgelora.pipeline.engines import LLAMA_CPP, TORCH
from edgelora.pipeline.evaluate import adapter_files
from edgelora.pipeline.export import ExportOptions, export
from edgelora.pipeline.grid import Grid, Place
from edgelora.pipeline.grid_live import Live
from edgelora.pipeline.imatrix import Mix, Settings, compute_importance
from edgelora.pipeline.merge import MergeOptions, merge
from edgelora.pipeline.patch import patch
from edgelora.pipeline.perplexity import TOP, Run, measure
from edgelora.pipeline.quantize import quantize
from edgelora.progress import OnProgress, silent
from edgelora.versions import versions

ORIGINAL = "F16"  # what everything else is compared with


@dataclass(frozen=True)
class Shipped:
    """What a place is measured from, and what its user would get: a model, and an adapter over it at its scale (a GGUF;
    for torch its folder). `imatrix`: what the model was quantized with."""

    model: Path
    adapter: Path | None = None
    scale: float = 1.0
    imatrix: Path | None = None

    @property
    def size_bytes(self) -> int:
        """Of what its user would get: without the importance matrix."""
        files = [self.model, *(adapter_files(self.adapter) if self.adapter else [])]
        return sum(path.stat().st_size for path in files)


class Workshop:
    """Builds files below `folder`, and finds those that stand there from an earlier time."""

    def __init__(self, grid: Grid, folder: Path, on_progress: OnProgress = silent) -> None:
        self._grid, self._folder, self.on_progress = grid, folder, on_progress

    def shipped(self, place: Place) -> Shipped:
        """Build what is missing of a place. Raises what the step that makes it raises."""
        scale = self._grid.asked.adapter[1] if self._grid.asked.adapter else 1.0
        if place.way == "base":
            return Shipped(self.base(place.quant))
        if place.way == "live":
            return Shipped(self.base(place.quant), self.adapter(), scale)
        if place.way == "torch":
            return Shipped(self.base(place.quant), self._given, scale)
        if place.way == "patched":
            return Shipped(*self._patched(place.quant, self._given, "adapter", self._grid.live))
        if place.way == "trained":
            return self._trained(place.quant)
        spared = place.way == "imatrix"
        return Shipped(self.merged(place.quant, spared=spared), imatrix=self.imatrix() if spared else None)

    def base(self, quant: str) -> Path:
        """The base at a level: as it was given where it is that already."""
        base, asked = self._grid.base, self._grid.asked
        if base.is_gguf and base.quant == quant:
            return base.file.path
        name = f"{self._stem}-{quant}.gguf"
        if quant in FLOAT_QUANTS:
            return self._made(name, ["convert", quant, self._digest("base")], lambda out: convert(
                asked.base, out, dtype=quant, on_progress=self.on_progress
            ))  # fmt: skip
        source = base.file.path if base.is_gguf and base.quant in FLOAT_QUANTS else self.base(ORIGINAL)
        return self._made(name, ["quantize", quant, self._digest("base")], lambda out: quantize(
            source, out, quant, on_progress=self.on_progress
        ))  # fmt: skip

    def adapter(self) -> Path:
        """The adapter as llama.cpp takes it."""
        return self._exported(self._grid.asked.base, self._given, ["base", "adapter"])

    def _patched(self, quant: str, folder: Path, made_of: str, live: Live) -> tuple[Path, Path | None]:
        """The base at a level with the adapter in its own numbers; the LoRA over it, where something of it is one."""
        base = self.base(quant)
        name = f"{self._stem}-{folder.resolve().name}-{quant}-patched"
        beside = [f"{name}.lora.gguf"] if live.leaves_lora else []
        model = self._made(f"{name}.gguf", ["patch", quant, *map(self._digest, ("base", made_of))], lambda out: patch(
            base, folder, out, ExportOptions(allow_unverified=self._grid.asked.allow_unverified, overwrite=True),
            self.on_progress,
        ), beside)  # fmt: skip
        return model, model.with_name(beside[0]) if beside else None

    def _trained(self, quant: str) -> Shipped:
        """The adapter of a level over its own level: live, or patched into it."""
        folder, made_of, live = self._grid.asked.adapters_for[quant], f"adapter/{quant}", self._grid.live_for[quant]
        if live.way == "patched":
            return Shipped(*self._patched(quant, folder, made_of, live))
        return Shipped(self.base(quant), self._exported(self.base(quant), folder, ["base", made_of]))

    def _exported(self, base: Path, adapter: Path, made_of: Sequence[str]) -> Path:
        if adapter.is_file():
            return adapter
        asked = self._grid.asked
        recipe = ["export", base.name, *map(self._digest, made_of)]
        return self._made(f"{adapter.resolve().name}.gguf", recipe, lambda out: export(
            base, adapter, out, ExportOptions(allow_unverified=asked.allow_unverified), self.on_progress
        ))  # fmt: skip

    def merged(self, quant: str, *, spared: bool = False) -> Path:
        """The adapter in the weights, at a level; `spared`: with the task's importance matrix."""
        asked = self._grid.asked
        assert asked.adapter is not None
        folder, scale = asked.adapter
        if folder.is_file():
            raise AdapterError(
                what=f"{folder}: a GGUF adapter cannot be merged",
                why="its weights were rounded for llama.cpp; the folder it was exported from is whole",
                fix="pass the adapter's folder",
            )
        options = MergeOptions(imatrix=self.imatrix() if spared else None)
        recipe: list[object] = ["merge", quant, self._digest("base"), self._digest("adapter"), scale]
        if spared:
            recipe.append(self._digest("calibration"))
        name = f"{self._stem}-{folder.resolve().name}-{quant}{'-imatrix' * spared}.gguf"
        return self._made(name, recipe, lambda out: merge(
            asked.base, [asked.adapter or (folder, scale)], out, quant=quant, options=options,
            allow_unverified=asked.allow_unverified, on_progress=self.on_progress,
        ))  # fmt: skip

    def imatrix(self) -> Path:
        """What quantizing must spare, computed on training rows with the adapter on; never on what is scored."""
        asked = self._grid.asked
        assert asked.adapter is not None
        settings = Settings(Mix(self._grid.calibration), allow_unverified=asked.allow_unverified)
        recipe = ["imatrix", *map(self._digest, ("base", "adapter", "calibration")), asked.adapter[1]]
        return self._made("task.imatrix.gguf", recipe, lambda out: compute_importance(
            asked.base, [asked.adapter] if asked.adapter else [], out, settings, on_progress=self.on_progress
        ))  # fmt: skip

    def reference(self) -> Path | None:
        """The predictions of the unquantized result over the text, the TOP likeliest of each; None without a text.

        Of an adapter that cannot be merged those of torch.
        """
        asked = self._grid.asked
        if asked.text is None:
            return None
        is_whole = asked.adapter is None or not self._grid.live.mergeable
        model = self.base(ORIGINAL) if is_whole else self.merged(ORIGINAL)
        adapter, engine = (asked.adapter, TORCH) if is_whole and asked.adapter else (None, LLAMA_CPP)
        made_of = [self._digest(name) for name in ("base", "adapter", "text") if name in self._grid.digests]
        recipe = ["reference", *made_of, asked.adapter and asked.adapter[1], asked.windows, asked.context, TOP]
        recipe += [engine, versions()["torch"]] if engine == TORCH else []

        def build(out: Path) -> None:
            out.parent.mkdir(parents=True, exist_ok=True)
            run = Run(
                model, asked.text, adapter, save=out, context=asked.context, chunks=asked.windows, top=TOP,
                allow_unverified=asked.allow_unverified, engine=engine,
            )  # fmt: skip
            measure(run, self.on_progress)

        return self._made(f"{model.stem}.reference", recipe, build)

    @property
    def _given(self) -> Path:
        """The adapter as it was given."""
        assert self._grid.asked.adapter is not None
        return self._grid.asked.adapter[0]

    @property
    def _stem(self) -> str:
        base = self._grid.base
        name = base.path.stem if base.is_gguf else base.path.resolve().name
        return name.removesuffix(f".{base.quant}").removesuffix(f"-{base.quant}")

    def _digest(self, name: str) -> str:
        return self._grid.digests[name]

    def _made(
        self, name: str, recipe: Sequence[object], build: Callable[[Path], object], beside: Sequence[str] = ()
    ) -> Path:
        """`beside`: what `build` writes with it."""
        path = self._folder / self._grid.key(*recipe) / name
        if not _stand(path, beside):
            build(path)
        return path


def _stand(path: Path, beside: Sequence[str]) -> bool:
    """Whether a file is there with those that were written with it."""
    return all(path.with_name(one).exists() for one in (path.name, *beside))


class Survey(Workshop):
    """Goes the same ways and builds nothing: `missing` are the files that are not there, with their bytes at most."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        super().__init__(grid, folder)
        self.missing: dict[Path, int] = {}
        self._levels: dict[str, BaseFacts] = {}
        for place in grid.places:
            with contextlib.suppress(AdapterError):  # its cell will say why
                self.shipped(place)
        with contextlib.suppress(AdapterError):
            self.reference()

    def require_space(self) -> int:
        """The bytes at most that what is missing takes. Raises OutputError if they are not free."""
        needed = sum(self.missing.values())
        require_space(self._folder, needed, "the files of the report")
        return needed

    def _made(
        self,
        name: str,
        recipe: Sequence[object],
        build: Callable[[Path], object],  # noqa: ARG002
        beside: Sequence[str] = (),
    ) -> Path:
        path = self._folder / self._grid.key(*recipe) / name
        if not _stand(path, beside):
            self.missing[path] = self._bytes(recipe[0], str(recipe[1]))
        return path

    def _bytes(self, step: object, quant: str) -> int:
        asked = self._grid.asked
        if step == "reference":
            return asked.windows * (asked.context // 2) * 8 * (TOP + 1)
        if step == "export" and asked.adapter is not None:
            return sum(path.stat().st_size for path in adapter_files(asked.adapter[0]))
        return 0 if step == "imatrix" else self._level(quant).size_bytes

    def _patched(self, quant: str, folder: Path, made_of: str, live: Live) -> tuple[Path, Path | None]:
        model, rest = super()._patched(quant, folder, made_of, live)
        if model in self.missing and live.facts is not None:
            way = plan_exit(live.facts, self._level(quant)).open.get("patched")
            self.missing[model] = self.missing[model] if way is None else way.size_bytes  # the LoRA over it too
        return model, rest

    def _level(self, quant: str) -> BaseFacts:
        """What the base is at a level; where only quantizing it tells the types, as if they were floats."""
        if quant not in self._levels:
            base = self._grid.base
            found, kind = facts_of_base(base), Type.F32 if quant == "F32" else Type.F16
            if not base.is_gguf or base.quant != quant:
                n_bytes = sum(map(math.prod, found.shapes.values())) * (4 if kind == Type.F32 else 2)
                found = replace(found, size_bytes=n_bytes, types=dict.fromkeys(found.shapes, kind))
                if base.is_gguf and quant not in FLOAT_QUANTS:
                    with contextlib.suppress(EdgeloraError):  # such as one that needs importance
                        planned = plan_types(base.file.path, QuantizeOptions(quant))
                        found = replace(found, size_bytes=planned.file_bytes, types=planned.types)
            self._levels[quant] = found
        return self._levels[quant]
