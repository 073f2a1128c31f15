# SPDX-License-Identifier: Apache-2.0
"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from calib.errors import ArtifactError, UsageError
from calib.output import output_folder, require_free


def written_before(folder: Path) -> None:
    """What an older result of calib looks like."""
    folder.mkdir()
    (folder / "old.json").write_text('{"format": "calib.scales"}', encoding="utf-8")


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), output_folder(out) as work:  # noqa: PT012 - the failing write comes second
        (work / "a").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written_before(out)
    with pytest.raises(UsageError), output_folder(out):
        pass
    with output_folder(out, overwrite=True) as work:
        (work / "new").touch()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="disk is full"), output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_first_step_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("calib.output.tempfile.mkdtemp", full)
    with pytest.raises(ArtifactError, match="disk is full"), output_folder(tmp_path / "out"):
        pass


def test_a_file_in_the_way_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(UsageError, match="is a file, not a folder"):
            require_free(path, overwrite=True)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with output_folder(tmp_path / "a" / "b") as work:
        (work / "file").touch()
    assert (tmp_path / "a" / "b" / "file").is_file()


def test_the_old_folder_comes_back_if_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    written_before(out)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target == out and not (self / "old.json").exists():
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="Input/output error"), output_folder(out, overwrite=True) as work:
        (work / "new").touch()
    assert [p.name for p in out.iterdir()] == ["old.json"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_read_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for out in (model, tmp_path / "models", Path("models/mine"), Path("models/../models/mine")):
        with pytest.raises(UsageError, match=r"would replace .*, which is read"):
            require_free(out, overwrite=True, reads=[model])
    require_free(model / "out", overwrite=True, reads=[model])
    require_free(tmp_path / "models" / "other", overwrite=True, reads=[model, "owner/name"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("scales.json", "{"),
        ("scales.json", '["calib.scales"]'),
        ("config.json", '{"format": "pt"}'),
        ("report.json", '{"calib": "0.1"}'),
    ],
)
def test_what_calib_did_not_write_is_never_replaced(tmp_path: Path, name: str, content: str) -> None:
    out = tmp_path / "notes"
    out.mkdir()
    require_free(out, overwrite=True)  # an empty folder holds nothing to lose
    (out / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"notes: was not written by calib.*choose another -o"):
        require_free(out, overwrite=True)
    with pytest.raises(UsageError, match="was not written by calib"), output_folder(out, overwrite=True):
        pass
    assert (out / name).read_text(encoding="utf-8") == content


@pytest.mark.parametrize("content", ['{"version": "1.0", "format": "calib.export"}', '{"calib": {"producer": {}}}'])
def test_records_of_calib_are_recognised(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "out" / "a.json").write_text(content, encoding="utf-8")
    require_free(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_names_the_new_folder(tmp_path: Path, *, exists: bool) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "results", tmp_path / "out"
    if exists:
        written_before(target)
    link.symlink_to(target)
    with output_folder(link, overwrite=exists) as work:
        assert work.parent == target.parent  # on the disk that the link was made for
        (work / "new").touch()
    assert link.is_symlink()
    assert [p.name for p in target.iterdir()] == ["new"]


def test_the_current_folder_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder; choose a folder inside"):
        require_free(Path(), overwrite=False)
    require_free(Path("out"), overwrite=False)
