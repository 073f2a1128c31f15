# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from calib.distill.data import ImageSet, read_records
from calib.errors import CorpusError


def write_png(path: Path, colour: tuple[int, int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (6, 4), colour).save(path)


def write_idx(path: Path, values: torch.Tensor) -> None:
    head = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    path.write_bytes(gzip.compress(head + bytes(values.flatten().tolist())))


def test_rows_of_text_files_are_read_alike(tmp_path: Path) -> None:
    rows = [("a good day", "pos"), ("bad", "neg"), ("fine, really", "pos")]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows))
    (tmp_path / "test.csv").write_text("sentence,label\n" + "\n".join(f'"{t}",{y}' for t, y in rows))
    for split in ("train", "test"):
        found = read_records(str(tmp_path), split)
        assert list(found.inputs) == [text for text, _ in rows]
        assert found.class_names == ("neg", "pos")
        assert found.labels == (1, 0, 1)


def test_parquet_and_numbers_in_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "label": [2, 0]}), tmp_path / "train.parquet")
    assert read_records(str(tmp_path / "train.parquet"), "train").labels == (2, 0)
    (tmp_path / "t.tsv").write_text("text\tlabel\nx\t2\ny\t0\n")
    found = read_records(str(tmp_path / "t.tsv"), "train")
    assert found.labels == (2, 0)
    assert found.class_names == ("0", "1", "2")


def test_a_folder_of_folders_of_images(tmp_path: Path) -> None:
    write_png(tmp_path / "train" / "red" / "1.png", (255, 0, 0))
    write_png(tmp_path / "train" / "blue" / "1.png", (0, 0, 255))
    write_png(tmp_path / "train" / "blue" / "2.png", (0, 0, 255))
    found = read_records(str(tmp_path), "train")
    assert found.class_names == ("blue", "red")
    assert found.labels == (0, 0, 1)
    image, label, index = ImageSet(found, size=8, mean=(0.0,), std=(1.0,))[2]
    assert image.shape == (3, 8, 8)
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    assert (int(label), int(index)) == (1, 2)
    grey, _, _ = ImageSet(found, channels=1, mean=(0.0,), std=(1.0,))[0]
    assert grey.shape == (1, 4, 6)
    torch.testing.assert_close(grey.mean(), torch.tensor(0.114))


def test_a_list_names_images_relative_to_itself_and_a_table_holds_them(tmp_path: Path) -> None:
    write_png(tmp_path / "shown" / "1.png", (255, 0, 0))
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "shown/1.png", "label": "red"}))
    listed = read_records(str(tmp_path), "train")
    held = {"bytes": (tmp_path / "shown" / "1.png").read_bytes(), "path": "elsewhere.png"}
    for found in (listed, replace(listed, inputs=[held])):
        image, _, _ = ImageSet(found, mean=(0.0,), std=(1.0,))[0]
        assert image[:, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_mnist_files_of_both_splits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 5), ("t10k", 3)):
        pixels = torch.randint(256, (count, 4, 4), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8))
        found = read_records(str(tmp_path), "train" if prefix == "train" else "test")
        assert found.labels == tuple(range(count))
        assert torch.equal(torch.stack(list(found.inputs))[:, 0], pixels)


def test_tensors_pass_through(tmp_path: Path) -> None:
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    save_file({"inputs": inputs, "labels": torch.tensor([0, 1, 0, 1])}, tmp_path / "test.safetensors")
    found = ImageSet(read_records(str(tmp_path), "test"))
    assert torch.equal(torch.stack([found[n][0] for n in range(4)]), inputs)


def test_labels_take_the_order_of_the_model_that_knows_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "NEG"}\n{"text": "y", "label": "pos"}')
    found = read_records(str(tmp_path / "a.jsonl"), "train")
    assert found.renamed({"pos": 0, "neg": 1}).labels == (1, 0)
    assert found.renamed({"LABEL_0": 0, "LABEL_1": 1}).labels == (0, 1)
    with pytest.raises(CorpusError, match="pos"):
        found.renamed({"neg": 0, "neutral": 1})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"words": "x", "label": 1}', "text or image"),
        ("a.jsonl", '{"text": "x"}', "no label"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "fraction"),
        ("a.jsonl", '{"text": "x", "label": -1}', "labels -1"),
        ("a.jsonl", "no json", "cannot be read"),
        ("a.jsonl", "", "no sample"),
        ("a.doc", "x", "unsupported suffix"),
        ("a.safetensors", "x", "cannot be read"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=words) as error:
        read_records(str(tmp_path / name), "train")
    assert name in str(error.value)


def test_missing_and_damaged_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        read_records(str(tmp_path / "nothing"), "train")
    with pytest.raises(CorpusError, match="no images"):
        read_records(str(tmp_path), "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match="without train-labels"):
        read_records(str(tmp_path), "train")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match="not an IDX file"):
        read_records(str(tmp_path), "train")


def test_a_hub_data_set_without_the_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install calib\[datasets\]"):
        read_records("hub:owner/name", "train")


def test_a_hub_data_set_is_read_with_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):  # type: ignore[type-arg]
        def __init__(self, rows: list[dict[str, object]]) -> None:
            super().__init__(rows)
            self.features = {"text": None, "label": SimpleNamespace(names=["no", "yes"])}

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        if split != "train":
            raise ValueError(f"Unknown split {split}")
        assert (name, config) == ("owner/name", "small")
        return Rows([{"text": "x", "label": 1}, {"text": "y", "label": 0}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_records("hub:owner/name@small", "train")
    assert (found.labels, found.class_names) == ((1, 0), ("no", "yes"))
    with pytest.raises(CorpusError, match="Unknown split"):
        read_records("hub:owner/name@small", "validation")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(CorpusError, match=r"broken\.png"):
        ImageSet(read_records(str(tmp_path), "train"))[0]
