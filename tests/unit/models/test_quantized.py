"""Folders of weights in few bits: the numbers they stand for, who may start from them, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chats import byte_tokenizer
from tests.small_folder import write_folder
from trainer.models.bnb_format import eight_bit, four_bit
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, WeightFiles
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import Full, LoRA
from trainer.models.stored import StoredWeights
from trainer.parallel.ddp import DDP
from trainer.pipelines.ppo import PPO

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def library():
    """The functions of bitsandbytes, whose plea for another package is not printed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes (extra: quant)")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("plain") / "model")


def rewritten(source: Path, folder: Path, parts, settings: dict) -> Path:
    """A copy of a folder in which every matrix of a block is the tensors that ``parts(weight)`` gives, by ending."""
    shutil.copytree(source, folder)
    stored = load_file(source / "model.safetensors")
    for name in [n for n, t in stored.items() if ".layers." in n and t.ndim == 2]:
        stem = name.removesuffix("weight")
        stored |= {stem + ending: tensor.contiguous() for ending, tensor in parts(stored.pop(name)).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def numbers(library, weight, **options):
    """A weight as the library's dequantisation gives it back.

    Of all in one row: its kernel for CPUs (0.50) takes blocks for parts of rows, and reads others' maxima in rows that 64
    does not divide.
    """
    codes, state = library.quantize_4bit(weight, **options)
    state.shape = [1, 2 * codes.numel()]
    return library.dequantize_4bit(codes, state).flatten()[: weight.numel()].view(weight.shape)


def four_bit_parts(library, **options):
    """What transformers stores of a layer's weight when it was loaded in four bits."""

    def parts(weight):
        codes, state = library.quantize_4bit(weight, **options)
        return {"weight": codes, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}

    return parts


@pytest.fixture(scope="module")
def nf4(library, plain, tmp_path_factory) -> Path:
    """The plain folder as transformers and bitsandbytes store it with double quantisation."""
    parts = four_bit_parts(library, quant_type="nf4", compress_statistics=True)
    return rewritten(plain, tmp_path_factory.mktemp("nf4") / "model", parts, NF4)


def record(**changes) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 4, "dtype": "float32", "shape": [2, 3], **changes}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_a_code_is_an_entry_of_the_table_times_its_block_s_maximum():
    parts = {
        "weight": torch.tensor([[0x0F], [0x12], [0x10]], dtype=torch.uint8),  # the high half first
        "weight.quant_map": torch.arange(16.0),
        "weight.absmax": torch.tensor([10.0, 0.5]),  # of four weights and of the last two
        "weight.quant_state.bitsandbytes__nf4": record(),
    }
    assert four_bit(parts).tolist() == [[0.0, 150.0, 10.0], [20.0, 0.5, 0.0]]
    parts |= {
        "weight.absmax": torch.tensor([3, 1], dtype=torch.uint8),
        "weight.nested_quant_map": torch.arange(256.0),
        "weight.nested_absmax": torch.tensor([2.0, 8.0]),  # blocks of one maximum each
        "weight.quant_state.bitsandbytes__nf4": record(nested_blocksize=1, nested_offset=0.25),
    }
    # Maxima 3 * 2 + 0.25 and 1 * 8 + 0.25.
    assert four_bit(parts).tolist() == [[0.0, 93.75, 6.25], [12.5, 8.25, 0.0]]


def test_a_row_of_eight_bit_codes_has_its_largest_value_at_127():
    parts = {"weight": torch.tensor([[127, -127], [0, 1]], dtype=torch.int8), "SCB": torch.tensor([2.0, 254.0])}
    torch.testing.assert_close(eight_bit(parts), torch.tensor([[2.0, -2.0], [0.0, 2.0]]), rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="weight_format is 2, and only rows"):
        eight_bit({**parts, "weight_format": torch.tensor(2, dtype=torch.uint8)})


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", [(48, 64), (24, 16), (5, 7), (300, 130)], ids=str)
def test_four_bit_weights_are_the_numbers_of_the_library(library, kind, nested, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    options = {"quant_type": kind, "compress_statistics": nested}
    parts = four_bit_parts(library, **options)(weight)
    assert torch.equal(four_bit(parts), numbers(library, weight, **options))
    # As FSDP wants it, bytes are stored in the format of the other weights.
    if (codes := parts["weight"].flatten()).numel() % 2 == 0:
        assert torch.equal(four_bit({**parts, "weight": codes.view(torch.bfloat16)}), four_bit(parts))


def test_eight_bit_weights_are_the_numbers_of_the_library(library):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).half()
    codes, maxima, _ = library.int8_vectorwise_quant(weight)
    theirs = library.int8_vectorwise_dequant(codes, maxima)
    assert torch.equal(eight_bit({"weight": codes, "SCB": maxima}), theirs.float())


def test_a_folder_in_four_bits_opens_as_numbers_and_says_so(library, plain, nf4):
    load = ModelLoader(Model(path=str(nf4)), DDP(), 0, byte_tokenizer().vocab_size)
    model, stored = dict(load.load().named_parameters()), load_file(plain / "model.safetensors")
    assert model.keys() == stored.keys()
    for name, original in stored.items():
        expected = original
        if ".layers." in name and original.ndim == 2:
            expected = numbers(library, original, quant_type="nf4", compress_statistics=True)
            assert not torch.equal(expected, original)
        assert torch.equal(model[name], expected), name
    files = WeightFiles(plain)
    assert list(load.remarks()) == [
        f"model.path={nf4}: 14 of {len(files.files)} weights are stored as bitsandbytes nf4 and read as numbers"
    ]
    assert load.fingerprint() != ModelLoader(Model(path=str(plain)), DDP(), 0, 265).fingerprint()


def test_weights_and_their_parts_may_lie_in_several_files(nf4, tmp_path):
    folder = Path(shutil.copytree(nf4, tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{n % 3}.safetensors" for n, name in enumerate(sorted(stored))}
    for file in set(where.values()):
        save_file({name: stored[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    one, several = WeightFiles(nf4), WeightFiles(folder)
    assert one.files.keys() == several.files.keys()
    assert all(torch.equal(one.tensor(name), several.tensor(name)) for name in one.files)
    before = several.fingerprint()
    maxima = next(name for name in sorted(stored) if name.endswith(".absmax"))
    stored[maxima] = stored[maxima] ^ 1
    save_file({name: stored[name] for name in where if where[name] == where[maxima]}, folder / where[maxima])
    assert WeightFiles(folder).fingerprint() != before


def test_names_of_an_image_text_model_s_text_part_are_read(nf4, tmp_path):
    folder = Path(shutil.copytree(nf4, tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in stored.items()}
    save_file({**renamed, "model.vision_tower.a": torch.ones(1)}, folder / "model.safetensors")
    one, other = WeightFiles(nf4), WeightFiles(folder)
    assert one.files.keys() == other.files.keys()
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.files)
    assert other.left_out == "only the text part is read: 1 tensors of other parts are left out (vision_tower 1)"


def test_packed_weights_are_given_as_they_are_stored(nf4, plain):
    stored = StoredWeights(nf4, read_shape(nf4))
    codes, maxima, numbers = stored.packed(UP)
    parts = load_file(nf4 / "model.safetensors")
    assert torch.equal(codes, parts[UP].flatten())
    assert torch.equal(maxima, parts[f"{UP}.absmax"])
    state = json.loads(bytes(parts[f"{UP}.quant_state.bitsandbytes__nf4"].tolist()))
    floats = numbers.view(torch.float32)
    assert torch.equal(floats[:-1], parts[f"{UP}.nested_absmax"])
    assert floats[-1].item() == state["nested_offset"]
    assert stored.packed("model.norm.weight") is None
    assert StoredWeights(plain, read_shape(plain)).packed(UP) is None


def test_other_block_sizes_are_no_packed_weights_of_ours(library, plain, tmp_path):
    parts = four_bit_parts(library, quant_type="nf4", compress_statistics=True, blocksize=128)
    folder = rewritten(plain, tmp_path / "model", parts, NF4)
    stored = StoredWeights(folder, read_shape(folder))
    assert stored.packed(UP) is None
    original = load_file(plain / "model.safetensors")[UP]
    expected = numbers(library, original, quant_type="nf4", compress_statistics=True, blocksize=128)
    assert torch.equal(stored.tensor(UP), expected)


# ---- who may start from them


def test_rounded_weights_are_no_base_of_full_fine_tuning(nf4, plain):
    [problem] = Model(path=str(nf4)).validate_adapter(Full())
    assert problem == (
        f"model.path={nf4}: 14 weights are stored as bitsandbytes nf4, and rounded weights are not trained further; use "
        "adapter=qlora or adapter=lora, or the folder of plain weights that it was made from"
    )
    assert list(Model(path=str(nf4)).validate_adapter(LoRA(full=["embed_tokens", "model.norm"]))) == []
    [problem] = Model(path=str(nf4)).validate_adapter(LoRA(full=["embed_tokens", "o_proj"]))
    assert problem.startswith(f"adapter.full: model.layers.0.self_attn.o_proj of {nf4} is stored as bitsandbytes nf4")
    assert list(Model(path=str(plain)).validate_adapter(Full())) == []


def test_rounded_weights_are_no_start_of_a_critic(nf4, plain):
    def problems(folder):
        return list(PPO(critic_path=str(folder)).validate_tokenizer(byte_tokenizer()))

    [problem] = problems(nf4)
    assert problem.startswith(f"pipeline.critic_path={nf4}: 14 weights are stored as bitsandbytes nf4")
    assert "use pipeline.critic=head" in problem
    assert problems(plain) == []


# ---- what is refused


DAMAGE = {
    "a record that is no JSON": ("quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8), "is no bitsandbytes"),
    "a shape that is another": ("quant_state.bitsandbytes__nf4", record(shape=[4, 4]), "(4, 4) and should be (24, 16)"),
    "a shape of nothing": ("quant_state.bitsandbytes__nf4", record(shape=[0, -1]), "are no positive integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_named_before_a_model_is_built(case, nf4, tmp_path):
    ending, tensor, sentence = DAMAGE[case]
    folder = Path(shutil.copytree(nf4, tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, f"{UP}.{ending}": tensor}, folder / "model.safetensors")
    with pytest.raises(FormatError) as error:
        ModelLoader(Model(path=str(folder)), DDP(), 0, 265).load()
    assert sentence in str(error.value)
    assert str(folder) in str(error.value)


def test_parts_that_are_missing_or_cut_are_named(nf4, tmp_path):
    for number, (ending, change) in enumerate({".absmax": None, "": lambda codes: codes[:-1]}.items()):
        folder = Path(shutil.copytree(nf4, tmp_path / f"model-{number}"))
        stored = load_file(folder / "model.safetensors")
        tensor = stored.pop(UP + ending)
        stored |= {} if change is None else {UP + ending: change(tensor)}
        save_file(stored, folder / "model.safetensors")
        with pytest.raises(FormatError, match=f"{UP} is no bitsandbytes nf4 weight"):
            WeightFiles(folder).tensor(UP)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_ways_that_are_not_read_are_refused_by_name(method, plain, tmp_path):
    folder = rewritten(plain, tmp_path / "model", lambda weight: {"qweight": weight}, {"quant_method": method})
    with pytest.raises(FormatError, match=f"quant_method={method}.*use the folder of plain weights"):
        read_shape(folder)
