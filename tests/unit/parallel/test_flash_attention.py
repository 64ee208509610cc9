"""FlashAttention 3 is taken where GPU, installation and settings allow it, for the length of a session."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from trainer.parallel.distributed import session
from trainer.parallel.flash_attention import MODULE, fastest_attention

GPU = torch.device("cuda", 0)
WORKS = """
import torch
library = torch.library.Library("flash_attn_3", "DEF")
library.define("fwd(Tensor q) -> Tensor")
library.define("bwd(Tensor q) -> Tensor")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lays down a GPU of a capability, and a module in the place of FlashAttention 3's."""

    def installed(major, source=None):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        if source is not None:
            (tmp_path / f"{MODULE}.py").write_text(source)

    yield installed
    sys.modules.pop(MODULE, None)


def taken(device=GPU, *, same_bytes=False):
    with fastest_attention(device, same_bytes=same_bytes) as line:
        inside = current_flash_attention_impl()
    assert current_flash_attention_impl() is None
    return inside, line


def test_hopper_takes_it_where_it_is_installed_and_the_order_is_free(install):
    install(9)
    inside, line = taken()
    assert (inside, "is taken where flash_attn_interface is installed" in line) == (None, True)
    install(9, WORKS)
    assert taken() == ("FA3", "attention by FlashAttention 3 (flash_attn_interface)")
    inside, line = taken(same_bytes=True)
    assert (inside, line.endswith("deterministic=true")) == (None, True)


@pytest.mark.parametrize(("device", "major"), [(GPU, 8), (GPU, 10), (torch.device("cpu"), 9)])
def test_other_devices_do_not_take_it(install, device, major):
    install(major, WORKS)
    assert taken(device) == (None, None)


def test_one_that_was_built_for_another_torch_is_named_and_not_taken(install, caplog):
    install(9, "raise ImportError('undefined symbol: _ZN3c10')")
    assert taken() == (None, None)
    assert "flash_attn_interface is installed and cannot be used (ImportError: undefined symbol" in caplog.text


def test_a_session_on_a_gpu_takes_it_unless_the_bytes_shall_be_the_same(install, monkeypatch):
    install(9, WORKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for same_bytes, name in ((False, "FlashAttention 3"), (True, "FlashAttention 2")):
        with session(same_bytes=same_bytes) as world:
            assert name in world.attention
