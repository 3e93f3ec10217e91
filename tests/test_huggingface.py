"""Folders in transformers and timm layout: PyTorch's features and logits, their preprocessing, clear errors."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from models import GraftError, freezing, inputs, layouts
from models.checkpoints import read_safetensors, read_torch
from models.classifier import Classifier
from models.huggingface import load_huggingface_folder
from models.huggingface_preprocess import timm_preprocess, transformers_preprocess
from tests.conftest import two_phase_run

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "huggingface"
INPUT_SIZES = {"vit": (32, 32), "timm_vit": (32, 32), "resnet": (61, 64), "timm_resnet": (97, 64)}
FORMS = ("safetensors", "sharded", "bin")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURES / "expected.npz")


def folder_as(form: str, name: str, folder: pathlib.Path, change=None) -> pathlib.Path:
    """A copy of one of the fixture's folders with its weights in one form; `change` may edit them, or be None."""
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json", "README.md"):
        if (FIXTURES / name / file).is_file():
            shutil.copy(FIXTURES / name / file, folder)
    if form == "bin":
        shutil.copy(FIXTURES / name / "pytorch_model.bin", folder)
    elif form == "sharded" and name == "vit":  # as transformers wrote them
        for file in (FIXTURES / name).glob("*.safetensors*"):
            shutil.copy(file, folder)
    else:
        state = {key: np.ascontiguousarray(a) for key, a in read_torch(FIXTURES / name / "pytorch_model.bin").items()}
        if change:
            change(state)
        write_safetensors(folder, state, 3 if form == "sharded" else 1)
    return folder


def write_safetensors(folder, state, shards):
    if shards == 1:
        return safetensors.numpy.save_file(state, folder / "model.safetensors")
    names = sorted(state)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file({name: state[name] for name in names[index::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[index::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_json(path, **changes):
    """Set keys of a JSON file; a value of None takes the key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def features_of(backbone, name):
    batch = np.random.RandomState(0).randn(2, *INPUT_SIZES[name], 3).astype(np.float32)
    return np.asarray(backbone.pooled(backbone.encoder(batch, training=False)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INPUT_SIZES)
def test_features_and_logits_equal_pytorchs(name, form, expected, tmp_path):
    folder = folder_as(form, name, tmp_path / "model")
    backbone = load_huggingface_folder(folder)
    features = features_of(backbone, name)
    np.testing.assert_allclose(features, expected[f"{name}_features"], atol=1e-5)
    kernel, bias = backbone.source_head
    assert kernel.dtype == bias.dtype == np.float32
    np.testing.assert_allclose(features @ kernel + bias, expected[f"{name}_logits"], atol=1e-5)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert backbone.source["file"] == ", ".join(file.name for file in files)
    assert backbone.source["sha256"] == ", ".join(hashes)


def test_shards_of_bin_files(expected, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "timm_vit", folder)
    (folder / "pytorch_model.bin").unlink()
    features = features_of(load_huggingface_folder(folder), "timm_vit")
    np.testing.assert_allclose(features, expected["timm_vit_features"], atol=1e-5)


def test_safetensors_are_preferred_to_a_bin_file(tmp_path, cache):
    folder = folder_as("safetensors", "timm_vit", tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert load_huggingface_folder(folder).source["file"] == "model.safetensors"
    assert not cache.exists()


def test_a_bin_file_is_converted_once_and_found_by_its_content(tmp_path, cache):
    folder = folder_as("bin", "timm_vit", tmp_path / "model")
    first = features_of(load_huggingface_folder(folder), "timm_vit")
    (converted,) = (cache / "converted").iterdir()
    assert [file.name for file in converted.iterdir()] == ["model.safetensors"]
    assert str(read_safetensors(converted / "model.safetensors")["norm.weight"].dtype) == "bfloat16"
    before = (converted / "model.safetensors").stat()
    again = features_of(load_huggingface_folder(folder_as("bin", "timm_vit", tmp_path / "copy")), "timm_vit")
    after = (converted / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert list((cache / "converted").iterdir()) == [converted]
    np.testing.assert_array_equal(first, again)
    # What is cached is what is used: other numbers there give other features.
    state = read_safetensors(converted / "model.safetensors")
    safetensors.numpy.save_file({key: array * 0 for key, array in state.items()}, converted / "model.safetensors")
    assert np.abs(features_of(load_huggingface_folder(folder), "timm_vit")).max() == 0


def test_a_bin_file_that_runs_code_or_is_cut_off_leaves_nothing_behind(tmp_path, cache):
    folder = folder_as("bin", "vit", tmp_path / "model")
    whole = (folder / "pytorch_model.bin").read_bytes()
    shutil.copy(FIXTURES.parent / "torch" / "malicious.zip.pth", folder / "pytorch_model.bin")
    with pytest.raises(GraftError, match=r"pytorch_model\.bin: the file tries to run code"):
        load_huggingface_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GraftError, match=r"pytorch_model\.bin: not a whole PyTorch checkpoint"):
        load_huggingface_folder(folder)
    assert list((cache / "converted").iterdir()) == []


@pytest.mark.parametrize("name", INPUT_SIZES)
def test_a_model_without_a_classifier(name, expected, tmp_path):
    def without_head(state):
        for key in [key for key in state if key.startswith(("classifier", "head", "fc"))]:
            del state[key]
        for key in [key for key in state if key.startswith(f"{name}.")]:  # ViTModel and ResNetModel write no prefix
            state[key.removeprefix(f"{name}.")] = state.pop(key)

    backbone = load_huggingface_folder(folder_as("safetensors", name, tmp_path / "model", without_head))
    assert backbone.source_head is None
    np.testing.assert_allclose(features_of(backbone, name), expected[f"{name}_features"], atol=1e-5)


def test_the_epsilon_of_transformers_vit_is_the_configs(tmp_path):
    folder = folder_as("safetensors", "vit", tmp_path / "model")
    exact = features_of(load_huggingface_folder(folder), "vit")
    edit_json(folder / "config.json", layer_norm_eps=0.1)
    assert np.abs(features_of(load_huggingface_folder(folder), "vit") - exact).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit", ["stem", "transformer_block_1", "transformer_block_2", "transformer_block_3"]),
        ("timm_resnet", ["stem", *(f"stack{unit}" for unit in ("0_block0", "1_block0", "1_block1"))]),
    ],
)
def test_blocks_are_units_and_depth_1_thaws_the_top_one(name, blocks):
    backbone = load_huggingface_folder(FIXTURES / name)
    assert [block.name for block in backbone.blocks][: len(blocks)] == blocks
    model = Classifier(backbone, 2)
    freezing.unfreeze_top(model, 1, train_batch_norm=True)
    trainable = {id(weight) for weight in backbone.encoder.trainable_weights}
    assert trainable
    assert trainable <= {id(weight) for weight in backbone.blocks[-1].weights}


def test_licence_comes_from_the_readme_or_timms_config(tmp_path):
    assert load_huggingface_folder(FIXTURES / "vit").source["licence"] == "apache-2.0"
    folder = folder_as("bin", "timm_vit", tmp_path / "model")
    config = layouts.read_config(folder)
    assert layouts.licence(folder, config) == "apache-2.0"
    (folder / "README.md").write_text("# no front matter\nlicense: made-up\n")
    assert layouts.licence(folder, {}) == "unknown"
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert layouts.licence(folder, config) == "cc-by-4.0"


# What the libraries do, with PIL alone.
def pil_resize(picture, size, name):
    modes = {"nearest": 0, "lanczos3": 1, "bilinear": 2, "bicubic": 3}
    return np.asarray(Image.fromarray(picture).resize(size[::-1], modes[name]), np.float32)


def pil_crop(picture, edge, side, name, middle):
    """Resize the shorter side to `edge`, then cut `side` x `side` out of the centre."""
    height, width = picture.shape[:2]
    size = (edge * height // min(height, width), edge * width // min(height, width))
    top, left = (middle(size[0] - side), middle(size[1] - side))
    return pil_resize(picture, size, name)[top : top + side, left : left + side]


def half_rounded(number):
    return round(number / 2)  # torchvision; half to even


def test_preprocessing_is_the_libraries_own(expected):
    """Against the pixels that transformers' and timm's own code made, committed with the fixture."""
    middles = {"resnet": lambda number: number // 2, "timm_vit": half_rounded, "timm_resnet": half_rounded}
    edges = {"resnet": 36, "timm_vit": 35, "timm_resnet": 33}
    for name in INPUT_SIZES:
        preprocess = load_huggingface_folder(FIXTURES / name).preprocess
        assert preprocess.antialias
        for index in range(3):
            picture = expected[f"picture_{index}"]
            if name == "vit":
                theirs = pil_resize(picture, (32, 32), "bilinear")
                assert preprocess.aspect == "stretch"
            else:
                theirs = pil_crop(picture, edges[name], 32, preprocess.interpolation, middles[name])
                assert preprocess.crop_share == 32 / edges[name]
            scaled = np.asarray(inputs.scale_image(theirs, preprocess))
            np.testing.assert_allclose(scaled, expected[f"{name}_pixels"][index], atol=1e-5, err_msg=name)
            ours = np.asarray(inputs.resize_image(picture, preprocess))
            difference = np.abs(ours - theirs).mean()
            # Steep waves of 75 pixels at a tiny size: half a pixel apart makes more than in a photograph.
            assert difference < (0.5 if name == "vit" else 10), (name, index, difference)


@pytest.mark.parametrize("shape", [(144, 216), (216, 144), (288, 288)])
def test_crop_then_resize_equals_pil_where_the_boxes_coincide(shape, expected):
    preprocess = load_huggingface_folder(FIXTURES / "resnet").preprocess
    picture = np.asarray(Image.fromarray(expected["picture_2"]).resize(shape[::-1]))
    theirs = pil_crop(picture, 36, 32, "bicubic", lambda number: number // 2)
    difference = np.abs(np.asarray(inputs.resize_image(picture, preprocess)) - theirs)
    assert difference.mean() < 0.5
    assert difference.max() < 3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"size": 40}, {"image_size": (40, 40), "crop_share": 40 / 45}),
        ({"size": {"shortest_edge": 384}}, {"image_size": (384, 384), "aspect": "stretch", "crop_share": 1.0}),
        ({"size": {"height": 40, "width": 48}}, {"image_size": (40, 48), "aspect": "stretch"}),
        (
            {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": 64},
                "do_center_crop": True,
                "crop_size": {"height": 56, "width": 56},
            },
            {"image_size": (56, 56), "aspect": "crop", "crop_share": 0.875},
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 64, "do_center_crop": True, "crop_size": 64},
            {"image_size": (64, 64), "aspect": "crop", "crop_share": 1.0},
        ),
        (
            {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 40, "resample": 1},
            {"image_size": (40, 40), "aspect": "stretch", "interpolation": "lanczos3"},
        ),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "deviation": (255.0,) * 3}),
        ({"do_normalize": False, "do_rescale": False}, {"mean": (0.0,) * 3, "deviation": (1.0,) * 3}),
        ({"do_rescale": False, "image_mean": [1, 2, 3]}, {"mean": (1.0, 2.0, 3.0), "deviation": (0.5,) * 3}),
        ({"rescale_factor": 1 / 127.5}, {"mean": (63.75,) * 3, "deviation": (63.75,) * 3}),
    ],
)
def test_settings_of_transformers_processors(changes, found, tmp_path):
    folder = folder_as("bin", "resnet", tmp_path / "model")
    edit_json(folder / "preprocessor_config.json", **changes)
    preprocess = transformers_preprocess(folder, layouts.read_config(folder), "resnet", (None, None))
    assert {name: getattr(preprocess, name) for name in found} == found


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"crop_mode": "squash", "crop_pct": 1.0}, {"aspect": "stretch", "interpolation": "bicubic"}),
        ({"input_size": [3, 64, 48], "crop_pct": 1.0}, {"image_size": (64, 48), "aspect": "crop", "crop_share": 1.0}),
        ({"interpolation": "bilinear", "test_input_size": [3, 64, 64]}, {"interpolation": "bilinear"}),
    ],
)
def test_settings_of_timm(changes, found, tmp_path):
    folder = folder_as("bin", "timm_resnet", tmp_path / "model")
    settings = layouts.read_config(folder)["pretrained_cfg"]
    edit_json(folder / "config.json", pretrained_cfg={**settings, **changes})
    found = {"image_size": (32, 32), **found}
    preprocess = timm_preprocess(folder, layouts.read_config(folder), "resnet", (None, None))
    assert {name: getattr(preprocess, name) for name in found} == found


def test_without_a_word_on_preprocessing_the_familys_own_holds(tmp_path):
    """A fixed-size ViT keeps its encoder's size; before timm 0.9 the settings lay in config.json itself."""
    found = {}
    for name in INPUT_SIZES:
        folder = folder_as("bin", name, tmp_path / name)
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
        edit_json(folder / "config.json", pretrained_cfg=None)
        found[name] = load_huggingface_folder(folder).preprocess
    assert [p.image_size for p in found.values()] == [(32, 32), (32, 32), (224, 224), (224, 224)]
    assert [p.aspect for p in found.values()] == ["stretch", "crop", "crop", "crop"]
    assert [p.interpolation for p in found.values()] == ["bilinear", "bicubic", "bicubic", "bilinear"]
    assert found["vit"].mean == found["timm_vit"].mean == (127.5,) * 3
    np.testing.assert_allclose(found["resnet"].mean, [123.675, 116.28, 103.53])
    folder = folder_as("bin", "timm_vit", tmp_path / "older")
    edit_json(folder / "config.json", pretrained_cfg=None, **layouts.read_config(folder)["pretrained_cfg"])
    assert load_huggingface_folder(folder).preprocess == load_huggingface_folder(FIXTURES / "timm_vit").preprocess


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("vit", "config", {"model_type": "swin"}, r"type 'swin'; as image backbones Graft knows resnet, vit"),
        (
            "timm_vit",
            "config",
            {"architecture": "vit_base_patch16_clip_224"},
            r"'vit_base_patch16_clip_224'; Graft knows",
        ),
        ("timm_resnet", "config", {"architecture": "resnet50d"}, r"'resnet50d'; Graft knows resnet18, 26, 34"),
        ("vit", "config", {"hidden_act": "quick_gelu"}, r"hidden_act = quick_gelu, with which a vit computes"),
        ("resnet", "config", {"downsample_in_bottleneck": True}, r"downsample_in_bottleneck = True"),
        ("timm_vit", "config", {"global_pool": "avg"}, r"global_pool = avg"),
        ("timm_vit", "config", {"model_args": {"num_heads": 2, "reg_tokens": 4}}, r"reg_tokens = set"),
        (
            "vit",
            "config",
            {"image_size": 64},
            r"pos_embed holds 16 patches .* 64 x 64 pixels in patches of 8 x 8 make 64",
        ),
        ("vit", "config", {"num_attention_heads": 3}, r"a width of 16 does not divide into 3 heads"),
        ("vit", "preprocessor_config", {"size": {"height": 48, "width": 48}}, r"48 x 48 pixels, .* built for 32 x 32"),
        ("vit", "preprocessor_config", {"resample": 5}, r"has 5 as resample; Graft knows 0, 1, 2, 3"),
        ("vit", "preprocessor_config", {"do_resize": False}, r"do_resize false"),
        ("vit", "preprocessor_config", {"image_std": [1, 2]}, r"has \[1, 2\] as image_std; expected three numbers"),
        (
            "resnet",
            "preprocessor_config",
            {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            r"which Graft cannot reproduce",
        ),
    ],
)
def test_what_graft_would_compute_otherwise_is_refused(name, file, changes, message, tmp_path):
    folder = folder_as("bin", name, tmp_path / "model")
    edit_json(folder / f"{file}.json", **changes)
    with pytest.raises(GraftError, match=message):
        load_huggingface_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "border"},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"interpolation": "hamming"},
        {"input_size": 32},
        {"crop_pct": 0},
    ],
)
def test_timm_settings_that_cannot_be_reproduced(changes, tmp_path):
    folder = folder_as("bin", "timm_resnet", tmp_path / "model")
    settings = layouts.read_config(folder)["pretrained_cfg"]
    edit_json(folder / "config.json", pretrained_cfg={**settings, **changes})
    with pytest.raises(GraftError, match=r"config\.json has .*" + next(iter(changes))):
        timm_preprocess(folder, layouts.read_config(folder), "resnet", (None, None))


def test_weights_that_do_not_fit_are_named(tmp_path):
    def extra(state):
        state["blocks.0.ls1.gamma"] = np.ones(16, np.float32)

    with pytest.raises(GraftError, match=r"no place for: blocks\.0\.ls1\.gamma\. It is a variant"):
        load_huggingface_folder(folder_as("safetensors", "timm_vit", tmp_path / "extra", extra))
    with pytest.raises(GraftError, match=r"the weights lack blocks\.1\.norm1\.bias"):
        remove = "vit.layers.1.layernorm_before.bias"
        load_huggingface_folder(folder_as("safetensors", "vit", tmp_path / "less", lambda state: state.pop(remove)))

    def wider(state):
        state["layer2.0.conv2.weight"] = np.ones((16, 17, 3, 3), np.float32)

    with pytest.raises(
        GraftError, match=r"layer2\.0\.conv2\.weight has the shape \(16, 17, 3, 3\), which does not fit"
    ):
        load_huggingface_folder(folder_as("safetensors", "timm_resnet", tmp_path / "wider", wider))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    folder = folder_as("sharded", "resnet", tmp_path / "model")
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x10")
    with pytest.raises(GraftError, match=r"model-00002-of-00003\.safetensors: not a whole safetensors file"):
        load_huggingface_folder(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(GraftError, match=r"lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index"):
        load_huggingface_folder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere"}}')
    with pytest.raises(GraftError, match=r"names no shards"):
        load_huggingface_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(GraftError, match=r"holds a config\.json but no weights: expected model\.safetensors, pytorch_"):
        load_huggingface_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(GraftError, match=r"config\.json could not be read as JSON"):
        load_huggingface_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(GraftError, match=r"holds no config\.json"):
        load_huggingface_folder(folder)


def test_layouts_are_told_apart(tiny_preset, tmp_path):
    found = {name: layouts.folder_layout(FIXTURES / name) for name in ("vit", "timm_resnet")}
    assert found == {"vit": "huggingface", "timm_resnet": "timm"}
    assert layouts.folder_layout(tiny_preset) == "kerashub"
    assert not layouts.is_huggingface_folder(tiny_preset)
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(GraftError, match=r"of no layout that Graft knows: .* Its keys: layers"):
        layouts.folder_layout(tmp_path)
    (tmp_path / "config.json").write_text("[3]")
    with pytest.raises(GraftError, match="holds a JSON list; expected an object"):
        layouts.is_huggingface_folder(tmp_path)


def test_a_wrong_folder_answers_without_tensorflow(tmp_path):
    folder = folder_as("bin", "vit", tmp_path / "model")
    edit_json(folder / "config.json", model_type="swin")
    script = (
        "import pathlib, sys\nfrom models import GraftError, layouts\n"
        "try: layouts.check_huggingface_folder(pathlib.Path(sys.argv[1]))\n"
        "except GraftError as error: print(error)\n"
        "print(sorted({'tensorflow', 'keras', 'keras_hub'} & set(sys.modules)))"
    )
    root = pathlib.Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "-c", script, folder], cwd=root, capture_output=True, text=True, check=True)
    assert "the type 'swin'" in said.stdout
    assert said.stdout.endswith("[]\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("resnet", "safetensors"),
        ("timm_resnet", "sharded"),
        ("resnet", "bin"),
        ("timm_vit", "safetensors"),
        ("vit", "sharded"),
        ("timm_vit", "bin"),
    ],
)
def test_a_folder_trains_exports_and_verifies(name, form, png_folder, tmp_path):
    metrics, version = two_phase_run(png_folder, folder_as(form, name, tmp_path / "model"), tmp_path / "run")
    assert [phase["name"] for phase in metrics["phases"]] == ["head", "fine_tune"]
    assert metrics["phases"][1]["trainable_parameters"] > metrics["phases"][0]["trainable_parameters"]
    assert (version / "saved_model.pb").is_file()
