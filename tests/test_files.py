"""Reading text, writing beside and renaming, and what becomes of a folder of results."""

import json
import math
import os
from pathlib import Path

import pytest

from diffperception.files import (
    OutputFolder,
    Stamp,
    folder_beside,
    png_names,
    read_lines,
    read_text,
    safe_name,
    safe_names,
    safe_path,
    write_json,
    write_text,
    written_beside,
)


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return [root / name for name in names]


def interrupt_after(*written: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_text_is_read_in_every_encoding_that_it_declares(tmp_path: Path, encoding: str, ending: str) -> None:
    path, lines = tmp_path / "names.txt", ["Grüße", "", " 犬\u2028猫 ", ""]
    path.write_bytes(ending.join(lines).encode(encoding))
    assert read_text(path) == "\n".join(lines)
    assert read_lines(path) == ["Grüße", "犬\u2028猫"]  # only line feeds end a line


@pytest.mark.parametrize("mark", [b"\xfe\xff", b"\xff\xfe", b"\0\0\xfe\xff"])
def test_the_byte_order_mark_says_the_order(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(
        "\ufeffab".encode({2: "utf-16", 4: "utf-32"}[len(mark)] + ("-le", "-be")[mark[-1] == 255])
    )
    assert (tmp_path / "a.txt").read_bytes().startswith(mark)
    assert read_text(tmp_path / "a.txt") == "ab"


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for content, message in [
        (b"a\nGr\xfc\xdfe\n", r"names\.txt is not text in UTF-8 \(line 2\): save it as UTF-8"),
        ("crane".encode("utf-16-le"), r"names\.txt is not text in UTF-8, as it has bytes of zero"),
        (b"\xff\xfea", r"names\.txt is not text in UTF-16: save it"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_text(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.txt"):
        read_lines(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder: name a file"):
        read_text(tmp_path)


def test_names_of_pngs_do_not_meet() -> None:
    names = [Path("a/b.jpg"), Path("a/b.png"), Path("a/c.jpg"), Path("b.jpg")]
    assert list(png_names(names).values()) == [Path("a/b.jpg.png"), Path("a/b.png.png"), Path("a/c.png"), Path("b.png")]


USUAL = ["class 1", "Grüße", "red blood cell", "猫", "a.b", "_", "C++", "000012", "O'Brien, Jr. (left)"]
BAD = ["", ".", "..", "../../elsewhere", "/etc/passwd", "a/b", "a\\b", "C:\\x", "CON", "nul.txt", "com1", "a\0b"]
BAD += [
    "a\nb",
    "...",
    ".hidden",
    "dot.",
    " space ",
    "x" * 300,
    "ü" * 300,
    "\udcff",
    "a:b",
    "what?",
    "*",
    "~/.ssh/",
    "con.",
]


def test_usual_names_stay_and_no_name_leaves_its_folder(tmp_path: Path) -> None:
    assert [safe_name(text) for text in USUAL] == USUAL
    for text in BAD:
        name = safe_name(text)
        assert Path(name).name == name
        assert name not in ("", ".", "..")
        assert not name.startswith((".", " "))
        assert not name.endswith((".", " "))
        assert not set(name) & set('<>:"/\\|?*\0\n')
        assert name.split(".")[0].lower() not in ("con", "nul", "com1")
        assert len(f"{name}.safetensors".encode()) < 255
        assert safe_name(name) == name
        (tmp_path / name).touch()
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_names_of_classes_stay_apart() -> None:
    texts = ["a/b", "a_b", "A_B", "c", "..", "/", "x" * 300, "x" * 301]
    names = safe_names(texts)
    assert list(names) == texts
    assert names["c"] == "c"
    assert len({name.casefold() for name in names.values()}) == len(texts)
    assert safe_names(USUAL) == {text: text for text in USUAL}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("../../a.jpg", "a.jpg"),
        ("/data/a.jpg", "data/a.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        ("C:\\Users\\me\\a.jpg", "C_/Users/me/a.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("..", "_"),
        ("", "_"),
    ],
)
def test_a_listed_name_stays_below(name: str, path: str) -> None:
    assert safe_path(name) == Path(path)


def test_names_of_pngs_do_not_meet_in_any_case_nor_by_their_longer_form() -> None:
    names = [Path(name) for name in ("a.jpg", "a.png", "a.jpg.png", "A.JPG", "b/a.jpg", "B.webp", "b.bmp")]
    pngs = png_names(names)
    assert len({png.as_posix().casefold() for png in pngs.values()}) == len(names)
    assert pngs[Path("b/a.jpg")] == Path("b/a.png")
    assert pngs[Path("a.jpg.png")] == Path("a.jpg.png")
    assert all(png.suffix == ".png" and png.parent == name.parent for name, png in pngs.items())


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (path,) = touch(tmp_path, "a.txt")
    with pytest.raises(KeyboardInterrupt), written_beside(path) as part:
        interrupt_after(part.write_text("half"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["a.txt"]
    write_text(path, "whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def test_a_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "data"
    with pytest.raises(KeyboardInterrupt), folder_beside(target) as part:
        interrupt_after(touch(part, "half.txt"))
    assert list((tmp_path / "new").iterdir()) == []
    target.mkdir()
    with folder_beside(target) as part:
        touch(part, "whole.txt")
        assert list(target.iterdir()) == []
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "new",
        "new/data",
        "new/data/whole.txt",
    ]
    usual = tmp_path / "usual"
    usual.mkdir()
    assert target.stat().st_mode == usual.stat().st_mode
    with pytest.raises(OSError, match="not empty"), folder_beside(target) as part:
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ap": math.nan, "rows": [(1.5, math.inf)], "name": "NaN"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ap": None, "rows": [[1.5, None]], "name": "NaN"}


def run(path: Path, *names: str, overwrite: bool = True) -> OutputFolder:
    folder = OutputFolder(path, overwrite)
    folder.clear()
    for name in names:
        write_text(folder.file(name), name)
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_what_was_written_before_is_removed(tmp_path: Path) -> None:
    touch(tmp_path, "thesis.txt", "masks/mine.png", "000000.png")
    run(tmp_path, "masks/1.png", "deep/er/2.png", "scores.csv")
    run(tmp_path, "masks/3.png")
    mine = ["000000.png", "masks/mine.png", "thesis.txt"]
    assert files_in(tmp_path) == sorted([".diffperception", *mine, "masks/3.png"])
    assert not (tmp_path / "deep").exists()
    run(tmp_path)
    assert files_in(tmp_path) == mine


def test_files_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    touch(tmp_path, "masks/1.png")
    folder = OutputFolder(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"1\.png would be replaced, which no earlier run wrote"):
        folder.file("masks/1.png")
    folder.note(tmp_path / "masks/1.png")
    assert folder.file("masks/1.png") == tmp_path / "masks/1.png"
    assert OutputFolder(tmp_path, overwrite=True).written() == [tmp_path / "masks/1.png"]


def test_what_an_interrupted_run_wrote_is_known(tmp_path: Path) -> None:
    run(tmp_path, "1.png").file("never_written.png")
    assert OutputFolder(tmp_path, True).written() == [tmp_path / "1.png"]


def test_a_file_that_was_changed_since_is_not_ours(tmp_path: Path) -> None:
    run(tmp_path, "a.csv", "b.csv")
    opened = OutputFolder(tmp_path, overwrite=True)
    (tmp_path / "a.csv").write_text("mine!")  # as long as what was there
    for refused in (lambda: OutputFolder(tmp_path, overwrite=True), opened.clear):
        with pytest.raises(ValueError, match=r"a\.csv was changed since a run wrote it: move it away, or choose"):
            refused()
    assert (tmp_path / "a.csv").read_text() == "mine!"
    assert files_in(tmp_path) == [".diffperception", "a.csv", "b.csv"]


def test_a_copied_folder_is_known_by_its_content(tmp_path: Path) -> None:
    run(tmp_path / "a", "1.txt", "deep/2.txt")
    for file in [path for path in (tmp_path / "a").rglob("*") if path.is_file()]:
        copy = tmp_path / "b" / file.relative_to(tmp_path / "a")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        os.utime(copy, (0, 0))
    OutputFolder(tmp_path / "b", overwrite=True).clear()
    assert files_in(tmp_path / "b") == []
    assert files_in(tmp_path / "a") == [".diffperception", "1.txt", "deep/2.txt"]


def test_a_record_among_files_of_the_same_names_removes_none(tmp_path: Path) -> None:
    run(tmp_path / "a", "1.txt", "2.txt")
    mine = touch(tmp_path, "b/1.txt", "b/2.txt")
    for file in mine:
        file.write_text("of mine")
    (tmp_path / "b/.diffperception").write_bytes((tmp_path / "a/.diffperception").read_bytes())
    with pytest.raises(ValueError, match=r"was changed since a run wrote it \(and 1 more\)"):
        OutputFolder(tmp_path / "b", overwrite=True)
    assert [file.read_text() for file in mine] == ["of mine", "of mine"]


@pytest.mark.parametrize("line", ['"1.txt"', '{"file": "1.txt"}', '{"file": 1}', "{", "\x00", "[]", '{"file": null}'])
def test_a_record_that_is_old_or_broken_removes_none(tmp_path: Path, line: str) -> None:
    run(tmp_path, "2.txt")
    touch(tmp_path, "1.txt")
    with open(tmp_path / ".diffperception", "a") as record:
        record.write("\n" + line)
    write_text(OutputFolder(tmp_path, overwrite=True).file("3.txt"), "3")
    OutputFolder(tmp_path, overwrite=True).clear()
    assert files_in(tmp_path) == ["1.txt"]


def test_links_in_the_folder_lead_nowhere(tmp_path: Path) -> None:
    (photo, elsewhere) = touch(tmp_path, "photos/1.png", "elsewhere.txt")
    folder = run(tmp_path / "out", "2.txt")
    (tmp_path / "out/pictures").symlink_to(tmp_path / "photos")
    (tmp_path / "out/1.txt").symlink_to(elsewhere)
    (tmp_path / "out/2.txt").unlink()
    (tmp_path / "out/2.txt").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"pictures/2\.png would be written outside of"):
        folder.file("pictures/2.png")
    with pytest.raises(ValueError, match=r"1\.txt would be replaced"):
        folder.file("1.txt")
    with pytest.raises(ValueError, match=r"2\.txt was changed"):
        OutputFolder(tmp_path / "out", overwrite=True)
    assert (photo.read_text(), elsewhere.read_text()) == ("photos/1.png", "elsewhere.txt")


def test_what_a_killed_process_began_goes_and_a_users_half_files_stay(tmp_path: Path) -> None:
    run(tmp_path, "pictures/1.png")
    with pytest.raises(KeyboardInterrupt), written_beside(OutputFolder(tmp_path, True).file("new/2.png")):
        interrupt_after(touch(tmp_path, "new/.diffperception-part-3"))
    touch(tmp_path, ".diffperception-part-1", "pictures/.diffperception-part-2", "pictures/1.png.part")
    run(tmp_path)
    assert files_in(tmp_path) == ["pictures/1.png.part"]


def test_an_interrupted_write_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), written_beside(folder.file("deep/new/1.png")):
        raise KeyboardInterrupt
    folder.clear()
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_file_is_noted_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "1.txt")
    monkeypatch.setattr("os.replace", interrupt_after)  # killed after the note: what is there is the old file
    with pytest.raises(KeyboardInterrupt):
        write_text(folder.file("1.txt"), "new")
    monkeypatch.undo()
    assert OutputFolder(tmp_path, True).written() == [tmp_path / "1.txt"]
    write_text(folder.file("1.txt"), "new")
    assert OutputFolder(tmp_path, True).written() == [tmp_path / "1.txt"]


def test_a_record_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (outside,) = touch(tmp_path, "outside.txt")
    touch(tmp_path, "elsewhere/2.txt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    names = ["../outside.txt", str(outside), "link/2.txt", ".."]
    stamp = Stamp.of(outside)._asdict()
    stamps = [stamp, stamp, Stamp.of(tmp_path / "elsewhere/2.txt")._asdict(), stamp]
    lines = [json.dumps({"file": name, **stamp}) + "\n" for name, stamp in zip(names, stamps, strict=True)]
    (out / ".diffperception").write_text("".join(lines))
    OutputFolder(out, overwrite=True).clear()
    assert files_in(tmp_path) == ["elsewhere/2.txt", "outside.txt"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "new")
    run(tmp_path / "old", "1.png", overwrite=False)
    with pytest.raises(ValueError, match="is not empty: choose another --output, or give --overwrite"):
        OutputFolder(tmp_path / "old")
    OutputFolder(tmp_path / "old", overwrite=True).clear()
    OutputFolder(tmp_path / "old")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        OutputFolder(touch(tmp_path, "file")[0], overwrite=True)


def test_odd_names_come_back(tmp_path: Path) -> None:
    names = ["line\nbreak.png", "Grüße.png", "quote'\".png"]
    run(tmp_path, *names)
    assert [path.name for path in OutputFolder(tmp_path, True).written()] == names
    assert os.listdir(tmp_path).count("line\nbreak.png") == 1


def test_results_do_not_go_into_a_training_run(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match="holds a training run"):
        OutputFolder(tmp_path, overwrite=True)
