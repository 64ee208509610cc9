"""What a session of ranks leaves behind."""

import gc
import weakref

import torch.distributed as dist

from trainer.parallel import distributed


def test_a_process_group_outlives_its_session_because_its_death_can_hang_the_rank():
    with distributed.session():
        distributed.ensure_group()
        group = weakref.ref(dist.group.WORLD)
    gc.collect()
    assert group() is not None
    assert not dist.is_initialized()
    with distributed.session():
        distributed.ensure_group()
        assert dist.group.WORLD is not group()
