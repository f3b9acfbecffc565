"""Work on many items, such as the images of a folder, that goes on where it was interrupted."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffperception.configuration.settings import differences
from diffperception.devices import first_does, first_process, gather
from diffperception.echo import echo, plural
from diffperception.files import OutputFolder, digest


class Item(NamedTuple):
    """Something to be worked on: its name, a number of its content, and the files that come of it, by their names."""

    name: str
    content: str = ""
    files: tuple[str, ...] = ()


class ResumableFolder(OutputFolder):
    """A folder of results of many items that knows what is done, and of what content, wherever it was interrupted.

    A call with the same settings goes on: items that are done, and whose content is what it was, are kept. One with
    other settings is refused, unless it is to overwrite, which begins anew. The record of the folder has a line with
    the settings, and one for each item that is done, which is on disk before the next is begun.

    >>> folder = ResumableFolder("out", overwrite=False)
    >>> left = folder.left_of({"seed": 0}, share(items))  # every process calls this and the next
    >>> folder.begin()  # once all options have proved sound
    >>> for item in left:
    ...     write_text(folder.file(item.files[0]), "...")
    ...     folder.add(item, item.files, {"score": 1.0})
    >>> results = folder.results(items)

    Raises:
        ValueError: as for :class:`OutputFolder`, but it may hold what earlier calls have done.
    """

    def require_place(self) -> None:
        if self.overwrite or not any("settings" in entry for entry in self.entries()):
            super().require_place()

    def left_of(
        self, settings: Mapping[str, Any], items: Sequence[Item], unit: str = "image", batch_size: int = 1
    ) -> list[Item]:
        """The items that are still to be worked on. Every process calls this.

        Args:
            settings: all that results depend on besides the items' content, as JSON can hold it.
            items: those that this process has to do; see :func:`content_of`.
            unit: what an item is called.
            batch_size: items that are worked on together: where one is left, so is its whole batch, so that numbers
                that depend on it, by rounding, are the same as in a run without interruption.

        Raises:
            ValueError: the folder holds results of other settings or items, files of somebody else in the way of
                these, or a file that was changed since it was written.
        """
        self._settings = json.loads(json.dumps(settings))
        self._done: dict[tuple[str, str], dict[str, Any]] = {}
        before = None
        for entry in [] if self.overwrite else self.entries():
            before = entry.get("settings", before)
            if "done" in entry:
                self._done[entry["done"], entry["content"]] = {name: entry[name] for name in ("planned", "written")}
        if before is not None and (changed := differences(before, self._settings)):
            raise ValueError(
                f"{self.path} holds results of other settings ({', '.join(changed)}): choose another --output, or"
                " replace them with --overwrite"
            )
        self.require_unchanged()
        self._require_no_others(gather([(item.name, item.files) for item in items]))
        for name in (name for item in items for name in item.files):
            self.file(name)
        self._new = before is None
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        left = [item for batch in batches if not all(map(self._is_done, batch)) for item in batch]
        names = gather([item.name for item in left])
        self._left = len(names)
        self._say(len(gather(items)), names, unit)
        return left

    def begin(self, of_all: Sequence[str] = ()) -> None:
        """Remove what earlier runs wrote, if it is to be overwritten. Every process calls this.

        Args:
            of_all: names of files that are made of all items, and go where one is left.
        """
        first_does(lambda: self._begin(of_all))  # all have looked what is there

    def _begin(self, of_all: Sequence[str]) -> None:
        if self.overwrite:
            self.clear()
        self.remove_parts()
        if self._left:
            self.remove(self.path / name for name in of_all)
        if self._new:
            self.append({"settings": self._settings}, lasting=True)

    def add(self, item: Item, written: Iterable[str | Path], result: Any) -> None:
        """Keep what an item gave, on disk, once the files of it that are named are there."""
        files = [Path(name).as_posix() for name in written]
        entry = {"done": item.name, "content": item.content, "planned": item.files, "written": files, "result": result}
        self.append(entry, lasting=True)

    def results(self, items: Iterable[Item]) -> list[Any]:
        """What the items gave, whichever process did them, when."""
        wanted = {(item.name, item.content): None for item in items}
        found: dict[tuple[str, str], Any] = {}
        for entry in self.entries():
            if "done" in entry and (key := (entry["done"], entry["content"])) in wanted:
                found[key] = entry["result"]
        return [found[key] for key in wanted]

    def _is_done(self, item: Item) -> bool:
        entry = self._done.get((item.name, item.content))
        planned = entry is not None and tuple(entry["planned"]) == item.files
        return planned and all((self.path / name).is_file() for name in entry["written"])  # type: ignore[index]

    def _require_no_others(self, items: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """ValueError if the folder holds files of items that are not among these, which would be mixed with them."""
        names, files = {name for name, _ in items}, {file for _, files in items for file in files}
        for (name, _), entry in self._done.items():
            others = [file for file in entry["written"] if file not in files and (self.path / file).exists()]
            if name not in names or others:
                raise ValueError(
                    f"{self.path} also holds results of {name}{f' ({others[0]})' if others else ''}, which this call"
                    " would not make: choose another --output, or begin anew with --overwrite"
                )

    def _say(self, number: int, left: Sequence[str], unit: str) -> None:
        if self._done and first_process():
            changed = len({name for name, _ in self._done} & set(left))
            again = f", {changed} of them again, as they have changed or their files are gone" if changed else ""
            kept = f"{number - len(left)} of {plural(number, unit)}"
            echo(f"{self.path}: {kept} are kept from an earlier call, {len(left)} are to be made{again}")


def content_of(path: str | Path) -> str:
    """A number of a file's content; of one that cannot be read a text of its own."""
    try:
        return digest(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"
