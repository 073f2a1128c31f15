# SPDX-License-Identifier: Apache-2.0
"""`calib measure` and `quantize` on pictures, sound and pairs of text, with models that see, hear and translate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calib.measurement import Measurement
from tests import media_models
from tests.cli.commands import one_line, run
from tests.measurement.functional_probe import functional_probe
from tests.media_models import lines, picture, pil, sound

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for i in range(5):
        picture(folder / "pictures" / f"{i}.png", i, (40, 48 + 8 * (i % 2)))
        sound(folder / "sounds" / f"{i}.wav", i, 8000 if i % 2 else 16000)
    seen = [{"image": f"pictures/{i}.png", "text": f"what is number {i}"} for i in range(3)]
    talk = [
        {"role": "user", "content": [{"type": "image", "path": "pictures/3.png"}, {"type": "text", "text": "see"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    lines(folder / "seen.jsonl", seen)
    lines(folder / "talk.jsonl", [*seen, {"images": ["pictures/1.png", "pictures/2.png"], "text": "two"}])
    lines(folder / "messages.jsonl", [{"messages": talk}])
    lines(folder / "heard.jsonl", [{"audio": "sounds/0.wav", "text": "hello you"}, {"audio": "sounds/1.wav"}])
    pairs = [{"text": "good morning to you", "target": "guten morgen"}, {"text": "what is it", "target": "was ist das"}]
    lines(folder / "pairs.jsonl", pairs)
    lines(folder / "text.jsonl", [{"text": "only words here that are long enough to fill one block of tokens"}])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model(name)`: the folder of a tiny model, made once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = getattr(media_models, name)(folder / name)
        return made[name]

    return of


def measured(model: Path, data: Path, folder: Path, *more: object) -> Measurement:
    assert run("measure", model, "-d", data, "-o", folder, "-q", *more) == 0
    return Measurement.load(folder)


def probed(folder: Path, class_name: str, calls: list[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """Extremes of what each product reads, from functions that are replaced, over several forward passes."""
    model = getattr(transformers, class_name).from_pretrained(folder).eval()
    with torch.no_grad(), functional_probe(model) as seen:
        for inputs in calls:
            model(**inputs)
    return {name: (extent.low, extent.high, extent.count) for name, extent in seen.reads.items()}


def ranges(measurement: Measurement, names: list[str]) -> dict[str, tuple[float, float, int]]:
    by_name = {alias: site for site in measurement.sites.values() for alias in (site.name, *site.aliases)}
    spans = {name: by_name[f"{name}:input"].statistics.range for name in names}
    return {name: (span.min, span.max, span.count_all) for name, span in spans.items()}


def test_a_folder_of_pictures(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    found = measured(model("vit"), root / "pictures", tmp_path / "m")
    processor = ViTImageProcessorPil.from_pretrained(model("vit"))
    calls = [processor(images=[pil(root / "pictures" / f"{i}.png")], return_tensors="pt") for i in range(5)]
    naive = probed(model("vit"), "ViTForImageClassification", calls)
    assert len(naive) > 10
    assert ranges(found, list(naive)) == naive
    assert found.corpus.layout == "examples"
    assert found.corpus.holds == {"image": 5}
    assert found.corpus.documents == 5
    assert sorted(set(found.sites["classifier:input"].statistics.peaks.document.tolist())) == [0, 1, 2, 3, 4]  # type: ignore[union-attr]


def test_pictures_inside_a_parquet_file(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    files = [root / "pictures" / f"{i}.png" for i in range(5)]
    rows = [{"image": {"bytes": file.read_bytes(), "path": file.name if i else None}} for i, file in enumerate(files)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "held.parquet")
    found = measured(model("vit"), tmp_path / "held.parquet", tmp_path / "m")
    apart = measured(model("vit"), root / "pictures", tmp_path / "apart")
    assert {n: s.statistics.range.amax for n, s in found.sites.items()} == {
        n: s.statistics.range.amax for n, s in apart.sites.items()
    }
    assert found.corpus.holds == {"image": 5}
    assert [s.sha256 for s in found.corpus.sources] == [s.sha256 for s in apart.corpus.sources]
    bad = [{"image": {"bytes": files[0].read_bytes()[:40], "path": "bad.png"}}]
    parquet.write_table(pa.Table.from_pylist(bad), tmp_path / "bad.parquet")
    assert run("measure", model("vit"), "-d", tmp_path / "bad.parquet", "-o", tmp_path / "x") == 1


def test_pictures_and_text_go_through_the_chat_template(
    root: Path, model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    found = measured(model("llava"), root / "talk.jsonl", tmp_path / "m")
    processor = AutoProcessor.from_pretrained(model("llava"))
    shown = [[0], [1], [2], [1, 2]]
    texts = [*(f"u {'<image>'}what is number {i};" for i in range(3)), "u <image><image>two;"]
    calls = [
        processor(text=[text], images=[pil(root / "pictures" / f"{i}.png") for i in images], return_tensors="pt")
        for text, images in zip(texts, shown, strict=True)
    ]
    naive = probed(model("llava"), "LlavaForConditionalGeneration", calls)
    assert any("vision_tower" in name for name in naive)
    assert ranges(found, list(naive)) == naive
    site = found.sites["model.language_model.layers.0:output"]
    images = sum(int((call["input_ids"] == 146).sum()) for call in calls)
    assert site.parts["image"].range.count_all == images * site.channels
    assert found.corpus.tokens == sum(call["input_ids"].numel() for call in calls)


def test_pictures_inside_messages(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    found = measured(model("llava"), root / "messages.jsonl", tmp_path / "m")
    processor = AutoProcessor.from_pretrained(model("llava"))
    text = "u <image>see;a a cat;"
    call = processor(text=[text], images=[pil(root / "pictures" / "3.png")], return_tensors="pt")
    naive = probed(model("llava"), "LlavaForConditionalGeneration", [call])
    assert ranges(found, list(naive)) == naive


@pytest.mark.skipif(OLD, reason="AutoImageProcessor of this version is a part of torchvision")
def test_a_grid_of_patches_of_any_size(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    pictures = AutoImageProcessor.from_pretrained(model("qwen2_5_vl"))
    tokenizer = AutoTokenizer.from_pretrained(model("qwen2_5_vl"))
    found = measured(model("qwen2_5_vl"), root / "seen.jsonl", tmp_path / "m")
    calls = []
    for i in range(3):
        made = pictures(images=[pil(root / "pictures" / f"{i}.png")], return_tensors="pt")
        patches = "<|image_pad|>" * int(made["image_grid_thw"].prod() // 4)
        ids = tokenizer(f"u <|vision_start|>{patches}<|vision_end|>what is number {i};", return_tensors="pt").input_ids
        calls.append({**made, "input_ids": ids, "mm_token_type_ids": (ids == 135).long()})
    naive = probed(model("qwen2_5_vl"), "Qwen2_5_VLForConditionalGeneration", calls)
    assert ranges(found, list(naive)) == naive
    assert set(found.sites["model.language_model.layers.0:output"].parts) == {"image", "text"}


def test_a_picture_and_a_text_without_a_chat_template(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    found = measured(model("clip"), root / "seen.jsonl", tmp_path / "m")
    assert found.passed
    assert {name.partition(".")[0] for name in found.sites} >= {"text_model", "vision_model"}


def test_text_alone_names_the_tower_that_saw_nothing(
    root: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("measure", model("llava"), "-d", root / "text.jsonl", "--max-length", "16", "-o", tmp_path / "m", "-q")
    assert code == 3
    assert "every_modality" in (line := one_line(capsys.readouterr().err))
    assert "model.vision_tower" in line


def test_sound_with_a_transcript_and_without(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    import wave

    from scipy.signal import resample_poly
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    found = measured(model("whisper"), root / "heard.jsonl", tmp_path / "m", "--generate", "5", "--batch-size", "1")
    assert found.run.decoder == {"target": 1, "greedy": 1}
    extractor = AutoFeatureExtractor.from_pretrained(model("whisper"))
    network: Any = WhisperForConditionalGeneration.from_pretrained(model("whisper")).eval()
    taught = AutoTokenizer.from_pretrained(model("whisper"))("hello you")["input_ids"]
    calls = []
    for i in range(2):
        with wave.open(str(root / "sounds" / f"{i}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
            samples = resample_poly(samples, 16000 // file.getframerate(), 1).astype(np.float32)
        features = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
        ids = torch.tensor([[159, *taught[:-1]]])
        if i == 1:
            ids = torch.tensor([[159]])
            with torch.no_grad():
                while ids.shape[1] < 5:  # the fifth token is written and never read
                    last = network(input_features=features, decoder_input_ids=ids).logits[:, -1].argmax(-1)
                    ids = torch.cat([ids, last[:, None]], dim=1)
        calls.append({"input_features": features, "decoder_input_ids": ids})
    assert 147 not in calls[1]["decoder_input_ids"]  # else it would have stopped there
    naive = probed(model("whisper"), "WhisperForConditionalGeneration", calls)
    assert ranges(found, list(naive)) == naive


def test_sound_and_text_are_kept_apart(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    talk = [{"role": "user", "content": [{"type": "audio", "path": "sounds/2.wav"}, {"type": "text", "text": "so"}]}]
    data = lines(root / "talk_of_sound.jsonl", [{"audio": "sounds/0.wav", "text": "what is it"}, {"messages": talk}])
    found = measured(model("qwen2_audio"), data, tmp_path / "m")
    assert found.passed
    assert found.corpus.holds == {"audio": 2}
    site = next(site for site in found.sites.values() if site.parts and site.kind == "residual")
    assert set(site.parts) == {"audio", "text"}
    # half a second at 16 kHz and a hop of 250 samples: 32 frames, which two strides of 2 make 8 tokens
    assert site.parts["audio"].range.count_all == 2 * 8 * site.channels


def test_a_decoder_is_taught_its_targets(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = measured(model("t5"), root / "pairs.jsonl", tmp_path / "m")
    assert found.run.decoder == {"target": 2}
    assert found.corpus.holds == {"target": 2}
    tokenizer = AutoTokenizer.from_pretrained(model("t5"))
    calls = []
    for line in (root / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        target = tokenizer(pair["target"])["input_ids"]
        ids = tokenizer(pair["text"], return_tensors="pt")["input_ids"]
        calls.append({"input_ids": ids, "decoder_input_ids": torch.tensor([[0, *target[:-1]]])})
    naive = probed(model("t5"), "T5ForConditionalGeneration", calls)
    assert ranges(found, list(naive)) == naive


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_without_targets_a_decoder_reads_what_the_model_writes(
    name: str, root: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-length", "16", "-o", tmp_path / "m")
    assert run("measure", model(name), "-d", root / "text.jsonl", *options) == 0
    assert "writes greedily" in capsys.readouterr().err
    found = Measurement.load(tmp_path / "m")
    assert found.passed
    assert found.run.decoder == {"greedy": found.corpus.blocks}
    decoder = next(s for n, s in found.sites.items() if "decoder" in n and s.kind == "residual")
    rows = decoder.statistics.range.count_all / decoder.channels
    assert 1 < rows / found.run.decoder["greedy"] <= 32


def test_unequal_lengths_of_targets_are_padding_that_does_not_count(
    root: Path, model: Callable[[str], Path], tmp_path: Path
) -> None:
    same = lines(tmp_path / "same.jsonl", [{"text": "abc", "target": "x"}, {"text": "abd", "target": "xyzxyz"}])
    one = measured(model("t5"), same, tmp_path / "one", "--batch-size", "1")
    two = measured(model("t5"), same, tmp_path / "two", "--batch-size", "2")
    for name, site in one.sites.items():
        span, other = site.statistics.range, two.sites[name].statistics.range
        assert span.count_all == other.count_all, name
        assert (span.min, span.max) == pytest.approx((other.min, other.max), rel=1e-5), name


def test_shards_of_examples_make_the_whole(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("measure", model("llava"), "-d", root / "talk.jsonl", "-q")
    assert run(*common, "-o", tmp_path / "whole") == 0
    for i in range(2):
        assert run(*common, "-o", tmp_path / str(i), "--shard", f"{i}/2") == 0
    assert run("merge", tmp_path / "0", tmp_path / "1", "-o", tmp_path / "merged") == 0
    assert Measurement.load(tmp_path / "merged").sha256 == Measurement.load(tmp_path / "whole").sha256


def test_two_domains_get_equal_shares(root: Path, model: Callable[[str], Path], tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "more" / f"{i}.png", 10 + i)
    sources = ("-d", f"a={root / 'pictures'}", "-d", f"b={tmp_path / 'more'}", "--samples", "4")
    assert run("measure", model("vit"), *sources, "-o", tmp_path / "m", "-q") == 0
    assert Measurement.load(tmp_path / "m").corpus.blocks_per_domain == {"a": 2, "b": 2}


@pytest.mark.parametrize(("name", "data"), [("vit", "pictures"), ("llava", "talk.jsonl"), ("whisper", "heard.jsonl")])
def test_a_model_that_sees_or_hears_is_quantized(
    name: str, data: str, root: Path, model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert run("quantize", model(name), "-d", root / data, "-o", tmp_path / "q", "-q") == 0
    scales = json.loads((tmp_path / "q" / "scales.json").read_text())
    tower = {"vit": "vit.", "llava": "model.vision_tower", "whisper": "model.encoder.layers"}[name]
    linears = [t for t in scales["tensors"].values() if t["module"].startswith(tower) and t["kind"] == "linear_input"]
    assert linears
    assert all(t["scale"] > 0 for t in linears)
    architecture = json.loads((model(name) / "config.json").read_text())["architectures"][0]
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path / "q").eval()
    assert any(getattr(m, "quantization_scheme", None) for n, m in loaded.named_modules() if n.startswith(tower))
    if name == "llava":
        processor = AutoProcessor.from_pretrained(tmp_path / "q")
        call = processor(text=["<image>what"], images=[pil(root / "pictures" / "0.png")], return_tensors="pt")
        plain = AutoModelForImageTextToText.from_pretrained(model(name)).eval()
        with torch.no_grad():
            expected, got = plain(**call).logits.flatten(), loaded(**call).logits.flatten()
        assert torch.nn.functional.cosine_similarity(expected, got, dim=0) > 0.99


def test_sites_of_a_model_that_only_sees(model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sites", model("vit"), "--json") == 0
    names = [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]]
    assert "vit.embeddings.patch_embeddings:output" in names
    assert "classifier:output" in names


def _broken(root: Path, folder: Path) -> dict[str, Path]:
    good = (root / "pictures" / "0.png").read_bytes()
    (folder / "cut").mkdir()
    (folder / "cut" / "bad.png").write_bytes(good[: len(good) // 2])
    (folder / "empty").mkdir()
    (folder / "empty" / "x.bin").write_bytes(b"")
    (folder / "hiss").mkdir()
    (folder / "hiss" / "bad.wav").write_bytes(b"RIFF")
    lines(folder / "gone.jsonl", [{"image": "nowhere.png"}])
    lines(folder / "url.jsonl", [{"image": "https://example.org/a.png"}])
    lines(folder / "number.jsonl", [{"image": 7}])
    lines(folder / "silent.jsonl", [{"image": str(root / "pictures" / "0.png")}])
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    lines(folder / "count.jsonl", [{"messages": talk, "image": str(root / "pictures" / "0.png")}])
    return {path.name: path for path in folder.iterdir()} | {"pictures": root / "pictures", "text": root / "text.jsonl"}


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("vit", "cut", 1, "bad.png: cannot be read as a picture"),
        ("vit", "gone.jsonl", 1, "gone.jsonl:1: nowhere.png: no such file"),
        ("vit", "url.jsonl", 1, "is no path"),
        ("vit", "number.jsonl", 1, "int' is no path"),
        ("vit", "text", 1, "holds text, and vit takes pictures"),
        ("vit", "empty", 1, "vit takes pictures"),
        ("vit", None, 1, "builtin: holds text, and vit takes pictures"),
        ("whisper", "hiss", 1, "bad.wav: cannot be read as sound"),
        ("whisper", "pictures", 1, "holds pictures, and whisper takes sound"),
        ("llava", "count.jsonl", 1, "place 2 pictures and sounds and 1 are given"),
        ("clip", "silent.jsonl", 1, "has no text and the model reads some"),
        ("t5", "pictures", 1, "holds pictures, and t5 takes text only"),
    ],
)
def test_data_that_do_not_fit_are_named(
    name: str,
    data: str | None,
    code: int,
    words: str,
    root: Path,
    model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").mkdir()
    given = ("-d", _broken(root, tmp_path / "data")[data]) if data else ()
    assert run("measure", model(name), *given, "-o", tmp_path / "m") == code
    assert words in one_line(capsys.readouterr().err)
    assert not (tmp_path / "m").exists()


def test_a_model_of_text_takes_no_pictures_but_passes_over_them_in_a_folder_of_texts(
    root: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", tiny_llama, "-d", root / "seen.jsonl", "-o", tmp_path / "m") == 1
    assert "holds pictures, and tiny_llama0 takes text only" in one_line(capsys.readouterr().err)
    picture(tmp_path / "texts" / "a.png")
    (tmp_path / "texts" / "a.txt").write_text("words and words. " * 40)
    options = ("--max-length", "16", "--samples", "2", "-q")
    assert run("measure", tiny_llama, "-d", tmp_path / "texts", "-o", tmp_path / "m", *options) == 0


def test_a_folder_without_a_processor_is_named(
    root: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(model("vit"), tmp_path / "bare", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    assert run("measure", tmp_path / "bare", "-d", root / "pictures", "-o", tmp_path / "m") == 1
    assert "no preprocessor_config.json beside its weights" in one_line(capsys.readouterr().err)


def test_options_about_text_are_refused_for_examples(
    root: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (model("vit"), "-d", root / "pictures", "-o", tmp_path / "m")
    assert run("measure", *common, "--add-bos") == 2
    assert "--add-bos" in one_line(capsys.readouterr().err)
    assert run("quantize", *common, "--cure", "smooth") == 2
    assert "--cure" in one_line(capsys.readouterr().err)
    assert run("evaluate", model("vit"), "-d", root / "pictures") == 2
    assert "calib evaluate: works on blocks of text" in one_line(capsys.readouterr().err)
    assert run("measure", model("llava"), "-d", root / "talk.jsonl", "-o", tmp_path / "m", "--batch-size", "2") == 2
    assert "unequal shapes" in one_line(capsys.readouterr().err)
